"""10k Words on two processes: losses, gradients and figures are those of one process with the whole batch."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from test_tenk_words import batch, method
from torch import Tensor, nn

from lit_gen.methods.tenk_words import Objective, TenKWords
from lit_gen.metrics.scores import Scores
from lit_gen.retrieval.evaluation import Gallery, Query, evaluate, summarise

PER_RANK = 3
# (objective, captions of a video); chances of 0 and 1 alone, since every rank draws for itself.
OBJECTIVES = {
    "captions": (Objective("choose", paragraph=0.0, projected=0, text_to_text=0), 1),
    "paragraphs": (Objective("choose", paragraph=1.0, projected=0, text_to_text=0), 1),
    "all three losses": (Objective("choose", paragraph=0.0), 1),
    "all three losses, paragraphs": (Objective("choose", paragraph=1.0, projected=0.5, text_to_text=2.0), 1),
    "blend": (Objective("blend", paragraph=0.3), 1),
    "multi-positive": (Objective(projected=0, text_to_text=0, multi_positive=True), 2),
}


class Loss(nn.Module):
    """Sum of a method's losses, as what DDP calls."""

    def __init__(self, model: TenKWords) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: dict[str, Any]) -> Tensor:
        return sum(self.model.losses(given).values())


def part(rows: slice, per_video: int) -> dict[str, Any]:
    """Some of six videos, one of which is on both ranks."""
    whole = batch(2 * PER_RANK, per_video) | {"video_id": torch.tensor([0, 1, 2, 3, 1, 4])}
    return {name: values[rows] for name, values in whole.items()}


def evaluated(rows: slice) -> tuple[dict[str, float], Scores]:
    """Figures of some of six videos, each with a query."""
    generator = torch.Generator().manual_seed(4)
    videos, queries = (F.normalize(torch.randn(6, 6, generator=generator), dim=1) for _ in range(2))
    gallery, numbers = Gallery(), list(range(6))[rows]
    gallery.add(numbers, videos[rows], [None] * len(numbers))
    asked = [Query(i, f"video {i}", "full" if i % 2 else "partial", "text") for i in numbers]
    return summarise(evaluate(gallery.gathered(), asked, queries[rows]))


def one_rank(rank: int, base: Path, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=90)
    )
    try:
        torch.save(of_rank(rank, base), folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


def second_rank(_: int, base: Path, folder: Path) -> None:
    one_rank(1, base, folder)


def of_rank(rank: int, base: Path) -> dict[str, Any]:
    """Losses, gradients and figures, as a process with half of the videos has them."""
    rows = slice(PER_RANK * rank, PER_RANK * (rank + 1))
    found = {}
    for name, (objective, per_video) in OBJECTIVES.items():
        model = method(base, objective)
        averaged = nn.parallel.DistributedDataParallel(Loss(model))  # named: it must outlive the backward pass
        loss = averaged(part(rows, per_video))
        loss.backward()
        found[name] = loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    figures, scores = evaluated(rows)
    return {"losses": found, "figures": figures, "scores": scores.values}


def test_two_processes_are_as_one_with_the_whole_batch(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    second = mp.spawn(second_rank, (tiny_base, tmp_path), join=False)
    one_rank(0, tiny_base, tmp_path)  # here: a process of its own would only import everything once more
    second.join()
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    figures, scores = evaluated(slice(None))
    assert all(found["figures"] == figures and found["scores"] == scores.values for found in ranks)
    for name, (objective, per_video) in OBJECTIVES.items():
        model = method(tiny_base, objective)
        loss = Loss(model)(part(slice(None), per_video))
        loss.backward()
        whole = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert {"log_scale", "text_head.weight", "video_head.project.weight"} <= whole.keys()
        for found in ranks:
            there, grads = found["losses"][name]
            torch.testing.assert_close(there, loss.detach(), msg=lambda text, name=name: f"{name}: {text}")
            assert grads.keys() == whole.keys(), name
            for parameter, grad in whole.items():
                why = f"{name}, {parameter}"
                torch.testing.assert_close(
                    grads[parameter], grad, rtol=1e-3, atol=1e-5, msg=lambda text, why=why: f"{why}: {text}"
                )
