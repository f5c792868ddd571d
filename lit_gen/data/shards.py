"""Sets of tar shards: finding them, and reading any sample of them at random.

A set is a folder of WebDataset tars with an `index.json` (format in data/README.md), on this machine or on a server.
Tars without an index (a brace pattern, a glob, a URL, `pipe:COMMAND`) are read too; their headers are then read once
at the start, to count, for which those that are elsewhere are all fetched.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

import numpy as np
from braceexpand import braceexpand
from tqdm import tqdm

from lit_gen.data.prefetch import Prefetcher
from lit_gen.data.remote import (
    STALL_SECONDS,
    cache_folder,
    cached,
    check_scheme,
    fetch,
    fetch_index,
    is_remote,
)
from lit_gen.data.tar import Table
from lit_gen.errors import ShardError

logger = logging.getLogger(__name__)

INDEX = "index.json"
FORMAT = 1
_HEADER = 512  # bytes of a tar that each file in it takes at least
_AT_ONCE = 4  # shards fetched at the same time to be counted


class BadSample(ValueError):
    """One sample cannot be read; the loader replaces, counts and names it."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(reason)
        self.name = name  # of the sample, "" where the one who reads knows it


@dataclass(frozen=True)
class Shard:
    """One tar of a set. `bytes` and `sha256` are unknown (-1, "") where the set has no index."""

    file: Path
    samples: int
    bytes: int = -1
    sha256: str = ""
    origin: str = ""  # URL or pipe:COMMAND that `file` is fetched from, "" for a file of this machine

    def __str__(self) -> str:
        return self.origin or str(self.file)


