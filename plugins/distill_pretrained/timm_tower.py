"""Any picture model of timm as a backbone (Wightman, PyTorch Image Models)."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core import (
    Backbone,
    BackboneSpec,
    Collator,
    ComponentConfig,
    Encoded,
    ModalityPlan,
    UserError,
    did_you_mean,
    require_extra,
)
from distill_vl.vit import PictureCollator

Positive = Annotated[int, Field(gt=0)]


class TimmTowerConfig(ComponentConfig):
    """A model's name, the size it sees, and the embedding's width."""

    model: str = "vit_small_patch16_224"
    """timm's name of the architecture; weights come from this recipe's `weights`, as {name: timm, source: FILE}."""
    image_size: Positive = 224
    """Pixels of a global crop's side. ViTs and convolutional networks take crops of other sizes as well."""
    dim: Positive = 512
    """Width D of the embedding."""


class Shape(NamedTuple):
    """What a model gives, found without memory or computing."""

    width: int
    """Of the tokens."""
    pooled: int
    """Of what is pooled, before the projection."""
    tokens: bool
    """Whether there are tokens: patches of a ViT or places of a feature map."""
    sized: bool
    """Whether it takes pictures of one size alone."""
    patch: int
    """Pixels of a patch's side; 1 where it has none."""


def create(name: str, image_size: int) -> nn.Module:
    """The model without a classifier, for any size where it can. Raises `UserError` for an unknown name."""
    timm: Any = require_extra("timm", "timm")
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models(f'{name[:4]}*'))}")
    last: Exception | None = None
    for sizes in ({"img_size": image_size, "dynamic_img_size": True}, {"img_size": image_size}, {}):
        try:
            model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **sizes)
            return model
        except TypeError as error:  # the architecture has no such argument
            last = error
    raise UserError(f"timm cannot make {name!r}: {last}") from last


@functools.cache
def shape_of(name: str, image_size: int) -> Shape:
    """The shapes of a model's outputs. Raises `UserError` for a name or a size that it does not take."""
    with torch.device("meta"):
        model: Any = create(name, image_size).eval()
        try:
            output = model.forward_features(torch.empty(1, 3, image_size, image_size))
            pooled = model.forward_head(output, pre_logits=True)
        except (AssertionError, RuntimeError) as error:
            raise UserError(f"{name!r} does not take pictures of {image_size} px: {error}") from error
        try:
            model.forward_features(torch.empty(1, 3, 2 * image_size, 2 * image_size))
            sized = False
        except (AssertionError, RuntimeError):
            sized = True
    if not isinstance(output, Tensor) or not isinstance(pooled, Tensor) or pooled.ndim != 2:
        raise UserError(f"{name!r} gives more than features of a picture, and cannot be a backbone")
    last = getattr(model, "output_fmt", "NCHW") in ("NHWC", "NLC")
    width = output.shape[1] if output.ndim == 4 and not last else output.shape[-1]
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[-1]
    return Shape(width, pooled.shape[1], output.ndim in (3, 4), sized, patch)


def misfit(config: TimmTowerConfig, side: int) -> str | None:
    """Why the model takes no pictures of this side, or None."""
    shape = shape_of(config.model, config.image_size)
    if shape.sized and side != config.image_size:
        return (
            f"{config.model!r} takes pictures of {config.image_size} px alone, not of {side}: take a ViT or a "
            "convolutional network for crops of several sizes"
        )
    if side % shape.patch:
        return f"crops of {side} px are not whole patches of {shape.patch} px"
    return None


class TimmTower(Backbone):
    """A model of timm with a projection in its classifier's place: pooled = what it would classify, projected.

    Tokens are a ViT's patches (without class and register tokens) or a feature map's places; the class token is what is
    projected, where it is as wide as the tokens.
    """  # fmt: skip

    name = "timm"
    Config = TimmTowerConfig
    examples = (
        {"model": "test_vit", "image_size": 32, "dim": 24},
        {"model": "test_resnet", "image_size": 64, "dim": 24},
    )

    def __init__(self, config: TimmTowerConfig) -> None:
        super().__init__(config)
        shape = shape_of(config.model, config.image_size)
        self.model = create(config.model, config.image_size)
        self.classes = shape.width == shape.pooled
        self.proj = nn.Linear(shape.pooled, config.dim, bias=False)

    @classmethod
    def spec(cls, config: TimmTowerConfig) -> BackboneSpec:
        """Widths of the model. Raises `UserError` for a model that timm has not."""
        shape = shape_of(config.model, config.image_size)
        return BackboneSpec(shape.width, config.dim, shape.tokens, class_tokens=int(shape.width == shape.pooled))

    @classmethod
    def view_problems(cls, config: TimmTowerConfig, views: ModalityPlan) -> Iterable[str]:
        """Crops of a size that the model does not take."""
        sides = dict.fromkeys(shape[-1] for shape in views.shapes or ())
        return [problem for side in sides if (problem := misfit(config, side))]

    @classmethod
    def collator(cls, config: TimmTowerConfig) -> Collator:
        """Stacks pictures [3, S, S] of one size and role."""
        return PictureCollator(1)

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        """x [N, 3, S, S] -> pooled [N, D], tokens [N, L, W], class tokens [N, 1, W].

        Raises `UserError` for a size S that the model does not take.
        """
        if token_mask is not None:
            raise ValueError("timm cannot hide patches")
        if problem := misfit(self.config, x.shape[-1]):
            raise UserError(f"backbone timm: {problem}")
        count = x.shape[0]  # not len, which torch.export takes for a constant
        if not count:  # timm's reshapes want a picture
            x = x.new_zeros(1, *x.shape[1:])
        output: Tensor = self.model.forward_features(x)[:count]  # type: ignore[operator]
        pooled: Tensor = self.model.forward_head(output, pre_logits=True)  # type: ignore[operator]
        classes = pooled[:, None] if self.classes else None
        return Encoded(self.proj(pooled), self._tokens(output) if tokens else None, class_tokens=classes)

    def _tokens(self, output: Tensor) -> Tensor:
        """[N, L, W] of tokens [N, P + L, W], or of a feature map, channels first or last."""
        if output.ndim == 3:
            return output[:, getattr(self.model, "num_prefix_tokens", 0) :]
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            return output.flatten(1, 2)
        return output.flatten(2).transpose(1, 2)
