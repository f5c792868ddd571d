"""Sets of tar shards: finding them, and reading any sample of them at random.

A set is a folder of WebDataset tars with an `index.json` (format in data/README.md). Tars without an index (a brace
pattern or a glob) are read too; they are then counted by reading their headers once.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from braceexpand import braceexpand
from webdataset import TarWriter
from webdataset.tariterators import base_plus_ext

from lit_gen.errors import ShardError

logger = logging.getLogger(__name__)

INDEX = "index.json"
FORMAT = 1


class BadSample(ValueError):
    """One sample cannot be read; the loader replaces, counts and names it."""


@dataclass(frozen=True)
class Shard:
    """One tar of a set. `bytes` and `sha256` are unknown (-1, "") where the set has no index."""

    file: Path
    samples: int
    bytes: int = -1
    sha256: str = ""


@dataclass(frozen=True)
class Table:
    """Where the members of one tar lie, so that any of its n samples can be read without the ones before."""

    keys: list[str]  # n
    members: dict[str, np.ndarray]  # extension -> n x 2 int64 (offset, bytes); offset -1 where a sample lacks it
    complete: bool  # False: the tar ends in the middle

    @staticmethod
    def scan(file: Path) -> Table:
        """Read the headers of a tar; members of one sample share everything before the first dot of their name."""
        keys: list[str] = []
        rows: dict[str, int] = {}
        places: dict[str, dict[int, tuple[int, int]]] = {}
        complete = True
        size = file.stat().st_size
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    key, extension = base_plus_ext(member.name)
                    if key is None or not member.isreg():
                        continue
                    if member.offset_data + member.size > size:
                        complete = False
                        break
                    column = places.setdefault(extension.lower(), {})
                    if key not in rows or rows[key] in column:  # a repeated name is another sample: never mix the two
                        rows[key] = len(keys)
                        keys.append(key)
                    column[rows[key]] = (member.offset_data, member.size)
        except tarfile.TarError:
            complete = False
        members = {extension: np.full((len(keys), 2), -1, np.int64) for extension in places}
        for extension, column in places.items():
            members[extension][list(column)] = list(column.values())
        return Table(keys, members, complete)


@dataclass
class ShardSet:
    """An ordered list of shards, seen as one sequence of samples 0 … len(set) - 1."""

    source: str  # what the user named
    shards: list[Shard]
    fingerprint: str  # changes when any sample changes
    kind: str = ""  # "images" | "videos" | "style", "" where there is no index
    description: dict = field(default_factory=dict)  # the set file it was built from
    _tables: dict[int, Table] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._ends = np.cumsum([shard.samples for shard in self.shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @classmethod
    def open(cls, source: str | Path) -> ShardSet:
        """Open a set file (`data/x.yaml`, already built), a folder with an index, one tar, a brace pattern or a glob.

        Raises ShardError naming what is missing or empty.
        """
        path = Path(source)
        if path.suffix in (".yaml", ".yml"):
            from lit_gen.data.sets import SetFile

            return cls._from_index(SetFile.read(path).folder, source)
        if path.is_dir():
            return cls._from_index(path, source)
        return cls._from_files(str(source))

    @classmethod
    def _from_index(cls, folder: Path, source: str | Path) -> ShardSet:
        try:
            index = json.loads((folder / INDEX).read_text())
        except FileNotFoundError:
            if Path(source) != folder:
                raise ShardError(f"{source} is not built; run python -m lit_gen data -c {source}") from None
            raise ShardError(f"{folder} has no {INDEX}; name its tars themselves with '{folder}/*.tar'") from None
        except json.JSONDecodeError as error:
            raise ShardError(f"{folder / INDEX} is not valid JSON ({error}); build or pack the set again") from None
        if index.get("format") != FORMAT:
            raise ShardError(f"{folder / INDEX} has format {index.get('format')}, this version reads format {FORMAT}")
        shards = [Shard(folder / s["file"], s["samples"], s["bytes"], s["sha256"]) for s in index["shards"]]
        return cls(str(source), _present(shards, source), index["fingerprint"], index["kind"], index["description"])

    @classmethod
    def _from_files(cls, source: str) -> ShardSet:
        if "://" in source or source.startswith("pipe:"):
            raise ShardError(f"{source}: shards must be local files; copy them to this machine first")
        files = [Path(f) for pattern in braceexpand(source) for f in sorted(glob.glob(pattern)) or [pattern]]
        if any(glob.has_magic(str(f)) and not f.exists() for f in files):
            raise ShardError(f"{source}: no shard matches")
        missing = [f for f in files if not f.is_file()]
        if missing:
            raise ShardError(_not_found(missing[0]))
        tables = [Table.scan(f) for f in files]
        for file in (f for f, t in zip(files, tables, strict=True) if not t.complete):
            logger.warning("data: %s is truncated; only its whole samples are used", file)
        shards = [Shard(f, len(t.keys), f.stat().st_size) for f, t in zip(files, tables, strict=True)]
        shape = [(s.file.name, s.samples, s.bytes) for s in shards]
        fingerprint = hashlib.sha256(json.dumps(shape).encode()).hexdigest()
        return cls(source, _present(shards, source), fingerprint, _tables=dict(enumerate(tables)))

    def read(self, index: int, extensions: set[str]) -> tuple[str, dict[str, bytes]]:
        """Name and wanted members of sample `index`, e.g. ("000000.tar/000017", {"png": …, "txt": …}).

        Raises BadSample when the shard ends before it or cannot be read.
        """
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self.shards[number]
        row = index - int(self._ends[number] - shard.samples)
        table = self._tables.get(number)
        if table is None:
            if not shard.file.is_file():
                raise ShardError(f"shard {shard.file} has disappeared")
            table = self._tables[number] = Table.scan(shard.file)
        if row >= len(table.keys):
            raise BadSample(f"{shard.file.name} holds {len(table.keys)} of {shard.samples} samples: it is truncated")
        wanted = [(e, *table.members[e][row].tolist()) for e in table.members if e in extensions]
        with shard.file.open("rb") as file:
            found = {e: _read_at(file, offset, size) for e, offset, size in wanted if offset >= 0}
        return f"{shard.file.name}/{table.keys[row]}", found

    def verify(self) -> list[str]:
        """One line per shard whose size or checksum is not the index's; empty when the set is intact."""
        problems = []
        for shard in self.shards:
            if not shard.file.is_file():
                problems.append(f"{shard.file} is missing")
            elif shard.sha256 and checksum(shard.file) != shard.sha256:
                problems.append(f"{shard.file} does not match its checksum")
        return problems


