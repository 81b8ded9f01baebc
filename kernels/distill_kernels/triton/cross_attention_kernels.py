"""Triton kernels of `cross_attention`: one program owns a (sample, head) and one block of its queries.

A flash kernel tiles 64 or 128 queries; with V = 8 most of the tile is empty, and its backward pass needs a
second kernel or atomics because dQ and dK are owned by different programs. Here all queries of a sample fit
one block of up to 64 (16 or 32 in fp32), so that one program sees every query and every key: K and V are read once
in each pass, dK and dV are written as they are made, and dQ stays in registers.

Shape letters: B samples, H heads, V queries, L tokens, K head width. Masked keys and values are not read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Triton reads the kernels' annotations itself: only constants carry one.

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from distill_kernels.triton.compile_specs import Spec, make_spec, precisions

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def cross_attention_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lengths_ptr, mask_ptr,
    q_sb, q_sh, q_sv, q_sk,
    k_sb, k_sh, k_sl, k_sk,
    v_sb, v_sh, v_sl, v_sk,
    o_sb, o_sh, o_sv, o_sk,
    mask_sb, mask_sl,
    heads, queries, tokens, scale,
    WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Outputs and log-sum-exps of block program_id(1) of the queries of (sample, head) program_id(0)."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_k = tl.arange(0, BLOCK_K)
    in_k = offs_k < WIDTH
    in_vk = (offs_v < queries)[:, None] & in_k[None, :]

    q = tl.load(q_ptr + b * q_sb + h * q_sh + offs_v[:, None] * q_sv + offs_k[None, :] * q_sk, mask=in_vk, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    end = tokens
    if HAS_LENGTHS:
        end = tl.minimum(tl.maximum(tl.load(lengths_ptr + b).to(tl.int32), 0), tokens)

    k_base = k_ptr + b * k_sb + h * k_sh
    v_base = v_ptr + b * v_sb + h * v_sh
    largest = tl.full([BLOCK_V], float("-inf"), ACC)  # of the scores so far, in units of log2
    total = tl.zeros([BLOCK_V], ACC)
    acc = tl.zeros([BLOCK_V, BLOCK_K], ACC)
    for start in range(0, end, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        valid = offs_l < end
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + b * mask_sb + offs_l * mask_sl, mask=valid, other=0) != 0)
        in_lk = valid[:, None] & in_k[None, :]
        k = tl.load(k_base + offs_l[:, None] * k_sl + offs_k[None, :] * k_sk, mask=in_lk, other=0.0)
        v = tl.load(v_base + offs_l[:, None] * v_sl + offs_k[None, :] * v_sk, mask=in_lk, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2_E)
        s = tl.where(valid[None, :], s, float("-inf"))
        new = tl.maximum(largest, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION, out_dtype=ACC)
        largest = new

    empty = total == 0.0  # no valid token
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    # Natural log units; +inf makes the backward pass's probabilities exactly zero.
    lse = tl.where(empty, float("inf"), (largest + tl.log2(tl.where(empty, 1.0, total))) / LOG2_E)
    tl.store(lse_ptr + (b * heads + h) * queries + offs_v, lse, mask=offs_v < queries)
    out = out_ptr + b * o_sb + h * o_sh + offs_v[:, None] * o_sv + offs_k[None, :] * o_sk
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_vk)


@triton.jit
def cross_attention_backward(
    do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lengths_ptr, mask_ptr, dq_ptr, dk_ptr, dv_ptr,
    do_sb, do_sh, do_sv, do_sk,
    q_sb, q_sh, q_sv, q_sk,
    k_sb, k_sh, k_sl, k_sk,
    v_sb, v_sh, v_sl, v_sk,
    o_sb, o_sh, o_sv, o_sk,
    mask_sb, mask_sl,
    dq_sb, dq_sh, dq_sv, dq_sk,
    dk_sb, dk_sh, dk_sl, dk_sk,
    dv_sb, dv_sh, dv_sl, dv_sk,
    heads, queries, tokens, first, scale,
    WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of (sample, head) program_id(0) from queries first .. first + BLOCK_V.

    ADD: dk and dv hold the sums of earlier blocks of queries and are added to.
    """
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    offs_v = first + tl.arange(0, BLOCK_V)
    offs_k = tl.arange(0, BLOCK_K)
    in_v = offs_v < queries
    in_k = offs_k < WIDTH
    in_vk = in_v[:, None] & in_k[None, :]

    q = tl.load(q_ptr + b * q_sb + h * q_sh + offs_v[:, None] * q_sv + offs_k[None, :] * q_sk, mask=in_vk, other=0.0)
    do = tl.load(
        do_ptr + b * do_sb + h * do_sh + offs_v[:, None] * do_sv + offs_k[None, :] * do_sk,
        mask=in_vk,
        other=0.0,
    )
    out = tl.load(
        out_ptr + b * o_sb + h * o_sh + offs_v[:, None] * o_sv + offs_k[None, :] * o_sk, mask=in_vk, other=0.0
    )
    delta = tl.sum(do.to(ACC) * out.to(ACC), 1)  # rows of p . dp
    # Rows beyond the queries get p = 0.
    lse = tl.load(lse_ptr + (b * heads + h) * queries + offs_v, mask=in_v, other=float("inf")) * LOG2_E
    if UPCAST:
        q = q.to(tl.float32)
        do = do.to(tl.float32)
    end = tokens
    if HAS_LENGTHS:
        end = tl.minimum(tl.maximum(tl.load(lengths_ptr + b).to(tl.int32), 0), tokens)

    k_base = k_ptr + b * k_sb + h * k_sh
    v_base = v_ptr + b * v_sb + h * v_sh
    dk_base = dk_ptr + b * dk_sb + h * dk_sh
    dv_base = dv_ptr + b * dv_sb + h * dv_sh
    dq = tl.zeros([BLOCK_V, BLOCK_K], ACC)
    for start in range(0, end, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        valid = offs_l < end
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + b * mask_sb + offs_l * mask_sl, mask=valid, other=0) != 0)
        in_lk = valid[:, None] & in_k[None, :]
        k = tl.load(k_base + offs_l[:, None] * k_sl + offs_k[None, :] * k_sk, mask=in_lk, other=0.0)
        v = tl.load(v_base + offs_l[:, None] * v_sl + offs_k[None, :] * v_sk, mask=in_lk, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2_E)
        p = tl.where(valid[None, :], tl.exp2(s - lse[:, None]), 0.0)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION, out_dtype=ACC)
        if ADD:  # dv goes before dk comes: the registers do not hold the sums of both
            stored = (offs_l < tokens)[:, None] & in_k[None, :]
            dv_at = dv_base + offs_l[:, None] * dv_sl + offs_k[None, :] * dv_sk
            dv += tl.load(dv_at, mask=stored, other=0.0).to(ACC)
            tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=stored)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        # The second `where` keeps a NaN delta out of masked tokens.
        ds = tl.where(valid[None, :], p * (dp - delta[:, None]) * scale, 0.0).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION, out_dtype=ACC)
        dq += tl.dot(ds, k, input_precision=PRECISION, out_dtype=ACC)
        stored = (offs_l < tokens)[:, None] & in_k[None, :]
        dk_at = dk_base + offs_l[:, None] * dk_sl + offs_k[None, :] * dk_sk
        if ADD:
            dk += tl.load(dk_at, mask=stored, other=0.0).to(ACC)
        tl.store(dk_at, dk.to(dk_ptr.dtype.element_ty), mask=stored)
        if not ADD:
            dv_at = dv_base + offs_l[:, None] * dv_sl + offs_k[None, :] * dv_sk
            tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=stored)

    if HAS_LENGTHS and not ADD:
        nothing = tl.zeros([BLOCK_L, BLOCK_K], ACC)
        for start in range(tl.cdiv(end, BLOCK_L) * BLOCK_L, tokens, BLOCK_L):
            offs_l = start + tl.arange(0, BLOCK_L)
            stored = (offs_l < tokens)[:, None] & in_k[None, :]
            dk_at = dk_base + offs_l[:, None] * dk_sl + offs_k[None, :] * dk_sk
            dv_at = dv_base + offs_l[:, None] * dv_sl + offs_k[None, :] * dv_sk
            tl.store(dk_at, nothing.to(dk_ptr.dtype.element_ty), mask=stored)
            tl.store(dv_at, nothing.to(dv_ptr.dtype.element_ty), mask=stored)

    dq_at = dq_ptr + b * dq_sb + h * dq_sh + offs_v[:, None] * dq_sv + offs_k[None, :] * dq_sk
    tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), mask=in_vk)


