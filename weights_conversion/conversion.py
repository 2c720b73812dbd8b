from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from hooked_moe.config import HookedMoEConfig
from weights_conversion.errors import CheckpointError
from weights_conversion.hf_config import HFConfig
from weights_conversion.weight_map import Weight

NOT_IN_CHECKPOINTS = ("model_name", "revision", "dtype", "store", "device")
"""Fields of a config that say where a model came from or how it is held, not what it is."""


@dataclass(frozen=True)
class Conversion:
    """All that one family of checkpoints needs: how to read and write its config, and where its weights go."""

    model_type: str
    read_config: Callable[[HFConfig], HookedMoEConfig]
    """Raises `ValueError` for options that the model does not have. Called through `from_hf`, which adds the model type."""
    write_config: Callable[[HookedMoEConfig], dict[str, object]]
    weights: tuple[Weight, ...]
    """Every tensor of a checkpoint, in the layout that is saved. Weights without a parameter in a model are not in its
    checkpoint (biases, where a config has none), so one table serves all configs of a family."""
    alternatives: tuple[Weight, ...] = ()
    """Tensors that a checkpoint may have instead, each for all of one parameter: as transformers 5 can save them."""
    aliases: tuple[str, ...] = ()
    """Other model types whose checkpoints are of this family."""

    def from_hf(self, hf: HFConfig) -> HookedMoEConfig:
        """The config of a checkpoint; `CheckpointError` names the option that the model does not have."""
        try:
            return self.read_config(hf).replace(model_type=self.model_type)
        except CheckpointError:
            raise
        except ValueError as error:  # values that cannot describe any model, in the words of HookedMoEConfig
            raise hf.error(str(error)) from error

    def to_hf(self, cfg: HookedMoEConfig) -> dict[str, object]:
        """config.json for a model; `CheckpointError` names what the family's format cannot express."""
        if cfg.experts_by_layer is not None:
            raise CheckpointError(
                f"a checkpoint of model_type {self.model_type!r} states one number of experts for all layers, and this model has "
                f"{cfg.experts_by_layer} (layer by layer): remove as many from every layer with experts, or mask them instead"
            )
        written = self.write_config(cfg)
        try:
            back = self.from_hf(HFConfig(written, f"the config.json of this {self.model_type} model"))
        except CheckpointError as error:
            raise CheckpointError(f"this model cannot be saved as {self.model_type!r}: {error}") from error
        lost = [
            f"{field.name}={getattr(cfg, field.name)!r} would be read back as {getattr(back, field.name)!r}"
            for field in dataclasses.fields(cfg)
            if field.name not in NOT_IN_CHECKPOINTS and getattr(cfg, field.name) != getattr(back, field.name)
        ]
        if lost:
            raise CheckpointError(f"a checkpoint of model_type {self.model_type!r} cannot express: {'; '.join(lost)}")
        return written
