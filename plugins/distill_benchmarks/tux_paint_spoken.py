"""Tux Paint's stamps with their sentences and spoken descriptions: three modalities of one thing, in many languages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from distill_benchmarks.tux_paint import PHOTOGRAPHS, UNPACKED, stamps_below
from distill_core import ComponentConfig, DataError, DataSource, Sample, Shard, stable_hash
from distill_layouts.files import FileSample, folder
from distill_layouts.shards import listed
from distill_tasks.prompts import read_lines

SPOKEN = re.compile(r"_desc(?:_([A-Za-z]+(?:@[a-z]+)?))?\.ogg$")
SENTENCE = re.compile(r"([A-Za-z]+(?:@[a-z]+)?)\.utf8=(.*)")
ENGLISH = "en"
Split = Literal["train", "validation", "test"]


class SpokenTuxPaintConfig(ComponentConfig):
    """Options of `tux_paint_spoken`."""

    folder: str
    """What `dpkg -x tuxpaint-stamps-default_*.deb FOLDER` has filled, or the folder `stamps` below it."""
    languages: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Languages of the recordings, as [es, fr]; null takes all. A stamp that is described in none of them lacks
    speech."""


class SpokenTuxPaint(DataSource):
    """The stamps of Debian's tuxpaint-stamps-default as images, sentences and speech.

    A sample has the picture (`png`, with its alpha), the English sentence (`txt`), a recording a language (`fr.ogg`),
    and a json: `references` (the English sentence) and `sentences`, {language: text}. Drawings are split by a hash of
    their concept, which is a name without its number: 15 % `test`, 10 % `validation`, the rest `train`. Photographs are
    never trained on: they are a set of their own in `test`, of concepts of which drawings may be trained on.
    """

    name = "tux_paint_spoken"
    Config = SpokenTuxPaintConfig
    examples = ({"folder": "no-such-folder/tux"}, {"folder": "no-such-folder/tux", "languages": ["es", "fr"]})
    layout = (
        "the stamps in folders by kind, as animals/birds/crow.png, crow.txt and crow_desc_fr.ogg; to get them: apt-get "
        "download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb tux"
    )

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...]:
        return ("train", "validation", "test")

    def sets(self, split: str) -> dict[str, list[Shard]]:
        """`drawings`; in `test` `photographs` too. Raises `DataError`."""
        if split not in self.splits(self.config):
            return {}
        base = folder(self.config.folder, self.layout)
        base = base / UNPACKED if (base / UNPACKED).is_dir() else base
        photographs = set(read_lines(PHOTOGRAPHS, "a stamp a line"))
        chosen: dict[str, list[Mapping[str, Any]]] = {"drawings": []}
        sentences: set[str] = set()
        for row in self._rows(base):
            english = row["sentences"].get(ENGLISH, "").casefold()
            if not english or english in sentences:  # equal sentences are wrong answers for each other
                continue
            sentences.add(english)
            drawn = row["key"] not in photographs
            if (split_of(row["key"]) if drawn else "test") == split:
                chosen.setdefault("drawings" if drawn else "photographs", []).append(row)
        if not chosen["drawings"]:
            raise DataError(f"{base}: holds no stamp with a sentence for {split}; expected {self.layout}")
        make = Spoken(base.absolute())
        place = f"{base} {split} {self.config.model_dump_json(exclude={'folder'})}"
        return {name: listed(f"{place} {name}", iter(rows), make) for name, rows in chosen.items()}

    def _rows(self, base: Path) -> Iterator[Mapping[str, Any]]:
        """{key, sentences: {language: text}, spoken: {language: file}} of every stamp."""
        spoken: dict[str, dict[str, str]] = {}
        for path in sorted(base.glob("*/**/*_desc*.ogg")):
            name = path.relative_to(base).as_posix()
            if (match := SPOKEN.search(name)) is not None:
                spoken.setdefault(name[: match.start()], {})[match[1] or ENGLISH] = name
        for key in stamps_below(base):
            files = spoken.get(key, {})
            if self.config.languages is not None:
                files = {language: files[language] for language in self.config.languages if language in files}
            yield {"key": key, "sentences": sentences_of(base / f"{key}.txt"), "spoken": files}


@dataclass(frozen=True)
class Spoken:
    """A row -> the sample."""

    base: Path

    def __call__(self, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> Sample:
        ((_, row),) = rows
        english = row["sentences"][ENGLISH]
        about = {"references": [english], "sentences": row["sentences"]}
        picture = self.base / f"{row['key']}.png"
        recordings = {f"{language}.ogg": self.base / name for language, name in row["spoken"].items()}
        fields = {"png": picture, "txt": english.encode(), "json": json.dumps(about).encode(), **recordings}
        return FileSample(row["key"], str(picture), fields)


def split_of(name: str) -> Split:
    """By the folder and the name without what follows its first number: apple_1 and apple_2 are one concept."""
    concept = re.sub(r"_?\d.*$", "", name) or name
    place = stable_hash("tux_paint_spoken", concept) % 100
    return "test" if place < 15 else "validation" if place < 25 else "train"


def sentences_of(path: Path) -> dict[str, str]:
    """Language -> sentence, of a stamp's file: the first line, in English, then `fr.utf8=...`. {} of no file."""
    try:
        lines = path.read_bytes().decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    translations = {match[1]: match[2].strip() for line in lines if (match := SENTENCE.fullmatch(line))}
    first = lines[0].strip() if lines and ".utf8=" not in lines[0] else ""
    return {name: text for name, text in ({ENGLISH: first} | translations).items() if text}
