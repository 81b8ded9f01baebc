"""One step of each method in float64 on this rank's rows of a joint batch; run by test_distributed.

`python -m torch.distributed.run --nproc-per-node N distributed_methods.py OUT` writes OUT/rank-R.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from collectives import Collectives
from torch import Tensor

from distill_core.batch import REPEATED, Batch, Group, Views
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.system import distributed
from distill_vl.masking import MASKED, patch_pixels
from distill_vl.ring import ring_info_nce, ring_sigmoid

RECIPE = """
augment: {{image: {image}, text: {text}}}
backbone:
  image: {{name: vit, image_size: 8, patch: 4, width: 8, layers: 1, heads: 2, dim: 6, masking: {masking}, {pooling}}}
  text: {{name: {tower}, context: 9, width: 8, layers: 1, heads: 2, dim: 6}}
masker: {masker}
fusion: {fusion}
heads: {heads}
loss: {loss}
balance: {balance}
teacher: {teacher}
data: {{source: {{name: webdataset, urls: none.tar}}}}
train: {{steps: 1, gather_precision: {wire}}}
"""
CROP, CAPTION = "{name: random_crop, size: 8}", "caption"
COSMOS = {
    "image": "{name: multi_crop, size: 8, local_size: 4, local: 1}",
    "text": "{name: text_crop, global: 2, local: 1}",
    "fusion": "{name: cross_attention, heads: 2}",
    "teacher": "{}",
}
CASES: dict[str, dict[str, str]] = {
    "clip": {"image": CROP, "text": CAPTION, "loss": "[{name: clip, temperature: .5}]"},
    # texts of one length, so that a mean over ranks is the joint mean
    "coca": {
        "image": CROP,
        "text": CAPTION,
        "heads": "{decoder: {name: coca_decoder, layers: 1, heads: 2, queries: 3}}",
        "loss": "[{name: clip, temperature: .5}, {name: captioning, weight: 2.0}]",
    },
    "cosmos": {
        **COSMOS,
        "loss": "[contrastive, {name: cross_modal_distillation, weight: 0.7}, {name: clip, weight: .3}]",
    },
    "cosmos bf16": {**COSMOS, "wire": "bf16", "loss": "[contrastive, {name: cross_modal_distillation, weight: 0.7}]"},
    "cosmos balanced": {
        **COSMOS,
        "balance": "uncertainty",
        "loss": "[contrastive, {name: cross_modal_distillation, weight: 0.7}]",
    },
    "cosmos ring": {
        **COSMOS,
        "loss": "[{name: contrastive, exchange: ring}, "
        "{name: cross_modal_distillation, weight: 0.7, exchange: ring}, {name: clip, weight: 0.3}]",
    },
    "cosmos soft": {**COSMOS, "loss": "[{name: cross_modal_distillation, pairs: [image_to_text], targets: soft}]"},
    "flair": {
        "image": CROP,
        "text": "{name: sampled_captions, captions: 3}",
        "fusion": "{name: text_conditioned_pool, queries: [text], heads: 2}",
        "loss": "[{name: flair, negatives: all, bias: -1.0}]",
    },
    "siglip gather": {
        "image": CROP,
        "text": CAPTION,
        "pooling": "pooling: attention",
        "loss": "[{name: siglip, temperature: .5, bias: -1.0}]",
    },
    "siglip ring": {
        "image": CROP,
        "text": CAPTION,
        "pooling": "pooling: attention",
        "loss": "[{name: siglip, temperature: .5, bias: -1.0, exchange: ring}]",
    },
    "cosmos sigmoid": {
        **COSMOS,
        "loss": "[{name: sigmoid_contrastive, bias: -1.0}, {name: sigmoid_distillation, weight: 0.7, bias: -1.0}]",
    },
    "slip": {
        "image": "{name: slip_views, size: 8}",
        "text": CAPTION,
        "loss": "[clip, {name: simclr, hidden: 5, dim: 4}]",
    },
    "dreamlip": {
        "image": CROP,
        "text": "{name: sub_captions, count: 3}",
        "loss": "[multi_positive, {name: subcaption_grouping, id: batch}, "
        "{name: subcaption_grouping, id: sample, negatives: sample, threshold: 0.4}]",
    },
    # without flava_itm, whose mismatched pairs are of one rank
    "flava": {
        "image": "{name: flava_image, size: 8}",
        "text": "flava_text",
        "masking": "{roles: [masked], targets: pixels}",
        "tower": "bert_text, masking: {roles: [masked]}",
        "fusion": "{name: multimodal_encoder, role: masked, layers: 1, heads: 2}",
        "loss": "[clip, flava_mlm, {name: flava_mim, patch: 4}, {name: flava_mmm, patch: 4}]",
    },
    "ijepa": {
        "image": CROP,
        "text": CAPTION,
        "masker": "{image: {name: multi_block, keep: 0.5, target_scale: [0.25, 0.25], targets: 2}}",
        "teacher": "{}",
        "loss": "[{name: ijepa, width: 8, layers: 1, heads: 2}, {name: clip, weight: .3}]",
    },
    "data2vec": {
        "image": CROP,
        "text": CAPTION,
        "masker": "{image: {name: inverse_blocks, masks: 3, ratio: 0.5, block: 1}}",
        "teacher": "{}",
        "loss": "[{name: data2vec, top: 1, width: 8, layers: 1, groups: 2}, {name: clip, weight: .3}]",
    },
}
SAMPLES, DIM = 12, 6


def recipe(options: Mapping[str, str], registry: Registry) -> Recipe:
    """Of a case, or of others like them."""
    rest = dict.fromkeys(("fusion", "heads", "teacher", "masking", "balance", "masker"), "null")
    rest |= {"tower": "clip_text", "wire": "fp32", "pooling": "pooling: class_token"}
    return parse_recipe(RECIPE.format(**rest | dict(options)), "r.yaml", registry=registry)


def batch(parsed: Recipe, first: int, last: int) -> Batch:
    """Rows first..last of a batch of SAMPLES."""
    generator = torch.Generator().manual_seed(1)
    views = {}
    for name, modality in parsed.plan.modalities.items():
        groups = []
        for role, members in groupby(role for role in modality.roles if role != REPEATED):
            count = len(list(members))
            if name == "image":
                side = 4 if role == "local" else 8
                x = torch.randn(count, SAMPLES, 3, side, side, generator=generator, dtype=torch.float64)
            else:
                x = torch.randint(1, 48, (count, SAMPLES, 7), generator=generator)
                x[..., -1] = 49407  # end of text
            group = Group(x, role)
            if role == MASKED:
                # as many of each sample, so that a mean over ranks is the joint mean
                group.token_mask = torch.zeros(count, SAMPLES, 4 if name == "image" else 7, dtype=torch.bool)
                for i in range(SAMPLES):
                    group.token_mask[:, i, 1 + i % 3] = True
                group.targets = patch_pixels(x, 4) if name == "image" else x
            groups.append(group)
        masker = parsed.maskers().get(name)
        whole = Views(groups) if masker is None else masker.drawn(Views(groups), range(SAMPLES))
        views[name] = whole.map(lambda x: x[:, first:last])
    return Batch(views, [f"k{i}" for i in range(first, last)])


def step(case: str, registry: Registry, first: int, last: int) -> dict[str, Any]:
    """Terms of these rows and the averaged gradients."""
    parsed = recipe(CASES[case], registry)
    torch.manual_seed(0)
    made = build_objective(parsed).double()
    with torch.no_grad():
        for parameter in [*made.backbone.parameters(), *made.loss.parameters()]:  # away from ones and zeros
            parameter += 0.1 * torch.randn_like(parameter)
    with Collectives() as forward:
        outputs = made.represent(batch(parsed, first, last), Progress(0, 1))
        losses = made.losses(outputs)
    with Collectives() as backward:
        losses.total.backward()
    named = [(name, p) for name, p in made.named_parameters() if not name.startswith("teacher.")]
    with Collectives() as average:
        distributed.average_gradients([p for _, p in named])
    return {
        "collectives": {"forward": forward.calls, "backward": backward.calls, "average": average.calls},
        "terms": {name: term.detach() for name, term in losses.terms.items()},
        "gradients": {name: p.grad for name, p in named if p.grad is not None},
    }


def ring_inputs() -> list[Tensor]:
    """a [2, SAMPLES, 5], b [3, SAMPLES, 5], scale, bias, and a weight for each of the 2 x 3 view pairs."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, SAMPLES, 5), (3, SAMPLES, 5), (), (), (2, 3))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def ring(loss: Callable[..., Tensor], scalars: int, first: int, last: int) -> list[Tensor]:
    """The ring's loss for several views on these rows of a and b, and the gradients of all inputs."""
    a, b, scale, bias, weight = ring_inputs()
    inputs = [x.clone().requires_grad_() for x in (a[:, first:last], b[:, first:last], *(scale, bias)[:scalars])]
    pairs = loss(*inputs)
    return [pairs.detach(), *torch.autograd.grad((pairs * weight).sum(), inputs)]


def main() -> None:
    distributed.start(torch.device("cpu"))
    rank, share = distributed.rank(), SAMPLES // distributed.world_size()
    rows = (rank * share, (rank + 1) * share)
    registry = Registry.discover()
    results = {
        "cases": {case: step(case, registry, *rows) for case in CASES},
        "sigmoid": ring(ring_sigmoid, 2, *rows),
        "info_nce": ring(ring_info_nce, 1, *rows),
    }
    torch.save(results, Path(sys.argv[1]) / f"rank-{rank}.pt")
    distributed.stop()


if __name__ == "__main__":
    main()
