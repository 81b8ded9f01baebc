"""`distill export` and `distill average`. Nothing heavy is imported until it runs."""

from __future__ import annotations

import click

from distill_core.tools import completion


@click.command()
@click.argument("run", shell_complete=completion.run_folders)
@click.option(
    "--to",
    required=True,
    type=click.Choice(["open_clip", "hf", "onnx"]),
    help="open_clip's layout, a Hugging Face CLIPModel and CLIPProcessor, or an ONNX file for each tower and decoder.",
)
@click.option("--out", required=True, help="The folder to write; it must not exist, or be empty.")
@click.option("--teacher", is_flag=True, help="Export the teacher.")
@click.option("--checkpoint", default="last", show_default=True, help="`last`, `best`, or a step.")
@click.option("--licence", default="unknown", show_default=True, help="The weights' licence, for the model card.")
def export(run: str, to: str, out: str, teacher: bool, checkpoint: str, licence: str) -> None:
    """Write a run's towers for another library, and check that the embeddings agree (to 1e-5).

    The other library loads the export and embeds the same images and texts; the maximum difference is printed. If it
    is too large, the export is deleted. README.md is a model card.
    """
    from pathlib import Path

    from distill_weights.export import write

    for line in write(Path(run), to, Path(out), teacher=teacher, checkpoint=checkpoint, licence=licence):
        click.echo(line)


@click.command()
@click.argument("runs", nargs=-1, required=True, shell_complete=completion.run_folders)
@click.option(
    "--share",
    type=click.FloatRange(0, 1),
    help="Of the first run's weights; the others have equal parts of the rest.  [default: equal parts of all]",
)
@click.option("--name", help="The new run's name.  [default: the first run's, with -average]")
@click.option("--runs", "base", default="runs", show_default=True, help="Folder in which its folder is created.")
def average(runs: tuple[str, ...], share: float | None, name: str | None, base: str) -> None:
    """Average the weights of RUNS into a run that can be evaluated, exported and continued.

    With --share a fine-tuned run first and the one that it started from second: WiSE-FT (arXiv 2109.01903). Several
    fine-tunings of one run in equal parts: a model soup (arXiv 2203.05482). Runs that began with different weights have
    no mean that is worth anything. What the first run has alone stays as it is, and so do its teacher and its recipe.
    """
    from pathlib import Path

    from distill_weights.average import write

    first = Path(runs[0])
    for line in write([*map(Path, runs)], share, Path(base), name or f"{first.resolve().name}-average"):
        click.echo(line)
