"""`distill embed` and `distill search`. Nothing heavy is imported until one runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

import click

from distill_core.tools import completion

if TYPE_CHECKING:
    from torch import Tensor

    from distill_core import FeatureKind, Model, Rendered
    from distill_explore.collection import Collection, Place
    from distill_explore.contact import SearchResult

SPLIT = click.option("--split", default="test", show_default=True, help="Split, if SOURCE is a data source.")
TEACHER = click.option("--teacher", is_flag=True, help="Use the teacher.")
CHECKPOINT = click.option("--checkpoint", default="last", show_default=True, help="`last`, `best`, or a step.")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
FIELD = click.option("--field", help="Read this field of the samples, not the one that training reads.")


@click.command()
@click.argument("run", shell_complete=completion.run_folders)
@click.argument("source")
@click.option("--modality", help="Modality to embed; by default the recipe's first.")
@click.option("--out", required=True, help="FILE.npy (keys go to FILE.keys.txt) or FILE.parquet.")
@FIELD
@SPLIT
@TEACHER
@CHECKPOINT
def embed(
    run: str, source: str, modality: str | None, out: str, field: str | None, split: str, teacher: bool, checkpoint: str
) -> None:
    """Write the embeddings of SOURCE: a folder of images, shards (*.tar), or a data source as in a recipe."""
    from distill_core import UserError
    from distill_core.tools import Registry
    from distill_explore.collection import collect
    from distill_explore.files import check_out, write

    check_out(Path(out), (".npy", ".parquet"))
    model = _model(run, teacher, checkpoint)
    embedded_modality = _modality(model, modality)
    features = model.default_features(embedded_modality)
    embedded, keys, problems = collect(source, split, Registry.discover()).embed(
        model, embedded_modality, field, features
    )
    _warn_of(problems)
    if not keys:
        raise UserError(f"{source}: nothing in it could be embedded")
    first, *other_files = write(Path(out), embedded, keys)
    what = "embeddings" if features == "embedding" else "class tokens (no loss trains the embedding)"
    click.echo(f"{first}: {len(keys)} {what} of width {embedded.shape[1]}, float32, L2-normalised")
    for file in other_files:
        click.echo(f"{file}: their keys, one a line")


@click.command()
@click.argument("run", shell_complete=completion.run_folders)
@click.argument("query")
@click.option("--in", "source", required=True, help="A folder of images, shards (*.tar), or a source as in a recipe.")
@click.option("--top", type=click.IntRange(1, 100), default=12, show_default=True, help="Number of results.")
@click.option(
    "--out",
    default="search.png",
    show_default=True,
    help="The contact sheet, FILE.png or FILE.jpg; an existing file is replaced.",
)
@click.option("--like", is_flag=True, help="QUERY is of the searched modality (an image's path).")
@click.option("--modality", help="Modality to search; by default the recipe's first.")
@click.option("--by", help="Modality of QUERY, where there are several others than the searched one.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@SPLIT
@TEACHER
@CHECKPOINT
def search(
    run: str,
    query: str,
    source: str,
    top: int,
    out: str,
    like: bool,
    modality: str | None,
    by: str | None,
    as_json: bool,
    split: str,
    teacher: bool,
    checkpoint: str,
) -> None:
    """Show the items of a collection that are nearest to QUERY, as a table and a contact sheet.

    QUERY is of the recipe's other modality: a text, if images are searched. Of several others --by names one.

    The collection's embeddings are cached in RUN/embeddings, until the checkpoint or a file changes.
    """
    import json
    import os

    from distill_core import UserError
    from distill_core.tools import Registry
    from distill_explore.collection import collect, places
    from distill_explore.contact import contact_sheet
    from distill_explore.files import check_out, write_out

    check_out(Path(out), tuple(FORMATS))
    model = _model(run, teacher, checkpoint)
    searched = _modality(model, modality)
    others = [name for name in model.modalities if name != searched]
    if not like and not others:
        raise UserError(
            f"{run}: the {model.side} has {searched} alone, so there is nothing to describe it in; use --like"
        )
    if not like and len(others) > 1 and by is None:
        raise UserError(f"--by: QUERY may be of {', '.join(others)}; name one of them")
    if by is not None and (like or by not in others):
        raise UserError(f"--by: QUERY is of {searched if like else ' or '.join(others)}")
    query_modality = searched if like else by or others[0]
    features: FeatureKind = model.default_features(searched) if like else "embedding"
    query_embedding = model.encode(query_modality, query, features=features)
    query_shown = _render(model, query_modality, query)
    if not like and isinstance(query_shown, str) and os.path.isfile(query):  # a long text is no error to it
        raise UserError(f"{query} is a file, and QUERY is taken as {query_modality} here; did you mean --like?")
    collection = collect(source, split, Registry.discover())
    if collection.holds(Path(out)):
        raise UserError(f"--out {out}: is one of the searched files, and would be replaced; choose another name")
    embedded, keys = _embeddings_of(Path(run), collection, model, searched, features, f"{checkpoint} {teacher}")
    if not keys:
        raise UserError(f"{source}: nothing in it could be embedded")
    similarity = (embedded @ query_embedding[0]).tolist()
    best = sorted(range(len(keys)), key=lambda i: -similarity[i])[:top]
    item_places = places(keys)
    # the item itself, and for each other modality the first item of its key
    places_by_modality = {searched: [item_places[i] for i in best]} | {
        name: [(keys[i], 0) for i in best] for name in others
    }
    results = _results(collection, model, places_by_modality, [similarity[i] for i in best])
    summary_line = f"the nearest {len(results)} of {len(keys)} in {collection.title}"
    page = contact_sheet(query_shown, summary_line, results)
    file = write_out(Path(out), lambda file: page.save(file, FORMATS[Path(out).suffix]))
    if as_json:
        rows = [
            {"key": result.key, "similarity": round(result.similarity, 4), "text": result.text} for result in results
        ]
        click.echo(json.dumps({"query": query, "in": collection.title, "found": rows, "sheet": out}, indent=1))
        return
    _table(results)
    click.echo(f"{file}: {summary_line}")


def _results(
    collection: Collection, model: Model, looks: Mapping[str, Sequence[Place]], similarity: Sequence[float]
) -> list[SearchResult]:
    """The results by rank, each with the first text and the first image that any modality has at its place."""
    from PIL.Image import Image

    from distill_explore.contact import SearchResult

    read = {name: collection.read(model, name, requested) for name, requested in looks.items()}
    result = []
    for places, cosine in zip(zip(*looks.values(), strict=True), similarity, strict=True):
        items = [(name, place) for name, place in zip(looks, places, strict=True) if place in read[name]]
        views = [_render_item(model, name, read[name][place]) for name, place in items]
        words = next((view for view in views if isinstance(view, str)), "")
        picture = next((view for view in views if isinstance(view, Image)), None)
        result.append(SearchResult(cosine, places[0][0], words, picture))
    return result


def _table(results: Sequence[SearchResult]) -> None:
    """Print a line for each result, with its text cut to the terminal's width."""
    from rich.text import Text

    longest = max(len(result.key) for result in results)
    for rank, result in enumerate(results, 1):
        head = f"{rank:3}  {result.similarity:6.3f}  {result.key:{longest}}  "
        words = Text(" ".join(result.text.split()))
        words.truncate(max(20, get_terminal_size().columns - len(head)), overflow="ellipsis")
        click.echo((head + words.plain).rstrip())


