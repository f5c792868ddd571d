"""The contrastive loss against its definition, and over two processes against one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.metrics.scores import Scores
from lit_gen.retrieval.contrast import gather, nce
from lit_gen.retrieval.evaluation import Gallery, Query, evaluate, summarise


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


# -- two processes ----------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Two heads and a temperature, as a dual encoder has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text, self.video = nn.Linear(5, 4), nn.Linear(3, 4)
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, texts: Tensor, videos: Tensor, ids: Tensor) -> Tensor:
        a, b, ids = gather(self.text(texts)), gather(self.video(videos)), gather(ids)
        rows = torch.arange(len(ids))
        return nce(a, b, self.log_scale.exp(), rows, rows, ids, ids)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([0, 1, 2, 3, 1, 4])  # video 1 is on both ranks
    return torch.randn(6, 5, generator=generator), torch.randn(6, 3, generator=generator), ids


def evaluated(part: slice) -> tuple[dict[str, float], Scores]:
    """Figures of some of six videos, each with a query."""
    videos, queries = (F.normalize(random_rows(6, seed).detach(), dim=1) for seed in (4, 5))
    gallery, numbers = Gallery(), list(range(6))[part]
    gallery.add(numbers, videos[part], [None] * len(numbers))
    asked = [Query(i, f"video {i}", "full" if i % 2 else "partial", "text") for i in numbers]
    return summarise(evaluate(gallery.gathered(), asked, queries[part]))


def one_rank(rank: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(Encoder())
    loss = model(*(part[3 * rank : 3 * rank + 3] for part in batch()))
    loss.backward()
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    figures, scores = evaluated(slice(3 * rank, 3 * rank + 3))  # which gathers, too
    torch.save(
        {"loss": loss.detach(), "grads": grads, "figures": figures, "scores": scores.values}, f"{folder}/rank-{rank}.pt"
    )
    dist.destroy_process_group()


def test_losses_gradients_and_figures_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    mp.spawn(one_rank, (str(tmp_path),), nprocs=2)
    whole = Encoder()
    loss = whole(*batch())
    loss.backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["loss"], loss.detach())
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(found["grads"][name], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
        figures, scores = evaluated(slice(None))
        assert found["figures"] == figures and found["scores"] == scores.values
