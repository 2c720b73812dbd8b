"""Remove experts for good by every ranking, and see what that costs, and whether the effect table had said so.

The same as `hooked-moe prune`; `--help` lists its options.
"""

import sys

from hooked_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prune", *sys.argv[1:]]))
