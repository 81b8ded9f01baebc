"""Time and peak memory of cross-attention pooling and of its attention, forward + backward.

    python kernels/bench/bench_cross_attention.py               # rows of kernels/bench/results.csv
    python kernels/bench/bench_cross_attention.py --crossover   # where the two forms cross: absorbed against projected

On CPU one thread is used. V queries (views), B samples, L tokens, D width, H heads, K = D / H.

- `cross_attention_pool`: in its forms against `repeated`, nn.LayerNorm + nn.MultiheadAttention on tokens repeated for
  each query, which is what public code does.
- `cross_attention`: its backends against `repeated`, SDPA on keys and values repeated for each query, each attending on
  its own; B x H programs of V queries are what the others see. `lengths`: all tokens valid, or a random prefix.

`roofline` is the share of the device's measured copy bandwidth that a row reaches, counting what must be moved
at least once: inputs, outputs and their gradients.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.results import PATH, Result, measure, save
from distill_kernels import cross_attention, cross_attention_pool
from distill_kernels.attention.cross_attention import OP, CrossAttentionInputs
from distill_kernels.dispatch import choose
from distill_kernels.machine import device_name
from distill_kernels.measure import interleaved

VIEWS, HEADS, WIDTH = 8, 8, 512


def pool_calls(dtype: torch.dtype, batch: int, tokens: int, device: torch.device) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    ln_q, ln_k = nn.LayerNorm(WIDTH, device=device), nn.LayerNorm(WIDTH, device=device)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, device=device)
    parameters = [*ln_q.parameters(), *ln_k.parameters(), *attention.parameters()]
    new = functools.partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
    queries, y = new(VIEWS, batch, WIDTH), new(batch, tokens, WIDTH)

    def repeated() -> Tensor:
        copies = y.expand(VIEWS, -1, -1, -1).reshape(VIEWS * batch, tokens, WIDTH)
        keys = ln_k(copies)
        x = ln_q(queries).reshape(VIEWS * batch, 1, WIDTH)
        out = attention(x, keys, keys, need_weights=False)[0].reshape(VIEWS, batch, WIDTH)
        return F.normalize(queries + out, dim=-1)

    def ours(form: str) -> Tensor:
        return cross_attention_pool(
            queries,
            y,
            ln_q_weight=ln_q.weight,
            ln_q_bias=ln_q.bias,
            ln_k_weight=ln_k.weight,
            ln_k_bias=ln_k.bias,
            in_proj_weight=attention.in_proj_weight,
            in_proj_bias=attention.in_proj_bias,
            out_proj_weight=attention.out_proj.weight,
            out_proj_bias=attention.out_proj.bias,
            heads=HEADS,
            backend=form,
        )

    def step(forward: Callable[[], Tensor]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = forward()
        torch.autograd.grad(out, [queries, y, *parameters], torch.ones_like(out))

    forms = {form: functools.partial(ours, form) for form in ("projected", "absorbed", "auto")}
    calls: dict[str, Callable[[], Tensor]] = {"repeated": repeated, **forms}
    return {name: functools.partial(step, f) for name, f in calls.items()}


def attention_calls(
    dtype: torch.dtype, batch: int, tokens: int, device: torch.device, with_lengths: bool
) -> tuple[dict[str, Callable[[], None]], str]:
    """And the name of what `auto` takes."""
    torch.manual_seed(0)
    new = functools.partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
    # The layouts of the pooling: queries [V, B, H, K]; keys and values from one projection, [B, L, 2, H, K].
    q_leaf, kv = new(VIEWS, batch, HEADS, WIDTH // HEADS), new(batch, tokens, 2, HEADS, WIDTH // HEADS)
    lengths = torch.randint(1, tokens + 1, (batch,), device=device) if with_lengths else None

    def views() -> tuple[Tensor, Tensor, Tensor]:
        k, v = kv.permute(2, 0, 3, 1, 4)
        return q_leaf.permute(1, 2, 0, 3), k, v

    def repeated() -> Tensor:
        q, k, v = views()
        q = q.permute(2, 0, 1, 3).reshape(VIEWS * batch, HEADS, 1, -1)
        k, v = (t.expand(VIEWS, -1, -1, -1, -1).reshape(VIEWS * batch, *t.shape[1:]) for t in (k, v))
        if lengths is None:
            return F.scaled_dot_product_attention(q, k, v)
        valid = (torch.arange(tokens, device=device) < lengths[:, None])[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=valid.repeat(VIEWS, 1, 1, 1))

    def step(forward: Callable[[], Tensor]) -> None:
        out = forward()
        torch.autograd.grad(out, (q_leaf, kv), torch.ones_like(out))

    calls: dict[str, Callable[[], Tensor]] = {"repeated": repeated}
    inputs = CrossAttentionInputs(*views(), lengths, None, (WIDTH // HEADS) ** -0.5)
    for backend in OP.backends:
        reason = backend.why_not(inputs)
        if reason is None:
            run = functools.partial(lambda name: cross_attention(*views(), lengths, backend=name), backend.name)
            calls[backend.name] = run
        else:
            print(f"cross_attention: no row for {backend.name}: {reason}")
    return {name: functools.partial(step, f) for name, f in calls.items()}, choose(OP, "auto", inputs).name


def all_cases(device: torch.device, rounds: int, batch: int) -> Iterator[list[Result]]:
    """The rows of each case."""
    bandwidth = copy_bandwidth(device)
    print(f"{device_name(device)}: copies {bandwidth / 1e9:.1f} GB/s")
    row = functools.partial(measure, baseline="repeated", device=device, rounds=rounds, bandwidth=bandwidth)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (77, 196):
            size = 2 * dtype.itemsize * WIDTH * batch  # the gradients are moved as well
            pools = pool_calls(dtype, batch, tokens, device)
            shape = f"V={VIEWS} B={batch} L={tokens}"
            yield row(
                "cross_attention_pool",
                f"{shape} D={WIDTH} H={HEADS}",
                dtype,
                pools,
                auto="auto",
                least_bytes=size * (2 * VIEWS + tokens),
            )
            for lengths in ("all", "random"):
                calls, auto = attention_calls(dtype, batch, tokens, device, lengths == "random")
                yield row(
                    "cross_attention",
                    f"{shape} H={HEADS} K={WIDTH // HEADS} lengths={lengths}",
                    dtype,
                    calls,
                    auto=auto,
                    least_bytes=size * (2 * VIEWS + 2 * tokens),
                )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(1 << (30 if device.type == "cuda" else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, rounds=9, device=device)["copy"]
    return 2 * source.numel() / (seconds.process if device.type == "cpu" else seconds.wall)


def crossover(device: torch.device, rounds: int) -> Iterator[list[Result]]:
    """Both forms over V, H, L, D, B: what the cost model is fitted to."""
    global VIEWS, HEADS, WIDTH
    sizes = [
        (batch, width, heads, tokens, views)
        for batch in (8, 32)
        for width, heads in ((512, 8), (768, 12), (256, 4), (512, 16))
        for tokens in (49, 77, 196)
        for views in ((1, 4, 8, 16, 24, 32, 48) if batch == 8 else (2, 8, 16, 32))
    ]
    # the tiny recipes' captions and pictures
    sizes += [(256, 128, 4, tokens, views) for tokens in (20, 26, 37) for views in (1, 2, 4, 6, 8, 12)]
    sizes += [(64, 128, 4, 26, views) for views in (1, 4, 8)]
    sizes += [(16, 192, 3, 65, views) for views in (1, 8)] + [(64, 64, 2, 17, views) for views in (1, 4)]
    # a class token in a tower's last block, one picture at a time and many
    sizes += [(1, width, heads, 37, views) for width, heads in ((768, 12), (128, 4)) for views in (1, 8)]
    sizes += [(1, 768, 12, 197, 1), (1, 768, 12, 197, 8), (4, 768, 12, 197, 1), (24, 768, 12, 37, 1)]
    sizes += [(256, 768, 12, 37, 1)]
    for dtype in (torch.float32, torch.bfloat16):
        for batch, WIDTH, HEADS, tokens, VIEWS in sizes:
            calls = pool_calls(dtype, batch, tokens, device)
            forms = {name: calls[name] for name in ("projected", "absorbed")}
            shape = f"V={VIEWS} B={batch} L={tokens} D={WIDTH} H={HEADS}"
            rows = measure(
                "cross_attention_pool", shape, dtype, forms, "projected", device=device, rounds=rounds, auto="auto"
            )
            yield [row for row in rows if row.backend == "absorbed"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Cross-attention benchmark")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, help="32 on CPU, 512 on a GPU")
    parser.add_argument("--crossover", action="store_true", help="measure where the two forms cross instead")
    parser.add_argument("--out", type=Path, default=PATH)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    if arguments.crossover:
        cases = crossover(device, arguments.rounds)
    else:
        cases = all_cases(device, arguments.rounds, arguments.batch or (512 if device.type == "cuda" else 32))
    for rows in cases:
        save(rows, arguments.out)


if __name__ == "__main__":
    main()
