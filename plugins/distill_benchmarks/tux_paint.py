"""Tux Paint's stamps: cut-out photographs and drawings in folders by kind, each with a caption and an alpha mask."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field

from distill_core import BadSample, ComponentConfig, DataError, DataSource, Sample, Shard
from distill_layouts.files import FileSample, folder
from distill_layouts.shards import listed
from distill_tasks.prompts import read_lines

UNPACKED = "usr/share/tuxpaint/stamps"
"""Where the stamps are in the unpacked package."""
PHOTOGRAPHS = Path(__file__).with_name("tux_paint_photographs.txt")
BACKGROUND = "background"
MADE = {"cartoon", "plastic", "toys"}
"""Folders that say how a picture was made, and not what it shows."""
WORDS = {
    "arttools": "art tools",
    "asl": "sign language",
    "masstransit": "mass transit",
    "naturalforces": "natural forces",
    "newyears": "new year",
    "roadsigns": "road signs",
    "solarsystem": "solar system",
}
"""Folders' names that are run together."""
TURNED = re.compile(r"(_mirror|_flip)+$")
"""Ends the names of what takes a stamp's place when it is turned."""


class TuxPaintConfig(ComponentConfig):
    """Options of `tux_paint`."""

    folder: str
    """What `dpkg -x tuxpaint-stamps-default_*.deb FOLDER` has filled, or the folder `stamps` below it."""
    classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Folders that are the classes, with all below them, as [animals/birds, food/fruit]; the deepest counts. Null takes
    the folder that a picture lies in."""
    minimum: Annotated[int, Field(gt=0)] = 10
    """Classes with fewer pictures are left out; 1 takes every stamp. Not asked of `classes` that are named."""
    photographs: bool | None = None
    """True takes photographs alone, false the rest (drawings, glyphs, doubtful ones); they were told apart by eye."""
    distinct: bool = True
    """Of stamps with one caption (but for capital letters) the first is taken: to `retrieval`, equal captions are wrong
    answers for each other. False takes all, where no caption is read."""


class TuxPaint(DataSource):
    """The stamps of Debian's tuxpaint-stamps-default: for retrieval, classification and segmentation.

    A sample has the picture (`png`, with its alpha), `mask.png` (its class's number where alpha is above one half, else
    0), `classes.txt` (background, then the classes), and a json: `references` (the English caption), `class` (the
    folder in words) and `folder`. What takes a turned stamp's place (NAME_mirror.png) is left out. One split, `test`.
    """

    name = "tux_paint"
    Config = TuxPaintConfig
    examples = (
        {"folder": "no-such-folder/tux"},
        {"folder": "no-such-folder/tux", "classes": ["animals/birds", "food/fruit"], "photographs": True},
    )
    layout = (
        "the stamps in folders by kind, as animals/birds/crow.png and crow.txt; to get them: apt-get download "
        "tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb tux"
    )

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...]:
        return ("test",)

    def sets(self, split: str) -> dict[str, list[Shard]]:
        """One set, `tux_paint`. Raises `DataError`."""
        if split != "test":
            return {}
        base = folder(self.config.folder, self.layout)
        base = base / UNPACKED if (base / UNPACKED).is_dir() else base
        stamps = stamps_below(base)
        if not stamps:
            raise DataError(f"{base}: holds no stamp; expected {self.layout}")
        chosen = self._chosen(base, stamps)
        classes = sorted({about["class"] for about in chosen.values()})
        rows = ({"key": name, "about": about} for name, about in chosen.items())
        options = self.config.model_dump_json(exclude={"folder"})
        return {self.name: listed(f"{base} {options}", rows, Stamps(base.absolute(), tuple(classes)))}

    def _chosen(self, base: Path, stamps: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Stamp -> what its json holds, of those that the options leave. Raises `DataError`."""
        config = self.config
        for parent in config.classes or ():
            if not any(name.startswith(f"{parent.strip('/')}/") for name in stamps):
                raise DataError(f"{base}: classes: no stamp below {parent!r}; name folders, as animals/birds")
        if config.photographs is not None:
            known = set(read_lines(PHOTOGRAPHS, "a stamp a line"))
            stamps = [name for name in stamps if (name in known) == config.photographs]
        kinds = {name: _words(kind) for name in stamps if (kind := _kind(name, config.classes)) is not None}
        large = self._large(kinds)
        chosen: dict[str, dict[str, Any]] = {}
        captions: set[str] = set()
        for name in large:
            caption = _caption(base / f"{name}.txt")
            if config.distinct and caption.casefold() in captions:
                continue
            captions |= {caption.casefold()} - {""}
            about = {"class": kinds[name], "folder": str(PurePosixPath(name).parent)}
            chosen[name] = about | ({"references": [caption]} if caption else {})
        left = self._large({name: about["class"] for name, about in chosen.items()})
        if not left:
            most = max(Counter(kinds[name] for name in chosen or kinds).values(), default=0)
            why = f"; the largest class has {most} of minimum: {config.minimum}" if most else ""
            raise DataError(f"{base}: the options leave none of its stamps{why}; expected {self.layout}")
        return {name: chosen[name] for name in left}

    def _large(self, kinds: Mapping[str, str]) -> list[str]:
        """The stamps whose class has enough of them: before equal captions are dropped, and after."""
        sizes = Counter(kinds.values())
        least = self.config.minimum if self.config.classes is None else 1
        return [name for name, kind in kinds.items() if sizes[kind] >= least]


