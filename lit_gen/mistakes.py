"""Finds what is wrong with a run's settings, all of it at once, each in one line with its file and line.

The parser of `stage.py` has the last word; but it stops at its first objection, knows no lines, and lets a few slips
through. So settings are first held against the signatures of the classes they name.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as L
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_gen.callbacks.checkpoint import Checkpoint
from lit_gen.callbacks.speed import Speed
from lit_gen.classes import (
    alternatives,
    class_types,
    data_class,
    is_function_type,
    keep_to_packages,
    parameters,
    resolve,
)
from lit_gen.errors import nearest
from lit_gen.run import Run
from lit_gen.settings import KeyPath, Settings, leaves, merge, parse_value

ROOTS = {
    "trainer": L.Trainer,
    "model": L.LightningModule,
    "data": L.LightningDataModule,
    "checkpoint": Checkpoint,
    "speed": Speed,
}
UNPICKLING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
PLAIN_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
NOT_ZERO = ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A setting that does not fit: its place in the tree, and the line that says so."""

    path: KeyPath
    line: str


def find(run: Run, top_level: Iterable[str]) -> list[Mistake]:
    """Every mistake in the settings of `run`; `top_level` names the keys that the parser knows."""
    keep_to_packages()
    tree, unset = resolved(with_overrides(run))
    top_level = sorted(set(top_level))
    found = [
        _line(tree, (key,), f"there is no setting `{key}`{nearest(key, top_level)}")
        for key in tree.data
        if key not in top_level
    ]
    for name, value in tree.data.items():
        if name not in ROOTS or (value is None and name in ("data", "checkpoint", "speed")):
            continue
        if name in ("model", "data"):
            found += _subclass(tree, (name,), value, ROOTS[name])
        elif not isinstance(value, dict):
            found.append(_line(tree, (name,), f"`{name}` must be a mapping of settings, not {value!r}"))
        else:
            found += _arguments(tree, (name,), value, ROOTS[name])
    found += _strategy(with_overrides(run))
    found += _ranges(tree)
    if "model" not in tree.data:
        found.append(Mistake(("model",), f"{run.name}: the settings name no `model:`"))
    return list(dict.fromkeys(found + unset))


def resolved(tree: Settings) -> tuple[Settings, list[Mistake]]:
    """Settings with their interpolations replaced, where the files say by what; and those that refer to no `vars`."""
    open_ones = [(path, v) for path, v in leaves(tree.data) if isinstance(v, str) and "${" in v and not _in_place(path)]
    if not open_ones:
        return tree, []
    data, unset = copy.deepcopy(tree.data), []
    for path, text in open_ones:
        for name in re.findall(r"\$\{vars\.([^${}:]+)\}", text):
            known = data.get("vars") or {}
            if isinstance(known, dict) and name.split(".")[0] not in known:
                problem = f"`{_dotted(path)}` refers to vars.{name}, which is not set{nearest(name, known)}"
                unset.append(_line(tree, path, problem))
        node = data
        for key in path[:-1]:
            node = node[key]
        with contextlib.suppress(OmegaConfBaseException):  # to a default, say, which the parser knows
            found: Any = OmegaConf.create(tree.data)
            for key in path:
                found = found[key]
            node[path[-1]] = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    return Settings(data, tree.origins), unset


def _in_place(path: KeyPath) -> bool:
    """Whether a setting that chooses code must say so itself, which an interpolation does not."""
    return path[-1] == "class_path" or path == ("trainer", "strategy")


def sound(run: Run, top_level: Iterable[str]) -> tuple[dict[str, Any], list[KeyPath]]:
    """What is left of settings without their mistakes and without what cannot be resolved -> (settings, places)."""
    tree, _ = resolved(with_overrides(run))
    gone = [mistake.path for mistake in find(run, top_level)]
    gone += [path for path, value in leaves(tree.data) if isinstance(value, str) and "${" in value]
    data = copy.deepcopy(tree.data)
    for path in gone:
        node: Any = data
        for key in path[:-1]:
            node = node.get(key) if isinstance(node, dict) else None  # within a list nothing has a fixed place
        if isinstance(node, dict):
            node.pop(path[-1], None)
    return data, gone


def places(tree: Settings, name: str, value: float) -> list[KeyPath]:
    """Where a tree sets what a constructor calls `name` to a number."""
    numbers = [(path, v) for path, v in leaves(tree.data) if type(v) in (int, float)]
    same = [path for path, v in numbers if v == value or (v != v and value != value)]
    return [path for path in same if f".{_dotted([k for k in path if isinstance(k, str)])}".endswith(f".{name}")]


