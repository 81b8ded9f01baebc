"""Pretrained weights of a timm model, as timm itself reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_core import (
    ComponentConfig,
    LoadReport,
    Objective,
    UserError,
    WeightLoader,
    read_state_dict,
    require_extra,
    unwrapped,
)
from distill_pretrained.timm_tower import TimmTower
from distill_vl.pictures import other_pixels


class TimmWeightsConfig(ComponentConfig):
    """A file, and the backbone that takes it."""

    source: str | None = None
    """A `.safetensors` or torch file; null fetches the weights that timm names for the model, over the network, into
    its own cache."""
    key: str | None = None
    """The state dict that is taken where a torch file holds several; null takes the EMA's where there is one."""
    to: str = "image"
    """The modality whose backbone (`timm`) takes them."""


class TimmWeights(WeightLoader):
    """Load a timm model's weights: timm renames other layouts (DINO's, DeiT's) and resizes position embeddings.

    The classifier is left; the projection to the embedding is new.
    """

    name = "timm"
    Config = TimmWeightsConfig
    examples = ({"source": "no-such-file.pt"},)

    @torch.no_grad()
    def apply(self, objective: Objective) -> LoadReport:
        """Raises `UserError` for what is no weights of this model; loads nothing then."""
        to, source = self.config.to, self.config.source
        module: Any = dict(objective.backbone.items()).get(to)
        if not isinstance(module, TimmTower):
            raise UserError(f"weights: timm: backbone.{to} is no `timm`; `to` names the modality that has one")
        model: Any = module.model
        tensors, remarks = (self._fetch(module), []) if source is None else self._read(Path(source), model)
        what = source or f"timm's weights of {module.config.model}"
        own = model.state_dict()
        taken = {key: value for key, value in tensors.items() if key in own}
        wrong = [f"{key}: missing in it" for key in own if key not in taken] + [
            f"{key}: shape {list(value.shape)}, this model has {list(own[key].shape)}"
            for key, value in taken.items()
            if value.shape != own[key].shape
        ]
        if wrong:
            problems = wrong[:6] + ([f"... and {len(wrong) - 6} more"] if len(wrong) > 6 else [])
            raise UserError(f"weights: {what} does not fit {module.config.model!r}:\n  " + "\n  ".join(problems))
        for key, value in taken.items():
            own[key].copy_(value)
        remarks.append(f"backbone.{to}.proj is new")
        if rest := sorted({key.split(".")[0] for key in tensors if key not in own}):
            remarks.append(f"left out: {', '.join(rest)}")
        pretrained_config = model.pretrained_cfg
        why = f"timm's own weights of {module.config.model} were trained with"
        remarks += other_pixels(objective.plan, to, pretrained_config["mean"], pretrained_config["std"], why)
        names = frozenset(f"backbone.{to}.model.{key}" for key in taken)
        return LoadReport("; ".join([f"{what}: {len(taken)} tensors", *remarks]), names)

    def _read(self, path: Path, model: Any) -> tuple[dict[str, Tensor], list[str]]:
        wrapped, remarks = read_state_dict(path, self.config.key)
        state: Any = unwrapped(wrapped)
        try:
            if filtered := getattr(__import__(type(model).__module__, fromlist=["x"]), "checkpoint_filter_fn", None):
                state = filtered(state, model)
        except Exception as error:
            raise UserError(f"weights: {path}: cannot be loaded: {error}") from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(f"weights: {path}: holds no state dict (a mapping of names to tensors)")
        return state, remarks

    def _fetch(self, module: TimmTower) -> dict[str, Tensor]:
        timm: Any = require_extra("timm", "timm")
        size = module.config.image_size
        reason: TypeError | None = None
        for options in ({"img_size": size}, {}):
            try:
                state: dict[str, Tensor] = timm.create_model(
                    module.config.model, pretrained=True, num_classes=0, **options
                ).state_dict()
                return state
            except TypeError as error:  # convolutional models have no img_size
                reason = error
            except Exception as error:
                raise UserError(
                    f"weights: timm's weights of {module.config.model} cannot be fetched: {error}"
                ) from error
        raise UserError(f"weights: timm cannot make {module.config.model!r}: {reason}")
