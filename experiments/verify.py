"""Check whether a checkpoint is the model that it says it is, and is run here as transformers runs it.

The same as `hooked-moe verify`; `--help` lists its options.
"""

import sys

from hooked_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
