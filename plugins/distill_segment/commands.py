"""`distill segment`. Nothing heavy is imported until it runs."""

from __future__ import annotations

from itertools import count, islice
from pathlib import Path

import click

from distill_core.tools import completion


@click.command()
@click.argument("run", shell_complete=completion.run_folders)
@click.argument("pictures", nargs=-1, type=click.Path())
@click.option("--out", required=True, help="Folder that the overlays are written to, as NAME-classes.png.")
@click.option("--task", default="{name: segmentation}", show_default=True, help="The task, as in a recipe.")
@click.option("--split", default="test", show_default=True, help="Split, where the task has a source.")
@click.option("--limit", default=8, show_default=True, type=click.IntRange(1), help="Samples of the source, at most.")
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
    """Paint what a run's model finds over PICTURES (any classes you name), or over samples of the task's source.

    --task '{name: segmentation, classes: FILE}' names the classes, one a line; with a `source` it shows the truth, too.
    """
    from distill_core import BadSample, EvaluationSet, UserError
    from distill_core.tools import Registry, load_model, run_recipe
    from distill_segment.segmenter import Segmenter
    from distill_segment.task import Segmentation

    changes = [(f"evaluate.tasks=[{task}]", "--task"), (f"evaluate.split={split}", "--split")]
    (node,) = run_recipe(Path(run), Registry.discover(), changes).evaluate.tasks
    tool = node.build()
    if not isinstance(tool, Segmentation):
        raise UserError(f"--task: {node.id!r} is no segmentation")
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
    taken: set[str] = set()
    model = load_model(run, teacher=teacher, checkpoint=checkpoint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i, here in enumerate(sets):
            segmenter = Segmenter(model, tool.config, tool.classes(here))
            for sample in islice(here, limit // len(sets) + (i < limit % len(sets))):
                path = _free(folder, str(sample["__key__"]), taken)
                if path.resolve() in inputs | {Path(str(sample["__url__"])).resolve()}:
                    raise UserError(f"{path}: is one of the pictures to paint; give another folder as --out")
                tool.overlay(segmenter, sample, here.name).picture.save(path)
                click.echo(str(path))
    except BadSample as error:
        raise UserError(f"{sample['__url__']}: {sample['__key__']!r}: {error}") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _free(folder: Path, key: str, taken: set[str]) -> Path:
    """Where a sample's overlay goes, KEY-classes.png; numbered where another of this call has the name."""
    name = wanted = f"{key.replace('/', '_')}-classes"
    for number in count(2):
        if name not in taken:
            break
        name = f"{wanted}-{number}"
    taken.add(name)
    return folder / f"{name}.png"


def _sample(path: Path) -> dict[str, object]:
    from distill_core import UserError

    try:
        return {"__key__": path.stem, "__url__": str(path), path.suffix[1:].lower(): path.read_bytes()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
