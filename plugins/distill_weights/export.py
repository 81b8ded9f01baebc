"""Writes an export, compares it with the run through the other library, and keeps it only if they agree."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from distill_core import UserError
from distill_weights.card import card
from distill_weights.formats import FORMATS, Format
from distill_weights.subject import Subject

TOLERANCE = 1e-5
"""Of L2-normalised embeddings, in fp32."""
PIXEL_TOLERANCE = 1e-4
"""Of normalised pixels, where a picture has the towers' size and nothing is resized."""


@dataclass(frozen=True)
class Checked:
    """What was found of one modality."""

    modality: str
    samples: int
    difference: float
    """Largest difference of an embedding's number, on the same inputs."""
    own: str
    """How the other library's own preprocessing of the same samples compares; empty where it has none."""


def write(run: Path, to: str, out: Path, *, teacher: bool, checkpoint: str, licence: str) -> Iterator[str]:
    """Lines for the user. Raises `UserError`; `out` is then as it was."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists, and is not overwritten; name a new folder")
    subject = Subject.load(run, teacher=teacher, checkpoint=checkpoint)
    form = FORMATS[to](subject)
    form.notes += form.untrained()
    target = out.absolute()  # `.` has no name and no parent
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error}") from error
    try:
        form.write(temporary)
        form.open(temporary)
        found = [check(form, modality) for modality in form.modalities]
        for one in found:
            if not one.difference < TOLERANCE:
                raise UserError(
                    f"--to {to}: {one.modality} embeddings differ by {one.difference:.1e} (at most {TOLERANCE:.0e} is "
                    "allowed), so nothing was written. That is a bug: please report it with the run's recipe.yaml"
                )
        text = card(subject, to, found, form.notes, licence)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        mask = _umask()  # safetensors writes for its owner alone
        temporary.chmod(0o777 & ~mask)
        for file in temporary.iterdir():
            file.chmod(0o666 & ~mask)
        try:
            if target.exists():
                target.rmdir()
            temporary.rename(target)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written: {error.strerror}; name a new folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    yield f"{out}: {to}, the {subject.side} of {run} at step {subject.step}"
    for one in found:
        yield f"{one.modality}: maximum difference {one.difference:.1e} of the embeddings of {one.samples} samples"
        if one.own:
            yield f"{one.modality}: {one.own}"
    for part in subject.left_out:
        yield f"left out: {part}; the towers' own embeddings are exported"
    yield from form.notes


def check(form: Format, modality: str) -> Checked:
    """The run's embeddings against the export's, on the same inputs; then its own preprocessing against the run's.

    Raises `UserError` where the latter makes other pixels of a picture of the towers' size, or other ids.
    """
    subject = form.subject
    items = subject.items(modality)
    x = subject.inputs(modality, items)
    ours = subject.embed(modality, items, form.features(modality))
    difference = float((form.embed(modality, x) - ours).abs().max())
    theirs = form.inputs(modality, items)
    own = ""
    if theirs is not None and x.is_floating_point():
        apart = [float((a - b).abs().max()) for a, b in zip(theirs, x, strict=True)]
        if not apart[0] <= PIXEL_TOLERANCE:
            raise UserError(_unlike(form, modality, f"preprocessing differs by {apart[0]:.1e} in a normalised pixel"))
        moved = (form.embed(modality, theirs) * ours).sum(-1)
        own = (
            f"its own preprocessing: pixels of the towers' size differ by {apart[0]:.1e}; cosine with the run's "
            f"embedding at least {float(moved.min()):.6f} over all sizes"
        )
    elif theirs is not None:
        other = [item for item, a, b in zip(items, theirs, x, strict=True) if not _same_ids(a, b)]
        if other:
            raise UserError(_unlike(form, modality, f"tokenizer gives other ids for {other[0][:40]!r}"))
        own = f"its own tokenizer: the same ids for {len(items)} of {len(items)} texts"
    return Checked(modality, len(items), difference, own)


def _unlike(form: Format, modality: str, what: str) -> str:
    kind = form.subject.model.augment[modality].name
    return (
        f"{modality}: the written {what}, so nothing was written. If augment.{modality} ({kind!r}) prepares what is "
        "evaluated in a way of its own, use --to onnx; else please report it with the run's recipe.yaml"
    )


def _same_ids(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Up to end-of-text, which is the largest id; what pads behind it differs between libraries."""
    ends = int(a.argmax()) + 1, int(b.argmax()) + 1
    return ends[0] == ends[1] and torch.equal(a[: ends[0]], b[: ends[1]])


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
