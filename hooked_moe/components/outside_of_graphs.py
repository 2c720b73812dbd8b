"""The experts as torch.compile leaves them alone. Imported while a model is being compiled, and not before: to name what the
compiler leaves out imports the compiler, which takes longer than all else that is imported.
"""

from __future__ import annotations

import torch

from hooked_moe.components.moe import MoE

run_experts = torch.compiler.disable(MoE.run_experts_eagerly)
"""How many rows an expert has depends on the data, and torch traces its own grouped product in bfloat16 alone."""
