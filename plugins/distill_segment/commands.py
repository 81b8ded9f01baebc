"""`distill segment`. Nothing heavy is imported until it runs."""

from __future__ import annotations

from itertools import count, islice
from pathlib import Path

import click

from distill_core.tools import completion


@click.command()
@click.argument("run", shell_complete=completion.run_folders)
@click.argument("pictures", nargs=-1, type=click.Path())
@click.option("--out", required=True, help="Folder for the overlays, NAME-classes.png.")
@click.option("--task", default="{name: segmentation}", show_default=True, help="The task, written as in a recipe.")
@click.option("--split", default="test", show_default=True, help="Split to read, if the task has a source.")
@click.option(
    "--limit", default=8, show_default=True, type=click.IntRange(1), help="Maximum number of samples from the source."
)
@click.option("--teacher", is_flag=True, help="Use the teacher.")
@click.option("--checkpoint", default="last", show_default=True, help="`last`, `best`, or a step.")
def segment(
    run: str,
    pictures: tuple[str, ...],
    out: str,
    task: str,
    split: str,
    limit: int,
    teacher: bool,
    checkpoint: str,
) -> None:
    """Segment PICTURES, or samples of the task's source, with a run's model, and write the classes as overlays.

    --task '{name: segmentation, classes: FILE}' names the classes, one a line; with a `source`, the truth is drawn too.
    """
    from distill_core import BadSample, EvaluationSet, UserError
    from distill_core.tools import Registry, load_model, run_recipe
    from distill_segment.segmenter import Segmenter
    from distill_segment.task import Segmentation

    changes = [(f"evaluate.tasks=[{task}]", "--task"), (f"evaluate.split={split}", "--split")]
    (node,) = run_recipe(Path(run), Registry.discover(), changes).evaluate.tasks
    tool = node.build()
    if not isinstance(tool, Segmentation):
        raise UserError(f"--task: {node.id!r} is not a segmentation task")
    if bool(pictures) == (node.config.source is not None):
        raise UserError("give either PICTURES or a --task with a `source`")
    sets: list[EvaluationSet] = []
    if node.config.source is not None:
        source = node.config.source.build()
        source.prepare()
        sets = [EvaluationSet(name, samples) for name, samples in source.samples(split).items()]
    else:
        samples = [_sample(Path(picture)) for picture in pictures]
        sets, limit = [EvaluationSet("pictures", samples)], len(samples)
    folder = Path(out).expanduser()
    inputs = {Path(picture).resolve() for picture in pictures}
    used: set[str] = set()
    model = load_model(run, teacher=teacher, checkpoint=checkpoint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i, evaluation_set in enumerate(sets):
            segmenter = Segmenter(model, tool.config, tool.classes(evaluation_set))
            for sample in islice(evaluation_set, limit // len(sets) + (i < limit % len(sets))):
                path = _free(folder, str(sample["__key__"]), used)
                if path.resolve() in inputs | {Path(str(sample["__url__"])).resolve()}:
                    raise UserError(f"{path}: is one of the pictures to paint; give another folder as --out")
                tool.overlay(segmenter, sample, evaluation_set.name).picture.save(path)
                click.echo(str(path))
    except BadSample as error:
        raise UserError(f"{sample['__url__']}: {sample['__key__']!r}: {error}") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _free(folder: Path, key: str, used: set[str]) -> Path:
    """The file of a sample's overlay, KEY-classes.png; numbered if this call has used the name."""
    name = base = f"{key.replace('/', '_')}-classes"
    for number in count(2):
        if name not in used:
            break
        name = f"{base}-{number}"
    used.add(name)
    return folder / f"{name}.png"


def _sample(path: Path) -> dict[str, object]:
    from distill_core import UserError

    try:
        return {"__key__": path.stem, "__url__": str(path), path.suffix[1:].lower(): path.read_bytes()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
