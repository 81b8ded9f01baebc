"""`distill eval`: scores a checkpoint, prints the scores and saves them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

import click

from distill_core.errors import UserError, counted, warn
from distill_core.evaluate.cache import EmbeddingCache, identities
from distill_core.evaluate.pictures import write_pictures
from distill_core.evaluate.run import EvaluationResult, evaluate
from distill_core.recipe.build import build_objective, models_of
from distill_core.recipe.resolve import Override
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run.assembly import prepare_process
from distill_core.run.checkpoint import Checkpoints, load_into
from distill_core.run.display import Scoring, print_scores
from distill_core.run.failures import failures_named
from distill_core.run.load import run_recipe
from distill_core.system import distributed
from distill_core.system.files import cannot_write, write_whole

SHOWN = 4
"""Approximate number of queries that `--pictures` draws for each task and side."""


@failures_named()
def score(
    run: str,
    registry: Registry,
    *,
    checkpoint: str = "last",
    split: str | None = None,
    tasks: Sequence[str] = (),
    overrides: Sequence[str] = (),
    full: bool = False,
    pictures: str | None = None,
    cache: bool = True,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Score a run (its folder, or a checkpoint's file in it), print the scores, and save them in RUN/evaluations.

    Raises `UserError` at the end if a task failed.
    """
    recipe = recipe_to_score(run, registry, checkpoint=checkpoint, split=split, tasks=tasks, overrides=overrides)
    folder, checkpoint = locate_checkpoint(run, checkpoint)
    device = prepare_process(recipe, workers=0)
    first = distributed.rank() == 0
    # by one rank, once: while the run still trains, other ranks might read another file of the same name
    loaded = distributed.raise_on_all_ranks(lambda: Checkpoints(folder).load(checkpoint) if first else None)
    saved = loaded and (loaded.path, loaded.digest, loaded.state["step"], loaded.state.get("stage", 0))
    file, digest, step, stage = distributed.gather_objects(saved)[0]
    recipe = recipe.of_stage(stage)
    objective = build_objective(recipe)

    def load() -> None:
        if loaded is not None:
            load_into(objective, loaded.whole()["objective"], str(folder))

    distributed.raise_on_all_ranks(load)
    objective.to(device)
    distributed.broadcast(objective)
    models = models_of(recipe, objective, device)
    source = (recipe.evaluate.source or recipe.data.source).build()
    if any(task.config.source is None for task in recipe.evaluate.tasks):
        source.prepare()
    embeddings = None
    if cache:
        identify = identities(recipe.to_dict(), models, file.name, digest)
        embeddings = EmbeddingCache(folder / "embeddings", identify, warn)
    with Scoring(quiet=quiet or as_json or not first) as display:
        evaluated = evaluate(
            recipe,
            models,
            source,
            recipe.evaluate.split,
            display.doing,
            SHOWN if pictures and first else 0,
            cache=embeddings,
            watch=display.watch,
        )
    distributed.stop()
    if first:
        _print_results(folder, recipe, evaluated, step, checkpoint, full, pictures, as_json, overrides)


def locate_checkpoint(run: str, checkpoint: str) -> tuple[Path, str]:
    """The run folder and the checkpoint's name, from a folder or a file RUN/checkpoints/NAME.pt. Raises `UserError`."""
    path = Path(run)
    if path.suffix != ".pt":
        return path, checkpoint
    if checkpoint != "last":
        raise UserError(f"{run}: is already a checkpoint; omit --checkpoint")
    if path.parent.name != "checkpoints":
        raise UserError(f"{run}: a checkpoint is scored with its run's recipe: name it as RUN/checkpoints/{path.name}")
    name = path.stem.removeprefix("step-")
    return path.parent.parent, str(int(name)) if name.isdecimal() else name


def recipe_to_score(
    run: str,
    registry: Registry,
    *,
    checkpoint: str = "last",
    split: str | None = None,
    tasks: Sequence[str] = (),
    overrides: Sequence[str] = (),
    **others: object,
) -> Recipe:
    """The run's recipe with what the options of `score` change in it. Raises `UserError`."""
    folder, _ = locate_checkpoint(run, checkpoint)
    changes: list[Override] = [*overrides]
    if split:
        changes.append((f"evaluate.split={split}", "--split"))
    if tasks:
        by_id = {node.id: node for node in run_recipe(folder, registry, overrides).evaluate.tasks}
        chosen = [json.dumps(by_id[task].dump()) if task in by_id else task for task in tasks]
        changes.append((f"evaluate.tasks=[{', '.join(chosen)}]", "--task"))
    return run_recipe(folder, registry, changes)


def _print_results(
    folder: Path,
    recipe: Recipe,
    evaluated: EvaluationResult,
    step: int,
    checkpoint: str,
    full: bool,
    pictures: str | None,
    as_json: bool,
    overrides: Sequence[str],
) -> None:
    split, lines = recipe.evaluate.split, []
    file = _save(folder, recipe, evaluated, step, overrides) if evaluated.scores else ""
    if pictures:
        files = write_pictures(Path(pictures), evaluated.media)
        lines.append(f"{counted(len(files), 'picture')}: {pictures}")
        if evaluated.no_media is not None:
            warn(f"not all pictures could be made: {type(evaluated.no_media).__name__}: {evaluated.no_media}")
    if as_json:
        click.echo(json.dumps([asdict(score) for score in evaluated.scores], indent=1))
    elif evaluated.scores:
        title = f"{folder.name} ({checkpoint}) on {split}"
        print_scores(evaluated.scores, title, lines, notes=evaluated.notes, file=file, full=full)
    for line in evaluated.warnings:
        warn(line)
    for skipped in evaluated.skipped[:5]:
        warn(f"not scored: {skipped.key!r} of {skipped.url}: {skipped.reason}")
    if len(evaluated.skipped) > 5:
        warn(f"not scored: {counted(len(evaluated.skipped) - 5, 'more item', 'more items')}")
    if evaluated.failed or not recipe.evaluate.tasks:
        raise UserError("\n".join(evaluated.failed) or "nothing to score: the recipe has no task in `evaluate`")


def _save(folder: Path, recipe: Recipe, evaluated: EvaluationResult, step: int, overrides: Sequence[str]) -> str:
    """Scores, tasks and skipped samples as RUN/evaluations/STEP-SPLIT-DIGEST.json; a repeated one replaces its file.

    The digest is that of the whole recipe with its overrides: each may change what is scored, or how.
    """
    tasks = [{**node.dump(), "id": node.id} for node in recipe.evaluate.tasks]
    document = {
        "step": step,
        "split": recipe.evaluate.split,
        "tasks": tasks,
        "overrides": list(overrides),
        "scores": [asdict(score) for score in evaluated.scores],
        "notes": evaluated.notes,
        "failed": evaluated.failed,
        "skipped": [{"key": sample.key, "url": sample.url, "reason": sample.reason} for sample in evaluated.skipped],
    }
    digest = blake2b(json.dumps([tasks, recipe.to_dict()]).encode(), digest_size=4).hexdigest()
    path = folder / "evaluations" / f"{step:08d}-{recipe.evaluate.split}-{digest}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(document, indent=1))
    except OSError as error:  # a run folder of somebody else's can be scored all the same
        warn(f"{cannot_write(path, error)}: scores are not saved")
        return "not saved"
    return str(path)
