"""Grafting: a model with some of its parts taken from another training of the same architecture.

Which layers and which parts carry the difference between two trainings? Zhang, Bengio & Singer (2019, arXiv 1902.01996) put the
initial weights back into single layers; here it is the weights of another training, part by part.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection
from typing import TypeVar

import torch

from hooked_moe.config import HookedMoEConfig
from hooked_moe.surgery.parts import BLOCK_PARTS, Layers, Parts, Place, chosen_places, places
from hooked_moe.tokenizer import Tokenizer
from hooked_moe.transformer import Transformer

Model = TypeVar("Model", bound=Transformer)

_MAY_DIFFER = ("model_name", "revision", "dtype", "device", "n_ctx", "initializer_range")
"""Fields of a config that say nothing about where a weight goes."""


@torch.inference_mode(False)
def graft(a: Model, b: Transformer, layers: Layers = "all", parts: Parts = tuple(BLOCK_PARTS)) -> Model:
    """A new model: `a` with the parameters of `parts` in `layers` taken from `b`. Neither is changed.

    Parts are "attention" (with the norm before it), "router", "experts", "shared", "mlp" (of dense layers) and "ln2" in blocks,
    and "embedding", "final_norm" and "unembedding" outside of them, which are taken whatever `layers` says; "all" names all of
    them. By default, all parts of blocks. A part that the model lacks is refused where it is named.

    The two need a common ancestor to be comparable part by part: heads, experts and neurons of independent trainings are permuted
    against each other. See `align_experts`.

    Raises `ValueError` for models whose configs, tokenizers or dtypes differ, for layers and parts that do not exist, and for
    streamed models.

    >>> from hooked_moe import HookedMoE
    >>> a, b = HookedMoE.from_pretrained("tiny-olmoe"), HookedMoE.from_pretrained("tiny-olmoe")
    >>> mixed = graft(a, b, layers={4, 5}, parts=("experts", "router"))
    """
    check_graftable(a, b)
    available = places(a)
    chosen = default_places(available, layers, parts)
    hosts = dict(a.named_parameters())
    donors = dict(b.named_parameters())
    taken = {name for place in chosen for name in available[place]}
    memo: dict[int, object] = {id(a.tokenizer): a.tokenizer}
    for name in taken:
        memo[id(hosts[name])] = torch.nn.Parameter(donors[name].detach().clone(), hosts[name].requires_grad)
    return _unhooked(copy.deepcopy(a, memo))


def _unhooked(model: Model) -> Model:
    """Hooks of a model stay with it: its copy has none."""
    model.reset_hooks(including_permanent=True)
    return model


def default_places(available: Collection[Place], layers: Layers, parts: Parts) -> frozenset[Place]:
    """`chosen_places`, where the default names the parts of blocks that there are."""
    if parts == tuple(BLOCK_PARTS):
        parts = [part for part in BLOCK_PARTS if part in {own for _, own in available}]
    return chosen_places(available, layers, parts)


def check_graftable(a: Transformer, b: Transformer) -> None:
    """Raise `ValueError` that names the first difference between two models that cannot exchange parts."""
    check_same_architecture(a.cfg, b.cfg)
    if a.cfg.dtype != b.cfg.dtype:
        raise ValueError(f"the models have weights in {a.cfg.dtype} and {b.cfg.dtype}: load both in one dtype")
    check_same_tokenizer(a.tokenizer, b.tokenizer)


def check_same_architecture(a: HookedMoEConfig, b: HookedMoEConfig) -> None:
    """Raise `ValueError` that names the first field in which two configs differ, other than where the weights came from."""
    for field in dataclasses.fields(a):
        first, second = getattr(a, field.name), getattr(b, field.name)
        if field.name not in _MAY_DIFFER and first != second:
            raise ValueError(
                f"the models differ in {field.name}: {first!r} and {second!r}; parts can be exchanged between trainings of one "
                "architecture only"
            )


def check_same_tokenizer(a: Tokenizer | None, b: Tokenizer | None) -> None:
    """Raise `ValueError` for two tokenizers that differ; a model without one reads the other's tokens."""
    if a is None or b is None:
        return
    if a.backend.to_str() != b.backend.to_str():
        raise ValueError("the models have different tokenizers: the same text would not be the same tokens to both")


class Grafts:
    """Many grafts of two models in turn, without copies: a model whose parameters are those of `a` or of `b`.

    The model that `model` returns is one and the same each time, and shares its weights with both; change none of them.
    """

    @torch.inference_mode(False)
    def __init__(self, a: Transformer, b: Transformer) -> None:
        check_graftable(a, b)
        self.places = places(a)
        self.cfg = a.cfg
        memo: dict[int, object] = {id(parameter): _shared(parameter) for parameter in a.parameters()}
        self._model = _unhooked(copy.deepcopy(a, memo | {id(a.tokenizer): a.tokenizer}))
        self._sources = {name: (own, other) for (name, own), (_, other) in zip(_named(a), _named(b), strict=True)}

    def model(self, from_b: Collection[Place]) -> Transformer:
        """The graft of these places of `b` onto `a`."""
        for place, names in self.places.items():
            for name in names:
                self._model.get_parameter(name).data = self._sources[name][place in from_b].data
        return self._model


def _named(model: Transformer) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters())


def _shared(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Another parameter over the same memory."""
    return torch.nn.Parameter(parameter.detach(), requires_grad=False)


def untrained(model: Model, seed: int = 0) -> Model:
    """A model of the same architecture with new weights: what a part is worth against none, as the null of a graft."""
    random_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        return type(model)(model.cfg, model.tokenizer)
    finally:
        torch.random.set_rng_state(random_state)
