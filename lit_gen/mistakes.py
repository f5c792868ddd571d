"""Finds what is wrong with a run's settings, all of it at once, each in one line with its file and line.

The parser of `stage.py` has the last word; but it stops at its first objection, knows no lines, and lets a few slips
through. So settings are first held against the signatures of the classes they name.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as L
from jsonargparse import ArgumentError, ArgumentParser

from lit_gen.callbacks.checkpoint import Checkpoint
from lit_gen.errors import nearest
from lit_gen.experiment import Run
from lit_gen.settings import KeyPath, Settings, merge, parse_value

ROOTS = {"trainer": L.Trainer, "model": L.LightningModule, "data": L.LightningDataModule, "checkpoint": Checkpoint}
PLAIN_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


def find(run: Run, top_level: Iterable[str]) -> list[str]:
    """Every mistake in the settings of `run`; `top_level` names the keys that the parser knows."""
    tree = with_overrides(run)
    top_level = sorted(set(top_level))
    found = [
        _line(tree, (key,), f"there is no setting `{key}`{nearest(key, top_level)}")
        for key in tree.data
        if key not in top_level
    ]
    for name, value in tree.data.items():
        if name not in ROOTS or (value is None and name in ("data", "checkpoint")):
            continue
        if name in ("model", "data"):
            found += _subclass(tree, (name,), value, ROOTS[name])
        elif not isinstance(value, dict):
            found.append(_line(tree, (name,), f"`{name}` must be a mapping of settings, not {value!r}"))
        else:
            found += _arguments(tree, (name,), value, ROOTS[name])
    if "model" not in tree.data:
        found.append(f"{run.name}: the settings name no `model:`")
    return list(dict.fromkeys(found))


def shorten(message: str) -> str:
    """The parser's own words in one line, without the layers that say nothing."""
    noise = r"Does not validate|Subtypes:|Errors:|Given value|- Expected a <class 'NoneType'>|Subclass|- a (class|dict)"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip() and not re.match(noise, line.strip())]
    return " ".join(lines).replace('Parser key "config": ', "").replace('Parser key "', "`").replace('":', "`:")


def parameters(cls: type) -> dict[str, tuple[Any, Any]] | None:
    """Name -> (type, default) of a constructor's arguments; None where they cannot be known."""
    try:
        signature = inspect.signature(cls.__init__)
        hints = typing.get_type_hints(cls.__init__)
    except (TypeError, ValueError, NameError):
        return None
    named = list(signature.parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in named):
        return None
    return {p.name: (hints.get(p.name, Any), p.default) for p in named}


# -- the walk ---------------------------------------------------------------------------------------------------------


def _subclass(tree: Settings, path: KeyPath, value: Any, base: Any) -> list[str]:
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
    cls = resolve(str(value["class_path"]), base)
    if isinstance(cls, str):
        return [*found, _line(tree, (*path, "class_path"), f"`{key}.class_path`: {cls}")]
    arguments = value.get("init_args")
    if arguments is not None and not isinstance(arguments, dict):
        return [*found, _line(tree, (*path, "init_args"), f"`{key}.init_args` must be a mapping, not {arguments!r}")]
    is_factory = any(typing.get_origin(t) is Callable for t in _alternatives(base))  # called later, with the rest
    return found + _arguments(tree, (*path, "init_args"), arguments or {}, cls, complete=not is_factory)


def _arguments(tree: Settings, path: KeyPath, values: dict[str, Any], cls: type, complete: bool = True) -> list[str]:
    """Settings of one class or dataclass."""
    known = parameters(cls)
    if known is None:
        return []
    found = []
    for name, value in values.items():
        here = (*path, name)
        if name.rstrip("+") not in known:
            problem = f"`{_dotted(here)}`: {cls.__name__} has no setting `{name}`{nearest(name, known)}"
            found.append(_line(tree, here, problem))
        else:
            found += _value(tree, here, value, known[name.rstrip("+")][0])
    for name, (_, default) in known.items():
        if complete and default is inspect.Parameter.empty and name not in values:
            found.append(_line(tree, path, f"`{_dotted(path)}` lacks `{name}`, which {cls.__name__} needs"))
    return found


