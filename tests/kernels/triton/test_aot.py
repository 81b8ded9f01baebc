"""Ahead-of-time compilation of the shipped kernels, without a GPU, in processes without TRITON_INTERPRET."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

BENCH = Path(__file__).resolve().parents[3] / "kernels" / "bench"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Bytes of shared memory that a block may use (CUDA programming guide, compute capabilities; CDNA3 guide).
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


def resources(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(BENCH / "resources.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# The recipes' variant of each kernel.
KERNELS = {
    "cross_attention_forward": "bf16 V=8 K=64 lengths",
    "cross_attention_backward": "bf16 V=8 K=64 lengths",
    "row_kernel": "bf16 D=512",
    "gradient_kernel": "bf16 D=512",  # of every loss
}


def test_compiles_for_every_target(tmp_path: Path) -> None:
    """Every kernel, freshly compiled; the rows must be what the committed file says of this Triton."""
    out = tmp_path / "resources.csv"
    done = resources(
        "--only",
        *(f"{kernel} {variant}" for kernel, variant in KERNELS.items()),
        "--out",
        str(out),
        cache=tmp_path / "cache",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(out)
    assert {(r["kernel"], r["target"]) for r in rows} == {(name, target) for name in KERNELS for target in TARGETS}
    for row in rows:
        assert int(row["registers"]) >= 32, row  # read from the binary, not a default
        assert int(row["shared_bytes"]) > 0, row
    committed = [r for r in read(BENCH / "resources.csv") if r["triton"] == rows[0]["triton"]]
    if committed:
        assert [r for r in rows if r not in committed] == []


def test_committed_resources_are_complete_and_within_bounds(tmp_path: Path) -> None:
    rows = read(BENCH / "resources.csv")
    listed = resources("--list", cache=tmp_path)
    assert listed.returncode == 0, listed.stderr
    variants = {tuple(line.split(",")) for line in listed.stdout.splitlines()}
    assert len(variants) > 160
    assert {target for *_, target in variants} == set(TARGETS)
    assert {(r["kernel"], r["variant"], r["target"]) for r in rows} == variants
    for row in rows:
        assert row["spills"] == "0", row
        assert int(row["shared_bytes"]) <= SHARED[row["target"]], row


LAUNCHES = """
import itertools, sys, torch
sys.path.insert(0, sys.argv[1])
import resources
from distill_kernels.triton import cross_attention, pairwise

launched = set()


def key(kernel, dtype, constants):
    absent = {k: v for k, v in constants.items() if k in ("bias_ptr", "row_ptr", "column_ptr")}
    kept = {k: v for k, v in constants.items() if k[:3] in ("BLO", "ADD", "HAS", "PRE", "num", "max") and v is not None}
    return kernel, dtype, *sorted(absent), *sorted(kept.items())


def record(kernel, grid, *arguments, **constants):
    # an fp16 launch must be the bf16 one
    dtype = "fp32" if arguments[0].dtype == torch.float32 else "bf16"
    absent = {name: None for name, value in zip(kernel.arg_names, arguments) if value is None}
    launched.add(key(kernel.__name__, dtype, constants | absent))


for module in (cross_attention, pairwise):
    module.launch = record
dtypes = (torch.float32, torch.bfloat16, torch.float16)
for dtype, tf32 in [*itertools.product(dtypes, (False,)), (torch.float32, True)]:
    torch.backends.cuda.matmul.allow_tf32 = tf32
    new = lambda *shape: torch.empty(shape, dtype=dtype, device="meta")
    for width, queries in itertools.product(range(16, 129, 16), (1, 17, 33, 65, 300)):
        q, k = new(1, 1, queries, width), new(1, 1, 5, width)
        lengths, mask = torch.empty(1, dtype=torch.int64), torch.empty(1, 5, dtype=torch.bool)
        for valid in ((None, None), (lengths, None), (None, mask)):
            cross_attention.launch_forward(q, k, k, *valid, 1.0, q, q[..., 0])
            cross_attention._backward._init_fn(q, q, k, k, q, q[..., 0], *valid, 1.0)
    x, scale, lse = new(1, 2, 64), new(), new(1, 1, 2)
    part = pairwise.Part(*[slice(None)] * 4, x, x, new(1, 1), 0, x)
    for bias in (None, scale):
        pairwise.reduce_rows(x, x, scale, bias, x)
    for losses in ({"row": lse}, {"row": lse, "column": lse}, {"bias": scale}):
        pairwise.fill_gradient(part, scale, **losses)
compiled = set()
for s in resources.specs():
    dtype = (s.signature.get("q_ptr") or s.signature["x_ptr"]).strip("*")
    options = {"num_warps": s.warps, "num_stages": s.stages, "maxnreg": s.registers}
    compiled.add(key(s.name, dtype, s.constants | options))
missing = sorted(map(str, launched - compiled))
print(len(launched), *missing, sep="\\n")
"""


def test_every_launch_is_compiled(tmp_path: Path) -> None:
    """The launchers, on tensors without data, over all widths: each choice of blocks is among the variants."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LAUNCHES, str(BENCH)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, *missing = done.stdout.splitlines()
    assert int(count) > 60
    assert missing == []


def test_spills_are_seen(tmp_path: Path) -> None:
    """Blocks far too large for the registers must fail: the measure would otherwise be blind."""
    program = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
import resources
from distill_kernels.triton import cross_attention_kernels as kernels
kernels.blocks = lambda *_: kernels.Blocks(64, 64, 32, 32, 4, None)
(spec,) = [s for s in kernels.compile_specs() if (s.name[-7:], s.variant) == ("forward", "fp32 V=8 K=64")]
row = resources.measure(spec, "sm_90")
print(*resources.failures([row]), row.spills)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "spilled" in done.stdout, done.stdout + done.stderr


def test_interpreter_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "resources.py"), "--out", str(tmp_path / "x.csv")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr
