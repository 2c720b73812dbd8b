"""Names of hook points and hooks, in whatever containers they are given: all of them are used, or an error says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_moe import HookedMoE

NAMES = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
CONTAINERS: dict[str, Callable[[], Any]] = {
    "list": lambda: NAMES,
    "tuple": lambda: tuple(NAMES),
    "set": lambda: set(NAMES),
    "keys": lambda: dict.fromkeys(NAMES).keys(),
    "generator": lambda: (name for name in NAMES),
    "map": lambda: map("blocks.{}.hook_resid_post".format, range(3)),
    "filter": lambda: filter(lambda name: True, NAMES),
    "array": lambda: np.array(NAMES),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("container", CONTAINERS)
def test_names_come_in_any_container_and_are_taken_once(container: str, model: HookedMoE, tokens: Tensor) -> None:
    seen: list[str] = []

    def note(activation: Tensor, hook: Any) -> None:
        seen.append(hook.name)

    given = CONTAINERS[container]
    with torch.no_grad():
        assert set(model.run_with_cache(tokens, names_filter=given())[1]) == set(NAMES)
        model.run_with_hooks(tokens, fwd_hooks=[(given(), note)])
        assert sorted(seen) == NAMES
        model.add_hook(given(), note)
        model(tokens)
    model.reset_hooks()
    assert sorted(seen) == sorted([*NAMES, *NAMES])
    variants = model.run_variants(tokens, [[(given(), lambda x, hook: 2 * x)], [(NAMES, lambda x, hook: 2 * x)]])
    torch.testing.assert_close(variants[0], variants[1], atol=1e-5, rtol=1e-5)  # rows of one product may round differently


@pytest.mark.usefixtures("unchecked")
def test_an_iterator_that_is_used_up_is_not_a_wish_for_nothing(model: HookedMoE, tokens: Tensor) -> None:
    names = filter(None, NAMES)
    assert len(list(names)) == 3
    for use in (lambda: model.run_with_cache(tokens, names_filter=names), lambda: model.add_hook(names, print)):
        with pytest.raises(ValueError, match="names of hook points is an iterator that yields nothing, or was used up before"):
            use()
    assert len(model.run_with_cache(tokens, names_filter=[])[1]) == 0  # a list says so itself


NO_NAMES: list[Any] = [3, {"hook_embed": 1}, b"hook_embed", [None], [3], ["hook_embed", ["hook_embed"]]]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("which", NO_NAMES, ids=repr)
def test_what_is_no_name_is_refused(which: Any, model: HookedMoE, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"names of hook points must be|unknown hook point"):
        model.run_with_cache(tokens, names_filter=which)


def note(activation: Tensor, hook: Any) -> None:
    """A hook that changes nothing."""


PAIR = (NAMES[0], note)
NO_HOOKS: dict[str, Any] = {
    "one pair": PAIR,
    "one pair in a list": list(PAIR),
    "a mapping": dict([PAIR]),
    "names without functions": NAMES,
    "functions without names": [note],
    "the other way round": [(note, NAMES[0])],
    "a result for a function": [(NAMES[0], note(torch.ones(1), None))],
    "three things": [(*PAIR, "fwd")],
    "a text": "hook_embed",
    "nothing": None,
    "a number": 3,
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("direction", ["fwd_hooks", "bwd_hooks"])
@pytest.mark.parametrize("wrong", NO_HOOKS)
def test_hooks_in_another_shape_are_refused_with_the_right_one(
    wrong: str, direction: str, model: HookedMoE, tokens: Tensor
) -> None:
    with pytest.raises(
        ValueError, match=rf"^{direction} must be a list of \(name, function\) pairs, as in \[\(name, function\)\]"
    ):
        model.run_with_hooks(tokens, **{direction: NO_HOOKS[wrong]})
    assert not any(point.active for point in model.hook_dict.values())


@pytest.mark.usefixtures("unchecked")
def test_hooks_come_in_any_container(model: HookedMoE, tokens: Tensor) -> None:
    def double(x: Tensor, hook: Any) -> Tensor:
        return 2 * x

    pairs = [(name, double) for name in NAMES]
    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=pairs)
        for given in (tuple(pairs), iter(pairs), dict(pairs).items(), map(list, pairs)):
            assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=given), expected)


@pytest.mark.usefixtures("unchecked")
def test_a_hook_that_cannot_be_called_is_refused_when_it_is_added(model: HookedMoE) -> None:
    with pytest.raises(ValueError, match=r"a hook must be a function fn\(activation, hook\), not None"):
        model.add_hook(NAMES[0], None)  # type: ignore[arg-type]
    assert not any(point.active for point in model.hook_dict.values())


@pytest.mark.usefixtures("unchecked")
def test_layers_of_a_cache_are_any_whole_numbers(model: HookedMoE, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    for layer in (np.int64(-1), torch.tensor(-1), np.int8(2), torch.tensor(2)):
        assert cache["pattern", layer] is cache["pattern", 2]
    for wrong in (2.0, True, "2"):
        with pytest.raises(ValueError, match="the layer must be a whole number"):
            cache["pattern", wrong]
    with pytest.raises(KeyError, match="is in 3 places; give a layer too"):  # None stands for every layer
        cache["pattern", None]


@pytest.mark.usefixtures("unchecked")
def test_layers_of_a_pass_are_any_whole_numbers(model: HookedMoE, tokens: Tensor) -> None:
    with torch.no_grad():
        resid = model(tokens, stop_at_layer=2)
        for layer in (np.int64(2), torch.tensor(-1)):
            assert torch.equal(model(tokens, stop_at_layer=layer), resid)
            assert torch.equal(model(resid, start_at_layer=layer), model(tokens))
    for wrong in (1.5, True, "1", [1]):
        with pytest.raises(ValueError, match="stop_at_layer must be a whole number"):
            model(tokens, stop_at_layer=wrong)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64])
def test_token_ids_are_of_any_dtype_of_whole_numbers(dtype: torch.dtype, model: HookedMoE, tokens: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(model(tokens.to(dtype)), model(tokens))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 2, 3], r"not \[1, 2, 3\]; torch.tensor\(\[ids\]\) makes one of a list of ids"),
        ([[1, 2, 3]], r"not .*torch.tensor\(\[ids\]\) makes one of a list of ids"),
        (np.array([[1, 2, 3]]), r"not ndarray of int64 \[1, 3\]; torch.tensor"),
        (torch.tensor([1, 2, 3]), r"not torch.int64 \[3\]; tokens\[None\] makes a batch of one row"),
        (torch.ones(1, 3), r"not torch.float32 \[1, 3\]"),
        (torch.ones(1, 3, dtype=torch.complex64), r"not torch.complex64 \[1, 3\]"),
        (torch.ones(1, 3, dtype=torch.bool), r"not torch.bool \[1, 3\]"),
        ({"input_ids": torch.ones(1, 3)}, "not {'input_ids'"),
        (3, "not 3;"),
        (None, "not None;"),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_what_are_no_token_ids_is_refused_with_what_makes_some(given: Any, message: str, model: HookedMoE) -> None:
    with pytest.raises(ValueError, match=r"expected token ids as an integer tensor \[batch, pos\], or text, " + message):
        model(given)


@pytest.mark.usefixtures("unchecked")
def test_an_attention_mask_says_which_tokens_are_real(model: HookedMoE, tokens: Tensor) -> None:
    mask = torch.ones(tokens.shape, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask)
        for given in (mask.bool(), mask.to(torch.uint8), mask.numpy(), mask.tolist(), mask.bool().tolist()):
            assert torch.equal(model(tokens, attention_mask=given), expected)
    added = torch.zeros(tokens.shape).masked_fill(mask == 0, -torch.inf)  # as some give it: zeros are real tokens there
    for wrong in (added, mask.float(), 2 * mask, mask - 1, mask + 1):
        with pytest.raises(ValueError, match="attention_mask must be bool, or whole numbers: 1 at real tokens and 0 at"):
            model(tokens, attention_mask=wrong)