def _value(tree: Settings, path: KeyPath, value: Any, kind: Any) -> list[str]:
    data_classes = [t for t in _alternatives(kind) if dataclasses.is_dataclass(t)]
    if isinstance(value, dict) and "class_path" in value:
        return _subclass(tree, path, value, kind)
    if data_classes and isinstance(value, dict):
        return _arguments(tree, path, value, data_classes[0])
    if isinstance(value, list) and any(isinstance(v, dict) and "class_path" in v for v in value):
        return [line for i, v in enumerate(value) for line in _value(tree, (*path, i), v, kind)]
    if isinstance(value, str) and "${" in value:  # an interpolation; its type shows when it is resolved
        return []
    if kind is Any or _fits(value, kind, typed=tree.origin(path).startswith("--")):
        return []
    return [_line(tree, path, f"`{_dotted(path)}` must be {_spell(kind)}, not {value!r}")]


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
            parser.parse_object({"x": value})
    except (ArgumentError, TypeError, ValueError):
        return False
    return True


# -- names ------------------------------------------------------------------------------------------------------------


def resolve(name: str, base: Any) -> type | str:
    """The class called `name`, or what is wrong with the name."""
    bases = tuple(t for t in _alternatives(base) if isinstance(t, type))
    if "." not in name:
        known = {c.__name__: c for b in bases for c in _descendants(b)}
        hint = nearest(name, known) or "; give it as package.module.Class"
        return known.get(name) or f"there is no class `{name}`{hint}"
    parts = name.split(".")
    for n in range(1, len(parts)):
        prefix = ".".join(parts[:n])
        try:
            found: Any = importlib.import_module(prefix)
        except ModuleNotFoundError as error:
            if error.name != prefix:
                return f"`{prefix}` cannot be imported: {error}"
            if n == 1:
                return f"there is no package `{prefix}`{nearest(prefix, (m.name for m in pkgutil.iter_modules()))}"
            parent = importlib.import_module(".".join(parts[: n - 1]))
            if hasattr(parent, parts[n - 1]):  # a class within a class
                return _attribute(parent, parts[n - 1 :], name, bases)
            names = [m.name for m in pkgutil.iter_modules(getattr(parent, "__path__", []))]
            return f"`{parent.__name__}` has no module `{parts[n - 1]}`{nearest(parts[n - 1], names)}"
        except Exception as error:  # whatever the module's own code raises
            return f"`{prefix}` cannot be imported: {type(error).__name__}: {error}"
    return _attribute(found, parts[-1:], name, bases)


def _attribute(module: Any, parts: list[str], name: str, bases: tuple[type, ...]) -> type | str:
    for part in parts:
        if not hasattr(module, part):
            classes = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, bases or object)]
            return f"`{module.__name__}` has no class `{part}`{nearest(part, classes)}"
        module = getattr(module, part)
    if isinstance(module, type) and bases and not issubclass(module, bases):
        return f"`{name}` is not a {' or '.join(b.__name__ for b in bases)}"
    return module if isinstance(module, type) else f"`{name}` is not a class"


def _alternatives(kind: Any) -> Iterator[Any]:
    """The plain types inside a Union, an Optional or a list."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType, list, dict, tuple, typing.Annotated):
        for part in typing.get_args(kind):
            yield from _alternatives(part)
    elif kind not in (None, type(None), Any):
        yield kind


def _descendants(cls: type) -> Iterator[type]:
    yield cls
    for child in cls.__subclasses__():
        yield from _descendants(child)


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
    known = parameters(cls) if isinstance(cls, type) else None
    return "; it belongs under `init_args`" if known and key in known else ""


def _line(tree: Settings, path: KeyPath, problem: str) -> str:
    where = tree.origin(path)
    return f"{where}: {problem}" if where else problem


def _dotted(path: KeyPath) -> str:
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
