"""YAML to a checked recipe: where errors point, that all come at once, strict types, what components need."""

from pathlib import Path
from typing import Any

import pytest
import torch
from base_recipe import BASE, Check, Errors

from distill_core import hookimpl
from distill_core.contracts.component import ComponentConfig
from distill_core.errors import RecipeErrors
from distill_core.interfaces import Backbone, Loss, LossConfig
from distill_core.plan import BackboneSpec, Needs
from distill_core.recipe.resolve import load_recipe, parse_recipe
from distill_core.registry import Registry
from distill_tasks.retrieval import Retrieval


def test_all_errors_of_a_file_at_once_with_their_lines(errors: Errors) -> None:
    """The example of the architecture page. Would catch a check that stops at the first error, or a wrong line."""
    text = """\
augment: {image: multi_crop, text: text_crop}
backbone: {image: vit, text: clip_text}
data: {source: {name: webdataset, urls: x.tar}}
train: {steps: 3}
fusion: {name: cross_attention,
  heads: many}
loss: [contrastive,
  cross_modal_distilation,
  cross_modal_distillation]
"""
    assert errors(text=text) == [
        "r.yaml:6: fusion.heads: must be an integer, got 'many'",
        "r.yaml:8: loss.1: no loss named 'cross_modal_distilation', did you mean 'cross_modal_distillation'?",
        "r.yaml:9: loss.2: 'cross_modal_distillation' needs a teacher; this recipe has none",
    ]


def test_an_empty_file_names_every_section_that_it_lacks(errors: Errors) -> None:
    assert errors(text="") == [
        f"r.yaml:1: {section}: is required and not given"
        for section in ("augment", "backbone", "data", "loss", "train")
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.steps=1", "trian: unknown option 'trian', did you mean 'train'?"),
        ("train.stepps=1", "train.stepps: unknown option 'stepps', did you mean 'steps'?"),
        ("train.checkpoint.kep=1", "train.checkpoint.kep: unknown option 'kep', did you mean 'keep'?"),
        ("teacher.momentun=1", "teacher.momentun: unknown option 'momentun', did you mean 'momentum'?"),
        ("fusion.haeds=1", "fusion.haeds: unknown option 'haeds', did you mean 'heads'?"),
        ("loss.1.wieght=1", "loss.1.wieght: unknown option 'wieght', did you mean 'weight'?"),
        # the option is written `global`; its Python name must neither be taken nor proposed
        ("augment.image.globals_=1", "augment.image.globals_: unknown option 'globals_', did you mean 'global'?"),
        ("fusion=cros_attention", "fusion: no fusion named 'cros_attention', did you mean 'cross_attention'?"),
        ("data.source.name=webdatset", "data.source: no source named 'webdatset', did you mean 'webdataset'?"),
        ("fusion=contrastive", "fusion: 'contrastive' is a component of kind loss, not fusion"),
        ("loss.0={id: x}", "loss.0: needs a name: a component of kind loss, as {name: ...}"),
    ],
)
def test_did_you_mean(errors: Errors, override: str, message: str) -> None:
    """Would catch an unknown key that is passed over, and an error of an override that points into the file."""
    path = override.partition("=")[0]
    assert errors(override) == [f"--set {path}: {message.removeprefix(f'{path}: ')}"]


