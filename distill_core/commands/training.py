"""`distill run`, `distill resume` and `distill_core.fit`: the run's folder, the trainer, and what is printed at the
end."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from distill_core.commands.options import slurm_parameters
from distill_core.errors import UserError, counted, warn
from distill_core.recipe.resolve import load_recipe, parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run import caches
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.display import per_second, print_scores
from distill_core.run.failures import failures_named
from distill_core.run.folder import RunFolder, read_report
from distill_core.run.load import run_recipe
from distill_core.system import distributed
from distill_core.system.jobs import RankTask, Slurm
from distill_core.system.process import resolve_device
from distill_core.train import Callback, Result, Trainer


@failures_named()
def run(recipe: Recipe, runs: Path, registry: Registry, *, quiet: bool) -> None:
    """Train in a new folder of `runs`, or in the one of an earlier attempt of the same launch."""
    result = _run(recipe, runs, registry, quiet=quiet)
    if result is not None:
        _finish(result)


@failures_named()
def fit(
    recipe: str | Path | Recipe,
    overrides: Sequence[str],
    runs: Path,
    callbacks: Sequence[Callback],
    *,
    quiet: bool,
) -> Result:
    """See `distill_core.fit`."""
    registry = Registry.discover()
    loaded = _read(recipe, overrides, registry)
    for warning in loaded.warnings if os.environ.get("RANK", "0") == "0" else ():
        warn(warning)
    result = _run(loaded, runs, registry, quiet=quiet, callbacks=callbacks)
    if result is None:
        raise UserError("torchrun has restarted a run that is finished and scored: read its report.json")
    rank = distributed.rank()
    _leave(result)
    if result.signal is None and rank == 0 and not quiet:
        _print(result)
    return result


def _read(recipe: str | Path | Recipe, overrides: Sequence[str], registry: Registry) -> Recipe:
    if isinstance(recipe, Recipe):
        return parse_recipe(recipe.to_yaml(), recipe.name, registry=registry, overrides=overrides)
    if isinstance(recipe, str) and "\n" in recipe:
        return parse_recipe(recipe, "recipe", registry=registry, overrides=overrides)
    return load_recipe(recipe, registry=registry, overrides=overrides)


def _run(
    recipe: Recipe, runs: Path, registry: Registry, *, quiet: bool, callbacks: Sequence[Callback] = ()
) -> Result | None:
    """None where an earlier attempt of the launch has finished and scored the run."""
    distributed.start(resolve_device(recipe.train.device))
    previous = new = None
    if distributed.rank() == 0:
        launch = distributed.launch()
        if launch is not None and distributed.restarted():
            previous = RunFolder.of_launch(runs, recipe, launch)
        if previous is None:
            new = RunFolder.create(runs, recipe, launch)
    saved = previous is not None and bool(Checkpoints(previous.path).steps())
    if previous is not None:
        click.echo(f"{previous.path}: restarted by torchrun, so this run is continued", err=True)
        if not saved:
            previous.rewind(0, 0)
    # one folder for all ranks
    own = previous or new
    path, saved = distributed.gather_objects((own and own.path, saved))[0]
    folder = own or RunFolder(path)
    if saved:
        return _resume(path, "last", registry, quiet=quiet, callbacks=callbacks)
    if new is not None and new.path.name != recipe.name:
        click.echo(f"{runs / recipe.name} exists; this run is {new.path}", err=True)
    trainer = None
    try:
        trainer = Trainer(recipe, folder, quiet=quiet, callbacks=callbacks)
        return trainer.run()
    except BaseException:
        if new is not None and (trainer is None or trainer.state.step == 0):
            _remove_empty(new.path)
        raise


@failures_named()
def resume(folder: Path, checkpoint: str, registry: Registry, *, quiet: bool) -> None:
    """Continue a run; one that is finished and scored is left unchanged."""
    result = _resume(folder, checkpoint, registry, quiet=quiet)
    if result is not None:
        _finish(result)


def _resume(
    folder: Path, checkpoint: str, registry: Registry, *, quiet: bool, callbacks: Sequence[Callback] = ()
) -> Result | None:
    recipe = run_recipe(folder, registry)
    report = read_report(folder)
    # otherwise it continues: a task failed, the recipe asks for more steps by now, or the last checkpoint is gone
    if checkpoint == "last" and report is not None and not report.get("failed") and _is_complete(recipe, report):
        steps: int = report["steps"]
        if Checkpoints(folder).steps()[-1:] == [steps]:
            if os.environ.get("RANK", "0") == "0":
                scored = f"finished at step {steps}; its scores: {folder / 'report.json'}"
                click.echo(f"{folder}: {scored}. Score it again with: distill eval {folder}", err=True)
            return None
    distributed.start(resolve_device(recipe.train.device))
    run = RunFolder(folder)
    # a run that was stopped before its first checkpoint begins again
    begins = distributed.on_first_rank(lambda: checkpoint == "last" and not _is_saved(folder) and _begin(run))
    trainer = Trainer(recipe, run, resume=None if begins else checkpoint, quiet=quiet, callbacks=callbacks)
    return trainer.run()


def _is_complete(recipe: Recipe, report: Mapping[str, Any]) -> bool:
    """Whether the recipe asks for the steps that a report is of."""
    if recipe.train.steps is not None:
        return bool(recipe.train.steps == report["steps"])
    return bool(recipe.train.epochs == report.get("epochs", recipe.train.epochs))


def _is_saved(folder: Path) -> bool:
    checkpoints = Checkpoints(folder)
    return bool(checkpoints.steps()) or checkpoints.best.exists()


def _begin(run: RunFolder) -> bool:
    """Delete the rows of a run without a checkpoint, which it will write again."""
    run.lock()  # another process may be about to save its first checkpoint
    try:
        if run.metrics.exists():
            click.echo(f"{run.path}: has no checkpoint, so the run starts from its first step", err=True)
        run.rewind(0, 0)
    finally:
        run.unlock()
    return True


def submit(folder: Path, options: Sequence[str], nproc: int | None, *, quiet: bool) -> None:
    """Submit a SLURM job that starts or continues the run in `folder`, with `nproc` ranks on each of its machines."""
    parameters = slurm_parameters(options)
    if nproc is not None:
        parameters["tasks_per_node"] = nproc
    files = folder.absolute() / "slurm"
    command = ["resume", str(folder.absolute()), *(["--quiet"] if quiet else [])]
    job = Slurm(files, parameters).submit(RankTask(command))
    click.echo(f"job {job.job_id}: {folder}; its output: {folder}/slurm/{job.job_id}_*_log.*", err=True)


def submit_new(recipe: Recipe, runs: Path, options: Sequence[str], nproc: int | None, *, quiet: bool) -> None:
    """The same for a new folder of `runs`."""
    folder = RunFolder.create(runs, recipe).path
    try:
        submit(folder, options, nproc, quiet=quiet)
    except UserError:
        shutil.rmtree(folder)
        raise


@failures_named()
def teach(recipe: Recipe, passes: int | None, *, quiet: bool) -> None:
    """Write the caches of a recipe's teachers."""
    written = caches.write(recipe, passes, quiet=quiet)
    rank = distributed.rank()
    distributed.stop()
    for line in written if rank == 0 else ():
        click.echo(line)


