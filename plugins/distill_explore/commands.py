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
    from distill_explore.contact import Found

SPLIT = click.option("--split", default="test", show_default=True, help="Split, where SOURCE is a data source.")
TEACHER = click.option("--teacher", is_flag=True, help="Use the teacher.")
CHECKPOINT = click.option("--checkpoint", default="last", show_default=True, help="`last`, `best`, or a step.")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
FIELD = click.option("--field", help="Read this field of the samples in place of the one training reads.")


@click.command()
@click.argument("run", shell_complete=completion.run_folders)
@click.argument("source")
@click.option("--modality", help="What to embed; the recipe's first modality otherwise.")
@click.option("--out", required=True, help="FILE.npy (keys go to FILE.keys.txt) or FILE.parquet.")
@FIELD
@SPLIT
@TEACHER
@CHECKPOINT
def embed(
    run: str, source: str, modality: str | None, out: str, field: str | None, split: str, teacher: bool, checkpoint: str
) -> None:
    """Write the embeddings of SOURCE: a folder of pictures, shards (*.tar), or a data source as in a recipe."""
    from distill_core import UserError
    from distill_core.tools import Registry
    from distill_explore.collection import collect
    from distill_explore.files import check_out, write

    check_out(Path(out), (".npy", ".parquet"))
    model = _model(run, teacher, checkpoint)
    mine = _modality(model, modality)
    features = model.default_features(mine)
    embedded, keys, bad = collect(source, split, Registry.discover()).embed(model, mine, field, features)
    _tell(bad)
    if not keys:
        raise UserError(f"{source}: nothing in it could be embedded")
    first, *beside = write(Path(out), embedded, keys)
    what = "embeddings" if features == "embedding" else "class tokens (no loss trains the embedding)"
    click.echo(f"{first}: {len(keys)} {what} of width {embedded.shape[1]}, float32, L2-normalised")
    for file in beside:
        click.echo(f"{file}: their keys, one a line")


@click.command()
@click.argument("run", shell_complete=completion.run_folders)
@click.argument("query")
@click.option("--in", "source", required=True, help="A folder of pictures, shards (*.tar), or a source as in a recipe.")
@click.option("--top", type=click.IntRange(1, 100), default=12, show_default=True, help="How many to show.")
@click.option(
    "--out",
    default="search.png",
    show_default=True,
    help="The contact sheet, FILE.png or FILE.jpg; one there is replaced.",
)
@click.option("--like", is_flag=True, help="QUERY is of the modality searched (a picture's path).")
@click.option("--modality", help="What is searched; the recipe's first modality otherwise.")
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
    as_json: bool,
    split: str,
    teacher: bool,
    checkpoint: str,
) -> None:
    """Show what of a collection is nearest to QUERY, in a table and a contact sheet.

    QUERY is of the recipe's other modality: a text, where pictures are searched.

    The collection's embeddings are kept in RUN/embeddings, and made anew when the checkpoint or a file changes.
    """
    import json
    import os

    from distill_core import UserError
    from distill_core.tools import Registry
    from distill_explore.collection import collect, places
    from distill_explore.contact import contact_sheet
    from distill_explore.files import check_out, write_whole

    check_out(Path(out), tuple(FORMATS))
    model = _model(run, teacher, checkpoint)
    mine = _modality(model, modality)
    others = [name for name in model.modalities if name != mine]
    if not like and not others:
        raise UserError(f"{run}: the {model.side} has {mine} alone, so there is nothing to describe it in; use --like")
    asking = mine if like else others[-1]
    features: FeatureKind = model.default_features(mine) if like else "embedding"
    asked = model.encode(asking, query, features=features)
    query_shown = _shown(model, asking, query)
    if not like and isinstance(query_shown, str) and os.path.isfile(query):  # a long text is no error to it
        raise UserError(f"{query} is a file, and QUERY is taken as {asking} here; did you mean --like?")
    collection = collect(source, split, Registry.discover())
    if collection.holds(Path(out)):
        raise UserError(f"--out {out}: is one of what is searched, and would be replaced; name another")
    embedded, keys = _kept(Path(run), collection, model, mine, features, f"{checkpoint} {teacher}")
    if not keys:
        raise UserError(f"{source}: nothing in it could be embedded")
    similarity = (embedded @ asked[0]).tolist()
    best = sorted(range(len(keys)), key=lambda i: -similarity[i])[:top]
    at = places(keys)
    # the item itself, and what stands beside it: of another modality the first item of its key
    looks = {mine: [at[i] for i in best]} | {name: [(keys[i], 0) for i in best] for name in others}
    found = _found(collection, model, looks, [similarity[i] for i in best])
    told = f"the nearest {len(found)} of {len(keys)} in {collection.title}"
    page = contact_sheet(query_shown, told, found)
    file = write_whole(Path(out), lambda file: page.save(file, FORMATS[Path(out).suffix]))
    if as_json:
        rows = [{"key": one.key, "similarity": round(one.similarity, 4), "text": one.text} for one in found]
        click.echo(json.dumps({"query": query, "in": collection.title, "found": rows, "sheet": out}, indent=1))
        return
    _table(found)
    click.echo(f"{file}: {told}")


