"""Which components carry a behaviour on given prompts, with an axis for experts."""

from hooked_moe.circuits.tracing import TracingResult, trace_facts

__all__ = ["TracingResult", "trace_facts"]
