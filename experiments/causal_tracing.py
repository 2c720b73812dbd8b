"""Which expert carries a fact: causal tracing with every expert of every layer, on facts that the model knows.

The same as `hooked-moe trace`; `--help` lists its options.
"""

import sys

from hooked_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["trace", *sys.argv[1:]]))