def _found(
    collection: Collection, model: Model, looks: Mapping[str, Sequence[Place]], similarity: Sequence[float]
) -> list[Found]:
    """What each modality has at its places, by rank: the first words and the first picture."""
    from PIL.Image import Image

    from distill_explore.contact import Found

    read = {name: collection.read(model, name, wanted) for name, wanted in looks.items()}
    result = []
    for places, alike in zip(zip(*looks.values(), strict=True), similarity, strict=True):
        here = [(name, place) for name, place in zip(looks, places, strict=True) if place in read[name]]
        shown = [_whole(model, name, read[name][place]) for name, place in here]
        words = next((one for one in shown if isinstance(one, str)), "")
        picture = next((one for one in shown if isinstance(one, Image)), None)
        result.append(Found(alike, places[0][0], words, picture))
    return result


def _table(found: Sequence[Found]) -> None:
    """A line each, its words cut to the terminal's width."""
    from rich.text import Text

    longest = max(len(one.key) for one in found)
    for rank, one in enumerate(found, 1):
        head = f"{rank:3}  {one.similarity:6.3f}  {one.key:{longest}}  "
        words = Text(" ".join(one.text.split()))
        words.truncate(max(20, get_terminal_size().columns - len(head)), overflow="ellipsis")
        click.echo((head + words.plain).rstrip())


def _shown(model: Model, modality: str, item: Any) -> Rendered:
    """What an item looks like to a person; None where it cannot be shown."""
    from distill_core import BadSample

    augmentation = model.augment[modality]
    try:
        return augmentation.render(augmentation.eval_view(item))
    except BadSample:  # what stands beside a found item need not be usable
        return None


def _whole(model: Model, modality: str, item: Any) -> Rendered:
    """An item as it is, where a person can see that; else as the model sees it."""
    from PIL.Image import Image

    return item if isinstance(item, (str, Image)) else _shown(model, modality, item)


def _model(run: str, teacher: bool, checkpoint: str) -> Model:
    from distill_core.tools import keep_freed_memory, load_model

    keep_freed_memory()
    return load_model(run, teacher=teacher, checkpoint=checkpoint)


def _modality(model: Model, given: str | None) -> str:
    from distill_core import UserError, did_you_mean

    if given is not None and given not in model.modalities:
        raise UserError(f"--modality: no modality {given!r}{did_you_mean(given, list(model.modalities))}")
    return given or model.modalities[0]


def _kept(
    run: Path, collection: Collection, model: Model, modality: str, features: FeatureKind, what: str
) -> tuple[Tensor, list[str]]:
    """Embeddings and keys, from RUN/embeddings where the same checkpoint has embedded the same files before.

    One for each collection, side and modality: those of an earlier state of it are removed.
    """
    from distill_core import UserError
    from distill_explore.files import read, remove, write

    checkpoints = "\n".join(f"{p.name} {p.stat().st_mtime_ns}" for p in sorted((run / "checkpoints").glob("*.pt")))
    whose = _digest(what, modality, features, collection.name)
    path = run / "embeddings" / f"{whose}-{_digest(checkpoints, collection.fingerprint())}.npy"
    if (known := read(path)) is not None:
        return known
    embedded, keys, bad = collection.embed(model, modality, None, features)
    _tell(bad)
    if keys:
        try:
            write(path, embedded, keys)
        except UserError as error:  # a run folder of somebody else's can be searched all the same
            click.echo(f"warning: {error}; the next search embeds all of it again", err=True)
            return embedded, keys
        for old in path.parent.glob(f"{whose}-*.npy"):
            if old != path:
                remove(old)
    return embedded, keys


def _digest(*parts: str) -> str:
    from hashlib import blake2b

    return blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _tell(bad: list[str]) -> None:
    for line in bad[:5]:
        click.echo(f"warning: left out: {line}", err=True)
    if len(bad) > 5:
        click.echo(f"warning: {len(bad) - 5} more items cannot be read", err=True)
