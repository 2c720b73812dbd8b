"""Run every experiment of arXiv 2606.10703, in the defined and in the released form, on the shipped models.

The same as `hooked-moe paper`; `--help` lists its options.
"""

import sys

from hooked_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["paper", *sys.argv[1:]]))