@dataclass
class ShardSet:
    """An ordered list of shards, seen as one sequence of samples 0 … len(set) - 1."""

    source: str  # what the user named
    shards: list[Shard]
    fingerprint: str  # changes when any sample changes
    kind: str = ""  # "images" | "videos" | "style", "" where there is no index
    description: dict = field(default_factory=dict)  # the set file it was built from
    _tables: dict[int, tuple[Table, _State]] = field(default_factory=dict, repr=False)
    _prefetcher: Prefetcher | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._ends = np.cumsum([shard.samples for shard in self.shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def remote(self) -> bool:
        """Whether its shards are fetched from elsewhere."""
        return bool(self.shards[0].origin)

    @classmethod
    def open(cls, source: str | Path) -> ShardSet:
        """Open a set file (`data/x.yaml`, already built), a folder with an index, tars by path, brace pattern or glob,
        or any of these but the glob on a server (http, https); `pipe:COMMAND` reads the tar that a command prints.

        Raises ShardError naming what is missing or empty.
        """
        if is_remote(str(source)):
            return cls._from_remote(str(source))
        path = Path(source)
        if path.suffix in (".yaml", ".yml"):
            from lit_gen.data.sets import SetFile

            return cls._from_folder(SetFile.read(path).folder, source)
        if path.is_dir():
            return cls._from_folder(path, source)
        return cls._from_files(str(source))

    @classmethod
    def _from_folder(cls, folder: Path, source: str | Path) -> ShardSet:
        try:
            index = json.loads((folder / INDEX).read_text())
        except FileNotFoundError:
            if Path(source) != folder:
                raise ShardError(f"{source} is not built; run python -m lit_gen data -c {source}") from None
            literal = re.sub(r"([{}\\])", r"\\\1", glob.escape(str(folder)))
            raise ShardError(f"{folder} has no {INDEX}; name its tars themselves with '{literal}/*.tar'") from None
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{folder / INDEX} is not valid JSON ({error}); build or pack the set again") from None
        shards = [replace(shard, file=folder / shard.file) for shard in _shards_of(index, folder / INDEX)]
        return cls._indexed(str(source), _present(shards, source), index)

    @classmethod
    def _from_remote(cls, source: str) -> ShardSet:
        origins = _expanded(source)
        for origin in origins:
            check_scheme(origin)
        if not source.startswith("pipe:") and not urlsplit(origins[0]).path.endswith(".tar"):
            if len(origins) > 1:
                raise ShardError(f"{source}: the files of a brace pattern must be tars")
            return cls._from_server(source)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            files = [cached(origin) for origin in origins]
            jobs = [pool.submit(fetch, *pair) for pair in zip(origins, files, strict=True)]
            for job in tqdm(jobs, desc=f"fetching {source}", unit=" shards", disable=None):
                try:
                    job.result()
                except ShardError:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return cls._counted(source, [Shard(f, 0, origin=o) for f, o in zip(files, origins, strict=True)])

    @classmethod
    def _from_server(cls, source: str) -> ShardSet:
        index = fetch_index(source)
        listed = _shards_of(index, source)
        content = "\n".join(f"{s.file} {s.bytes} {s.sha256}" for s in listed)
        if not all(s.sha256 for s in listed):  # nothing else tells it from another set of these names
            content = f"{source}\n{content}"
        where = cache_folder() / hashlib.sha256(content.encode()).hexdigest()[:16]
        parts = urlsplit(source)
        folder = parts.path.removesuffix(f"/{INDEX}").rstrip("/")
        origins = [urlunsplit(parts._replace(path=f"{folder}/{quote(s.file.name)}")) for s in listed]
        shards = [replace(s, file=where / s.file, origin=o) for s, o in zip(listed, origins, strict=True)]
        return cls._indexed(source, shards, index)

    @classmethod
    def _indexed(cls, source: str, shards: list[Shard], index: dict) -> ShardSet:
        return cls(source, _filled(shards, source), index["fingerprint"], index["kind"], index["description"])

    @classmethod
    def _from_files(cls, source: str) -> ShardSet:
        files = [Path(f) for pattern in _expanded(source) for f in sorted(glob.glob(pattern)) or [pattern]]
        if any(glob.has_magic(str(f)) and not f.exists() for f in files):
            raise ShardError(f"{source}: no shard matches")
        missing = [f for f in files if not f.is_file()]
        if missing:
            raise ShardError(_not_found(missing[0]))
        return cls._counted(source, [Shard(file, 0) for file in files])

    @classmethod
    def _counted(cls, source: str, shards: list[Shard]) -> ShardSet:
        """A set without an index, its samples counted by the headers of its tars."""
        found = []
        for shard in shards:
            try:
                table, state = _scanned(shard.file)
            except OSError as error:
                raise ShardError(f"{shard.file}: {error.strerror or error}") from None
            if table.problem:
                logger.warning("data: %s: %s; only its whole samples are used", shard, table.problem)
            found.append((replace(shard, samples=len(table.keys), bytes=state.size), table, state))
        _filled([shard for shard, _, _ in found], source)
        found = [(shard, table, state) for shard, table, state in found if shard.samples]
        shards = [shard for shard, _, _ in found]
        shape = [(s.file.name, s.samples, s.bytes) for s in shards]
        fingerprint = hashlib.sha256(json.dumps(shape).encode()).hexdigest()
        tables = {i: (table, state) for i, (_, table, state) in enumerate(found)}
        return cls(source, shards, fingerprint, _tables=tables)

    def place(self, index: int) -> tuple[int, int]:
        """(number of the shard, row in it) of sample `index`."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number] - self.shards[number].samples)

    def read(
        self,
        index: int,
        extensions: set[str],
        progress: Callable[[], None] = lambda: None,
        stall_seconds: float = STALL_SECONDS,
    ) -> tuple[str, dict[str, bytes]]:
        """Name and wanted members of sample `index`, e.g. ("000000.tar/000017", {"png": …, "txt": …}).

        Its shard is fetched where it is not here; `progress` and `stall_seconds` as in `remote.fetch`. Raises BadSample
        when the shard ends before the sample or cannot be read, ShardError when there is no shard.
        """
        number, row = self.place(index)
        shard = self.shards[number]
        if number not in self._tables:
            self.fetch(number, progress, stall_seconds)
            try:
                self._tables[number] = _scanned(shard.file, progress)
            except OSError as error:
                raise BadSample(f"{shard.file.name}: {error.strerror or error}") from None
        table, state = self._tables[number]
        if row >= len(table.keys):
            reason = table.problem or "it is not the one that was indexed"
            raise BadSample(f"{shard.file.name} holds {len(table.keys)} of {shard.samples} samples: {reason}")
        name = f"{shard.file.name}/{table.keys[row]}"
        if lost := table.lost(row, extensions):
            raise BadSample(f"it has lost its {', '.join(lost)}: {table.problem}", name)
        wanted = [(e, *table.members[e][row].tolist()) for e in table.members if e in extensions]
        try:
            with shard.file.open("rb") as file:
                if _State.of(file.fileno()) != state:
                    self._tables[number] = _scanned(shard.file, progress)
                    if self._tables[number][0] != table:
                        raise ShardError(f"shard {shard.file} was replaced by another during the run; start again")
                found = {e: _read_at(file, offset, size) for e, offset, size in wanted if offset >= 0}
        except FileNotFoundError:
            if not shard.origin:
                raise ShardError(f"shard {shard.file} has disappeared") from None
            del self._tables[number]
            return self.read(index, extensions, progress, stall_seconds)
        except OSError as error:
            raise BadSample(error.strerror or str(error), name) from None
        return name, found

    def fetch(
        self, number: int, progress: Callable[[], None] = lambda: None, stall_seconds: float = STALL_SECONDS
    ) -> None:
        """Have a shard on this machine."""
        shard = self.shards[number]
        if shard.origin:
            fetch(shard.origin, shard.file, shard.bytes, shard.sha256, stall_seconds, progress)
        elif not shard.file.is_file():
            raise ShardError(f"shard {shard.file} has disappeared")

    def prefetch(self, numbers: list[int]) -> None:
        """Fetch shards in the background, in this order; earlier wishes are forgotten."""
        self._prefetcher = self._prefetcher or Prefetcher(self.fetch)
        self._prefetcher.want(numbers)

    def verify(self) -> list[str]:
        """One line per shard that is damaged, or whose checksum is not the index's; empty when the set is intact."""
        problems = []
        for number, shard in enumerate(self.shards):
            try:
                self.fetch(number)
            except ShardError as error:
                problems.append(str(error) if shard.origin else f"{shard.file} is missing")
                continue
            if not shard.sha256:
                if problem := _scanned(shard.file)[0].problem:
                    problems.append(f"{shard}: {problem}")
            elif checksum(shard.file) != shard.sha256:
                problems.append(f"{shard.file} does not match its checksum")
            elif (count := len(_scanned(shard.file)[0].keys)) != shard.samples:
                problems.append(f"{shard.file} holds {count} samples, and the index says {shard.samples}")
        return problems


def checksum(file: Path) -> str:
    """sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise BadSample(f"it ends after {len(data)} of {size} bytes")
    return data


class _State(NamedTuple):
    """What changes when a file is written to or replaced."""

    size: int
    modified: float
    number: int

    @staticmethod
    def of(file: Path | int) -> _State:
        found = os.stat(file)
        return _State(found.st_size, found.st_mtime_ns, found.st_ino)


def _expanded(source: str) -> list[str]:
    try:
        return list(braceexpand(source))
    except ValueError as error:
        raise ShardError(f"{source} is not a brace pattern: {error}") from None


def _scanned(file: Path, progress: Callable[[], None] = lambda: None) -> tuple[Table, _State]:
    state = _State.of(file)  # before: a change during the scan will then be noticed
    return Table.scan(file, progress), state


def _shards_of(index: Any, where: str | Path) -> list[Shard]:
    """The shards that an index names, relative to its folder; ShardError where it is not an index."""
    try:
        if index["format"] != FORMAT:
            raise ShardError(f"{where} has format {index['format']}, this version reads format {FORMAT}")
        for key, wanted in (("fingerprint", str), ("kind", str), ("description", dict)):
            if not isinstance(index[key], wanted):
                raise TypeError
        shards = [Shard(Path(s["file"]), int(s["samples"]), int(s["bytes"]), str(s["sha256"])) for s in index["shards"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ShardError(f"{where} lacks what an index holds ({error!r}); see data/README.md") from None
    for shard in shards:  # an index from elsewhere must not lead out of its folder
        if shard.file.name != str(shard.file) or shard.file.name in ("..", INDEX):
            raise ShardError(f"{where} names {shard.file}; a shard is a file beside its index")
        if not 0 <= shard.samples * _HEADER <= max(shard.bytes, 0):
            raise ShardError(f"{where}: {shard.file} cannot have {shard.samples} samples in {shard.bytes} bytes")
    return shards


def _present(shards: list[Shard], source: str | Path) -> list[Shard]:
    missing = [s.file for s in shards if not s.file.is_file()]
    if missing:
        raise ShardError(f"{source}: shard {missing[0]} is missing ({len(missing)} of {len(shards)} are)")
    for shard in shards:
        if 0 <= shard.bytes != (size := shard.file.stat().st_size):
            told = f"{shard} has {size} bytes, not the {shard.bytes} of its index"
            if size > shard.bytes or not Table.scan(shard.file).cut:  # captions may stand beside other pictures
                raise ShardError(f"{told}; copy it again, or build or pack the set again")
            logger.warning("data: %s: it is truncated; only its whole samples are used", told)
    return shards


def _filled(shards: list[Shard], source: str) -> list[Shard]:
    """Those with samples; ShardError when no shard has any."""
    empty = [s for s in shards if s.samples <= 0]
    if len(empty) == len(shards):
        raise ShardError(f"{source}: {_no_samples(empty[0]) if empty else 'the set has no shards'}")
    for shard in empty:
        logger.warning("data: %s: %s, it is left out", source, _no_samples(shard))
    return [s for s in shards if s.samples > 0]


def _no_samples(shard: Shard) -> str:
    text = f"shard {shard} holds no samples"
    with contextlib.suppress(OSError), shard.file.open("rb") as file:
        start = file.read(40)
        if start.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
            return f"{text}: it is compressed, which does not allow reading at random places; unpack it"
        if start and b"\0" not in start:
            return f"{text}: it is no tar but begins with {start!r}"
    return text


def _not_found(path: Path) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
    return f"{path} does not exist" + (f"; did you mean {path.parent / near[0]}?" if near else "")
