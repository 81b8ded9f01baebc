"""The reader of captions of docs/plugins.md: as short as it says, checked, and read from when a recipe names it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from grey_pictures import picture

from distill_authoring.conformance import assert_conforms, check
from distill_core.errors import RecipeErrors
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Plugins, Registry

PAGE = (Path(__file__).parents[2] / "docs/plugins.md").read_text()
PROJECT = """\
[project]
name = "subtitles"
version = "1"
entry-points.distill.subtitles = "subtitles"
"""
SPOKEN = b"1\n00:00:01,0 --> 00:00:02,5\nA gull over the harbour.\nIt cries.\n"


@pytest.fixture
def site(
    tmp_path: Path, install_plugin: Callable[[Path, Path], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The package of the page, installed."""
    files = dict(re.findall(r"```python\n# (subtitles/\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
    assert set(files) == {"subtitles/__init__.py", "subtitles/reader.py"}
    for name, text in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "project" / "pyproject.toml").write_text(PROJECT)
    site = install_plugin(tmp_path / "project", tmp_path / "site")
    monkeypatch.syspath_prepend(site)
    yield site
    for name in [name for name in sys.modules if name.partition(".")[0] == "subtitles"]:
        del sys.modules[name]  # the next test has a copy of its own


def test_a_reader_is_about_20_lines_of_what_is_public(site: Path) -> None:
    reader = (site / "subtitles/reader.py").read_text()
    assert sum(bool(line.strip()) for line in reader.splitlines()) <= 20
    assert re.findall(r"^(?:from|import) (\w+(?:\.\w+)?)", reader, re.MULTILINE) == [
        "distill_core", "distill_vl.caption_readers",
    ]  # fmt: skip


def test_it_conforms_and_broken_ones_do_not(site: Path) -> None:
    """By the checks of the kind, which the plugin that defines it gives. Would catch checks that no reader fails."""
    plugins = Plugins.discover()
    cases = plugins.conformance_cases()
    reader = Registry.discover(plugins).get("caption_reader", "subtitles").cls
    assert_conforms(reader, cases)
    names = {result.check for result in check(reader, cases=cases)}
    assert {"reads_captions", "bad_captions", "documented"} <= names

    class Decodes(reader):  # type: ignore[misc, valid-type]
        """Its error ends the run."""

        def captions(self, sample):  # type: ignore[no-untyped-def]
            return {"spoken": sample["srt"].decode().splitlines()}

    class OneText(reader):  # type: ignore[misc, valid-type]
        """A text in place of a list, whose letters would be captions."""

        def captions(self, sample):  # type: ignore[no-untyped-def]
            return {"spoken": "a text"}

    class Changes(reader):  # type: ignore[misc, valid-type]
        """Takes the field away from others."""

        def captions(self, sample):  # type: ignore[no-untyped-def]
            return {"spoken": [sample.pop("srt", b"").decode(errors="replace")]}

    class Invents(reader):  # type: ignore[misc, valid-type]
        """Has a text of each name."""

        def named(self, sample, names):  # type: ignore[no-untyped-def]
            return {name: ["a text"] for name in names} if "spoken" not in names else self.captions(sample)

    for broken, name, message in (
        (Decodes, "bad_captions", "no field raises KeyError: 'srt'; raise BadSample"),
        (OneText, "reads_captions", "'spoken' is 'a text'"),
        (Changes, "reads_captions", "`named`, of the fields of `captions`, differs"),
        (Invents, "reads_captions", "`named` must leave out what is not there"),
    ):
        (result,) = check(broken, only=[name], cases=cases)
        assert (result.status, message in result.message) == ("failed", True), result


def test_a_recipe_names_it(site: Path, tiny_recipe: Path) -> None:
    """Would catch a name that the option does not look up, and options that do not apply to its texts."""
    registry = Registry.discover()
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=["augment.text.layout=subtitles"])
    texts = recipe.augment["text"].build()
    assert texts.pool({"__key__": "k", "__url__": "u", "srt": SPOKEN}) == ["A gull over the harbour", "It cries"]
    assert recipe.to_dict()["augment"]["text"]["layout"] == {"name": "subtitles"}
    assert load_recipe(tiny_recipe, registry=registry).augment["text"].config.layout.path == "augment.text.layout"
    with pytest.raises(RecipeErrors, match="no caption_reader named 'subtitle', did you mean 'subtitles'"):
        load_recipe(tiny_recipe, registry=registry, overrides=["augment.text.layout=subtitle"])
    with pytest.raises(RecipeErrors, match=r"augment\.text\.layout\.language: unknown option 'language'"):
        load_recipe(tiny_recipe, registry=registry, overrides=["augment.text.layout={name: subtitles, language: de}"])


@pytest.mark.slow
def test_a_run_trains_on_what_it_reads(
    site: Path, tiny_recipe: Path, tmp_path: Path, write_shards: Callable[..., list[Path]]
) -> None:
    """In loader workers, from the command line, and scored. Would catch a reader that does not reach them."""
    sample = {"png": picture(tmp_path / "grey.png").read_bytes(), "srt": SPOKEN}
    for prefix, shards in (("train", 3), ("validation", 1), ("test", 1)):
        samples = {(i, j): sample for i in range(shards) for j in range(4)}
        write_shards(tiny_recipe.parent / "shards", shards, 4, prefix=prefix, replace=samples)
    command = [sys.executable, "-m", "distill_core.cli", "run", str(tiny_recipe), "--runs", str(tmp_path / "runs")]
    options = ["--quiet", "--set", "augment.text.layout=subtitles", "--set", "data.workers=1"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert sum("terms" in row for row in rows) == 4
    assert not (tmp_path / "runs/tiny/skipped.jsonl").exists()