class Blocks(NamedTuple):
    """Block sizes of both kernels for one (V, K, element size)."""

    queries: int  # BLOCK_V
    width: int  # BLOCK_K
    forward: int  # BLOCK_L of the forward kernel
    backward: int  # BLOCK_L of the backward kernel
    warps: int
    registers: int | None  # NVIDIA: the most that a thread may use; None leaves it to the compiler
    stages: int = 3


def blocks(queries: int, width: int, itemsize: int, precision: str = "ieee") -> Blocks:
    """The shipped block sizes, of widths that are multiples of 16: no spills on the targets of
    `kernels/bench/resources.csv`.

    16 is the smallest side of a matrix product. Exact fp32 products run outside the matrix units and hold
    their operands in registers: fewer queries, more warps.

    Without a bound on the registers, even the largest, NVIDIA's compiler may spill some bytes to fit one more
    program on a multiprocessor. The recipes' sizes do not spill, and keep that program.
    """
    v = min(max(triton.next_power_of_2(queries), 16), 64)
    k = triton.next_power_of_2(width)
    split = precision == "tf32x3"  # both halves of every fp32 operand are held at once
    if itemsize <= 2:
        bound = None if v == 16 and k <= 64 else 255
        if v * k <= 16 * 128:
            return Blocks(v, k, 64, 32, 4, bound)
        return Blocks(v, k, 32, 16, 4 if k <= 64 else 8, bound)
    if k > 64:
        return Blocks(16, k, 32, 16, 8, 255, stages=2)
    if split:
        return Blocks(16, k, 64, 16, 4, 255)
    if v == 16:
        return Blocks(16, k, 64, 32, 4, None if k == 64 else 255)
    return Blocks(32, k, 64, 16, 8, 255)


