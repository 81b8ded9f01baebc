"""`distill ui`: the right repository, clear refusals, and the curves of a run in a browser."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distill_aim.commands import where
from distill_core.cli import main
from distill_core.run.folder import RunFolder

pytestmark = pytest.mark.slow


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["ui", *arguments])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_where_the_repository_is(tmp_path: Path) -> None:
    """Would catch a run whose repository lies elsewhere, and runs that were moved."""
    for name in ("runs/.aim", "runs/one", "other/.aim", "moved/.aim", "moved/one"):
        (tmp_path / name).mkdir(parents=True)
    runs = tmp_path / "runs"
    memory = runs / "one" / "aim.json"
    memory.write_text(json.dumps({"run": "abc", "repo": str(runs)}))
    assert where(runs) == (runs, "/runs")
    assert where(runs / "one") == (runs, "/runs/abc")
    memory.write_text(json.dumps({"run": "abc", "repo": str(tmp_path / "other")}))
    assert where(runs / "one") == (tmp_path / "other", "/runs/abc")
    (tmp_path / "moved/one/aim.json").write_text(json.dumps({"run": "abc", "repo": "/gone"}))
    assert where(tmp_path / "moved/one") == (tmp_path / "moved", "/runs/abc")


def test_what_cannot_be_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a traceback, or an empty repository that is made by looking for one."""
    line = refused(capsys, str(tmp_path))
    assert line.startswith(f"{tmp_path}: no Aim repository (.aim) in it. ")
    assert not list(tmp_path.iterdir())
    (tmp_path / ".aim").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = refused(capsys, str(tmp_path), "--port", port)
        assert said == f"127.0.0.1:{port}: Address already in use; give another with --port"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused(capsys, str(tmp_path)).startswith("distill ui needs the package aim: pip install aim")


@pytest.fixture(scope="module")
def page(aim_run: RunFolder) -> Iterator[str]:
    """The address that `distill ui` says, once it answers."""
    command = [sys.executable, "-m", "distill_core.cli", "ui", str(aim_run.path), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.match(r"(http://127\.0\.0\.1:\d+/runs/\w+)  \(Aim on (.*)/\.aim; ", line)
        assert found, line
        assert Path(found[2]) == aim_run.path.parent
        end = time.monotonic() + 400
        while True:
            try:
                urllib.request.urlopen(found[1], timeout=60).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < end, "the server does not answer"
                time.sleep(0.5)
        yield found[1]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        process.stdout.close()


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def is_server(process: psutil.Process) -> bool:
    """Whether it is the web server; False of one that has just ended."""
    try:
        return "uvicorn" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_it_ends_its_server(tmp_path: Path, kind: signal.Signals) -> None:
    """However it is ended. Would catch a web server, which Aim starts as another process, that stays on its port."""
    from distill_aim.repository import prepare

    prepare(tmp_path)
    command = [sys.executable, "-m", "distill_core.cli", "ui", str(tmp_path), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    started: list[psutil.Process] = []
    try:
        end = time.monotonic() + 200
        while not any(is_server(child) for child in started):
            assert time.monotonic() < end, "Aim starts no server"
            assert process.poll() is None
            time.sleep(0.2)
            started = [child for child in descendants(process.pid) if child.is_running()]
        process.send_signal(kind)
        code = process.wait(120)
        assert code == (-kind if kind == signal.SIGKILL else 128 + kind)
        _, alive = psutil.wait_procs(started, timeout=60)
        assert alive == []
    finally:
        process.kill()
        for child in started:
            if child.is_running():
                child.kill()


def test_a_browser_sees_the_curves(browser: Any, page: str) -> None:
    """Would catch an empty repository, a page of another run, and series that Aim cannot draw.

    `DISTILL_SCREENSHOT=FILE` keeps a picture of the page.
    """
    browser.open(f"{page}/metrics")
    browser.wait("document.body && document.body.innerText.includes('loss/contrastive')")
    # a curve is an SVG path that goes through several points
    curves = "[...document.querySelectorAll('path')].filter(p => /^M.*([LC].*){5}/.test(p.getAttribute('d') || ''))"
    browser.wait(f"{curves}.some(p => p.getBoundingClientRect().width > 100)")
    text = browser.evaluate("document.body.innerText")
    assert "tiny" in text
    assert {"loss", "lr", "grad_norm"} <= set(re.findall(r"[\w/]+", text))
    if keep := os.environ.get("DISTILL_SCREENSHOT"):
        browser.screenshot(Path(keep))
