"""data2vec 2.0's targets, decoder and loss (Baevski et al. 2022, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import gelu, instance_norm, layer_norm

from distill_core import DEFAULT_TEACHER, Loss, LossConfig, Needs, Outputs, Plan, wide

Positive = Annotated[int, Field(gt=0)]


class Data2VecConfig(LossConfig):
    """The targets and the decoder. Defaults are those for ViT-B."""

    modality: str = "image"
    """The modality that is masked."""
    teacher: str = DEFAULT_TEACHER
    """The teacher whose layers are predicted."""
    top: Positive = 10
    """Layers K, the last ones, whose mean is predicted."""
    width: Positive = 768
    """Channels of the decoder's convolutions."""
    layers: Positive = 6
    """Convolutions of the decoder."""
    kernel: Positive = 3
    """Sides of each; odd."""
    groups: Positive = 16
    """Groups of channels of each; they divide `width` and the tower's."""
    class_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the term `class`: the first class token predicts the mean of the targets. 0 leaves it out."""


class Decoder(nn.Module):
    """Convolutions over the grid, each with a norm of the channels, GELU and a residual; then a linear map."""

    def __init__(self, config: Data2VecConfig, width: int, target: int) -> None:
        super().__init__()
        widths = [width, *[config.width] * config.layers]
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(a, b, config.kernel, padding=config.kernel // 2, groups=config.groups)
                for a, b in pairwise(widths)
            ]
        )
        self.project = nn.Linear(config.width, target)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, rows, columns, W] -> [N, rows, columns, target]."""
        for layer in self.layers:
            out = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            out = gelu(layer_norm(out, out.shape[-1:]))
            x = out + x if out.shape == x.shape else out
        projected: Tensor = self.project(x)
        return projected


