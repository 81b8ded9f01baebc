"""`distill ablate` and `distill compare`. Nothing heavy is imported until one runs."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill_core import UserError, counted
from distill_core.tools import (
    RecipeErrors,
    TrainingStopped,
    completion,
    slurm_option,
    slurm_parameters,
    without_option,
)

if TYPE_CHECKING:
    from distill_study.compare import Comparison
    from distill_study.grammar import Study
    from distill_study.plan import StudyPlan
    from distill_study.run import Outcome


@click.command()
@click.argument("target", metavar="STUDY.yaml|RECIPE", shell_complete=completion.recipes)
@click.option(
    "--swap",
    "swaps",
    multiple=True,
    metavar="PATH=A,B",
    help="With a RECIPE: values to try, as fusion=none,x. Repeatable.",
)
@click.option("--design", type=click.Choice(["grid", "one_at_a_time"]), help="How swaps are combined.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change all variants. Repeatable.",
    shell_complete=completion.set_paths,
)
@click.option("--seeds", metavar="0,1,2", help="Train each variant once with each seed.")
@click.option("--budget", metavar="KIND=N", help="steps=N, samples=N or seconds=N: the length of all runs.")
@click.option("--base", help="The variant that others are compared with.")
@click.option("--score", "scores", multiple=True, help="A score for the table, as student/retrieval/M. Repeatable.")
@click.option("--name", help="The study's folder in --runs.")
@click.option("--runs", default="runs", show_default=True, help="Folder in which the study's folder is created.")
@click.option("--jobs", type=click.IntRange(min=1), help="Runs at the same time; by default 1, with --slurm all.")
@slurm_option
@click.option("--retry", is_flag=True, help="Retry runs that failed before.")
@click.option("--check", is_flag=True, help="Check and list all variants; train nothing.")
@click.option("--quiet", is_flag=True, help="Print only warnings and the final table.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON; with --check the variants.")
@without_option
def ablate(
    target: str,
    swaps: tuple[str, ...],
    design: str | None,
    overrides: tuple[str, ...],
    seeds: str | None,
    budget: str | None,
    base: str | None,
    scores: tuple[str, ...],
    name: str | None,
    runs: str,
    jobs: int | None,
    slurm: tuple[str, ...],
    retry: bool,
    check: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train variants of a recipe with several seeds, and print a table of what they change.

    All variants are checked before the first starts. Running the same command again continues a stopped study.
    """
    from distill_study.grammar import option_values

    settings: dict[str, Any] = {"design": design, "base": base, "name": name, "scores": list(scores) or None}
    settings["seeds"] = option_values(seeds, "--seeds") if seeds is not None else None
    if budget is not None:
        kind, _, amount = budget.partition("=")
        settings["budget"] = {kind.strip(): option_values(amount, "--budget")[0]}
    study = _study(target, swaps, settings, overrides)
    from distill_core.tools import Registry
    from distill_study.plan import check_study

    registry = Registry.discover()
    plan = check_study(study, registry, allow_unset=check)
    for warning in plan.warnings:
        click.echo(f"warning: {warning}", err=True)
    if check:
        _print_variants(plan, as_json)
        return
    folder = Path(runs) / study.name
    from distill_core.tools import Slurm
    from distill_study.launch import Local, SlurmJobs
    from distill_study.live import StudyDisplay
    from distill_study.run import StudyRunner

    run_count = len(plan.variants) * len(study.seeds)
    launcher = SlurmJobs(Slurm(folder / "slurm", slurm_parameters(slurm))) if slurm else Local()
    display = StudyDisplay(f"{study.name}: {counted(run_count, 'run')}", folder, study.scores, quiet=quiet or as_json)
    at_once = jobs or (run_count if slurm else 1)
    runner = StudyRunner(plan, folder, launcher, registry, display, jobs=at_once, retry=retry)
    _print_outcome(plan, folder, runner.run(), as_json)


def _study(target: str, swaps: Sequence[str], settings: dict[str, Any], overrides: Sequence[str]) -> Study:
    """The study of a file, or of a recipe and its swaps; options of the command line take precedence."""
    from distill_core.tools import recipe_file
    from distill_study.grammar import make_study, read_study_document, swaps_document

    file = recipe_file(target)
    document = read_study_document(file)
    is_study = "recipe" in document.data
    if swaps and is_study:
        raise UserError(f"{target}: is a study; --swap is for recipes. Write the swap in its `swaps`.")
    if not swaps and not is_study and {"backbone", "loss"} & document.data.keys():
        raise UserError(f"{target}: is a recipe; say what to try with --swap PATH=A,B, or write a study file")
    if swaps:
        document = swaps_document(target, swaps)
    for key, value in settings.items():
        if value is not None:
            document.data[key] = value
            for path in [path for path in document.origins if path[0] == key]:
                del document.origins[path]
            document.origins[key,] = "--score" if key == "scores" else f"--{key}"
    folder = Path() if swaps else file.parent
    return make_study(document, folder, file.stem + ("-swaps" if swaps else ""), overrides)