def shorten(message: str) -> str:
    """The parser's own words in one line, without the layers that say nothing."""
    noise = r"Does not validate|Subtypes:|Errors:|Given value|- Expected a <class 'NoneType'>|Subclass|- a (class|dict)"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip() and not re.match(noise, line.strip())]
    return " ".join(lines).replace('Parser key "config": ', "").replace('Parser key "', "`").replace('":', "`:")


# -- the walk ---------------------------------------------------------------------------------------------------------


def _subclass(tree: Settings, path: KeyPath, value: Any, base: Any) -> list[Mistake]:
    """A node that names a class: {"class_path", "init_args"} or the class path alone."""
    key = _dotted(path)
    if isinstance(value, str):
        value = {"class_path": value}
    if not isinstance(value, dict):
        return [_line(tree, path, f"`{key}` must name a class (class_path, init_args), not {value!r}")]
    found = [
        _line(tree, (*path, k), f"there is no setting `{key}.{k}`{nearest(k, CLASS_KEYS)}" + _misplaced(k, value))
        for k in value
        if k not in CLASS_KEYS
    ]
    if "class_path" not in value:
        return found or [_line(tree, path, f"`{key}` lacks `class_path`")]
    if not class_types(base):
        return [*found, _line(tree, path, f"`{key}` takes no class")]
    cls = resolve(str(value["class_path"]), base)
    if isinstance(cls, str):
        return [*found, _line(tree, (*path, "class_path"), f"`{key}.class_path`: {cls}")]
    arguments = value.get("init_args")
    if arguments is not None and not isinstance(arguments, dict):
        return [*found, _line(tree, (*path, "init_args"), f"`{key}.init_args` must be a mapping, not {arguments!r}")]
    is_factory = any(is_function_type(t) for t in alternatives(base))  # called later, with the rest
    return found + _arguments(tree, (*path, "init_args"), arguments or {}, cls, complete=not is_factory)


def _arguments(
    tree: Settings, path: KeyPath, values: dict[str, Any], cls: type, complete: bool = True
) -> list[Mistake]:
    """Settings of one class or dataclass."""
    signature = parameters(cls)
    if signature is None:
        return []
    known, takes_others = signature
    found = []
    for name, value in values.items():
        here = (*path, name)
        if name.rstrip("+") not in known:
            if takes_others:  # the parser finds out which
                continue
            problem = f"`{_dotted(here)}`: {cls.__name__} has no setting `{name}`{nearest(name, known)}"
            found.append(_line(tree, here, problem))
        else:
            found += _value(tree, here, value, known[name.rstrip("+")][0])
    for name, (_, default) in known.items():
        if complete and default is inspect.Parameter.empty and name not in values:
            found.append(_line(tree, path, f"`{_dotted(path)}` lacks `{name}`, which {cls.__name__} needs"))
    return found


def _value(tree: Settings, path: KeyPath, value: Any, kind: Any) -> list[Mistake]:
    if isinstance(value, str) and "${" in value:  # an interpolation that only the parser can resolve
        return []
    if isinstance(value, dict) and "class_path" in value:
        return _subclass(tree, path, value, kind)
    if isinstance(value, dict) and (fields := data_class(kind)):
        return _arguments(tree, path, value, fields)
    kinds, typed = list(alternatives(kind)), tree.origin(path).startswith("--")
    if isinstance(value, str) and str not in kinds and not ("." not in value and _fits(value, kind, typed)):
        if class_types(kind):  # then it can only be the name of one
            return _subclass(tree, path, value, kind)
        if any(is_function_type(t) for t in kinds):
            return [_line(tree, path, f"`{_dotted(path)}` takes a function, and settings cannot name one")]
    if isinstance(value, list | dict) and class_types(kind):
        items = enumerate(value) if isinstance(value, list) else value.items()
        inside = [line for key, v in items if isinstance(v, str | dict) for line in _value(tree, (*path, key), v, kind)]
        if inside:
            return inside
    if kind is Any or _fits(value, kind, typed):
        return []
    return [_line(tree, path, f"`{_dotted(path)}` must be {_spell(kind)}, not {value!r}")]


def _ranges(tree: Settings) -> list[Mistake]:
    """Numbers that Lightning divides by without a look, and seeds that there are not."""
    trainer, seed = tree.data.get("trainer"), tree.data.get("seed_everything")
    values = {key: trainer.get(key) for key in NOT_ZERO} if isinstance(trainer, dict) else {}
    found = [
        _line(tree, ("trainer", key), f"`trainer.{key}` must be at least 1, not {value}")
        for key, value in values.items()
        if type(value) is int and value < 1
    ]
    if type(seed) is int and not 0 <= seed < 2**32:
        found.append(_line(tree, ("seed_everything",), f"`seed_everything` must be from 0 to {2**32 - 1}, not {seed}"))
    return found


