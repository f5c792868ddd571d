"""What all methods share."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_gen.callbacks.ema import EMA
from lit_gen.errors import UserError
from lit_gen.methods.base import Method, Optimizer


class Line(Method):
    """A trained line behind a frozen one."""

    def __init__(self, optimizer: Optimizer = Optimizer(lr=0.1)) -> None:
        super().__init__(optimizer)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.line = nn.Linear(2, 1)
        self.draws: list[float] = []

    def training_step(self, batch: list, batch_idx: int) -> torch.Tensor:
        self.draws.append(torch.rand(1).item())
        return (self.line(self.frozen(batch[0])) - batch[1]).square().mean()


def fit(
    model: Method, folder: Path, steps: int, callbacks: list | None = None, resume: str | None = None, **settings: Any
) -> L.Trainer:
    x = torch.arange(32.0).view(16, 2) / 16
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=callbacks or [], **settings,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"weight_decay": -5.0}, {"warmup_steps": -1}, {"clip_norm": -1.0}, {"betas": (2.0, 0.9)}]
)
def test_settings_out_of_range_are_one_line(settings: dict) -> None:
    with pytest.raises(UserError, match=f"`{next(iter(settings))}` must be"):
        Optimizer(**settings)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "trapezoid"])
def test_schedules_warm_up_and_end_at_zero(schedule: str) -> None:
    settings = Optimizer(warmup_steps=10, schedule=schedule)
    factors = [settings.factor(step, 100) for step in range(101)]
    assert factors[0] == 0.1 and factors[10] == pytest.approx(1.0, abs=0.01)
    assert factors[100] == pytest.approx(0.0) and max(factors) <= 1.0
    if schedule == "trapezoid":
        assert factors[75] == 1.0 and factors[90] == pytest.approx(0.4)


def test_checkpoints_hold_only_what_was_trained(tmp_path: Path) -> None:
    model = Line()
    fit(model, tmp_path, 2).save_checkpoint(tmp_path / "a.ckpt")
    assert set(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == {"line.weight", "line.bias"}


def test_what_an_earlier_stage_trained_stays_in_later_checkpoints(tmp_path: Path) -> None:
    first = Line()
    fit(first, tmp_path, 2).save_checkpoint(tmp_path / "a.ckpt")
    second = Line()
    second.load_weights(tmp_path / "a.ckpt")
    second.line.requires_grad_(False)
    second.frozen.requires_grad_(True)
    assert set(second.state_dict()) == {"line.weight", "line.bias", "frozen.weight", "frozen.bias"}
    assert torch.equal(second.line.weight, first.line.weight)


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"state_dict": {"other.weight": torch.zeros(2)}}, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match="b.ckpt: 1 of 1 weights do not fit Line, e.g. other.weight"):
        Line().load_weights(tmp_path / "b.ckpt")
    with pytest.raises(UserError, match="no such checkpoint"):
        Line().load_weights(tmp_path / "c.ckpt")


def test_randomness_depends_on_the_step_alone(tmp_path: Path) -> None:
    L.seed_everything(7)
    straight = Line()
    fit(straight, tmp_path, 6)
    first, second = Line(), Line()
    fit(first, tmp_path, 3).save_checkpoint(tmp_path / "r.ckpt")
    torch.rand(100)  # whatever else happens in between
    fit(second, tmp_path, 6, resume=str(tmp_path / "r.ckpt"))
    assert first.draws + second.draws == straight.draws
    assert len(set(straight.draws)) == 6


def test_average_is_the_plain_recursion_and_survives_a_checkpoint(tmp_path: Path) -> None:
    class Watch(L.Callback):
        def __init__(self) -> None:
            self.weights: list[torch.Tensor] = []

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.weights.append(pl_module.line.weight.detach().clone())

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            self.weights.append(pl_module.line.weight.detach().clone())

    watch, average, model = Watch(), EMA(decay=0.8, warmup=False), Line()
    trainer = fit(model, tmp_path, 4, [watch, average])
    expected = watch.weights[0]
    for weight in watch.weights[1:]:
        expected = 0.8 * expected + 0.2 * weight
    torch.testing.assert_close(model.line.weight.data, expected)  # after the fit the model is the average
    trainer.save_checkpoint(tmp_path / "e.ckpt")
    other = Line()
    other.load_weights(tmp_path / "e.ckpt")
    torch.testing.assert_close(other.line.weight.data, expected)


def test_an_average_of_half_precision_weights_is_kept_in_float32(tmp_path: Path) -> None:
    class Watch(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.expected = pl_module.line.weight.detach().float()

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            self.expected = 0.999 * self.expected + 0.001 * pl_module.line.weight.detach().float()

        def on_train_end(self, *_: object) -> None:
            self.average = average.shadow["line.weight"]

    watch, average = Watch(), EMA(decay=0.999, warmup=False)
    fit(Line(), tmp_path, 4, [watch, average], precision="bf16-true")
    assert watch.average.dtype == torch.float32
    torch.testing.assert_close(watch.average, watch.expected)


def test_the_average_is_in_the_weights_only_while_they_are_judged(tmp_path: Path) -> None:
    class Judged(Line):
        def test_step(self, batch: list, batch_idx: int) -> None:
            self.seen = self.line.weight.detach().clone()

        predict_step = test_step

    model, average = Judged(), EMA()
    trainer = fit(model, tmp_path, 1, [average])
    before = model.line.weight.detach().clone()
    for verb in (trainer.test, trainer.predict):
        average.shadow = {n: torch.zeros_like(w) for n, w in model.line.named_parameters(prefix="line")}
        verb(model, DataLoader(TensorDataset(torch.zeros(1, 2)), batch_size=1))
        assert not model.seen.any() and torch.equal(model.line.weight.data, before)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_clipped_at_their_own_scale(fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where AdamW is fused and undoes the scale of "16-mixed" in its step."""
    plain = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **given: plain(*args, **given | {"fused": fused}))
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    trainer = fit(Line(Optimizer(clip_norm=0.01)), tmp_path, 1, plugins=[scaled])
    (optimizer,) = trainer.optimizers
    seen = torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()]) / 0.1
    assert seen.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_clipping_that_would_not_happen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gradient_clip_val does nothing here; set model.optimizer.clip_norm"):
        fit(Line(), tmp_path, 1, gradient_clip_val=1.0)