def _remove_empty(folder: Path) -> None:
    """Remove the folder of a run that has not made its first step; one with a checkpoint is kept."""
    if not any((folder / "checkpoints").glob("*.pt")):
        shutil.rmtree(folder, ignore_errors=True)


def _leave(result: Result) -> None:
    """Leave the other ranks."""
    if result.signal is None:
        distributed.barrier()  # a rank that left while rank 0 was still writing was seen to abort
    distributed.stop()


def _finish(result: Result) -> None:
    rank = distributed.rank()
    _leave(result)
    if result.signal is not None:
        sys.exit(128 + result.signal)
    if rank == 0:
        _print(result)
        if result.unsaved is not None:
            raise UserError(f"{result.unsaved}. Make room, then: distill resume {result.folder}")
        if result.failed:
            raise UserError(
                f"{len(result.failed)} evaluation task(s) failed, as warned above. The run is complete; score it again "
                f"with distill eval {result.folder} --set evaluate.tasks=..."
            )


def _print(result: Result) -> None:
    """The table of scores, and what was counted."""
    report = json.loads((result.folder / "report.json").read_text())
    lines = [
        f"{counted(report['steps'], 'step')}, {counted(report['samples'], 'sample')} in {report['seconds']:.0f} s "
        f"of training ({per_second(report['samples_per_s'] or 0)})",
    ]
    if len(report["samples_by_set"]) > 1:
        lines.append("samples by set: " + ", ".join(f"{name} {n}" for name, n in report["samples_by_set"].items()))
    if report["absences"]:
        lines.append("samples without: " + ", ".join(f"{name} {n}" for name, n in report["absences"].items()))
    if report["skipped_reads"]:
        shards = f" and {counted(report['skipped_shards'], 'shard')}" if report["skipped_shards"] else ""
        lines.append(
            f"skipped: {counted(report['skipped_samples'], 'sample')}{shards} that could not be used, "
            f"{counted(report['skipped_reads'], 'time')} over all passes; keys: {result.folder / 'skipped.jsonl'}"
        )
    if report["skipped_steps"]:
        steps = counted(report["skipped_steps"], "step")
        lines.append(f"skipped: {steps} not finite; see {result.folder / 'metrics.jsonl'}")
    lines.append(f"picture: {result.folder / 'report.png'}")
    file = str(result.folder / "report.json")
    print_scores(result.scores, f"{report['name']} on {report['split']}", lines, notes=report["notes"], file=file)
