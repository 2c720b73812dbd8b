"""The sets of facts: what each name gives, how foils are drawn, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hooked_moe.corpus import FactRecord, load_facts, with_foils

SIZES = {
    "embedded": 1074,
    "associations": 763,
    "known_1000": 1209,
    "lre/factual": 9696,
    "lre/factual/country_capital_city": 24,
}


@pytest.mark.parametrize("name", SIZES)
def test_a_shipped_set_has_the_records_of_its_source(name: str) -> None:
    records = load_facts(name)
    assert len(records) == SIZES[name]
    assert len({record.case_id for record in records}) == len(records)
    assert all(record.prompt.count("{}") == 1 and record.subject.strip() and record.true.strip() for record in records)
    assert not any("{}" in record.text for record in records)


def test_country_facts_are_the_same_in_every_template_and_know_what_was_taught() -> None:
    sets = [load_facts(f"embedded/{template}") for template in range(3)]
    for first, second in ((sets[0], sets[1]), (sets[0], sets[2])):
        assert [replace(record, prompt="") for record in first] == [replace(record, prompt="") for record in second]
        assert all(a.prompt != b.prompt for a, b in zip(first, second, strict=True))
    taught = {record.subject for record in sets[0] if record.split == "taught"}
    held_out = {record.subject for record in sets[0] if record.split == "held out"}
    assert (len(taught), len(held_out)) == (201, 22)
    assert not taught & held_out
    fact = next(record for record in sets[0] if (record.subject, record.relation) == ("Algeria", "capital"))
    assert (fact.text, fact.true) == ("The capital of Algeria is", "Algiers")


def test_a_foil_is_another_answer_of_the_relation_and_the_same_every_time() -> None:
    records = load_facts("embedded")
    drawn = with_foils(records)
    assert drawn == with_foils(reversed(list(reversed(records))))
    for record in drawn:
        others = {other.true for other in records if other.relation == record.relation}
        assert record.foil in others - {record.true}


def test_a_foil_that_is_given_stays_and_a_second_true_answer_is_never_drawn() -> None:
    given = FactRecord(0, "language", "In {} they speak", "Belgium", "Dutch", "Greek")
    also = FactRecord(1, "language", "In {} they speak", "Belgium", "French", None)
    other = FactRecord(2, "language", "In {} they speak", "Spain", "Spanish", None)
    assert with_foils([given])[0].foil == "Greek"
    for number in range(20):
        assert with_foils([given, replace(also, case_id=number), other])[1].foil == "Spanish"
    with pytest.raises(ValueError, match="case 1 has no foil, and its relation 'language' no answer other than 'French'"):
        with_foils([also])


def _counterfact(**changes: Any) -> dict[str, Any]:
    rewrite = {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "subject": "Danielle Darrieux",
        "target_true": {"str": "French"},
        "target_new": {"str": "English"},
        **changes,
    }
    return {"case_id": 7, "requested_rewrite": rewrite, "paraphrase_prompts": []}


def test_counterfact_is_read_from_the_file_that_its_authors_distribute(tmp_path: Path) -> None:
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([_counterfact()]))
    (record,) = load_facts(str(path))
    assert record == FactRecord(7, "P103", "The mother tongue of {} is", "Danielle Darrieux", "French", "English")
    assert record.text == "The mother tongue of Danielle Darrieux is"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("[", "is not JSON"),
        ("{}", "expected CounterFact, a list of records"),
        ("[]", "expected CounterFact, a list of records"),
        ('[{"case_id": 1}]', r"record 0 lacks 'requested_rewrite'"),
        (json.dumps([_counterfact(), _counterfact(prompt="no subject")]), "record 1 is malformed"),
        (json.dumps([_counterfact(subject=3)]), "record 0 is malformed"),
        (json.dumps([_counterfact(target_true="French")]), "record 0 lacks"),
    ],
)
def test_a_malformed_file_is_refused_with_its_place(contents: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "counterfact.json"
    path.write_text(contents)
    with pytest.raises(ValueError, match=message):
        load_facts(str(path))


def test_names_that_do_not_exist_raise_and_suggest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'known_1000'"):
        load_facts("known_100")
    with pytest.raises(ValueError, match="did you mean 'factual/country_capital_city'"):
        load_facts("lre/factual/country_capital")
    with pytest.raises(ValueError, match="templates 0 to 2"):
        load_facts("embedded/3")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*absent\.json"):
        load_facts(str(tmp_path / "absent.json"))