def test_did_you_mean_for_files(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "cosmos_tiny.yaml").write_text("")
    with pytest.raises(RecipeErrors, match=r"cosmos_tinny.yaml: no such recipe, did you mean 'cosmos_tiny.yaml'\?$"):
        load_recipe(tmp_path / "cosmos_tinny.yaml", registry=registry)
    with pytest.raises(RecipeErrors, match=r"none/x.yaml: no such recipe$"):
        load_recipe(tmp_path / "none" / "x.yaml", registry=registry)
    with pytest.raises(RecipeErrors, match="cannot be read"):
        load_recipe(tmp_path, registry=registry)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.clip_grad=off", "must be a number or a mapping, got 'off'"),  # lax pydantic over YAML 1.1: 0.0
        ("train.clip_grad=true", "must be a number or a mapping, got True"),
        ("fusion.heads=true", "must be an integer, got True"),
        ('fusion.heads="12"', "must be an integer, got '12'"),
        ("fusion.heads=2.0", "must be an integer, got 2.0"),
        ("fusion.heads=null", "must be an integer, got None"),
        ("fusion.form=fast", "must be 'auto', 'projected', 'absorbed' or 'reference', got 'fast'"),
        ("fusion.mask_padding=1", "must be true or false, got 1"),
        ("fusion.modalities=image", "must be a list, got 'image'"),
        ("teacher.momentum=1.5", "must be at most 1, got 1.5"),
        ("loss.0.weight=.nan", "must be at least 0, got nan"),
        ("train.steps=0", "must be greater than 0, got 0"),
        ("name=a/b", "must match the pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', got 'a/b'"),
        ("train=null", "must be a mapping, got None"),
        ("data.source=null", "must be a mapping, got None"),
        ("train.optimizer=null", "must be a mapping, got None"),
        ("teacher=3", "must be a mapping, got 3"),
        ("loss=contrastive", "must be a list, got 'contrastive'"),
        # unions: one line, and of its branches the one that fits best
        ("data.source.urls=3", "must be a string or a list or a mapping, got 3"),
        ("train.schedule.warmup=1.5", "must be an integer or less than 1, got 1.5"),
    ],
)
def test_strict_types(errors: Errors, override: str, message: str) -> None:
    """Would catch a coercion that trains another recipe than the one written, and an error without its path."""
    path = override.partition("=")[0]
    found = [line for line in errors(override) if line.startswith(f"--set {path}: ")]
    assert found == [f"--set {path}: {message}"]


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("augment.image.jitter=[0.4, 0.4, 0.2]", "augment.image.jitter.3"),
        ("augment.image.jitter=[0.4, 0.4, 0.2, 0.9]", "augment.image.jitter.3"),
        ("data.source.urls=[a, 3]", "data.source.urls.1"),
        ("data.source.urls={a: [x, 3]}", "data.source.urls.a.1"),
        ("evaluate.tasks=[{name: retrieval, ks: [1, 0]}]", "evaluate.tasks.0.ks.1"),
    ],
)
def test_errors_inside_a_value_have_its_whole_path(errors: Errors, override: str, path: str) -> None:
    (line,) = errors(override)
    assert line.startswith(f"--set {override.partition('=')[0]}: {path}: ")


