"""Teachers of every kind in recipes and runs: who follows what, who reads whom, what is saved."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import my_plugin.teacher
import numpy as np
import pytest
import torch
from tars import write_tar
from trainers import trainers

from distill_authoring.conformance import assert_conforms
from distill_core.errors import RecipeErrors, UserError
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Entry, Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.resume import FIXED
from distill_core.teachers.copies import Ema, Snapshot
from distill_core.teachers.ensemble import Ensemble
from distill_core.teachers.frozen import Frozen
from distill_core.teachers.stored import Stored
from distill_core.train import Trainer

Make = Callable[..., Trainer]
VIT = "{name: vit, image_size: 16, patch: 8, width: 16, layers: 2, heads: 2, dim: 16}"
TEXT = "{name: clip_text, width: 16, layers: 1, heads: 2, dim: 16, padding: longest}"
DISTILL = "{name: cross_modal_distillation, teacher: %s}"


@pytest.fixture
def more(registry: Registry) -> Registry:
    return Registry([*registry.entries.values(), Entry(my_plugin.teacher.Average, "outside", "outside")])


@pytest.fixture
def trainer(tiny_recipe: Path, more: Registry, tmp_path: Path) -> Iterator[Make]:
    def recipe(overrides: Sequence[str], file: Path) -> Recipe:
        return load_recipe(file, registry=more, overrides=["evaluate=null", *overrides])

    with trainers(tmp_path / "runs") as make:
        yield lambda *overrides, resume=None, file=tiny_recipe: make(recipe(overrides, file), resume)


def students(trainer: Trainer) -> list[dict[str, torch.Tensor]]:
    """Runs it; the student's towers after each step, and first as they started."""
    seen = [copied(trainer.objective.backbone)]
    update = trainer.objective.after_step

    def after_step(*arguments: Any) -> None:
        update(*arguments)
        seen.append(copied(trainer.objective.backbone))

    trainer.objective.after_step = after_step  # type: ignore[method-assign]
    trainer.run()
    return seen


def copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in module.state_dict().items()}


