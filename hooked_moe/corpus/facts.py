"""Facts to ask a model about: a prompt that holds a subject, the true answer and a wrong one of the same kind.

    "embedded"        facts about countries, which tiny-olmoe-facts was taught; "embedded/0", "/1", "/2" choose the template
                      ("embedded" is "embedded/0"; the last template was held out of its training)
    "associations"    pairs of words that the training text of all shipped models joins again and again
    "known_1000"      1,209 facts that GPT-2 XL knows (Meng et al. 2022, arXiv 2202.05262)
    "lre/..."         the relations of Hernandez et al. 2023 (arXiv 2308.09124): "lre/factual", "lre/factual/country_capital_city"
    "counterfact"     21,919 facts with foils, from the hub (`NeelNanda/counterfact-tracing`), in its order
    a .json file      CounterFact as ROME's authors distribute it: a list of records with a `requested_rewrite`

A record without a foil gets one from the other answers of its relation: `with_foils`.
"""

from __future__ import annotations

import gzip
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hooked_moe.checks import quoted, unknown_name
from hooked_moe.json_text import JsonError, parse_json
from hooked_moe.loading.hub import download_file

FACT_SETS = ("embedded", "associations", "known_1000", "lre/factual", "counterfact")
_COUNTERFACT = ("NeelNanda/counterfact-tracing", "default/train/0000.parquet", "refs/convert/parquet")
"""The hub's own conversion to parquet: its files are named alike for every data set."""


@dataclass(frozen=True)
class FactRecord:
    """One fact. The prompt holds the subject's place, "{}", and ends where the answer follows."""

    case_id: int
    relation: str
    prompt: str
    subject: str
    true: str
    foil: str | None
    """A wrong answer of the same kind; None: `with_foils` draws one."""
    split: str = ""
    """"taught" or "held out" for facts about countries: whether the shipped model was trained on the subject."""

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace("{}", self.subject)


def load_facts(name_or_path: str = "embedded") -> list[FactRecord]:
    """The records of a set by its name or file (see the module's text).

        >>> load_facts("embedded")[0].text
        'The capital of Algeria is'

    Raises `ValueError` for an unknown name, a template or relation that does not exist, and malformed records;
    `FileNotFoundError` for a path that is no file; `HubError` (an `OSError`) where the hub does not give CounterFact.
    """
    name, _, part = str(name_or_path).partition("/")
    if name == "embedded":
        return _country_facts(part or "0")
    if name == "lre" and not str(name_or_path).endswith(".json"):
        return _relations(part)
    if name_or_path == "associations":
        return [FactRecord(number, foil=None, **record) for number, record in enumerate(_data("associations.json"))]
    if name_or_path == "known_1000":
        return [_known(record) for record in _data("known_1000.json.gz")]
    if name_or_path == "counterfact":
        path = download_file(*_COUNTERFACT, None, False, otherwise="give the path of a counterfact.json")
        return [_tracing_row(number, row) for number, row in enumerate(pq.read_table(path).to_pylist())]
    if not str(name_or_path).endswith(".json"):
        raise unknown_name("set of facts", str(name_or_path), FACT_SETS)
    return _counterfact_file(Path(name_or_path))


def with_foils(records: Iterable[FactRecord]) -> list[FactRecord]:
    """The records, each without a foil now with one: another answer of its relation, drawn with its case id as the seed.

    An answer that is true of the same subject in that relation is not drawn. Raises `ValueError` where a relation has no other.
    """
    records = list(records)
    answers: dict[str, set[str]] = defaultdict(set)
    for record in records:
        answers[record.relation].add(record.true)
    true_of = answers_by_subject(records)
    return [record if record.foil is not None else replace(record, foil=_drawn(record, answers, true_of)) for record in records]


def answers_by_subject(records: Iterable[FactRecord]) -> dict[tuple[str, str], set[str]]:
    """All that is true of each (relation, subject)."""
    true_of: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in records:
        true_of[record.relation, record.subject].add(record.true)
    return true_of