def test_numbers_in_any_spelling_and_lists_for_tuples(check: Check) -> None:
    """Would catch strictness that refuses what a person writes."""
    recipe = check("train.steps=1e3", "train.clip_grad=1", "train.optimizer.lr=5e-4", "train.optimizer.betas=[0, .98]")
    assert recipe.train.steps == 1000
    assert type(recipe.train.steps) is int
    assert recipe.train.optimizer.config.lr == 5e-4
    assert recipe.train.optimizer.config.betas == (0.0, 0.98)


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["teacher=null"], ["r.yaml:10: loss.1: 'cross_modal_distillation' needs a teacher; this recipe has none"]),
        (
            ["fusion=null"],
            ["r.yaml:10: loss.1: 'cross_modal_distillation' needs fused views; this recipe has no fusion"],
        ),
        (
            ["teacher.modalities=[image]"],
            [
                "r.yaml:10: loss.1: 'cross_modal_distillation' needs a teacher of 'text'; this recipe's teacher sees "
                "none of its views"
            ],
        ),
        (
            ["loss.0.modalities=[image, txt]"],
            [
                "r.yaml:9: loss.0: 'contrastive' needs a modality 'txt', did you mean 'text'? "
                "(with --set loss.0.modalities)"
            ],
        ),
        (
            ["augment.audio=multi_crop"],
            ["--set augment.audio: 'audio' has no entry in backbone; a modality needs both"],
        ),
        (
            ["backbone.audio=vit"],
            ["--set backbone.audio: 'audio' has no entry in augment; a modality needs both"],
        ),
        (
            ["augment.text=null"],
            ["r.yaml:6: backbone.text: 'text' has no entry in augment; a modality needs both"],
        ),
        (
            ["fusion.heads=3"],
            [
                "r.yaml:7: fusion: 'cross_attention' has 3 heads, which do not divide the embedding width 16 "
                "(with --set fusion.heads)"
            ],
        ),
        (
            ["backbone.text.dim=8"],
            [
                f"r.yaml:{line}: {where} compares embeddings of one width D; the backbones give image 16, text 8"
                for line, where in (
                    (7, "fusion: 'cross_attention'"),
                    (9, "loss.0: 'contrastive'"),
                    (10, "loss.1: 'cross_modal_distillation'"),
                )
            ],
        ),
        (
            ["fusion.modalities=[image, image]"],
            ["r.yaml:7: fusion: 'cross_attention' needs two different modalities (with --set fusion.modalities)"],
        ),
        (
            ["loss.2=contrastive"],
            ["--set loss.2: a second 'contrastive': give it an `id:` of its own"],
        ),
        (
            ["evaluate.tasks.1=retrieval"],
            ["--set evaluate.tasks.1: a second 'retrieval': give it an `id:` of its own"],
        ),
        (["train.steps=null"], ["r.yaml:14: train: give `steps` or `epochs` (with --set train.steps)"]),
        (
            ["train.checkpoint.best=student/retrieval/M"],
            ["--set train.checkpoint.best: needs `evaluate.every`: scores on the validation split"],
        ),
        (
            ["backbone.image.patch=7"],
            ["r.yaml:5: backbone.image: image_size 16 is not a multiple of patch 7 (with --set backbone.image.patch)"],
        ),
        (["loss.0.id=a.b"], ["--set loss.0.id: an id is a word of letters, digits, - and _, got 'a.b'"]),
        (
            ["evaluate.tasks=[{name: retrieval, modalities: [image, audio]}]"],
            ["--set evaluate.tasks: evaluate.tasks.0: 'retrieval' needs a modality 'audio' (there are: image, text)"],
        ),
        (
            ["evaluate.tasks=[{name: knn, modality: audio}]"],
            ["--set evaluate.tasks: evaluate.tasks.0: 'knn' needs a modality 'audio' (there are: image, text)"],
        ),
        (
            ["evaluate.tasks=[{name: knn}]", "backbone.image.width=x", "backbone.text.width=x"],
            [
                "--set backbone.image.width: must be an integer, got 'x'",
                "--set backbone.text.width: must be an integer, got 'x'",
            ],
        ),
        (
            ["evaluate.tasks=[{name: zero_shot, modalities: [image, image]}]"],
            [
                "--set evaluate.tasks: evaluate.tasks.0: 'zero_shot' compares two modalities; "
                "`modalities` names 'image' twice"
            ],
        ),
    ],
)
def test_what_components_need_of_one_another(errors: Errors, overrides: list[str], messages: list[str]) -> None:
    """Each would otherwise fail (or train something else) after the data is read. Would catch the check's absence."""
    assert errors(*overrides) == messages


class _PooledConfig(ComponentConfig):
    """No options."""


class _Pooled(Backbone):
    """A backbone without tokens."""

    name = "pooled_only"
    Config = _PooledConfig

    @classmethod
    def spec(cls, config):
        return BackboneSpec(16, 16, has_tokens=False)

    @classmethod
    def collator(cls, config):
        raise NotImplementedError

    def encode(self, x, *, tokens, token_mask):
        raise NotImplementedError


class _LocalLoss(Loss):
    """A loss that reads local views, a later view's tokens and the teacher's tokens."""

    name = "local_loss"
    Config = LossConfig

    @classmethod
    def needs(cls, config, plan):
        return Needs(views={"text": {"local": 3}}, tokens={"image": (2, 5)}, teacher={"default": {"text": (0,)}})

    def forward(self, outputs):
        raise NotImplementedError


