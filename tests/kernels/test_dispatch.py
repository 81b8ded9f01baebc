"""How a backend is chosen, the measured table behind `auto`, and what importing the package costs."""

import csv
import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distill_kernels import defaults, machine, self_attention
from distill_kernels import tune as tuning
from distill_kernels.attention.cross_attention import CrossAttentionInputs
from distill_kernels.attention.self_attention import SelfAttention
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
from distill_kernels.pairwise.pairs import Pairs
from distill_kernels.tune import with_values

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


def rule_of(when: str) -> Rule:
    return Rule(when, parse_conditions(when), (), {}, "measured", "")


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
        rule = rule_of(text)
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


def measured(*rules: str) -> bytes:
    return "\n".join([",".join(COLUMNS), *(f"{rule},,measured,a test,here" for rule in rules), ""]).encode()


GOOD = "cross_attention,cpu,,,sdpa"


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (b"", "its columns are not op, device,"),
        (b"op,device,model,when,backends,cost,source,evidence,why\n", "its columns are not op, device,"),
        (measured(GOOD)[:-30], "line 2 is no rule"),
        (measured(GOOD, "cross_attention,cpu,,L<5,sdpa"), "line 3 is no rule .*'L<5' is no condition"),
        (measured("cross_attention,cpu,,,"), "line 2 is no rule .it has neither backends nor numbers"),
        (measured(GOOD, "cross_attention,cpu,,,fastest"), "cross_attention has no fastest"),
        (measured("cross_attention,cpu,,weight=3,sdpa"), "cross_attention has no weight"),
        (measured(GOOD).replace(b"sdpa", b"\xff\xfe"), "can't decode"),
        (measured(GOOD).replace(b"here", b'"here'), "unexpected end of data"),
    ],
)
def test_a_damaged_table_is_one_warning(tables: Path, table: bytes, says: str) -> None:
    """As a whole: where one line is wrong, none is trusted. It names the file, the line and what to do."""
    write_rules(tables / "defaults.csv", "cross_attention,cpu,,,matmul", "multi_view_info_nce,cpu,,,chunked")
    table_path(CPU).write_bytes(table)
    ops = [load_op(name) for name in 3 * ["cross_attention", "multi_view_info_nce"]]
    inputs = [next(iter(op.cases(CPU))) for op in ops]
    with pytest.warns(UserWarning, match=says) as warnings:
        chosen = [choose(op, "auto", x).name for op, x in zip(ops, inputs, strict=True)]
    assert chosen == 3 * ["matmul", "chunked"]
    (warning,) = warnings
    assert str(table_path(CPU)) in str(warning.message)
    assert "run `distill kernels --tune` again" in str(warning.message)


def test_correctness_goes_before_what_was_measured(tables: Path) -> None:
    """A shape class is wider than the rows that keep wrong numbers out."""
    rows = [",".join(COLUMNS), "double,cpu,,value=..5,plain,,correctness,,here", "double,cpu,,,picky,,estimated,,here"]
    (tables / "defaults.csv").write_text("\n".join(rows))
    table_path(CPU).write_bytes(measured("double,cpu,,small=1,picky plain"))
    names = {n: choose(make_op(), "auto", Number(n)).name for n in (4, 6, 20)}
    assert names == {4: "plain", 6: "picky", 20: "picky"}
    assert order_of(make_op(), Number(4)).names == ("plain", "picky", "plain", "plain")


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> Op:
    """The only op that `tune` knows."""
    op = make_op()
    monkeypatch.setattr(tuning, "OPS", {"double": "unused"})
    monkeypatch.setattr(tuning, "load_op", lambda name: op)
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    return op


def test_tune_writes_the_table(tables: Path, doubles: Op) -> None:
    times: list[tuning.Time] = []
    path = tuning.tune(CPU, rounds=1, report=times.extend)
    assert path == table_path(CPU)
    assert [*tables.glob("*cpu-*")] == [path], "and nothing unfinished beside it"
    assert {(t.inputs, t.backend) for t in times} == {
        ("small=1", "picky"), ("small=1", "plain"), ("small=0", "picky"), ("small=0", "plain"),
    }  # fmt: skip
    fastest = {t.inputs: t.backend for t in reversed(times)}
    assert order_of(doubles, Number(20)).why == "measured: here (distill kernels --tune)"
    assert choose(doubles, "auto", Number(20)).name == fastest["small=0"]


