"""Pre-norm residual blocks in the CLIP layout; parameters are named as CLIP checkpoints name them.

`Block.forward(x, sequences, rows)` is the one way through a block: x [T, W] holds the tokens of all sequences, one
sequence after the other, `Sequences` says where each begins and what its tokens attend to, and `rows` names the tokens
whose output is wanted. So what wraps `forward` (hooks, compilation, checkpointing, sharding) wraps every use, and a
change of the block is one edit.

N sequences, L tokens of each, Q of them read, T tokens of all sequences, W width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear

from distill_kernels import attend_to_tokens, packed_attention, self_attention, split_heads

_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "plain": (("q", "k"),),
    "value": (),
    "value_value": (("v", "v"),),
    "correlative": (("q", "q"), ("k", "k")),
}

DENSE = tuple(_PAIRS)
"""What tokens may attend by, for dense embeddings: `Sequences.attention`."""

RowIndex = Tensor | Sequence[Tensor | None]
"""Of which tokens the output is wanted: rows [R] of x; or, where sequences stand in groups of one length, for each
group positions [N, Q] in its sequences, or None for all. (Few positions need no keys and values of all tokens.)"""


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where the sequences in x [T, W] begin, and what their tokens attend to. Made once a pass, for all blocks.

    Raises ValueError where nothing says where they begin, for an unknown `attention`, and for one other than `plain` of
    sequences of several lengths.
    """

    starts: Tensor | None = None
    """[N + 1] integers: the first row of each sequence, then T. On the CPU if they are known there: attention reads
    the lengths on the host, once for a tensor. None: `shapes` has the one group that there is."""
    shapes: tuple[tuple[int, int], ...] = ()
    """(N, L) of each group, where the sequences stand in groups of one length; see `Sequences.of`."""
    causal: bool = False
    """A token attends to those up to itself, not to all of its sequence."""
    attention: str = "plain"
    """`plain`: softmax(QK') V. For dense embeddings each token may gather the values of those that are like it instead.
    `value`: V, its own (MaskCLIP, Zhou et al. 2022). `value_value`: softmax(VV') V, the attention of CLIP Surgery
    (Li et al. 2023), which has it in several last layers, on a second path without the MLP; here it is a block's own,
    with the MLP. `correlative`: (softmax(QQ') + softmax(KK')) V (Wang et al. 2023, SCLIP)."""
    mask: Tensor | None = None
    """[N, L] bool of one group: False where no token attends to. For lengths that the host does not know. Or, in four
    dimensions that broadcast to [N, H, L, L], what each token attends to."""

    def __post_init__(self) -> None:
        if self.attention not in _PAIRS:
            raise ValueError(f"no attention {self.attention!r} (there are: {', '.join(DENSE)})")
        if self.attention != "plain" and (self.causal or len(self.shapes) != 1):
            raise ValueError(f"{self.attention!r} attention is for one group of sequences of one length, not causal")
        if self.mask is not None and len(self.shapes) != 1:
            raise ValueError("a mask is for one group of sequences of one length")
        if self.starts is None and len(self.shapes) != 1:
            raise ValueError("sequences begin at `starts`; only one group of one length needs none")

    @classmethod
    def of(cls, *shapes: tuple[int, int], causal: bool = False, attention: str = "plain") -> Sequences:
        """Groups of N sequences of L tokens, each (N, L), one group after the other."""
        starts = None
        if len(shapes) > 1:
            starts = torch.tensor([0, *accumulate(length for n, length in shapes for _ in range(n))], dtype=torch.int32)
        return cls(starts, shapes, causal, attention)

    def groups(self, x: Tensor) -> list[tuple[Tensor, Sequences]]:
        """x [T, W] -> each group's part of it, with what says so."""
        if len(self.shapes) == 1:
            return [(x, self)]
        parts = torch.split(x, [n * length for n, length in self.shapes])
        return [(part, Sequences.of(shape, causal=self.causal)) for part, shape in zip(parts, self.shapes, strict=True)]

    def take(self, x: Tensor, rows: RowIndex | None) -> Tensor:
        """x [T, W] -> [R, W], in the order of `rows`."""
        if rows is None:
            return x
        if isinstance(rows, Tensor):
            return x.index_select(0, rows)
        picked = zip(self.groups(x), rows, strict=True)
        return _joined([part if at is None else _at(part, group, at).flatten(0, 1) for (part, group), at in picked])


def _at(x: Tensor, group: Sequences, positions: Tensor) -> Tensor:
    """x [N * L, W] of one group, positions [N, Q] -> [N, Q, W]."""
    ((n, length),) = group.shapes
    return x.view(n, length, x.shape[-1])[torch.arange(n, device=x.device)[:, None], positions]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)), for pictures: q [N, H, Q, K], k [N, H, L, K], mask [N, L] -> [N, H, Q, L].

    At least fp32. Zeros where a sequence has no real token, as the kernels have it.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.zeros((), dtype=torch.bool, device=q.device) if mask is None else ~mask[:, None, None]
    weights: Tensor = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
    return weights


