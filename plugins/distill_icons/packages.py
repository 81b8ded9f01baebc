"""The icon sets: npm packages of SVG files, with the names, tags and categories that their authors wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from distill_core import DataError, cache_folder

SetName = Literal[
    "mdi",
    "mdi_outline",
    "tabler",
    "tabler_filled",
    "lucide",
    "phosphor",
    "phosphor_fill",
    "phosphor_duotone",
    "fontawesome",
    "carbon",
    "game_icons",
]
"""A package in one style."""
SETS: tuple[SetName, ...] = get_args(SetName)

STYLES = {"outline", "outlined", "filled", "fill", "solid"}
"""Words at the end of a name that say how an icon is drawn, and not what it shows."""


@dataclass(frozen=True)
class Icon:
    """An icon as its package has it. Of an icon in two styles there are two."""

    set: str
    """One of `SETS`."""
    name: str
    """In lower case, words separated by spaces, without the style."""
    tags: tuple[str, ...]
    """Tags, aliases and search terms, as they are written."""
    categories: tuple[str, ...]
    file: Path | None
    body: str = ""
    """The SVG itself, where it is not a file of its own."""

    @property
    def svg(self) -> str:
        """The SVG document."""
        return self.body if self.file is None else self.file.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Package:
    """An npm package, the version that docs/icons.md has counted, and how its icons are read from its folder."""

    npm: str
    version: str
    read: Callable[[Path], Iterator[Icon]]


def _words(name: str) -> list[str]:
    return re.findall(r"[^\s_-]+", name.lower())


def _plain(name: str) -> tuple[str, str]:
    """A name without the style at its end, and the style: `home-outline` -> `home`, `outline`."""
    words = _words(name)
    if len(words) > 1 and words[-1] in STYLES:
        return " ".join(words[:-1]), words[-1]
    return " ".join(words), ""


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _mdi(folder: Path) -> Iterator[Icon]:
    for entry in _json(folder / "meta.json"):
        if entry["deprecated"] or "Brand / Logo" in entry["tags"]:
            continue
        name, style = _plain(entry["name"])
        aliases = [" ".join(word for word in _words(alias) if word not in STYLES) for alias in entry["aliases"]]
        file = folder / "svg" / f"{entry['name']}.svg"
        yield Icon("mdi_outline" if style.startswith("outline") else "mdi", name, (*aliases,), (*entry["tags"],), file)


def _tabler(folder: Path) -> Iterator[Icon]:
    for name, entry in _json(folder / "icons.json").items():
        if entry["category"] == "Brand":
            continue
        for style in entry["styles"]:
            file = folder / "icons" / style / f"{name}.svg"
            which = "tabler" if style == "outline" else f"tabler_{style}"
            yield Icon(which, " ".join(_words(name)), (*map(str, entry["tags"]),), (entry["category"],), file)


def _lucide(folder: Path) -> Iterator[Icon]:
    for name, tags in _json(folder / "tags.json").items():  # names of old, which it lacks, have the same drawings
        yield Icon("lucide", " ".join(_words(name)), (*tags,), (), folder / "icons" / f"{name}.svg")


_PHOSPHOR = re.compile(
    r'readonly name: "([^"]+)";.*?readonly categories: readonly \[([^\]]*)\];'
    r".*?readonly figma_category: FigmaCategory\.(\w+);.*?readonly tags: readonly \[([^\]]*)\];",
    re.DOTALL,
)


def _phosphor(folder: Path) -> Iterator[Icon]:
    # its catalogue is code; the declarations of types hold it as plain literals
    for match in _PHOSPHOR.finditer((folder / "dist/icons.d.ts").read_text(encoding="utf-8")):
        name, categories, category, quoted = match.groups()
        if "IconCategory.BRAND" in categories or category == "BRAND":
            continue
        tags = tuple(tag for tag in re.findall(r'"([^"]*)"', quoted) if "*" not in tag)
        for style in ("regular", "fill", "duotone"):
            end = "" if style == "regular" else f"-{style}"
            file = folder / "assets" / style / f"{name}{end}.svg"
            which = "phosphor" + end.replace("-", "_")
            yield Icon(which, " ".join(_words(name)), tags, (category.lower(),), file)


def _fontawesome(folder: Path) -> Iterator[Icon]:
    icons = yaml.load(
        (folder / "metadata/icons.yml").read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    categories: dict[str, list[str]] = {}
    for entry in yaml.safe_load((folder / "metadata/categories.yml").read_text(encoding="utf-8")).values():
        for name in entry["icons"]:
            categories.setdefault(str(name), []).append(entry["label"])
    for name, entry in icons.items():
        if "solid" not in entry["styles"]:  # brands
            continue
        terms = tuple(str(term) for term in entry["search"]["terms"])
        file = folder / "svgs/solid" / f"{name}.svg"
        yield Icon("fontawesome", " ".join(_words(str(name))), terms, (*categories.get(str(name), ()),), file)


_IBM = re.compile(r"(?i)\b(ibm|watsonx?|red-hat|carbon-for|logo)\b")


def _carbon(folder: Path) -> Iterator[Icon]:
    entries = _json(folder / "metadata.json")["icons"]
    plain = {entry["name"] for entry in entries}
    for entry in entries:
        name, style = _plain(entry["name"])
        if style and entry["name"].lower().rpartition("--")[0] in plain:
            continue  # filled ones are few: only where there is no other
        if entry.get("deprecated") or entry["namespace"] or entry.get("category") == "Brand":
            continue  # a namespace is that of one product
        if _IBM.search(entry["name"]) or "logotype" in entry["aliases"]:
            continue
        largest = max(entry["assets"], key=lambda asset: asset["size"] if isinstance(asset["size"], int) else 0)
        tags = tuple(alias for alias in entry["aliases"] if not _IBM.search(alias))
        about = tuple(filter(None, [entry.get("subcategory")]))
        yield Icon("carbon", name, tags, about, folder / "svg" / largest["filepath"])


def _game_icons(folder: Path) -> Iterator[Icon]:
    icons = _json(folder / "icons.json")
    for name, entry in icons["icons"].items():
        width, height = (entry.get(side, icons.get(side, 16)) for side in ("width", "height"))
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
        yield Icon("game_icons", " ".join(_words(name)), (), (), None, f"{head}{entry['body']}</svg>")


PACKAGES = (
    Package("@mdi/svg", "7.4.47", _mdi),
    Package("@tabler/icons", "3.52.0", _tabler),
    Package("lucide-static", "1.62.0", _lucide),
    Package("@phosphor-icons/core", "2.1.1", _phosphor),
    Package("@fortawesome/fontawesome-free", "7.3.1", _fontawesome),
    Package("@carbon/icons", "11.89.0", _carbon),
    Package("@iconify-json/game-icons", "1.2.4", _game_icons),
)


def default_folder() -> Path:
    """Where the packages are looked for, and where `how_to_get` puts them."""
    return cache_folder() / "npm"


def how_to_get(folder: Path) -> str:
    """The command that fetches all packages."""
    names = " ".join(f"{package.npm}@{package.version}" for package in PACKAGES)
    return f"npm install --ignore-scripts --prefix {folder} {names}"


def installed(folder: Path) -> dict[Package, tuple[Path, str]]:
    """Each package's folder and version. Raises `DataError` naming those that are missing, and how to get them."""
    places = {}
    for package in PACKAGES:
        place = folder / "node_modules" / package.npm
        try:
            places[package] = place, str(_json(place / "package.json")["version"])
        except (OSError, ValueError, KeyError):
            continue
    if missing := [package.npm for package in PACKAGES if package not in places]:
        raise DataError(f"icons data needs {', '.join(missing)} in {folder}: {how_to_get(folder)}")
    return places
