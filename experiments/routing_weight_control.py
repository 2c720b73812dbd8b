"""The control: rank the active experts by a score of the very token, and ask whether that one tells which matters.

The same as `hooked-moe control`; `--help` lists its options.
"""

import sys

from hooked_moe.cli.control import main

if __name__ == "__main__":
    sys.exit(main())