def _print_variants(plan: StudyPlan, as_json: bool) -> None:
    """Print the variants, for --check."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    study = plan.study
    seconds = study.budget.seconds if study.budget is not None else None
    rows: list[dict[str, Any]] = []
    for variant in plan.variants:
        train = plan.recipes[variant.name].train
        length = (
            {"seconds": seconds} if seconds else {"steps": train.steps} if train.steps else {"epochs": train.epochs}
        )
        changes = [change for change, _ in variant.changes]
        rows.append(
            {"name": variant.name, "label": variant.label, "recipe": variant.recipe, **length, "changes": changes}
        )
    if as_json:
        about = {"name": study.name, "base": study.base, "seeds": list(study.seeds), "scores": list(study.scores)}
        click.echo(json.dumps({**about, "variants": rows}, indent=1))
        return
    title = f"{study.name}: {counted(len(rows), 'variant')}, {counted(len(study.seeds), 'seed')}"
    table = Table(title=title, title_justify="left")
    for head in ("variant", "recipe", "steps", "changes"):
        table.add_column(head, overflow="fold")
    for row in rows:
        steps = "timed" if seconds else str(row["steps"]) if "steps" in row else f"{row['epochs']} epochs"
        label = row["label"] + (" (base)" if row["name"] == study.base else "")
        table.add_row(*map(escape, (label, Path(row["recipe"]).name, steps, "\n".join(row["changes"]))))
    Console().print(table)


def _print_outcome(plan: StudyPlan, folder: Path, outcome: Outcome, as_json: bool) -> None:
    """Print the table of finished runs, the files, and how to continue."""
    from rich.console import Console

    from distill_study.outcome import publish, study_table, write_files

    table = study_table(plan, folder, outcome.runs)
    finished = sum(len(group.runs) for group in table.groups)
    command = shlex.join(["distill", *sys.argv[1:]])
    if finished and as_json:
        from distill_study.table import as_json as table_json

        write_files(table, folder)
        click.echo(json.dumps(table_json(table), indent=1))
    elif finished:
        from distill_study.table import as_rich

        console = Console()
        console.print(as_rich(table))
        for line in table.notes():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        files = write_files(table, folder)
        console.print(f"written: {', '.join(map(str, files))}", highlight=False, markup=False, soft_wrap=True)
    if outcome.signal is not None:
        click.echo(f"stopped: {finished} of {len(outcome.runs)} runs are done. Continue with: {command}", err=True)
        sys.exit(128 + outcome.signal)
    if finished:
        publish(plan, table, folder)
    lines = [f"{name}: {why}" for name, why in outcome.failed.items()]
    if lines:
        lines.append(f"{len(outcome.failed)} run(s) failed; retry them with: {command} --retry")
    if outcome.stopped:
        lines.append(
            f"{len(outcome.stopped)} run(s) were stopped: {', '.join(outcome.stopped)}. Continue with: {command}"
        )
    if lines:
        raise TrainingStopped("\n".join(lines))


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN ...", shell_complete=completion.run_folders)
@click.option("--score", "scores", multiple=True, help="A score to show, as student/retrieval/M. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@without_option
def compare(runs: tuple[str, ...], scores: tuple[str, ...], as_json: bool) -> None:
    """Show how the recipes of runs differ, and their scores, side by side.

    Runs that differ only in their seed share a column (mean, spread). Differences are relative to the first column.
    """
    from distill_core.tools import Registry
    from distill_study.compare import compare as compare_runs

    repeated = sorted({run for run in runs if [Path(r).resolve() for r in runs].count(Path(run).resolve()) > 1})
    if repeated:
        raise RecipeErrors([f"{run}: given twice" for run in repeated])
    comparison = compare_runs([Path(run) for run in runs], Registry.discover(), scores)
    for folder in comparison.unfinished:
        click.echo(f"warning: {folder}: not finished, so it has no scores (distill resume {folder})", err=True)
    if as_json:
        from distill_study.table import as_json as table_json

        click.echo(json.dumps({"differences": comparison.differences, **table_json(comparison.table)}, indent=1))
    else:
        _print_comparison(comparison)


def _print_comparison(comparison: Comparison) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, groups = Console(), comparison.table.groups

    def sheet(title: str, first: str, *, justify: Any) -> Table:
        table = Table(title=title, title_justify="left")
        table.add_column(first, overflow="fold")
        for group in groups:
            table.add_column(escape(group.label), justify=justify, overflow="fold")
        return table

    if len(groups) > 1:
        table = sheet("recipes: what differs", "path", justify="left")
        for path, values in comparison.differences.items():
            table.add_row(path, *map(escape, values))
        console.print(table if comparison.differences else "the recipes are the same")
    table = sheet("runs", "", justify="right")
    seeds = [", ".join(str(run.seed) for run in group.runs) for group in groups]
    for word, values in (("seeds", seeds), *_lengths(groups)):
        table.add_row(word, *values)
    table.add_section()
    for score in comparison.table.scores:
        cells = [comparison.table.cells[group.name][score] for group in groups]
        table.add_row(score, *(" ".join(filter(None, (cell.mean(), escape(cell.change())))) for cell in cells))
    console.print(table)
    for line in comparison.table.notes():
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _lengths(groups: Sequence[Any]) -> list[tuple[str, list[str]]]:
    rows = []
    for word, name in (
        ("steps", "steps"),
        ("samples", "samples"),
        ("training s", "seconds"),
        ("parameters", "parameters"),
    ):
        values = [sorted({f"{getattr(run, name):.0f}" for run in group.runs}) for group in groups]
        rows.append((word, [", ".join(value) for value in values]))
    return rows
