"""Whether the sets of a run are there, readable, of the right kind and large enough."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np

from lit_gen.check.report import Report, described, made
from lit_gen.check.size import build
from lit_gen.classes import resolve
from lit_gen.data import encoded
from lit_gen.data.build import first_sample, source_fingerprint, what_changed
from lit_gen.data.decode import decode
from lit_gen.data.loader import collate
from lit_gen.data.module import Shards
from lit_gen.data.random_batches import RandomData
from lit_gen.data.remote import check_scheme, is_remote
from lit_gen.data.sets import SetFile
from lit_gen.data.shards import INDEX, BadSample, ShardSet
from lit_gen.errors import ShardError, UserError
from lit_gen.settings import KeyPath
from lit_gen.stage import as_user_error

SPLITS = ("train", "val", "test")


def check_data(report: Report, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Open every set of a run; returns a training batch of the real shapes, where one could be made.

    Args:
        report: what is found goes here.
        settings: of the run; where the parser objects to them, those of the files, which lack what is left to defaults.
    """
    with tempfile.TemporaryDirectory(prefix="lit_gen-") as place:
        return _check_sets(report, settings, Path(place))


def _check_sets(report: Report, settings: dict[str, Any], place: Path) -> dict[str, Any] | None:
    """As `check_data`; `place` is an empty folder, for a sample of each set that is yet to be built."""
    trainer = settings.get("trainer") or {}
    batches, told = [], []
    for path, node in _nodes(settings.get("data"), ("data",)):
        cls = resolve(str(node["class_path"]), L.LightningDataModule)
        if not isinstance(cls, type) or not issubclass(cls, Shards | RandomData):
            continue
        module = _module(report, path, node)
        if issubclass(cls, RandomData):
            batches += [module.example()] if module is not None else []
            continue
        arguments = node.get("init_args") or {}
        for split in SPLITS:
            source, where = arguments.get(split), (*path, "init_args", split)
            if not isinstance(source, str):
                continue
            try:
                count, state, shards = _open(report, where, source, cls, place)
            except UserError as error:
                report.problem(where, str(error))
                continue
            except Exception as error:  # in making the first sample
                report.problem(where, f"{source}: its first sample cannot be made: {described(error)}")
                continue
            if split == "train" and module is not None:
                told.append(f"{source} ({count} samples{state}), " + _steps(report, where, trainer, count, module))
                _check_interval(report, trainer, count // (module.batch_size * processes(trainer)), module)
            sample = _check_samples(report, where, shards, module, split) if shards and module else None
            if split == "train" and shards and module and module.cached and not module.caches:
                _check_cache(report, where, shards, module, built=not state)
            if split == "train" and sample is not None:
                batches.append(collate([sample] * module.batch_size))
    if told:
        report.facts["data"] = ", ".join(told)
    return max(batches, key=lambda batch: "video" in batch, default=None)  # of a mixture, the larger


def processes(trainer: dict[str, Any]) -> int:
    """How many processes train; `auto` and -1, which other machines decide, count as one."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, list):
        devices = len(devices)
    number = int(devices) if str(devices).isdigit() and int(devices) > 0 else 1
    return int(trainer.get("num_nodes") or 1) * number


def _nodes(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Every {"class_path", "init_args"} in a tree, with its place."""
    if isinstance(value, dict):
        if "class_path" in value:
            yield path, value
        for key, item in value.items():
            yield from _nodes(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _nodes(item, (*path, i))


def _module(report: Report, path: KeyPath, node: dict[str, Any]) -> Any:
    """The data module of these settings; None where they are not what was meant, or its constructor objects."""
    if not report.is_whole(path):
        return None
    try:
        return made(report, path, node, partial(build, L.LightningDataModule))
    except Exception as error:
        told = as_user_error(error, report.run)
        if report.bound or isinstance(told, UserError):  # else the parser has told
            report.problem(path, str(told) if isinstance(told, UserError) else described(error))
    return None


def _open(
    report: Report, where: KeyPath, source: str, cls: type[Shards], place: Path
) -> tuple[int, str, ShardSet | None]:
    """-> (samples, ", state" in words, the set where it can be read now, or its first sample where it can be made)"""
    if Path(source).suffix in (".yaml", ".yml") and not is_remote(source):
        described = SetFile.read(source)
        _require_kind(source, described.kind, cls)
        if what_changed(described, source_fingerprint(described)) is not None:
            return described.count, ", to be built", first_sample(described, Path(tempfile.mkdtemp(dir=place)))
    elif source.startswith("pipe:") or (is_remote(source) and ".tar" in source):
        check_scheme(source)
        # A command may do anything, and counting the samples of a tar takes the whole of it.
        report.note(where, f"{source} is fetched and counted when the run starts; it was not opened")
        return 0, ", not counted", None
    shards = ShardSet.open(source)
    _require_kind(source, shards.kind, cls)
    return len(shards), "", None if is_remote(source) else shards


def _require_kind(source: str, kind: str, cls: type[Shards]) -> None:
    if kind and kind not in cls.kinds:
        raise ShardError(f"{source} is a set of {kind}; {cls.__name__} reads {' or '.join(cls.kinds)}")


def _steps(report: Report, where: KeyPath, trainer: dict[str, Any], count: int, module: Shards) -> str:
    """How the samples make steps and epochs, in words."""
    ranks, accumulate = processes(trainer), int(trainer.get("accumulate_grad_batches") or 1)
    batch = module.batch_size * ranks
    step = batch * accumulate
    factors = [f"batch_size {module.batch_size}", f"{ranks} processes"]
    factors += [f"{accumulate} accumulated"] if accumulate > 1 else []
    if 0 < count < step:
        source = module.sources["train"]
        report.problem(where, f"{source} has {count} samples, fewer than one step of {step} ({' x '.join(factors)})")
    told = f"{count // step} steps of {step} an epoch"
    told += f" ({' x '.join(factors)})" if step > module.batch_size else ""
    max_steps = trainer.get("max_steps", -1)
    if count and max_steps > 0 and len(where) == 3:  # else of a mixture, whose steps are only partly of this set
        told += f", {max_steps * step / count:.3g} epochs in {max_steps} steps"
    return told


def _check_interval(report: Report, trainer: dict[str, Any], batches: int, module: Shards) -> None:
    """Lightning refuses to validate every N batches of an epoch that has fewer."""
    interval = trainer.get("val_check_interval")
    within = trainer.get("check_val_every_n_epoch", 1) is not None
    if module.sources["val"] and type(interval) is int and within and interval > batches > 0:
        report.problem(
            ("trainer", "val_check_interval"),
            f"trainer.val_check_interval is {interval} steps, but an epoch has {batches}; "
            "set trainer.check_val_every_n_epoch to null to count over epochs",
        )


def _check_cache(report: Report, where: KeyPath, shards: ShardSet, module: Shards, built: bool) -> None:
    """Whether a cache fits in all but the encoders' weights, which the run itself compares when it starts."""
    folder = encoded.folder_of(module, {})
    wanted: dict[str, Any] = {"dtype": module.cached} | ({"set": shards.fingerprint} if built else {})
    wanted["preprocessing"] = {"version": encoded.VERSION, **module.preprocessing()}
    found = [json.loads(index.read_text())["description"] for index in folder.parent.glob(_any_key(folder.name))]
    stale = [encoded.changes(old, old | wanted) for old in found]
    if not all(stale):  # one of them differs in nothing
        return
    why = f"cached only from something else ({'; '.join(min(stale, key=len))})" if stale else "not cached yet"
    report.problem(where, f"{shards.source} is {why}; run python -m lit_gen cache with the same settings")


def _any_key(name: str) -> str:
    return f"{name.rpartition('-')[0]}-*/{INDEX}"


def _check_samples(
    report: Report, where: KeyPath, shards: ShardSet, module: Shards, split: str
) -> dict[str, Any] | None:
    """The first sample as the module makes it; it and the last one are read."""
    made = None
    for index in sorted({0, len(shards) - 1}):
        name = f"sample {index}"
        try:
            name, members = shards.read(index, module.extensions)
            decoded = {extension: decode(extension, data) for extension, data in members.items()}
            sample = module.transform(shards, split == "train")(decoded | {"key": name}, np.random.default_rng(0))
            made = made or sample
            if (module.batch_size if split == "train" else module.val_batch_size) > 1:
                collate([made, sample])
        except BadSample as error:
            report.problem(where, f"{shards.source}: {name} cannot be read: {error}")
        except UserError as error:
            report.problem(where, str(error))
            return None
        except Exception as error:  # what the module makes of a sample that can be read
            report.problem(where, f"{shards.source}: {name} cannot be made a sample of: {described(error)}")
            return None
    try:
        module.look_through(shards)
    except ShardError as error:
        report.problem(where, f"{shards.source}: {error}")
    return made
