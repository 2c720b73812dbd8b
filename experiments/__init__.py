"""Scripts: one per experiment, each a command of `hooked-moe`, and those that made the shipped models and corpus.

python experiments/audit.py --help             # the same as `hooked-moe audit --help`
python -m experiments.build_corpus --help      # these two are only in the repository
python -m experiments.train_tiny --help
"""

import sys
from types import TracebackType


def _in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A script that is interrupted says so in a line, also while it still imports; other errors are shown as ever."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _in_one_line
