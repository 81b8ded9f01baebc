"""MobileCLIP: its loss against an independent transcription, its captions, and a run from stored teachers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_core import Features, Needs, Outputs, Progress
from distill_core.errors import RecipeErrors
from distill_core.recipe.resolve import load_recipe, parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run import caches
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer
from distill_mobileclip.losses import Reinforced, ReinforcedConfig

Array = Any
VIT = "{name: vit, image_size: 16, patch: 8, width: 16, layers: 2, heads: 2, dim: 16}"
TEXT = "{name: clip_text, width: 16, layers: 1, heads: 2, dim: 16, padding: longest}"


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def transcribed(
    image: Array, captions: Array, teachers: list[tuple[Array, Array, float]], scale: float, mix: float
) -> tuple[float, float]:
    """The paper's equations 2 and 3, a batch of pairs after the other: image [B, D], captions [V, B, D], of each
    teacher image, captions and temperature."""
    contrastive = distillation = 0.0
    rows = len(image)
    for number, text in enumerate(captions):
        student = scale * unit(image) @ unit(text).T
        for logits in (student, student.T):
            contrastive += -sum(np.log(softmax(logits)[i, i]) for i in range(rows)) / rows / 2
        for of_image, of_captions, temperature in teachers:
            affinity = unit(of_image) @ unit(of_captions[number]).T / temperature
            for logits, theirs in ((student, affinity), (student.T, affinity.T)):
                p, q = softmax(theirs), softmax(logits)
                distillation += sum(p[i, j] * np.log(p[i, j] / q[i, j]) for i in range(rows) for j in range(rows)) / (
                    2 * rows * len(teachers)
                )
    return (1 - mix) * contrastive, mix * distillation


@pytest.fixture
def recipe(tiny_recipe: Path, registry: Registry) -> Callable[..., Recipe]:
    def load(*overrides: str) -> Recipe:
        plain = [
            "augment.image={name: random_crop, size: 16}",
            "augment.text={name: text_crop, global: 2, local: 0}",
            "fusion=null",
            "evaluate=null",
            "loss=[{name: reinforced, mix: 0.75, members: [16, 16], teacher_temperatures: [0.1, 0.3]}]",
            "teacher={name: ensemble, members: {one: {name: ema}, two: {name: ema, momentum: 0.5}}}",
        ]
        return load_recipe(tiny_recipe, registry=registry, overrides=[*plain, *overrides])

    return load


def test_the_loss_against_the_papers_equations(recipe: Callable[..., Recipe]) -> None:
    """Two members with temperatures of their own, two captions. Catches affinities of the joined embedding, a
    distribution over the wrong axis, captions that are averaged or paired with one another, and a part of the mix."""
    parsed = recipe()
    loss = Reinforced(parsed.loss[0].config, parsed.plan)
    draw = np.random.default_rng(0)
    image, captions = draw.standard_normal((5, 16)), draw.standard_normal((2, 5, 16))
    members = [(draw.standard_normal((5, 16)), draw.standard_normal((2, 5, 16)), t) for t in (0.1, 0.3)]

    def features(x: Array) -> Features:
        return Features(torch.tensor(x))

    teacher = {
        "image": features(np.concatenate([unit(own) for own, _, _ in members], -1)[None]),
        "text": features(np.concatenate([unit(own) for _, own, _ in members], -1)),
    }
    outputs = Outputs(
        student={"image": features(image[None]), "text": features(captions)}, teacher={"default": teacher}
    )
    terms, metrics = loss(outputs)
    scale = float(loss.logit_scale.detach().exp())
    contrastive, distillation = transcribed(image, captions, members, scale, 0.75)
    assert float(terms["contrastive"].detach()) == pytest.approx(contrastive, rel=1e-5)
    assert float(terms["distillation"].detach()) == pytest.approx(distillation, rel=1e-5)
    assert float(metrics["distillation_whole"]) == pytest.approx(distillation / 0.75, rel=1e-5)
    assert loss.needs(loss.config, parsed.plan) == Needs(
        student=("image", "text"),
        teacher={"default": {"image": (), "text": ()}},
        views={"image": {"global": 1}, "text": {"global": 1}},
    )


def test_what_does_not_fit_is_refused(recipe: Callable[..., Recipe]) -> None:
    """Catches members that are cut at the wrong place, and a temperature that is left over."""
    with pytest.raises(RecipeErrors) as caught:
        recipe("loss=[{name: reinforced, members: [16, 8], teacher_temperatures: [0.1, 0.2, 0.3]}]")
    lines = [line.partition(" (with ")[0] for line in caught.value.lines]
    assert lines == [
        "--set loss: loss.0: 'reinforced': members of widths 16, 8 make 24; the teacher 'default' has 32 for 'image'",
        "--set loss: loss.0: 'reinforced': members of widths 16, 8 make 24; the teacher 'default' has 32 for 'text'",
        "--set loss: loss.0: 'reinforced': teacher_temperatures: give one, or one for each of 2 members",
    ]


@pytest.mark.slow
def test_a_run_from_stored_teachers_has_the_losses_of_the_live_ones(
    recipe: Callable[..., Recipe], tiny_recipe: Path, registry: Registry, tmp_path: Path
) -> None:
    """Every step's terms agree to 1e-3: fp16's rounding. Catches features of other views or samples, members that are
    stored in another order, and a cache that is not read."""
    runs = tmp_path / "runs"
    for seed in (1, 2):
        own = load_recipe(
            tiny_recipe,
            registry=registry,
            overrides=["evaluate=null", "train.steps=1", f"seed={seed}", f"name=teacher_{seed}"],
        )
        Trainer(own, RunFolder.create(runs, own), quiet=True).run()

    def member(seed: int) -> str:
        weights = f"weights: [{{name: state_dict, source: '{runs}/teacher_{seed}', to: backbone}}]"
        return f"{{name: frozen, backbone: {{image: {VIT}, text: {TEXT}}}, {weights}}}"

    ensemble = f"name: ensemble, members: {{one: {member(1)}, two: {member(2)}}}"
    rows: dict[str, list[dict[str, float]]] = {}
    for name, option in (("live", ""), ("stored", f", cache: '{tmp_path}/features'")):
        parsed = recipe(f"name={name}", f"teacher={{{ensemble}{option}}}", "train.steps=6", "train.log_every=1")
        if option:
            caches.write(parsed, None, quiet=True)
        folder = RunFolder.create(runs, parsed)
        trainer = Trainer(parsed, folder, quiet=True)
        assert (type(trainer.state.objective.teachers["default"]).name == "cached") == bool(option)
        trainer.run()
        written = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
        rows[name] = [row["terms"] for row in written if "terms" in row]
    assert len(rows["live"]) == 6
    for live, stored in zip(rows["live"], rows["stored"], strict=True):
        assert stored == pytest.approx(live, abs=1e-3)
    assert rows["live"] != rows["stored"]


def test_captions_of_datacompdr(registry: Registry) -> None:
    """One synthetic caption a step, whole, beside the web's. Catches one that is cut into sentences, or never drawn."""
    text = """
augment:
  image: random_crop
  text: {name: two_captions, layout: datacompdr, web: txt, synthetic: [{fields: [syn_text], sentences: 1}]}
backbone: {image: {name: vit}, text: {name: clip_text}}
loss: [clip]
data: {source: {name: webdataset, urls: none.tar}}
train: {steps: 1}
"""
    augmentation = parse_recipe(text, "r.yaml", registry=registry).augment["text"].build()
    synthetic = ["A red bird. It sings.", "Two boats."]
    sample = {"txt": b"IMG. 7", "syn.json": json.dumps({"syn_text": synthetic}).encode()}
    drawn = {tuple(v.data for v in augmentation.train_views(sample, np.random.default_rng(i))) for i in range(20)}
    assert drawn == {("IMG. 7", "A red bird. It sings"), ("IMG. 7", "Two boats")}


def test_defaults_are_the_public_scripts() -> None:
    """Scale 100 of the teachers, and distillation alone."""
    config = ReinforcedConfig()
    assert (config.teacher_temperatures, config.mix.value(Progress(0, 1))) == ((0.01,), 1.0)
