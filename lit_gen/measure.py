"""What a child process of `bench` does: a fit with a measured window, and the same work in a bare loop in between."""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lit_gen.bench import RESULT, TRACE, WINDOW
from lit_gen.callbacks.checkpoint import Checkpoint
from lit_gen.callbacks.record import provenance
from lit_gen.callbacks.speed import UNKNOWN, Counts, Speed, kind_of, peak_memory
from lit_gen.data.loader import endless
from lit_gen.errors import UserError
from lit_gen.run import Run
from lit_gen.scale.ddp import DDP
from lit_gen.scale.shards import size
from lit_gen.stage import SMOKE_NOTHING, Command
from lit_gen.trace import Trace

SYNCHRONIZES = "called a synchronizing"  # torch's warning of such a call; that of the mode itself speaks of them too


class Bench(Command):
    """A fit without checkpoints and validation that measures a window of its steps.

    The window's settings are in `window.json` of the run folder, the result goes to `bench.json` beside it.
    """

    def __init__(self, verb: str, runs: list[Run], argv: list[str]) -> None:
        window = json.loads((runs[0].folder / WINDOW).read_text())
        self.window = Window(**window | {"trace": str(runs[0].folder / TRACE) if window["trace"] else ""})
        super().__init__(verb, runs, argv)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        super().parse_arguments(parser, args)
        for settings in self.bound:
            _forget_exports(settings)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, Checkpoint)] + [self.window]
        return trainer

    def fit(self, model: L.LightningModule, **kwargs: Any) -> None:
        """Train for the length of the window."""
        self.trainer.fit(model, **kwargs)
        if self.pause.status:
            return
        if self.trainer.is_global_zero:
            (self.runs[0].folder / RESULT).write_text(json.dumps(self.window.result(self.trainer, model), indent=1))