class Data2Vec(Loss):
    """Of each masked view, the decoder's tokens at the dropped places come near the teacher's targets there.

    Targets are the mean of K layers, each normalised over the view's tokens, feature by feature (instance norm); then
    layer-normalised. A token's loss is the sum of its squared differences by sqrt(W).
    """

    name = "data2vec"
    Config = Data2VecConfig
    partial = True
    examples = (
        {"top": 2, "width": 32, "layers": 2, "groups": 4},
        {"top": 1, "width": 48, "layers": 1, "groups": 2, "class_weight": 0.0},
    )

    def __init__(self, config: Data2VecConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        image = plan.modalities[config.modality]
        self.grid_of = image.spec.grid
        self.views = plan.masked_views(config.teacher, config.modality)
        self.layers = _layers(config, plan)
        self.decoder = Decoder(config, image.spec.width, plan.teacher_spec(config.teacher, config.modality).width)

    @classmethod
    def needs(cls, config: Data2VecConfig, plan: Plan) -> Needs:
        """A masker that drops tokens; the teacher's last K layers of the whole views."""
        m, views = config.modality, plan.masked_views(config.teacher, config.modality)
        teacher_views = plan.teacher_views(config.teacher, m)
        return Needs(
            teacher={config.teacher: {m: tuple(teacher_views[t] for t in views)}},
            teacher_layers={config.teacher: {m: _layers(config, plan)}},
            tokens={m: tuple(s for times in views.values() for s in times)},
            dropped=(m,),
            embeddings=(),
        )

    @classmethod
    def problems(cls, config: Data2VecConfig, plan: Plan) -> Iterable[str]:
        """A grid of rows and columns, widths that the groups divide, a class token, and a masked view that the teacher
        sees."""
        image = plan.modalities[config.modality]
        axes = len(image.spec.stride)
        if axes not in (0, 2):
            yield f"{cls.name!r} decodes a grid of rows and columns; {config.modality!r} has {axes} axes"
        for width, what in ((image.spec.width, f"tower of {config.modality!r}"), (config.width, "decoder")):
            if width % config.groups:
                yield f"{cls.name!r}: groups: {config.groups} do not divide the width {width} of the {what}"
        if config.kernel % 2 == 0:
            yield f"{cls.name!r}: kernel: {config.kernel} is even; the grid must keep its size"
        target = plan.teacher_spec(config.teacher, config.modality)
        if config.class_weight and (not image.spec.class_tokens or target.width != image.spec.width):
            yield f"{cls.name!r}: class_weight: needs a class token as wide as the teacher's tokens; set it to 0"
        masked = plan.masked_views(config.teacher, config.modality)
        if config.teacher in plan.teachers and image.mask is not None and not masked:
            yield f"{cls.name!r}: the teacher {config.teacher!r} sees no view of {config.modality!r} that is masked"

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms `tokens` and, unless its weight is 0, `class`. The metrics, deviations of targets and predictions over
        places and samples, are near 0 in a collapse."""
        m, config = self.config.modality, self.config
        student, teacher = outputs.student[m], outputs.teacher[config.teacher][m]
        groups = {start + i: (group, i) for start, group in outputs.views[m].numbered() for i in range(len(group.x))}
        terms: dict[str, list[Tensor]] = {"tokens": [], "class": []}
        spread: dict[str, list[Tensor]] = {"target_deviation": [], "predicted_deviation": []}
        for t, times in self.views.items():
            targets = self._targets([teacher.layers[layer][t] for layer in self.layers])  # [B, L, W]
            for s in times:
                group, i = groups[s]
                made = self._decoded(student.tokens[s], group.keep[i], self.grid_of(group.x.shape[2:]))  # type: ignore[index]
                with torch.autocast(made.device.type, enabled=False):
                    dropped = group.dropped(targets.shape[1])[i][..., None]  # [B, L - L', 1]
                    target, prediction = targets.take_along_dim(dropped, 1), wide(made).take_along_dim(dropped, 1)
                    terms["tokens"].append(_distance(prediction, target))
                    spread["target_deviation"].append(target.flatten(0, 1).std(0, correction=0).mean())
                    spread["predicted_deviation"].append(prediction.detach().flatten(0, 1).std(0, correction=0).mean())
                    if config.class_weight:
                        assert student.class_tokens is not None
                        terms["class"].append(_distance(wide(student.class_tokens[s, :, 0]), targets.mean(1)))
        means = {name: torch.stack(values).mean() for name, values in terms.items() if values}
        if config.class_weight:
            means["class"] = config.class_weight * means["class"]
        return means, {name: torch.stack(values).mean() for name, values in spread.items()}

    def _targets(self, layers: list[Tensor]) -> Tensor:
        """K layers [B, L, W] -> [B, L, W], at least fp32."""
        with torch.autocast(layers[0].device.type, enabled=False):
            normed = [instance_norm(wide(layer).transpose(1, 2)).transpose(1, 2) for layer in layers]
            mean = torch.stack(normed).mean(0)
            return layer_norm(mean, mean.shape[-1:])

    def _decoded(self, tokens: Tensor, keep: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Tokens [B, L', W] at `keep` [B, L'], zeros elsewhere -> [B, L, W] of the decoder."""
        rows, columns = grid
        empty = tokens.new_zeros(tokens.shape[0], rows * columns, tokens.shape[-1])
        whole = empty.scatter(1, keep[..., None].expand_as(tokens), tokens)
        decoded: Tensor = self.decoder(whole.view(-1, rows, columns, tokens.shape[-1]))
        return decoded.flatten(1, 2)


def _distance(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens [..., W] of the sum of squared differences, by sqrt(W)."""
    total: Tensor = (prediction - target).square().sum(-1).mean()
    return total / math.sqrt(prediction.shape[-1])


def _layers(config: Data2VecConfig, plan: Plan) -> tuple[int, ...]:
    """The last K of the teacher's."""
    count = plan.teacher_spec(config.teacher, config.modality).layers
    return tuple(range(max(0, count - config.top), max(count, 1)))