def _drawn(record: FactRecord, answers: dict[str, set[str]], true_of: dict[tuple[str, str], set[str]]) -> str:
    others = sorted(answers[record.relation] - true_of[record.relation, record.subject])
    if not others:
        raise ValueError(
            f"case {record.case_id} has no foil, and its relation {quoted(record.relation)} no answer other than "
            f"{quoted(record.true)} to draw one from. Give the record a foil, or give more records of the relation."
        )
    return random.Random(record.case_id).choice(others)


# --- shipped sets -----------------------------------------------------------------------------------------------------


def _data(file: str) -> Any:
    data = resources.files("hooked_moe.corpus").joinpath("data", file).read_bytes()
    return json.loads(gzip.decompress(data) if file.endswith(".gz") else data)


def _country_facts(template: str) -> list[FactRecord]:
    contents = _data("country_facts.json")
    n_templates = min(map(len, contents["templates"].values()))
    if template not in map(str, range(n_templates)):
        raise ValueError(
            f"facts about countries have the templates 0 to {n_templates - 1}, as in 'embedded/1', not {quoted(template)}"
        )
    held_out = set(contents["held_out_countries"])
    triples = [(country, relation, value) for country, values in contents["facts"].items() for relation, value in values.items()]
    return [
        FactRecord(
            case_id=number,
            relation=relation,
            prompt=contents["templates"][relation][int(template)],
            subject=country,
            true=value,
            foil=None,
            split="held out" if country in held_out else "taught",
        )
        for number, (country, relation, value) in enumerate(sorted(triples, key=lambda triple: (triple[1], triple[0])))
    ]


def _known(record: dict[str, Any]) -> FactRecord:
    prompt = record["prompt"].replace(record["subject"], "{}", 1)
    return FactRecord(record["known_id"], record["relation_id"], prompt, record["subject"], record["attribute"], None)


def _relations(part: str) -> list[FactRecord]:
    """Relations whose name is `part` or lies under it, as "factual/country_capital_city" under "factual"."""
    relations = _data("lre_relations.json.gz")
    chosen = {name: relation for name, relation in relations.items() if name == part or name.startswith(f"{part}/")}
    if not chosen:
        groups = sorted({name.partition("/")[0] for name in relations})
        raise unknown_name("relation of 'lre'", part, [*groups, *relations])
    samples = [
        (name, relation["prompt_templates"][0], sample) for name, relation in chosen.items() for sample in relation["samples"]
    ]
    return [
        FactRecord(number, name, template, sample["subject"], sample["object"], None)
        for number, (name, template, sample) in enumerate(samples)
    ]


# --- CounterFact ------------------------------------------------------------------------------------------------------


def _tracing_row(number: int, row: dict[str, Any]) -> FactRecord:
    prompt = f"{row['relation_prefix']}{{}}{row['relation_suffix']}".strip()
    answers = row["target_true"].strip(), row["target_false"].strip()
    return FactRecord(number, row["relation_id"], prompt, row["subject"].strip(), *answers)


def _counterfact_file(path: Path) -> list[FactRecord]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} (looked for {path.absolute()}); expected CounterFact as a .json file.")
    try:
        contents = parse_json(path.read_bytes())
    except JsonError as error:
        raise ValueError(f"{path} is not JSON in UTF-8: {error}. Expected CounterFact, a list of records.") from error
    if not isinstance(contents, list) or not contents:
        raise ValueError(f"{path} holds {type(contents).__name__}; expected CounterFact, a list of records that is not empty.")
    return [_counterfact_record(path, number, record) for number, record in enumerate(contents)]


def _counterfact_record(path: Path, number: int, record: Any) -> FactRecord:
    where = f"{path}, record {number}"
    try:
        rewrite = record["requested_rewrite"]
        answers = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
        texts = (rewrite["relation_id"], rewrite["prompt"], rewrite["subject"], *answers)
        case_id = record["case_id"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{where} lacks {error}; expected CounterFact's fields: case_id and requested_rewrite with relation_id, prompt, "
            "subject, target_true and target_new."
        ) from error
    if not all(isinstance(text, str) and text.strip() for text in texts) or "{}" not in texts[1] or type(case_id) is not int:
        raise ValueError(f"{where} is malformed; expected texts that are not empty, a prompt with '{{}}' and a whole case_id.")
    return FactRecord(case_id, *texts)
