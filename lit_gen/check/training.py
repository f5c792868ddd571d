"""Whether model, trainer and strategy go together, and how much memory and disk they take."""

from __future__ import annotations

import re
import warnings
from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from lit_gen.callbacks.checkpoint import Checkpoint
from lit_gen.callbacks.ema import EMA
from lit_gen.callbacks.speed import Speed
from lit_gen.check.data import processes
from lit_gen.check.report import Report, bytes_of, described, made
from lit_gen.check.size import Size, activations, build, measure, outline
from lit_gen.classes import resolve
from lit_gen.errors import UserError
from lit_gen.interrupts import seconds
from lit_gen.methods.base import Method
from lit_gen.stage import as_user_error

LIMITS = (
    "accelerator", "max_epochs", "min_epochs", "max_steps", "min_steps", "num_nodes", "limit_train_batches",
    "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches", "val_check_interval",
    "gradient_clip_algorithm", "reload_dataloaders_every_n_epochs",
)  # fmt: skip
BEYOND_SHAPES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
TO_FETCH = "hf download"  # what the message about a model that is not on this machine says


def check_times(report: Report, trainer: dict[str, Any]) -> None:
    """Times are texts to the parser, whatever they say."""
    for key in ("max_time", "val_check_interval"):
        value = trainer.get(key)
        try:
            seconds(value if isinstance(value, str | dict) else {})
        except UserError as error:
            report.problem(("trainer", key), str(error).replace("trainer.max_time", f"trainer.{key}"))


def check_trainer(report: Report, settings: dict[str, Any]) -> None:
    """What the trainer's settings alone tell, and those of the callbacks that every run has."""
    trainer = settings["trainer"]
    for key, kind in (("checkpoint", Checkpoint), ("speed", Speed)):
        try:
            made(report, (key,), settings.get(key) or {}, lambda node, kind=kind: kind(**node))
        except UserError as error:
            report.problem((key,), str(error))
    _check_limits(report, trainer)
    max_steps, saves = trainer["max_steps"], (settings.get("checkpoint") or {}).get("every_n_steps", 0)
    if max_steps == -1 and trainer["max_epochs"] is None and trainer["max_time"] is None:
        report.note(("trainer",), "neither trainer.max_steps nor trainer.max_epochs is set: it trains for 1000 epochs")
    if report.run.smoke is None and 1 < max_steps < saves:
        report.note(
            ("checkpoint", "every_n_steps"),
            f"checkpoint.every_n_steps is {saves} of {max_steps} steps: a killed run would start from the beginning",
        )
    _check_devices(report, trainer)


def _check_limits(report: Report, trainer: dict[str, Any]) -> None:
    """Have Lightning's trainer say what it thinks of each setting that needs no particular machine."""
    plain = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    plain |= {"enable_progress_bar": False, "enable_model_summary": False}
    known = AcceleratorRegistry.available_accelerators()
    for key in LIMITS:
        value = trainer.get(key)
        if value is None or isinstance(value, dict) or (key == "accelerator" and value in ("auto", "gpu", *known)):
            continue
        if key == "val_check_interval" and isinstance(value, str):  # a time
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                L.Trainer(**plain | {key: value})
        except Exception as error:
            report.problem(("trainer", key), f"trainer.{key}: {described(error).partition(': ')[2]}")


def _check_devices(report: Report, trainer: dict[str, Any]) -> None:
    devices, accelerator = trainer["devices"], trainer["accelerator"]
    if not re.fullmatch(r"auto|-1|[1-9]\d*|\[\d+(, ?\d+)*,?\]|\d+(, ?\d+)*,|\d+(, ?\d+)+", str(devices)) or (
        accelerator == "cpu" and not (devices == "auto" or (str(devices).isdigit() and int(devices) > 0))
    ):
        told = "a number or auto" if accelerator == "cpu" else "a number, a list of them such as [0, 2], or auto"
        report.problem(("trainer", "devices"), f"`trainer.devices` must be {told}, not {devices!r}")
    here = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and here == 0:
        report.note(("trainer", "accelerator"), "trainer.accelerator asks for GPUs, and this machine has none")
    elif accelerator != "cpu" and str(devices).isdigit() and 0 < here < int(devices):
        report.note(("trainer", "devices"), f"trainer.devices is {devices}, and this machine has {here} GPUs")
    if str(devices) in ("auto", "-1") and accelerator != "cpu":
        report.note(("trainer", "devices"), f"trainer.devices is {devices}: figures are those of one device")


def check_model(report: Report, settings: dict[str, Any], batch: dict[str, Any] | None, is_arm: bool = False) -> None:
    """Build the model without its weights; hold it against the trainer, and find out how large it is.

    Args:
        report: what is found goes here.
        settings: of the run, as the parser resolved them.
        batch: a training batch of the real shapes; None where none could be made.
        is_arm: of a sweep, of which only problems and notes will be told.
    """
    trainer = settings["trainer"]
    strategy = _check_strategy(report, trainer)
    try:
        model = made(report, ("model",), settings["model"], outline)
    except Exception as error:
        told = as_user_error(error, report.run)
        if isinstance(told, ValueError):  # what constructors say of their arguments
            report.problem(("model",), described(told))
        elif not isinstance(told, UserError):
            report.note(("model",), f"its size was not found: {described(told)}")
        elif TO_FETCH in str(told):  # a run that may go online fetches it itself; nodes of a cluster often may not
            report.note(("model",), str(told))
        else:
            report.problem(("model",), str(told))
        return
    if model is None:
        return
    size = measure(model, trainer["max_steps"], trainer["precision"])
    _check_fit(report, trainer, model, size, strategy)
    _check_schedule(report, settings)
    why = "no batch could be made"
    try:
        if batch is None and is_overridden("train_dataloader", model):  # it needs no data
            batch = next(iter(model.train_dataloader()))
        # A step on shapes takes most of the time; of an arm nothing is told but that a GPU here is too small.
        if batch is not None and (not is_arm or torch.cuda.is_available()):
            size.activations = activations(model, batch, trainer["precision"])
    except Exception as error:  # whatever a step needs beyond shapes, or a fault that real data would meet too
        why = described(error)
        if not isinstance(error, BEYOND_SHAPES) and "not attached to a `Trainer`" not in why:
            report.note(("model",), f"a training step on shapes alone fails ({why}); see whether `fit --smoke` does")
    _tell(report, settings, size, strategy, why)


def _check_strategy(report: Report, trainer: dict[str, Any]) -> type | None:
    """The strategy's class, whose settings its constructor accepts."""
    value, where = trainer["strategy"], ("trainer", "strategy")
    if isinstance(value, str):
        if value.lower() in StrategyRegistry:
            return StrategyRegistry[value.lower()]["strategy"]
        found = resolve(value, Strategy)
        return found if isinstance(found, type) else None
    cls = resolve(value["class_path"], Strategy)
    try:
        made(report, where, value, partial(build, Strategy))
    except Exception as error:
        told = as_user_error(error, report.run)
        report.problem(where, str(told) if isinstance(told, UserError) else described(told))
    return cls if isinstance(cls, type) else None


def _check_fit(
    report: Report, trainer: dict[str, Any], model: L.LightningModule, size: Size, strategy: type | None
) -> None:
    """Whether the method can be trained in this way."""
    name, where = type(model).__name__, ("trainer", "strategy")
    if _is_zero(strategy):
        if trainer["accelerator"] == "cpu":
            report.problem(where, "ZeRO needs NVIDIA GPUs, but trainer.accelerator is cpu; use ddp there")
        if refusal := getattr(model, "refuses_zero", ""):
            report.problem(where, f"{name} cannot run under DeepSpeed: {refusal}; use --trainer.strategy ddp")
        elif (size.optimizers or 1) > 1:
            report.problem(where, f"{name} has {size.optimizers} optimizers, and DeepSpeed takes one; use ddp")
    if size.trainable == 0:
        report.problem(("model",), f"{name} has no parameter to train with these settings")
    clips, accumulates = trainer["gradient_clip_val"], trainer["accumulate_grad_batches"]
    if isinstance(model, Method) and clips is not None:
        report.problem(
            ("trainer", "gradient_clip_val"),
            "trainer.gradient_clip_val does nothing here; set model.init_args.optimizer.clip_norm",
        )
    if not model.automatic_optimization:
        for key, value, unset in (("gradient_clip_val", clips, None), ("accumulate_grad_batches", accumulates, 1)):
            if value != unset and not (isinstance(model, Method) and key == "gradient_clip_val"):
                report.problem(("trainer", key), f"{name} steps its optimizers itself, which rules out trainer.{key}")


def _check_schedule(report: Report, settings: dict[str, Any]) -> None:
    warmup = (settings["model"].get("init_args", {}).get("optimizer") or {}).get("warmup_steps", 0)
    steps = settings["trainer"]["max_steps"]
    if report.run.smoke is None and isinstance(warmup, int) and 0 < steps <= warmup:
        report.note(
            ("model", "init_args", "optimizer", "warmup_steps"),
            f"the learning rate rises for {warmup} steps, and there are only {steps}: it never reaches its peak",
        )


def _tell(report: Report, settings: dict[str, Any], size: Size, strategy: type | None, why: str) -> None:
    """Parameters, memory of a device and disk, in words."""
    trainer, checkpoint = settings["trainer"], settings.get("checkpoint") or {}
    ranks, average = processes(trainer), 0
    for callback in trainer["callbacks"] or []:
        cls = resolve(callback["class_path"], L.Callback)
        average += 4 * size.trainable if isinstance(cls, type) and issubclass(cls, EMA) else 0  # in float32
    report.facts["model"] += (
        f", {size.trainable / 1e6:,.1f} M of {(size.trainable + size.frozen) / 1e6:,.1f} M parameters are trained"
    )
    parts = {"weights": size.weights, "gradients": size.gradients, "optimizer": size.optimizer, "average": average}
    if _is_zero(strategy):  # which divides these among the processes
        divided = {1: ("optimizer",), 2: ("optimizer", "gradients"), 3: ("optimizer", "gradients", "average")}
        stage = _argument(trainer["strategy"], "stage", 2)
        parts |= {name: parts[name] // ranks for name in divided[stage]}
        parts["weights"] -= size.gradients * (ranks - 1) // ranks if stage == 3 else 0
    elif ranks > 1 and not _holds_gradients_once(strategy, trainer["strategy"]):
        parts["buckets of DDP"] = size.gradients
    if size.activations is not None:
        parts["activations"] = size.activations
    told = ", ".join(f"{name} {bytes_of(number)}" for name, number in parts.items() if number)
    known = "" if size.activations is not None else f"; without activations ({why})"
    total = sum(parts.values())
    report.facts["memory"] = f"about {bytes_of(total)} a device before CUDA's own: {told}{known}"
    if torch.cuda.is_available() and total > (room := torch.cuda.get_device_properties(0).total_memory):
        report.note(("data",), f"a device here has {bytes_of(room)}, and about {bytes_of(total)} are needed")
    each = size.stored + size.optimizer + average
    apart = checkpoint.get("keep_every_n_steps", 0)
    count = checkpoint.get("keep", 2) + 1 + (max(trainer["max_steps"], 0) // apart if apart else 0)
    report.stored = each * count
    report.facts["disk"] = f"{bytes_of(report.stored)} for {count} checkpoints of {bytes_of(each)}, one being written"


def _holds_gradients_once(strategy: type | None, written: Any) -> bool:
    from lit_gen.scale.ddp import DDP

    ours = strategy is not None and issubclass(strategy, DDP)
    return ours or bool(_argument(written, "gradient_as_bucket_view", False))


def _is_zero(strategy: type | None) -> bool:
    from lit_gen.scale.zero import ZeRO

    return strategy is not None and issubclass(strategy, ZeRO)


def _argument(value: Any, name: str, default: Any) -> Any:
    return (value.get("init_args") or {}).get(name, default) if isinstance(value, dict) else default
