"""The factor study's runs as units of work, for other machines: each is trained, or audited, into its own directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.support.factor_audits import audit_run
from experiments.support.factor_training import is_trained, train_run


@dataclass(frozen=True)
class StudyTask:
    """A stage of the study, "train" or "audit". Its units are planned runs: (directory's name, seed, run, levels)."""

    stage: str
    out: Path
    corpus: Path
    """What experiments.build_corpus wrote."""
    threads: int
    steps: int
    """Of every training."""

    def do(self, resource: Any, unit: tuple[str, int, int, Mapping[str, int]]) -> None:
        """Do the stage of a run; what has been done of it before is taken up."""
        name, seed, run, levels = unit
        directory = self.out / name
        directory.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(self.threads)
        if self.stage == "audit":
            audit_run(levels, seed, run, directory, self.corpus / "tokenizer.json")
        elif not is_trained(directory, self.steps):
            tokens = np.load(self.corpus / "train.npy", mmap_mode="r", allow_pickle=False)
            train_run(levels, seed, tokens, directory, self.steps)
