"""The subject of an export: a run's towers, preprocessing and learned scale, and samples to compare embeddings on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from distill_core import Backbone, Decoder, Encoded, FeatureKind, Model, Slot, UserError
from distill_core.tools import model_of, places_in, run_recipe
from distill_vl.captions import CaptionAugmentation
from distill_vl.clip_text import ClipText
from distill_vl.pictures import PictureAugmentation
from distill_vl.vit import VisionTransformer
from distill_weights.layouts import SCALES

TEXTS = (
    "a red bird",
    "",
    "Two old boats, by the SEA; one is blue.",
    "don't!",
    "a small house with a green door, a river behind it and three white trees in front " * 8,
    "naïve café, 3 €",
)
"""From no words to more than the context holds."""


@dataclass
class Subject:
    """The student or the teacher of a run."""

    run: Path
    model: Model
    teacher: bool
    step: int
    recipe: dict[str, Any]
    scales: dict[str, Tensor]
    """`logit_scale` and `logit_bias` of the first loss that has one, among those that need no fused views."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Parts of the run that are not exported: path -> name of the component."""

    @classmethod
    def load(cls, run: Path, *, teacher: bool, checkpoint: str) -> Subject:
        """Raises `UserError` for what is no run, or has no such checkpoint or teacher."""
        from distill_core.tools import Checkpoints, Registry

        recipe = run_recipe(run, Registry.discover())
        saved = Checkpoints(run).read(checkpoint)
        recipe = recipe.of_stage(saved.get("stage", 0))
        state: dict[str, Tensor] = saved["objective"]
        model = model_of(recipe, state, str(run), teacher=teacher)
        scales: dict[str, Tensor] = {}
        for node in recipe.loss:
            for path, loss in _losses(f"loss.{node.id}", node):
                if scales or loss.cls.needs(loss.config, recipe.plan).fused:
                    continue  # its scale is not that of the towers' own embeddings
                own = {name: state[f"{path}.{name}"] for name in SCALES if f"{path}.{name}" in state}
                scales = {name: value.float().reshape(()) for name, value in own.items()}
        fusions = {**({"fusion": recipe.fusion} if recipe.fusion is not None else {}), **recipe.fusions}
        left_out = {name: node.cls.name for name, node in fusions.items()}
        left_out |= {f"heads.{name}": slot.cls.name for name, slot in recipe.heads.items()}
        return cls(run, model, teacher, int(saved["step"]), recipe.to_dict(), scales, left_out)

    @property
    def side(self) -> str:
        """`student` or `teacher`."""
        return "teacher" if self.teacher else "student"

    def items(self, modality: str) -> list[Any]:
        """Samples of a modality: drawn pictures of several sides, or texts of several lengths. Raises `UserError`."""
        augmentation = self.model.augment[modality]
        if isinstance(augmentation, PictureAugmentation):
            return pictures(augmentation.config.size)
        if isinstance(augmentation, CaptionAugmentation):
            return list(TEXTS)
        raise UserError(f"{modality}: {augmentation.name!r} is no augmentation of pictures or captions")

    def inputs(self, modality: str, items: Sequence[Any]) -> Tensor:
        """The backbone's input [N, ...] of the items, as evaluation makes it."""
        views = [[self.model.augment[modality].eval_view(item)] for item in items]
        return self.model.collators[modality](views, [0] * len(views)).groups[0].x[0]

    def embed(self, modality: str, items: list[Any], features: FeatureKind) -> Tensor:
        """The run's own embeddings [N, D], or class tokens [N, W], L2-normalised."""
        return self.model.encode(modality, items, features=features)

    def decoders(self) -> dict[str, Decoder]:
        """The decoders of this side, by the head's name, whose towers it has, too."""
        decoders = {name: head for name, head in self.model.heads.items() if isinstance(head, Decoder)}
        return {
            name: decoder
            for name, decoder in decoders.items()
            if {decoder.writes(decoder.config), *decoder.reads(decoder.config)} <= set(self.model.modalities)
        }

    def read(self, modality: str, items: Sequence[Any]) -> Encoded:
        """What a decoder is given of N items."""
        views = [[self.model.augment[modality].eval_view(item)] for item in items]
        return self.model.features(modality, views, tokens_of=(0,)).view(0)

    @torch.no_grad()
    def logits(self, decoder: Decoder, items: Mapping[str, Sequence[Any]]) -> Tensor:
        """The run's own logits [N, L, S] of N items of each modality, for all ids of those that are written."""
        read = {name: self.read(name, items[name]) for name in decoder.reads(decoder.config)}
        writes = decoder.writes(decoder.config)
        return decoder(read, self.inputs(writes, items[writes]))  # type: ignore[no-any-return]

    def clip(self, to: str) -> Clip:
        """Its towers, if they are CLIP's. Raises `UserError`, which names what the layout cannot hold."""
        image, text = (self._only(kind, to) for kind in (VisionTransformer, ClipText))
        vit: Any = self.model.backbone[image]
        text_tower: Any = self.model.backbone[text]
        if vit.config.pooling != "class_token":
            raise UserError(
                f"--to {to}: backbone.{image}.pooling is {vit.config.pooling}; CLIP has a class token. Try --to onnx"
            )
        if vit.config.class_tokens > 1:
            raise UserError(f"--to {to}: backbone.{image}.class_tokens is {vit.config.class_tokens}; CLIP has one")
        if vit.config.dim != text_tower.config.dim:
            raise UserError(
                f"--to {to}: backbone.{image}.dim is {vit.config.dim}, backbone.{text}.dim {text_tower.config.dim}"
            )
        augmentation = self.model.augment[image]
        if not isinstance(augmentation, PictureAugmentation):
            raise UserError(f"--to {to}: augment.{image} is {augmentation.name!r}, whose preprocessing is not known")
        others = [name for name in self.model.backbone if name not in (image, text)]
        self.left_out |= {f"backbone.{name}": self.model.backbone[name].name for name in others}
        return Clip(image, text, vit, text_tower, augmentation.config)

    def _only(self, kind: type[Backbone], to: str) -> str:
        # of modalities that share a tower the first, which has it
        towers = {id(module): name for name, module in reversed(self.model.backbone.items()) if type(module) is kind}
        names = list(towers.values())
        if len(names) != 1:
            has = ", ".join(f"backbone.{name} {module.name!r}" for name, module in self.model.backbone.items())
            raise UserError(
                f"--to {to} holds one {kind.name!r} beside another tower; this run has {has}. Try --to onnx"
            )
        return names[0]


