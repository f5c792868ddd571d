"""The speed that is logged and shown is the speed there is, and showing it changes nothing."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_gen.callbacks.progress import Progress
from lit_gen.callbacks.record import count
from lit_gen.callbacks.speed import Counts, Speed, operations

B, N, H, M = 4, 8, 16, 2
# two products forward, two for the weights' gradients, one for the gradient between the layers
OPERATIONS = 2 * B * (2 * (N * H + H * M) + H * M)


class Net(L.LightningModule):
    def __init__(self, pause: float = 0.0, val_pause: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(N, H), nn.ReLU(), nn.Linear(H, M))
        self.pause, self.val_pause = pause, val_pause

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.pause)
        loss = self.net(batch["x"]).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        time.sleep(self.val_pause)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Slow:
    """Batches that take their time, and tell how long one waited for them if they are asked to."""

    def __init__(self, pause: float = 0.0, tells: bool = True, sizes: tuple[int, ...] = (B,)) -> None:
        self.pause, self.sizes = pause, sizes
        if tells:
            self.waited = 0.0

    def __len__(self) -> int:
        return 100

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for i in range(len(self)):
            began = time.perf_counter()
            time.sleep(self.pause)
            if hasattr(self, "waited"):
                self.waited += time.perf_counter() - began
            yield {"x": torch.full((self.sizes[i % len(self.sizes)], N), float(i))}


class Notes(Logger):
    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []

    name, version = "notes", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(name.startswith("speed/") for name in metrics):
            self.metrics.append((int(step or 0), metrics))

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


def fit(module: Net, loader: Slow, folder: Path, speed: Speed, steps: int = 6, **trainer: Any) -> Notes:
    notes = Notes()
    options = {"log_every_n_steps": 2, "callbacks": [speed], "logger": notes, "limit_val_batches": 0} | trainer
    L.Trainer(
        default_root_dir=folder, accelerator="cpu", max_steps=steps, enable_checkpointing=False,
        enable_progress_bar="callbacks" in trainer, enable_model_summary=False, **options,
    ).fit(module, loader, loader if options["limit_val_batches"] else None)  # fmt: skip
    return notes


def test_logged_at_the_trainers_steps(tmp_path: Path) -> None:
    notes = fit(Net(pause=0.02), Slow(pause=0.06), tmp_path, Speed())
    assert [step for step, _ in notes.metrics] == [1, 3, 5]
    for _, figures in notes.metrics:
        assert set(figures) == {"speed/samples per second", "speed/data wait %", "speed/peak memory GiB"}
        assert 0.1 * B / 0.08 < figures["speed/samples per second"] <= B / 0.08
        assert 0.01 < figures["speed/peak memory GiB"] < 100
    assert max(figures["speed/data wait %"] for _, figures in notes.metrics) > 50


def test_accumulated_steps_count_once_and_a_silent_loader_is_left_out(tmp_path: Path) -> None:
    speed = Speed()
    notes = fit(Net(), Slow(tells=False), tmp_path, speed, accumulate_grad_batches=3)
    assert [step for step, _ in notes.metrics] == [1, 3, 5]
    assert "speed/data wait %" not in notes.metrics[0][1]
    assert speed.counts is not None and (speed.counts.steps, speed.counts.samples) == (6, 18 * B)


def test_samples_of_every_shape_of_batch_are_counted() -> None:
    pictures, clips = torch.zeros(5, 3), torch.zeros(2, 8, 3)
    batches = (pictures, [pictures, clips], {"image": pictures, "caption": ["a"] * 5})
    assert [count(batch) for batch in batches] == [5, 5, 5]
    assert count({"clips": {"latent": clips}, "pictures": {"latent": pictures}}) == 7


def test_operations_are_counted_once_for_each_kind_of_batch(tmp_path: Path) -> None:
    speed = Speed(peak_tflops=1e-6)  # a million operations a second
    notes = fit(Net(pause=0.02), Slow(sizes=(B, 2 * B)), tmp_path, speed)
    assert sorted(speed.flops.values()) == [OPERATIONS, 2 * OPERATIONS]
    assert speed.counts is not None and speed.counts.flops == 3 * OPERATIONS + 3 * 2 * OPERATIONS
    for _, figures in notes.metrics[1:]:  # two steps, one of each
        rate = figures["speed/samples per second"] / (3 * B) * 3 * OPERATIONS
        assert figures["speed/MFU %"] == pytest.approx(100 * rate / 1e6)


def test_counting_changes_no_bit(tmp_path: Path) -> None:
    weights = []
    for peak in (None, 1.0):
        torch.manual_seed(0)
        module = Net()
        fit(module, Slow(), tmp_path, Speed(peak))
        weights.append(module.net[0].weight)
    assert torch.equal(*weights)


def test_a_step_that_fails_leaves_no_counter_behind(tmp_path: Path) -> None:
    class Broken(Net):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(Broken(), Slow(), tmp_path, Speed(1.0))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_validation_is_not_training_time(tmp_path: Path) -> None:
    speed = Speed()
    began = time.monotonic()
    fit(
        Net(pause=0.01, val_pause=0.3), Slow(), tmp_path, speed, val_check_interval=2, limit_val_batches=1,
        num_sanity_val_steps=0, check_val_every_n_epoch=None,
    )  # fmt: skip
    spent = time.monotonic() - began
    assert spent > 0.9 and speed.counts is not None and speed.counts.seconds < spent - 0.6


def test_the_line_explains_the_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speed, progress = Speed(peak_tflops=1e-6), Progress("toy", every=0.0)
    fit(Net(pause=0.01), Slow(pause=0.03), tmp_path, speed, callbacks=[speed, progress])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("toy: step")]
    assert lines[0].startswith("toy: step 1/6 (17 %), loss")  # the first step may have compiled: no speed yet
    for line in lines[1:]:
        for told in (" samples/s, ", " % waiting for data, ", " % MFU, ", " GiB, left 0:00:0", ", loss "):
            assert told in line


def test_redrawing_the_line_does_not_wait_for_a_gpu() -> None:
    progress, speed = Progress("toy", every=0.0), Speed()
    speed._device = torch.device("cpu")
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    known: Any = type("Known", (SimpleNamespace,), {})
    trainer = known(should_stop=False, strategy=strategy, world_size=2, callbacks=[speed], global_step=0)
    trainer.estimated_stepping_batches = 100
    read, lines = Mock(return_value={"train/loss": torch.tensor(1.0), "train/other": torch.tensor(2.0)}), []
    type(trainer).callback_metrics = property(read)
    trainer.progress_bar_metrics = {}
    module: Any = SimpleNamespace(told_in_progress=("train/loss",), parameters=lambda: [])
    progress._print = lambda line, stays=False: lines.append(line)  # type: ignore[method-assign]
    progress.on_train_start(trainer, module)
    for i in range(1, 6):
        trainer.global_step = i
        speed.counts = Counts(float(i), i, 32 * i, 0.0, 0.0)
        progress.on_train_batch_end(trainer, module, None, None, i)
    assert read.call_count == 1 and len(lines) == 6
    assert "32.0 samples/s x 2" in lines[-1] and lines[-1].endswith("left 0:01:35, train/loss 1")


class Residual(nn.Module):
    """A layer of a transformer without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.normal, self.wide, self.bend, self.narrow = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.bend(self.wide(self.normal(x))))


def test_counting_keeps_nothing_that_checkpointing_computes_again() -> None:
    layers, inner = [Residual() for _ in range(3)], []
    for layer in layers:
        layer.wide.register_forward_hook(
            lambda module, inputs, output: inner.append(weakref.ref(output.untyped_storage()))
        )
    gc.disable()
    try:
        with operations() as counter:
            x = torch.randn(4, 8)
            for layer in layers:
                x = checkpoint(layer, x, use_reentrant=False)
            x.sum().backward()
            assert len(inner) == 6 and not any(values() is not None for values in inner)
    finally:
        gc.enable()
    # forward; again, but for the last product of each, which nothing needs; and two backward for each
    assert counter.get_total_flops() == 2 * 4 * 8 * 16 * (6 + 3 + 12)
