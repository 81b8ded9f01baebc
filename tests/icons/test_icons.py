"""The icons source: what is read of each package, how it is split, and that a picture is what its json says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reading import size_of

from distill_core.errors import DataError
from distill_drawn import shards
from distill_icons import categories, colours, concepts, packages
from distill_icons.packages import Icon
from distill_icons.source import IconsSource

pytest.importorskip("resvg_py")

Make = Callable[..., IconsSource]
SPLITS = ("train", "validation", "test")


def read(npm: Path) -> dict[tuple[str, str], Icon]:
    return {
        (icon.set, icon.name): icon
        for package, (folder, _) in packages.installed(npm).items()
        for icon in package.read(folder)
    }


def every_sample(source: IconsSource) -> list[dict[str, Any]]:
    """All samples, with their split and json."""
    source.prepare()
    return [
        {**sample, "split": split, "record": json.loads(sample["json"])}
        for split in SPLITS
        for samples in source.samples(split).values()
        for sample in samples
    ]


@pytest.fixture(scope="module")
def samples(made: Make) -> list[dict[str, Any]]:
    return every_sample(made())


def icon(which: str = "lucide", name: str = "dog", tags: tuple[str, ...] = (), about: tuple[str, ...] = ()) -> Icon:
    return Icon(which, name, tags, about, None, "<svg/>")


def test_each_package_is_read_by_its_own_layout(npm: Path) -> None:
    """Would catch a set that is lost, a brand's logo, and a style that stays in a name."""
    found = read(npm)
    assert {which for which, _ in found} == set(packages.SETS)
    assert {name for which, name in found if which == "mdi"} == {"account", "account plus", "dog", "dog variant"}
    assert found["mdi_outline", "account"].tags == ("user",)
    assert found["tabler", "arrow left"].tags == ("back", "1")
    assert {name for which, name in found if which.startswith("phosphor")} == {"acorn"}
    assert found["phosphor_duotone", "acorn"].tags == ("nut",)
    assert found["fontawesome", "7"].categories == ("Numbers",)
    assert {name for which, name in found if which == "fontawesome"} == {"dog", "7"}
    # filled only where there is no other; no product's signs
    assert {name for which, name in found if which == "carbon"} == {"user avatar", "bee"}
    assert found["carbon", "user avatar"].tags == ("person",)
    assert all(one.svg.startswith("<") for one in found.values())


def test_a_missing_package_is_named_with_the_command_that_gets_it(npm: Path, tmp_path: Path) -> None:
    copy = tmp_path / "npm"
    shutil.copytree(npm, copy)
    shutil.rmtree(copy / "node_modules/@mdi/svg")
    (copy / "node_modules/lucide-static/package.json").write_text("{")
    source = IconsSource(IconsSource.Config(folder=str(copy), cache=str(tmp_path)))
    with pytest.raises(DataError, match=r"needs @mdi/svg, lucide-static in .*: npm install .* @mdi/svg@\d.* @tabler/"):
        source.prepare()


@pytest.mark.parametrize(("file", "text"), [("@mdi/svg/meta.json", "[{}]"), ("@tabler/icons/icons.json", "[")])
def test_a_package_of_another_layout_is_a_data_error(npm: Path, tmp_path: Path, file: str, text: str) -> None:
    copy = tmp_path / "npm"
    shutil.copytree(npm, copy)
    (copy / "node_modules" / file).write_text(text)
    with pytest.raises(DataError, match=r"not as expected .*npm install"):
        IconsSource(IconsSource.Config(folder=str(copy), cache=str(tmp_path))).prepare()


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("arrow left", "arrow"),
        ("circle arrow left", "arrow"),
        ("account plus", "account"),
        ("bells off", "bell"),
        ("battery charging 80", "battery charging"),
        ("glass", "glass"),
        ("bus", "bus"),
        ("lock", "lock"),
        ("square rounded letter a", "letter"),
        ("dog bowl", "dog bowl"),
    ],
)
def test_marks_directions_and_frames_are_no_part_of_the_base(name: str, base: str) -> None:
    assert concepts.base(name) == base


def test_names_that_mdi_has_as_aliases_share_a_group() -> None:
    """Would catch `user plus` in training and `account plus` in test; and all names in one group by way of `add`."""
    icons = [
        icon("mdi", "account", ("user", "person")),
        icon("mdi", "account plus", ("add user",)),
        icon("mdi", "bell plus", ("add alert",)),
        icon("mdi", "paper plus", ("add paper",)),
        icon("tabler", "user minus"),
        icon("tabler", "add"),
    ]
    group = concepts.groups(icons)
    assert group("account plus") == group("user minus") == group("account")
    assert len({group("account"), group("bell plus"), group("paper plus"), group("add")}) == 4


