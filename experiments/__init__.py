"""Scripts: one per experiment, each a command of `hooked-moe`, and those that made the shipped models and corpus.

python experiments/audit.py --help             # the same as `hooked-moe audit --help`
python -m experiments.build_corpus --help      # these two are only in the repository
python -m experiments.train_tiny --help
"""