class Window(L.Callback):
    """Times steps `warmup` + 1 … `warmup` + `steps` * `rounds`; must be the last of the callbacks.

    The device is waited for at the borders of the rounds only. Inside, each step leaves a time stamp: on a GPU an event
    in its queue, which does not hold up anything.

    Args:
        warmup: optimizer steps before the first round; the first ones compile and choose kernels.
        steps: optimizer steps of a round.
        rounds: how many rounds.
        bare: after each round of the trainer, make as many steps of the same model in a bare loop.
        trace: file that a few steps after the last round are traced to, by the first process; "" for none.
    """

    def __init__(self, warmup: int, steps: int, rounds: int, bare: bool, trace: str = "") -> None:
        self.warmup, self.steps, self.rounds, self.bare, self.trace = warmup, steps, rounds, bare, trace
        self._trace: Trace | None = None
        self.seconds: list[float] = []  # of the trainer's rounds
        self.bare_seconds: list[float] = []
        self.milliseconds: list[float] = []  # of the trainer's steps
        self.done = Counts(0.0, 0, 0, 0.0, 0.0)  # in the trainer's rounds
        self._stamps: list[Any] = []
        self._kinds: set[tuple] = set()  # of batches seen before the window
        self.waits: list[str] = []  # places in the code that waited for the GPU, in a step of the warm-up
        self._listening = ExitStack()

    # -- rounds -------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._device = trainer.strategy.root_device
        self._speed = next(c for c in trainer.callbacks if isinstance(c, Speed))
        self._loop = BareLoop(trainer, pl_module, skip=self.warmup) if self.bare else None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # the next to last step of the warm-up, up to the end of the last, for what lies between two steps
        if self._device.type == "cuda" and trainer.global_step == max(self.warmup - 2, 0):
            self._listen()

    def _listen(self) -> None:
        self._listening.close()
        heard = self._listening.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        self._listening.callback(
            lambda: self.waits.extend(f"{w.filename}:{w.lineno}" for w in heard if SYNCHRONIZES in str(w.message))
        )
        self._listening.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= self.warmup:
            self._listening.close()
        kind = kind_of(batch)
        if kind not in self._kinds and self._step >= self.warmup and trainer.is_global_zero:
            print(f"step {self._step}: the warm-up saw no batch like this; consider a longer --warmup", flush=True)
        self._kinds.add(kind)
        if trainer.global_step == self._step:  # still accumulating gradients
            return
        self._step = trainer.global_step
        measured = self._step - self.warmup
        if measured > self.steps * self.rounds:
            if self._trace is not None:
                self._trace.step()
            return
        if measured > 0:
            self._stamps.append(self._stamp())
        if measured < 0 or measured % self.steps:
            return
        self._wait()
        now = time.perf_counter()
        if measured > 0:
            self._end_round(now - self._began)
            if self._loop is not None:
                self.bare_seconds.append(self._time_bare())
        elif self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if self.trace and measured == self.steps * self.rounds and trainer.is_global_zero:
            self._trace = Trace(self._device, Path(self.trace))
        self._counts = self._speed.counts
        self._stamps = [self._stamp()]
        self._began = time.perf_counter()

    def _end_round(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.milliseconds += [self._elapsed(a, b) for a, b in zip(self._stamps, self._stamps[1:], strict=False)]
        old, new = self._counts, self._speed.counts
        self.done = Counts(*(total + b - a for total, a, b in zip(self.done, old, new, strict=True)))

    def _time_bare(self) -> float:
        began = time.perf_counter()
        self._loop.run(self.steps)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _stamp(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed(self, old: Any, new: Any) -> float:
        """Milliseconds between two stamps."""
        return old.elapsed_time(new) if self._device.type == "cuda" else 1000 * (new - old)

    # -- result -------------------------------------------------------------------------------------------------------

    def result(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """Figures as plain data; null where one is not known."""
        if len(self.seconds) < self.rounds:
            raise UserError(f"training ended after {self._step} steps, before the measured window did")
        seconds, (_, steps, samples, flops, waited) = sum(self.seconds), self.done
        world = trainer.world_size
        peak = self._speed.peak_tflops
        low = high = UNKNOWN
        if len(self.milliseconds) > 1:
            low, *_, high = statistics.quantiles(self.milliseconds, n=10, method="inclusive")
        figures = {
            "samples_per_second": samples * world / seconds,
            "samples_per_second_per_device": samples / seconds,
            "ms_per_step": statistics.median(self.milliseconds),
            "ms_per_step_p10": low,
            "ms_per_step_p90": high,
            "data_wait_percent": 100 * waited / seconds,
            "peak_memory_gib": peak_memory(self._device),
            "tflops_per_device": flops / seconds / 1e12 if peak else UNKNOWN,
            "mfu_percent": 100 * flops / seconds / (1e12 * peak) if peak else UNKNOWN,
        }
        for place in dict.fromkeys(self.waits):
            print(f"waits for the GPU: {place} ({self.waits.count(place)} times in two steps)", flush=True)
        if self.bare:
            overheads = [100 * (a / b - 1) for a, b in zip(self.seconds, self.bare_seconds, strict=True)]
            figures |= {
                "bare_samples_per_second_per_device": samples / sum(self.bare_seconds),
                "bare_ms_per_step": 1000 * statistics.median(self.bare_seconds) / self.steps,
                "overhead_percent": statistics.median(overheads),
                "overhead_percent_min": min(overheads),
                "overhead_percent_max": max(overheads),
            }
        return {
            "model": type(module).__name__,
            "trained_parameters": sum(size(p) for p in module.parameters() if p.requires_grad),
            "devices": world,
            "strategy": type(trainer.strategy).__name__,
            "precision": trainer.precision,
            "samples_per_step_per_device": samples / steps,
            "steps": steps,
            "warmup": self.warmup,
            **{name: None if value != value else float(f"{value:.6g}") for name, value in figures.items()},
            "waits": sorted(set(self.waits)),
            **({"trace": self._trace.found} if self._trace is not None else {}),
            "machine": machine(self._device),
            **{key: told for key, told in provenance(()).items() if key in ("git", "versions")},
        }


class BareLoop:
    """Steps of a trainer's model and optimizer without the trainer: forward, backward, clipping, optimizer.

    Args:
        trainer: whose model, optimizer and precision are used.
        module: the model.
        skip: batches to leave out at first, so that the loop gets those of the trainer's measured steps.

    Raises:
        UserError: the trainer's work is more than such a loop can do.
    """

    def __init__(self, trainer: L.Trainer, module: L.LightningModule, skip: int = 0) -> None:
        reasons = {
            # whose subclasses, DeepSpeed's among them, go other ways
            f"{type(trainer.strategy).__name__} has a way of its own": type(trainer.strategy)
            not in (SingleDeviceStrategy, DDPStrategy, DDP),
            "the method optimizes manually": not module.automatic_optimization,
            "trainer.accumulate_grad_batches is more than 1": trainer.accumulate_grad_batches > 1,
            f"{trainer.precision} scales its gradients": getattr(trainer.precision_plugin, "scaler", None) is not None,
        }
        if wrong := [reason for reason, holds in reasons.items() if holds]:
            raise UserError(f"--bare compares with a plain loop of one backward and one step, but {wrong[0]}")
        self.trainer, self.module = trainer, module
        source = trainer.datamodule if trainer.datamodule is not None else module
        self.batches = itertools.islice(endless(source.train_dataloader()), skip, None)  # of a second loader

    def run(self, steps: int) -> None:
        trainer, module, optimizer = self.trainer, self.module, self.trainer.optimizers[0]
        module.log = module.log_dict = _silent  # type: ignore[method-assign]
        try:
            for i in range(steps):
                batch = trainer.strategy.batch_to_device(next(self.batches))
                output = trainer.strategy.training_step(batch, i)  # under autocast, and through DDP where there is one
                (output["loss"] if isinstance(output, dict) else output).backward()
                how = (trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
                module.configure_gradient_clipping(optimizer, *how)
                optimizer.step()
                optimizer.zero_grad()
        finally:
            del module.log, module.log_dict


def _silent(*_: Any, **__: Any) -> None:
    pass


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, and nothing about whose it is."""
    told: dict[str, Any] = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        told = {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30), **told}
        return told | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {"device": _processor(), **told}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _forget_exports(settings: Namespace) -> None:
    """A measured model is worth nothing: it must not overwrite what a real run would."""
    for key in list(settings.keys()):
        if key.rpartition(".")[2] in SMOKE_NOTHING:
            settings[key] = None
