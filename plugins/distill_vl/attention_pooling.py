"""Attention pooling: one learned query reads all tokens (MAP, Lee et al. 2019; Zhai et al. 2022), as in SigLIP's ViTs.

N inputs, L tokens, W width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from distill_kernels import attend_to_tokens
from distill_vl.transformer import MLP, Activation, Attention


class AttentionPooling(nn.Module):
    """y = attention(probe, LN(x), LN(x)), then y + MLP(LN(y)).

    The first norm is the tower's last one, handed over and not applied before: where nobody asks for tokens, normalised
    tokens, keys and values need not exist (`attend_to_tokens`).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Activation, eps: float) -> None:
        super().__init__()
        self.probe = nn.Parameter(width**-0.5 * torch.randn(width))
        self.attn = Attention(width, heads)
        self.ln = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, mlp_ratio, activation)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """x [N, L, W], not normalised -> [N, W]."""
        gathered = attend_to_tokens(
            self._queries(x),
            x,
            ln_weight=norm.weight,
            ln_bias=norm.bias,
            in_proj_weight=self.attn.in_proj_weight,
            in_proj_bias=self.attn.in_proj_bias,
            heads=self.attn.heads,
            eps=norm.eps,
        )
        return self._read(gathered[0])

    def each(self, x: Tensor) -> Tensor:
        """What each token alone would be pooled to: x [..., W], normalised -> [..., W]."""
        width = x.shape[-1]
        return self._read(linear(x, self.attn.in_proj_weight[2 * width :], self.attn.in_proj_bias[2 * width :]))

    def weights(self, x: Tensor) -> Tensor:
        """With which the query reads x [N, L, W], normalised: [N, H, L]. Only for pictures."""
        return self.attn.weights(self._queries(x)[0], x, None)

    def _queries(self, x: Tensor) -> Tensor:
        """[1, N, W]."""
        return self.probe.expand(1, x.shape[0], -1)

    def _read(self, gathered: Tensor) -> Tensor:
        y = self.attn.out_proj(gathered)
        return y + self.mlp(self.ln(y))  # type: ignore[no-any-return]
