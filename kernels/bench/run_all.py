"""Every kernel benchmark, one after the other, each in its own process. On a GPU they should take under 8 minutes.

    python kernels/bench/run_all.py [--only cross_attention info_nce packed_attention resources step]

Those of the ops write results.csv beside this file, with device and versions; `resources` and `step`, whose rows are no
op's times, a file each. A benchmark that fails does not stop the others.
The time on a GPU was never measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEP = ["-m", "distill_core.cli", "bench", "step", str(HERE.parents[1] / "recipes" / "cosmos_vitb16.yaml")]
COMMANDS = {
    "cross_attention": [str(HERE / "bench_cross_attention.py")],
    "info_nce": [str(HERE / "bench_info_nce.py")],
    "packed_attention": [str(HERE / "bench_packed_attention.py")],
    "resources": [str(HERE / "resources.py")],
    "step": [
        *STEP,
        *("--device", DEVICE, "--batch", "64" if DEVICE == "cuda" else "4", "--rounds", "3"),
        *("--csv", str(HERE / f"step-{DEVICE}.csv")),
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    failed = []
    for name in parser.parse_args().only:
        start = time.perf_counter()
        print(f"== {name}", flush=True)
        code = subprocess.run([sys.executable, *COMMANDS[name]], check=False).returncode
        print(f"== {name}: exit {code}, {time.perf_counter() - start:.0f} s", flush=True)
        if code:
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
