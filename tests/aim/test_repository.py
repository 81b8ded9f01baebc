"""Aim's repository: first runs at once, runs that are killed while they make it, and disks that fill up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("aim", reason="aim is not installed")

from distill_aim.tracker import AimConfig, AimTracker

LIMIT = 240
"""Seconds for a process that takes about 15."""

TRACK = """
import sys, time
from pathlib import Path
from distill_aim import repository
from distill_aim.tracker import AimConfig, AimTracker
from distill_core.run.tracking import TrackerThread

run, start = Path(sys.argv[1]), float(sys.argv[2])
run.mkdir(parents=True)
time.sleep(max(0.0, start - time.time()))
tracker = TrackerThread(AimTracker(AimConfig()), lambda line: print("warned:", line, flush=True))
tracker.call("start", str(run), run.name, {}, False)
"""

FILL = """
import resource
repository.EXIT_LIMIT = 2.0
while not (run / "aim.json").exists():
    time.sleep(0.05)
if sys.argv[3] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
else:
    (run.parent / ".aim").rename(run.parent / "gone")
    (run.parent / ".aim").touch()
for step in range(100):
    tracker.call("log", step, {"loss": 1.0}, {"subset": "train"})
time.sleep(6)  # Aim's own threads write every 5 s
tracker.finish(5)
print("the end", flush=True)
"""


def start(*arguments: object, script: str = TRACK + "tracker.finish(200)") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "gone"])
def test_a_process_ends_when_its_repository_takes_no_more(tmp_path: Path, how: str) -> None:
    """Aim's clean-up at exit waits for a thread of its own that has died: the process never ended."""
    process = start(tmp_path / "runs/one", 0, how, script=TRACK + FILL)
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == 0, output
    after = output.split("the end")[1]
    assert "warning: Aim did not close its runs within 2 s" in after or "warning: Aim could not close its runs" in after
    assert "warned: tracker 'aim' " in output


@pytest.mark.slow
def test_first_runs_at_once(tmp_path: Path) -> None:
    """As `distill ablate --jobs 3` begins. Would catch runs that meet a repository that another still makes."""
    begin = time.time() + 6
    processes = [start(tmp_path / "runs" / name, begin) for name in ("a", "b", "c")]
    outputs = [process.communicate(timeout=LIMIT)[0] for process in processes]
    assert not any("warn" in output for output in outputs), outputs
    hashes = {json.loads((tmp_path / "runs" / name / "aim.json").read_text())["run"] for name in ("a", "b", "c")}
    assert hashes == {path.name for path in (tmp_path / "runs/.aim/meta/chunks").iterdir()}
    assert len(hashes) == 3
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [".aim", ".aim.lock", "a", "b", "c"]


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_makes_the_repository(tmp_path: Path) -> None:
    """Would catch a half of it that stops every later run, and that lies about for good."""
    runs = tmp_path / "runs"
    process = start(runs / "one", 0)
    end = time.monotonic() + LIMIT
    while not list(runs.glob(".aim*/**/run_metadata.sqlite")):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (runs / ".aim").exists()
    second = start(runs / "two", 0)
    output, _ = second.communicate(timeout=LIMIT)
    assert "warn" not in output
    assert sorted(path.name for path in runs.iterdir()) == [".aim", ".aim.lock", "one", "two"]


@pytest.mark.slow
def test_a_repository_that_was_left_half_made_is_set_aside(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What an earlier release, or `aim init`, leaves when it is killed. Nothing of it is removed."""
    run = tmp_path / "one"
    for folder in (run, tmp_path / ".aim/meta", tmp_path / ".aim-incomplete-1"):
        folder.mkdir(parents=True)
    (tmp_path / ".aim/meta/something").touch()
    tracker = AimTracker(AimConfig())
    tracker.start(str(run), "one", {}, resume=False)
    tracker.finish()
    aside = tmp_path / ".aim-incomplete-2"
    assert (aside / "meta/something").exists()
    line = f"warning: {tmp_path / '.aim'}: only half made, by a run that was killed; set aside as {aside}"
    assert line in capfd.readouterr().err.splitlines()


@pytest.mark.slow
def test_the_runs_hash_is_written_whole(tmp_path: Path) -> None:
    """Would catch a file that is written over in place, which a kill cuts off: a resume then loses its tracker."""
    run = tmp_path / "one"
    run.mkdir()
    for resume in (False, True):
        if resume:
            os.link(run / "aim.json", tmp_path / "before")
        tracker = AimTracker(AimConfig())
        tracker.start(str(run), "one", {}, resume=resume)
        tracker.finish()
    assert (run / "aim.json").read_text() == (tmp_path / "before").read_text()
    assert not (run / "aim.json").samefile(tmp_path / "before")