class _Plugin:
    @staticmethod
    @hookimpl
    def distill_components():
        return [_Pooled, _LocalLoss]


def test_needs_of_tokens_and_local_views(registry: Registry) -> None:
    """Would catch a need that is declared and never checked: tokens, the teacher's tokens, views by role."""
    more = Registry([*registry.entries.values(), *Registry.of(_Plugin).entries.values()])
    with pytest.raises(RecipeErrors) as caught:
        parse_recipe(
            BASE, "r.yaml", registry=more, overrides=["loss=[local_loss]", "backbone.text={name: pooled_only}"]
        )
    assert caught.value.lines == [
        "r.yaml:7: fusion: 'cross_attention' needs tokens of 'text'; its backbone gives none",
        "--set loss: loss.0: 'local_loss' needs 3 local view(s) of 'text'; its augmentation makes 1",
        "--set loss: loss.0: 'local_loss' needs the tokens of view 5 of 'image'; it has 3 views",
        "--set loss: loss.0: 'local_loss' needs tokens of 'text'; the teacher gives none",
    ]
    enough = ["loss=[local_loss]", "augment.text.local=3", "augment.image.local=4"]
    recipe = parse_recipe(BASE, "r.yaml", registry=more, overrides=enough)
    assert recipe.plan.modalities["text"].views("local") == (2, 3, 4)


def test_a_broken_component_does_not_hide_or_double_other_errors(errors: Errors) -> None:
    """Would catch follow-on errors ("needs a modality") for a backbone whose options alone are wrong."""
    assert errors("backbone.text.width=x", "loss.1.wieght=2") == [
        "--set backbone.text.width: must be an integer, got 'x'",
        "--set loss.1.wieght: unknown option 'wieght', did you mean 'weight'?",
    ]


def test_every_bad_override_is_reported(errors: Errors) -> None:
    assert errors("train.steps", "loss.9.weight=1") == [
        "--set train.steps: write it as path=value, for example loss.1.weight=0.5",
        "--set loss.9.weight: the list has no item 9; it has 2, counted from 0",
    ]


def test_splits_that_are_evaluated_must_be_there(errors: Errors, check: Check) -> None:
    """Would catch a run that trains to its end and then has nothing to evaluate on."""
    said = "name one that it has, give it one, or leave out evaluate.tasks"
    assert errors("data.source.test=null") == [
        f"r.yaml:15: evaluate.split: data.source has no split 'test' (it has train); {said}"
    ]
    assert errors("evaluate.every=2") == [
        f"r.yaml:15: evaluate.validation: data.source has no split 'validation' (it has train, test); {said}"
    ]
    assert errors("evaluate.split=tset") == [
        f"--set evaluate.split: data.source has no split 'tset' (it has train, test); {said}"
    ]
    assert errors("evaluate.source={name: webdataset, urls: z.tar}") == [
        f"r.yaml:15: evaluate.split: evaluate.source has no split 'test' (it has train); {said}"
    ]
    check("data.source.test=null", "evaluate.tasks=[]")
    check("evaluate.split=train", "data.source.test=null")
    check("evaluate.source={name: emoji}", "data.source.test=null", "evaluate.every=2")


def test_a_source_that_cannot_train_is_refused_as_training_data(errors: Errors, check: Check) -> None:
    """Would catch a source without shards that passes `validate` and then cannot train."""
    only_scored = (
        "--set data.source: 'winoground' has no shards, so nothing can be trained on it; it is for evaluations: "
        "name it as `evaluate.source`, or as a task's `source`"
    )
    assert errors("data.source={name: winoground, root: f}") == [only_scored]
    check("evaluate.source={name: class_folder, test: f}")
    assert errors("data.source={name: webdataset, test: y.tar}") == [
        "--set data.source: data.source has no split 'train' (it has test); give it one to train on"
    ]


