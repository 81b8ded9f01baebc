"""Packages laid out as npm's, with drawings of our own: no test needs the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from distill_core import Sample
from distill_icons.packages import PACKAGES
from distill_icons.scenes import THINGS, IconScenes
from distill_icons.source import IconsSource

HEAD = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"'


def body(seed: int) -> str:
    """A polygon of its own."""
    points = np.random.default_rng(seed).integers(1, 23, (5, 2)).tolist()
    return f'<path d="M{" L".join(f"{x} {y}" for x, y in points)} Z M4 4h5v5h-5z"/>'


def svg(seed: int) -> str:
    return f"{HEAD}>{body(seed)}</svg>"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def mdi(folder: Path) -> None:
    icons = [
        ("account", ["user", "person"], ["Account / User"]),
        ("account-outline", ["user-outline"], ["Account / User"]),
        ("account-plus", ["user-add"], ["Account / User"]),
        ("dog", [], ["Animal"]),
        ("dog-variant", [], ["Animal"]),
        ("github", [], ["Brand / Logo"]),
        ("old-thing", [], []),
    ]
    meta = [
        {"name": name, "aliases": aliases, "tags": tags, "deprecated": name == "old-thing"}
        for name, aliases, tags in icons
    ]
    write(folder / "meta.json", meta)
    for i, (name, _, _) in enumerate(icons):
        write(folder / "svg" / f"{name}.svg", svg(i))


def tabler(folder: Path) -> None:
    icons: dict[str, Any] = {
        "user": {"category": "System", "tags": ["person", "profile"], "styles": {"outline": {}, "filled": {}}},
        "arrow-left": {"category": "Arrows", "tags": ["back", 1], "styles": {"outline": {}}},
        "building": {"category": "Buildings", "tags": ["office"], "styles": {"outline": {}}},
        "building-2": {"category": "Buildings", "tags": ["office"], "styles": {"outline": {}}},
        "dice": {"category": "Games", "tags": [], "styles": {"outline": {}}},
        "dice-1": {"category": "Games", "tags": [], "styles": {"outline": {}}},
        "dice-2": {"category": "Games", "tags": [], "styles": {"outline": {}}},
        "brand-x": {"category": "Brand", "tags": [], "styles": {"outline": {}}},
    }
    write(folder / "icons.json", icons)
    for i, (name, entry) in enumerate(icons.items()):
        for style in entry["styles"]:
            write(folder / "icons" / style / f"{name}.svg", svg(100 + i + 50 * (style == "filled")))


def lucide(folder: Path) -> None:
    tags = {"user": ["account"], "dog": ["pet", "puppy"], "twin": [], "double": [], "nothing": [], "broken": []}
    write(folder / "tags.json", tags)
    drawings = [svg(200), svg(201), svg(202), svg(202).replace("<svg", "<!-- a copy --><svg"), f"{HEAD}></svg>", "<svg"]
    for name, drawing in zip(tags, drawings, strict=True):
        write(folder / "icons" / f"{name}.svg", drawing)


def phosphor(folder: Path) -> None:
    def entry(name: str, categories: str, category: str, tags: str) -> str:
        return (
            f'{{\n readonly name: "{name}";\n readonly pascal_name: "X";\n'
            f" readonly categories: readonly [{categories}];\n"
            f" readonly figma_category: FigmaCategory.{category};\n readonly tags: readonly [{tags}];\n}}"
        )

    entries = [
        entry("acorn", "IconCategory.NATURE", "WEATHER", '"*new*", "nut"'),
        entry("x-logo", "IconCategory.BRAND", "BRAND", ""),
    ]
    write(folder / "dist/icons.d.ts", f"export declare const icons: readonly [{', '.join(entries)}];")
    for i, style in enumerate(("regular", "fill", "duotone")):
        write(folder / f"assets/{style}/acorn{'' if style == 'regular' else '-' + style}.svg", svg(300 + i))


def fontawesome(folder: Path) -> None:
    icons = {
        "dog": {"search": {"terms": ["animal", "canine"]}, "styles": ["solid"]},
        "7": {"search": {"terms": ["seven"]}, "styles": ["solid"]},
        "x": {"search": {"terms": []}, "styles": ["brands"]},
    }
    categories = {"animals": {"icons": ["dog"], "label": "Animals"}, "numbers": {"icons": [7], "label": "Numbers"}}
    write(folder / "metadata/icons.yml", yaml.safe_dump(icons))
    write(folder / "metadata/categories.yml", yaml.safe_dump(categories))
    for i, name in enumerate(("dog", "7", "x")):
        write(folder / f"svgs/solid/{name}.svg", svg(400 + i))


def carbon(folder: Path) -> None:
    def entry(name: str, **more: Any) -> dict[str, Any]:
        assets = [{"size": 16, "filepath": f"16/{name}.svg"}, {"size": 32, "filepath": f"32/{name}.svg"}]
        return {"name": name, "aliases": [], "namespace": [], "assets": assets, "subcategory": "Travel", **more}

    entries = [
        entry("user--avatar", aliases=["person", "IBM Watson"]),
        entry("user--avatar--filled"),
        entry("bee--filled"),
        entry("ibm-cloud"),
        entry("tuba", namespace=["watson-health"]),
        entry("sketch", aliases=["logotype"]),
    ]
    write(folder / "metadata.json", {"icons": entries})
    for i, item in enumerate(entries):
        write(folder / f"svg/32/{item['name']}.svg", svg(500 + i))


def game_icons(folder: Path) -> None:
    """All things that scenes are made of: enough for each split."""
    names = THINGS.read_text().split("\n")[:-1]
    icons = {name.replace(" ", "-"): {"body": body(1000 + i)} for i, name in enumerate(names)}
    write(folder / "icons.json", {"width": 24, "height": 24, "icons": {**icons, "abstract-001": {"body": body(1)}}})


WRITERS = (mdi, tabler, lucide, phosphor, fontawesome, carbon, game_icons)


@pytest.fixture(scope="session")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `npm install --prefix FOLDER` leaves."""
    folder = tmp_path_factory.mktemp("npm")
    for package, writer in zip(PACKAGES, WRITERS, strict=True):
        place = folder / "node_modules" / package.npm
        write(place / "package.json", {"name": package.npm, "version": f"{package.version}-test"})
        writer(place)
    return folder


@pytest.fixture(scope="session")
def made(npm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., IconsSource]:
    """`made(size=24, ...)`: an icons source of these packages; its cache is shared."""
    cache = tmp_path_factory.mktemp("cache")

    def source(**options: Any) -> IconsSource:
        defaults = {"folder": str(npm), "cache": str(cache), "size": 32, "shards": 2}
        return IconsSource(IconsSource.Config(**{**defaults, **options}))

    return source


@pytest.fixture(scope="module")
def scenes(made: Callable[..., IconsSource]) -> list[Sample]:
    """Sixty scenes to train on."""
    icons = made(sets=("game_icons",), shards=1).config
    source = IconScenes(IconScenes.Config(scenes=60, held_out=25, cache=icons.cache, icons=icons))
    source.prepare()
    return [sample for samples in source.samples("train").values() for sample in samples]
