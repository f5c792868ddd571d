"""YAML files as plain data that remembers where each key was written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_gen.errors import UserError, nearest

KeyPath = tuple[str | int, ...]


TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = {TAG + kind for kind in ("null", "bool", "int", "float", "str", "map", "seq")}
AT_MOST = 100_000  # settings of one file


class _Loader(yaml.SafeLoader):
    """YAML as jsonargparse reads it: 1e-4 is a number, dates and 1:30 are not."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if not tag.endswith((":float", ":int", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+([eE][-+]?[0-9]+)?)|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


@dataclass
class Settings:
    """A tree of settings.

    Args:
        data: mappings, lists and scalars.
        origins: for each path of keys and list positions, "file:line" or "command line" of its latest definition.
    """

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str:
        """Where `path`, or the nearest of its ancestors, was written."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, "")


def at_home(value: Any) -> Any:
    """A path that begins with ~/ as the shell would give it, which never sees those in files or after a `=`."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def parse_value(text: str) -> Any:
    """A value as written on the command line."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError):
        return text


def read(path: Path) -> Settings:
    """Read one file.

    Raises:
        UserError: no such file, not YAML, or not a mapping.
    """
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*") if p.suffix in (".yaml", ".yml")])
        where = f"{path}: no such file" if path.parent.is_dir() else f"{path}: no such folder as {path.parent}"
        raise UserError(where + near)
    loader = None
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        loader.name = str(path)
        node = loader.get_single_node()
        settings = Settings()
        if node is None:
            return settings
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}:{node.start_mark.line + 1}: expected settings as `key: value` lines")
        settings.data = _build(loader, node, str(path), (), settings.origins)
        return settings
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path}{line}: not valid YAML: {problem}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: not a text in UTF-8 ({error.reason})") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply, or within itself") from None
    finally:
        if loader is not None:
            loader.dispose()


def _flatten(node: yaml.MappingNode) -> None:
    """Resolve `<<` in place; a mapping's own keys win over merged ones, and only the former can be written twice.

    Not PyYAML's: which mapping of a list wins there depends on its version. The specification has the first one win.
    """
    own, merged = [], {}
    for key, value in node.value:
        if key.tag != f"{TAG}merge":
            own.append((key, value))
            continue
        for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if not isinstance(source, yaml.MappingNode):
                problem = "`<<` merges a mapping, or a list of mappings"
                raise yaml.constructor.ConstructorError(None, None, problem, source.start_mark)
            _flatten(source)
            for name, setting in source.value:
                merged.setdefault(str(name.value), (name, setting))
    names = {str(key.value) for key, _ in own}
    node.value = [pair for name, pair in merged.items() if name not in names] + own


def _build(loader: _Loader, node: yaml.Node, file: str, path: KeyPath, origins: dict[KeyPath, str]) -> Any:
    where = f"{file}:{node.start_mark.line + 1}"
    if node.tag not in PLAIN_TAGS:
        raise UserError(
            f"{where}: {node.tag.replace(TAG, '!!')} is no kind of value that settings have; write it plainly"
        )
    if len(origins) > AT_MOST:
        raise UserError(f"{where}: more than {AT_MOST:,} settings; aliases (*name) may have multiplied them")
    if isinstance(node, yaml.MappingNode):
        _flatten(node)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node))
            where = f"{file}:{key_node.start_mark.line + 1}"
            if key in result:
                raise UserError(f"{where}: key `{key}` is written twice (first at {origins[(*path, key)]})")
            origins[(*path, key)] = where
            result[key] = _build(loader, value_node, file, (*path, key), origins)
        return result
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            origins[(*path, i)] = f"{file}:{item.start_mark.line + 1}"
        return [_build(loader, item, file, (*path, i), origins) for i, item in enumerate(node.value)]
    try:
        return at_home(loader.construct_object(node, deep=True))
    except (ValueError, KeyError):  # `!!int word`, or a number of thousands of digits
        raise UserError(f"{where}: `{node.value[:40]}` is no {node.tag.removeprefix(TAG)}") from None


def merge(under: Settings, over: Settings) -> Settings:
    """`over` laid on `under`: mappings are merged, everything else is replaced, `name+:` appends to a list.

    A different `class_path` drops the `init_args` written for the other class.
    """
    result = Settings(dict(under.data), dict(under.origins))
    result.data = _merge(under.data, over.data, (), result.origins, over.origins)
    return result


def _merge(under: Any, over: Any, path: KeyPath, origins: dict[KeyPath, str], new: dict[KeyPath, str]) -> Any:
    if not (isinstance(under, dict) and isinstance(over, dict)):
        _move(origins, new, path, path)
        return over
    result = dict(under)
    if "class_path" in over and over["class_path"] != under.get("class_path", over["class_path"]):
        result.pop("init_args", None)
    for key, value in over.items():
        if key.endswith("+") and isinstance(value, list):
            name = key[:-1]
            old = list(result.get(name) or [])
            result[name] = old + value
            origins.setdefault((*path, name), new.get((*path, key), ""))
            for i in range(len(value)):
                _move(origins, new, (*path, key, i), (*path, name, len(old) + i))
            continue
        result[key] = _merge(result.get(key), value, (*path, key), origins, new)
        if (*path, key) in new:
            origins[(*path, key)] = new[(*path, key)]
    return result


def _move(origins: dict[KeyPath, str], new: dict[KeyPath, str], source: KeyPath, target: KeyPath) -> None:
    """Replace what `origins` says of `target` and below by what `new` says of `source`."""
    n = len(target)
    for old in [p for p in origins if p[:n] == target]:
        del origins[old]
    n = len(source)
    origins.update({target + p[n:]: where for p, where in new.items() if p[:n] == source})


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every scalar of a tree with its path."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def subtree(settings: Settings, path: KeyPath) -> Settings:
    """The settings below `path`, as a tree of their own."""
    data: Any = settings.data
    for key in path:
        data = data[key]
    n = len(path)
    return Settings(data, {p[n:]: where for p, where in settings.origins.items() if p[:n] == path and len(p) > n})
