"""How a backend is chosen, the measured table behind `auto`, and what importing the package costs."""

import csv
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from distill_kernels import defaults, machine
from distill_kernels.defaults import (
    COLUMNS,
    SHIPPED,
    Rule,
    numbers_for,
    parse_conditions,
    parse_numbers,
    shape_class,
    table_path,
)
from distill_kernels.dispatch import OPS, Backend, BackendError, Inputs, Op, choose, listing, load_op, order_of
from distill_kernels.machine import device_name, forget
from distill_kernels.measure import interleaved, peak_bytes

CPU = torch.device("cpu")
# What has numbers in defaults.csv without being an op, and which.
PARTS = {
    "absorbed_attention": {"chunk_bytes"},
    "packed_groups": {"multiple"},
    "pairwise_chunks": {"rows", "columns"},
}


@dataclass(frozen=True)
class Number(Inputs):
    """The inputs of `make_op`."""

    value: int

    @property
    def leading(self) -> Tensor:
        return torch.empty(0)

    @property
    def small(self) -> bool:
        return self.value < 10


def make_op(name: str = "double") -> Op:
    """`picky` takes even numbers only."""
    return Op(
        name=name,
        backends=(
            Backend("picky", lambda x: 2 * x.value, lambda x: "odd" if x is not None and x.value % 2 else None),
            Backend("plain", lambda x: x.value + x.value),
            Backend("missing", lambda x: None, lambda x: "not here"),
        ),
        shape="small",
        cases=lambda device: [Number(1), Number(2), Number(20)],
    )


def write_rules(path: Path, *rules: str) -> None:
    """Each `op,device,model,when,backends`; as `tune` measured them."""
    path.write_text("\n".join([",".join(COLUMNS), *(f"{rule},,measured,a test,here" for rule in rules)]))


def write_numbers(path: Path, *rules: str) -> None:
    """Each `part,device,model,when,numbers`."""
    rows = (",".join([*rule.split(",")[:4], "", rule.split(",")[4]]) for rule in rules)
    path.write_text("\n".join([",".join(COLUMNS), *(f"{row},measured,a test,here" for row in rows)]))


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DISTILL_KERNEL_TABLES", str(tmp_path))
    monkeypatch.setattr(defaults, "SHIPPED", tmp_path / "defaults.csv")
    write_rules(tmp_path / "defaults.csv", *(f"{op},cpu,,,picky plain" for op in ("double", "other")))
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def test_auto_takes_the_first_that_can(tables: Path) -> None:
    op = make_op()
    assert choose(op, "auto", Number(2)).name == "picky"
    assert choose(op, "auto", Number(3)).name == "plain"


def test_explicit_choice_never_falls_back(tables: Path) -> None:
    op = make_op()
    assert choose(op, "plain", Number(2)).name == "plain"
    with pytest.raises(BackendError, match="double: backend 'picky' cannot run this: odd"):
        choose(op, "picky", Number(3))
    with pytest.raises(BackendError, match="double: no backend named 'fast'; there are picky, plain, missing"):
        choose(op, "fast", Number(3))
    assert issubclass(BackendError, ValueError)


def test_auto_without_any_says_why_for_each(tables: Path) -> None:
    write_rules(tables / "defaults.csv", "double,any,,,picky missing")
    with pytest.raises(BackendError, match="no backend can run this \\(picky: odd; missing: not here\\)"):
        choose(make_op(), "auto", Number(3))
    with pytest.raises(BackendError, match="unheard: no rule for cpu"):
        choose(make_op("unheard"), "auto", Number(3))


def test_measured_rules_decide(tables: Path) -> None:
    """By shape class, backends that are in no default included; a name that cannot run these inputs is passed over."""
    write_rules(tables / "defaults.csv", "double,cpu,,,picky plain", "both,cpu,,,picky", "other,cpu,,,picky plain")
    write_rules(
        table_path(CPU), "double,cpu,,small=1,missing plain", "double,cpu,,small=0,picky", "both,cpu,,small=1,plain"
    )
    assert choose(make_op("both"), "auto", Number(2)).name == "plain"
    op = make_op()
    assert choose(op, "auto", Number(2)).name == "plain"
    assert choose(op, "auto", Number(12)).name == "picky"
    assert choose(op, "auto", Number(13)).name == "plain"
    assert choose(make_op("other"), "auto", Number(2)).name == "picky"


def test_the_first_rule_that_holds_decides(tables: Path) -> None:
    """A rule for another model, another kind of device or other inputs is passed over."""
    write_rules(
        tables / "defaults.csv",
        "double,cuda,,,missing",
        "double,cpu,Abacus,,missing",
        "double,cpu,,value=..4,plain",
        f"double,any,{device_name(CPU)},value=6..8,plain picky",
        "double,any,,,picky",
    )
    names = {n: choose(make_op(), "auto", Number(n)).name for n in (4, 6, 8, 10)}
    assert names == {4: "plain", 6: "plain", 8: "plain", 10: "picky"}


@pytest.mark.parametrize("when", ["value", "value<4", "value=1..x", "value=1 .."])
def test_a_condition_that_is_none_is_refused(when: str) -> None:
    with pytest.raises(ValueError, match="is no condition"):
        parse_conditions(when)


def test_shape_class_holds_for_its_inputs() -> None:
    """What `tune` writes for inputs is met by them, and by no others of another power of two."""

    class Sizes(NamedTuple):
        dtype: str
        n: int
        train: bool

    for n in (0, 1, 2, 3, 4, 5, 77, 128):
        text = shape_class("dtype n<= train", Sizes("bfloat16", n, True))
        rule = Rule(parse_conditions(text), (), {}, "")
        assert rule.holds(Sizes("bfloat16", n, True))
        assert not rule.holds(Sizes("bfloat16", n, False))
        assert not rule.holds(Sizes("float16", n, True))
        assert not rule.holds(Sizes("bfloat16", 2 * max(n, 1), True))
    assert shape_class("dtype n<= train", Sizes("bfloat16", 77, True)) == "dtype=bfloat16 n=65..128 train=1"


