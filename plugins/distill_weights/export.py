"""Writes an export, compares it with the run through the other library, and keeps it only if they agree."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill_core import UserError
from distill_weights.card import card
from distill_weights.formats import FORMATS, Decode, Format
from distill_weights.subject import Subject

TOLERANCE = 1e-5
"""Largest allowed difference of L2-normalised embeddings, in fp32."""
PIXEL_TOLERANCE = 1e-4
"""Largest allowed difference of normalised pixels, of an image with the towers' size, which is not resized."""


@dataclass(frozen=True)
class CheckResult:
    """The comparison of one modality's embeddings, or of a decoder's logits."""

    part: str
    """The modality, or `heads.NAME`."""
    samples: int
    difference: float
    """Largest difference of an embedding's number, on the same inputs; of a logit, as a share of the largest one."""
    comparison: str = ""
    """How the other library's preprocessing of the same samples compares; empty if it has none."""
    of: str = "embeddings"
    """What was compared: or `logits`."""


def write(run: Path, to: str, out: Path, *, teacher: bool, checkpoint: str, licence: str) -> Iterator[str]:
    """Write the export; yields lines for the user. Raises `UserError` and then leaves `out` unchanged."""
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
        results = [check(form, modality) for modality in form.modalities]
        results += [check_decoder(form, name, decode) for name, decode in form.decoders().items()]
        for result in results:
            if not result.difference < TOLERANCE:
                raise UserError(
                    f"--to {to}: {result.part} {result.of} differ by {result.difference:.1e} (at most "
                    f"{TOLERANCE:.0e} is allowed), so nothing was written. That is a bug: please report it with the "
                    "run's recipe.yaml"
                )
        text = card(subject, to, results, form.notes, licence)
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
    for result in results:
        what = "embeddings" if result.of == "embeddings" else "logits, as a share of the largest,"
        yield f"{result.part}: maximum difference {result.difference:.1e} of the {what} of {result.samples} samples"
        if result.comparison:
            yield f"{result.part}: {result.comparison}"
    for path, name in subject.left_out.items():
        yield f"left out: {path} ({name}); the towers' own embeddings are exported"
    yield from form.notes


def check(form: Format, modality: str) -> CheckResult:
    """The run's embeddings against the export's, on the same inputs; then its own preprocessing against the run's.

    Raises `UserError` if the latter gives different pixels for an image of the towers' size, or different ids.
    """
    subject = form.subject
    items = subject.items(modality)
    x = subject.inputs(modality, items)
    ours = subject.embed(modality, items, form.features(modality))
    difference = float((form.embed(modality, x) - ours).abs().max())
    other_inputs = form.inputs(modality, items)
    comparison = ""
    if other_inputs is not None and x.is_floating_point():
        differences = [float((a - b).abs().max()) for a, b in zip(other_inputs, x, strict=True)]
        if not differences[0] <= PIXEL_TOLERANCE:
            raise UserError(
                _unlike(form, modality, f"preprocessing differs by {differences[0]:.1e} in a normalised pixel")
            )
        cosines = (form.embed(modality, other_inputs) * ours).sum(-1)
        comparison = (
            f"its own preprocessing: pixels of the towers' size differ by {differences[0]:.1e}; cosine with the run's "
            f"embedding at least {float(cosines.min()):.6f} over all sizes"
        )
    elif other_inputs is not None:
        differing = [item for item, a, b in zip(items, other_inputs, x, strict=True) if not _same_ids(a, b)]
        if differing:
            raise UserError(_unlike(form, modality, f"tokenizer gives other ids for {differing[0][:40]!r}"))
        comparison = f"its own tokenizer: the same ids for {len(items)} of {len(items)} texts"
    return CheckResult(modality, len(items), difference, comparison)


def check_decoder(form: Format, name: str, decode: Decode) -> CheckResult:
    """The run's logits against the export's, of the same samples: all at once, by threes, and each alone at its own
    length."""
    subject = form.subject
    decoder = subject.decoders()[name]
    writes = decoder.writes(decoder.config)
    names = {writes, *decoder.reads(decoder.config)}
    every = {modality: subject.items(modality) for modality in names}
    count = min(map(len, every.values()))
    differences = []
    for size in (count, 3, 1):
        for start in range(0, count, size):
            items = {modality: own[:count][start : start + size] for modality, own in every.items()}
            ours, theirs = subject.logits(decoder, items), decode(items)
            if theirs.shape != ours.shape:
                shapes = f"{list(theirs.shape)} instead of {list(ours.shape)}"
                raise UserError(f"heads.{name}: the written decoder gives logits {shapes}, so nothing was written")
            real = _before_end(subject, writes, items[writes])  # what a tower makes of padding is its own affair
            differences.append((theirs - ours)[real].abs().max() / ours[real].abs().max())
    return CheckResult(f"heads.{name}", count, float(torch.stack(differences).max()), of="logits")


def _before_end(subject: Subject, modality: str, items: list[Any]) -> torch.Tensor:
    """[N, L], True at the ids that something follows."""
    tower = subject.model.backbone[modality]
    vocabulary = tower.spec(tower.config).vocabulary
    assert vocabulary is not None  # or it could not be written
    return (subject.inputs(modality, items) == vocabulary.end).cumsum(1) == 0


def _unlike(form: Format, modality: str, what: str) -> str:
    kind = form.subject.model.augment[modality].name
    return (
        f"{modality}: the written {what}, so nothing was written. If augment.{modality} ({kind!r}) has its own "
        "preprocessing for evaluation, use --to onnx; else please report it with the run's recipe.yaml"
    )


def _same_ids(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Up to end-of-text, which is the largest id; the padding after it differs between libraries."""
    ends = int(a.argmax()) + 1, int(b.argmax()) + 1
    return ends[0] == ends[1] and torch.equal(a[: ends[0]], b[: ends[1]])


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
