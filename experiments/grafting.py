"""Which layers and which parts carry the difference between two trainings of one architecture.

The same as `hooked-moe study grafts`; `--help` lists its options.
"""

import sys

from hooked_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["study", "grafts", *sys.argv[1:]]))