def test_captions_are_of_the_names_tags_and_categories() -> None:
    chosen, _ = concepts.load(
        [icon(tags=("pet", "dogs", "puppy", "pup", "man's_best-friend"), about=("Food / Drink",))]
    )
    assert chosen[0].captions == [
        "dog",
        "an icon of dog",
        "this food or drink belongs to food and drink",
        "it is about pet, puppy and pup",
        "it goes with man's best friend",
    ]


def test_an_icon_without_tags_has_those_of_its_name_elsewhere() -> None:
    chosen, _ = concepts.load([icon("game_icons"), icon("lucide", tags=("pet",)), icon("mdi", tags=("hound",))])
    words = {one.icon.set: one.keywords for one in chosen}
    assert words == {"game_icons": ("pet", "hound"), "lucide": ("pet",), "mdi": ("hound",)}


def test_a_class_is_what_all_categories_say() -> None:
    assert categories.class_of(["Animal", "Animals", "System"]) == "animal"
    assert categories.class_of(["Animal", "Vehicles"]) is None
    assert categories.class_of(["Commerce"]) is None
    named = [name for of in categories.CLASSES.values() for name in of]
    assert len(named) == len(set(named)), "a category of two classes"


def test_second_drawings_are_left_out_and_series_are_not(made: Make, samples: list[dict[str, Any]]) -> None:
    names = {(s["record"]["set"], s["record"]["name"]) for s in samples}
    assert {("tabler", "building"), ("tabler", "dice"), ("tabler", "dice 1"), ("tabler", "dice 2")} <= names
    assert not {("tabler", "building 2"), ("mdi", "dog variant"), ("game_icons", "abstract 001")} & names