def compile_specs() -> list[Spec]:
    """Variants for `kernels/bench/resources.py`: every `blocks` with every kind of valid tokens.

    Widths that do not fill their block come with one kind. fp16 takes bf16's blocks and, on NVIDIA, exactly its
    registers: once.
    """
    specs = _specs("fp16", 8, 64, "lengths")
    for dtype in ("bf16", "fp32"):
        for width in (16, 32, 64, 80, 128):
            kinds = ("all", "lengths", "mask") if width == blocks(1, width, 4).width else ("lengths",)
            specs += [
                s
                for queries in (8, 32, 64, 128)
                for valid in kinds
                for precision in precisions(dtype)
                for s in _specs(dtype, queries, width, valid, precision)
            ]
    unique: dict[str, Spec] = {}
    for s in specs:
        unique.setdefault(str(s._replace(variant="")), s)
    return list(unique.values())


def _specs(dtype: str, queries: int, width: int, valid: str, precision: str = "ieee") -> list[Spec]:
    """All that a call launches; valid is "all", "lengths" or "mask"."""
    size = blocks(queries, width, 4 if dtype == "fp32" else 2, precision)
    more_words = [word for word in (valid, precision) if word not in ("all", "ieee")]
    variant = " ".join([f"{dtype} V={queries} K={width}", *more_words])
    common = {
        "WIDTH": width,
        "BLOCK_V": size.queries,
        "BLOCK_K": size.width,
        "HAS_LENGTHS": valid == "lengths",
        "HAS_MASK": valid == "mask",
        "ACC": tl.float32,
        "PRECISION": precision,
        "UPCAST": False,
    }
    types = {"lse_ptr": "*fp32", "scale": "fp32"}
    for name, pointer, kind in (("lengths", "lengths_ptr", "*i64"), ("mask", "mask_ptr", "*i1")):
        if valid == name:
            types[pointer] = kind
        else:
            common[pointer] = None

    def spec(kernel: Any, tensors: tuple[str, ...], wide: tuple[str, ...], own: dict[str, Any]) -> Spec:
        last = {n: 1 for n in kernel.arg_names if n.endswith("_sk") or n == "mask_sl"}  # unit strides
        of_tensors = {f"{t}_ptr": f"*{dtype}" for t in tensors} | {f"{t}_ptr": "*fp32" for t in wide}
        constants = common | last | own
        return make_spec(
            kernel,
            variant,
            types | of_tensors,
            constants,
            warps=size.warps,
            stages=size.stages,
            registers=size.registers,
        )

    sums, more = ("dk", "dv"), ("do", "q", "k", "v", "out", "dq")
    forward = spec(cross_attention_forward, ("q", "k", "v", "out"), (), {"BLOCK_L": size.forward})
    own = {"BLOCK_L": size.backward, "ADD": False}
    if queries <= size.queries:
        return [forward, spec(cross_attention_backward, (*more, *sums), (), own)]
    # Blocks of queries after the first add to its sums, which are wide.
    return [forward, spec(cross_attention_backward, more, sums, own | {"ADD": True})]
