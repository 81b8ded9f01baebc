"""Batches whose samples lack a picture or a text, and a step of a recipe on them; on several ranks, too."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill_core.batch import Batch, Sample
from distill_core.data.batches import Collate, Item, SampleViews
from distill_core.objective import Objective
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.system import distributed

CROPS = "{name: multi_crop, size: 16, local_size: 8, global: 2, local: 1}"
VIT = "name: vit, image_size: 16, patch: 4, width: 16, layers: 1, heads: 2, dim: 16"
TEXT = "{name: clip_text, width: 16, layers: 1, heads: 2, dim: 16, padding: longest}"
PROTOTYPES = "prototypes: 12, hidden: 16, bottleneck: 8"
TEACHER = "teacher: {momentum: 0.9}"


def _recipe(loss: str, rest: str = "", image: str = CROPS, vit: str = "", text: str = "text_crop, global: 2, local: 1",
            tower: str = TEXT) -> str:  # fmt: skip
    return f"""
augment: {{image: {image}, text: {{name: {text}}}}}
backbone: {{image: {{{VIT}{vit}}}, text: {tower}}}
loss: [{{name: {loss}}}]
{rest}
data: {{source: {{name: webdataset, urls: none.tar}}, optional: [image, text]}}
train: {{steps: 4}}
"""


def _cosmos(loss: str) -> str:
    return _recipe(loss, f"fusion: {{name: cross_attention, heads: 2}}\n{TEACHER}")


_MASKED = ", masking: {ratio: [0.3, 0.6], share: 1.0, block: false"
_FLAVA = {
    "image": "{name: flava_image, size: 16}",
    "vit": f"{_MASKED}, roles: [masked], targets: pixels}}",
    "text": "flava_text",
    "tower": "{name: bert_text, context: 24, width: 16, layers: 1, heads: 2, dim: 16, masking: {roles: [masked]}}",
}
_ENCODER = "fusion: {name: multimodal_encoder, role: masked, layers: 1, heads: 2}"
RECIPES = {
    "clip": _recipe("clip"),
    "siglip": _recipe("siglip"),
    "contrastive": _recipe("contrastive"),
    "paired_contrastive": _recipe("paired_contrastive"),
    "sigmoid_contrastive": _recipe("sigmoid_contrastive"),
    "distillation": _cosmos("cross_modal_distillation"),
    "image distillation": _cosmos("cross_modal_distillation, pairs: [image_to_image]"),
    "soft distillation": _cosmos("cross_modal_distillation, targets: soft"),
    "sigmoid_distillation": _cosmos("sigmoid_distillation"),
    "multi_positive": _recipe("multi_positive", text="sub_captions, count: 3"),
    "subcaption_grouping": _recipe("subcaption_grouping", text="sub_captions, count: 3"),
    "grouping by sample": _recipe("subcaption_grouping, negatives: sample", text="sub_captions, count: 3"),
    "flair": _recipe("flair, negatives: all", "fusion: {name: text_conditioned_pool, queries: [text], heads: 2}"),
    "two_token_contrastive": _recipe(
        "two_token_contrastive", vit=", class_tokens: 2", text="two_captions, web: raw_caption"
    ),
    "simclr": _recipe("simclr, hidden: 16, dim: 8", image="{name: slip_views, size: 16}"),
    "dino": _recipe(f"dino, {PROTOTYPES}", TEACHER),
    "balanced dino": _recipe(f"dino, centring: sinkhorn_knopp, {PROTOTYPES}", TEACHER),
    "ibot": _recipe(f"ibot, {PROTOTYPES}", TEACHER, vit=f"{_MASKED}}}"),
    "koleo": _recipe("koleo"),
    "ijepa": _recipe(
        "ijepa, width: 8, layers: 1, heads: 2", f"masker: {{image: {{name: multi_block, keep: 0.4}}}}\n{TEACHER}"
    ),
    "data2vec": _recipe(
        "data2vec, top: 1, width: 16, layers: 1, groups: 2",
        f"masker: {{image: {{name: inverse_blocks, masks: 2, block: 2}}}}\n{TEACHER}",
    ),
    "gram": _recipe("gram", TEACHER),
    "reinforced": _recipe("reinforced, mix: 0.5", TEACHER),
    "captioning": _recipe(
        "captioning, head: decoder", "heads: {decoder: {name: coca_decoder, layers: 1, heads: 2, queries: 4}}"
    ),
    "lejepa": _recipe("lejepa, directions: 16, hidden: 16, dim: 8"),
    "lejepa pairs": _recipe("lejepa, directions: 16, modalities: [image, text]"),
    "flava_mlm": _recipe("flava_mlm", **_FLAVA),
    "flava_mim": _recipe("flava_mim, patch: 4", **_FLAVA),
    "flava_mmm": _recipe("flava_mmm, patch: 4", _ENCODER, **_FLAVA),
    "flava_itm": _recipe("flava_itm", _ENCODER, **_FLAVA),
}
"""A recipe for each loss that can do without some samples, and for its variants that read more."""
PAIR, PICTURE, WORDS = "pair", "picture", "words"


def sample(number: int, kind: str) -> Sample:
    """A picture of noise and four sentences, or one of the two."""
    rng, of_text = np.random.default_rng(number), np.random.default_rng(1000 + number)
    fields: dict[str, object] = {"__key__": f"{number}", "__url__": "none.tar"}
    if kind != WORDS:
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file, "PNG")
        fields["png"] = file.getvalue()
    if kind != PICTURE:
        words = [" ".join(of_text.choice(("red", "old", "tree", "boat", "river"), 2 + number % 3)) for _ in range(4)]
        document = {"raw_caption": words[0], "longSV_captions": f"{words[1]}. {words[2]}. {words[3]}. And {number}"}
        fields["json"] = json.dumps(document).encode()
    return fields


def batch_of(recipe: Recipe, kinds: Sequence[str], numbers: Sequence[int] | None = None, filler: int = 99) -> Batch:
    """The samples of these kinds as a worker makes them; sample i is the same whatever stands beside it."""
    numbers = range(len(kinds)) if numbers is None else numbers
    optional = recipe.data.optional
    draw = SampleViews({name: node.build() for name, node in recipe.augment.items()}, 0, optional)
    items = [Item(str(i), draw(sample(i, kind), 0), i) for i, kind in zip(numbers, kinds, strict=True)]
    spare = Item(str(filler), draw(sample(filler, PAIR), 0), filler)
    collators = {name: node.cls.collator(node.config) for name, node in recipe.backbone.items()}
    collate = Collate(collators, optional, maskers=recipe.maskers())
    return collate(items, dict.fromkeys(recipe.augment, spare))


@dataclass
class StepOutcome:
    """Terms, gradients of the student, and the state after the step, by name."""

    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    metrics: dict[str, Tensor]


def objective_of(text: str) -> tuple[Recipe, Objective]:
    """In float64, its weights away from where they start."""
    recipe = parse_recipe(text, "absences.yaml", registry=Registry.discover())
    torch.manual_seed(0)
    objective = build_objective(recipe).double()
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.numel() < 1e5:  # the vocabulary's are random enough
                parameter += 0.1 * torch.randn_like(parameter)
    return recipe, objective


def step(text: str, kinds: Sequence[str], numbers: Sequence[int] | None = None) -> StepOutcome:
    """Forward, backward and what follows; on several ranks gradients and terms are their means."""
    recipe, objective = objective_of(text)
    batch = batch_of(recipe, kinds, numbers)
    progress = Progress(1, 4)
    objective.on_device = _double(objective.on_device)  # type: ignore[assignment, method-assign]
    outputs = objective.represent(batch, progress)
    losses = objective.losses(outputs)
    losses.total.backward()
    named = [(name, p) for name, p in objective.named_parameters() if not name.startswith("teacher.")]
    for _, parameter in named:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    distributed.average_gradients([p for _, p in named])
    means = distributed.mean([float(x.detach()) for x in losses.terms.values()])
    objective.after_step(outputs, progress)
    return StepOutcome(
        {name: torch.tensor(mean, dtype=torch.float64) for name, mean in zip(losses.terms, means, strict=True)},
        {name: p.grad for name, p in named if p.grad is not None},
        {name: x.clone() for name, x in objective.loss.state_dict().items()},
        losses.metrics,
    )


def _double(on_device):  # type: ignore[no-untyped-def]
    def make(batch: Batch) -> Batch:
        return on_device(batch)._map(lambda x: x.double() if x.is_floating_point() else x)  # type: ignore[no-any-return]

    return make