def test_shipped_defaults_are_complete() -> None:
    """Each op has an order, and each part numbers, for any call on any device; names exist; what was measured says on
    what."""
    with SHIPPED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {*OPS, *PARTS}
    for row in rows:
        assert tuple(row) == COLUMNS
        assert row["device"] in ("cpu", "cuda", "any")
        assert bool(row["backends"]) != bool(row["numbers"])
        assert row["source"] in ("measured", "estimated", "correctness")
        assert bool(row["evidence"]) == (row["source"] == "measured")
        op = load_op(row["op"]) if row["op"] in OPS else None
        inputs = next(iter(op.cases(CPU))) if op else torch.zeros(())
        for name, low, high in parse_conditions(row["when"]):
            assert isinstance(getattr(inputs, name), int), row
            assert low <= high
        if op is None:
            assert {*parse_numbers(row["numbers"])} == PARTS[row["op"]]
            continue
        order = row["backends"].split()
        if row["numbers"]:
            assert op.cheapest is not None
            order = op.cheapest(inputs, **parse_numbers(row["numbers"]))
        assert {*order} <= {b.name for b in op.backends}
    for name in (*OPS, *PARTS):
        last = [row for row in rows if row["op"] == name][-1]
        assert (last["device"], last["model"], last["when"]) == ("any", "", "")


def test_numbers_are_of_the_device_and_the_element(tables: Path) -> None:
    """The first row that holds, and what was measured here before what the package says."""
    write_numbers(tables / "defaults.csv", "size,cuda,,,n=1", "size,cpu,,itemsize=..2,n=2 m=3", "size,any,,,n=4")
    assert numbers_for("size", torch.zeros(1, dtype=torch.bfloat16)) == {"n": 2, "m": 3}
    assert numbers_for("size", torch.zeros(1)) == {"n": 4}
    assert numbers_for("size", torch.zeros(1, device="meta", dtype=torch.bfloat16)) == {"n": 4}
    write_numbers(table_path(CPU), "size,cpu,,itemsize=4,n=5")
    forget()
    assert numbers_for("size", torch.zeros(1)) == {"n": 5}
    assert numbers_for("size", torch.zeros(1, dtype=torch.float64)) == {"n": 4}
    with pytest.raises(ValueError, match=r"no row of defaults.csv has numbers for nothing on cpu"):
        numbers_for("nothing", torch.zeros(1))


def test_a_table_of_other_columns_is_refused(tables: Path) -> None:
    """As one that an earlier version wrote: it would be misread."""
    table_path(CPU).write_text("op,device,model,when,backends,cost,source,evidence,why\n")
    with pytest.raises(ValueError, match=r"has other columns than op, .*: run `distill kernels --tune` again"):
        choose(make_op(), "auto", Number(2))


def test_tune_writes_the_table(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_kernels import tune as module

    op = make_op()
    monkeypatch.setattr(module, "OPS", {"double": "unused"})
    monkeypatch.setattr(module, "load_op", lambda name: op)
    monkeypatch.setattr(module, "interpreting", lambda: False)
    path, rows = module.tune(CPU, rounds=1)
    assert path == table_path(CPU)
    assert path.parent == tables
    assert {(when, name) for _, when, name, _ in rows} == {
        ("small=1", "picky"), ("small=1", "plain"), ("small=0", "picky"), ("small=0", "plain"),
    }  # fmt: skip
    fastest = {when: name for _, when, name, _ in reversed(rows)}
    assert order_of(op, Number(20)).why == "measured: here (distill kernels --tune)"
    assert choose(op, "auto", Number(20)).name == fastest["small=0"]


def test_tune_refuses_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_kernels.tune import tune

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="unset TRITON_INTERPRET"):
        tune(CPU)


def test_triton_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a slim image: said by `distill kernels`, and `auto` takes another backend, instead of a failed build."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "interpreting", lambda: False)
    monkeypatch.setenv("CC", "cc")
    forget()
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert str(machine.why_not_triton(None)).startswith("Triton needs Python's headers")
    (tmp_path / "Python.h").touch()
    forget()
    assert machine.why_not_triton(None) is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    forget()
    assert str(machine.why_not_triton(None)).startswith("Triton needs a C compiler")
    forget()


def test_what_the_machine_has_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call must not look for packages, a compiler or headers: that took ten times as long as a kernel."""
    looked = []

    def look(name: str, answer: object) -> object:
        looked.append(name)
        return answer

    monkeypatch.setattr(machine, "interpreting", lambda: False)
    monkeypatch.delenv("CC", raising=False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: look(name, find_spec("torch")))
    monkeypatch.setattr(machine.shutil, "which", lambda name: look(name, "/usr/bin/gcc"))
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda scheme: look("headers", {"include": "/nowhere"}))
    forget()
    reasons = {machine.why_not_triton(torch.device("cuda", 0)) for _ in range(3)}
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
    """Each op makes cases that some backend runs, and a shape class that holds for them."""
    for name in OPS:
        op = load_op(name)
        cases = list(op.cases(CPU))
        assert cases, name
        for inputs in cases:
            assert Rule(parse_conditions(op.shape_class(inputs)), (), {}, "").holds(inputs)
            assert inputs.device.type == "cpu"
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
    assert machine.why_not_installed("torch") is None
    assert "not installed" in str(machine.why_not_installed("no_such_package_anywhere"))


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
