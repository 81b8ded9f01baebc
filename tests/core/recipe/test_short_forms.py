"""null, bare names, ids and variables in a recipe."""

import pytest
from base_recipe import BASE, Check, Errors


@pytest.mark.parametrize("word", ["null", "none", "None", "~"])
def test_null_removes_nodes(check: Check, word: str) -> None:
    """Would catch `none` taken for the name of a component, and a removed node that is still built."""
    recipe = check(*(f"{path}={word}" for path in ("fusion", "loss.1", "teacher", "tracking", "evaluate")))
    assert (recipe.fusion, recipe.teacher, recipe.tracking) == (None, None, None)
    assert [node.id for node in recipe.loss] == ["contrastive"]
    assert list(recipe.evaluate.tasks) == []
    assert recipe.plan.teachers == {}


def test_removing_the_last_loss_is_refused(errors: Errors) -> None:
    assert "no loss is left" in errors("loss.0=null", "loss.1=null")[0]


def test_null_in_the_file_can_be_set_again(check: Check) -> None:
    """Would catch a section that `null` makes unreachable for --set."""
    text = BASE.replace("teacher: {momentum: 0.9}", "teacher: null").replace(
        "evaluate:\n  tasks: [retrieval]", "evaluate: none"
    )
    recipe = check("teacher.momentum=0.5", "evaluate.tasks.0=retrieval", text=text)
    assert recipe.teacher is not None
    assert recipe.teacher.config.momentum == 0.5
    assert [node.id for node in recipe.evaluate.tasks] == ["retrieval"]


def test_bare_names_take_options_of_overrides(check: Check) -> None:
    """`retrieval` is `{name: retrieval}`. Would catch "has no parts to set", in the file's names and in --set's own."""
    recipe = check("evaluate.tasks.retrieval.ks=[2]", "loss.2=clip", "loss.2.weight=0.5", "loss.clip.max_scale=50")
    assert recipe.evaluate.tasks[0].config.ks == (2,)
    assert (recipe.loss[2].config.weight, recipe.loss[2].config.max_scale) == (0.5, 50.0)


def test_a_text_option_is_not_taken_for_a_bare_name(errors: Errors) -> None:
    """Would catch `urls` (a text, or a mapping of sets) turning into a set called `name` under an override."""
    assert errors("data.source.urls.extra=y.tar") == [
        "--set data.source.urls.extra: data.source.urls has no parts to set"
    ]


def test_options_of_defaults_need_no_name(check: Check) -> None:
    """Would catch `--set train.optimizer.lr=1e-3` asking for the name that the recipe has by default."""
    recipe = check("train.optimizer.lr=1e-2", "train.schedule.warmup=3", "tracking.experiment=x")
    assert (recipe.train.optimizer.cls.name, recipe.train.optimizer.config.lr) == ("adamw", 1e-2)
    assert (recipe.train.schedule.source.cls.name, recipe.train.schedule.source.config.warmup) == ("warmup_cosine", 3)
    assert recipe.tracking is not None
    assert (recipe.tracking.cls.name, recipe.tracking.config.experiment) == ("aim", "x")


def test_a_bare_name_keeps_the_options_of_the_component_that_is_there(check: Check) -> None:
    """Would catch a swap of `fusion=cross_attention` that trains 8 heads where the recipe has 2, and optimisers too."""
    recipe = check("fusion=cross_attention", "train.optimizer.lr=0.01", "train.optimizer=adamw")
    assert (recipe.fusion.config.heads, recipe.train.optimizer.config.lr) == (2, 0.01)
    assert list(recipe.warnings) == []
    recipe = check("fusion.heads=4", "fusion=cross_attention")
    assert recipe.fusion.config.heads == 4
    assert check("fusion={name: cross_attention}").fusion.config.heads == 8


def test_another_component_has_its_own_defaults_and_that_is_said(check: Check) -> None:
    """Would catch options that are carried over, or dropped without a word where both components have them."""
    text = BASE.replace("{name: contrastive}", "{name: contrastive, weight: 0.5, temperature: 0.2}")
    recipe = check("fusion=gated", "loss.0=clip", text=text)
    assert (recipe.fusion.config.heads, recipe.loss[0].config.weight) == (8, 1.0)
    assert list(recipe.warnings) == [
        "--set fusion: 'gated' starts from its own defaults, without the recipe's heads: 2 of 'cross_attention'; "
        "write {name: gated, heads: 2} to give it the same",
        "--set loss.0: 'clip' starts from its own defaults, without the recipe's weight: 0.5, temperature: 0.2 of "
        "'contrastive'; write {name: clip, weight: 0.5, temperature: 0.2} to give it the same",
    ]
    said = " ".join(check("fusion=identity", "loss.1=null").warnings)
    assert "its own defaults" not in said, "it has no options"


def test_an_id_names_a_second_loss(check: Check) -> None:
    recipe = check("loss.2={name: contrastive, id: again}", "loss.again.weight=0.25")
    assert [(node.id, node.config.weight) for node in recipe.loss] == [
        ("contrastive", 1.0),
        ("cross_modal_distillation", 1.0),
        ("again", 0.25),
    ]


UNSET = "the environment variable DISTILL_TEST_UNSET is not set; set it, or give a value with --set"


def test_an_unset_variable_stops_a_run_and_warns_validate(
    check: Check, errors: Errors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch shards named `${CC3M}/...` being looked for, and a validate that needs the user's machine."""
    monkeypatch.delenv("DISTILL_TEST_UNSET", raising=False)
    text = BASE.replace("urls: x.tar", "urls: '${DISTILL_TEST_UNSET}/x.tar'")
    line = f"r.yaml:13: data.source.urls: {UNSET}"
    assert errors(text=text) == [line]
    assert list(check(text=text, allow_unset=True).warnings) == [line]
    assert check("data.source.urls=y.tar", text=text).data.source.config.urls == "y.tar"
    monkeypatch.setenv("DISTILL_TEST_UNSET", "/data")
    assert check(text=text).data.source.config.urls == "/data/x.tar"


def test_a_variable_may_be_a_number(check: Check, errors: Errors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a number of the environment that stays text, and one that is unset blamed on its type."""
    monkeypatch.setenv("DISTILL_TEST_N", "12")
    assert check("data.batch_size=${DISTILL_TEST_N}").data.batch_size == 12
    monkeypatch.delenv("DISTILL_TEST_UNSET", raising=False)
    line = f"--set data.batch_size: {UNSET}"
    assert errors("data.batch_size=${DISTILL_TEST_UNSET}") == [line]
    assert errors("data.batch_size=${DISTILL_TEST_UNSET}", allow_unset=True) == [line]


def test_a_variable_may_name_a_component(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_TEST_LOSS", "clip")
    assert [node.id for node in check("loss=['${DISTILL_TEST_LOSS}']").loss] == ["clip"]
