"""The savings on the page: a table of all layers together, a map by layer, and the tables behind it."""

import math
from collections.abc import Callable

from hooked_moe.report.blocks import Block, Folded, Key, Paragraph, Section, Table, TableCell, TableRow, table_row
from hooked_moe.report.figures.names import FAMILY_TITLES, label
from hooked_moe.report.number_text import DASH, interval, nats, p_value, share, share_interval, signed
from hooked_moe.report.outcome_words import SAVING_WORDS
from hooked_moe.report.savings import EFFECT_TITLES, FAMILIES, KL, LOSS, TOTAL, Row, Savings
from hooked_moe.report.sections import MOST_LAYERS_WITH_NUMBERS, outcome_key

_DIRECTIONS = {"prune lowest": "lowest", "prune highest": "highest", "none published": "none published"}


def savings_section(savings: Savings, figure: tuple[Block, ...] = ()) -> Section:
    """All that savings.csv says, after the figure that draws it."""
    by_layer = [
        Folded(f"By layer in numbers: {EFFECT_TITLES[effect]}", (_layer_table(savings, effect),), on_paper=False)
        for effect in EFFECT_TITLES
    ]
    blocks: tuple[Block, ...] = (
        *figure,
        Paragraph(_definition(savings)),
        _total_table(savings),
        _key(savings),
        Paragraph(_evidence()),
        _map(savings, LOSS),
        Folded("The same map for the expected loss (KL)", (_map(savings, KL),), on_paper=False),
        Folded(_SLOT_TITLE, (Paragraph(_SLOT_NOTE), _slot_table(savings)), on_paper=True),
        *by_layer,
    )
    return Section("savings", "What each criterion saves", blocks)


def _definition(savings: Savings) -> str:
    row = savings.totals(LOSS, FAMILIES)[0]
    return (
        "The saving of a criterion is the mean cost of removing an active expert at random less that of removing the active "
        "expert which the criterion ranks for pruning first, at the same tokens. It is a share of the random cost, "
        f"{nats(row['random_cost'])} nats here: 100% means that the removal is free, 0% that the criterion chooses no better "
        f"than chance. Intervals are 95% bootstrap intervals over {row['n_documents']:,} documents "
        f"({row['n_positions']:,} positions, counted in every layer). The realised loss is that of the token that followed; the "
        "expected loss is its mean over tokens drawn from the model, which is the KL divergence between the model's predictions "
        "with and without the expert."
    )


def _evidence() -> str:
    return (
        "z and p compare a criterion with itself after its scores were permuted over the experts of each layer, which makes it "
        "nonsense: p is corrected for all criteria shown. The interval says how the saving varies between documents, p whether "
        "a criterion that knows nothing could reach it. Contrast is the cost of the expert pruned last less that of the expert "
        "pruned first, as a share of the random cost. Of the oracle is the saving as a share of what a ranking by the measured "
        "mean effects of other documents saves. Mean of layers averages the shares of single layers, so that a layer whose "
        "removals cost more does not count for more."
    )


_COLUMNS: tuple[tuple[str, Callable[[Row, Row | None], str | TableCell]], ...] = (
    ("prunes first", lambda row, _: _DIRECTIONS[row["direction"]] if row["family"] in ("paper", "extended") else DASH),
    ("saved", lambda row, _: share(row["saving_share"])),
    ("95% interval", lambda row, _: share_interval(row["saving_share_low"], row["saving_share_high"])),
    ("outcome", lambda row, _: _outcome(row)),
    ("saved, expected", lambda _, kl: _of(kl, "saving_share", share)),
    ("95% interval", lambda _, kl: share_interval(kl["saving_share_low"], kl["saving_share_high"]) if kl else DASH),
    ("mean of layers", lambda row, _: share(row["mean_layer_share"])),
    ("contrast", lambda row, _: share(row["contrast_share"])),
    ("of the oracle", lambda row, _: share(row["share_of_best"])),
    ("z", lambda row, _: _number(row["z"])),
    ("p", lambda row, _: p_value(row["p_family"])),
)


def _total_table(savings: Savings) -> Table:
    rows = []
    for family in FAMILIES:
        members = savings.totals(LOSS, (family,))
        if members:
            rows.append(TableRow(heading=FAMILY_TITLES[family]))
        for row in members:
            expected = savings.total(row["ranking"], KL)
            rows.append(table_row(label(row["ranking"]), *(show(row, expected) for _, show in _COLUMNS)))
    return Table(("ranking", *(title for title, _ in _COLUMNS)), tuple(rows), "cells savings")