def _strategy(tree: Settings) -> list[Mistake]:
    """Strategies that there are not, that use less than they are given, or that unpickle checkpoints.

    Some of Lightning's do, whatever `weights_only` says.
    """
    trainer, known = tree.data.get("trainer"), ["auto", *StrategyRegistry.available_strategies()]
    value = trainer.get("strategy") if isinstance(trainer, dict) else None
    name = value.get("class_path") if isinstance(value, dict) else value
    if not isinstance(name, str):
        return []
    if "${" in name:  # what it will be is not known here
        return [_line(tree, ("trainer", "strategy"), "`trainer.strategy` must be named in its place, not by ${...}")]
    if isinstance(value, str) and name.lower() not in known:
        close = f"; a class is named by --trainer.strategy.class_path {name}" if "." in name else nearest(name, known)
        return [_line(tree, ("trainer", "strategy"), f"`trainer.strategy`: there is no strategy `{name}`{close}")]
    registered = isinstance(value, str) and name.lower() in StrategyRegistry
    cls = StrategyRegistry[name.lower()]["strategy"] if registered else resolve(name, Strategy)
    devices = trainer.get("devices")
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    if cls is SingleDeviceStrategy and count > 1:
        problem = f"{name} trains on one device, but trainer.devices is {devices}; use ddp"
        return [_line(tree, ("trainer", "strategy"), f"`trainer.strategy`: {problem}")]
    if not isinstance(cls, type) or cls.load_checkpoint not in [s.load_checkpoint for s in UNPICKLING]:
        return []
    problem = "reads checkpoints in a way that can run code from them; use ddp, or lit_gen.scale.zero.ZeRO for sharding"
    return [_line(tree, ("trainer", "strategy"), f"`trainer.strategy`: {name} {problem}")]


def _fits(value: Any, kind: Any, typed: bool) -> bool:
    if value is None and dataclasses.is_dataclass(kind):
        return False
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--x", type=kind)
    except ValueError:  # a type the parser does not know
        return True
    try:
        if typed and not isinstance(value, dict | list):  # words of the command line have no type of their own yet
            parser.parse_args([f"--x={'null' if value is None else value}"])
        else:
            parser.parse_object({"x": copy.deepcopy(value)})
    except (ArgumentError, TypeError, ValueError):
        return False
    return True


def _spell(kind: Any) -> str:
    """A type in plain words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_spell(p) for p in parts))
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(p) for p in parts)
    if origin is not None:
        inner = ", ".join(_spell(p) for p in parts if p is not Ellipsis)
        return f"{getattr(origin, '__name__', origin)} of {inner}" if inner else str(origin)
    return PLAIN_WORDS.get(kind) or getattr(kind, "__name__", str(kind))


def _misplaced(key: str, node: dict[str, Any]) -> str:
    cls = resolve(str(node.get("class_path", "")), None)
    signature = parameters(cls) if isinstance(cls, type) else None
    return "; it belongs under `init_args`" if signature and key in signature[0] else ""


def _line(tree: Settings, path: KeyPath, problem: str) -> Mistake:
    where = tree.origin(path)
    return Mistake(path, f"{where}: {problem}" if where else problem)


def _dotted(path: Iterable[str | int]) -> str:
    return ".".join(str(p) for p in path)


def with_overrides(run: Run) -> Settings:
    """The settings with those of the command line laid over them, where they name a plain path of keys."""
    tree = run.settings
    for key, text in run.overrides:
        parts: list[str] = []
        node: Any = tree.data
        for part in key.split("."):
            if isinstance(node, dict) and "class_path" in node and part not in CLASS_KEYS:
                parts.append("init_args")  # which the command line may leave out
                node = node.get("init_args", {})
            parts.append(part)
            node = node.get(part, {}) if isinstance(node, dict) else None
            if isinstance(node, list) or part.endswith("+"):
                parts = []
                break
        if not parts or (parts[0] == "trainer" and len(parts) > 2):  # into a list or its like: the parser's business
            continue
        value = True if text is None else parse_value(text)
        over: Any = {"class_path": value} if isinstance(node, dict) and "class_path" in node else value
        origins: dict[KeyPath, str] = {}
        for n in range(len(parts), 0, -1):
            if n == len(parts):
                origins[tuple(parts)] = f"--{key}"
            over = {parts[n - 1]: over}
        tree = merge(tree, Settings(over, origins))
    return tree