def equal(teacher: Any, student: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    own = teacher.backbone.state_dict()
    assert own.keys() == student.keys()
    return all(torch.allclose(x, student[name], rtol=0, atol=tolerance) for name, x in own.items())


@pytest.mark.parametrize("component", [Ema, Snapshot, Frozen, Stored, Ensemble, my_plugin.teacher.Average])
def test_conforms(component: type) -> None:
    assert_conforms(component)


def test_each_loss_reads_the_teacher_that_it_names(trainer: Make) -> None:
    """Catches a loss that reads the default in another's place, teachers that share weights, and momenta that do."""
    made = trainer(
        "teacher.momentum=1.0", "teachers={fast: {name: ema, momentum: 0.0}}", f"loss.1={DISTILL % 'fast'}",
        "train.steps=3",
    )  # fmt: skip
    states = students(made)
    still, fast = made.objective.teachers["default"], made.objective.teachers["fast"]
    assert equal(still, states[0])
    assert equal(fast, states[-1], 1e-7)
    assert not equal(fast, states[0], 1e-5)
    outputs = made.objective.represent(next(iter(made.loader)), Progress(3, 4))
    loss: Any = made.objective.loss["cross_modal_distillation"]
    keys = loss.sides(outputs)[0][1].embedding
    expected = [outputs.teacher["fast"][m].embedding for m in ("image", "text")]
    assert torch.equal(keys, torch.cat(expected))
    assert not torch.allclose(outputs.teacher["default"]["image"].embedding, expected[0], atol=1e-4)


def test_a_snapshot_stands_still_between_its_steps(trainer: Make) -> None:
    """Of the student, and of a teacher that moves before it. Catches an off-by-one, and a copy of the last step's."""
    made = trainer(
        "teacher.momentum=0.5", "train.steps=5",
        "teachers={gram: {name: snapshot, every: 2}, average: {name: snapshot, every: 2, source: default}}",
    )  # fmt: skip
    seen: list[dict[str, dict[str, torch.Tensor]]] = []
    update = made.objective.after_step

    def after_step(*arguments: Any) -> None:
        update(*arguments)
        teachers = {name: copied(t.backbone) for name, t in made.objective.teachers.items()}  # type: ignore[arg-type]
        seen.append({"student": copied(made.objective.backbone), **teachers})

    made.objective.after_step = after_step  # type: ignore[method-assign]
    first = copied(made.objective.backbone)
    made.run()
    for name, of in (("gram", "student"), ("average", "default")):
        expected = [first, seen[1][of], seen[1][of], seen[3][of], seen[3][of]]
        for step, state in zip(seen, expected, strict=True):
            assert all(torch.equal(x, state[key]) for key, x in step[name].items()), name


def test_an_average_of_a_head_alone_encodes_by_the_students_tower(tiny_recipe: Path, registry: Registry) -> None:
    """As in TIPSv2. Catches a tower that is copied all the same, a student's tower in training mode, and a gradient."""
    overrides = [
        "fusion=null", "loss=[{name: dino, prototypes: 8, hidden: 8, bottleneck: 4}]",
        "teacher={of: [loss.dino.head], modalities: [image], momentum: 0.5}", "backbone.text=null", "augment.text=null",
        "evaluate=null",
    ]  # fmt: skip
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=overrides)
    objective = build_objective(recipe)
    teacher: Any = objective.teachers["default"]
    assert {name.split(".")[0] for name, _ in teacher.named_parameters()} == {"loss"}
    assert all(name.startswith("loss.dino.head.") for name, _ in teacher.named_parameters())
    head: Any = objective.loss["dino"].head
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in teacher.parameters()]
    objective.train()
    from distill_core.batch import Batch, Group, Views

    batch = Batch(
        {"image": Views([Group(torch.randn(2, 3, 3, 16, 16)), Group(torch.randn(1, 3, 3, 8, 8), "local")])}, [""]
    )
    outputs = objective.represent(batch, Progress(0, 1))
    assert torch.equal(outputs.teacher["default"]["image"].pooled, outputs.student["image"].pooled[:2])
    assert not outputs.teacher["default"]["image"].pooled.requires_grad
    assert objective.backbone["image"].training
    objective.after_step(outputs, Progress(0, 1))
    for old, new, own in zip(before, teacher.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(new, (old + own) / 2)


def test_the_fusions_average_is_read_by_losses(trainer: Make) -> None:
    made = trainer("teacher.of=[backbone.image, backbone.text, fusion]", "teacher.momentum=0.5")
    objective = made.objective
    copy = objective.ema(objective.fusion)  # type: ignore[arg-type]
    assert copy is not objective.fusion
    assert any(name.startswith("teacher.default.fusion.") for name in objective.state_dict())
    with pytest.raises(KeyError, match="no teacher 'slow'"):
        objective.ema(objective.fusion, "slow")  # type: ignore[arg-type]


@pytest.fixture
def source(trainer: Make) -> Path:
    """A trained run: weights for frozen teachers."""
    made = trainer("name=source", "train.steps=2", "seed=7")
    made.run()
    return made.folder.path


def frozen(source: Path, *options: str) -> str:
    weights = f"weights: [{{name: state_dict, source: '{source}', to: backbone}}]"
    return f"{{name: frozen, backbone: {{image: {VIT}, text: {TEXT}}}, {', '.join([weights, *options])}}}"


def test_a_frozen_teacher_is_loaded_and_not_saved(trainer: Make, source: Path) -> None:
    """Catches a teacher that trains, one in the checkpoint, weights that are read once and not after a resume, and a
    student whose first weights depend on its teachers."""
    plain = trainer("name=plain", "loss.1=null", "teacher=null", "fusion=null")
    made = trainer(
        "name=taught", f"teachers={{big: {frozen(source)}}}", f"loss.1={DISTILL % 'big'}", "teacher=null",
        "train.steps=4", "train.checkpoint.every=2", "train.checkpoint.keep=9",
    )  # fmt: skip
    theirs = Checkpoints(source).read()["objective"]
    teacher: Any = made.objective.teachers["big"]
    for name, x in teacher.network.backbone.state_dict().items():
        assert torch.equal(x, theirs[f"backbone.{name}"]), name
    for name, x in plain.objective.backbone.state_dict().items():
        assert torch.equal(x, made.objective.backbone.state_dict()[name]), name
    made.run()
    for name, x in teacher.network.backbone.state_dict().items():
        assert torch.equal(x, theirs[f"backbone.{name}"]), name
    saved = Checkpoints(made.folder.path).read("2")
    assert not any(name.startswith("teacher.") for name in saved["objective"])
    assert saved["teachers"] == {"big": teacher.digest()}
    assert not any(name.startswith("teacher.") for name, _, _ in made.objective.trainable([], {}))
    end = Checkpoints(made.folder.path).read("4")["objective"]
    for step in (3, 4):
        Checkpoints(made.folder.path).path(step).unlink(missing_ok=True)
    resumed = trainer(resume=made.folder.path, file=made.folder.path / "recipe.yaml")
    resumed.run()
    for name, x in Checkpoints(made.folder.path).read("4")["objective"].items():
        assert torch.equal(x, end[name]), name


def test_a_run_continues_with_the_teacher_that_it_had(trainer: Make, source: Path) -> None:
    made = trainer("name=taught", f"teachers={{big: {frozen(source)}}}", f"loss.1={DISTILL % 'big'}", "teacher=null")
    made.run()
    checkpoints = Checkpoints(source)
    state = checkpoints.read()
    state["objective"]["backbone.image.proj"] += 1
    checkpoints.save(state["step"], state)
    with pytest.raises(UserError, match="the teacher 'big' is another than the run has learned from"):
        trainer(resume=made.folder.path, file=made.folder.path / "recipe.yaml")


def test_a_frozen_teacher_has_views_of_its_own(trainer: Make) -> None:
    """The same crops at twice the size, and texts as its own tokenizer cuts them. Catches a teacher that sees the
    student's pixels or ids, or draws other crops."""
    big = VIT.replace("image_size: 16, patch: 8", "image_size: 32, patch: 16")
    short = TEXT.replace("padding: longest", "padding: longest, context: 5")
    sizes = ["augment.image.size=32", "augment.image.local_size=16"]
    source = trainer("name=source", "train.steps=1", f"backbone={{image: {big}, text: {short}}}", *sizes)
    source.run()
    own = "augment: {image: {name: multi_crop, size: 32, local_size: 8, global: 2, local: 1}}"
    teacher = frozen(source.folder.path, own).replace(VIT, big).replace(TEXT, short)
    made = trainer("name=taught", f"teachers={{big: {teacher}}}", f"loss.1={DISTILL % 'big'}", "teacher=null")
    batch = next(iter(made.loader))
    ours, theirs = batch.views["image"].groups[0], batch.teacher["big"]["image"].groups
    assert [group.x.shape for group in theirs] == [(2, 4, 3, 32, 32)], "the teacher's views alone"
    assert ours.x.shape[-1] == 16
    assert torch.equal(ours.extra["box"], theirs[0].extra["box"])
    assert batch.teacher["big"]["text"].groups[0].x.shape[-1] <= 5 < batch.views["text"].groups[0].x.shape[-1]
    made.run()


def test_a_snapshot_has_views_of_its_own(trainer: Make) -> None:
    """The student's crops at twice the size, without its changes of colour, as DINOv3's Gram teacher sees them. Catches
    other crops, the student's pixels, views of other roles, and a tower that is not the copy."""
    own = "{name: multi_crop, size: 32, local_size: 8, global: 2, local: 0, recolour: false}"
    made = trainer(
        "teacher.momentum=0.5", "train.steps=3",
        f"teachers={{late: {{name: snapshot, every: 2, source: default, augment: {{image: {own}}}}}}}",
        f"loss.1={DISTILL % 'late'}", "augment.image.masked=1", "backbone.image.masking={roles: [masked]}",
    )  # fmt: skip
    batch = next(iter(made.loader))
    ours, theirs = batch.views["image"].groups[0], batch.teacher["late"]["image"].groups
    assert any(group.role == "masked" for group in batch.views["image"].groups), "which it does not see"
    assert [group.x.shape for group in theirs] == [(2, 4, 3, 32, 32)], "the teacher's views alone"
    assert torch.equal(ours.extra["box"], theirs[0].extra["box"])
    assert torch.equal(ours.extra["flip"], theirs[0].extra["flip"])
    assert list(batch.teacher["late"]) == ["image"], "texts are the student's"
    late: Any = made.objective.teachers["late"]
    with torch.no_grad():
        for p in late.parameters():
            p.add_(0.1 * torch.randn_like(p))
        outputs = made.objective.represent(batch, Progress(0, 3))
        pixels = made.objective.augment["image"].on_device(batch.teacher["late"]["image"])
        expected = late.backbone["image"](pixels).pooled
    assert torch.equal(outputs.teacher["late"]["image"].pooled, expected)
    made.run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["teacher={augment: {image: {name: multi_crop, size: 20, local_size: 8, global: 2}}}"],
         "teacher: 'ema': augment.image: global views of 20 x 20 px are not whole patches of 8 px"),
        (["teacher={augment: {image: {name: multi_crop, size: 32, local_size: 8, global: 1}}}"],
         "teacher: 'ema': augment.image makes 1 view of the roles global, and the student has 2"),
        (["teacher={augment: {audio: {name: multi_crop}}}"],
         "teacher: 'ema': augment: 'audio' is no modality of this recipe (there are: image, text)"),
        ([f"loss.1={DISTILL % 'big'}"],
         "loss.1: 'cross_modal_distillation' needs a teacher 'big'; this recipe has none; there is default"),
        (["teachers={default: {name: ema}}"],
         "teachers.default: 'default' is the name of the section `teacher`; choose another"),
        (["teachers={a.b: {name: ema}}"], "teachers.a.b: a teacher's name is a word of letters, digits, - and _"),
        (["teachers={x: {name: emma}}"], "teachers.x: no teacher named 'emma', did you mean 'ema'?"),
        (["teachers={x: {name: ema, modalities: [audio]}}"],
         "teachers.x.modalities: no modality 'audio' (there are: image, text)"),
        (["teachers={x: {name: frozen}}"], "teachers.x: 'frozen': give its `backbone`: it has none of the student's"),
        (["teachers={x: {name: snapshot, every: 2, source: y}, y: {name: snapshot, every: 2}}"],
         "teachers.x.source: the teacher 'y' must stand before the one that copies it"),
        (["teachers={x: {name: snapshot, every: 2, source: x}}"],
         "teachers.x.source: the teacher 'x' must stand before the one that copies it"),
        (["teachers={x: {name: ema, of: []}}"], "teachers.x.of: must have at least 1 item(s), not 0"),
        (["teachers={x: {name: ema, of: [loss.contrastve.head]}}"],
         "teachers.x.of: 'loss.contrastve.head' names no loss of this recipe, did you mean 'contrastive'?"),
        (["teachers={x: {name: ema, of: [backbone.image.conv9]}}"],
         "the teacher 'x': of: 'backbone.image.conv9' names no part of the student: VisionTransformer has no attribute "
         "`conv9`"),
        (["teachers={x: {name: snapshot, every: 2, source: y}}"],
         "teachers.x: 'snapshot': source: this recipe has no teacher 'y'"),
        (["teacher={of: [backbone.audio]}"],
         "teacher: 'ema': of: 'backbone.audio': 'audio' is no modality of this recipe (there are: image, text)"),
        (["teacher={of: [fussion]}"],
         "teacher: 'ema': of: 'fussion' names no part of the student (backbone.NAME, heads.NAME, fusion, "
         "fusions.NAME, loss.ID.HEAD)"),
        (["loss.1={name: dino, teacher: x}", "teachers={x: {name: stored, fields: {image: {field: a.npy, dim: 16}}}}"],
         "loss.1: 'dino' needs a copy of its 'head', which the teacher 'x' has not: take a teacher that copies (`ema`),"
         " with loss.dino.head in its `of`, if that is given"),
        ([f"loss.1={DISTILL % 'x'}", "teachers={x: {name: stored, fields: {image: {field: a.npy, dim: 9}}}}"],
         "loss.1: 'cross_modal_distillation' needs a teacher of 'text'; the teacher 'x' sees none of its views"),
        ([f"loss.1={DISTILL % 'x'}", "teachers={x: {name: stored, fields: {image: {field: a.npy, dim: 9}}}}"],
         "loss.1: 'cross_modal_distillation' compares embeddings of one width D; the backbones give image 16, text 16, "
         "image of the teacher 'x' 9"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tiny_recipe: Path, registry: Registry, changes: list[str], message: str) -> None:
    """In one line each, before anything is built."""
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(tiny_recipe, registry=registry, overrides=changes)
    lines = [line.partition(" (with --set")[0] for line in caught.value.lines]
    assert any(line.endswith(message) for line in lines), lines


