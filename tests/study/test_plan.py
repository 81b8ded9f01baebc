"""All recipes of a study are checked at once, and each run gets its own."""

from pathlib import Path

import pytest

from distill_core.errors import RecipeErrors
from distill_core.recipe.document import read_document
from distill_core.registry import Registry
from distill_study.grammar import make_study
from distill_study.plan import StudyPlan, check_study

HEAD = "recipe: tiny.yaml\n"


def plan(text: str, folder: Path, registry: Registry) -> StudyPlan:
    return check_study(make_study(read_document(HEAD + text, "s.yaml"), folder, "s"), registry)


def errors(text: str, folder: Path, registry: Registry) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        plan(text, folder, registry)
    return caught.value.lines


def test_each_run_has_its_variant_seed_and_tags(tiny_recipe: Path, tmp_path: Path, registry: Registry) -> None:
    tiny_recipe.write_text(tiny_recipe.read_text() + "tags: {project: birds}\n")
    made = plan(
        "seeds: [5, 6]\nset: {data.batch_size: 3}\nbudget: {samples: 13}\n"
        "variants:\n  all: {}\n  less: {loss.1: null, fusion: null, teacher: null, data.batch_size: 4}\n",
        tmp_path,
        registry,
    )
    runs = made.runs()
    assert [run.name for run in runs] == ["all-seed5", "less-seed5", "all-seed6", "less-seed6"]
    assert [run.recipe.seed for run in runs] == [5, 5, 6, 6]
    assert [run.recipe.train.steps for run in runs] == [4, 3, 4, 3]  # 13 samples in batches of 3, and of 4
    assert [len(run.recipe.loss) for run in runs] == [2, 1, 2, 1]
    assert runs[3].recipe.tags == {"project": "birds", "study": "s", "variant": "less", "seed": 6}
    assert runs[3].recipe.name == "less-seed6"
    assert [run.recipe.train.steps for run in made.runs({"all": 7, "less": 9})] == [7, 9, 7, 9]


def test_errors_of_all_variants_name_them(tiny_recipe: Path, tmp_path: Path, registry: Registry) -> None:
    found = errors(
        "set:\n  train.clip_grad: -1\n"
        "variants:\n"
        "  good: {}\n"
        "  unfused: {fusion: null}\n"
        "  typo:\n"
        "    loss.1.wieght: 2\n"
        "  gone: {recipe: nowhere.yaml}\n",
        tmp_path,
        registry,
    )
    assert len(found) == 4
    assert "s.yaml:3: variants 'good', 'unfused', 'typo': train.clip_grad: must be greater than 0" in found[0]
    assert found[1].startswith(f"s.yaml:6: variant 'unfused': {tiny_recipe}:")
    assert found[1].endswith("loss.1: 'cross_modal_distillation' needs fused views; this recipe has no fusion")
    assert found[2] == "s.yaml:8: variant 'typo': loss.1.wieght: unknown option 'wieght', did you mean 'weight'?"
    assert found[3].startswith("s.yaml:9: variant 'gone': ")
    assert found[3].endswith("nowhere.yaml: no such recipe (there are: tiny.yaml)")


def test_an_error_that_all_have_is_said_once(tiny_recipe: Path, tmp_path: Path, registry: Registry) -> None:
    found = errors("set: {fusion.heads: x}\nvariants: {a: {}, b: {loss.1.weight: 2}}\n", tmp_path, registry)
    heads = [line for line in found if "heads" in line]
    assert heads == ["s.yaml:2: all variants: fusion.heads: must be an integer, got 'x'"]


def test_the_same_recipe_twice_is_an_error(tiny_recipe: Path, tmp_path: Path, registry: Registry) -> None:
    found = errors("variants:\n  a: {}\n  b: {loss.1.weight: 1}\n", tmp_path, registry)
    assert found == ["s.yaml:4: variant 'b': the same recipe as variant 'a'"]


def test_a_swap_that_the_recipe_has_is_not_run_twice(tiny_recipe: Path, tmp_path: Path, registry: Registry) -> None:
    made = plan("swaps: {fusion.heads: [1, 2, 4]}\ndesign: one_at_a_time\n", tmp_path, registry)
    assert [variant.name for variant in made.variants] == ["base", "fusion.heads-1", "fusion.heads-4"]
    assert made.warnings == ["'fusion.heads=2' is the unchanged recipe; it is not run a second time"]


def test_a_swap_to_the_recipes_own_component_keeps_its_options(
    tiny_recipe: Path, tmp_path: Path, registry: Registry
) -> None:
    """Would catch a variant named after the recipe's fusion that trains another number of heads."""
    made = plan("swaps: {fusion: [cross_attention, gated]}\n", tmp_path, registry)
    fusions = [made.recipes[variant.name].fusion for variant in made.variants]
    assert [fusion.config.heads for fusion in fusions if fusion is not None] == [2, 8]
    assert len(made.warnings) == 1
    assert "'gated' starts from its own defaults, without the recipe's heads: 2" in made.warnings[0]
    made = plan("swaps: {fusion: [cross_attention]}\ndesign: one_at_a_time\n", tmp_path, registry)
    assert [variant.name for variant in made.variants] == ["base"]


def test_scores_that_no_task_gives(tiny_recipe: Path, tmp_path: Path, registry: Registry) -> None:
    found = errors(
        "scores: [student/retrieval/M, teacher/retrival/M, M, pupil/retrieval/M]\nvariants: {a: {}}\n",
        tmp_path,
        registry,
    )
    assert found == [
        "s.yaml:2: scores.1: no variant has a task 'retrival', did you mean 'retrieval'?",
        "s.yaml:2: scores.2: a score is SIDE/TASK/NAME with student or teacher as side, got 'M'",
        "s.yaml:2: scores.3: a score is SIDE/TASK/NAME with student or teacher as side, got 'pupil/retrieval/M'",
    ]


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "recipes" / "studies").glob("*.yaml")))
def test_the_studies_that_come_with_distill_are_good(file: Path, registry: Registry) -> None:
    study = make_study(read_document(file.read_text(encoding="utf-8"), str(file)), file.parent, file.stem)
    made = check_study(study, registry)
    assert made.warnings == []
    assert len(made.runs()) == len(study.variants) * len(study.seeds)


def test_lengths_that_differ_without_a_budget_are_said(tiny_recipe: Path, tmp_path: Path, registry: Registry) -> None:
    made = plan("variants: {a: {}, b: {train.steps: 9}}\n", tmp_path, registry)
    assert len(made.warnings) == 1
    assert "no `budget`" in made.warnings[0]
    assert plan("budget: {steps: 9}\nvariants: {a: {}, b: {fusion.heads: 4}}\n", tmp_path, registry).warnings == []
