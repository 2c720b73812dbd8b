"""The one door to the engine: a question and a request go in, tables come out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hooked_moe.counterfactuals.engine.clean_run import CleanBlock
from hooked_moe.counterfactuals.engine.fan_out import fan_out
from hooked_moe.counterfactuals.engine.lanes import Lanes
from hooked_moe.counterfactuals.engine.memory import variant_bytes
from hooked_moe.counterfactuals.engine.padding import Packed, Results
from hooked_moe.counterfactuals.engine.picks import PickQuestion, measure_picks, pick_parts
from hooked_moe.counterfactuals.engine.question import Question, SequenceQuestion
from hooked_moe.counterfactuals.engine.requests import Request
from hooked_moe.counterfactuals.engine.sequences import measure_sequences
from hooked_moe.counterfactuals.engine.steps import Steps, counted, in_turn
from hooked_moe.progress import progress_bar


def answer(question: Question | SequenceQuestion | PickQuestion, request: Request) -> Steps[Results]:
    """What becomes of the loss under every change that the question makes, and what it observes.

    The results are the tables `delta_loss`, `kl`, `readouts/<name>`, one for each column observed, and the baseline. All
    parts are measured one after another; or, where weights are streamed, side by side through the layers.
    """
    results = Results(request.layers, (len(request.packed.tokens), request.packed.original_length))
    n_layers = request.model.cfg.n_layers
    tasks: list[Steps[None]]
    if isinstance(question, PickQuestion):
        tasks = [measure_picks(question, request, part, results) for part in pick_parts(question.picks, request)]
    else:
        parts = request.parts(max(1, question.n_variants))
        tasks = [_measure_part(question, request, *part, results) for part in parts]
    passes = 1 if request.model.streams else len(tasks)
    with progress_bar(passes * n_layers, "measuring", "layer", shown=request.progress) as bar:
        yield from counted(in_turn(tasks, request.model.streams), bar.update, passes * n_layers)
    return results


def _measure_part(
    question: Question | SequenceQuestion, request: Request, packed: Packed, layers: list[int], results: Results
) -> Steps[None]:
    """Measure some layers at some rows and queries, and put what comes of it into the results."""

    def observe(clean: CleanBlock) -> None:
        if clean.layer in layers:
            for name, values in question.observe(clean).items():
                results.put(name, values[None], packed, [clean.layer], everywhere=True)

    if isinstance(question, SequenceQuestion):
        return measure_sequences(question, request, packed, layers, results, observe)
    return _fan_out_into(results, question, request, packed, layers, observe)


def _fan_out_into(
    results: Results,
    question: Question,
    request: Request,
    packed: Packed,
    layers: list[int],
    observe: Callable[[CleanBlock], None],
) -> Steps[None]:
    """Fan out, and put losses and readouts into the results."""
    variants = question.n_variants * len(layers) * packed.queries * packed.width
    streams = variants + packed.tokens.shape[1]  # those of the clean run too
    with request.waiting_room(streams * len(packed.tokens) * variant_bytes(request.model.cfg)) as waiting:
        out = yield from fan_out(
            request.model,
            packed,
            Lanes.of_variants(layers, question.n_variants),
            partial(question.branch, packed=packed, width=packed.width),
            {layer: partial(question.branch_again, packed=packed, width=packed.width) for layer in question.layers_again},
            request.readouts,
            waiting,
            observe,
            request.chunk_size(question.n_variants * packed.width),
            request.products,
        )
    question.see_end(out.final, packed)
    results.put_baseline(out.baseline, packed)
    if question.n_variants:
        baseline = out.baseline if packed.query_positions is None else out.baseline.gather(1, packed.query_positions)
        results.put("delta_loss", (out.losses - baseline).movedim(1, 3), packed, layers)
        results.put_kl(out.kl.movedim(1, 3), packed, layers)
        for name, values in out.readouts.items():
            results.put(f"readouts/{name}", values.movedim(1, 3), packed, layers)
