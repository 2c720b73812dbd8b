"""The one door to the engine: a question and a request go in, tables come out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hooked_moe.counterfactuals.engine.clean_run import CleanBlock
from hooked_moe.counterfactuals.engine.fan_out import fan_out
from hooked_moe.counterfactuals.engine.memory import variant_bytes
from hooked_moe.counterfactuals.engine.padding import Packed, Results
from hooked_moe.counterfactuals.engine.question import Question, SequenceQuestion
from hooked_moe.counterfactuals.engine.requests import Request
from hooked_moe.counterfactuals.engine.sequences import measure_sequences
from hooked_moe.counterfactuals.engine.steps import Steps, counted, side_by_side
from hooked_moe.progress import progress_bar


def answer(question: Question | SequenceQuestion, request: Request) -> Steps[Results]:
    """What becomes of the loss under every change that the question makes, and what it observes.

    The results are the tables `delta_loss`, `kl`, `readouts/<name>`, one for each column observed, and the baseline. All
    parts are measured one after another; or, where weights are streamed, side by side through the layers.
    """
    results = Results(request.layers, (len(request.packed.tokens), request.packed.original_length))
    n_variants, n_layers = max(1, question.n_variants), request.model.cfg.n_layers
    tasks = (_measure_part(question, request, *part, results) for part in request.parts(n_variants))
    together = request.model.streams or not request.progress  # the parts need not be counted
    passes = 1 if together else sum(1 for _ in request.parts(n_variants))
    with progress_bar(passes * n_layers, "measuring", "layer", shown=request.progress) as bar:
        if request.model.streams:
            yield from counted(side_by_side(tasks), bar.update, n_layers)
        else:
            for task in tasks:
                yield from counted(task, bar.update, n_layers)
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
            layers,
            question.n_variants,
            partial(question.branch, packed=packed, width=packed.width),
            {layer: partial(question.branch_again, packed=packed, width=packed.width) for layer in question.layers_again},
            request.readouts,
            waiting,
            observe,
            request.chunk_size(question.n_variants * packed.width),
        )
    question.see_end(out.final, packed)
    results.put_baseline(out.baseline, packed)
    if question.n_variants:
        baseline = out.baseline if packed.query_positions is None else out.baseline.gather(1, packed.query_positions)
        results.put("delta_loss", (out.losses - baseline).movedim(1, 3), packed, layers)
        results.put_kl(out.kl.movedim(1, 3), packed, layers)
        for name, values in out.readouts.items():
            results.put(f"readouts/{name}", values.movedim(1, 3), packed, layers)