@dataclass
class Clip:
    """A `vit` and a `clip_text`: their modalities, modules, and the options of the pictures' augmentation."""

    image: str
    text: str
    vit: Any
    text_tower: Any
    pictures: Any

    @torch.no_grad()
    def towers(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of both, by `image` and `text`; positions are those of the evaluated picture's size."""
        side = self.pictures.size // self.vit.config.patch
        image = {name: value.detach() for name, value in self.vit.state_dict().items() if name != "mask_token"}
        image["positional_embedding"] = self.vit.positions(side, side).detach()
        return {"image": image, "text": {name: value.detach() for name, value in self.text_tower.state_dict().items()}}


def _losses(path: str, loss: Slot[Any]) -> Iterator[tuple[str, Slot[Any]]]:
    """(path, loss) of a loss and of those in its options."""
    yield path, loss
    for at, inner in places_in(loss.config):
        if inner.cls.kind == "loss":
            yield from _losses(".".join((path, *at)), inner)


def pictures(size: int) -> list[Image.Image]:
    """Pictures of colour gradients and noise: of the towers' size first, larger, smaller, and not square."""
    rng, result = np.random.default_rng(0), []
    half = size // 2 + 1
    for width, height in ((size, size), (2 * size, 2 * size), (half, half), (3 * size, 2 * size), (640, 480)):
        ramp = np.stack(np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height)), -1)
        colours = (
            ramp @ rng.uniform(-200, 200, (2, 3)) + rng.uniform(60, 200, 3) + rng.normal(0, 12, (height, width, 3))
        )
        result.append(Image.fromarray(colours.clip(0, 255).astype(np.uint8)))
    return result


def unit(x: Tensor) -> Tensor:
    """L2-normalise [N, D], in fp32."""
    return normalize(x.detach().float(), dim=-1)
