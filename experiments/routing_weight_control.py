"""The control: rank the active experts by per-token scores, and ask whether these tell which expert matters.

The same as `hooked-moe control`; `--help` lists its options.
"""

import sys

from hooked_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["control", *sys.argv[1:]]))
