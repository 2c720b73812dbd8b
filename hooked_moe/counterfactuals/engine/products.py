"""How the products of a block with its weights are made: as the components write them, or of a variant's change alone.

    W x' = W x + W (x' - x)

Of every product of the clean run, in float32, the input x and the outcome W x are kept while its block is visited. A variant adds
the product of what differs, for which W and x' - x are rounded to bfloat16 or float16: so one part in 2^9 or 2^12 of a change is
lost, and of what does not change, nothing. The sums are in float32, and all that is no product (norms, attention, routing,
activations) is made of them.

Components need not know. Wherever they multiply by a weight but in the experts, they call `F.linear` or our own `linear`, and
torch shows both to a `TorchFunctionMode` of this thread; the experts, whose products are grouped, are run by a function that is
handed to the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hooked_moe.components.experts import ExpertGroups, Experts
from hooked_moe.components.moe import ExpertOutputs, MoE
from hooked_moe.counterfactuals.engine.clean_run import RunExperts, gather_positions
from hooked_moe.kernels.cpu import few_rows
from hooked_moe.kernels.cpu.expert_mlp import ROW_MULTIPLE, blocks_of, runs_by_block
from hooked_moe.kernels.cpu.grouped_matmul import grouped_matmul
from hooked_moe.kernels.cpu.scratch import Scratch
from hooked_moe.kernels.swiglu import swiglu


class Products:
    """The products of one block, as its components write them."""

    @contextmanager
    def of_clean_run(self) -> Iterator[RunExperts]:
        """While the context lasts, the clean run goes through the block. Yields how its experts run."""
        yield MoE.run_experts

    @contextmanager
    def of_variants(self, positions: Int[Tensor, "batch token"] | None) -> Iterator[RunExperts]:
        """The same for variants [variant x batch, token, d_model], whose tokens are at these packed positions (None: at all)."""
        yield MoE.run_experts


AS_WRITTEN = Products()


class ProductsOfChange(Products):
    """The products of one block, those of variants of their change alone, in a narrower dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._clean = _CleanProducts(dtype)

    @contextmanager
    def of_clean_run(self) -> Iterator[RunExperts]:
        with self._clean:
            yield self._clean.run_experts

    @contextmanager
    def of_variants(self, positions: Int[Tensor, "batch token"] | None) -> Iterator[RunExperts]:
        changed = _ChangedProducts(self._clean, positions)
        with changed:
            yield changed.run_experts


def products_in(dtype: torch.dtype | None) -> Products:
    """For a block; of the change in `dtype`, or, with None, as the components write them."""
    return AS_WRITTEN if dtype is None else ProductsOfChange(dtype)


class _Product(NamedTuple):
    weight: Float[Tensor, "d_out d_in"]
    """Kept, so that no other takes its address, by which a product is found."""
    x: Float[Tensor, "batch pos d_in"]
    out: Float[Tensor, "batch pos d_out"]


class _ExpertProducts(NamedTuple):
    """The products of the experts that serve the clean run."""

    x: Float[Tensor, "batch pos d_model"]
    pre: Float[Tensor, "n gate_and_up"]
    out: Float[Tensor, "n d_model"]
    row: Int[Tensor, "batch pos expert"]
    """Where the two of a token and an expert are; -1 if it does not serve the token."""


class _LinearCalls(TorchFunctionMode):
    """While it is entered, products by `F.linear` and `few_rows.linear` of this thread are by its `linear`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.linear if func in (F.linear, few_rows.linear) else func)(*args, **(kwargs or {}))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class _CleanProducts(_LinearCalls):
    """Keeps what goes into every product of the clean run, and what comes of it."""

    experts: _ExpertProducts

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._products: dict[int, _Product] = {}
        self._narrow: dict[int, Tensor] = {}

    def linear(
        self, x: Float[Tensor, "batch pos d_in"], weight: Float[Tensor, "d_out d_in"], bias: Tensor | None = None
    ) -> Float[Tensor, "batch pos d_out"]:
        out = F.linear(x, weight, bias)
        self._products[weight.data_ptr()] = _Product(weight, x, out)
        return out

    def run_experts(
        self, moe: MoE, x: Float[Tensor, "batch pos d_model"], indices: Int[Tensor, "batch pos slot"], scratch: Scratch | None
    ) -> ExpertOutputs:
        """Stage by stage, which rounds as in one go."""
        groups = ExpertGroups(indices, moe.num_experts)
        pre = moe.experts.project_in(x, groups)
        out = moe.experts.project_out(moe.experts.activate(pre, groups), groups)
        row = indices.new_full((*indices.shape[:2], moe.num_experts), -1).scatter_(-1, indices, groups.place)
        self.experts = _ExpertProducts(x, pre, out, row)
        return ExpertOutputs(out, groups.place)

    def product_with(self, weight: Tensor) -> _Product:
        """The clean run's product with a weight, however the call views that."""
        return self._products[weight.data_ptr()]

    def narrow(self, weight: Tensor) -> Tensor:
        """The weight in the narrower dtype. It is there while the block is visited, not longer."""
        key = weight.data_ptr()
        if key not in self._narrow:
            self._narrow[key] = weight.to(self.dtype)
        return self._narrow[key].view(weight.shape)


