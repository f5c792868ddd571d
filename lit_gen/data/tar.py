"""Where the samples of a tar lie, also of a damaged one.

The walk is ours and not `tarfile`'s, which takes a damaged header for the end of the tar without a word, and never
returns from a header with a negative size (CVE-2025-8194).
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset.tariterators import base_plus_ext

BLOCK = 512  # bytes of a tar header; members begin at multiples of it
LONGEST_NAME = 1 << 20  # bytes of a header that only extends the next one
LONGEST_GAP = 64 << 20  # bytes without any header after which the rest is taken for lost


@dataclass(frozen=True)
class Member:
    """A regular file in a tar."""

    name: str
    offset: int  # of its content, bytes
    size: int  # bytes


@dataclass(frozen=True, eq=False)
class Table:
    """Where the members of one tar lie, so that any of its n samples can be read without the ones before."""

    keys: list[str]  # n
    members: dict[str, np.ndarray]  # extension -> n x 2 int64 (offset, bytes); offset -1 where a sample lacks it
    problem: str  # what is wrong with the tar as a whole, "" for nothing

    @property
    def cut(self) -> bool:
        """Whether all that is wrong is that the end is missing."""
        return self.problem.startswith(("it is truncated", "it is empty"))

    def lost(self, row: int, wanted: set[str]) -> list[str]:
        """Members that most samples of a damaged tar have and this one has not any more."""
        if not self.problem:
            return []
        usual = [e for e, places in self.members.items() if e in wanted and (places[:, 0] >= 0).mean() > 0.5]
        return [e for e in usual if self.members[e][row, 0] < 0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Table) or self.keys != other.keys or self.members.keys() != other.members.keys():
            return False
        return all(np.array_equal(places, other.members[e]) for e, places in self.members.items())

    @staticmethod
    def scan(file: Path, progress: Callable[[], None] = lambda: None) -> Table:
        """Read the headers of a tar; members of one sample share everything before the first dot of their name.

        A name that comes twice with the same extension belongs to several samples: then only neighbours are one
        sample, because members of two samples must never be mixed. `progress` is called for each member.
        """
        found, problem = [], []
        with file.open("rb") as stream:
            for member in walk(stream, problem):
                progress()
                key, extension = base_plus_ext(member.name)
                if key is not None:
                    found.append((key, extension.lower(), member))
        counts = Counter((key, extension) for key, extension, _ in found)
        repeated = {key for (key, _), count in counts.items() if count > 1}
        keys: list[str] = []
        rows: dict[str, int] = {}
        places: dict[str, dict[int, tuple[int, int]]] = {}
        for i, (key, extension, member) in enumerate(found):
            column = places.setdefault(extension, {})
            apart = key in repeated and i > 0 and found[i - 1][0] != key
            if key not in rows or rows[key] in column or apart:
                rows[key] = len(keys)
                keys.append(key)
            column[rows[key]] = (member.offset, member.size)
        members = {extension: np.full((len(keys), 2), -1, np.int64) for extension in places}
        for extension, column in places.items():
            members[extension][list(column)] = list(column.values())
        return Table(keys, members, "; ".join(problem))


def walk(stream: BinaryIO, problems: list[str]) -> Iterator[Member]:
    """The regular members of a tar in order; what is wrong with it is appended to `problems`.

    A header that cannot be read costs its own member: the walk goes on at the next one that can.
    """
    size = stream.seek(0, 2)
    at, gap, ended = 0, 0, False  # gap: bytes since something could be read
    damaged = -1  # place of the first damage
    extended: dict[str, str] = {}
    while at + BLOCK <= size and gap < LONGEST_GAP:
        stream.seek(at)
        block = stream.read(BLOCK)
        if ended := not any(block):
            at, gap = at + BLOCK, gap + BLOCK
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
            content = at + BLOCK
            if header.type in _EXTENDING:
                extended |= _extension(header, stream)
                at, gap = content + _padded(header.size), 0
                continue
            header.name, header.size = extended.pop("path", header.name), int(extended.pop("size", header.size))
            length = _padded(header.size)
        except (tarfile.HeaderError, ValueError, OverflowError):
            damaged = at if damaged < 0 else damaged
            at, gap, extended = at + BLOCK, gap + BLOCK, {}
            continue
        sparse, extended = any(key.startswith("GNU.sparse") for key in extended), {}
        if header.type not in _WITHOUT_CONTENT:
            if content + header.size > size:
                problems.append(f"it is truncated within {header.name}")
                return
            if header.type in _PLAIN and not sparse:
                yield Member(header.name, content, header.size)
            content += length
        at, gap = content, 0
    if size == 0:
        problems.append("it is empty")
    elif damaged >= 0:
        problems.append(f"it is damaged at byte {damaged}")
    elif not ended or at < size:
        problems.append(f"it is truncated: its end is missing after {size} bytes")


_EXTENDING = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
_EXTENDING += (tarfile.GNUTYPE_LONGLINK,)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_CONTENT = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE)
_WITHOUT_CONTENT += (tarfile.FIFOTYPE,)


def _extension(header: tarfile.TarInfo, stream: BinaryIO) -> dict[str, str]:
    """What a pax or GNU header says about the member after it: its "path", "size", …"""
    if not 0 <= header.size <= LONGEST_NAME:
        raise ValueError("a name of impossible length")
    content = stream.read(header.size)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.split(b"\0")[0].decode("utf-8", "replace")}
    found = {}
    while header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE) and content.strip(b"\0"):
        length, _, rest = content.partition(b" ")  # "30 path=name\n", the length counts itself
        end = int(length)
        if not len(length) < end <= len(content):
            raise ValueError("a damaged record")
        key, _, value = rest[: end - len(length) - 2].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        content = content[end:]
    return found


def _padded(size: int) -> int:
    if size < 0:
        raise ValueError("a negative size")
    return -(-size // BLOCK) * BLOCK
