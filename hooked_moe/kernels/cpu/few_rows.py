"""Products of a few rows with a large matrix on a CPU, which are most of the time that generating takes.

BLAS makes `x @ weight.T` of one row as a product of a matrix and a vector, on one core however many there are, and is far from
the speed of memory with two to four rows. Asked for the transposed outcome, `weight @ x.T`, it uses all cores and takes .3 to .8
of the time (MKL in torch 2.13, float32). In half precision oneDNN does not gain by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import wrap_torch_function

FEW = 4
_LARGE = 2**15
"""Elements of a matrix from which on its product gains more than the calls around it take."""
_LONG = 1024
"""The longest rows whose transposed product gains on a single core too."""


def are_few(rows: int, x: Float[Tensor, "*any d_in"], weight: Float[Tensor, "*expert d_out d_in"]) -> bool:
    """Whether a product of `rows` rows like those of `x` with the weight, or with that of one expert, is made transposed."""
    if not 1 <= rows <= FEW or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    d_out, d_in = weight.shape[-2:]
    enough = d_out * d_in >= _LARGE and (d_in <= _LONG or torch.get_num_threads() > 1)
    return enough and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))


def product(x: Float[Tensor, "row d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "row d_out"]:
    """`x @ weight.T`; of a single row, if transposed, as one of two that are alike."""
    if not are_few(len(x), x, weight):
        return x @ weight.T
    return (weight @ x.T).T if len(x) > 1 else (weight @ x.expand(2, -1).contiguous().T)[:, :1].T


def _tensors(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sequence[Tensor | None]:
    return x, weight, bias


@wrap_torch_function(_tensors)
def linear(
    x: Float[Tensor, "*any d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "*any d_out"]:
    """`F.linear`, faster for few rows. A `TorchFunctionMode` sees the call, as it sees that of `F.linear`."""
    if not are_few(x.shape[:-1].numel(), x, weight):
        return F.linear(x, weight, bias)
    out = product(x.reshape(-1, x.shape[-1]), weight).contiguous().view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias
