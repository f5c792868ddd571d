"""What a run leaves behind beside checkpoints: its resolved settings, where it came from, and its figures."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from lit_gen.files import read_json, write_whole

PACKAGES = (
    "torch", "lightning", "jsonargparse", "omegaconf", "diffusers", "transformers", "peft", "torchmetrics",
    "webdataset", "deepspeed", "av", "numpy",
)  # fmt: skip


class Record(L.Callback):
    """Keeps `config.yaml`, `provenance.json` and `metrics.json` of a run folder up to date.

    `metrics.json`: {"step", "samples", "seconds" of training, "train": latest logged values, "validate": latest
    validation, "before": validation before the first step, "history": one entry per validation, "test"}.

    Args:
        config: resolved settings as YAML text.
        argv: words of the command line.
        request: what a later command compares itself with, kept as `fit.json` once training can begin.
    """

    def __init__(self, config: str = "", argv: tuple[str, ...] = (), request: str = "") -> None:
        self.config, self.argv, self.request = config, argv, request
        self.samples = 0
        self.seconds = 0.0
        self.metrics: dict[str, Any] = {}
        self._trained: dict[str, Any] = {}  # figures of the steps before a resume

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.default_root_dir)
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = read_json(self.folder / "metrics.json") or self.metrics
        if stage == "fit":
            (self.folder / "samples").mkdir(exist_ok=True)
            _write(self.folder / "config.yaml", self.config)
            if self.request:
                _write(self.folder / "fit.json", self.request)
            _write(self.folder / "provenance.json", json.dumps(provenance(self.argv), indent=1))

    # -- clock --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples, self.seconds = state_dict["samples"], state_dict["seconds"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["figures"] = self._training(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._trained = checkpoint.get("figures", {})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tick, self._step = time.monotonic(), trainer.global_step
        # A killed run may have validated after its last checkpoint: those steps will be made again.
        self.metrics["history"] = [e for e in self.metrics.get("history", []) if e["step"] <= trainer.global_step]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # still accumulating gradients
            return
        self._step = trainer.global_step
        # Lightning would log a figure of an earlier step again at every step that has none of that name, up to the end
        # of the epoch, which shows values that nobody measured, and others after a resume.
        for figure in trainer.fit_loop.epoch_loop._results.values():
            figure._forward_cache = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += count(batch) * trainer.world_size
        now = time.monotonic()
        self.seconds += now - self._tick
        self._tick = now

    # -- figures ------------------------------------------------------------------------------------------------------

    def validated(self, trainer: L.Trainer) -> bool:
        """Whether the weights of this step were measured; the same on all ranks, of which one has read the figures."""
        history = self.metrics.get("history") or [{"step": -1}]
        return trainer.strategy.broadcast(history[-1]["step"] == trainer.global_step)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.num_sanity_val_steps == float("inf"):  # `validate_first`: the whole validation set was seen
            self.metrics["before"] = plain(trainer.callback_metrics)
            self._write(trainer)
            for logger in trainer.loggers:
                logger.log_metrics({k: v for k, v in self.metrics["before"].items() if isinstance(v, float)}, step=0)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        own = {k: v for k, v in plain(trainer.callback_metrics).items() if not k.startswith("train")}
        self.metrics["validate"] = own
        if trainer.global_step > 0:
            entry = {"step": trainer.global_step, **own}
            history = self.metrics.setdefault("history", [])
            self.metrics["history"] = [e for e in history if e["step"] != trainer.global_step] + [entry]
        self._write(trainer)
        self._tick = time.monotonic()  # validation is not training time

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.metrics["test"] = plain(trainer.callback_metrics)
        self._write(trainer)

    # Not on_train_end, which is left out where a run was killed after its last step.
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.metrics["train"] = self._training(trainer)
        self._write(trainer)

    def _training(self, trainer: L.Trainer) -> dict[str, float | str]:
        """The latest figures of training, also of kinds of steps that have not come since a resume."""
        validated = self.metrics.get("validate", {})
        return self._trained | {k: v for k, v in plain(trainer.callback_metrics).items() if k not in validated}

    def _write(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            theirs = read_json(self.folder / "metrics.json") or {}  # a run may be tested while it trains
            trains = trainer.state.fn == "fit" or trainer.global_step > 0  # else it knows no step
            own = self.metrics.keys() - {"test"} if trains else self.metrics.keys() & {str(trainer.state.fn.value)}
            kept = {"test"} if trains else theirs.keys() - own
            self.metrics = {k: self.metrics[k] for k in own} | {k: theirs[k] for k in kept if k in theirs}
            if trains:
                clock = {"step": trainer.global_step, "samples": self.samples, "seconds": round(self.seconds, 2)}
                self.metrics |= clock
            order = ("step", "samples", "seconds", "before", "validate", "test", "train", "history")
            ordered = {key: self.metrics[key] for key in order if key in self.metrics}
            _write(self.folder / "metrics.json", json.dumps(ordered, indent=1))


def count(batch: Any) -> int:
    """Samples in a batch: the length of its first tensor or list; of several batches in one, those of all."""
    if isinstance(batch, dict):
        parts = list(batch.values())
        if all(isinstance(part, dict) for part in parts):
            return sum(count(part) for part in parts)
        batch = parts[0]
    elif isinstance(batch, tuple | list) and batch and hasattr(batch[0], "shape"):
        batch = batch[0]
    return len(batch) if hasattr(batch, "__len__") else 1


def plain(metrics: dict[str, Any]) -> dict[str, float | str]:
    """Tensors as numbers; what is not finite as a word, which JSON can hold."""
    values = {k: float(v) for k, v in metrics.items()}
    return {k: v if math.isfinite(v) else str(v) for k, v in values.items()}


def provenance(argv: tuple[str, ...]) -> dict[str, Any]:
    """Code, versions and command a run came from; nothing about the machine's name or its owner."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"git": _git(), "argv": list(argv), "versions": versions, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def _git() -> dict[str, Any] | None:
    def ask(*words: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _write(path: Path, text: str) -> None:
    write_whole(path, text + "\n")