class _ChangedProducts(_LinearCalls):
    """The clean run's products, and those of what is different in variants."""

    def __init__(self, clean: _CleanProducts, positions: Int[Tensor, "batch token"] | None) -> None:
        super().__init__()
        self._clean, self._positions = clean, positions
        self._here: dict[int, Tensor] = {}
        self._shift: tuple[Tensor, Tensor] | None = None

    def linear(
        self, x: Float[Tensor, "row token d_in"], weight: Float[Tensor, "d_out d_in"], bias: Tensor | None = None
    ) -> Float[Tensor, "row token d_out"]:
        """The bias is in the clean run's product."""
        clean = self._clean.product_with(weight)
        change = F.linear(self._shift_of(x, clean.x), self._clean.narrow(weight))
        return _plus_clean(change, self._at_positions(clean.out))

    def run_experts(
        self, moe: MoE, x: Float[Tensor, "row token d_model"], indices: Int[Tensor, "row token slot"], scratch: Scratch | None
    ) -> ExpertOutputs:
        """An expert that does not serve the token in the clean run has no product there to add to: it runs in float32."""
        clean, slots = self._clean.experts, indices.shape[-1]
        shift = self._shift_of(x, clean.x).flatten(0, 1)
        row_of_expert = self._at_positions(clean.row)
        variants = indices.unflatten(0, (-1, len(row_of_expert)))
        clean_row = row_of_expert.expand(len(variants), -1, -1, -1).gather(-1, variants).flatten()
        serves_clean = clean_row >= 0
        known, new = serves_clean.nonzero().flatten(), serves_clean.logical_not_().nonzero().flatten()

        experts = indices.flatten()
        groups = ExpertGroups(experts[known][None, :, None], moe.num_experts)
        rows = (scratch or Scratch()).matrix(len(experts) + ROW_MULTIPLE, x.shape[-1], like=x)
        own = known[groups.order]
        self._run_known(moe.experts, shift, own // slots, clean_row[own], groups, rows)
        place = torch.empty_like(experts)
        place[known] = groups.place.flatten()
        if len(new):
            plain = moe.run_experts(x.flatten(0, 1)[new // slots][None], experts[new][None, :, None])
            rows[len(known) : len(experts)] = plain.rows
            place[new] = len(known) + plain.place.flatten()
        return ExpertOutputs(rows[: len(experts)], place.view(indices.shape))

    def _run_known(
        self,
        experts: Experts,
        shift: Float[Tensor, "token d_model"],
        token: Int[Tensor, " n"],
        clean_row: Int[Tensor, " n"],
        groups: ExpertGroups,
        out: Float[Tensor, "rows d_model"],
    ) -> None:
        """The experts' outputs into the first n rows of `out`; one expert after another, which may write some rows more."""
        clean, n = self._clean.experts, len(token)
        W_in, W_out = self._clean.narrow(experts.W_in).flatten(1, 2), self._clean.narrow(experts.W_out)
        if not runs_by_block(n, W_out, shift):
            _changed_mlp(
                out[:n],
                shift.index_select(0, token),
                clean.pre.index_select(0, clean_row),
                clean.out.index_select(0, clean_row),
                partial(grouped_matmul, weight=W_in, ends=groups.ends),
                partial(grouped_matmul, weight=W_out, ends=groups.ends),
                experts,
            )
            return
        token, clean_row = (F.pad(index, (0, ROW_MULTIPLE)) for index in (token, clean_row))
        for expert, rows in blocks_of(groups.ends_on_host, shift.dtype):
            _changed_mlp(
                out[rows],
                shift.index_select(0, token[rows]),
                clean.pre.index_select(0, clean_row[rows]),
                clean.out.index_select(0, clean_row[rows]),
                partial(torch.mm, mat2=W_in[expert].T),
                partial(torch.mm, mat2=W_out[expert].T),
                experts,
            )

    def _shift_of(self, x: Float[Tensor, "row token width"], clean_x: Tensor) -> Float[Tensor, "row token width"]:
        """What differs from the clean run, in the narrower dtype. Several products in a row are of the same one."""
        if self._shift is None or self._shift[0] is not x:
            here = self._at_positions(clean_x)
            self._shift = x, (x.unflatten(0, (-1, len(here))) - here).flatten(0, 1).to(self._clean.dtype)
        return self._shift[1]

    def _at_positions(self, clean: Tensor) -> Tensor:
        """What the clean run has, at the positions of the variants; gathered once for all variants."""
        if self._positions is None:
            return clean
        if id(clean) not in self._here:
            self._here[id(clean)] = gather_positions(clean, self._positions)
        return self._here[id(clean)]


def require_in_range(
    losses: Float[Tensor, "variant batch query"],
    targets: Int[Tensor, "batch query"],
    streams: Float[Tensor, "variant batch token d_model"] | None,
) -> None:
    """Raise `ValueError` if some loss, by products in float16, is not a number where there is a target (-1: none), or some last
    stream, where later tokens are read too."""
    lost = int((~losses.isfinite() & (targets >= 0)).sum())
    if streams is not None:
        lost += int((~streams.sum(-1).isfinite()).sum())
    if lost:
        raise ValueError(
            f"products='float16': {lost} of the predictions after a removal are not finite. float16 ends at 65,504, and what a "
            "removal changes in this model may be more, or its weights are; products='bfloat16' has the range of float32"
        )


def _plus_clean(change: Float[Tensor, "row token width"], clean: Float[Tensor, "batch token width"]) -> Tensor:
    return (clean + change.unflatten(0, (-1, len(clean)))).flatten(0, 1)


def _changed_mlp(
    changed_out: Float[Tensor, "n d_model"],
    shift: Float[Tensor, "n d_model"],
    pre: Float[Tensor, "n gate_and_up"],
    out: Float[Tensor, "n d_model"],
    project_in: Callable[[Tensor], Tensor],
    project_out: Callable[[Tensor], Tensor],
    experts: Experts,
) -> None:
    """An expert's output, into `changed_out`, from the clean run's products and the change of its input."""
    changed = swiglu(pre + project_in(shift), experts.clamp) - swiglu(pre, experts.clamp)
    torch.add(out, project_out(changed.to(shift.dtype)), out=changed_out)
