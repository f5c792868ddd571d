"""The contrastive loss against its definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gen.retrieval.contrast import nce


def random_rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def test_one_pair_each_is_clips_loss() -> None:
    a, b, rows = random_rows(7, 0), random_rows(7, 1), torch.arange(7)
    logits = 5 * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    expected = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
    torch.testing.assert_close(nce(a, b, 5.0, rows, rows, rows, rows), expected, rtol=1e-5, atol=1e-6)


def test_rows_of_the_same_video_are_not_negatives() -> None:
    a, b, rows = random_rows(4, 0), random_rows(4, 1), torch.arange(4)
    ids = torch.tensor([5, 6, 5, 7])
    logits = 3 * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    masked = logits.clone()
    masked[0, 2] = masked[2, 0] = -torch.inf
    expected = (F.cross_entropy(masked, rows) + F.cross_entropy(masked.T, rows)) / 2
    torch.testing.assert_close(nce(a, b, 3.0, rows, rows, ids, ids), expected, rtol=1e-5, atol=1e-6)
    assert not torch.isclose(nce(a, b, 3.0, rows, rows, rows, rows), expected)


def test_several_texts_a_video_are_each_contrasted_with_the_negatives_alone() -> None:
    """SupCon-out, spelled with loops."""
    texts, videos = random_rows(6, 0), random_rows(3, 1)
    owner, rows = torch.arange(3).repeat_interleave(2), torch.arange(3)
    s = (4 * F.normalize(texts, dim=1) @ F.normalize(videos, dim=1).T).exp()
    to_videos = [-(s[t, t // 2] / s[t].sum()).log() for t in range(6)]
    to_texts = []
    for v in range(3):
        negatives = sum(s[t, v] for t in range(6) if t // 2 != v)
        to_texts += [-(s[t, v] / (s[t, v] + negatives)).log() for t in range(6) if t // 2 == v]
    expected = (torch.stack(to_videos).mean() + torch.stack(to_texts).mean()) / 2
    found = nce(texts, videos, 4.0, owner, rows, owner, rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_of_one_video_has_no_negatives_and_no_nan() -> None:
    a, b, zero = random_rows(2, 0), random_rows(2, 1), torch.zeros(2, dtype=torch.long)
    loss = nce(a, b, 100.0, torch.arange(2), torch.arange(2), zero, zero)
    loss.backward()
    assert loss == 0 and a.grad.isfinite().all()
