"""Packing a folder of pictures or videos with captions into shards."""

from __future__ import annotations

import csv
import logging
import re
import shutil
from pathlib import Path

from tqdm import tqdm

from lit_gen.data.decode import DECODERS, IMAGE, VIDEO, decode
from lit_gen.data.shards import BadSample, Shard, write_index, write_tar
from lit_gen.errors import ShardError

logger = logging.getLogger(__name__)

_FILE_COLUMNS = ("file", "file_name", "filename", "path", "image", "video")
_CAPTION_COLUMNS = ("caption", "text", "prompt")


def pack(
    folder: str | Path,
    out: str | Path,
    captions: str | Path | None = None,
    samples_per_shard: int = 1000,
    tolerance: float = 0.01,
) -> Path:
    """Pack every picture or video below `folder` into shards in `out` (which must not exist); returns `out`.

    Files are stored as they are, with their caption and, where FILE.json lies beside them, its facts.

    Args:
        captions: csv with a column of file names relative to `folder` and one of captions; by default the caption of
            each file is the .txt of the same name beside it.
        tolerance: share of files that may be unreadable; they are named and left out.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise ShardError(f"{folder} is not a folder")
    if out.exists():
        raise ShardError(f"{out} exists already; remove it or choose another --out")
    kind, files = _media(folder)
    texts = _from_csv(Path(captions), folder, files) if captions else _side_by_side(files)
    building = out.with_name(f".{out.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        shards = _write(files, folder, texts, building, samples_per_shard, tolerance)
        write_index(building, kind, shards, {"packed_from": folder.name, "kind": kind})
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out


def _media(folder: Path) -> tuple[str, list[Path]]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
    found = {
        "images": [f for f in files if _extension(f) in IMAGE],
        "videos": [f for f in files if _extension(f) in VIDEO],
    }
    if all(found.values()):
        counts = " and ".join(f"{len(v)} {k}" for k, v in found.items())
        raise ShardError(f"{folder} holds {counts}; pack them from separate folders")
    for kind, members in found.items():
        if members:
            return kind, members
    raise ShardError(f"{folder} holds no pictures or videos ({', '.join(IMAGE + VIDEO)})")


def _extension(file: Path) -> str:
    return file.suffix[1:].lower()


def _side_by_side(files: list[Path]) -> dict[Path, str]:
    missing = [f for f in files if not f.with_suffix(".txt").is_file()]
    if missing:
        raise ShardError(
            f"{missing[0]} has no caption: {missing[0].with_suffix('.txt').name} is missing beside it "
            f"({len(missing)} of {len(files)} files); write one, or name a csv with --captions"
        )
    return {f: f.with_suffix(".txt").read_text(encoding="utf-8").strip() for f in files}


def _from_csv(table: Path, folder: Path, files: list[Path]) -> dict[Path, str]:
    if not table.is_file():
        raise ShardError(f"captions file {table} does not exist")
    with table.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        names = reader.fieldnames or []
        file_column = next((c for c in _FILE_COLUMNS if c in names), None)
        caption_column = next((c for c in _CAPTION_COLUMNS if c in names), None)
        if file_column is None or caption_column is None:
            raise ShardError(
                f"{table} needs a header with a column of files ({', '.join(_FILE_COLUMNS)}) and one of captions "
                f"({', '.join(_CAPTION_COLUMNS)}); it has: {', '.join(names) or 'nothing'}"
            )
        texts = {folder / row[file_column]: (row[caption_column] or "").strip() for row in reader}
    absent = [f for f in texts if not f.is_file()]
    if absent:
        raise ShardError(f"{table} names {absent[0]}, which does not exist ({len(absent)} of {len(texts)} rows)")
    missing = [f for f in files if f not in texts]
    if missing:
        raise ShardError(f"{table} has no caption for {missing[0]} ({len(missing)} of {len(files)} files)")
    return texts


def _write(
    files: list[Path], folder: Path, texts: dict[Path, str], out: Path, samples_per_shard: int, tolerance: float
) -> list[Shard]:
    bad: dict[Path, str] = {}
    shards: list[Shard] = []
    batch: list[dict] = []
    for number, file in enumerate(tqdm(files, desc="packing", unit="file")):
        try:
            batch.append(_sample(file, folder, texts[file], number))
        except BadSample as error:
            bad[file] = str(error)
            logger.warning("data: %s left out: %s", file, error)
        if len(bad) > tolerance * len(files):
            first, reason = next(iter(bad.items()))
            raise ShardError(f"{len(bad)} of {len(files)} files cannot be read, the first is {first}: {reason}")
        if batch and (len(batch) == samples_per_shard or number == len(files) - 1):
            shards.append(write_tar(out / f"{len(shards):06d}.tar", batch))
            batch = []
    return shards


def _sample(file: Path, folder: Path, caption: str, number: int) -> dict:
    extension = _extension(file)
    members = {extension: file.read_bytes(), "txt": caption.encode()}
    if file.with_suffix(".json").is_file():
        members["json"] = file.with_suffix(".json").read_bytes()
    for name in members.keys() & DECODERS.keys():
        decode(name, members[name])  # what training could not read is found now
    # A dot would end the key; the number keeps files of the same name apart.
    stem = re.sub(r"[^\w-]+", "-", str(file.relative_to(folder).with_suffix("")))[:60]
    return {"__key__": f"{number:08d}-{stem}", **members}
