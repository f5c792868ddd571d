"""A method and a data module of a few lines, for tests of everything around methods."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from lit_gen.methods.base import Method, Optimizer
from lit_gen.metrics.scores import Scores

TOY = """\
seed_everything: 7
trainer:
  accelerator: cpu
  log_every_n_steps: 1
  val_check_interval: 4
  check_val_every_n_epoch: null
model:
  class_path: toy.Regression
data:
  class_path: toy.Numbers
checkpoint:
  every_n_steps: 2
"""

TWO_STAGES = """\
stages:
  one:
    trainer: {max_steps: 8}
    validate_first: true
  two:
    trainer: {max_steps: 6}
    model: {init_args: {sgd: {lr: 0.02}}}
"""


@dataclass
class Sgd:
    """Plain gradient descent.

    Args:
        lr: learning rate.
    """

    lr: float = 0.01


class Regression(L.LightningModule):
    """Fits y = x to noisy samples; the noise makes the randomness of a step visible in the weights.

    Args:
        sgd: the optimizer.
        width: size of the inputs.
        pause: seconds each step sleeps, so that a test can interrupt it.
        prompts: texts that `predict` writes down.
        reads: a file that must exist.
    """

    def __init__(
        self,
        sgd: Sgd = Sgd(),
        width: int = 2,
        pause: float = 0.0,
        prompts: list[str] | None = None,
        reads: str | None = None,
    ) -> None:
        super().__init__()
        if reads is not None:
            Path(reads).read_text()
        self.sgd, self.pause, self.prompts = sgd, pause, prompts or []
        self.net = nn.Linear(width, width)
        self.scores = Scores()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        time.sleep(self.pause)
        with (Path(self.trainer.default_root_dir) / "trace").open("a") as trace:
            trace.write(f"{self.global_step}:{batch['key'][0]}\n")
        x = batch["x"]
        loss = (self.net(x) - x).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/error", (self.net(batch["x"]) - batch["x"]).abs().mean(), batch_size=len(batch["key"]))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)
        errors = (self.net(batch["x"]) - batch["x"]).abs().mean(1)
        self.scores.add([f"{batch['key'][0]}.{i}" for i in range(len(errors))], error=errors)

    def on_test_epoch_end(self) -> None:
        self.scores.write(Path(self.trainer.default_root_dir))

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        (Path(self.trainer.default_root_dir) / "predicted").write_text("|".join(self.prompts))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.sgd.lr)


class Loader:
    """Batches that are a function of their position, which can be saved; always the first ones if not endless."""

    def __init__(self, batches: int, batch_size: int, width: int, endless: bool = True) -> None:
        self.endless = endless
        self.batches, self.batch_size, self.width, self.position = batches, batch_size, width, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.endless:
            self.position = 0
        for _ in range(self.batches - self.position % self.batches):
            generator = torch.Generator().manual_seed(self.position)
            key = str(self.position)
            self.position += 1
            yield {
                "x": torch.randn(self.batch_size, self.width, generator=generator),
                "key": [key] * self.batch_size,
            }

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Numbers(L.LightningDataModule):
    """Random numbers.

    Args:
        batches: per epoch.
        batch_size: samples per step.
        width: size of the samples.
    """

    def __init__(self, batches: int = 5, batch_size: int = 4, width: int = 2) -> None:
        super().__init__()
        self.settings = batches, batch_size, width

    def train_dataloader(self) -> Loader:
        return Loader(*self.settings)

    def val_dataloader(self) -> Loader:
        return Loader(*self.settings, endless=False)

    def test_dataloader(self) -> Loader:
        return Loader(*self.settings, endless=False)

    def predict_dataloader(self) -> Loader:
        return Loader(1, 1, 1)


class Plain(Method):
    """A linear map, trained as all methods are.

    Args:
        reads: nothing.
        optimizer: settings of the optimizer.
    """

    def __init__(self, reads: str | None = None, optimizer: Optimizer = Optimizer()) -> None:
        super().__init__(optimizer)
        self.net = nn.Linear(2, 2)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.net(batch["x"]).square().mean()


class Adversarial(Regression):
    """Two optimizers, which the model steps itself."""

    def __init__(self, reads: str | None = None) -> None:
        super().__init__(reads=reads)
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()]
