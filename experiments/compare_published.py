"""Put what was measured beside the published tables: ours, published, difference, for every run named or found.

The same as `hooked-moe compare`; `--help` lists its options.
"""

import sys

from hooked_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