def _render(model: Model, modality: str, item: Any) -> Rendered:
    """An item rendered for people; None if it cannot be."""
    from distill_core import BadSample

    augmentation = model.augment[modality]
    try:
        return augmentation.render(augmentation.eval_view(item))
    except BadSample:  # another modality's item of a result may be unusable
        return None


def _render_item(model: Model, modality: str, item: Any) -> Rendered:
    """The item itself if it is a text or an image; else its rendered view."""
    from PIL.Image import Image

    return item if isinstance(item, (str, Image)) else _render(model, modality, item)


def _model(run: str, teacher: bool, checkpoint: str) -> Model:
    from distill_core.tools import keep_freed_memory, load_model

    keep_freed_memory()
    return load_model(run, teacher=teacher, checkpoint=checkpoint)


def _modality(model: Model, name: str | None) -> str:
    from distill_core import UserError, did_you_mean

    if name is not None and name not in model.modalities:
        raise UserError(f"--modality: no modality {name!r}{did_you_mean(name, list(model.modalities))}")
    return name or model.modalities[0]


def _embeddings_of(
    run: Path, collection: Collection, model: Model, modality: str, features: FeatureKind, side: str
) -> tuple[Tensor, list[str]]:
    """Embeddings and keys, from RUN/embeddings if the same checkpoint has embedded the same files before.

    There is one file for each collection, side and modality: those of an earlier state are removed.
    """
    from distill_core import UserError
    from distill_explore.files import read, remove, write

    checkpoints = "\n".join(f"{p.name} {p.stat().st_mtime_ns}" for p in sorted((run / "checkpoints").glob("*.pt")))
    prefix = _digest(side, modality, features, collection.name)
    path = run / "embeddings" / f"{prefix}-{_digest(checkpoints, collection.fingerprint())}.npy"
    if (cached := read(path)) is not None:
        return cached
    embedded, keys, problems = collection.embed(model, modality, None, features)
    _warn_of(problems)
    if keys:
        try:
            write(path, embedded, keys)
        except UserError as error:  # a run folder of somebody else's can be searched all the same
            click.echo(f"warning: {error}; the next search embeds all of it again", err=True)
            return embedded, keys
        for old in path.parent.glob(f"{prefix}-*.npy"):
            if old != path:
                remove(old)
    return embedded, keys


def _digest(*parts: str) -> str:
    from hashlib import blake2b

    return blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _warn_of(problems: list[str]) -> None:
    for line in problems[:5]:
        click.echo(f"warning: left out: {line}", err=True)
    if len(problems) > 5:
        click.echo(f"warning: {len(problems) - 5} more items cannot be read", err=True)
