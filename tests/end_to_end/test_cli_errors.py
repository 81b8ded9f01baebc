"""Bad input through the command line: each is one clear line on stderr, exit code 2, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_core.batch import Batch
from distill_core.cli import main
from distill_core.errors import DataError
from distill_core.outputs import Progress
from distill_core.run.folder import RunFolder
from distill_core.step import StepResult, TrainStep


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Distill = Callable[..., Ended]


@pytest.fixture
def distill(
    tmp_path: Path, tiny_recipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Distill:
    """`distill ARGUMENTS` in the folder of the tiny recipe; any exception but SystemExit is a traceback to a user."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Ended:
        capfd.readouterr()
        code: int | str | None = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        assert isinstance(code, int), "an exit code, not a message"
        return Ended(code, out, err)

    return run


def one_line(ended: Ended) -> str:
    """The only line of an error."""
    assert ended.code == 2
    assert "Traceback" not in ended.err
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tinny.yaml"], "tinny.yaml: no such recipe, did you mean 'tiny.yaml'?"),
        (["shards"], "shards: no such file, and no recipe of this name; `distill recipes` lists the names"),
        (
            ["tiny.yaml", "--set", "trian.steps=1"],
            "--set trian.steps: trian: unknown option 'trian', did you mean 'train'?",
        ),
        (
            ["tiny.yaml", "--set", "train.steps=off"],
            "--set train.steps: must be an integer, got 'off'",
        ),
        (
            ["tiny.yaml", "--set", "loss.0=contrastve"],
            "--set loss.0: no loss named 'contrastve', did you mean 'contrastive'?",
        ),
        (
            ["tiny.yaml", "--set", "teacher=null"],
            "tiny.yaml:10: loss.1: 'cross_modal_distillation' needs a teacher; this recipe has none",
        ),
        (
            ["tiny.yaml", "--set", "data.source.urls=${DISTILL_TEST_UNSET}/x.tar"],
            "--set data.source.urls: the environment variable DISTILL_TEST_UNSET is not set; set it, "
            "or give a value with --set",
        ),
        (
            ["tiny.yaml", "--set", "data.source.urls=gone-{0..9}.tar"],
            "gone-0.tar: does not exist. Check data.source, and the variables in it. (The first of 10, of 10 shards.)",
        ),
        (
            ["tiny.yaml", "--set", "data.source.test=gone.tar"],
            "gone.tar: does not exist. Check data.source, and the variables in it.",
        ),
        (
            ["tiny.yaml", "--set", "data.source.urls=shards/gone-*.tar"],
            "shards/gone-*.tar: no file matches. Check data.source, and the variables in it.",
        ),
        (
            ["tiny.yaml", "--set", "data.source.urls=shards"],
            "shards: is a folder; name the shards in it, as shards/*.tar",
        ),
        (["tiny.yaml", "--set", "data.source.urls=[]"], "no shards: the data source names none"),
        (
            ["tiny.yaml", "--set", "freeze=[backbone.txt]"],
            "--set freeze: freeze.0: 'backbone.txt' names no part of the model, did you mean 'backbone.text'?",
        ),
        (
            ["tiny.yaml", "--set", "weights.0={name: state_dict, source: gone.pt}"],
            "weights: gone.pt: no such file or run folder",
        ),
    ],
)
def test_a_run_that_cannot_begin(
    distill: Distill, arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Would catch a traceback, another exit code, a vaguer line, and a run folder of a run that never was."""
    monkeypatch.delenv("DISTILL_TEST_UNSET", raising=False)
    assert one_line(distill("run", *arguments)) == line
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "{}: the shard is empty. Write it again, or leave it out of data.source."),
        (b"\0" * 10240, "{}: the shard is empty. Write it again, or leave it out of data.source."),
        (
            b"not a tar file" * 100,
            "{}: not a readable tar file: no tar header at its start. Write it again, or leave it out.",
        ),
    ],
    ids=["no bytes", "a tar of nothing", "no tar"],
)
def test_shards_that_hold_nothing(distill: Distill, tmp_path: Path, content: bytes, line: str) -> None:
    """Among good shards. Would catch one that is passed over without a word, and tarfile's report of many lines."""
    shard = tmp_path / "shards" / "train-999.tar"
    shard.write_bytes(content)
    assert one_line(distill("run", "tiny.yaml", "--quiet")) == line.format(shard)
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_fails_before_its_first_step_leaves_no_folder(
    distill: Distill, tmp_path: Path, write_shards: Callable[..., list[Path]], workers: int
) -> None:
    """No sample can be used, which shows in the first batch. Would catch a folder without a step or a checkpoint, which
    `resume` refuses, and the next run of that name that is called NAME-2."""
    bad = {(0, j): {"png": b"no picture", "txt": b"a. b. c"} for j in range(4)}
    write_shards(tmp_path / "bad", 1, 4, replace=bad)
    options = ("--quiet", "--set", f"data.source.urls={tmp_path / 'bad' / 'train-000.tar'}")
    ended = distill("run", "tiny.yaml", *options, "--set", f"data.workers={workers}")
    assert ended.code == 2
    assert "no sample can be used" in ended.err
    assert not list(tmp_path.glob("runs/*"))


def test_a_run_that_fails_later_keeps_its_folder(
    distill: Distill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a folder that is taken back with the steps in it."""
    step = TrainStep.__call__

    def failing(self: TrainStep, batch: Batch, progress: Progress, **options: Any) -> StepResult:
        if progress.step == 2:
            raise DataError("made up")
        return step(self, batch, progress, **options)

    monkeypatch.setattr(TrainStep, "__call__", failing)
    ended = distill("run", "tiny.yaml", "--quiet")
    assert ended.code == 2
    assert [path.name for path in tmp_path.glob("runs/tiny/checkpoints/*.pt")] == ["step-00000002.pt"]


def test_a_shard_cut_off_in_its_first_sample(distill: Distill, tmp_path: Path) -> None:
    """The only shard, whose first header is whole. Would catch a run that starts with nothing to read."""
    whole = tmp_path / "shards" / "train-000.tar"
    with tarfile.open(whole) as tar:
        second = tar.getmembers()[1]
    shard = tmp_path / "cut.tar"
    shard.write_bytes(whole.read_bytes()[: second.offset_data + 3])
    line = one_line(distill("run", "tiny.yaml", "--quiet", "--set", f"data.source.urls={shard}"))
    missing = second.size - 3
    reason = f"ends inside '{second.name}', {missing} bytes before its end: it was cut off"
    assert line == f"{shard}: not a readable tar file: {reason}. Write it again, or leave it out."


def test_every_error_of_a_file_is_a_line(distill: Distill, tmp_path: Path) -> None:
    text = (tmp_path / "tiny.yaml").read_text()
    broken = (
        text.replace("heads: 2}\nloss", "heds: 2}\nloss")
        .replace("momentum: 0.9", "momentum: 9")
        .replace("steps: 4", "steps: x")
    )
    (tmp_path / "broken.yaml").write_text(broken)
    ended = distill("run", "broken.yaml")
    assert ended.code == 2
    assert ended.err.splitlines() == [
        "broken.yaml:7: fusion.heds: unknown option 'heds', did you mean 'heads'?",
        "broken.yaml:11: teacher.momentum: must be at most 1, got 9",
        "broken.yaml:18: train.steps: must be an integer, got 'x'",
    ]


def test_validate_reports_all_files_and_warns_of_unset_variables(
    distill: Distill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a check that stops at the first file, and one that needs the variables of the machine it runs on."""
    monkeypatch.delenv("DISTILL_TEST_UNSET", raising=False)
    text = (tmp_path / "tiny.yaml").read_text()
    (tmp_path / "unset.yaml").write_text(text.replace(f"{tmp_path}/shards/train", "${DISTILL_TEST_UNSET}/train"))
    warning = (
        "warning: unset.yaml:13: data.source.urls: the environment variable DISTILL_TEST_UNSET is not set; set it, or "
        "give a value with --set\n"
    )
    assert distill("validate", "unset.yaml", "tiny.yaml") == Ended(0, "unset.yaml: ok\ntiny.yaml: ok\n", warning)
    ended = distill("validate", "gone.yaml", "tiny.yaml", "--set", "seed=1")
    assert (ended.code, ended.out) == (2, "tiny.yaml: ok\n")
    assert ended.err.startswith("gone.yaml: no such recipe")


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU")
def test_validate_warns_of_a_device_that_is_not_here_and_run_refuses_it(distill: Distill, tmp_path: Path) -> None:
    """Would catch a recipe that cannot be checked on a login node, and the folder of a run that cannot begin."""
    cuda = ("tiny.yaml", "--set", "train.device=cuda:1")
    ended = distill("validate", *cuda)
    assert (ended.code, ended.out) == (0, "tiny.yaml: ok\n")
    assert ended.err.startswith("warning: tiny.yaml: train.device: 'cuda:1' is not")
    ended = distill("run", *cuda, "--runs", "here")
    assert ended.code == 2
    assert ended.err.startswith("train.device: 'cuda:1' is not")
    assert not (tmp_path / "here").exists()


def test_validate_and_show_as_json(distill: Distill, tmp_path: Path) -> None:
    """Would catch JSON mixed with lines for people, and an exit code that says all is well."""
    (tmp_path / "broken.yaml").write_text((tmp_path / "tiny.yaml").read_text().replace("steps: 4", "steps: x"))
    ended = distill("validate", "tiny.yaml", "broken.yaml", "--json")
    assert (ended.code, ended.err) == (2, "")
    good, bad = json.loads(ended.out)
    assert good == {"recipe": "tiny.yaml", "ok": True, "errors": [], "warnings": []}
    assert bad["errors"] == ["broken.yaml:18: train.steps: must be an integer, got 'x'"]
    assert distill("validate", "tiny.yaml", "--quiet") == Ended(0, "", "")
    assert json.loads(distill("show", "tiny.yaml", "--set", "seed=3", "--json").out)["seed"] == 3


def test_show_prints_a_recipe(distill: Distill, tmp_path: Path) -> None:
    """Would catch warnings or progress mixed into what `distill show x > y` writes."""
    shown = distill("show", "tiny.yaml", "--set", "seed=3")
    assert (shown.code, shown.err) == (0, "")
    (tmp_path / "shown.yaml").write_text(shown.out)
    assert distill("show", "shown.yaml").out == shown.out
    assert "seed: 3\n" in shown.out


@pytest.mark.parametrize("command", ["resume", "eval"])
def test_a_folder_that_is_no_run(distill: Distill, tmp_path: Path, command: str) -> None:
    assert one_line(distill(command, "shards")) == "shards: not a run folder (it holds no recipe.yaml)"
    (tmp_path / "runs" / "first").mkdir(parents=True)
    shutil.copy(tmp_path / "tiny.yaml", tmp_path / "runs" / "first" / "recipe.yaml")
    assert one_line(distill(command, "runs/frist")) == ("runs/frist: no such run folder, did you mean 'first'?")
    if command == "eval":
        assert one_line(distill("eval", "runs/first")) == "runs/first: no checkpoint 'last': the run has saved none yet"


def test_a_run_without_a_checkpoint_begins_again(distill: Distill, tmp_path: Path) -> None:
    """As when it was killed early, or waits in a queue for its first start. Catches rows of the first attempt that are
    left, and metrics that are deleted while another process trains."""
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    changes = ("train.steps=2", "train.log_every=1", "evaluate.tasks=[]")
    shown = distill("show", "tiny.yaml", *(part for change in changes for part in ("--set", change)))
    (folder / "recipe.yaml").write_text(shown.out)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0, "terms": {}}\n')
    other = RunFolder(folder)
    other.lock()
    assert one_line(distill("resume", "runs/first")) == "runs/first: another process is training in this run folder"
    other.unlock()
    assert len(other.rows()) == 1
    resumed = distill("resume", "runs/first")
    assert resumed.code == 0, resumed.err
    assert "runs/first: has no checkpoint, so the run starts from its first step" in resumed.err
    rows = [row for row in other.rows() if "terms" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] != 9.0


def test_what_a_run_cannot_be_asked_for(distill: Distill, tmp_path: Path) -> None:
    """One finished run, and all that `eval` and `resume` may be given wrongly."""
    assert distill("run", "tiny.yaml", "--quiet", "--set", "train.steps=2").code == 0
    for arguments, line in [
        (
            ["--split", "nope"],
            "--split: evaluate.split: data.source has no split 'nope' (it has train, validation, test); name one that "
            "it has, give it one, or leave out evaluate.tasks",
        ),
        (["--checkpoint", "7"], "runs/tiny: no checkpoint '7'; there are 2"),
        (["--checkpoint", "best"], "runs/tiny: no checkpoint 'best'; there are 2"),
        (["--checkpoint", "frist"], "runs/tiny: no checkpoint 'frist'; there are 2"),
        (
            ["--checkpoint", "runs/tiny/checkpoints/step-00000002.pt"],
            "--checkpoint takes `last`, `best` or a step's number, not a file",
        ),
        (["--set", "evaluate.split"], "--set evaluate.split: write it as path=value, for example loss.1.weight=0.5"),
        (
            ["--set", "backbone.image.width=32"],
            "runs/tiny: the checkpoint does not fit the recipe (has recipe.yaml been changed, or --set given?): size "
            "mismatch for backbone.image.class_embedding: copying a param with shape torch.Size([16]) from "
            "checkpoint, the shape in "
            "current model is torch.Size([32]).",
        ),
    ]:
        assert one_line(distill("eval", "runs/tiny", *arguments)) == line
    (checkpoint,) = (tmp_path / "runs" / "tiny" / "checkpoints").glob("*.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    (tmp_path / "runs" / "tiny" / "report.json").unlink()  # a finished run is not read again
    for command in ("eval", "resume"):
        line = one_line(distill(command, "runs/tiny"))
        assert line.startswith("runs/tiny/checkpoints/step-00000002.pt: cannot be read (")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rnu"], "Error: No such command 'rnu'."),
        (["run"], "Error: Missing argument 'RECIPE'."),
        (["run", "tiny.yaml", "--stes", "3"], "Error: No such option"),
    ],
)
def test_a_command_line_that_is_not_one(distill: Distill, arguments: list[str], line: str) -> None:
    ended = distill(*arguments)
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith(line)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["run", "tiny.yaml"], ["plugins"], ["--help"]])
def test_a_plugin_that_fails_to_import(
    tiny_recipe: Path, tmp_path: Path, install_plugin: Callable[[Path, Path], Path], command: list[str]
) -> None:
    """As a user meets it, in a process of its own. Would catch a plugin left out without a word, or a traceback."""
    package = tmp_path / "project" / "distill_broken"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('built for another torch')\n")
    (package.parent / "pyproject.toml").write_text(
        '[project]\nname = "distill-broken"\nversion = "1"\n[project.entry-points.distill]\nbroken = "distill_broken"\n'
    )
    site = install_plugin(package.parent, tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-m", "distill_core.cli", *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    line = one_line(Ended(done.returncode, done.stdout, done.stderr))
    assert line.startswith("plugin 'broken' (package distill-broken) fails to import 'distill_broken', at ")
    assert line.endswith(
        "distill_broken/__init__.py:1: RuntimeError: built for another torch. Repair or uninstall distill-broken, or "
        "add --without broken."
    )
