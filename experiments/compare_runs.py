"""Put two audits side by side: what differs between them, and which differences in savings their documents bear out.

The same as `hooked-moe compare-runs`; `--help` lists its options.
"""

import sys

from hooked_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["compare-runs", *sys.argv[1:]]))
