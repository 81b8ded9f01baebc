"""`distill plan`: states, layouts, times, and what it prints."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from distill_core.errors import UserError
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.step import TrainStep
from distill_scale.commands import Counts, Quantity, plan
from distill_scale.hardware import Hardware
from distill_scale.plan import layouts, look, make_plans, states_of
from distill_scale.step_costs import costs_of_steps

CPU = torch.device("cpu")


def test_states_are_those_of_a_real_run(tiny_recipe: Path, registry: Registry) -> None:
    """Numbers and bytes of weights, teacher, gradients, optimiser; what is frozen has neither of the last two."""
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=["freeze=[backbone.text]"])
    objective = build_objective(recipe)
    step = TrainStep(recipe, objective, CPU)
    for parameter in step.parameters:
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    held = [x.nbytes for state in step.optimizer.state.values() for x in state.values()]
    own = [p for name, p in objective.named_parameters() if not name.startswith("teacher.")]

    states = states_of(recipe)
    assert states.on_a_device(1) == {
        "weights": sum(p.nbytes for p in own),
        "optimizer": sum(held),
        "gradients": sum(p.nbytes for p in step.parameters),
        "teacher": sum(p.nbytes for p in objective.teacher.parameters()),
    }
    assert states.trained == sum(p.numel() for p in step.parameters) < sum(p.numel() for p in own)
    assert sum(states.parameters.values()) == sum(p.numel() for p in objective.parameters())
    whole, split = states.on_a_device(1), states.on_a_device(4)
    towers = {
        "weights": objective.backbone.parameters(),
        "teacher": (p for tower in objective.teachers["default"].towers() for p in tower.parameters()),
    }
    for kind, parameters in towers.items():
        assert whole[kind] - split[kind] == pytest.approx(3 / 4 * sum(p.nbytes for p in parameters), abs=1)
    assert all(whole[kind] / 4 <= split[kind] < whole[kind] for kind in whole)


@pytest.mark.slow
def test_peak_at_other_batches(registry: Registry) -> None:
    """The largest batch is read off steps of other sizes, whose losses grow with pairs of samples: a step of that size
    takes what was said."""
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/clip_tiny.yaml", registry=registry)
    (made,) = make_plans(recipe, [Hardware(memory=1.5e9)], CPU)
    for layout in made.layouts:
        size = layout.largest_batch
        assert size > 2 * recipe.data.batch_size
        costs = costs_of_steps(recipe, size, [1], device=CPU, checkpointing=layout.checkpointing)[1]
        assert layout.states + costs.peak() + 2 * costs.batch_bytes == pytest.approx(1.5e9 * 0.9, rel=0.02)


@pytest.mark.slow
def test_layouts(tiny_recipe: Path, registry: Registry) -> None:
    """Split over more devices less lasts on each; computing again takes more FLOPs, holds less and takes longer. A
    batch that does not fit is cut in micro-batches, for another forward pass; weights that do not fit have no time."""
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=["data.batch_size=128"])
    fast_links = Hardware(devices=16, memory=1e9, bandwidth=1e18, network=1e18)
    states = states_of(recipe)
    costs = look(recipe, fast_links, [16], torch.device("cuda"), states)[16]
    rows = {(x.shard, x.checkpointing): x for x in layouts(recipe, fast_links, states, costs, 4)}
    assert [*dict.fromkeys(shard for shard, _ in rows)] == [1, 8, 16]
    assert rows[1, "none"].states > rows[8, "none"].states > rows[16, "none"].states
    for shard in (1, 8, 16):
        none, selective, full = (rows[shard, kind] for kind in ("none", "selective", "full"))
        assert none.tflops <= selective.tflops < full.tflops
        assert none.activations > selective.activations > full.activations
        assert none.fits
        assert full.step_s is not None
        assert none.step_s is not None
        assert none.step_s < full.step_s
        assert none.samples_per_s == pytest.approx(16 * 128 / none.step_s)
        assert none.gpu_hours == pytest.approx(4 * none.step_s * 16 / 3600)

    links = replace(fast_links, bandwidth=1e9, network=1e9)
    half = load_recipe(
        tiny_recipe, registry=registry, overrides=["data.batch_size=128", "train.parallel.weight_precision=bf16"]
    )
    in_fp32, in_bf16 = (
        {x.shard: x for x in layouts(r, links, states, costs, 4) if x.checkpointing == "none"} for r in (recipe, half)
    )
    assert in_bf16[1].sent_s == in_fp32[1].sent_s  # gradients, which stay fp32
    # of all devices: weights twice, the teacher's and gradients, of one size each but for what is not trained
    assert in_bf16[16].sent_s == pytest.approx(in_fp32[16].sent_s * 2.5 / 4, rel=0.02)
    assert in_bf16[16].peak < in_fp32[16].peak

    plenty = rows[1, "none"]
    scarce = replace(fast_links, memory=(plenty.peak - 100) / (1 - fast_links.reserve))
    tight = layouts(recipe, scarce, states, costs, 4)[0]
    assert not tight.fits
    assert 0 < tight.micro_batch < 128
    assert 0 < tight.largest_batch < 128
    assert plenty.micro_batch == 128
    assert tight.tflops > plenty.tflops
    own = load_recipe(tiny_recipe, registry=registry, overrides=["data.batch_size=128", "train.parallel.micro_batch=4"])
    parts = layouts(own, fast_links, states, costs, 4)[0]
    assert (parts.micro_batch, parts.fits, parts.tflops) == (4, True, tight.tflops)
    assert parts.peak < plenty.peak
    nothing = layouts(recipe, replace(fast_links, memory=plenty.states), states, costs, 4)[0]
    assert (nothing.largest_batch, nothing.micro_batch, nothing.step_s, nothing.samples_per_s) == (0, 0, None, None)


def test_times_of_links() -> None:
    """By hand: rings in a node, then between nodes, where a device's card carries its part alone."""
    one_node = Hardware(devices=8, bandwidth=100.0, network=10.0)
    assert one_node.seconds_to_gather(800, 8) == pytest.approx(7)  # 7 parts of 100 bytes at 100 bytes/s
    assert one_node.seconds_to_sum(800, 1) == pytest.approx(14)
    assert one_node.seconds_to_sum(800, 8) == 0
    two_nodes = Hardware(devices=16, bandwidth=100.0, network=10.0)
    assert two_nodes.seconds_to_gather(1600, 16) == pytest.approx(14 + 10)  # 100 bytes of the other node at 10 bytes/s
    assert two_nodes.seconds_to_sum(1600, 1) == pytest.approx(2 * (14 + 10))
    assert two_nodes.seconds_to_sum(200, 8) == pytest.approx(2 * 10)
    assert two_nodes.seconds_to_sum(200, 16) == 0
    assert Hardware(flops=100.0, utilization=0.5).seconds_of_products(200) == 4


