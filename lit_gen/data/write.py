"""Writing sets of shards: tars that are whole or absent, and the index beside them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from webdataset import TarWriter

from lit_gen.data.shards import FORMAT, INDEX, Shard, checksum


def write_tar(file: Path, samples: Iterable[dict[str, str | bytes]]) -> Shard:
    """Write samples ({"__key__": name, extension: bytes, …}) to a tar that appears, complete, by a rename."""
    partial = file.with_suffix(".partial")
    count = 0
    with partial.open("wb") as stream:
        # no times: equal content, equal bytes
        with contextlib.closing(TarWriter(stream, encoder=False, mtime=0, user="", group="")) as tar:
            for sample in samples:
                tar.write(sample)
                count += 1
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
        "shards": [{"file": s.file.name, "samples": s.samples, "bytes": s.bytes, "sha256": s.sha256} for s in shards],
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return fingerprint