class Stamp(FileSample):
    """Its mask is made of its alpha when it is asked for."""

    def __init__(self, key: str, path: Path, about: Mapping[str, Any], classes: Sequence[str]) -> None:
        names = "\n".join([BACKGROUND, *classes]).encode()
        encoded = json.dumps(about).encode()
        super().__init__(key, str(path), {"png": path, "json": encoded, "mask.png": path, "classes.txt": names})
        self.number = 1 + classes.index(about["class"])

    def __getitem__(self, name: str) -> Any:
        content = super().__getitem__(name)
        return _mask(content, self.number) if name == "mask.png" else content


@dataclass(frozen=True)
class Stamps:
    """A row `{key, about}` -> the sample."""

    base: Path
    classes: tuple[str, ...]

    def __call__(self, rows: list[tuple[int, Mapping[str, Any]]]) -> Sample:
        ((_, row),) = rows
        return Stamp(row["key"], self.base / f"{row['key']}.png", row["about"], self.classes)


def stamps_below(base: Path) -> list[str]:
    """The names of all below a folder, as animals/birds/crow, a folder's own before those of the folders in it.

    Without mirrored or flipped versions of other stamps.
    """
    images = {path.relative_to(base).with_suffix("").as_posix() for path in base.glob("*/**/*.png")}
    names = (name for name in images if (plain := TURNED.sub("", name)) == name or plain not in images)
    return sorted(names, key=lambda name: name.rpartition("/"))


def _kind(name: str, classes: Sequence[str] | None) -> str | None:
    """The folder that is a stamp's class, if it has one."""
    if classes is not None:
        above = [parent for parent in (option.strip("/") for option in classes) if name.startswith(f"{parent}/")]
        return max(above, key=len, default=None)
    parts = name.split("/")[:-1]
    while len(parts) > 1 and parts[-1] in MADE:
        parts.pop()
    return "/".join(parts)


def _words(kind: str) -> str:
    name = kind.rpartition("/")[2]
    return WORDS.get(name, name.replace("_", " ").replace(",", " ").strip())


def _caption(path: Path) -> str:
    """The first line, which is English; '' where there is none, or it is a translation (`de.utf8=...`)."""
    try:
        line = path.read_bytes().partition(b"\n")[0].decode("utf-8").strip()
    except (OSError, UnicodeDecodeError):  # a task that needs the caption reports it
        return ""
    return "" if ".utf8=" in line else line


def _mask(png: bytes, number: int) -> bytes:
    """A PNG of a picture's size: `number` where alpha is above one half, else 0. Raises `BadSample`."""
    try:
        with Image.open(io.BytesIO(png)) as picture:
            alpha = np.asarray(picture.convert("RGBA"))[..., 3]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample("its mask cannot be made: not a readable picture") from error
    file = io.BytesIO()
    Image.fromarray(np.where(alpha > 127, number, 0).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
