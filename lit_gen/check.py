"""`python -m lit_gen check -c ...`: what would go wrong, told in seconds and without a GPU; nothing is trained."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_gen import cli, experiment
from lit_gen.errors import ShardError, UserError, nearest
from lit_gen.experiment import Run
from lit_gen.settings import KeyPath, leaves

# Settings that name what a run writes, not what it reads.
WRITTEN = ("export", "out", "save_dir", "dirpath", "filename")
SPLITS = ("train", "val", "test")


def main(argv: list[str]) -> int:
    """Print every problem of an experiment and, per stage, what it would do; returns 2 if there are problems."""
    files, options, overrides = cli.parse(argv)
    if not files:
        raise UserError("check needs an experiment: -c FILE (`python -m lit_gen list` names those here)")
    stage, smoke = options.get("stage"), bool(options.get("smoke"))
    runs = experiment.select(experiment.runs(files, overrides, smoke), stage if isinstance(stage, str) else None)
    from lit_gen.stage import Binding  # heavy, so only now that the files themselves are in order

    bound = Binding("fit", runs).bound
    problems: list[str] = []
    for run, settings in zip(runs, bound, strict=True):
        found, summary = check(run, settings.as_dict(), runs)
        problems += [p for p in found if p not in problems]
        print(f"{run.name}: {summary}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{len(problems)} problem{'s' * (len(problems) != 1)} found")
    return 2 if problems else 0


def check(run: Run, settings: dict[str, Any], runs: list[Run]) -> tuple[list[str], str]:
    """-> (problems, one line about the run) of settings that the parser accepts, as plain data."""
    from lit_gen.interrupts import seconds

    settings = settings.get("fit", settings)
    trainer = settings["trainer"]
    problems = list(_missing_paths(run, settings, runs))  # sets of shards apart, which can be built
    if trainer["max_time"] is not None:
        try:
            seconds(trainer["max_time"])
        except UserError as error:
            problems.append(str(error))
    parts = [settings["model"]["class_path"].rpartition(".")[2]]
    if weights := sum(_weights(Path(value)) for _, value in _texts(settings["model"], ()) if Path(value).is_dir()):
        parts.append(f"over {weights / 1e6:.1f} M weights")
    if settings.get("data"):
        found, told = _check_data(run, settings["data"], trainer)
        problems += found
        parts += told
    if trainer["max_steps"] == -1 and trainer["max_epochs"] is None and trainer["max_time"] is None:
        parts.append("for 1000 epochs, since neither trainer.max_steps nor trainer.max_epochs is set")
    state = (
        "finished" if run.done.is_file() else f"would continue from {run.last}" if run.last.exists() else "not started"
    )
    return problems, ", ".join([*parts, state])


def _check_data(run: Run, data: dict[str, Any], trainer: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Whether the sets exist or can be built, and are large enough."""
    from lit_gen.data.module import Shards
    from lit_gen.mistakes import resolve

    problems, told = [], []
    processes = _processes(trainer)
    for node in _nodes(data):
        cls = resolve(node["class_path"], object)
        if not (isinstance(cls, type) and issubclass(cls, Shards)):
            continue
        arguments = node["init_args"]
        for split in SPLITS:
            source = arguments.get(split)
            if source is None:
                continue
            try:
                count, state = _count(source, cls)
            except UserError as error:
                problems.append(f"{_origin(run, source)}{error}")
                continue
            step = arguments["batch_size"] * processes
            if split == "train":
                told.append(f"{source} ({count} samples{state}), {count // step} steps of {step} an epoch")
                problems += _too_long(run, trainer, count // step, arguments.get("val"))
                if count < step:
                    problems.append(
                        f"{_origin(run, source)}{source} has {count} samples, fewer than one step of {step} "
                        f"(batch_size {arguments['batch_size']} x {processes} processes)"
                    )
    return problems, told


def _too_long(run: Run, trainer: dict[str, Any], steps: int, val: str | None) -> Iterator[str]:
    """Lightning refuses to validate every N steps of an epoch that has fewer."""
    interval = trainer["val_check_interval"]
    if val and type(interval) is int and trainer["check_val_every_n_epoch"] is not None and interval > steps > 0:
        where = run.settings.origin(("trainer", "val_check_interval"))
        yield (
            f"{where}: trainer.val_check_interval is {interval} steps, but an epoch has {steps}; "
            "set trainer.check_val_every_n_epoch to null to count over epochs"
        )


def _count(source: str, cls: type) -> tuple[int, str]:
    """Samples of a set, built or not."""
    from lit_gen.data.sets import SetFile
    from lit_gen.data.shards import ShardSet

    if Path(source).suffix in (".yaml", ".yml"):
        described = SetFile.read(source)
        count, kind, state = described.count, described.kind, "" if described.folder.is_dir() else ", to be built"
    else:
        shards = ShardSet.open(source)
        count, kind, state = len(shards), shards.kind, ""
    if kind and kind not in cls.kinds:
        raise ShardError(f"{source} is a set of {kind}; {cls.__name__} reads {' or '.join(cls.kinds)}")
    return count, state


def _missing_paths(run: Run, settings: dict[str, Any], runs: list[Run]) -> Iterator[str]:
    """Texts that can only be meant as paths, and lead nowhere."""
    from lit_gen.mistakes import with_overrides

    tree = with_overrides(run)
    coming = {str(other.last) for other in runs}
    texts = [*_texts(settings["model"], ("model",)), *_texts(settings.get("data") or {}, ("data",))]
    for i, callback in enumerate(settings["trainer"]["callbacks"] or []):
        texts += _texts(callback, ("trainer", "callbacks", i))
    for path, text in [*texts, (("init_from",), settings["init_from"] or "")]:
        if path[-1] in WRITTEN or text in coming or "/" not in text or re.search(r"[{*?\s]", text):
            continue
        if path[0] == "data" and path[-1] in SPLITS:
            continue
        place = Path(text)
        first = place.parts[0]
        is_local = place.is_absolute() or first in (".", "..") or Path(first).is_dir()
        if is_local and not place.exists():
            parent = next(p for p in place.parents if p.exists())
            lost = place.relative_to(parent).parts[0]
            near = nearest(lost, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""
            where = tree.origin(path) or run.name
            yield f"{where}: `{'.'.join(map(str, path))}` names {text}, but there is no `{lost}` in {parent}{near}"


def _processes(trainer: dict[str, Any]) -> int:
    devices = trainer["devices"]
    if isinstance(devices, list):
        devices = len(devices)
    return int(trainer["num_nodes"]) * (int(devices) if str(devices).isdigit() and int(devices) > 0 else 1)


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every {"class_path", "init_args"} in a tree."""
    if isinstance(value, dict):
        if "class_path" in value:
            yield {"class_path": value["class_path"], "init_args": value.get("init_args") or {}}
        for item in value.values():
            yield from _nodes(item)
    elif isinstance(value, list):
        for item in value:
            yield from _nodes(item)


def _texts(value: Any, path: KeyPath) -> list[tuple[KeyPath, str]]:
    return [(where, leaf) for where, leaf in leaves(value, path) if isinstance(leaf, str)]


def _weights(folder: Path) -> int:
    """Numbers stored in the safetensors files of a folder, from their headers alone."""
    total = 0
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        for name, entry in header.items():
            if name != "__metadata__":
                size = 1
                for length in entry["shape"]:
                    size *= length
                total += size
    return total


def _origin(run: Run, value: Any) -> str:
    """ "file:line: " of the setting under `data` with this value, "" if it cannot be told."""
    from lit_gen.mistakes import with_overrides

    tree = with_overrides(run)
    for path, found in leaves(tree.data, ()):
        if path[0] == "data" and found == value:
            return f"{tree.origin(path)}: "
    return ""
