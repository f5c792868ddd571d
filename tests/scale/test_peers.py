"""GPUs that read each other's memory come to exactly what collectives give, however late one of them is.

CUDA_VISIBLE_DEVICES=0,1 python -m pytest tests/scale/test_peers.py
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from pair import run_twice
from torch import Tensor, nn

from lit_gen.scale import peers

STEPS, SIZES = 12, [random.Random(0).choice((7, 1000, 70_000, 1_500_000)) for _ in range(60)]
RANK, WORLD = int(os.environ.get("LOCAL_RANK", 0)), 2
CASES = ("ddp collectives", "ddp copies", "zero2 collectives", "zero2 copies", "zero2 copies mixed")


def gradients(step: int, rank: int) -> list[Tensor]:
    """Small whole numbers, whose sums and means are exact in any precision."""
    generator = torch.Generator().manual_seed(2 * step + rank)
    return [torch.randint(-8, 9, (size,), generator=generator).float() for size in SIZES]


def mean(step: int) -> list[Tensor]:
    return [(a + b) / 2 for a, b in zip(gradients(step, 0), gradients(step, 1), strict=True)]


class Vectors(L.LightningModule):
    """Weights with known gradients, which each process is late with at random."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(size)) for size in SIZES])
        self.wrong: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        late, terms = random.Random(10 * batch_idx + RANK), []
        for weight, numbers in zip(self.weights, gradients(batch_idx, RANK), strict=True):
            numbers = numbers.to(self.device)
            terms.append(Late.apply(weight, late.choice((0, 0, 0, 2_000_000))).float().mul(numbers).sum())
        return torch.stack(terms).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if all(weight.grad is not None for weight in self.weights):  # under ZeRO they are elsewhere
            for i, (weight, wanted) in enumerate(zip(self.weights, mean(self.global_step), strict=True)):
                if not torch.equal(weight.grad.cpu(), wanted):
                    self.wrong.append(f"step {self.global_step}, weight {i}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.weights, lr=1e-2, fused=True)


class Late(torch.autograd.Function):
    """What is given; its gradient comes after so many cycles of the device."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, cycles: int) -> Tensor:
        ctx.cycles = cycles
        return given.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if gradient.is_cuda and ctx.cycles:
            torch.cuda._sleep(ctx.cycles)
        return gradient, None


def alone() -> list[Tensor]:
    """The weights that the means of both processes' gradients lead to."""
    module = Vectors()
    optimizer = module.configure_optimizers()
    for step in range(STEPS):
        for weight, gradient in zip(module.weights, mean(step), strict=True):
            weight.grad = gradient
        optimizer.step()
    return [weight.detach() for weight in module.weights]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sums_are_exact(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run_twice(__file__, [tmp_path], tmp_path)
    wanted = alone()
    for case in CASES:
        for rank in range(WORLD):
            result = torch.load(tmp_path / f"{case}.{rank}.pt", weights_only=True)
            assert not result["wrong"], (case, result["wrong"][:5])
            for weight, want in zip(result["weights"], wanted, strict=True):
                torch.testing.assert_close(
                    weight, want, rtol=1e-5, atol=1e-6, msg=lambda told, case=case: f"{case}: {told}"
                )


def test_shared_memory_counts_as_long_as_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = SimpleNamespace(get_buffer=lambda rank, shape, dtype: torch.full(shape, float(rank)), barrier=lambda: None)
    monkeypatch.setattr("torch.distributed._symmetric_memory.empty", torch.empty)
    monkeypatch.setattr("torch.distributed._symmetric_memory.rendezvous", lambda own, group: handle)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4)
    shared = peers.share(100, torch.float32, torch.device("cpu"), None)
    assert peers.held() == 400
    assert list(shared.others) == [3, 0, 1]  # no two processes read from the same one at a time
    assert all((numbers == rank).all() for rank, numbers in shared.others.items())
    del shared
    assert peers.held() == 0


def train(case: str) -> dict[str, Any]:
    from lit_gen.scale.ddp import DDP
    from lit_gen.scale.zero import ZeRO

    kind, exchange, *mixed = case.split()
    bucket = 4_000_000
    strategy = DDP(bucket, exchange) if kind == "ddp" else ZeRO(2, "none", bucket, exchange)
    module = Vectors()
    trainer = L.Trainer(
        accelerator="gpu", devices=WORLD, strategy=strategy, precision="bf16-mixed" if mixed else "32-true",
        max_steps=STEPS, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, torch.arange(STEPS).view(-1, 1))
    return {"wrong": module.wrong, "weights": [weight.detach().cpu() for weight in module.weights]}


if __name__ == "__main__":
    os.environ.setdefault("PL_GLOBAL_SEED", "0")
    for case in CASES:
        torch.save(train(case), Path(sys.argv[1]) / f"{case}.{RANK}.pt")
    dist.destroy_process_group()
