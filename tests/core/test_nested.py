"""Losses around losses, as a stranger's package would write them: needs, heads of teachers, state, a resumed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import torch
from small_runs import parse
from torch import Tensor
from wrapping_losses import Chosen, Mean, Ramped, Whole

from distill_authoring.conformance import assert_conforms
from distill_authoring.schema import recipe_schema
from distill_core import Loss, Needs, Progress, hookimpl
from distill_core.errors import RecipeErrors
from distill_core.recipe.build import build_objective
from distill_core.recipe.document import read_document
from distill_core.recipe.resolve import load_recipe, parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.step import TrainStep
from distill_core.tools import example_batch
from distill_core.train import Trainer
from distill_study.grammar import make_study, swaps_document


class Plugin:
    """A stranger's."""

    @staticmethod
    @hookimpl
    def distill_components() -> list[type]:
        return [Ramped, Mean, Whole, Chosen]


@pytest.fixture(scope="module")
def more(registry: Registry) -> Registry:
    return Registry([*registry.entries.values(), *Registry.of(Plugin).entries.values()])


DINO = "{name: dino, prototypes: 8, hidden: 8, bottleneck: 4}"


def stepped(recipe: Recipe, steps: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of so many steps, and the weights after them, by name without the losses' paths."""
    torch.manual_seed(0)
    objective = build_objective(recipe)
    state = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(objective.named_parameters(), key=lambda item: item[0].split(".")[-3:]):
            if name.startswith("backbone."):
                p.add_(0.01 * torch.randn(p.shape, generator=state))
    step, batch = TrainStep(recipe, objective, torch.device("cpu")), example_batch(recipe, 4)
    losses = [step(batch, Progress(i, 10)).loss for i in range(steps)]
    return losses, {name: p.detach().clone() for name, p in objective.named_parameters()}


@pytest.mark.slow
def test_a_wrapper_that_changes_nothing_trains_as_the_loss_does(small_text: str, more: Registry) -> None:
    """Fused views, a teacher's heads, centres and a clamped scale, each read or moved by a loss two levels down.

    Catches needs of inner losses that nobody adds up, heads without a teacher's copy, state that stays where it was,
    and an inner weight that is dropped."""
    plain = parse(small_text, more, f"loss.2={DINO}", "loss.0.weight=0.5")

    def ramped(inner: str) -> str:
        return f"name: ramped, inner: {{name: ramped, inner: {inner}}}}}"

    wrapped = parse(
        small_text,
        more,
        "loss.0={" + ramped("{name: contrastive, weight: 0.5}"),
        "loss.1={id: b, " + ramped("cross_modal_distillation"),
        "loss.2={id: c, " + ramped(DINO),
    )
    expected, weights = stepped(plain)
    losses, others = stepped(wrapped)
    assert losses == pytest.approx(expected, rel=1e-6)
    renamed = {
        name.replace("loss.ramped.inner.inner", "loss.contrastive")
        .replace("loss.b.inner.inner", "loss.cross_modal_distillation")
        .replace("loss.c.inner.inner", "loss.dino"): p
        for name, p in others.items()
    }
    assert renamed.keys() == weights.keys()
    for name, p in weights.items():
        torch.testing.assert_close(renamed[name], p, rtol=1e-5, atol=1e-6, msg=name)
    assert any(name.startswith("teacher.default.loss.dino.head") for name in weights)
    assert wrapped.untrained_embeddings() == plain.untrained_embeddings()


@pytest.mark.slow
def test_a_mean_of_two_losses_in_a_run_that_is_resumed(small_text: str, more: Registry, tmp_path: Path) -> None:
    """Catches terms and metrics without names, schedules and parameters that have no path, and inner state that a
    checkpoint lacks."""
    recipe = parse(
        small_text,
        more,
        "loss=[{name: mean_of, of: [{name: contrastive, weight: {name: ramp, start: 0, end: 1}}, "
        "{name: ramped, power: {name: ramp, start: 1, end: 2}, inner: cross_modal_distillation}], "
        f"more: {{d: {DINO}}}}}]",
        "train.lr_factors={loss.mean_of.of.0: 0.5}",
        "freeze=[loss.mean_of.more.d.head]",
    )
    assert sorted(path for path in recipe.schedules() if path.startswith("loss")) == [
        "loss.0.more.d.teacher_temperature",
        "loss.0.of.0.weight",
        "loss.0.of.1.power",
    ]
    folder = RunFolder.create(tmp_path, recipe)
    Trainer(recipe, folder, quiet=True).run()
    end = Checkpoints(folder.path).read()
    again = parse_recipe((folder.path / "recipe.yaml").read_text(), "recipe.yaml", registry=more)
    Trainer(again, RunFolder(folder.path), resume="2", quiet=True).run()
    finished = Checkpoints(folder.path).read()
    assert any(name.startswith("loss.mean_of.more.d.") for name in end["objective"])
    for name, tensor in end["objective"].items():
        assert torch.equal(tensor, finished["objective"][name]), name
    row = (folder.path / "metrics.jsonl").read_text().splitlines()[-1]
    assert '"mean_of/of.0/scale"' in row
    assert '"mean_of"' in row


def test_what_inner_losses_need_is_refused_at_their_place(errors_of: Callable[..., list[str]]) -> None:
    """Catches a need that is found when the towers run, one of a wrapper that needs nothing itself, and a schedule in
    a loss that is taken for one where samples may lack a modality."""
    assert errors_of(
        "loss.0={name: ramped, inner: {name: mean_of, of: [{name: ibot, prototypes: 8}]}}",
        "teacher=null",
        "loss.1=null",
    ) == [
        "--set loss.0: loss.0.inner.of.0: 'ibot' needs a teacher; this recipe has none",
        "--set loss.0: loss.0.inner.of.0: 'ibot' needs masked views of 'image'; its backbone cannot hide tokens "
        "without its option `masking`",
    ]
    for loss, place in (("{name: ramped, inner: WHOLE}", "loss.0.inner"), ("WHOLE", "loss.0")):
        whole = "{name: whole, inner: {name: contrastive, weight: {name: ramp, start: 0, end: 1}}}"
        (line,) = errors_of(f"loss=[{loss.replace('WHOLE', whole)}]", "data.optional=[image]")
        assert line.startswith(f"--set loss: {place}: 'whole' needs 'image' of every sample, and data.optional lets")


def test_a_study_swaps_inner_losses_and_the_schema_knows_them(small_text: str, more: Registry, tmp_path: Path) -> None:
    """Catches paths into a component that a swap cannot name, and an editor that refuses or accepts anything there."""
    recipe = tmp_path / "base.yaml"
    loss = "{name: ramped, inner: {name: mean_of, of: [contrastive, clip]}}"
    recipe.write_text(small_text.replace("- {name: contrastive}", f"- {loss}"))
    document = swaps_document(str(recipe), ["loss.0.inner.of.1=siglip,{name: contrastive, weight: 2}"])
    variants = make_study(document, tmp_path, "study").variants
    assert [variant.label for variant in variants] == [
        "loss.0.inner.of.1=siglip",
        "loss.0.inner.of.1=contrastive(weight=2)",
    ]
    names = []
    for variant in variants:
        inner = load_recipe(variant.recipe, registry=more, overrides=variant.changes).loss[0].config.inner
        names.append([(slot.cls.name, slot.config.weight) for slot in inner.config.of])
    assert names == [[("contrastive", 1.0), ("siglip", 1.0)], [("contrastive", 1.0), ("contrastive", 2.0)]]
    validator = jsonschema.Draft7Validator(recipe_schema(more))
    written = read_document(recipe.read_text(), "base.yaml").data
    assert list(validator.iter_errors(written)) == []
    written["loss"][0]["inner"]["of"][1] = {"name": "clip", "wieght": 1}
    assert list(validator.iter_errors(written)) != []


@pytest.fixture
def errors_of(small_text: str, more: Registry) -> Callable[..., list[str]]:
    def lines(*overrides: str) -> list[str]:
        with pytest.raises(RecipeErrors) as caught:
            parse(small_text, more, *overrides)
        return [line.partition(" (with ")[0] for line in caught.value.lines]

    return lines


def test_needs_of_several() -> None:
    """Catches parts that are lost or doubled, and embeddings that one part leaves out and another trains."""
    one = Needs(
        student=("a",),
        teacher={"t": {"a": (0,)}},
        tokens={"a": (0, 1)},
        layers={"a": (3,)},
        teacher_layers={"t": {"a": (1,)}},
        views={"a": {"global": 1, "local": 2}},
        embeddings=(),
        extra={"a": ("box",)},
        fields=("x",),
    )
    two = Needs(
        student=("b", "a"),
        teacher={"t": {"a": (1,), "b": ()}, "u": {"a": ()}},
        fused=("a",),
        tokens={"a": (1, 2), "b": (0,)},
        views={"a": {"global": 2}},
        masked=("b",),
        pools=True,
        fields=("x", "y"),
    )
    assert Needs.union([one, two]) == Needs(
        student=("a", "b"),
        teacher={"t": {"a": (0, 1), "b": ()}, "u": {"a": ()}},
        fused=("a",),
        tokens={"a": (0, 1, 2), "b": (0,)},
        layers={"a": (3,)},
        teacher_layers={"t": {"a": (1,)}},
        views={"a": {"global": 2, "local": 2}},
        masked=("b",),
        embeddings=("a", "b"),
        pools=True,
        extra={"a": ("box",)},
        fields=("x", "y"),
    )
    assert Needs.union([Needs(), Needs(student=("a",))]).embeddings is None


@pytest.mark.slow
@pytest.mark.parametrize("component", [Ramped, Mean, Chosen], ids=lambda component: component.name)
def test_conforms(component: type[Loss], more: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a nested loss that reads tokens, a teacher's heads and masks, and a wrapper in a wrapper."""
    monkeypatch.setattr("distill_authoring.conformance.suite._installed", lambda: more)
    assert_conforms(component)


def test_losses_inside_read_the_fusion_of_the_outermost(small_text: str, more: Registry) -> None:
    """At any depth. Catches a loss inside that is refused where the outer one names the only fusion."""
    named = ("fusion=null", "fusions={wide: {name: cross_attention, heads: 2}}")
    ramped = "{name: ramped%s, inner: %s}"
    inner = ramped % ("", "{name: cross_modal_distillation%s}")
    for own in ("", ", fusion: wide"):
        recipe = parse(small_text, more, *named, f"loss=[{ramped % (', fusion: wide', inner % own)}]")
        assert build_objective(recipe).fusions_read == {"wide"}
    with pytest.raises(RecipeErrors, match="'cross_modal_distillation' needs fused views; this recipe has no fusion"):
        parse(small_text, more, *named, f"loss=[{ramped % ('', inner % '')}]")
    with pytest.raises(RecipeErrors, match="reads the fusion of the loss around it, 'ramped': give its `fusion` there"):
        parse(small_text, more, *named, f"loss=[{ramped % ('', inner % ', fusion: wide')}]")
