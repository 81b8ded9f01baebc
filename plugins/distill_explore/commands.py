"""`distill embed` and `distill search`. Nothing heavy is imported until one runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from torch import Tensor

    from distill_core.model import Model
    from distill_explore.collection import Collection

SPLIT = click.option("--split", default="test", show_default=True, help="Split, where SOURCE is a data source.")
TEACHER = click.option("--teacher", is_flag=True, help="Use the teacher.")
CHECKPOINT = click.option("--checkpoint", default="last", show_default=True, help="`last`, `best`, or a step.")
FIELD = click.option("--field", help="Read this field of the samples in place of the one training reads.")


@click.command()
@click.argument("run")
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
    from distill_core.errors import UserError
    from distill_core.registry import Registry
    from distill_explore.collection import collect
    from distill_explore.files import write

    if Path(out).suffix not in (".npy", ".parquet"):
        raise UserError(f"--out {out}: ends neither in .npy nor in .parquet")
    model = _model(run, teacher, checkpoint)
    mine = _modality(model, modality)
    embedded, keys, bad = collect(source, split, Registry.discover()).embed(model, mine, field)
    _tell(bad)
    if not keys:
        raise UserError(f"{source}: nothing in it could be embedded")
    write(Path(out), embedded, keys)
    click.echo(f"{out}: {len(keys)} embeddings of width {embedded.shape[1]}, float32, L2-normalised")


@click.command()
@click.argument("run")
@click.argument("query")
@click.option("--in", "source", required=True, help="A folder of pictures, shards (*.tar), or a source as in a recipe.")
@click.option("--top", type=click.IntRange(1, 100), default=12, show_default=True, help="How many to show.")
@click.option("--out", default="search.png", show_default=True, help="The contact sheet.")
@click.option("--like", is_flag=True, help="QUERY is a picture's path; find what is like it.")
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
    """Show the pictures of a collection that are nearest to QUERY, a text, in a table and a contact sheet.

    The collection's embeddings are kept in RUN/embeddings, and made anew when the checkpoint or a file changes.
    """
    import json

    from distill_core.errors import UserError
    from distill_core.registry import Registry
    from distill_explore.collection import collect
    from distill_explore.sheet import contact_sheet

    model = _model(run, teacher, checkpoint)
    mine = _modality(model, modality)
    others = [name for name in model.modalities if name != mine]
    if not like and not others:
        raise UserError(f"{run}: the recipe has {mine} alone, so there is nothing to describe it in; use --like")
    asked = model.encode(mine if like else others[-1], query)
    collection = collect(source, split, Registry.discover())
    embedded, keys = _kept(Path(run), collection, model, mine, f"{checkpoint} {teacher}")
    if not keys:
        raise UserError(f"{source}: nothing in it could be embedded")
    similarity = (embedded @ asked[0]).tolist()
    best = sorted(range(len(keys)), key=lambda i: -similarity[i])[:top]
    chosen = [keys[i] for i in best]
    words = collection.read(model, others[-1], chosen) if others else {}
    pictures = collection.read(model, mine, chosen)
    found = [{"key": keys[i], "similarity": round(similarity[i], 4), "text": str(words.get(keys[i], ""))} for i in best]
    sheet = contact_sheet(
        query, [(pictures.get(row["key"]), row["similarity"], row["key"]) for row in found], Path(out)
    )
    if as_json:
        click.echo(json.dumps({"query": query, "found": found, "sheet": str(sheet)}, indent=1))
        return
    for rank, row in enumerate(found, 1):
        click.echo(f"{rank:3}  {row['similarity']:6.3f}  {row['key']}  {_short(str(row['text']))}".rstrip())
    click.echo(f"{sheet}: the nearest {len(found)} of {len(keys)}")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _model(run: str, teacher: bool, checkpoint: str) -> Model:
    from distill_core.model import load_model

    return load_model(run, teacher=teacher, checkpoint=checkpoint)


def _modality(model: Model, given: str | None) -> str:
    from distill_core.errors import UserError, did_you_mean

    if given is not None and given not in model.modalities:
        raise UserError(f"--modality: no modality {given!r}{did_you_mean(given, list(model.modalities))}")
    return given or model.modalities[0]


def _kept(run: Path, collection: Collection, model: Model, modality: str, what: str) -> tuple[Tensor, list[str]]:
    """Embeddings and keys, from RUN/embeddings where the same checkpoint has embedded the same files before."""
    from hashlib import blake2b

    from distill_explore.files import read, write

    checkpoints = "\n".join(f"{p.name} {p.stat().st_mtime_ns}" for p in sorted((run / "checkpoints").glob("*.pt")))
    made_from = "\n".join((what, modality, checkpoints, collection.fingerprint()))
    path = run / "embeddings" / f"{blake2b(made_from.encode(), digest_size=8).hexdigest()}.npy"
    if (known := read(path)) is not None:
        return known
    embedded, keys, bad = collection.embed(model, modality, None)
    _tell(bad)
    if keys:
        write(path, embedded, keys)
    return embedded, keys


def _tell(bad: list[str]) -> None:
    for line in bad[:5]:
        click.echo(f"warning: left out: {line}", err=True)
    if len(bad) > 5:
        click.echo(f"warning: {len(bad) - 5} more items cannot be read", err=True)
