"""The CUDA kernel of prefix attention, on the CPU, against the definition of attention in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_moe.kernels import launches
from tests.cuda import host


@dataclass(frozen=True)
class Case:
    variants: int = 3
    batch: int = 2
    queries: int = 21
    width: int = 1
    kv_heads: int = 2
    group: int = 2
    head_width: int = 16
    value_width: int = 16
    n_keys: int = 21
    positions: str | None = None




def drawn(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    own = (case.variants, case.batch, case.queries * case.width)
    shapes = {
        "q": (*own, case.kv_heads * case.group, case.head_width),
        "own_k": (*own, case.kv_heads, case.head_width),
        "own_v": (*own, case.kv_heads, case.value_width),
        "keys": (case.batch, case.n_keys, case.kv_heads, case.head_width),
        "values": (case.batch, case.n_keys, case.kv_heads, case.value_width),
    }
    inputs: dict[str, Tensor | None] = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    inputs["positions"] = None
    if case.positions == "random":
        inputs["positions"] = torch.randint(case.n_keys + 1, (case.batch, case.queries), generator=generator)
    return inputs


def on_kernel(inputs: dict[str, Tensor | None], width: int, scale: float, **options: bool) -> Tensor:
    q, own_v, keys = inputs["q"], inputs["own_v"], inputs["keys"]
    variants, batch, tokens, heads, head_width = q.shape
    n_keys, kv_heads = keys.shape[1:3]
    sizes = {"variants": variants, "batch": batch, "queries": tokens // width, "width": width}
    sizes |= {"kv_heads": kv_heads, "group": heads // kv_heads}
    launch = launches.prefix_attention(**sizes, head_width=head_width, value_width=own_v.shape[-1], dtype=q.dtype)
    out = host.empty(*q.shape[:-1], own_v.shape[-1], dtype=q.dtype)
    host.run(launch, out, *inputs.values(), *sizes.values(), n_keys, scale, **options)
    return out


def by_definition(inputs: dict[str, Tensor | None], width: int, scale: float) -> Tensor:
    """Every query with the keys it sees, one at a time."""
    q, own_k, own_v, keys, values = (inputs[name].double() for name in ("q", "own_k", "own_v", "keys", "values"))
    positions = inputs["positions"]
    out = q.new_empty(*q.shape[:-1], values.shape[-1])
    for v, b, token in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        query, window = token // width, slice(token // width * width, token + 1)
        position = query if positions is None else int(positions[b, query])
        k, x = (torch.cat((clean[b, :position], own[v, b, window])) for clean, own in ((keys, own_k), (values, own_v)))
        seen = (x.transpose(0, 1) for x in (k, x))
        out[v, b, token] = F.scaled_dot_product_attention(q[v, b, token, :, None], *seen, scale=scale, enable_gqa=True)[:, 0]
    return out


CASES = {
    "one variant, one query": Case(variants=1, batch=1, queries=1, n_keys=1),
    "odd head sizes": Case(head_width=7, value_width=5, kv_heads=3, group=1),
    "values narrower than keys": Case(head_width=24, value_width=16, group=1),
    "values wider than keys": Case(head_width=16, value_width=40),
    "a group of four": Case(group=4, kv_heads=1),
    "many tiles of keys": Case(variants=2, batch=1, queries=150, n_keys=150, kv_heads=1),
    "positions in any order": Case(positions="random", queries=30, n_keys=70),
    "more queries than keys": Case(queries=40, n_keys=9),
    "windows": Case(width=3, positions="random", queries=9, n_keys=40, group=1),
    "latent attention": Case(variants=1, batch=1, queries=20, n_keys=20, head_width=192, value_width=128, kv_heads=1, group=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_definition(case: Case, dtype: torch.dtype) -> None:
    inputs, scale = drawn(case, dtype), case.head_width**-0.5
    out = on_kernel(inputs, case.width, scale)
    expected = by_definition(inputs, case.width, scale)
    if dtype == torch.float32:
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    else:  # rounded once, as are the weights of what is mixed
        rounding = torch.finfo(dtype).eps / 2
        sizes = inputs | {name: inputs[name].abs() for name in ("own_v", "values")}
        bound = rounding * (expected.abs() + 2 * by_definition(sizes, case.width, scale)) + 1e-5
        assert ((out.double() - expected).abs() <= bound).all()