def test_tune_adds_to_the_table(tables: Path, doubles: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other ops and classes stay; those of the same class, and those that name no backend of today, go."""
    fast = {"plain": 1.0, "picky": 2.0}
    monkeypatch.setattr(tuning, "_times", lambda op, inputs, rounds: fast)

    def rows() -> list[str]:
        return [",".join(row[:5]) for row in csv.reader(table_path(CPU).open())][1:]

    table_path(CPU).write_bytes(
        measured("double,cpu,,small=1,picky", "double,cpu,,small=0,picky", "double,cpu,,,old", "other,cpu,,,any")
    )
    tuning.tune(CPU, [("double", Number(2))])
    assert rows() == ["double,cpu,,small=1,plain picky", "double,cpu,,small=0,picky", "other,cpu,,,any"]
    with monkeypatch.context() as patched:
        patched.setattr(tuning.csv, "writer", None)
        with pytest.raises(TypeError):
            tuning.tune(CPU, [("double", Number(2))])
    assert len(rows()) == 3, "a process that ends while it writes leaves the table as it was"


def test_tune_replaces_a_damaged_table(tables: Path, doubles: Op) -> None:
    table_path(CPU).write_bytes(b"not a table")
    with pytest.warns(UserWarning, match="It is ignored"):
        tuning.tune(CPU, [("double", Number(2))], rounds=1)
    assert order_of(doubles, Number(2)).why.startswith("measured")


def test_what_does_not_fit_in_memory_is_no_candidate(
    tables: Path, doubles: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(x: Number) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    large = dataclasses.replace(doubles, backends=(Backend("picky", run), doubles.backends[1]))
    monkeypatch.setattr(tuning, "load_op", lambda name: large)
    times: list[tuning.Time] = []
    tuning.tune(CPU, [("double", Number(2))], rounds=1, report=times.extend)
    assert [t.backend for t in times] == ["plain", "picky"]
    assert times[1].milliseconds == float("inf")
    assert "double,cpu,,small=1,plain," in table_path(CPU).read_text()


def test_values_keep_the_layout() -> None:
    """A call without values is made again with rows of about unit length: strided, expanded, empty, integers too."""
    with FakeTensorMode():
        qkv = torch.empty(5, 7, 3, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        wide, scale = torch.empty(1, 1, 9, 64).expand(5, 2, 9, 64), torch.empty((), requires_grad=True)
    lengths = torch.tensor([7, 0, 3, 1, 1])
    made = with_values(CrossAttentionInputs(wide, k, v, lengths, None, 0.125), CPU)
    assert made.k.stride() == k.stride()
    assert made.q.stride() == wide.stride()
    assert made.k.is_leaf
    assert made.k.requires_grad
    assert not made.q.requires_grad
    assert made.lengths is lengths
    assert made.k.float().norm(dim=-1).mean().item() == pytest.approx(1, abs=0.1)
    assert made.q[0, 0].norm(dim=-1).mean().item() == pytest.approx(1, abs=0.2)
    pairs = with_values(Pairs(q[0], q[0], (scale,)), CPU)
    assert pairs.scalars[0].item() == 10
    assert pairs.scalars[0].requires_grad
    with FakeTensorMode():
        nothing = torch.empty(2, 0, 64)
    assert with_values(Pairs(nothing, nothing, ()), CPU).a.shape == nothing.shape


@pytest.mark.slow
def test_a_measured_table_is_read_while_a_graph_is_compiled(tables: Path) -> None:
    """As one graph, for sizes that are symbols."""
    rows = [GOOD, "self_attention,cpu,,,sdpa"]
    write_rules(tables / "defaults.csv", *rows)
    when = load_op("self_attention").shape_class(SelfAttention(*3 * [torch.zeros(2, 2, 20, 8)], False, None))
    table_path(CPU).write_bytes(measured(f"self_attention,cpu,,{when},explicit"))
    ran: list[str] = []

    def graph(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        ran.append(" ".join(str(node.target) for node in module.graph.nodes))
        return module

    compiled = torch.compile(self_attention, backend=graph, fullgraph=True, dynamic=True)
    q = torch.randn(2, 2, 20, 8)
    torch.testing.assert_close(compiled(q, q, q), self_attention(q, q, q, backend="reference"))
    assert "scaled_dot_product_attention" not in ran[0]


def test_tune_refuses_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="unset TRITON_INTERPRET"):
        tuning.tune(CPU)


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
            assert rule_of(op.shape_class(inputs)).holds(inputs)
            assert inputs.device.type == "cpu"
            assert choose(op, "auto", inputs).why_not(inputs) is None


def test_table_is_a_device_and_a_version(tables: Path) -> None:
    """Of each package that kernels come from: other versions have other kernels."""
    for package in ("torch", "triton", "xformers"):
        if importlib.util.find_spec(package):
            assert f"{package}{version(package).split('+')[0]}" in table_path(CPU).name
    assert table_path(CPU).name.startswith("cpu-")
    assert device_name(CPU)


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement", ["import distill_kernels", "from distill_kernels.dispatch import listing; listing()"]
)
def test_light_import(statement: str) -> None:
    """Neither the import nor the listing pays for xformers; torch's counter of FLOPs imports Triton itself."""
    program = f"import sys; {statement}; print({{'xformers'}} & set(sys.modules))"
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