def run(*arguments: str) -> str:
    """What the command prints."""
    result = CliRunner().invoke(plan, [*arguments], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output


def tables(text: str) -> list[str]:
    """The lines of the tables in it, which begin with a space."""
    return [line.rstrip() for line in text.splitlines() if line.startswith(" ")]


@pytest.mark.slow
def test_printed(tiny_recipe: Path) -> None:
    """Tables fit 80 columns; JSON has the same numbers; `--samples` gives hours to a run of epochs."""
    epochs = ["--set", "train.steps=null", "--set", "train.epochs=2", "--set", "train.parallel.shard=2"]
    text = run(str(tiny_recipe), "--devices", "8", *epochs)
    assert "…" not in text
    assert max(map(len, tables(text))) <= 80
    assert "say how many --samples" in text
    assert "8 x 4 = 32" in text
    assert text.count("none *") == 1
    one, made = map(
        json.loads, run(str(tiny_recipe), "--devices", "2,8", *epochs, "--samples", "3200", "--json").splitlines()
    )
    assert one["hardware"]["devices"] == 2
    assert one["flops_per_sample"]["losses"] < made["flops_per_sample"]["losses"]
    assert made["steps"] == 200
    assert made["hardware"]["memory"] == 80e9
    assert {(x["shard"], x["checkpointing"]) for x in made["layouts"]} == {
        (shard, kind) for shard in (1, 2, 8) for kind in ("none", "selective", "full")
    }
    for part, flops in made["flops_per_sample"].items():
        assert f"{part} {flops / 1e9:.3g}" in text


@pytest.mark.slow
def test_stages_are_planned_one_by_one(tiny_recipe: Path) -> None:
    """Catches a plan of the first stage alone, whose later ones may take more memory, and hours of the whole run in
    each."""
    at = "stages=[{at: 3, set: {augment.image.local: 6}}]"
    plain = json.loads(run(str(tiny_recipe), "--json"))
    first, second = map(json.loads, run(str(tiny_recipe), "--set", at, "--json").splitlines())
    assert (first["stage"], second["stage"], plain["stage"]) == (0, 1, 0)
    assert (first["at"], second["at"]) == (None, 3)
    assert (first["steps"], second["steps"], plain["steps"]) == (3, 1, 4)
    assert first["flops_per_sample"] == plain["flops_per_sample"]
    assert first["flops_per_sample"]["image tower"] < second["flops_per_sample"]["image tower"]
    assert first["layouts"][0]["gpu_hours"] == pytest.approx(plain["layouts"][0]["gpu_hours"] * 3 / 4)
    text = run(str(tiny_recipe), "--set", at.replace("3", "0.5"))
    assert [line for line in text.splitlines() if "nothing has run" in line] == [
        "tiny: estimated, nothing has run",
        "tiny from 0.5 of the run on: estimated, nothing has run",
    ]
    assert text.count("samples/s:") == 1


def test_tokens_of_views_of_a_later_stage(tiny_recipe: Path) -> None:
    """Catches a stage that refuses views that another has."""
    alone = ["--set", "augment.text.local=0", "--set", "augment.image.local=0", "--set", "loss=[{name: clip}]"]
    alone += ["--set", "teacher=null", "--set", "fusion=null"]
    later = ["--set", "stages=[{at: 0.5, set: {augment.text.local: 1}}]", "--tokens", "text.local=9", "--json"]
    first, second = map(json.loads, run(str(tiny_recipe), *alone, *later).splitlines())
    assert "text local" not in first["lengths"]
    assert second["lengths"]["text local"] == 9
    wrong = CliRunner().invoke(plan, [str(tiny_recipe), *alone, *later, "--tokens", "text.masked=9"])
    assert "--tokens text.masked: no view of that name" in str(wrong.exception)
    assert str(wrong.exception).endswith("there are text, text.global, text.local")


@pytest.mark.slow
def test_a_source_that_is_absent(tiny_recipe: Path) -> None:
    """Neither its files nor the variable in their names: texts are as long as is said. Catches a plan that looks for
    data, a length that is printed and not planned, one that no tower takes, and a table that is wider where there are
    micro-batches and hours."""
    gone = ["--set", "data.source.urls=${NOWHERE}/x-*.tar", "--set", "data.batch_size=64"]
    short, long = (
        json.loads(run(str(tiny_recipe), *gone, "--tokens", f"text={n}", "--tokens", "text.local=9", "--json"))
        for n in (9, 36)
    )
    assert long["lengths"] == {"text global": 36, "text local": 9}
    assert long["flops_per_sample"]["text tower"] > 2 * short["flops_per_sample"]["text tower"]
    text = run(str(tiny_recipe), *gone, "--tokens", "text=36", "--memory", "1MB")
    assert "mean tokens of a view, by --tokens: text global 36, text local 36" in text
    assert "micro-" in text
    assert "hours" in text
    assert max(map(len, tables(text))) <= 80
    result = CliRunner().invoke(plan, [str(tiny_recipe), "--tokens", "text.local=900"])
    assert str(result.exception) == "--tokens text.local=900: backbone.text takes 77 (context)"


@pytest.mark.parametrize("value", ["text", "text=", "=4", "text=1", "text=many"])
def test_what_is_no_number_of_tokens(value: str) -> None:
    result = CliRunner().invoke(plan, ["clip_tiny", "--tokens", value])
    assert result.exit_code == 2
    assert "is no name and number of tokens, as text=40 or text.local=12" in result.output


@pytest.mark.parametrize(("value", "number"), [("80GB", 80e9), ("1.5 TB", 1.5e12), ("80e9", 80e9), ("7B", 7.0)])
def test_quantities(value: str, number: float) -> None:
    assert Quantity("B").convert(value, None, None) == number


def test_several_numbers_of_devices() -> None:
    assert Counts().convert("1, 8,8,64", None, None) == (1, 8, 64)
    result = CliRunner().invoke(plan, ["clip_tiny", "--devices", "1,0"])
    assert result.exit_code == 2
    assert "'1,0' is no positive number, nor several, as 1,8,64" in result.output


@pytest.mark.parametrize("value", ["lots", "-1GB", "0", "nan", "B"])
def test_what_is_no_quantity(value: str) -> None:
    result = CliRunner().invoke(plan, ["clip_tiny", "--memory", value])
    assert result.exit_code == 2
    assert "no positive number of B" in result.output


def test_a_teacher_with_towers_of_its_own_is_not_planned(tiny_recipe: Path, registry: Registry) -> None:
    """Would catch a traceback, and a plan that leaves its towers out."""
    tower = "{name: vit, image_size: 16, patch: 8, width: 16, layers: 1, heads: 2, dim: 8}"
    weights = "[{name: state_dict, source: none.pt}]"
    frozen = f"teachers.wise={{name: frozen, backbone: {{image: {tower}}}, weights: {weights}}}"
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=[frozen])
    with pytest.raises(UserError, match=r"'wise' is 'frozen': only .* are planned; .* \(--set teachers\.wise=null\)"):
        make_plans(recipe, [Hardware()], CPU)
    late = f"stages=[{{at: 0.5, set: {{{frozen.replace('=', ': ', 1)}}}}}]"
    with pytest.raises(UserError, match=r"'wise' is 'frozen': .* \(--set stages=null\)"):
        make_plans(load_recipe(tiny_recipe, registry=registry, overrides=[late]), [Hardware()], CPU)
    stored = "teacher={name: stored, fields: {image: {field: i.npy, dim: 16}, text: {field: t.npy, dim: 16}}}"
    with pytest.raises(UserError, match=r"'default' is 'stored': .* \(--set teacher=null\)"):
        make_plans(load_recipe(tiny_recipe, registry=registry, overrides=[stored]), [Hardware()], CPU)


def test_devices_that_are_no_nodes(tiny_recipe: Path, registry: Registry) -> None:
    recipe = load_recipe(tiny_recipe, registry=registry)
    with pytest.raises(UserError, match="--devices 12 is not a number of nodes of 8"):
        make_plans(recipe, [Hardware(devices=8), Hardware(devices=12)], CPU)
    three = load_recipe(tiny_recipe, registry=registry, overrides=["train.parallel.shard=3"])
    with pytest.raises(UserError, match="shard: 3 does not divide the devices, 8"):
        make_plans(three, [Hardware(devices=8)], CPU)
