"""Compile every shipped kernel variant ahead of time, without a GPU, and read the binaries.

    python kernels/bench/resources.py                # all variants and targets -> kernels/bench/resources.csv
    python kernels/bench/resources.py --only "bf16 V=8 K=64" --targets sm_90 --out some.csv

Registers, spills and shared memory come from the binaries. To add kernels: give their module a
`compile_specs() -> list[Spec]` and name it in MODULES. Exits with 1 when a variant spills or needs more
shared memory than its target has. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distill_kernels.triton.compile_specs import Spec

MODULES = (
    "distill_kernels.triton.cross_attention_kernels",
    "distill_kernels.triton.pairwise",
)


class Target(NamedTuple):
    gpu: GPUTarget
    shared_bytes: int  # the most a block (workgroup) may use


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Row(NamedTuple):
    kernel: str
    variant: str
    target: str
    warps: int
    registers: int  # a thread's (vector registers on gfx942)
    spills: int  # bytes of local memory a thread on NVIDIA, spilled vector registers on gfx942
    shared_bytes: int
    triton: str


@functools.cache
def specs() -> list[Spec]:
    return [spec for module in MODULES for spec in importlib.import_module(module).compile_specs()]


def measure(spec: Spec, name: str) -> Row:
    target = TARGETS[name].gpu
    # As a launch finds them: aligned pointers, and strides that are multiples of the width, itself one of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, kind) in enumerate(spec.signature.items())
        if kind.startswith("*") or (kind == "i32" and re.search(r"_s[a-z]$", argument))
    }
    source = ASTSource(spec.kernel, spec.signature, spec.constants, aligned)
    options: dict[str, Any] = {
        "enable_fp_fusion": True,
        "num_warps": spec.warps,
        "num_stages": 2 if target.backend == "hip" else spec.stages,
    }
    if target.backend == "cuda":
        options["maxnreg"] = spec.registers
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        registers, spills = _amd_usage(compiled.asm["amdgcn"])
    else:
        registers, spills = _nvidia_usage(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    return Row(spec.name, spec.variant, name, spec.warps, registers, spills, shared, triton.__version__)


def _measure_named(name: str, variant: str, target: str) -> Row:
    """In a worker: a kernel does not travel between processes."""
    (spec,) = [s for s in specs() if (s.name, s.variant) == (name, variant)]
    return measure(spec, target)


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump gave no resource usage:\n{text}")
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local


def _amd_usage(assembly: str) -> tuple[int, int]:
    counts = [re.search(rf"\.{key}:\s+(\d+)", assembly) for key in ("vgpr_count", "vgpr_spill_count")]
    if None in counts:
        raise RuntimeError("the assembly holds no register counts")
    registers, spills = (int(m.group(1)) for m in counts if m)
    return registers, spills


def failures(rows: list[Row]) -> list[str]:
    """What breaks the rule: no spills, and shared memory within the target's."""
    bad = [f"{r.kernel} {r.variant} on {r.target}: {r.spills} spilled" for r in rows if r.spills]
    for row in rows:
        most = TARGETS[row.target].shared_bytes
        if row.shared_bytes > most:
            bad.append(f"{row.kernel} {row.variant} on {row.target}: {row.shared_bytes} > {most} B shared")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description="Resources of the shipped kernels")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("resources.csv"))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", nargs="+", default=[""], help="parts of '<kernel> <variant>', any of them")
    parser.add_argument(
        "--list", action="store_true", help="print '<kernel>,<variant>,<target>' lines, compile nothing"
    )
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    chosen = [s for s in specs() if any(part in f"{s.name} {s.variant}" for part in arguments.only)]
    jobs = [
        (spec.name, spec.variant, target)
        for spec in chosen
        for target in arguments.targets
        if TARGETS[target].gpu.backend == "cuda" or not spec.nvidia_only
    ]
    if arguments.list:
        print(*(",".join(job) for job in jobs), sep="\n")
        return 0
    if any(TARGETS[t].gpu.backend == "cuda" for t in arguments.targets) and not CUOBJDUMP.exists():
        parser.error(f"this Triton has no {CUOBJDUMP.name} to read NVIDIA's binaries with; use --targets gfx942")
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(_measure_named, *zip(*jobs, strict=True), chunksize=4)) if jobs else []
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)
    bad = failures(rows)
    print(*bad, f"{len(rows)} variants compiled -> {arguments.out}", sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
