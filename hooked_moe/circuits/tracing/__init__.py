"""Which expert carries a fact: causal tracing with an expert axis (arXiv 2606.03780), exactly and with its controls.

A prompt whose answer the model knows is run, and run again with its subject corrupted. Then a part of the clean run is put
into the corrupted one at the last token. How far the true answer comes back over a wrong one is the part's *rescue*. Parts are
a layer's MLP output, its attention output, its routed and shared experts, and every single expert that is active in either run.
"""

from hooked_moe.circuits.tracing.protocol import AS_PUBLISHED, DEFINED, Protocol
from hooked_moe.circuits.tracing.result import TracingResult
from hooked_moe.circuits.tracing.selection import Candidate, Estimate, estimate
from hooked_moe.circuits.tracing.trace import trace_facts

__all__ = ["AS_PUBLISHED", "DEFINED", "Candidate", "Estimate", "Protocol", "TracingResult", "estimate", "trace_facts"]
