"""The end of a study: its table, its files, and its summary for the tracker."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from distill_core import TrackerConfig
from distill_core.tools import TrackerThread, environment, warn
from distill_study.picture import draw
from distill_study.plan import Run, StudyPlan
from distill_study.table import (
    Group,
    RunResult,
    StudyTable,
    as_json,
    as_latex,
    as_markdown,
    default_scores,
    unknown_scores,
)


def study_table(plan: StudyPlan, folder: Path, runs: Sequence[Run]) -> StudyTable:
    """The table of the finished runs; warns of scores that none of them has."""
    groups = []
    for variant in plan.variants:
        variant_runs = [run for run in runs if run.variant is variant]
        variant_results = [RunResult.read(folder / run.name, run.seed) for run in variant_runs]
        results = tuple(result for result in variant_results if result is not None)
        groups.append(Group(variant.name, variant.label, results, len(plan.study.seeds)))
    all_results = [run for group in groups for run in group.runs]
    scores = list(plan.study.scores) or default_scores(all_results)
    if all_results:
        for score, line in unknown_scores(scores, all_results).items():
            warn(f"scores: {line}")
            scores.remove(score)
    return StudyTable.of(plan.study.name, groups, plan.study.base, scores)


def write_files(table: StudyTable, folder: Path) -> list[Path]:
    """table.md, table.tex, table.json and study.png in the study's folder."""
    texts = {
        "table.md": as_markdown(table),
        "table.tex": as_latex(table),
        "table.json": json.dumps(as_json(table), indent=1),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    draw(table, folder / "study.png")
    return [folder / name for name in (*texts, "study.png")]


def publish(plan: StudyPlan, table: StudyTable, folder: Path) -> None:
    """Send the base recipe's tracker a summary run: means and spreads, with the variant as context, and the picture.

    The study's runs have study, variant and seed in their tags. The environment of the summary names no device: the
    runs may have been trained on other machines.
    """
    recipe = plan.recipes[plan.study.base]
    if recipe.tracking is None:
        return
    summary_folder = folder / "summary"
    summary_folder.mkdir(exist_ok=True)
    tracker = TrackerThread(recipe.tracking.build(), warn)
    tags = {"study": plan.study.name}
    tracker.call(
        "start", str(summary_folder), plan.study.name, {**recipe.to_dict(), "name": plan.study.name, "tags": tags}, True
    )
    packages = [slot.package for variant_recipe in plan.recipes.values() for slot in variant_recipe.slots()]
    options = recipe.tracking.config
    tags_of_tracker = options.tags if isinstance(options, TrackerConfig) else ()
    tracker.call("describe", environment(None, packages), list(dict.fromkeys(["study", *tags_of_tracker])))
    for group in table.groups:
        values = {}
        for score, cell in table.cells[group.name].items():
            if cell.summary is not None:
                values[score] = cell.summary.mean
                if cell.summary.std is not None:
                    values[f"{score}/std"] = cell.summary.std
        tracker.call("log", 0, values, {**tags, "variant": group.name, "subset": "study"})
    context = {**tags, "subset": "study"}
    tracker.call("image", 0, "study", str(folder / "study.png"), plan.study.name, context)
    tracker.finish()
