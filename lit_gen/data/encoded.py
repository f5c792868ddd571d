"""Sets whose latents and text states were computed beforehand, by `python -m lit_gen cache`.

A cache is a set of its own beside the one it was made from: shard by shard and row by row the same samples, each a
`.safetensors` of what the method's `encode_for_cache` gave. Its name ends in eight hex digits of what it depends on:
the encoders' weights, the preprocessing, the samples and the precision it is stored in.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import lightning.pytorch as L
import torch
from torch import nn

from lit_gen.data.shards import INDEX, BadSample, ShardSet
from lit_gen.errors import ShardError, UserError
from lit_gen.methods.base import Method

if TYPE_CHECKING:
    from lit_gen.data.module import Shards

KIND = "encodings"
MEMBER = "safetensors"
VERSION = 1  # raise it when the same pictures and captions reach the encoders in another form


@dataclass
class EncodedSet(ShardSet):
    """A set joined with its cache: samples have a member `safetensors` more."""

    cache: ShardSet | None = None

    @classmethod
    def of(cls, shards: ShardSet, cache: ShardSet) -> EncodedSet:
        if [s.samples for s in shards.shards] != [s.samples for s in cache.shards]:
            raise ShardError(f"{cache.source} does not have the shards of {shards.source}; remove it and cache again")
        return cls(**{f.name: getattr(shards, f.name) for f in fields(ShardSet)}, cache=cache)

    def read(self, index: int, extensions: set[str], *args: Any, **kwargs: Any) -> tuple[str, dict[str, bytes]]:
        """As ShardSet.read; BadSample also where the encoders could not read the sample."""
        encoded_name, encoded = self.cache.read(index, {MEMBER, "txt"})
        if MEMBER not in encoded:
            raise BadSample(encoded.get("txt", b"it is not in the cache").decode())
        name, members = super().read(index, extensions, *args, **kwargs)
        if name.partition("/")[2] != encoded_name.partition("/")[2]:
            raise ShardError(
                f"{self.cache.source} has {encoded_name} in the place of {name}; remove it and cache again"
            )
        return name, members | {MEMBER: encoded[MEMBER]}


# -- what a cache depends on ------------------------------------------------------------------------------------------


def description(module: Shards, method: L.LightningModule, shards: ShardSet, dtype: str) -> dict[str, Any]:
    """All that a cache of a module's training set depends on, in words and hashes.

    Raises:
        UserError: the method has nothing to cache, or trains what would have to be frozen.
    """
    parts = method.cached_parts() if isinstance(method, Method) else {}
    if not parts:
        raise UserError(f"{type(method).__name__} computes nothing in a training step that could be cached")
    for name, part in parts.items():
        if isinstance(part, nn.Module) and any(p.requires_grad for p in part.parameters()):
            raise UserError(f"{type(method).__name__} trains its {name}, so what that computes cannot be cached")
    return {
        "method": f"{type(method).__module__}.{type(method).__qualname__}",
        "weights": {name: fingerprint(part) for name, part in parts.items()},
        "preprocessing": {"version": VERSION, **module.preprocessing()},
        "set": shards.fingerprint,
        "dtype": dtype,
    }


_known: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # a training's own precision may change the weights later


def fingerprint(part: Any) -> str:
    """sha256 of a model's weights, or of a tokenizer."""
    if part not in _known:
        digest = hashlib.sha256()
        if isinstance(part, nn.Module):
            digest.update(beside_weights(part).encode())
            for name, weight in sorted(part.state_dict().items()):
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
                digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            own = json.loads(part.backend_tokenizer.to_str())
            own = {key: value for key, value in own.items() if key not in ("padding", "truncation")}  # of the last call
            digest.update(json.dumps([own, part.model_max_length], sort_keys=True).encode())
        _known[part] = digest.hexdigest()
    return _known[part]


def beside_weights(module: nn.Module) -> str:
    """What else the features of a module, and of those in it, depend on: the attributes that `depends` names."""
    told = [str(getattr(m, name)) for m in module.modules() for name in getattr(m, "depends", ())]
    return " ".join(told)


def key_of(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two descriptions, for people."""
    found = []
    for key in new.keys() | old.keys():
        was, now = old.get(key), new.get(key)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            found += changes(was, now) if key != "weights" else [f"weights of {n}" for n in now if was.get(n) != now[n]]
        elif key == "set":
            found.append("samples of the set")
        else:
            found.append(f"{key}: {was} -> {now}")
    return sorted(found)


# -- where a cache is -------------------------------------------------------------------------------------------------


def folder_of(module: Shards, described: dict[str, Any]) -> Path:
    """Where the cache of a module's training set is, or will be."""
    return _beside(module, key_of(described)[:8])


def _beside(module: Shards, ending: str) -> Path:
    source = str(module.sources["train"])
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        from lit_gen.data.sets import SetFile

        path = SetFile.read(path).folder
    elif not path.is_dir():  # a pattern or a URL
        name = hashlib.sha256(source.encode()).hexdigest()[:12]
        path = (Path("data/shards") if "://" in source or source.startswith("pipe:") else path.parent) / f"set-{name}"
    folder = Path(module.cache_folder) if module.cache_folder else path.parent
    return folder / f"{path.name}.cache-{ending}"


def find(module: Shards, method: L.LightningModule, dtype: str) -> ShardSet:
    """The cache that belongs to a module's training set as the method would encode it.

    Raises:
        ShardError: there is none, or only one that was made from something else; says from what.
    """
    shards = ShardSet.open(module.sources["train"])
    wanted = description(module, method, shards, dtype)
    folder = folder_of(module, wanted)
    if (folder / INDEX).is_file():
        return ShardSet.open(folder)
    todo = "run python -m lit_gen cache with the same settings, or leave out `cached`"
    others = _described(_beside(module, "*"))
    if not others:
        raise ShardError(f"{shards.source}: what its samples are encoded to is not cached yet; {todo}")
    stale, old = min(others, key=lambda other: len(changes(other[1], wanted)))
    raise ShardError(f"{stale} is stale ({'; '.join(changes(old, wanted))}); {todo}")


def _described(pattern: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Caches with what they were made from, the newest first."""
    files = sorted(pattern.parent.glob(f"{pattern.name}/{INDEX}"), key=lambda file: -file.stat().st_mtime)
    return [(file.parent, json.loads(file.read_text())["description"]) for file in files]
