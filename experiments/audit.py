"""Remove every routed expert at every token, one at a time, and ask what the routing statistics knew about it.

The same as `hooked-moe audit`; `--help` lists its options.
"""

import sys

from hooked_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["audit", *sys.argv[1:]]))
