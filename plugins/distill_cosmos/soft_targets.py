"""InfoNCE against the teacher's similarities in place of the one positive.

SEED (arXiv 2101.04731, section 3) and ALBEF's momentum distillation (arXiv 2107.07651, section 3.3, equation 6): the
student's distribution over the teacher's keys is drawn, by cross-entropy, to the distribution that the teacher's own
embedding of the same sample has over them. For a student view f of modality m, and a teacher's view t of modality n,

    q_i = mean over the teacher's views w of m of softmax_j(w_i . t_j / temperature)
    a -> b:  mean_i of cross-entropy(q_i, softmax_j(scale * f_i . t_j))        b -> a:  the same with the roles turned

and the pair's loss is the mean of both, as in InfoNCE. Within a modality (m = n) w may be t itself, as in SEED: its
similarity with its own key is 1. A mean of distributions gives the mean of the cross-entropies with each.

A cross-entropy is linear in its targets, and only its log-sum-exp needs all logits of the student:

    cross-entropy(q_i, .) = [log-sum-exp_j z_ij - z_ii] + scale * f_i . (t_i - sum_j q_ij t_j)

The bracket is InfoNCE, whose kernel keeps no B x M matrix of logits; q is made in runs of rows, without gradients. So
memory is O(B D) here too, while arithmetic stays O(B M D) for each pair of the teacher's views.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# elements of the largest block of probabilities that is alive
_BLOCK = 1 << 22


class Targets(NamedTuple):
    """What the teacher's distributions come to; none of it has a gradient."""

    forward: Tensor  # [V, B, D]: sum_j q_ij t_j, row i's expected key
    backward: Tensor  # [V, M, D]: sum over own rows j of q'_ji t_j
    entropy: Tensor  # 0-dim: mean entropy of q and q', below which the cross-entropy cannot fall


@torch.no_grad()
def soft_targets(queries: Tensor, keys: Tensor, queries_all: Tensor, keys_all: Tensor, temperature: float) -> Targets:
    """The teacher's views of the student's modality [W, B, D] (all ranks: [W, M, D]) over its views t [V, B, D].

    Embeddings are normalised and of at least fp32.
    """
    forward = torch.empty_like(keys)
    backward = torch.zeros_like(keys_all)
    entropy = keys.new_zeros(())
    views, own, every = len(queries), keys.shape[1], keys_all.shape[1]
    step = max(1, _BLOCK // max(1, views * every))
    with torch.autocast(keys.device.type, enabled=False):
        for v in range(len(keys)):
            for start in range(0, own, step):
                rows = slice(start, start + step)
                q = torch.softmax(queries[:, rows] @ keys_all[v].mT / temperature, -1).mean(0)  # [rows, M]
                forward[v, rows] = q @ keys_all[v]
                entropy += torch.special.entr(q).sum()
                q = torch.softmax(keys[v, rows] @ queries_all.mT / temperature, -1).mean(0)  # [rows, M]
                backward[v] += q.mT @ keys[v, rows]
                entropy += torch.special.entr(q).sum()
        return Targets(forward, backward, entropy / (2 * len(keys) * own))


def soft_minus_hard(a: Tensor, a_all: Tensor, keys: Tensor, targets: Targets, scale: Tensor) -> Tensor:
    """[U, V]: what soft targets add to the InfoNCE of a [U, B, D] (all ranks: [U, M, D]) against keys [V, B, D]."""
    with torch.autocast(a.device.type, enabled=False):
        positive = a.flatten(1) @ (keys - 0.5 * targets.forward).flatten(1).mT
        expected = 0.5 * a_all.flatten(1) @ targets.backward.flatten(1).mT
        return scale * (positive - expected) / a.shape[1]
