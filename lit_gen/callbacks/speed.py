"""How fast training is, and why: samples per second, time spent waiting for data, memory, use of the device's peak."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lit_gen.callbacks.record import count
from lit_gen.scale import peers

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

UNKNOWN = float("nan")
KINDS_OF_BATCH = 16  # different shapes whose operations are counted; beyond them MFU is not known any more


class Counts(NamedTuple):
    """What one process has done since its first step; the difference of two makes figures.

    `seconds` of training without validation, optimizer `steps`, `samples`, floating-point operations `flops` and
    seconds `waited` for data.
    """

    seconds: float
    steps: int
    samples: int
    flops: float
    waited: float


class _Modules:
    """Where an operation happens, for torch's counter: "Global", and in no module.

    Its own way to find the module out keeps every activation that gradient checkpointing computes again, until the
    garbage is collected: four times the memory of the step, of which a run may have no more than one.
    """

    parents = {"Global"}

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def operations() -> FlopCounterMode:
    """Counts floating-point operations, in all."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Modules()
    return counter


class Speed(L.Callback):
    """Counts the work of this process, and logs its speed at the steps at which the other figures are logged.

    Logged are "speed/samples per second" of this process (one device); "speed/data wait %", the share of the time spent
    waiting for the loader, where that tells (`waited`, in seconds); "speed/peak memory GiB"; and "speed/MFU %" where
    the peak is stated. Nothing here waits for the device.

    Args:
        peak_tflops: operations that the device can do at the precision of the training, in 10^12 a second (an H200 was
            measured at 788 on bf16 matrix products). With it MFU is shown, the share of them that the model uses; the
            second forward pass of gradient checkpointing counts as use. The operations are counted in the first step
            on each shape of batch, which then runs uncompiled.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak_tflops = peak_tflops
        self.flops: dict[tuple, float] = {}  # of a step on this kind of batch
        self.counts: Counts | None = None  # None until the first step is over, which may have compiled the model
        self._counting = ExitStack()

    # Counting runs other kernels, whose sums are rounded otherwise: a resumed run must not do it again.
    def state_dict(self) -> dict[str, Any]:
        return {"flops": list(self.flops.items())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.flops = dict(state_dict["flops"])

    # -- counting -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._loader, self._device = trainer.train_dataloader, trainer.strategy.root_device
        self._origin, self._samples, self._flops = time.monotonic(), 0, 0.0
        self._logged = self.counts = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.peak_tflops is None or (kind := kind_of(batch)) in self.flops:
            return
        self.flops[kind] = UNKNOWN
        if len(self.flops) <= KINDS_OF_BATCH:
            # compiled code would hide its operations from the counter
            self._counting.callback(torch.compiler.set_stance, "default")
            torch.compiler.set_stance("force_eager")
            counter = self._counting.enter_context(operations())
            self._counting.callback(lambda: self.flops.update({kind: float(counter.get_total_flops())}))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._counting.close()
        self._samples += count(batch)
        self._flops += UNKNOWN if self.peak_tflops is None else self.flops[kind_of(batch)]
        step, waited = trainer.global_step, getattr(self._loader, "waited", UNKNOWN)
        accumulating = self.counts is not None and step == self.counts.steps
        self.counts = Counts(time.monotonic() - self._origin, step, self._samples, self._flops, waited)
        if self._logged is None:
            self._logged = self.counts
        elif not accumulating and trainer.log_every_n_steps and step % trainer.log_every_n_steps == 0:
            figures = {f"speed/{name}": value for name, value in self.figures(self._logged, self.counts).items()}
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=step - 1)  # as Lightning numbers the steps of the other figures
            self._logged = self.counts

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._counting.close()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_began = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.counts is not None:  # validation is not training time
            self._origin += time.monotonic() - self._validation_began

    # -- figures ------------------------------------------------------------------------------------------------------

    def figures(self, old: Counts, new: Counts) -> dict[str, float]:
        """Speed between two counts, by name; what is not known is left out."""
        seconds = new.seconds - old.seconds
        if seconds <= 0:
            return {}
        found = {
            "samples per second": (new.samples - old.samples) / seconds,
            "data wait %": 100 * (new.waited - old.waited) / seconds,
            "peak memory GiB": peak_memory(self._device),
            "MFU %": 100 * (new.flops - old.flops) / seconds / (1e12 * (self.peak_tflops or UNKNOWN)),
        }
        return {name: value for name, value in found.items() if value == value}  # nan is not equal to itself


def peak_memory(device: torch.device) -> float:
    """Most memory in use at once so far, in GiB: that of tensors on a GPU, that of the whole process on a CPU."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) + peers.held()) / 2**30
    if resource is None:
        return UNKNOWN
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux tells KiB


def kind_of(batch: Any) -> tuple:
    """What the number of operations depends on: the names and shapes of the tensors in a batch."""
    if isinstance(batch, dict):
        return tuple((name, kind_of(value)) for name, value in batch.items())
    if isinstance(batch, Tensor):
        return tuple(batch.shape)
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        return tuple(kind_of(value) for value in batch)
    return ()