def write_tar(file: Path, samples: Iterable[dict[str, str | bytes]]) -> Shard:
    """Write samples ({"__key__": name, extension: bytes, …}) to a tar that appears, complete, by a rename."""
    partial = file.with_suffix(".partial")
    count = 0
    with partial.open("wb") as stream:
        tar = TarWriter(stream, encoder=False, mtime=0, user="", group="")  # no times: equal content, equal bytes
        for sample in samples:
            tar.write(sample)
            count += 1
        tar.close()
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)
    return Shard(file, count, file.stat().st_size, checksum(file))


def write_index(folder: Path, kind: str, shards: list[Shard], description: dict, source: str = "") -> str:
    """Write index.json beside the shards and return the set's fingerprint.

    `source` states what the set was made from (set file and code), so that a stale set can be told from a current one.
    """
    content = "\n".join(f"{s.file.name} {s.samples} {s.sha256}" for s in shards)
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    index = {
        "format": FORMAT,
        "kind": kind,
        "samples": sum(s.samples for s in shards),
        "fingerprint": fingerprint,
        "source": source,
        "description": description,
        "shards": [asdict(s) | {"file": s.file.name} for s in shards],
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return fingerprint


def checksum(file: Path) -> str:
    """sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_at(file, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _present(shards: list[Shard], source: str | Path) -> list[Shard]:
    missing = [s.file for s in shards if not s.file.is_file()]
    if missing:
        raise ShardError(f"{source}: shard {missing[0]} is missing ({len(missing)} of {len(shards)} are)")
    empty = [s.file for s in shards if s.samples == 0]
    if empty or not shards:
        raise ShardError(f"{source}: {f'shard {empty[0]} holds no samples' if empty else 'the set has no shards'}")
    return shards


def _not_found(path: Path) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
    return f"{path} does not exist" + (f"; did you mean {path.parent / near[0]}?" if near else "")
