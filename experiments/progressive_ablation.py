"""Remove one, two, ... all active experts at one token: how the loss changes, in which order of removal.

The same as `hooked-moe progressive`; `--help` lists its options.
"""

import sys

from hooked_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["progressive", *sys.argv[1:]]))
