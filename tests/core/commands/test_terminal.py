"""What a person meets at the terminal: completion, `distill doctor`, tables, and no colour where none is wanted."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.shell_completion import ShellComplete
from rich.console import Console
from score_values import means

import distill_core.commands.doctor as doctor
from distill_core import hookimpl
from distill_core.cli import cli, main
from distill_core.commands import completion
from distill_core.contracts.diagnostic import Diagnostic
from distill_core.errors import PluginError
from distill_core.evaluate.score import TaskScore
from distill_core.registry import Plugins, Registry
from distill_core.run import display
from distill_core.run.display import mean_table, per_second, print_scores
from distill_core.system.extras import project
from distill_core.system.files import cache_folder, in_words, size_of


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Registry) -> Callable[..., list[str]]:
    """`complete("run", "rec")`: what the shell is offered for the last word, in an empty folder with a cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    completion.update_cache(registry)

    def offer(*words: str) -> list[str]:
        found = ShellComplete(cli, {}, "distill", "_DISTILL_COMPLETE").get_completions(list(words[:-1]), words[-1])
        return [item.value for item in found]

    return offer


Complete = Callable[..., list[str]]


def test_commands_files_and_names_are_completed(complete: Complete, tmp_path: Path) -> None:
    """Would catch a word that is not offered, and one that does not fit what is written."""
    for name in ("recipes/a.yaml", "recipes/b.yaml", "c.yaml", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("loss: [{name: contrastive}]\n")
    for run, steps in (("one", (5, 10)), ("two", ())):
        (tmp_path / "runs" / run / "checkpoints").mkdir(parents=True)
        (tmp_path / "runs" / run / "recipe.yaml").write_text("seed: 1\n")
        for step in steps:
            (tmp_path / "runs" / run / "checkpoints" / f"step-{step:08d}.pt").touch()
    (tmp_path / "runs" / "none").mkdir()
    assert {"run", "resume", "eval", "doctor", "kernels", "ui"} <= set(complete(""))
    assert complete("run", "")[:3] == ["c.yaml", "recipes/a.yaml", "recipes/b.yaml"]
    assert "cosmos_tiny" in complete("run", "")
    assert complete("recipes", "copy", "cosmos_ti") == ["cosmos_tiny"]
    assert "fusion.heads" in complete("run", "cosmos_tiny", "--set", "fusion.")
    assert complete("run", "recipes/") == ["recipes/a.yaml", "recipes/b.yaml"]
    assert complete("validate", "c.yaml", "recipes/b") == ["recipes/b.yaml"]
    assert complete("resume", "") == ["runs/one", "runs/two"]
    assert complete("eval", "runs/t") == ["runs/two"]
    assert complete("eval", "runs/one", "--checkpoint", "") == ["last", "5", "10"]
    assert complete("eval", "runs/one", "--set", "see") == ["seed"]
    assert complete("compare", "runs/one", "runs/") == ["runs/one", "runs/two"]
    assert complete("ablate", "recipes/") == ["recipes/a.yaml", "recipes/b.yaml"]
    assert complete("ablate", "c.yaml", "--set", "loss.0.na") == ["loss.0.name"]
    assert complete("bench", "step", "c")[:2] == ["c.yaml", "clip_tiny"]
    assert complete("ui", "runs/o") == ["runs/one"]
    assert complete("plugins", "cross") == ["cross_attention", "cross_modal_distillation"]


def test_paths_of_set_are_completed(complete: Complete, tmp_path: Path) -> None:
    """Would catch options that are left out because the recipe does not give them, or not by the name recipes use."""
    (tmp_path / "a.yaml").write_text(
        "augment: {image: {name: multi_crop}}\nloss: [contrastive, {name: clip, weight: 2}]\n"
    )
    assert complete("run", "a.yaml", "--set", "train.ste") == ["train.steps"]
    assert complete("run", "a.yaml", "--set", "teacher.momentum") == ["teacher.momentum"]
    assert complete("run", "a.yaml", "--set", "augment.image.gl") == [
        "augment.image.global",
        "augment.image.global_scale",
    ]
    assert complete("run", "a.yaml", "--set", "loss.1.w") == ["loss.1.weight"]
    assert complete("run", "a.yaml", "--set", "loss.1.weight=") == []
    assert complete("run", "gone.yaml", "--set", "train.ste") == ["train.steps"]
    (tmp_path / "a.yaml").write_text("loss: [")
    assert complete("run", "a.yaml", "--set", "train.ste") == ["train.steps"]


def test_without_a_cache_nothing_is_offered(complete: Complete, tmp_path: Path, registry: Registry) -> None:
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text("not json")
    assert complete("plugins", "c") == []
    (file.parent / file.name).unlink()
    file.parent.rmdir()
    file.parent.write_text("")  # a cache that cannot be written to
    completion.update_cache(registry)
    assert complete("plugins", "c") == []


def test_completion_imports_nothing_heavy(tmp_path: Path) -> None:
    """In a process of its own, as the shell asks. Would catch seconds of waiting for torch at each Tab."""
    (tmp_path / "a.yaml").write_text("loss: [{name: contrastive}]\n")
    code = (
        "import sys\nfrom distill_core.cli import main\nsys.argv = ['distill']\ntry: main()\nexcept SystemExit: pass\n"
        "print('LOADED', *[m for m in ('torch', 'numpy', 'pydantic', 'rich') if m in sys.modules])"
    )
    words = {"COMP_WORDS": "distill run a.yaml --set lo", "COMP_CWORD": "4", "_DISTILL_COMPLETE": "bash_complete"}
    environment = os.environ | words | {"DISTILL_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.splitlines() == ["plain,loss", "plain,loss.0", "plain,loss.0.name", "LOADED"]


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a section that is missing, and lines for people amid JSON."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").write_bytes(b"1" * 1500)
    main(["doctor", "--json", "--runs", str(tmp_path / "runs")])
    rows = json.loads(capsys.readouterr().out)
    found = {(row["section"], row["name"]): row["value"] for row in rows}
    assert found["versions", "python"].startswith(sys.version.split()[0])
    assert found["versions", "torch"]
    assert "cores to use" in found["device", "threads"]
    assert "gloo" in found["device", "torch.distributed"]
    assert found["plugins", "cosmos"].startswith(f"{project()} 0")
    assert found["kernels", "cross_attention"].startswith("reference")
    assert found["tracking", "aim"]
    assert ("data", "emoji packages") in found
    assert "1.5 kB" in found["disk", "runs"]
    assert found["disk", "cache"].startswith(f"{tmp_path / 'cache'}: does not exist yet")
    main(["doctor", "--runs", str(tmp_path / "runs")])
    out = capsys.readouterr().out
    assert all(name in out for _, name in found)
    assert "\x1b" not in out


def test_doctor_hears_a_plugin_and_survives_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch one plugin's failure that hides what the others say."""
    said = Diagnostic("mine", "heart", "beats", "too fast")
    plugins = Plugins()

    def fails() -> list[Diagnostic]:
        raise OSError("no pulse")

    plugins.add("good", SimpleNamespace(distill_diagnostics=hookimpl(lambda: [said])), "good-package")
    plugins.add("bad", SimpleNamespace(distill_diagnostics=hookimpl(lambda: fails())), "bad-package")
    monkeypatch.setattr(Plugins, "discover", lambda: plugins)
    rows = list(doctor._plugins())
    assert said in rows
    (bad,) = [row for row in rows if row.warning and row != said]
    assert (bad.name, bad.warning) == ("bad", "OSError: no pulse. Repair or uninstall bad-package.")


def test_doctor_goes_on_with_a_broken_plugin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """That is what one calls a doctor for; the exit code says that something is to be mended."""

    def broken() -> Plugins:
        raise PluginError("plugin 'x' (package y) fails to import. Repair or uninstall y.")

    monkeypatch.setattr(Plugins, "discover", broken)
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--runs", str(tmp_path)])
    assert end.value.code == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "error: plugin 'x' (package y) fails to import. Repair or uninstall y." in out
    assert "torch.distributed" in out
    assert "disk" in out


def test_the_table_at_the_end_is_of_means() -> None:
    """Would catch sets and directions in it (they are in report.json), or sides that are mixed up."""
    scores = [
        *means({"student/r/M": 1.0, "teacher/r/M": 4.0, "teacher/z/t": 5.0}),
        TaskScore("a", "M", 2.0, side="student", task="r"),
        TaskScore("a", "x_to_y/R@1", 3.0, side="student", task="r"),
    ]
    file = io.StringIO()
    Console(file=file, width=80).print(mean_table(scores, "title"))
    words = [[w for w in line.split() if w not in "│┃|"] for line in file.getvalue().splitlines()]
    assert ["task", "score", "student", "teacher"] in words
    assert ["r", "M", "1.0", "4.0"] in words
    assert ["z", "t", "5.0"] in words
    assert "2.0" not in file.getvalue()


def test_what_stands_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a task whose scores are nowhere to be seen, and a file of scores where there are none."""
    entropy = TaskScore("a", "entropy", 2.0, "nats", None, side="student", task="maps")
    scores = [*means({"student/r/M": 1.0, "student/n/M": 1.0}), entropy]
    print_scores(scores, "t", ["more"], notes={"r": "percent", "n": "percent"}, file="report.json")
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines == [
        "r, n: percent",
        "maps: no means over sets; its scores are in the file below",
        "more",
        "every score: report.json",
    ]
    print_scores([], "t", ["more"], file="report.json")
    assert capsys.readouterr().out == "more\n"
    assert [per_second(rate) for rate in (1270.4, 88.2, 8.43)] == ["1,270 samples/s", "88 samples/s", "8.4 samples/s"]


def test_a_task_that_begins_is_a_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch minutes without a word, and words where none are wanted."""
    for quiet in (False, True):
        with display.Scoring(quiet=quiet) as scoring:
            scoring.doing("knn (student, test)")
        assert capsys.readouterr().err == ("" if quiet else "scoring knn (student, test)\n")


@pytest.mark.slow
@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colour_on_a_terminal(variables: dict[str, str], coloured: bool, tmp_path: Path) -> None:
    """A warning through a real terminal. Would catch NO_COLOR that is not heeded; piped output is in `test_doctor`."""
    code = "from distill_core.run.display import Display; Display(3, quiet=False, rank=0).warn('mind the gap')"
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")}
    environment |= {"TERM": "xterm-256color", **variables}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, check=True, timeout=300)
    os.close(theirs)
    seen = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "mind the gap" in seen
    assert ("\x1b[33m" in seen) == coloured


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plugins", "kernels", "plugins cross_attention"])
def test_a_closed_pipe(command: str) -> None:
    """`distill ... | head -1`. click and rich each have an answer of their own to that."""
    ours, theirs = os.pipe()
    os.close(ours)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "distill_core.cli", *command.split()],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment,
        timeout=300,
        check=False,
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.slow
def test_components_on_a_narrow_terminal() -> None:
    """Nothing is cut off: `distill plugins` is where a newcomer reads what there is."""
    code = "from distill_core.cli import main; main(['plugins'])"
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, env=os.environ | {"COLUMNS": "70"})
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # at its end
        while data := os.read(ours, 10_000):
            seen += data
    os.close(ours)
    assert process.wait(300) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", seen.decode()).splitlines()
    assert max(map(len, lines)) <= 70
    assert "fusion" in [line.strip() for line in lines]
    text = " ".join(" ".join(lines).split())
    assert "two_captions The web's caption, whole, then the synthetic one." in text


def test_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`best.pt` is another name of a file: it takes no room of its own."""
    (tmp_path / "a").write_bytes(b"1" * 1000)
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d").write_bytes(b"1" * 500)
    assert size_of(tmp_path) == 1500
    assert [in_words(n) for n in (0, 999, 1500, 12e6, 3.44e9, 5e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "12 MB",
        "3.4 GB",
        "5.0 TB",
    ]
    monkeypatch.setenv("DISTILL_CACHE", "/x")
    assert cache_folder() == Path("/x")
    monkeypatch.delenv("DISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/y")
    assert cache_folder() == Path("/y/distill")


def test_a_bar_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set's name is anybody's: `[/x]` is no markup."""
    shown = io.StringIO()
    monkeypatch.setattr(display, "Console", lambda stderr: Console(file=shown, force_terminal=True, width=120))
    with display.Scoring() as scoring:
        scoring.doing("retrieval [red]x")
        assert [*scoring.watch([{"a": 1}], "image of [/x]")] == [{"a": 1}]
        scoring._progress.refresh()
    assert "retrieval [red]x" in shown.getvalue()
    assert "1/1 image of [/x]" in shown.getvalue()
