"""Recipes by name: what is listed, what a name stands for, and what is said of a wrong one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from distill_core import hookimpl
from distill_core.cli import main
from distill_core.errors import PluginError, RecipeErrors
from distill_core.recipe.named import named_recipes, recipe_file
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Plugins, Registry

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names are for folders that hold no recipe."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_all_of_the_repository_are_listed_with_their_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a recipe without a head line, a name that two files have, and a stale copy."""
    files = sorted((ROOT / "recipes").rglob("*.yaml"))
    main(["recipes", "--json"])
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert sorted(Path(row["path"]) for row in listed.values()) == files
    studies = {name for name, row in listed.items() if row["folder"] == "studies"}
    assert studies == {path.stem for path in files if path.parent.name == "studies"} >= {"cosmos_table5", "methods"}
    for path in files:
        assert path.read_text().splitlines()[0] == f"# {listed[path.stem]['about']}"
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line and not line.endswith("/")] == list(listed)
    about = listed["cosmos_tiny"]["about"]
    assert about.startswith("COSMOS on the embedded emoji data")
    assert any(line.split() == ["cosmos_tiny", *about.split()] for line in lines)


@pytest.mark.slow
def test_commands_take_names(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC3M", raising=False)
    main(["validate", "clip_tiny", "cosmos_vitb16", "--quiet"])
    main(["show", "clip_tiny", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["loss"][0]["name"]) == ("clip_tiny", "clip")
    main(["ablate", "clip_tiny", "--swap", "loss.0.weight=1,2", "--check", "--json"])
    study = json.loads(capsys.readouterr().out)
    assert (study["name"], len(study["variants"])) == ("clip_tiny-swaps", 2)
    main(["ablate", "cosmos_table5", "--check", "--json"])
    study = json.loads(capsys.readouterr().out)
    assert {Path(row["recipe"]) for row in study["variants"]} == {
        ROOT / "recipes/cosmos_tiny.yaml",
        ROOT / "recipes/clip_tiny.yaml",
    }


def test_a_file_wins_over_a_name(empty_folder: Path, registry: Registry, tmp_path: Path) -> None:
    """A copy that was changed is what its owner means. Would catch the original that is trained in its place."""
    main(["recipes", "copy", "clip_tiny", "clip_tiny.yaml"])
    text = (ROOT / "recipes/clip_tiny.yaml").read_text()
    assert (empty_folder / "clip_tiny.yaml").read_text() == text
    (empty_folder / "clip_tiny.yaml").write_text(text.replace("steps: 250", "steps: 7"))
    assert recipe_file("clip_tiny") == Path("clip_tiny.yaml")
    assert load_recipe("clip_tiny", registry=registry).train.steps == 7
    assert recipe_file("clip_tiny", tmp_path) == ROOT / "recipes/clip_tiny.yaml"
    (empty_folder / "cosmos_tiny").write_text(text)
    assert recipe_file("cosmos_tiny") == Path("cosmos_tiny")
    (empty_folder / "dino_tiny").mkdir()  # a run's folder is no recipe
    assert recipe_file("dino_tiny") == ROOT / "recipes/dino_tiny.yaml"


def test_copies(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a file that is written over, and a study whose recipes are not found from where its copy lies."""
    main(["recipes", "copy", "cosmos_table5", "."])
    assert capsys.readouterr().out == "cosmos_table5.yaml\n"
    main(["ablate", "cosmos_table5.yaml", "--check", "--json"])
    assert len(json.loads(capsys.readouterr().out)["variants"]) == 9
    line = "cosmos_table5.yaml exists; choose another name"
    assert refused(capsys, "recipes", "copy", "cosmos_table5", "cosmos_table5.yaml") == line
    assert refused(capsys, "recipes", "copy", "clip_tinny", "x.yaml") == (
        "no recipe is named 'clip_tinny', did you mean 'clip_tiny'?"
    )
    assert refused(capsys, "recipes", "copy", "clip_tiny", "no/x.yaml").startswith(
        "no/x.yaml: cannot be written: No such"
    )
    assert [path.name for path in empty_folder.iterdir()] == ["cosmos_table5.yaml"]


def test_wrong_names(capsys: pytest.CaptureFixture[str], empty_folder: Path) -> None:
    (empty_folder / "mine.yaml").touch()
    nothing = "no such file, and no recipe of this name"
    assert refused(capsys, "run", "cosmos_tyni") == f"cosmos_tyni: {nothing}, did you mean 'cosmos_tiny'?"
    assert refused(capsys, "run", "mime") == f"mime: {nothing}, did you mean 'mine'?"
    assert refused(capsys, "show", "wwww") == f"wwww: {nothing}; `distill recipes` lists the names"
    assert refused(capsys, "validate", "recipes/clip_tiny.yaml") == (
        "recipes/clip_tiny.yaml: no such file; there is a recipe of this name: write clip_tiny, or copy it with "
        "distill recipes copy clip_tiny FILE"
    )
    study = ROOT / "recipes/studies/cosmos_table5.yaml"
    assert refused(capsys, "run", "cosmos_table5") == f"{study}: is a study, and no recipe: distill ablate {study}"
    (empty_folder / "s.yaml").write_text("variants: {a: {}, b: {seed: 1}}\nrecipe: clip_tinny\n")
    with pytest.raises(SystemExit):
        main(["ablate", "s.yaml", "--check"])
    assert f"s.yaml:2: recipe: clip_tinny: {nothing}, did you mean 'clip_tiny'?" in capsys.readouterr().err.splitlines()


def test_a_strangers_package_brings_recipes(
    tmp_path: Path,
    install_plugin: Callable[[Path, Path], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the same hook, as package data. Would catch a door that only the built-in recipes come through."""
    project = tmp_path / "project"
    recipes = project / "birds_plugin" / "recipes"
    recipes.mkdir(parents=True)
    (project / "birds_plugin/__init__.py").write_text(
        "from pathlib import Path\nfrom distill_core import hookimpl\n\n\n@hookimpl\ndef distill_recipes():\n"
        "    return [Path(__file__).with_name('recipes')]\n"
    )
    (project / "pyproject.toml").write_text(
        '[project]\nname = "birds-plugin"\nversion = "1"\n[project.entry-points.distill]\nbirds = "birds_plugin"\n'
    )
    data = yaml.safe_load((ROOT / "recipes/clip_tiny.yaml").read_text())
    (recipes / "birds.yaml").write_text("# CLIP on birds.\n" + yaml.safe_dump(data))
    monkeypatch.syspath_prepend(install_plugin(project, tmp_path / "site"))
    main(["recipes", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["birds"]["package"], rows["birds"]["about"]) == ("birds-plugin", "CLIP on birds.")
    main(["validate", "birds"])
    assert capsys.readouterr().out == "birds: ok\n"
    main(["recipes", "--without", "birds", "--json"])
    assert "birds" not in capsys.readouterr().out


def test_two_recipes_of_one_name_and_folders_that_are_not_there(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.yaml").touch()
    plugins = Plugins()
    for name in ("a", "b"):
        folder = tmp_path / name
        plugins.add(name, SimpleNamespace(distill_recipes=hookimpl(lambda folder=folder: [folder])), f"package-{name}")
    with pytest.raises(
        PluginError, match=r"two recipes are named 'same': .* of package-. and .* of package-.\. Rename"
    ):
        named_recipes(plugins)
    plugins = Plugins()
    gone = tmp_path / "gone"
    plugins.add("c", SimpleNamespace(distill_recipes=hookimpl(lambda: [gone])), "package-c")
    with pytest.raises(PluginError, match=rf"plugin 'c' \(package package-c\): its folder of recipes {gone} does not"):
        named_recipes(plugins)


def test_a_missing_path_is_left_to_the_reader(registry: Registry) -> None:
    with pytest.raises(RecipeErrors, match=r"^no/such\.yaml: no such recipe"):
        load_recipe("no/such.yaml", registry=registry)
