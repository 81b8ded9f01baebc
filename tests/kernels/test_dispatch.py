"""How a backend is chosen, the measured table behind `auto`, and what importing the package costs."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distill_kernels import dispatch
from distill_kernels.dispatch import (
    OPS,
    Backend,
    BackendError,
    Op,
    Order,
    choose,
    device_name,
    forget,
    listing,
    load_op,
    table_path,
)
from distill_kernels.measure import interleaved, peak_bytes

CPU = torch.device("cpu")


def make_op(name: str = "double") -> Op:
    """Inputs are lists of a number; `picky` takes even ones only."""
    return Op(
        name=name,
        backends=(
            Backend("picky", lambda x: "odd" if x is not None and x[0] % 2 else None, lambda x: 2 * x[0]),
            Backend("plain", lambda x: None, lambda x: x[0] + x[0]),
            Backend("missing", lambda x: "not here", lambda x: None),
        ),
        order=lambda x: Order(("picky", "plain"), "a guess"),
        bucket=lambda x: "small" if x[0] < 10 else "large",
        cases=lambda device: [[1], [2], [20]],
        device=lambda x: CPU,
    )


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DISTILL_KERNEL_TABLES", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def test_auto_takes_the_first_that_can(tables: Path) -> None:
    op = make_op()
    assert choose(op, "auto", [2]).name == "picky"
    assert choose(op, "auto", [3]).name == "plain"


def test_explicit_choice_never_falls_back(tables: Path) -> None:
    op = make_op()
    assert choose(op, "plain", [2]).name == "plain"
    with pytest.raises(BackendError, match="double: backend 'picky' cannot run this: odd"):
        choose(op, "picky", [3])
    with pytest.raises(BackendError, match="double: no backend named 'fast'; there are picky, plain, missing"):
        choose(op, "fast", [3])
    assert issubclass(BackendError, ValueError)


def test_auto_without_any_says_why_for_each(tables: Path) -> None:
    op = make_op()
    op = Op(op.name, op.backends, lambda x: Order(("picky", "missing"), "a guess"), op.bucket, op.cases, op.device)
    with pytest.raises(BackendError, match="no backend can run this \\(picky: odd; missing: not here\\)"):
        choose(op, "auto", [3])


def test_measured_table_decides(tables: Path) -> None:
    """By bucket, backends that are not in the built-in order included; a name that is gone, or cannot run these
    inputs, is passed over."""
    table_path(CPU).write_text(
        '{"double": {"small": ["gone", "plain"], "large": ["picky"]}, "both": {"small": ["plain"]}}'
    )
    picky = make_op("both")
    picky = dataclasses.replace(picky, order=lambda x: Order(("picky",), "a guess"))
    assert choose(picky, "auto", [2]).name == "plain"
    op = make_op()
    assert choose(op, "auto", [2]).name == "plain"
    assert choose(op, "auto", [12]).name == "picky"
    assert choose(op, "auto", [13]).name == "plain"
    assert choose(make_op("other"), "auto", [2]).name == "picky"


def test_tune_writes_the_table(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_kernels import tune as module

    op = make_op()
    monkeypatch.setattr(module, "OPS", {"double": "unused"})
    monkeypatch.setattr(module, "load_op", lambda name: op)
    monkeypatch.setattr(module, "interpreting", lambda: False)
    path, rows = module.tune(CPU, rounds=1)
    assert path == table_path(CPU)
    assert path.parent == tables
    assert {(bucket, name) for _, bucket, name, _ in rows} == {
        ("small", "picky"), ("small", "plain"), ("large", "picky"), ("large", "plain"),
    }  # fmt: skip
    fastest = {bucket: name for _, bucket, name, _ in reversed(rows)}
    assert choose(op, "auto", [20]).name == fastest["large"]


def test_tune_refuses_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_kernels.tune import tune

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="unset TRITON_INTERPRET"):
        tune(CPU)


def test_triton_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a slim image: said by `distill kernels`, and `auto` takes another backend, instead of a failed build."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setenv("CC", "cc")
    forget()
    monkeypatch.setattr(dispatch.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert str(dispatch.why_not_triton(None)).startswith("Triton needs Python's headers")
    (tmp_path / "Python.h").touch()
    forget()
    assert dispatch.why_not_triton(None) is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    forget()
    assert str(dispatch.why_not_triton(None)).startswith("Triton needs a C compiler")
    forget()


def test_what_the_machine_has_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call must not look for packages, a compiler or headers: that took ten times as long as a kernel."""
    looked = []

    def look(name: str, answer: object) -> object:
        looked.append(name)
        return answer

    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.delenv("CC", raising=False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: look(name, find_spec("torch")))
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: look(name, "/usr/bin/gcc"))
    monkeypatch.setattr(dispatch.sysconfig, "get_paths", lambda scheme: look("headers", {"include": "/nowhere"}))
    forget()
    reasons = {dispatch.why_not_triton(torch.device("cuda", 0)) for _ in range(3)}
    forget()
    assert sorted(looked) == ["gcc", "headers", "triton"]
    assert reasons == {"Triton needs Python's headers (python3-dev): there is no /nowhere/Python.h"}


def test_every_op_is_listed_and_loads() -> None:
    rows = listing()
    assert {op for op, _, _ in rows} == set(OPS)
    for name in OPS:
        assert load_op(name).name == name
        assert any(op == name and state == "yes" for op, _, state in rows)
    with pytest.raises(BackendError, match="no op named 'convolution'"):
        load_op("convolution")


@pytest.mark.slow
def test_every_op_can_be_tuned_here() -> None:
    """Each op makes cases that some backend runs, and names a bucket for them."""
    for name in OPS:
        op = load_op(name)
        cases = list(op.cases(CPU))
        assert cases, name
        for inputs in cases:
            assert op.bucket(inputs)
            assert op.device(inputs).type == "cpu"
            assert choose(op, "auto", inputs).why_not(inputs) is None


def test_table_is_a_device_and_a_version(tables: Path) -> None:
    assert torch.__version__.split("+")[0] in table_path(CPU).name
    assert table_path(CPU).name.startswith("cpu-")
    assert device_name(CPU)


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement", ["import distill_kernels", "from distill_kernels.dispatch import listing; listing()"]
)
def test_light_import(statement: str) -> None:
    """Neither the import nor the listing pays for triton or xformers."""
    program = f"import sys; {statement}; print({{'triton', 'xformers'}} & set(sys.modules))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_missing_package_is_a_reason() -> None:
    assert dispatch.why_not_installed("torch") is None
    assert "not installed" in str(dispatch.why_not_installed("no_such_package_anywhere"))


def test_interleaved_measures_each_call() -> None:
    order: list[str] = []
    x = torch.randn(300, 300)

    def slow() -> None:
        order.append("slow")
        for _ in range(20):
            x @ x

    def fast() -> None:
        order.append("fast")

    seconds = interleaved({"slow": slow, "fast": fast}, rounds=3, device=CPU, least_seconds=0)
    assert seconds["slow"].process > seconds["fast"].process
    assert order[-6:] == ["slow", "fast"] * 3


def test_peak_counts_what_is_alive_at_once() -> None:
    x = torch.randn(1000, 250)  # 1 MB
    one, two = (peak_bytes(f, CPU) for f in (lambda: (x + 1).sum(), lambda: ((x + 1) + (x + 2)).sum()))
    assert 1_000_000 <= one < 1_100_000
    assert 3_000_000 <= two < 3_100_000
