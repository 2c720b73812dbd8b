"""Upcycling: a mixture of experts that begins as copies of a dense model's MLPs."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor

from hooked_moe.components.gated_mlp import GatedMLP
from hooked_moe.components.moe import MoE
from hooked_moe.components.precision import at_least_float32
from hooked_moe.config import HookedMoEConfig
from hooked_moe.transformer import Transformer

Model = TypeVar("Model", bound=Transformer)

_ROUTED = ("num_experts", "experts_per_token", "d_expert", "norm_topk_prob", "d_shared", "shared_gate")
_MAY_DIFFER = {*_ROUTED, "experts_by_layer", "dense_layers", "d_mlp", "routed_scaling_factor", "model_name", "model_type"}


@torch.no_grad()
def upcycle(dense: Model, cfg: HookedMoEConfig, *, noise: float = 0.01, seed: int = 0) -> Model:
    """A new model of `cfg` that starts from a dense one of the same shape (Komatsuzaki et al. 2023, arXiv 2212.05055).

    A layer of `dense` is an ordinary MLP, or one expert that every token goes to with weight 1. Each expert is a copy of it, as
    wide as experts are: where that is narrower, a random subset of its neurons, drawn anew for each expert. Shared experts take
    the first neurons, which the routed ones then leave out. Every weight of an expert is multiplied by 1 + noise x N(0, 1), so
    that experts can part. Routers are new. All other weights are those of `dense`, which is not changed.

    An expert's output is scaled so that, under a router without preferences (and a gate of shared experts without), the layer's
    output is that of the dense MLP on average over the neurons drawn: by (MLP neurons / its own) / (sum of a token's routing
    weights).

    Raises `ValueError` for a config that differs in more than its experts, and for MLPs with fewer neurons than are needed.

    >>> from hooked_moe import HookedMoE, HookedMoEConfig
    >>> shape = dict(n_layers=1, d_model=8, d_vocab=10, n_ctx=8, n_heads=2, n_key_value_heads=2, d_head=4)
    >>> dense = HookedMoE(HookedMoEConfig(**shape, num_experts=1, experts_per_token=1, d_expert=12, norm_topk_prob=True))
    >>> moe = upcycle(dense, dense.cfg.replace(num_experts=8, experts_per_token=2, d_expert=6))
    >>> moe.blocks[0].mlp.num_experts
    8
    """
    _check_same_shape(dense.cfg, cfg)
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dense.cfg.dtype, torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of routers and gates
        model = type(dense)(cfg.replace(device=torch.device("cpu"), dtype=wide), dense.tokenizer)
    parameters = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        if ".mlp." not in name:
            parameters[name].copy_(parameter)
    for layer, (old, new) in enumerate(zip(dense.blocks, model.blocks, strict=True)):
        neurons = _neurons(old.mlp, layer)
        if isinstance(new.mlp, MoE):
            _fill_experts(new.mlp, neurons, cfg, noise, generator)
        else:
            _fill_mlp(new.mlp, neurons, torch.arange(len(neurons[0]), device="cpu"), layer)
    return model.to(cfg.device, cfg.dtype)


def _check_same_shape(dense: HookedMoEConfig, cfg: HookedMoEConfig) -> None:
    if cfg.expert_bias:
        raise ValueError("the config has experts with biases: how a dense MLP's would be shared among them is not defined here")
    differing = [
        field.name
        for field in dataclasses.fields(cfg)
        if field.name not in _MAY_DIFFER | {"device", "dtype"} and getattr(dense, field.name) != getattr(cfg, field.name)
    ]
    if differing:
        name = differing[0]
        raise ValueError(
            f"the dense model has {name}={getattr(dense, name)!r}, the new config {getattr(cfg, name)!r}: only experts may differ"
        )


def _neurons(mlp: MoE | GatedMLP, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate rows, up rows and down rows of a dense layer, each [neuron, d_model], in float32 or wider."""
    rows: tuple[Tensor, Tensor, Tensor]
    if isinstance(mlp, GatedMLP):
        rows = mlp.W_gate, mlp.W_in, mlp.W_out.T
    elif mlp.num_experts == 1 and mlp.shared is None and mlp.router.rule.renormalize:
        rows = mlp.experts.W_in[0, 0], mlp.experts.W_in[0, 1], mlp.experts.W_out[0].T
    else:
        raise ValueError(
            f"layer {layer} of the dense model is a mixture of {mlp.num_experts} experts; "
            "expected an ordinary MLP, or one expert with norm_topk_prob and without shared ones"
        )
    return tuple(at_least_float32(matrix.detach()).cpu() for matrix in rows)  # type: ignore[return-value]


def _fill_experts(
    moe: MoE, neurons: tuple[Tensor, Tensor, Tensor], cfg: HookedMoEConfig, noise: float, generator: torch.Generator
) -> None:
    n, shared = len(neurons[0]), cfg.d_shared or 0
    if n - shared < cfg.d_expert:
        raise ValueError(f"experts of {cfg.d_expert} neurons beside {shared} shared ones need as many; the dense MLP has {n}")
    if moe.shared is not None:
        _fill_mlp(moe.shared, neurons, torch.arange(shared, device="cpu"))
        if moe.W_shared_gate is not None:
            moe.shared.W_out.mul_(2.0)  # a gate without preferences halves it
    of_each = 0.5 if cfg.router_score == "sigmoid" else 1 / moe.num_experts  # of a router without preferences
    weight_sum = 1.0 if cfg.norm_topk_prob else cfg.experts_per_token * of_each
    scale = (n - shared) / (cfg.d_expert * weight_sum * cfg.routed_scaling_factor)
    for expert in range(moe.num_experts):
        drawn = shared + torch.randperm(n - shared, generator=generator, device="cpu")[: cfg.d_expert].sort().values
        gate, up, down = (
            rows[drawn] * (1 + noise * torch.randn(rows[drawn].shape, generator=generator, dtype=torch.float32, device="cpu"))
            for rows in neurons
        )
        moe.experts.W_in[expert].copy_(torch.stack((gate, up)))
        moe.experts.W_out[expert].copy_(scale * down.T)


def _fill_mlp(mlp: GatedMLP, neurons: tuple[Tensor, Tensor, Tensor], which: Tensor, layer: int | None = None) -> None:
    if len(which) != len(mlp.W_gate):
        raise ValueError(f"the dense MLP of layer {layer} has {len(which)} neurons, and d_mlp is {len(mlp.W_gate)}")
    gate, up, down = (rows[which] for rows in neurons)
    for own, rows in ((mlp.W_gate, gate), (mlp.W_in, up), (mlp.W_out, down.T)):
        own.copy_(rows)
