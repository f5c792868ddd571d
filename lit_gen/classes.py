"""Class paths in settings: the classes they may name, and what their constructors take.

Settings may come from strangers. A path resolves only to a subclass of what its key expects, and code is only taken
from modules and packages, never from folders of data, runs or weights that happen to lie in the working directory.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import importlib
import importlib.util
import inspect
import os
import pkgutil
import types
import typing
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings

from lit_gen.errors import nearest

# Types of values that no class path stands for.
_VALUES = (int, float, str, bool, bytes, complex, list, dict, tuple, set, type, type(None), object, timedelta)


def resolve(name: str, base: Any) -> type | str:
    """The class called `name`, or what is wrong with the name.

    Args:
        name: a dotted path, or the bare name of a class that is already imported.
        base: type of the setting; None takes any class.
    """
    bases = class_types(base)
    if not all(part.isidentifier() for part in name.split(".")):
        return f"`{name}` is no name of a class; give it as package.module.Class"
    if "." not in name:
        known = {c.__name__: c for b in bases for c in _descendants(b)}
        hint = nearest(name, known) or "; give it as package.module.Class"
        return known.get(name) or f"there is no class `{name}`{hint}"
    parts = name.split(".")
    if is_plain_folder(parts[0]):
        return (
            f"`{parts[0]}` is a folder, not a package, and no code is taken from it; "
            "if it holds code of yours, put an empty __init__.py there"
        )
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


def keep_to_packages() -> None:
    """Have the parser too take no code from plain folders of the working directory, such as data/ and runs/."""
    folders = [p.name for p in Path.cwd().iterdir() if p.name.isidentifier() and p.is_dir()]
    set_parsing_settings(import_path_denylist=[name for name in folders if is_plain_folder(name)])


def is_plain_folder(name: str) -> bool:
    """Whether importing `name` would find a folder that nobody declared to be a package."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    # Installed packages in several parts (google, nvidia) are declared by those who installed them.
    return (
        spec is not None
        and spec.origin is None
        and not any("site-packages" in place for place in spec.submodule_search_locations or ())
    )


def parameters(cls: type) -> tuple[dict[str, tuple[Any, Any]], bool] | None:
    """Name -> (type, default) of a constructor's arguments, and whether it takes others too; None if unknown."""
    try:
        signature = inspect.signature(cls.__init__)
        hints = typing.get_type_hints(cls.__init__)
    except (TypeError, ValueError, NameError):
        return None
    arguments = list(signature.parameters.values())[1:]
    named = [p for p in arguments if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: (hints.get(p.name, Any), p.default) for p in named}, len(named) < len(arguments)


def class_types(kind: Any) -> tuple[type, ...]:
    """The classes that a setting of type `kind` is an instance of, or that a function of this type makes."""
    found: list[type] = []
    for option in alternatives(kind):
        if is_function_type(option):
            found += class_types((typing.get_args(option) or (None,))[-1])
        elif isinstance(option, type) and not issubclass(option, enum.Enum | os.PathLike) and option not in _VALUES:
            found.append(option)
    return tuple(dict.fromkeys(found))


def data_class(kind: Any) -> type | None:
    """The dataclass among the alternatives of a type, whose fields are given in place."""
    return next((t for t in alternatives(kind) if dataclasses.is_dataclass(t)), None)


def is_function_type(kind: Any) -> bool:
    return collections.abc.Callable in (kind, typing.get_origin(kind)) or kind is typing.Callable


def alternatives(kind: Any) -> Iterator[Any]:
    """The plain types inside a Union, an Optional or a container."""
    origin = typing.get_origin(kind)
    containers = (list, dict, tuple, set, typing.Annotated)
    if origin in (typing.Union, types.UnionType, *containers) or (
        isinstance(origin, type) and origin is not type and issubclass(origin, collections.abc.Iterable)
    ):
        for part in typing.get_args(kind):
            yield from alternatives(part)
    elif kind not in (None, type(None), Any, Ellipsis):
        yield kind


def _attribute(module: Any, parts: list[str], name: str, bases: tuple[type, ...]) -> type | str:
    for part in parts:
        if not hasattr(module, part):
            classes = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, bases or object)]
            return f"`{module.__name__}` has no class `{part}`{nearest(part, classes)}"
        module = getattr(module, part)
    if isinstance(module, type) and bases and not issubclass(module, bases):
        return f"`{name}` is not a {' or '.join(dict.fromkeys(b.__name__ for b in bases))}"
    return module if isinstance(module, type) else f"`{name}` is not a class"


def _descendants(cls: type) -> Iterator[type]:
    yield cls
    for child in cls.__subclasses__():
        yield from _descendants(child)
