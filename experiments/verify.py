"""Is this checkpoint the model it says it is, and is it run here as transformers runs it? A report, check by check.

The same as `hooked-moe verify`; `--help` lists its options.
"""

import sys

from hooked_moe.cli.verify import main

if __name__ == "__main__":
    sys.exit(main())