class Attention(nn.Module):
    """Multi-head self-attention with one packed input projection (as `nn.MultiheadAttention` stores and starts it)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, sequences: Sequences, rows: RowIndex | None = None, *, norm: nn.LayerNorm) -> Tensor:
        """Of norm(x), x [T, W]: [T, W], or at `rows` alone [R, W].

        The norm is handed over, not applied before: where few positions are read it goes into the weights.
        """
        if rows is None or isinstance(rows, Tensor):
            mixed = sequences.take(self._mixed(norm(x), sequences), rows)
        else:
            mixed = _joined(
                [
                    self._mixed(norm(part), group) if at is None else self._mixed_at(part, group, at, norm)
                    for (part, group), at in zip(sequences.groups(x), rows, strict=True)
                ]
            )
        out: Tensor = self.out_proj(mixed)
        return out

    def _mixed(self, x: Tensor, sequences: Sequences) -> Tensor:
        """What each token gathers, all heads side by side: x [T, W] -> [T, W]."""
        qkv = rearrange(linear(x, self.in_proj_weight, self.in_proj_bias), "t (j h k) -> t j h k", j=3, h=self.heads)
        if len(sequences.shapes) != 1:
            assert sequences.starts is not None
            return packed_attention(qkv, sequences.starts, causal=sequences.causal).flatten(1)
        (q,), (k,), (v,) = split_heads(qkv, sequences.shapes)
        by = {"q": q, "k": k, "v": v}
        gathered = [
            self_attention(by[a], by[b], v, causal=sequences.causal, mask=sequences.mask)
            for a, b in _PAIRS[sequences.attention]
        ] or [v]
        return rearrange(sum(gathered[1:], gathered[0]), "n h l k -> (n l) (h k)")

    def _mixed_at(self, x: Tensor, group: Sequences, positions: Tensor, norm: nn.LayerNorm) -> Tensor:
        """As `_mixed` of norm(x), at few positions [N, Q] of x [N * L, W] -> [N * Q, W]. Causal: Q is 1."""
        if group.attention != "plain" or group.mask is not None or (group.causal and positions.shape[1] != 1):
            raise ValueError("few rows are read by plain attention without a mask, and one of a causal sequence")
        values = attend_to_tokens(
            norm(_at(x, group, positions)).transpose(0, 1),
            x.view(*group.shapes[0], x.shape[-1]),
            ln_weight=norm.weight,
            ln_bias=norm.bias,
            in_proj_weight=self.in_proj_weight,
            in_proj_bias=self.in_proj_bias,
            heads=self.heads,
            lengths=positions[:, 0] + 1 if group.causal else None,
            eps=norm.eps,
        )
        return values.transpose(0, 1).flatten(0, 1)

    def weights(self, row: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """With which one query a sequence, row [N, W], reads x [N, L, W], both normalised: [N, H, L]; mask [N, L]."""
        width = x.shape[-1]
        q = linear(row[:, None], self.in_proj_weight[:width], self.in_proj_bias[:width])
        k = linear(x, self.in_proj_weight[width : 2 * width], self.in_proj_bias[width : 2 * width])
        q, k = (rearrange(t, "n l (h k) -> n h l k", h=self.heads) for t in (q, k))
        return attention_weights(q, k, mask)[:, :, 0]


Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), with which OpenAI's CLIP was trained."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., W] -> [..., W]."""
        return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """W -> ratio * W -> W with erf GELU, or the sigmoid's or tanh's approximation of it."""

    def __init__(self, width: int, ratio: float, activation: Activation = "gelu") -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, int(width * ratio))
        self.gelu = (
            QuickGELU() if activation == "quick_gelu" else nn.GELU("tanh" if activation == "gelu_tanh" else "none")
        )
        self.c_proj = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., W] -> [..., W]."""
        return self.c_proj(self.gelu(self.c_fc(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, activation: Activation = "gelu", eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, mlp_ratio, activation)

    def forward(
        self, x: Tensor, sequences: Sequences, rows: RowIndex | None = None, scales: Tensor | None = None
    ) -> Tensor:
        """x [T, W] -> [T, W], or at `rows` alone [R, W]: after the attention the rest is not computed.

        `scales` [T, 2]: factors of what the attention and the MLP add to each token (`Transformer.drop_path`).
        """
        if scales is None:
            x = sequences.take(x, rows) + self.attn(x, sequences, rows, norm=self.ln_1)
            return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]
        taken = sequences.take(scales.to(x.dtype), rows)
        of_attention, of_mlp = taken[:, :1], taken[:, 1:]
        x = sequences.take(x, rows) + of_attention * self.attn(x, sequences, rows, norm=self.ln_1)
        return x + of_mlp * self.mlp(self.ln_2(x))  # type: ignore[no-any-return]

    def weights(self, x: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
        """With which position `index` [N] reads x [N, L, W]: [N, H, L]; mask [N, L]. Only for pictures."""
        normed = self.ln_1(x)
        return self.attn.weights(normed[torch.arange(len(x), device=x.device), index], normed, mask)


class LayerOutputs(dict[int, Tensor]):
    """What some blocks give, while a pass runs: number of the block -> [T, W], before any final norm; of the last block
    at `rows` alone, [R, W]."""

    def __init__(self, wanted: Iterable[int] = ()) -> None:
        super().__init__()
        self.wanted = frozenset(wanted)

    def see(self, block: int, x: Tensor) -> None:
        """Hold `x` if this block's output is wanted."""
        if block in self.wanted:
            self[block] = x


