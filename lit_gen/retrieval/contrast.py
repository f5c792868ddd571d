"""Contrastive losses over the batches of all ranks.

Letters: N rows of one kind (texts), M of another (videos), D width. Several rows may belong to one video.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_NEVER = -1e4  # a logit so low that its exponential is zero, also in float32 sums; -inf would give NaN gradients


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks, in the order of the ranks; every rank must have equally many.

    Gradients flow back to the rank a row came from, summed over the ranks that used it: when every rank computes the
    loss of the whole batch and DDP averages the gradients, they are those of one process with that batch.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    if x.requires_grad:
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(x.contiguous()))
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def nce(
    a: Tensor, b: Tensor, scale: Tensor | float, row_a: Tensor, row_b: Tensor, id_a: Tensor, id_b: Tensor
) -> Tensor:
    """Symmetric InfoNCE, a scalar; with several positives a row, SupCon's "out" form (Khosla et al. 2020, Eq. 2).

    L_i = -1/|P_i| sum_{p in P_i} log(e^{s_ip} / (e^{s_ip} + sum_{n in N_i} e^{s_in})), s = scale * cosine, averaged
    over the rows of a and of b. With one positive each it is CLIP's loss, but for rows of the same video that are no
    pair: they are not counted among the negatives.

    Args:
        a: N D, need not be normalised.
        b: M D.
        scale: one over the temperature.
        row_a, row_b: N and M; rows with the same number are pairs (positives).
        id_a, id_b: N and M, the video each row is of; rows of the same video are never negatives.
    """
    logits = scale * F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T  # N M
    pairs = row_a[:, None] == row_b[None]
    others = id_a[:, None] != id_b[None]
    return (_one_way(logits, pairs, others) + _one_way(logits.T, pairs.T, others.T)) / 2


def _one_way(logits: Tensor, pairs: Tensor, others: Tensor) -> Tensor:
    against = logits.masked_fill(~others, _NEVER).logsumexp(1, keepdim=True)  # N 1
    each = F.softplus(against - logits) * pairs  # -log of (positive over positive and negatives)
    return (each.sum(1) / pairs.sum(1).clamp(min=1)).mean()
