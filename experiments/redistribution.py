"""Measure how far a token's other experts make up for one: each expert's contribution against the rest of the routed sum.

The same as `hooked-moe redistribution`; `--help` lists its options.
"""

import sys

from hooked_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["redistribution", *sys.argv[1:]]))
