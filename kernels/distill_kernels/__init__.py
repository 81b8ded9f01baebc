"""One public function an op, its plain reference beside it, measured backends under it."""

from distill_kernels.attention.cross_attention import cross_attention
from distill_kernels.attention.cross_attention_pool import attend_to_tokens, cross_attention_pool
from distill_kernels.attention.packed_attention import packed_attention
from distill_kernels.attention.self_attention import self_attention, split_heads
from distill_kernels.pairwise.info_nce import info_nce_gradients, info_nce_sums, multi_view_info_nce
from distill_kernels.pairwise.sigmoid_loss import multi_view_sigmoid

__all__ = [
    "attend_to_tokens",
    "cross_attention",
    "cross_attention_pool",
    "info_nce_gradients",
    "info_nce_sums",
    "multi_view_info_nce",
    "multi_view_sigmoid",
    "packed_attention",
    "self_attention",
    "split_heads",
]