def _outcome(row: Row) -> TableCell:
    words = SAVING_WORDS[row["outcome"]]
    return TableCell(words.name, css=words.css, badge=True)


def _of(row: Row | None, column: str, spell: Callable[[float], str]) -> str:
    return spell(row[column]) if row else DASH


def _number(value: float) -> str:
    return DASH if math.isnan(value) else signed(value, 1)


def _key(savings: Savings) -> Key:
    outcomes = {row["outcome"] for row in savings.rows}
    return outcome_key({outcome: words for outcome, words in SAVING_WORDS.items() if outcome in outcomes})


def _map(savings: Savings, effect: str) -> Table:
    """Rankings by layers: the outcome as a mark and a colour, and the share saved where there is room."""
    layers = _layers(savings)
    numbers = len(layers) <= MOST_LAYERS_WITH_NUMBERS
    rows = []
    for family in FAMILIES:
        members = savings.totals(effect, (family,))
        if members:
            rows.append(TableRow(heading=FAMILY_TITLES[family]))
        for member in members:
            by_layer = {row["layer"]: row for row in savings.by_layer(member["ranking"], effect)}
            cells = (_mark(by_layer.get(layer), numbers) for layer in layers)
            rows.append(table_row(label(member["ranking"]), *cells))
    return Table((f"layer ({EFFECT_TITLES[effect]})", *layers), tuple(rows), "map" if numbers else "map deep")


def _mark(row: Row | None, numbers: bool) -> TableCell:
    if row is None:
        return TableCell("")
    words = SAVING_WORDS[row["outcome"]]
    ends = share_interval(row["saving_share_low"], row["saving_share_high"])
    title = f"{words.name}: {share(row['saving_share'])} {ends}"
    return TableCell(words.mark, css=words.css, small=share(row["saving_share"]) if numbers else "", title=title)


def _layers(savings: Savings) -> list[str]:
    return sorted({row["layer"] for row in savings.rows} - {TOTAL}, key=int)


_SLOT_TITLE = "Order within a position, and what runs through the slot"
_SLOT_NOTE = (
    "Spearman is the mean rank correlation with the effect within a position, over all active experts. "
    "An active expert's slot is its rank by routing weight at the token, and experts in high slots cost more. The slot share is "
    "the part of the difference between the expert pruned last and the one pruned first that comes from the slots they hold; "
    "the contrast within slots compares experts that hold the same slot."
)


def _slot_table(savings: Savings) -> Table:
    columns = (
        *("ranking", "Spearman", "Spearman, expected", "slot share", "slot share, expected"),
        *("contrast within slots (nats)", "95% interval"),
    )
    rows = []
    for row in savings.totals(LOSS, FAMILIES):
        expected = savings.total(row["ranking"], KL)
        contrast = [row[f"within_slot_contrast{end}"] for end in ("", "_low", "_high")]
        cells = (
            signed(row["spearman"], 3),
            _of(expected, "spearman", lambda value: signed(value, 3)),
            share(row["slot_share"]),
            _of(expected, "slot_share", share),
            signed(contrast[0], 4),
            interval(contrast[1], contrast[2], 4),
        )
        rows.append(table_row(label(row["ranking"]), *cells))
    return Table(columns, tuple(rows))


def _layer_table(savings: Savings, effect: str) -> Table:
    columns = ("layer", "outcome", "random (nats)", "pruned first", "pruned last", "saved", "95% interval", "z", "p", "Spearman")
    rows = []
    for member in savings.totals(effect, FAMILIES):
        rows.append(TableRow(heading=label(member["ranking"])))
        for row in savings.by_layer(member["ranking"], effect):
            if row["outcome"] == "refused":
                rows.append(table_row(row["layer"], TableCell(f"refused: {row['note']}", columns=len(columns) - 1)))
                continue
            cells = (
                *(nats(row[name]) for name in ("random_cost", "lowest_cost", "highest_cost")),
                share(row["saving_share"]),
                share_interval(row["saving_share_low"], row["saving_share_high"]),
                _number(row["z"]),
                p_value(row["p_family"]),
                signed(row["spearman"], 3),
            )
            rows.append(table_row(row["layer"], _outcome(row), *cells))
    return Table(columns, tuple(rows), "cells")
