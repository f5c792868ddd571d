"""Exponential moving average of the trainable weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lit_gen.scale.shards import refresh, shard, unshard


class EMA(L.Callback):
    """Averages the trainable parameters after every optimizer step; validation and export see the average.

    Lightning's own `EMAWeightAveraging` copies the frozen base too and loses the average under DeepSpeed; this one
    keeps a shadow of the trainable parameters only, in float32, and stores it in the checkpoint under "ema". Under
    ZeRO-3 each process averages its own pieces of them. After training the weights are the average.

    Args:
        decay: weight of the past in each update.
        warmup: ramp the decay up as (1 + step) / (10 + step), so that the average forgets the initial weights.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        self.decay, self.warmup = decay, warmup
        self.shadow: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] | None = None
        self._step = -1
        self._cut = False  # the shadow is this process's pieces

    @staticmethod
    def _trainable(module: L.LightningModule) -> dict[str, Tensor]:
        return {n: shard(p) for n, p in module.named_parameters() if p.requires_grad}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._cut = any(hasattr(p, "ds_tensor") for p in pl_module.parameters())

    # Not on_fit_start: under DeepSpeed a checkpoint is loaded after that.
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = self._trainable(pl_module)
        # After a resume the shadow was loaded on the CPU; bring it to where the weights are. In half precision what a
        # step adds would be rounded away.
        self.shadow = {
            n: self.shadow.get(n, w).detach().to(w.device, torch.promote_types(w.dtype, torch.float32), copy=True)
            for n, w in weights.items()
        }
        # Kept, since looking for them among all modules takes milliseconds of every step.
        self._parameters = [p for p in pl_module.parameters() if p.requires_grad]
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:  # still accumulating gradients
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self._step) / (10 + self._step)) if self.warmup else self.decay
        averages = list(self.shadow.values())
        weights = [shard(p).to(a.dtype) for p, a in zip(self._parameters, averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def _swap_in(self, module: L.LightningModule) -> None:
        if self.shadow and self._raw is None:
            weights = self._trainable(module)
            self._raw = {n: w.clone() for n, w in weights.items()}
            for name, weight in weights.items():
                weight.copy_(self.shadow[name])
            refresh(module.parameters())

    def _swap_out(self, module: L.LightningModule) -> None:
        if self._raw is not None:
            for name, weight in self._trainable(module).items():
                weight.copy_(self._raw[name])
            refresh(module.parameters())
            self._raw = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_out(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_in(pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_out(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_in(pl_module)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_out(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.shadow:  # there was nothing left to train
            return
        for name, weight in self._trainable(pl_module).items():  # training is over: the average is the result
            average = self.shadow[name].to(trainer.strategy.root_device)  # where the processes can exchange it
            weight.copy_(unshard(average, weight.shape) if self._cut else average)
        self.shadow, self._cut = {}, False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not self._cut:  # else the processes would wait for one that does not come here
            self._swap_out(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._raw is not None:  # saving during validation: the module holds the average, the file must hold both
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **self._raw}
        checkpoint["ema"] = self.shadow

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.shadow = dict(checkpoint.get("ema", {}))