def test_what_is_left_out_is_counted_and_named(npm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = IconsSource(IconsSource.Config(folder=str(npm), cache=str(tmp_path), size=16, shards=1, sets=("lucide",)))
    source.prepare()
    left = [(k, v) for e in shards.read_manifest(source.folder).values() for k, v in e.left_out.items()]
    reasons = dict(left)
    assert reasons["twin"] == "the same picture as double"
    assert reasons["nothing"] == "blank"
    assert reasons["broken"].startswith("lucide-broken: ")
    assert len(left) == 3
    assert sum(size_of(source, split) for split in SPLITS) == 3
    assert "left out 1 with the picture of a like concept, 2 more: broken (lucide), nothing" in capsys.readouterr().err


def colour_of(name: str, code: str) -> colours.Colour:
    red, green, blue = bytes.fromhex(code[1:])
    return colours.Colour(name, (red, green, blue))


def test_pictures_are_what_their_json_says(samples: list[dict[str, Any]]) -> None:
    """Would catch an icon that cannot be seen on white, one that fills its picture, and a colour that is not drawn."""
    for sample in samples:
        record = sample["record"]
        with Image.open(BytesIO(sample["png"])) as opened:
            assert (opened.mode, opened.size) == ("RGBA", (32, 32))
            picture = np.asarray(opened)
        colour = colour_of(record["colour"], record["rgb"])
        solid = picture[..., 3] == 255
        assert (picture[solid][:, :3] == colour.rgb).all()
        assert 0 < solid.sum() < solid.size
        assert (picture[..., 3] == 0).any()
        assert colours.contrast(colour, colours.Colour("white", (255, 255, 255))) >= 3
        assert sample["__key__"].startswith(f"{record['set']}-")


def test_grounds_are_of_another_colour(made: Make, samples: list[dict[str, Any]]) -> None:
    """The ground is around the icon, both bear their names, and they can be told apart; the shape is the same."""
    shapes = {sample["__key__"]: np.asarray(Image.open(BytesIO(sample["png"])))[..., 3] for sample in samples}
    for sample in every_sample(made(grounds=True)):
        record, alpha = sample["record"], shapes[sample["__key__"]]
        picture = np.asarray(Image.open(BytesIO(sample["png"])))
        assert picture.shape == (32, 32, 3)
        colour = colour_of(record["colour"], record["rgb"])
        ground = colour_of(record["ground"], record["ground_rgb"])
        assert (picture[alpha == 0] == ground.rgb).all()
        assert (picture[alpha == 255] == colour.rgb).all()
        assert colour.name != ground.name
        assert colours.contrast(colour, ground) >= 3


@pytest.mark.parametrize(
    ("name", "true"),
    [
        ("red", lambda r, g, b: r > 2 * max(g, b)),
        ("green", lambda r, g, b: g > 1.3 * max(r, b)),
        ("blue", lambda r, g, b: b > 1.5 * max(r, g)),
        ("yellow", lambda r, g, b: min(r, g) > 2 * b and g > 0.8 * r),
        ("orange", lambda r, g, b: r > g > b and 0.35 < g / r < 0.65 and r > 230),
        ("brown", lambda r, g, b: r > g > b and r < 130),
        ("pink", lambda r, g, b: r > b > g > 90),
        ("purple", lambda r, g, b: b > r > g),
        ("black", lambda r, g, b: max(r, g, b) < 30),
        ("white", lambda r, g, b: min(r, g, b) > 235),
        ("grey", lambda r, g, b: max(r, g, b) - min(r, g, b) < 10 and 95 < g < 165),
    ],
)
def test_colours_bear_their_names(name: str, true: Callable[[int, int, int], bool]) -> None:
    """An independent reading of each name, over 2,000 draws."""
    rng = np.random.default_rng()
    found = [one for one in (colours.drawn(rng) for _ in range(2000)) if one.name == name]
    assert len(found) > 100
    assert [one for one in found if not true(*one.rgb)] == []


def test_no_group_is_in_two_splits(samples: list[dict[str, Any]]) -> None:
    where: dict[str, set[str]] = {}
    for sample in samples:
        where.setdefault(sample["record"]["group"], set()).add(sample["split"])
    assert all(len(splits) == 1 for splits in where.values())
    shares = {split: sum(splits == {split} for splits in where.values()) / len(where) for split in SPLITS}
    assert shares["test"] == pytest.approx(0.15, abs=0.06)
    assert shares["validation"] == pytest.approx(0.1, abs=0.06)


def test_the_split_and_the_words_of_a_set_do_not_depend_on_the_others(
    made: Make, samples: list[dict[str, Any]]
) -> None:
    """Would catch a model that was trained on one set's training icons and tested on what they were in another run."""
    alone = every_sample(made(sets=("tabler",)))
    expected = {s["__key__"]: (s["split"], s["record"]) for s in samples if s["record"]["set"] == "tabler"}
    assert {s["__key__"]: (s["split"], s["record"]) for s in alone} == expected


def test_keys_are_unique_and_sizes_true(made: Make, samples: list[dict[str, Any]]) -> None:
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    for split in SPLITS:
        assert size_of(made(), split) == sum(sample["split"] == split for sample in samples)


def test_bytes_are_the_same_in_another_folder(made: Make, tmp_path: Path) -> None:
    first, second = made(limit=5), made(limit=5, cache=str(tmp_path))
    first.prepare()
    second.prepare()
    assert first.folder.name == second.folder.name
    names = list(first.plan())
    assert [(first.folder / n).read_bytes() for n in names] == [(second.folder / n).read_bytes() for n in names]


def test_other_options_and_versions_have_another_folder(made: Make, npm: Path, tmp_path: Path) -> None:
    copy = tmp_path / "npm"
    shutil.copytree(npm, copy)
    folders = {
        made(**options).folder.name
        for options in ({}, {"size": 33}, {"limit": 4}, {"sets": ("mdi",)}, {"grounds": True})
    }
    assert made(folder=str(copy)).folder.name in folders, "a copy of the same packages is the same"
    (copy / "node_modules/@mdi/svg/package.json").write_text('{"version": "8"}')
    folders.add(made(folder=str(copy)).folder.name)
    assert len(folders) == 6


@pytest.mark.slow
def test_it_trains_and_is_evaluated(npm: Path, tmp_path: Path) -> None:
    """Two steps of CLIP, then retrieval, zero-shot classification, nearest neighbours, and composition on scenes."""
    from distill_core.cli import main

    options = f"{{name: icons, folder: {npm}, cache: {tmp_path}, size: 24, shards: 1, sets: [game_icons, tabler]}}"
    scenes = f"{{name: icon_scenes, scenes: 5, held_out: 20, cache: {tmp_path}, icons: {options}}}"
    scenes = scenes.replace("icons: {name: icons, ", "icons: {")
    fields = "images: [png], captions: [caption_0, caption_1, caption_2]"
    tasks = (
        "[{name: retrieval}, {name: zero_shot, label: colour}, {name: knn, label: colour},"
        f" {{name: composition, {fields}, source: {scenes}}}]"
    )
    sets = {
        "data.source": options,
        "data.batch_size": 16,
        "data.workers": 0,
        "train.steps": 2,
        "evaluate.every": 2,
        "evaluate.tasks": tasks,
    }
    assigned = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    main(["run", "clip_tiny", "--runs", str(tmp_path / "runs"), "--quiet", *assigned])
    (report,) = (tmp_path / "runs").glob("*/report.json")
    scores = json.loads(report.read_text())["scores"]
    names = {(row["task"], row["set"]) for row in scores}
    assert {(task, "game_icons") for task in ("retrieval", "zero_shot", "knn")} | {("composition", "scenes")} <= names


@pytest.mark.slow
def test_both_sources_conform(npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `distill check-plugin icons` does where the packages are."""
    from distill_authoring.conformance import assert_conforms
    from distill_icons.scenes import IconScenes

    icons = {"folder": str(npm), "cache": str(tmp_path), "size": 16, "shards": 1, "sets": ("game_icons",)}
    monkeypatch.setattr(IconsSource, "examples", (icons,))
    assert_conforms(IconsSource)
    monkeypatch.setattr(IconScenes, "examples", ({"scenes": 4, "held_out": 2, "cache": str(tmp_path), "icons": icons},))
    assert_conforms(IconScenes)