def test_a_source_of_an_evaluation_needs_no_training_shards(errors: Errors, check: Check) -> None:
    """Would catch `urls` that a task's own data must name though nothing is trained on it."""
    check("evaluate.source={name: webdataset, test: y.tar}", "data.source.test=null")
    recipe = check("evaluate.tasks=[{name: retrieval, source: {name: webdataset, test: {one: y.tar}}}]")
    assert recipe.evaluate.tasks[0].config.source is not None
    assert recipe.evaluate.tasks[0].config.source.build().sets("test")["one"][0].name == "y.tar"
    assert errors("evaluate.source={name: webdataset}") == [
        "--set evaluate.source: names no shards: give `urls` (to train on), `validation` or `test`"
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["augment.image.local_size=12"],
            "r.yaml:5: backbone.image: local views of 12 x 12 px are not whole patches of 8 px",
        ),
        (
            ["augment.image={name: random_crop, size: 20}"],
            "r.yaml:5: backbone.image: global views of 20 x 20 px are not whole patches of 8 px",
        ),
        (
            ["freeze=[backbone.txt]"],
            "--set freeze: freeze.0: 'backbone.txt' names no part of the model, did you mean 'backbone.text'?",
        ),
        (
            ["train.lr_factors={backbone.image.proj: 0.1, backbone.image.prj: 0.1}"],
            "--set train.lr_factors: train.lr_factors.backbone.image.prj: 'backbone.image.prj' names no part of the "
            "model, did you mean 'backbone.image.proj'?",
        ),
        (["freeze=[backbone, loss, fusion]"], "--set freeze: everything is frozen; leave something to train"),
        (
            ["train.device=gpu"],
            "--set train.device: 'gpu' is no device; take auto, cpu, cuda, or one of several as cuda:1",
        ),
        (
            ["train.device=meta"],
            "--set train.device: 'meta' is no device; take auto, cpu, cuda, or one of several as cuda:1",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_a_run_would_refuse_is_refused_at_once(errors: Errors, overrides: list[str], message: str) -> None:
    """Would catch each of these passing `validate`, and ending a run that data were read and a folder made for."""
    assert errors(*overrides) == [message]


def test_what_a_run_takes_is_not_refused(check: Check) -> None:
    """Would catch a check that is stricter than the run."""
    check("train={epochs: 2}")
    check("train={epochs: 2, steps: 3}")
    check("data.source={name: emoji}", "train={epochs: 2}", "evaluate.source={name: webdataset, test: y.tar}")
    check("train.device=cuda:3", "freeze=[backbone.image.transformer, loss]", "train.lr_factors={fusion: 0.5}")
    check("augment.image.local_size=24", "backbone.image.image_size=32")
    check("augment.image.local=0", "augment.image.local_size=12", "loss.1=null")


def test_the_best_checkpoints_score_is_one_that_the_tasks_give(
    check: Check, errors: Errors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a typing error that is noticed only after the first validation, and a score that is refused though
    a task may give it: one of a single set, and one of a task that cannot tell."""

    scored = ("data.source.validation=v.tar", "evaluate.every=5")

    def refused(best: str, *more: str) -> str:
        (line,) = errors(*scored, f"train.checkpoint.best={best}", *more)
        return line.removeprefix("--set train.checkpoint.best: ")

    of = [f"{side}/retrieval/{name}" for side in ("student", "teacher") for name in ("R@1", "R@5", "R@10", "M")]
    there = f"The means over sets: {', '.join(of)}"
    assert refused("student/retrieval/MM") == (
        f"no score 'student/retrieval/MM', did you mean 'student/retrieval/M'? {there}"
    )
    assert refused("zzz") == f"no score 'zzz'. {there}"
    assert refused("teacher/retrieval/M", "teacher=null", "loss.1=null").endswith("R@10, student/retrieval/M")
    assert refused("student/retrieval/M", "evaluate.tasks=null").endswith("There is no task in evaluate.tasks")
    assert refused("student/maps/x", "evaluate.tasks.1={name: attention_maps, id: maps}").endswith(there)
    assert refused("student/retrieval/R@10", "evaluate.tasks.0.ks=[1]").endswith("teacher/retrieval/M")
    for best in (*of, "student/retrieval/emoji/image_to_text/R@1"):
        check(*scored, f"train.checkpoint.best={best}")
    check(*scored, "train.checkpoint.best=student/other/M", recorded=True)  # a run that is scored on other tasks
    monkeypatch.setattr(Retrieval, "means", classmethod(lambda cls, config: None))
    check(*scored, "train.checkpoint.best=student/retrieval/anything")
    assert refused("student/x/M").endswith("The means over sets: student/retrieval/..., teacher/retrieval/...")


def test_options_of_a_wrong_type_hide_no_other_error(errors: Errors) -> None:
    """Would catch checks of sections that begin only when every option has its type; and what follows from a wrong
    option alone: a run has steps though they are no number."""
    assert errors(
        "train.steps=many", "evaluate.every=often", "evaluate.split=tset", "evaluate.batch_size=x", "freeze=[fussion]",
        "train.checkpoint.best=student/retrieval/M", "teacher.modalities=[image, text, audio]", "teacher.momentum=2",
    ) == [
        "--set train.steps: must be an integer, got 'many'",
        "--set evaluate.every: must be an integer, got 'often'",
        "--set evaluate.split: data.source has no split 'tset' (it has train, test); name one that it has, give it "
        "one, or leave out evaluate.tasks",
        "--set evaluate.batch_size: must be an integer, got 'x'",
        "--set freeze: freeze.0: 'fussion' names no part of the model, did you mean 'fusion'?",
        "--set teacher.modalities: no modality 'audio' (there are: image, text)",
        "--set teacher.momentum: must be at most 1, got 2",
    ]  # fmt: skip


def test_a_model_that_cannot_be_built_without_weights_is_checked_when_it_trains(registry: Registry) -> None:
    """Would catch a plugin's tower that reads weights when it is built, and is refused, or passed without a word."""

    class Reads(Backbone):
        name = "reads"

        def __init__(self, config: ComponentConfig) -> None:
            super().__init__(config)
            if torch.empty(0).is_meta:
                raise RuntimeError("no storage")

        @classmethod
        def spec(cls, config: ComponentConfig) -> BackboneSpec:
            return BackboneSpec(16, 16)

        @classmethod
        def collator(cls, config: ComponentConfig) -> Any:
            raise AssertionError("not for checking")

        def encode(self, x: Any, *, tokens: bool, token_mask: Any) -> Any:
            raise AssertionError("not for checking")

    class _Plugin:
        @staticmethod
        @hookimpl
        def distill_components() -> list[type]:
            return [Reads]

    more = Registry([*registry.entries.values(), *Registry.of(_Plugin).entries.values()])
    recipe = parse_recipe(
        BASE,
        "r.yaml",
        registry=more,
        overrides=[
            "backbone.image={name: reads}",
            "freeze=[backbone.image.body]",
            "stages=[{at: 0.5, set: {loss.0.weight: 0.5}}]",
        ],
    )
    why = "since the model cannot be built without memory: RuntimeError: no storage"
    assert recipe.warnings == (
        f"freeze, train.lr_factors, train.lr_decay: their paths are checked only when training starts, {why}",
        f"stages: whether weights fit is checked only when a stage begins, {why}",
    )


def test_a_fusion_that_no_loss_reads_is_warned_of(check: Check) -> None:
    """Would catch a study that swaps a fusion which nothing trains; and a warning where a loss pools with it."""
    warned = check("loss=[{name: contrastive}]", "teacher=null").warnings
    assert [line for line in warned if line.startswith("fusion: no loss of this recipe reads 'cross_attention'")]
    assert not [line for line in check().warnings if line.startswith("fusion")]
