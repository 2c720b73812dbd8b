"""What a tracing result depends on besides the model and the facts: all of it is recorded with the result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from hooked_moe.checks import as_int_or_none

Corruption = Literal["noise", "replace"]
TokenRule = Literal["space", "bare_first", "first_token"]
Search = Literal["joint", "layer_first"]
SigmaFrom = Literal["matrix", "subjects"]
Others = Literal["all", "three"]
Positions = Literal["final", "subject_last", "all"]
Foils = Literal["given", "prior"]


@dataclass(frozen=True)
class Protocol:
    """How facts are corrupted, which of them count, and how an expert is chosen."""

    corruption: Corruption = "replace"
    """"noise" on the embeddings of the subject's tokens, or "replace": another subject in their place (Zhang & Nanda 2023)."""
    positions: Positions = "final"
    """Which tokens are patched, one at a time: a prompt's last, its subject's last, or all from the subject's first on. What is
    read is always the last token."""
    sigma: float = 3.0
    """Standard deviation of the noise, in multiples of that of the embeddings."""
    sigma_from: SigmaFrom = "matrix"
    """Which embeddings: the whole matrix, or those of the subjects' tokens (ROME's)."""
    draws: int = 1
    """How many draws of the noise a case is the mean of."""
    max_donors: int = 5
    """How many other subjects a case is the mean of, at most."""
    prepend_bos: bool | None = None
    """None: as the checkpoint's tokenizer does."""
    instruction: str | None = None
    """What a user asks before, through the chat template of a model that is tuned to follow instructions: the prompt is then how
    the assistant's answer begins. None: the prompt alone."""
    token_rule: TokenRule = "space"
    """Which token an answer is: "space" the one of " answer", "bare_first" the one of "answer" if that is one and
    else of " answer", "first_token" the first of " answer"."""
    foils: Foils = "given"
    """With noise, the wrong answer of a case: "given" is the record's own, or one drawn from the relation's other answers;
    "prior" is that of those which the model finds as likely as the true one for the relation's other subjects."""
    min_margin: float | None = 1.0
    """Logits by which the clean run has to prefer the true answer (and a donor its own); None: any case counts."""
    min_drop: float | None = 0.5
    """Logits by which the corruption has to lower that preference."""
    min_relative_drop: float | None = None
    """The same as a share of the clean preference: at .5, the corruption has to remove half of it."""
    n_cases: int = 256
    """At most; fewer are used where there are fewer."""
    min_cases: int = 100
    """Fewer usable ones are refused."""
    seed: int = 0
    """Of the order of the records, of their split into discovery and validation, and of resampling."""
    search: Search = "joint"
    """Over all layers and experts together, or first for the layer with the largest effect."""
    recurrence: float = 0.5
    """Share of the discovery cases in which an expert has to be active to be a candidate."""
    others: Others = "all"
    """What an expert is compared with: all other experts active in its layer, or three of them drawn at random."""

    def __post_init__(self) -> None:
        choices = {
            "corruption": get_args(Corruption),
            "sigma_from": get_args(SigmaFrom),
            "token_rule": get_args(TokenRule),
            "search": get_args(Search),
            "others": get_args(Others),
            "positions": get_args(Positions),
            "foils": get_args(Foils),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {getattr(self, name)!r}")
        for name, least in (("draws", 1), ("max_donors", 1), ("n_cases", 4), ("min_cases", 4)):
            if (as_int_or_none(getattr(self, name)) or 0) < least:
                raise ValueError(f"{name} must be a whole number from {least}, not {getattr(self, name)!r}")
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"sigma must be a number from 0, not {self.sigma!r}")
        if not 0 < self.recurrence <= 1:
            raise ValueError(f"recurrence must be a share above 0 and up to 1, not {self.recurrence!r}")
        if self.foils == "prior" and self.corruption != "noise":
            raise ValueError(
                "foils='prior' goes with corruption='noise': with 'replace' the foil is the answer of the subject that is put "
                "in the place of the case's own"
            )
        if self.instruction is not None and self.prepend_bos is not None:
            raise ValueError(
                "with an instruction the chat template says whether a prompt begins with BOS: give prepend_bos=None, not "
                f"{self.prepend_bos!r}"
            )

    def as_metadata(self) -> dict[str, Any]:
        return asdict(self)


DEFINED = Protocol()
AS_PUBLISHED = replace(
    DEFINED,
    corruption="noise",
    prepend_bos=False,
    token_rule="bare_first",
    search="layer_first",
    others="three",
)
"""As arXiv 2606.03780 did it, as far as its numbers and their only public reproduction tell."""
PROTOCOLS = {"defined": DEFINED, "as_published": AS_PUBLISHED}


def protocol_of(name: str, changes: dict[str, Any]) -> Protocol:
    """A protocol by its name, with some fields changed; None leaves a field as it is, except where None is its meaning."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(map(repr, PROTOCOLS))}, not {name!r}")
    return replace(PROTOCOLS[name], **changes)
