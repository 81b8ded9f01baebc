"""What a run starts from: parameter groups, frozen parts, learning-rate factors, weights of other runs and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill_core.errors import UserError
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer

Make = Callable[..., Trainer]


@pytest.fixture
def trainer(tiny_recipe: Path, registry: Registry, tmp_path: Path) -> Make:
    def make(*overrides: str) -> Trainer:
        recipe = load_recipe(tiny_recipe, registry=registry, overrides=["evaluate=null", *overrides])
        return Trainer(recipe, RunFolder.create(tmp_path / "runs", recipe), quiet=True)

    return make


def groups_of(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Parameter name -> the options of its group."""
    names = {id(p): name for name, p in trainer.objective.named_parameters()}
    return {names[id(p)]: group for group in trainer.train_step.optimizer.param_groups for p in group["params"]}


def test_weight_decay_of_matrices_alone(trainer: Make) -> None:
    """Catches decayed norms, biases or scales, matrices that are not, and parameters in no group or in two."""
    made = trainer("train.optimizer.weight_decay=0.3")
    groups = groups_of(made)
    trained = {name for name, _ in made.objective.named_parameters() if not name.startswith("teacher.")}
    assert set(groups) == trained
    assert sum(len(group["params"]) for group in made.train_step.optimizer.param_groups) == len(trained)
    shapes = {name: p.ndim for name, p in made.objective.named_parameters()}
    assert {groups[name]["weight_decay"] for name in trained if shapes[name] < 2} == {0.0}
    assert {groups[name]["weight_decay"] for name in trained if shapes[name] >= 2} == {0.3}
    for name in ("loss.contrastive.logit_scale", "backbone.text.ln_final.weight", "backbone.image.class_embedding"):
        assert groups[name]["weight_decay"] == 0.0, name


def test_frozen_parts_do_not_move(trainer: Make) -> None:
    """Catches a frozen part that decays, a prefix that freezes its neighbour, and one whose teacher moves."""
    made = trainer("freeze=[backbone.text, backbone.image.conv1, loss.contrastive]", "train.optimizer.weight_decay=0.5")
    before = {name: value.clone() for name, value in made.objective.state_dict().items()}
    made.run()
    frozen = ("backbone.text.", "backbone.image.conv1.", "loss.contrastive.")
    for name, value in made.objective.state_dict().items():
        if name.startswith((*frozen, "teacher.default.backbone.text.", "teacher.default.backbone.image.conv1.")):
            torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-7, msg=name)
        elif name.startswith(("backbone.image.proj", "fusion.token_map.text.weight", "loss.cross_modal")):
            assert not torch.equal(value, before[name]), name
    assert not any(name.startswith(frozen) for name in groups_of(made))