class Transformer(nn.Module):
    """A stack of blocks; of the last, few rows may be asked."""

    def __init__(
        self, width: int, layers: int, heads: int, mlp_ratio: float, activation: Activation = "gelu", eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads, mlp_ratio, activation, eps) for _ in range(layers)])
        self.drop_path = 0.0
        """Stochastic depth (Huang et al. 2016) while training: the odds that a sequence passes by a branch of the last
        block; 0 in the first, and in a line between them."""

    @property
    def last(self) -> Block:
        """The last block."""
        block = self.resblocks[-1]
        assert isinstance(block, Block)
        return block

    def forward(
        self,
        x: Tensor,
        sequences: Sequences,
        rows: RowIndex | None = None,
        layers: LayerOutputs | None = None,
    ) -> Tensor:
        """x [T, W] -> [T, W], or at `rows` alone [R, W]; `layers` sees what each block gives."""
        *_, of_last = scales = self._scales(x, sequences)
        out: Tensor = self.last(self.body(x, sequences, scales, layers), sequences, rows, of_last)
        if layers is not None:
            layers.see(len(self.resblocks) - 1, out)
        return out

    def body(
        self,
        x: Tensor,
        sequences: Sequences,
        scales: Sequence[Tensor | None] = (),
        layers: LayerOutputs | None = None,
    ) -> Tensor:
        """All blocks but the last: x [T, W] -> [T, W]; `scales` as `Block.forward` takes them, of each block."""
        for i, block in enumerate(self.resblocks[:-1]):
            x = block(x, sequences, None, scales[i]) if scales else block(x, sequences)
            if layers is not None:
                layers.see(i, x)
        return x

    def _scales(self, x: Tensor, sequences: Sequences) -> list[Tensor | None]:
        """Of each block [T, 2], or None where nothing is dropped. Each branch draws anew for each sequence."""
        count = len(self.resblocks)
        if not self.training or self.drop_path == 0:
            return [None] * count
        lengths = [length for n, length in sequences.shapes for _ in range(n)]
        if lengths:
            each = torch.tensor(lengths, device=x.device)
        else:
            assert sequences.starts is not None
            each = sequences.starts.diff().to(x.device)
        rates = [self.drop_path * i / max(count - 1, 1) for i in range(count)]
        draws = torch.rand(count, len(each), 2, device=x.device)
        return [
            ((row >= rate) / (1 - rate)).repeat_interleave(each, dim=0, output_size=len(x)) if rate else None
            for row, rate in zip(draws, rates, strict=True)
        ]

    def weights(self, x: Tensor, index: Tensor, *, causal: bool = False) -> Tensor:
        """With which position `index` [N] reads x [N, L, W] in the last block: [N, H, L]. Only for pictures."""
        n, length, _ = x.shape
        x = self.body(x.flatten(0, 1), Sequences.of((n, length), causal=causal)).view(x.shape)
        visible = torch.arange(length, device=x.device) <= index[:, None]
        return self.last.weights(x, index, visible if causal else None)

    def together(
        self,
        inputs: Sequence[Tensor],
        positions: Sequence[Tensor | None],
        *,
        causal: bool = False,
        layers: Iterable[int] = (),
    ) -> tuple[list[Tensor], list[dict[int, Tensor]]]:
        """Several [N, L, W] in one pass -> of each [N, L, W], or at `positions` [N, Q] alone [N, Q, W]; and of each
        what the blocks `layers` give, {block: [N, L, W]}, of the last one again at `positions`.

        So each weight is read once, and its gradient is one product instead of a sum of several.
        """
        # by length: sequences that attention takes together then stand together, and nothing is copied
        order = sorted(range(len(inputs)), key=lambda i: inputs[i].shape[1])
        whole = [(inputs[i].shape[0], inputs[i].shape[1]) for i in order]
        sequences = Sequences.of(*whole, causal=causal)
        rows = None if all(at is None for at in positions) else [positions[i] for i in order]
        seen = LayerOutputs(layers)
        out = self(_joined([inputs[i].flatten(0, 1) for i in order]), sequences, rows, seen)
        read = [whole[place] if (at := positions[i]) is None else tuple(at.shape) for place, i in enumerate(order)]

        def by_input(packed: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
            parts = [packed] if len(order) == 1 else torch.split(packed, [n * count for n, count in shapes])
            cut = [part.view(*shape, part.shape[-1]) for part, shape in zip(parts, shapes, strict=True)]
            return [cut[order.index(i)] for i in range(len(inputs))]

        last = len(self.resblocks) - 1
        cut = {block: by_input(packed, read if block == last else whole) for block, packed in seen.items()}
        return by_input(out, read), [{block: parts[i] for block, parts in cut.items()} for i in range(len(inputs))]
