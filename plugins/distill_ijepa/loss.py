"""I-JEPA's predictor and loss (Assran et al. 2023, section 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import layer_norm, smooth_l1_loss

from distill_core import DEFAULT_TEACHER, PREDICTED, Loss, LossConfig, Needs, Outputs, Plan, wide
from distill_vl.transformer import Sequences, Transformer

Positive = Annotated[int, Field(gt=0)]


class IJepaConfig(LossConfig):
    """The predictor's size. Defaults are those for ViT-B."""

    modality: str = "image"
    """The modality that is masked."""
    teacher: str = DEFAULT_TEACHER
    """The teacher whose tokens are predicted."""
    width: Positive = 384
    """Width P of the predictor's tokens."""
    layers: Positive = 6
    """Its blocks."""
    heads: Positive = 12
    """Attention heads of each block; they divide `width`."""
    beta: Annotated[float, Field(gt=0)] = 1.0
    """Below this difference the loss is quadratic."""

    @model_validator(mode="after")
    def _fits(self) -> IJepaConfig:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads} and of 4")
        return self


class Predictor(nn.Module):
    """A narrow ViT: predicts a block's tokens from the context's, and a mask token at each place of the block.

    Positions are fixed sines and cosines.
    """

    def __init__(self, config: IJepaConfig, context: int, target: int) -> None:
        super().__init__()
        self.embed, self.project = nn.Linear(context, config.width), nn.Linear(config.width, target)
        self.mask_token = nn.Parameter(torch.zeros(config.width))
        self.transformer = Transformer(config.width, config.layers, config.heads, 4.0)
        self.norm = nn.LayerNorm(config.width, 1e-6)
        for linear in (self.embed, self.project):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, keep: Tensor, places: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Tokens [B, L', W] that stand at `keep` [B, L'], `places` [B, N, T] of N blocks, -1 where there is none ->
        [B, N, T, W]."""
        (samples, blocks, count), context = places.shape, keep.shape[1]
        positions = sines(grid, self.mask_token.shape[0], tokens.device).to(tokens.dtype)
        known = (self.embed(tokens) + positions[keep]).repeat_interleave(blocks, 0)  # [B * N, L', P]
        asked = (self.mask_token + positions[places.clamp(min=0)]).flatten(0, 1).to(known.dtype)  # [B * N, T, P]
        x = torch.cat([known, asked], 1)
        real = torch.cat([keep.new_ones(samples * blocks, context, dtype=torch.bool), places.flatten(0, 1) >= 0], 1)
        shape = (samples * blocks, context + count)
        out = self.transformer(x.flatten(0, 1), Sequences(shapes=(shape,), mask=real)).view(*shape, -1)
        predicted: Tensor = self.project(self.norm(out[:, context:]))
        return predicted.view(samples, blocks, count, -1)


def sines(grid: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """[rows * columns, P]: half of the features tell the row, half the column, each by sines and cosines of P / 4
    frequencies from 1 to 1 / 10000 (as in MAE)."""
    rows, columns = grid
    frequencies = 10_000 ** -(torch.arange(width // 4, device=device, dtype=torch.float64) / (width // 4))
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    angles = [place[:, None] * frequencies for place in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)


class IJepa(Loss):
    """Smooth L1 between the predictor's tokens of each block and the teacher's there, which have been through a layer
    norm: the mean of a block's tokens, then of blocks and samples."""

    name = "ijepa"
    Config = IJepaConfig
    partial = True
    examples = ({"width": 16, "layers": 1, "heads": 2},)

    def __init__(self, config: IJepaConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        own, target = plan.modalities[config.modality].spec, plan.teacher_spec(config.teacher, config.modality)
        self.grid_of = own.grid
        self.pairs = _pairs(config, plan)
        self.predictor = Predictor(config, own.width, target.width)

    @classmethod
    def needs(cls, config: IJepaConfig, plan: Plan) -> Needs:
        """A masker that drops tokens and names those to be predicted; the teacher's tokens of the whole view."""
        m, pairs = config.modality, _pairs(config, plan)
        teacher_views = plan.teacher_views(config.teacher, m)
        return Needs(
            teacher={config.teacher: {m: tuple(teacher_views[t] for _, t in pairs)}},
            tokens={m: tuple(s for s, _ in pairs)},
            dropped=(m,),
            extra={m: (PREDICTED,)},
            embeddings=(),
        )

    @classmethod
    def problems(cls, config: IJepaConfig, plan: Plan) -> Iterable[str]:
        """A grid of rows and columns, and a masked view that the teacher sees."""
        spec = plan.modalities[config.modality].spec
        if len(spec.stride) not in (0, 2):
            yield f"{cls.name!r} predicts a grid of rows and columns; {config.modality!r} has {len(spec.stride)} axes"
        if config.teacher in plan.teachers and plan.modalities[config.modality].mask and not _pairs(config, plan):
            yield f"{cls.name!r}: the teacher {config.teacher!r} sees no view of {config.modality!r} that is masked"

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term. The metric `target_deviation`, of the teacher's tokens over places and samples, is 0 where they
        have collapsed, at most 1."""
        m = self.config.modality
        student, teacher = outputs.student[m], outputs.teacher[self.config.teacher][m]
        groups = {start + i: (group, i) for start, group in outputs.views[m].numbered() for i in range(len(group.x))}
        terms, deviations = [], []
        for s, t in self.pairs:
            group, i = groups[s]
            assert group.keep is not None
            places = group.extra[PREDICTED][i]  # [B, N, T]
            made = self.predictor(student.tokens[s], group.keep[i], places, self.grid_of(group.x.shape[2:]))
            with torch.autocast(made.device.type, enabled=False):
                targets = layer_norm(wide(teacher.tokens[t]), teacher.tokens[t].shape[-1:])  # [B, L, W]
                target = targets.take_along_dim(places.clamp(min=0).flatten(1)[..., None], 1).view(made.shape)
                loss = smooth_l1_loss(wide(made), target, reduction="none", beta=self.config.beta).mean(-1)
                real = (places >= 0).to(loss.dtype)
                terms.append(((loss * real).sum(-1) / real.sum(-1).clamp(min=1)).mean())
                deviations.append(targets.flatten(0, 1).std(0, correction=0).mean())
        return {self.name: torch.stack(terms).mean()}, {"target_deviation": torch.stack(deviations).mean()}


def _pairs(config: IJepaConfig, plan: Plan) -> list[tuple[int, int]]:
    """(the student's view, the teacher's of the same picture): each masked view that the teacher sees, with each mask.
    The teacher's are numbered among its own."""
    masked = plan.masked_views(config.teacher, config.modality)
    return [(s, t) for t, students in masked.items() for s in students]