def test_a_path_inside_a_part_that_is_not_there(tiny_recipe: Path, registry: Registry) -> None:
    """Named in one line, with the recipe. Catches torch's error, and one that comes when the model is built."""
    with pytest.raises(RecipeErrors, match=r"of: 'backbone\.image\.nope' names no part of the student"):
        load_recipe(tiny_recipe, registry=registry, overrides=["teacher.of=[backbone.image.nope]"])


def npy(x: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def test_stored_embeddings_reach_the_loss(
    trainer: Make, tiny_recipe: Path, write_shards: Callable[..., list[Path]], tmp_path: Path
) -> None:
    """One embedding a sample, or one a view. Catches another sample's rows, another view's, and a bad one that ends a
    run."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "shards"
    write_shards(folder, 1, 8)
    import tarfile

    path = folder / "train-000.tar"
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]  # type: ignore[union-attr]
    samples: list[tuple[str, dict[str, bytes]]] = []
    stored: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}
    for name, data in members:
        key, _, kind = name.partition(".")
        fields = {kind: data}
        if kind == "txt":
            pair = rng.standard_normal((16,)), rng.standard_normal((2, 16))
            if key != "train-0-3":
                stored[key] = pair
                fields |= {"i.npy": npy(pair[0].astype(np.float16)), "t.npy": npy(pair[1])}
        samples.append((key, fields))
    write_tar(path, samples)
    for other in ("train-001.tar", "train-002.tar"):
        (folder / other).unlink()
    made = trainer(
        "teachers={kept: {name: stored, fields: {image: {field: i.npy, dim: 16}, text: {field: t.npy, dim: 16}}}}",
        f"loss.1={DISTILL % 'kept'}", "teacher=null", "data.max_bad_fraction=0.5",
    )  # fmt: skip
    batch = next(iter(made.loader))
    outputs = made.objective.represent(batch, Progress(0, 1))
    for row, key in enumerate(batch.keys):
        for view in range(2):
            image, text = (outputs.teacher["kept"][m].pooled[view, row].numpy() for m in ("image", "text"))
            np.testing.assert_allclose(image, stored[key][0], atol=2e-3)
            np.testing.assert_allclose(text, stored[key][1][view], rtol=1e-6)
    made.run()
    assert made.state.skipped_samples > 0


def test_an_ensembles_similarities_are_the_members_mean(trainer: Make, source: Path) -> None:
    made = trainer(
        "name=taught", "teacher=null", f"loss.1={DISTILL % 'both'}", "backbone.image.dim=32", "backbone.text.dim=32",
        f"teachers={{both: {{name: ensemble, members: {{a: {frozen(source)}, b: {frozen(source)}}}}}, "
        f"one: {frozen(source)}}}",
    )  # fmt: skip
    outputs = made.objective.represent(next(iter(made.loader)), Progress(0, 1))
    both, one = outputs.teacher["both"]["image"].embedding, outputs.teacher["one"]["image"].embedding
    assert both.shape[-1] == 32
    torch.testing.assert_close(both[0] @ both[0].T, one[0] @ one[0].T)
    made.run()


def test_a_strangers_rule(trainer: Make) -> None:
    """From the public surface, in 30 lines: the mean of the students after each step, exactly resumed."""
    made = trainer("teacher={name: my_plugin_average}", "train.steps=4")
    states = students(made)[1:]
    mean = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
    assert equal(made.objective.teachers["default"], mean, 1e-6)
    assert made.objective.teachers["default"].count == 4
    source = Path(str(my_plugin.teacher.__file__)).read_text()
    assert len(source[source.index("class AverageConfig") :].splitlines()) < 30


def test_teachers_may_be_exchanged_while_a_run_stands() -> None:
    """A run may continue with another rule: only what the optimiser and the data hold is fixed."""
    assert not any(path.startswith("teacher") for path in FIXED)
