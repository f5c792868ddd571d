"""Exhaustive text-to-video ranking in blocks, so that a hundred thousand videos and a million queries fit in memory.

Ties are broken by chance, in expectation: a query whose video shares its score with t - 1 others, and has g videos
before it, has rank g + (t + 1) / 2 and a hit among the first k with probability min(max(k - g, 0), t) / t.
Letters: Q queries, T texts of a query (it and what it is expanded by), N videos, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TIE = 1e-6  # cosines this near are equal: matrix products of other shapes round differently
Expansion = Literal["features", "scores"]


@dataclass
class Ranks:
    """Places of Q queries' own videos."""

    before: Tensor  # Q, videos that score higher
    tied: Tensor  # Q, videos that score the same, the own one included
    best: Tensor  # Q, row of the video that scores highest, of several the first

    def recall(self, k: int) -> Tensor:
        """Q, chance that the video is among the first k."""
        return torch.minimum((k - self.before).clamp(min=0), self.tied) / self.tied

    def expected(self) -> Tensor:
        """Q, expected rank from 1."""
        return self.before + (self.tied + 1) / 2


def rank(
    queries: Tensor,
    videos: Tensor,
    own: Tensor,
    how: Expansion = "features",
    scale: float = 100.0,
    block: int = 4096,
    device: torch.device | str = "cpu",
) -> Ranks:
    """Rank all videos for each query.

    Args:
        queries: Q D, or Q T D for expanded ones; unit vectors.
        videos: N D, unit vectors.
        own: Q, row of the video that each query describes.
        how: expanded queries: mean of the texts' unit "features", or of the probabilities ("scores") that each text
            gives to the videos, a softmax of scale times the cosine. The mean of plain cosines would order the videos
            as the mean of the features does.
        scale: one over the temperature.
        block: queries and videos scored at a time.
        device: where they are scored; the features may be elsewhere, and only blocks of them are moved.

    Returns:
        On the CPU.
    """
    parts = [
        _rank_block(_prepared(queries[i : i + block].to(device), how), videos, own[i : i + block], scale, block)
        for i in range(0, len(queries), block)
    ]
    if not parts:
        none = torch.zeros(0, dtype=torch.long)
        return Ranks(none, none, none)
    return Ranks(*(torch.cat([getattr(part, name) for part in parts]) for name in ("before", "tied", "best")))


def top(queries: Tensor, videos: Tensor, k: int, block: int = 4096) -> tuple[Tensor, Tensor]:
    """Scores and rows of the k best videos of each query, best first: Q k each."""
    values, rows = queries.new_zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.long)
    for start in range(0, len(videos), block):
        scores = queries @ videos[start : start + block].T
        both = torch.cat([values, scores], 1)
        places = torch.arange(start, start + scores.shape[1]).expand(len(queries), -1)
        order = both.sort(dim=1, descending=True, stable=True).indices[:, :k]
        values, rows = both.gather(1, order), torch.cat([rows, places], 1).gather(1, order)
    return values, rows


def _prepared(queries: Tensor, how: Expansion) -> Tensor:
    """Q D, or Q T D where each text is scored by itself."""
    if queries.ndim == 2 or queries.shape[1] == 1:
        return queries.flatten(1) if queries.ndim == 3 else queries
    return torch.nn.functional.normalize(queries.mean(1), dim=-1) if how == "features" else queries


def _rank_block(queries: Tensor, videos: Tensor, own: Tensor, scale: float, block: int) -> Ranks:
    blocks = range(0, len(videos), block)
    total, device = None, queries.device
    if queries.ndim == 3:  # Q T: the softmaxes' denominators need a pass of their own
        sums = [(scale * queries @ videos[i : i + block].to(device).T).logsumexp(-1) for i in blocks]
        total = torch.stack(sums).logsumexp(0)

    def score(chosen: Tensor) -> Tensor:
        """Q n of videos n D, or Q n D (other videos for each query)."""
        spelled = "qd,qnd->qn" if chosen.ndim == 3 else "qd,nd->qn"
        if total is None:
            return torch.einsum(spelled, queries, chosen)
        cosines = torch.einsum(spelled.replace("qd", "qtd", 1).replace(">qn", ">qtn"), queries, chosen)
        return (scale * cosines - total[..., None]).exp().mean(1)

    mine = score(videos[own][:, None].to(device))  # Q 1
    before, tied, best = (torch.zeros(len(queries), dtype=torch.long, device=device) for _ in range(3))
    highest = torch.full((len(queries),), -torch.inf, device=device)
    margin = TIE if total is None else 1e-4 * mine  # probabilities are small and their rounding relative
    for start in blocks:
        scores = score(videos[start : start + block].to(device))
        before += (scores > mine + margin).sum(1)
        tied += ((scores - mine).abs() <= margin).sum(1)
        value, row = scores.max(1)
        best = torch.where(value > highest, row + start, best)
        highest = torch.maximum(highest, value)
    return Ranks(before.cpu(), tied.clamp(min=1).cpu(), best.cpu())
