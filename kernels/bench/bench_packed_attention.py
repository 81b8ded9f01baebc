"""Self-attention of the towers, padded and packed: every backend, training and inference.

    python kernels/bench/bench_packed_attention.py     # every case: rows of kernels/bench/results.csv
    python kernels/bench/bench_packed_attention.py --op packed_attention --rounds 5

N sequences, L tokens (shortest..longest), H heads, K head width. Inputs are strided as a fused projection leaves them;
training is forward + backward to the projection's output. On a CPU freed memory is kept, as in training. Results are
compared with `reference` before anything is timed. The baseline of self_attention is `sdpa`; that of packed_attention
is `padded`, scaled_dot_product_attention over [N, longest], to which the copies in and out are not charged.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.results import PATH, measure, save
from distill_kernels.attention.packed_attention import OP as PACKED
from distill_kernels.attention.packed_attention import PackedInputs, packed_attention
from distill_kernels.attention.self_attention import OP as DENSE
from distill_kernels.attention.self_attention import SelfAttention, self_attention, without_cudnn
from distill_kernels.dispatch import choose

# N, L, H, K, causal: images and texts of the tiny recipe, ViT-B at 224, 96, 176 and 192 px, CLIP text.
DENSE_CASES = (
    (256, 37, 4, 32, False),
    (8, 197, 12, 64, False),
    (32, 37, 12, 64, False),
    (16, 122, 12, 64, False),
    (8, 145, 12, 64, False),
    (256, 40, 4, 32, True),
    (32, 77, 8, 64, True),
)
# N, shortest, longest, H, K, causal: captions at batch 4 and 32, tiny captions, long captions, dropped patches.
PACKED_CASES = (
    (48, 10, 41, 8, 64, True),
    (256, 6, 41, 8, 64, True),
    (1024, 4, 15, 4, 32, True),
    (32, 20, 77, 8, 64, True),
    (8, 100, 196, 12, 64, False),
)

Call = Callable[[Tensor], Tensor]


def step(call: Call, x: Tensor, training: bool) -> Tensor:
    with torch.set_grad_enabled(training):
        out = call(x)
        if training:
            (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
            return gradient
        return out


def dense_calls(x: Tensor, causal: bool) -> tuple[dict[str, Call], str]:
    """x [N, L, 3, H, K]. Also the name of what `auto` chooses."""

    def attend(x: Tensor, backend: str) -> Tensor:
        q, k, v = x.permute(2, 0, 3, 1, 4)
        return self_attention(q, k, v, causal=causal, backend=backend).transpose(1, 2)

    q, k, v = x.permute(2, 0, 3, 1, 4)
    inputs = SelfAttention(q, k, v, causal, None)
    names = [b.name for b in DENSE.backends if b.why_not(inputs) is None]
    calls: dict[str, Call] = {name: functools.partial(attend, backend=name) for name in names}
    return calls, choose(DENSE, "auto", inputs).name


def packed_calls(x: Tensor, lengths: tuple[int, ...], causal: bool) -> tuple[dict[str, Call], str]:
    """x [T, 3, H, K]. Also the name of what `auto` chooses."""
    cu_lengths = torch.tensor((0, *lengths), device=x.device).cumsum(0)

    def attend(x: Tensor, backend: str) -> Tensor:
        return packed_attention(x, cu_lengths, causal=causal, backend=backend)

    inputs = PackedInputs(x, cu_lengths, lengths, causal)
    names = [b.name for b in PACKED.backends if b.why_not(inputs) is None]
    calls: dict[str, Call] = {name: functools.partial(attend, backend=name) for name in names}
    return calls, choose(PACKED, "auto", inputs).name


def padded_call(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Call:
    """x [N, longest, 3, H, K], what a tower without packing computes."""
    valid = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(device)
    keys = None if causal else valid[:, None, None, :]

    def attend(x: Tensor) -> Tensor:
        q, k, v = x.permute(2, 0, 3, 1, 4)
        with without_cudnn(device):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, is_causal=causal)

    return attend


def keep_freed_memory() -> None:
    """Start again with a C library (glibc) that keeps freed memory, which it reads when a process starts."""
    settings = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(sys.maxsize)}
    if sys.platform.startswith("linux") and not settings.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", nargs="+", default=["self_attention", "packed_attention"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=PATH)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        keep_freed_memory()
    for dtype in (getattr(torch, name) for name in arguments.dtypes):
        new = functools.partial(torch.randn, device=device, dtype=dtype)
        for training in (True, False):
            row = functools.partial(measure, dtype=dtype, training=training, device=device, rounds=arguments.rounds)
            for n, length, heads, width, causal in DENSE_CASES if "self_attention" in arguments.op else ():
                x = new(n, length, 3, heads, width, requires_grad=training)
                with torch.set_grad_enabled(training):
                    calls, auto = dense_calls(x, causal)
                steps = {name: functools.partial(step, call, x, training) for name, call in calls.items()}
                shape = f"N={n} L={length} H={heads} K={width} causal={int(causal)}"
                save(
                    row("self_attention", shape, calls=compared(steps, shape), baseline="sdpa", auto=auto),
                    arguments.out,
                )
            for n, low, high, heads, width, causal in PACKED_CASES if "packed_attention" in arguments.op else ():
                lengths = tuple(torch.randint(low, high + 1, (n,)).tolist())
                x = new(sum(lengths), 3, heads, width, requires_grad=training)
                with torch.set_grad_enabled(training):
                    calls, auto = packed_calls(x, lengths, causal)
                steps = {name: functools.partial(step, call, x, training) for name, call in calls.items()}
                y = new(n, max(lengths), 3, heads, width, requires_grad=training)
                steps["padded"] = functools.partial(step, padded_call(lengths, causal, device), y, training)
                shape = f"N={n} L={low}..{high} H={heads} K={width} causal={int(causal)}"
                rows = row("packed_attention", shape, calls=compared(steps, shape), baseline="padded", auto=auto)
                save(rows, arguments.out)


def compared(steps: Mapping[str, Callable[[], Tensor]], shape: str) -> dict[str, Callable[[], Tensor]]:
    """All but `reference`, which they agree with."""
    true = steps["reference"]()
    for name, call in steps.items():
        got = call()
        if got.shape != true.shape:
            continue  # padded: other rows
        error = ((got - true).abs().max() / true.abs().max()).item()
        if not error <= (1e-4 if true.dtype == torch.float32 else 0.04):
            raise SystemExit(f"{shape}: {name} differs from the reference by {error:.1e} of the largest")
    return {name: call for name, call in steps.items() if name != "reference"}


if __name__ == "__main__":
    main()
