"""Say what an audit of a model takes, before anything is downloaded: operations, memory, disk and time.

The same as `hooked-moe plan`; `--help` lists its options.
"""

import sys

from hooked_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
