"""CLIPSelf's loss: what the student's map has in a region, against the teacher's embedding of that region's crop."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill_clipself.views import REGION
from distill_core import DEFAULT_TEACHER, GLOBAL, Loss, LossConfig, Needs, Outputs, Plan, wide


class ClipSelfConfig(LossConfig):
    """Whose regions, and who knows them."""

    modality: str = "image"
    """Modality whose views are a picture, the first global one, and regions of it."""
    role: str = REGION
    """Role of the regions' views, which lie in the picture."""
    teacher: str = DEFAULT_TEACHER
    """The teacher, which sees the views of this role: `frozen`, with the weights that the student starts from."""


class ClipSelf(Loss):
    """1 - cosine of the student's map [rows, columns, D], normalised and averaged over a region (RoIAlign), and the
    teacher's embedding of the region's crop: the mean over all regions that count.

    The map is the backbone's tokens: of `dense_vit` embeddings already; of one of another width a linear map makes them
    so. Tokens that lie in no grid are one row.
    """

    name = "clipself"
    Config = ClipSelfConfig
    examples = ({"role": GLOBAL},)
    across_ranks = False  # the mean over a rank's regions that count, whose number differs

    def __init__(self, config: ClipSelfConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        modality = plan.modalities[config.modality]
        self.spec, self.whole = modality.spec, modality.views(GLOBAL)[0]
        width, dim = self.spec.width, plan.teacher_spec(config.teacher, config.modality).dim
        self.map = nn.Identity() if width == dim else nn.Linear(width, dim, bias=False)
        self.regions = [self._of_teacher(plan).index(view) for view in modality.views(config.role)]

    def _of_teacher(self, plan: Plan) -> tuple[int, ...]:
        return plan.teacher_views(self.config.teacher, self.config.modality)

    @classmethod
    def needs(cls, config: ClipSelfConfig, plan: Plan) -> Needs:
        """The picture's tokens, the teacher's embeddings of regions, and where these are."""
        modality = config.modality
        return Needs(
            student=(modality,),
            tokens={modality: plan.modalities[modality].views(GLOBAL)[:1]},
            teacher={config.teacher: {modality: ()}},
            views={modality: {GLOBAL: 1, config.role: 1}},
            extra={modality: ("box", "counted")},
            embeddings=(),
        )

    @classmethod
    def problems(cls, config: ClipSelfConfig, plan: Plan) -> Iterator[str]:
        """Regions that the teacher does not see."""
        if config.modality not in plan.modalities or config.teacher not in plan.teachers:
            return
        modality, teacher_views = plan.modalities[config.modality], plan.teacher_views(config.teacher, config.modality)
        if not set(modality.views(config.role)) <= set(teacher_views):
            yield f"{cls.name!r} needs a teacher of the views of role {config.role!r}: set its `views: [{config.role}]`"

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The term `clipself`."""
        modality = self.config.modality
        whole = next(group for group in outputs.views[modality].groups if group.role == GLOBAL)
        group = next(group for group in outputs.views[modality].groups if group.role == self.config.role)
        features = outputs.student[modality]
        tokens = normalize(wide(self.map(features.tokens[self.whole])), dim=-1)
        if (real := features.masks.get(self.whole)) is not None:
            tokens = tokens * real[..., None]
        grid = self.spec.grid(whole.x.shape) if self.spec.stride else (1, tokens.shape[1])
        where = within(group.extra["box"], whole.extra["box"][0])  # [R, B, 4]
        means = region_means(tokens.view(len(tokens), *grid, -1), where)  # [R, B, D]
        target = outputs.teacher[self.config.teacher][modality].embedding[self.regions]
        cosines = (normalize(means, dim=-1) * target).sum(-1)
        counted = group.extra["counted"].to(cosines.dtype)
        return {"clipself": 1 - (counted * cosines).sum() / counted.sum().clamp(min=1)}, {}


def within(box: Tensor, outer: Tensor) -> Tensor:
    """Edges (left, top, right, bottom) [..., 4] as shares of a picture -> as shares of the box `outer` in it."""
    corner, size = outer[..., :2], outer[..., 2:] - outer[..., :2]
    return (box - torch.cat([corner, corner], -1)) / torch.cat([size, size], -1)


def region_means(features: Tensor, boxes: Tensor) -> Tensor:
    """features [B, rows, columns, D], boxes [R, B, 4] as shares of the map -> RoIAlign to one cell, [R, B, D].

    As torchvision's `roi_align(..., output_size=1, sampling_ratio=-1, aligned=True)`: the mean of the map, bilinearly
    interpolated, at ceil(height) x ceil(width) points spread evenly over the box. Both directions are apart from one
    another, so each is a row of weights.
    """
    boxes = boxes.to(features.dtype)
    down = sampled(boxes[..., 1], boxes[..., 3], features.shape[1])  # [R, B, rows]
    across = sampled(boxes[..., 0], boxes[..., 2], features.shape[2])
    return torch.einsum("rbi,rbj,bijd->rbd", down, across, features)


def sampled(first: Tensor, last: Tensor, cells: int) -> Tensor:
    """Weights [..., cells] of the cells of a row, of the points between two edges [...] as shares of the row."""
    start, length = first * cells - 0.5, (last - first) * cells
    count = length.ceil().clamp(min=1)
    number = torch.arange(cells, device=first.device, dtype=first.dtype)
    points = start[..., None] + (number + 0.5) * (length / count)[..., None]  # [..., cells], of which `count` are used
    used = (number < count[..., None]) & (points > -1) & (points < cells)
    near = (1 - (points.clamp(0, cells - 1)[..., None] - number).abs()).clamp(min=0)  # [..., points, cells]
    return (near * used[..., None]).sum(-2) / count[..., None]