def test_factors_of_the_learning_rate(trainer: Make) -> None:
    """Hand-computed: the longest path wins. Catches a factor that stops at the first step of the schedule."""
    made = trainer(
        "train.optimizer.lr=0.01",
        "train.schedule={name: constant}",
        "train.lr_factors={backbone: 0.5, backbone.text: 0.1, backbone.text.transformer.resblocks.0.mlp: 0.0}",
    )
    still = made.objective.backbone["text"].transformer.resblocks[0].mlp.c_fc.weight.clone()
    made.run()
    rates = {name: group["lr"] for name, group in groups_of(made).items()}
    assert rates["backbone.image.proj"] == pytest.approx(0.005)
    assert rates["backbone.text.text_projection"] == pytest.approx(0.001)
    assert rates["backbone.text.transformer.resblocks.0.mlp.c_fc.weight"] == 0.0
    assert rates["fusion.token_map.image.weight"] == pytest.approx(0.01)
    assert torch.equal(made.objective.backbone["text"].transformer.resblocks[0].mlp.c_fc.weight, still)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("freeze=[backbone.txt]", r"'backbone.txt' names no part of the model, did you mean 'backbone.text'\?"),
        (
            "train.lr_factors={backbone.image.transfomer: 0.1}",
            r"'backbone.image.transfomer' .*did you mean 'backbone.image.transformer'\?",
        ),
        ("freeze=[teacher.default.backbone.image]", r"'teacher.default.backbone.image' names no part"),
        ("freeze=[backbone, fusion, loss]", r"everything is frozen"),
    ],
)
def test_unknown_paths(trainer: Make, override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        trainer(override)


@pytest.fixture
def other(trainer: Make) -> Trainer:
    """A run of another seed, to take weights from."""
    made = trainer("seed=9", "name=other", "train.steps=2")
    made.run()
    return made


def init(source: Path, **options: str) -> str:
    more = "".join(f", {key}: {value}" for key, value in options.items())
    return f'weights=[{{name: state_dict, source: "{source}"{more}}}]'


@pytest.mark.slow
def test_weights_of_a_run(trainer: Make, other: Trainer) -> None:
    """Catches weights that are not taken, are taken for the wrong part, or a teacher that stays behind."""
    theirs = Checkpoints(other.folder.path).read()["objective"]
    own = trainer().objective.state_dict()
    whole = trainer(init(other.folder.path))
    state = whole.objective.state_dict()
    assert all(torch.equal(state[key], theirs[key]) for key in theirs)
    assert [loaded.line for loaded in whole.load_reports] == [
        f"{other.folder.path}: {len(theirs)} tensors into the model"
    ]
    assert not torch.equal(theirs["teacher.default.backbone.image.proj"], theirs["backbone.image.proj"])

    part = trainer(init(other.folder.path, to="backbone.image")).objective.state_dict()
    for key in own:
        # a teacher that is given nothing starts as the student it has
        student = key.removeprefix("teacher.default.")
        expected = theirs if student.startswith("backbone.image.") else own
        assert torch.equal(part[key], expected[student]), key
    taught = trainer(
        init(other.folder.path, to="backbone.image", prefix="teacher.default.backbone.image")
    ).objective.state_dict()
    assert torch.equal(taught["backbone.image.proj"], theirs["teacher.default.backbone.image.proj"])


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_weights_of_a_file(trainer: Make, other: Trainer, tmp_path: Path, kind: str) -> None:
    """Catches prefixes that are not taken off, and files of either kind that are not read."""
    tower = {f"visual.{key}": value + 1 for key, value in other.objective.backbone["image"].state_dict().items()}
    file = tmp_path / f"tower.{kind}"
    save = save_file if kind == "safetensors" else torch.save
    save({**tower, "unrelated": torch.zeros(2)}, file)
    made = trainer(init(file, to="backbone.image", prefix="visual"))
    for key, value in made.objective.backbone["image"].state_dict().items():
        assert torch.equal(value, tower[f"visual.{key}"]), key
    with pytest.raises(UserError, match=r"does not fit:(.|\n)*backbone.image.unrelated: not in this model"):
        trainer(init(file, to="backbone.image"))


def test_weights_of_a_checkpoint(trainer: Make, other: Trainer, tmp_path: Path) -> None:
    """Catches one of several state dicts that is taken without a word; names of torch.compile are a prefix."""
    tower = {f"_orig_mod.{key}": value for key, value in other.objective.backbone["image"].state_dict().items()}
    raised = {key: value + 1 for key, value in tower.items()}
    torch.save({"model": tower, "ema": raised, "epoch": 3}, tmp_path / "w.pt")
    options = {"to": "backbone.image", "prefix": "_orig_mod"}
    made = trainer(init(tmp_path / "w.pt", **options))
    assert made.load_reports[0].line.endswith("; its 'model' was used (`key` may also be: ema)")
    for expected, built in ((tower, made), (raised, trainer(init(tmp_path / "w.pt", **options, key="ema")))):
        for key, value in built.objective.backbone["image"].state_dict().items():
            assert torch.equal(value, expected[f"_orig_mod.{key}"]), key


def test_weights_that_do_not_fit(trainer: Make, other: Trainer, tmp_path: Path) -> None:
    """Catches a partial load without a word: each missing, unknown or misshapen key is named, and nothing is loaded."""
    tower = dict(other.objective.backbone["image"].state_dict())
    tower["proj"] = torch.zeros(3, 3)
    del tower["class_embedding"]
    tower["extra.weight"] = torch.zeros(1)
    file = tmp_path / "tower.pt"
    torch.save(tower, file)
    with pytest.raises(UserError) as error:
        trainer(init(file, to="backbone.image"))
    message = str(error.value)
    assert str(file) in message
    assert "backbone.image.proj: shape [3, 3], this model has [16, 16]" in message
    assert "backbone.image.class_embedding: missing" in message
    assert "backbone.image.extra.weight: not in this model" in message
    with pytest.raises(UserError, match="shape"):
        trainer(init(file, to="backbone.image", strict="false"))
    tower["proj"] = torch.zeros(16, 16)
    torch.save(tower, file)
    made = trainer(init(file, to="backbone.image", strict="false"))
    assert not made.objective.backbone["image"].proj.any()
    assert "1 of this model keep their first weights" in made.load_reports[0].line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("nowhere", {}, "no such file or run folder"),
        ("text.pt", {}, "cannot be loaded"),
        ("list.pt", {}, "holds no state dict"),
        ("run", {"to": "backbone.sound"}, "'backbone.sound' names no part of the model"),
        ("run", {"checkpoint": '"77"'}, "no checkpoint '77'; there are 2"),
    ],
)
def test_sources_that_cannot_be_used(
    trainer: Make, other: Trainer, tmp_path: Path, source: str, options: dict[str, str], said: str
) -> None:
    (tmp_path / "text.pt").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pt")
    path = other.folder.path if source == "run" else tmp_path / source
    with pytest.raises(UserError, match=said):
        trainer(init(path, **options))


@pytest.mark.slow
def test_a_run_that_starts_from_another_trains_on(trainer: Make, other: Trainer) -> None:
    """Catches weights that are loaded behind the optimiser's back: the first step must start from them."""
    made = trainer(init(other.folder.path), "train.steps=1", "train.optimizer.lr=1e-6")
    made.run()
    state, theirs = made.objective.state_dict(), other.objective.state_dict()
    assert not torch.equal(state["backbone.image.proj"], theirs["backbone.image.proj"])
    torch.testing.assert_close(state["backbone.image.proj"], theirs["backbone.image.proj"], rtol=0, atol=1e-5)
