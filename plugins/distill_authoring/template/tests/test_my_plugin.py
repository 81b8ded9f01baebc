"""Tests of the plugin: conformance, the loss against its formula, and the recipe."""

import json
import math
from pathlib import Path

import my_plugin
import pytest
import torch
from my_plugin.loss import Match, MatchConfig

from distill_authoring.conformance import assert_conforms
from distill_core import BackboneSpec, Features, Fused, ModalityPlan, Outputs, Plan, TeacherPlan
from distill_core.tools import Registry, main

COMPONENTS = [entry.cls for entry in Registry.of(my_plugin).entries.values()]


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
def test_conforms(component):
    """Shapes, masks, gradients, state, pickling, determinism, bf16: what `distill check-plugin` checks."""
    assert_conforms(component)


def test_the_loss_is_its_formula():
    """Against loops over views and samples: would catch a wrong pairing, axis or scale."""
    modality = ModalityPlan(("global", "global"), BackboneSpec(8, 4))
    teacher = TeacherPlan({"left": (0, 1), "right": (0, 1)})
    plan = Plan({"left": modality, "right": modality}, {"default": teacher}, fusion=True)
    loss = Match(MatchConfig(temperature=0.5), plan)
    unit = {name: torch.nn.functional.normalize(torch.randn(2, 3, 4), dim=-1) for name in ("left", "right")}
    seen = {name: Features(torch.randn(2, 3, 4)) for name in ("left", "right")}
    fused = {name: Fused(x) for name, x in unit.items()}
    outputs = Outputs(teacher={"default": seen}, fused=fused)
    term = loss(outputs)[0]["match"].item()
    expected = []
    for name, other in (("left", "right"), ("right", "left")):
        for view in range(2):
            for i in range(3):
                keys = [k / k.norm() for k in seen[other].pooled[0]]
                logits = [2.0 * float(unit[name][view, i] @ key) for key in keys]
                expected.append(math.log(sum(math.exp(x) for x in logits)) - logits[i])
    assert term == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_the_recipe_trains(tmp_path, monkeypatch):
    """Would catch a component that conforms alone and does not fit the others."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    recipe = Path(__file__).parents[1] / "recipe.yaml"
    main(["run", str(recipe), "--runs", str(tmp_path), "--quiet", "--set", "train.log_every=5"])
    rows = [json.loads(line) for line in (tmp_path / "my-plugin" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert "train,loss," in (tmp_path / "my-plugin" / "metrics.csv").read_text()