def test_a_loaded_optimizer_lies_in_memory_as_the_weights_do() -> None:
    def step(weight: torch.Tensor, loaded: dict | None) -> tuple[torch.Tensor, dict]:
        model = Line()
        model.line.weight, model._trainer = nn.Parameter(weight), SimpleNamespace(max_steps=9)
        optimizer = model.configure_optimizers()["optimizer"]
        if loaded is not None:
            optimizer.load_state_dict(loaded)
        optimizer.param_groups[0]["fused"] = True  # whose kernel takes all tensors to lie alike
        model.line.weight.grad = torch.empty_like(weight).copy_(torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]]))
        optimizer.step()
        return model.line.weight.detach(), optimizer.state_dict()

    first, saved = step(torch.zeros(2, 3), None)
    straight, _ = step(first.clone(), copy.deepcopy(saved))
    turned, _ = step(first.t().contiguous().t(), copy.deepcopy(saved))
    assert not turned.is_contiguous()
    torch.testing.assert_close(turned, straight)


def test_what_a_test_draws_depends_on_the_batch_alone(tmp_path: Path) -> None:
    class Drawing(Line):
        def test_step(self, batch: list, batch_idx: int) -> None:
            self.draws.append(torch.rand(1).item())

    model, trainer = Drawing(), L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    for before in (0, 5):
        torch.rand(before)
        trainer.test(model, DataLoader(TensorDataset(torch.zeros(3, 2)), batch_size=1), verbose=False)
    assert model.draws[:3] == model.draws[3:] and len(set(model.draws)) == 3
