"""A corpus into effect tables: a run, its directory, its parts on demand, and the checks that gate them."""

from hooked_moe.measurement.part_request import measured_positions
from hooked_moe.measurement.run import Run, open_measurement
from hooked_moe.measurement.tokenized_corpus import TokenizedCorpus

__all__ = ["Run", "TokenizedCorpus", "measured_positions", "open_measurement"]
