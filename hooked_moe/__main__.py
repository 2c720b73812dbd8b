"""`python -m hooked_moe` is `hooked-moe`."""

import sys

from hooked_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
