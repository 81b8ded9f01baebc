"""`distill attend`. Nothing heavy is imported until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill_core.tools import completion
from distill_explore.commands import CHECKPOINT, TEACHER

if TYPE_CHECKING:
    from distill_core import Model
    from distill_explore.attention import Reading, ViewedItem


@click.command()
@click.argument("run", shell_complete=completion.run_folders)
@click.option("--image", type=click.Path(), help="Image file.")
@click.option("--text", "texts", multiple=True, help="A text. Repeatable.")
@click.option("--out", default="attention", show_default=True, help="Writes OUT.png and OUT.html.")
@click.option("--heads", is_flag=True, help="Draw each head of the fusion as well as their mean.")
@click.option("--json", "as_json", is_flag=True, help="Print the weights as JSON.")
@TEACHER
@CHECKPOINT
def attend(
    run: str,
    image: str | None,
    texts: tuple[str, ...],
    out: str,
    heads: bool,
    as_json: bool,
    teacher: bool,
    checkpoint: str,
) -> None:
    """Draw what the model of RUN attends to in an image and in texts, as a PNG and an HTML page.

    Cross-attention: each text, and each of its sentences, over the image; the image over each text's words.
    Self-attention of the class token in the last block, by head. The principal components of the patches.
    """
    import json

    from distill_core import UserError
    from distill_core.tools import load_model
    from distill_explore.attention import readings
    from distill_explore.drawing import figure, rows_of
    from distill_explore.files import check_out, write_out
    from distill_explore.page import html

    base = Path(out).with_suffix("") if Path(out).suffix in (".png", ".html") else Path(out)
    files = [base.with_name(base.name + suffix) for suffix in (".png", ".html")]
    for file in files:
        check_out(file, (".png", ".html"))
        if image is not None and file.resolve() == Path(image).resolve():
            raise UserError(f"--out {out}: {file} is the image itself; choose another name")
    if image is None and not texts:
        raise UserError("nothing to draw: give --image FILE, --text WORDS, or both")
    model = load_model(run, teacher=teacher, checkpoint=checkpoint)
    items, sentences = _view_inputs(model, {"image": [image] if image is not None else [], "text": list(texts)})
    item_readings = readings(model, items, sentences)
    rows = rows_of(item_readings, items, heads)
    for line in _missing_parts(model, items, item_readings, teacher):
        click.echo(f"note: {line}", err=True)
    if not rows:
        raise UserError(
            f"{run}: nothing to draw: neither its fusion has an `attention` nor a backbone a `class_attention`"
        )
    title = f"{Path(run).name}: what the {'teacher' if teacher else 'student'} looks at"
    note = (
        "Colour shows how much a token is read, relative to uniform attention. Hover over words to see their weights."
    )
    page = figure(rows, items)
    files_written = [
        write_out(files[0], lambda file: page.save(file, "PNG", optimize=True)),
        write_out(files[1], lambda file: file.write(html(title, note, rows, items).encode())),
    ]
    if as_json:
        click.echo(
            json.dumps({"readings": [_numbers(reading) for reading in item_readings], "files": list(map(str, files))})
        )
        return
    for row in rows:
        click.echo(row.label)
        for reading in row.maps:
            click.echo(f"    {reading.line}")
    click.echo(", ".join(files_written))


def _view_inputs(model: Model, inputs: dict[str, list[Any]]) -> tuple[list[ViewedItem], list[ViewedItem]]:
    """The user's items, and the sentences of texts that have several. Raises `UserError`."""
    from distill_core import BadSample, UserError
    from distill_explore.attention import see
    from distill_vl.captions import CaptionAugmentation

    items_seen: list[ViewedItem] = []
    sentences_seen: list[ViewedItem] = []
    for modality, items in inputs.items():
        if items and modality not in model.modalities:
            raise UserError(f"--{modality}: the run has no modality {modality!r}, but {', '.join(model.modalities)}")
        for item in items:
            augment = model.augment[modality]
            parts = (
                augment.sentences(item) if isinstance(augment, CaptionAugmentation) else []
            )  # as a text crop cuts it
            try:
                views = [augment.eval_view(view_item) for view_item in [item, *(parts if len(parts) > 1 else ())]]
            except BadSample as error:
                raise UserError(f"--{modality} {item}: {error}") from error
            whole, *rest = see(model, modality, views)
            items_seen.append(whole)
            sentences_seen += rest
    return items_seen, sentences_seen


def _missing_parts(model: Model, items: list[ViewedItem], item_readings: list[Reading], teacher: bool) -> list[str]:
    """Why something is not drawn, a line each."""
    from distill_core import TokenAttention, offers
    from distill_explore.attention import joins

    lines = []
    modalities = {entry.modality for entry in items}
    if len(modalities) > 1 and not any(entry.reader for entry in item_readings):
        if model.fusion is not None:
            name, both = model.fusion.name, " and ".join(sorted(modalities))
            why = (
                f"the fusion {name!r} has no `attention`"
                if not offers(model.fusion, TokenAttention)
                else f"the fusion {name!r} does not {'read tokens of' if joins(model, *modalities) else 'join'} {both}"
            )
        else:
            why = "a teacher has no fusion" if teacher else "the run has no fusion"
        lines.append(f"no cross-attention: {why}")
    for modality in sorted(modalities):
        if not any(entry.reader is None and entry.answer.modality == modality for entry in item_readings):
            name = model.backbone[modality].name
            lines.append(f"no self-attention of the {modality}: the backbone {name!r} has no `class_attention`")
    return lines


def _numbers(reading: Reading) -> dict[str, Any]:
    """A reading as plain data: weights [H, L], with the positions of the L tokens."""
    reader, answer = reading.reader, reading.answer
    return {
        "asking": reader.modality if reader else None,
        "query": reader.rendered if reader and isinstance(reader.rendered, str) else None,
        "answer": answer.modality,
        "item": answer.rendered if isinstance(answer.rendered, str) else None,
        "tokens": answer.places,
        "weights": [[round(weight, 6) for weight in head] for head in reading.weights.tolist()],
        "entropy": round(reading.entropy, 4),
    }
