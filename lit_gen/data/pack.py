"""Packing a folder of pictures or videos with captions into shards."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import mimetypes
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lit_gen.data.decode import DECODERS, IMAGE, VIDEO, decode
from lit_gen.data.shards import INDEX, BadSample, Shard
from lit_gen.data.split import Job, Samples, building_folder, cores, locked
from lit_gen.data.write import write_index
from lit_gen.errors import ShardError, at_least
from lit_gen.task import Task

logger = logging.getLogger(__name__)

_KINDS = {"images": IMAGE, "videos": VIDEO}
_FILE_COLUMNS = ("file", "file_name", "filename", "path", "image", "video")
_CAPTION_COLUMNS = ("caption", "text", "prompt")
_FEW = 5000  # files: starting processes takes about as long as reading so many


def pack(
    folder: str | Path,
    out: str | Path,
    captions: str | Path | None = None,
    samples_per_shard: int = 1000,
    tolerance: float = 0.01,
    workers: int | None = None,
    task: Task = Task(),
) -> Path | None:
    """Pack every picture or video below `folder` into shards in `out`, which must not exist.

    Files are stored as they are, with their caption and, where FILE.json lies beside them, its facts. They are listed
    once, when the packing begins: every task, and a packing that goes on after an interruption, keeps to that list.

    Args:
        captions: csv with a column of file names relative to `folder` and one of captions; by default the caption of
            each file is the .txt of the same name beside it.
        tolerance: share of files that may be unreadable; they are named and left out.
        workers: processes that read and check files; by default one per core, or one for few files.
        task: the part of the shards to write.

    Returns:
        `out`, or None while other tasks have yet to write their part.

    Raises:
        ShardError: what is wrong with the folder, the captions, the files or `out`.
        Paused: a signal asked to stop.
    """
    at_least(1, **{"--samples-per-shard": samples_per_shard, "--workers": workers})
    at_least(0, **{"--tolerance": tolerance})
    folder, out, captions = Path(folder), Path(out), captions and Path(captions)
    if not folder.is_dir():
        raise ShardError(f"{folder} is not a folder")
    settings = [str(folder.resolve()), captions and str(captions.resolve()), samples_per_shard]
    source = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    if out.exists():
        if task.count > 1 and _made_from(out, source):  # a task that comes again
            return out
        raise ShardError(f"{out} exists already; remove it or choose another --out")
    building = building_folder(out, source[:12])
    try:
        plan = Plan.of(building, folder, captions, samples_per_shard)
        total = sum(plan.sizes)

        def index(_: Path, shards: list[Shard]) -> None:
            bad = [json.loads(line) for file in sorted(building.glob("*.bad")) for line in file.open()]
            _refuse_many(bad, tolerance, total)
            description = {"packed_from": folder.name, "kind": plan.kind}
            write_index(building, plan.kind, [s for s in shards if s.samples], description, source)

        start = partial(_packer, folder, tolerance, total)
        job = Job(out, source[:12], f"packing {out.name}", plan.sizes, start, index)
        processes = workers or (cores() if total > _FEW else 1)
        return out if job.run(task, ["cpu"] * processes, out.exists) else None
    except ShardError:
        if task.count == 1:  # what is put right is listed, and read, anew
            shutil.rmtree(building, ignore_errors=True)
        raise


def _made_from(out: Path, source: str) -> bool:
    try:
        return json.loads((out / INDEX).read_text())["source"] == source
    except (OSError, ValueError, KeyError):
        return False


# -- the list of files ------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Which files go into which shard; those of shard n are lines of n.plan, so that no task reads the whole list."""

    kind: str  # images | videos
    sizes: list[int]  # files of each shard

    @staticmethod
    def of(building: Path, folder: Path, captions: Path | None, samples_per_shard: int) -> Plan:
        """The plan in the building folder, made if there is none."""
        file = building / "plan.json"
        if (building / INDEX).is_file():  # all that is left to do is to put the set in its place
            return Plan("", [])
        if file.is_file():
            logger.warning("data: %s goes on with the files listed earlier; remove it to list them again", building)
            return Plan(**json.loads(file.read_text()))
        building.mkdir(parents=True, exist_ok=True)
        with locked(building / "plan.lock"):
            if file.is_file():  # another task was quicker
                return Plan(**json.loads(file.read_text()))
            kind, names, uncaptioned = _media(folder)
            if captions:
                texts = _from_csv(captions, folder, names)
            elif uncaptioned:
                raise ShardError(
                    f"{folder / uncaptioned[0]} has no caption: {Path(uncaptioned[0]).stem}.txt is missing beside it "
                    f"({len(uncaptioned)} of {len(names)} files); write one, or name a csv with --captions"
                )
            else:
                texts = {}
            plan = Plan(kind, [])
            for first in range(0, len(names), samples_per_shard):
                chosen = list(enumerate(names[first : first + samples_per_shard], first))
                lines = "".join(json.dumps([i, name, texts.get(name)]) + "\n" for i, name in chosen)
                (building / f"{len(plan.sizes):06d}.plan").write_text(lines)
                plan.sizes.append(len(chosen))
            partial_file = file.with_suffix(".partial")
            partial_file.write_text(json.dumps({"kind": plan.kind, "sizes": plan.sizes}))
            partial_file.rename(file)
        return plan


def _media(folder: Path) -> tuple[str, list[str], list[str]]:
    """-> (kind, files in order, those without a .txt beside them), all relative to the folder."""
    found: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    uncaptioned: list[str] = []
    others: Counter[str] = Counter()  # extensions of pictures and videos that the loader does not decode
    links: list[str] = []  # to folders
    for root, folders, files in os.walk(folder):  # which asks nothing of each file: there may be millions
        links += [link for name in folders if os.path.islink(link := os.path.join(root, name))]
        beside, below = set(files), os.path.relpath(root, folder)
        for file in files:
            stem, extension = os.path.splitext(file)
            kind = next((k for k, known in _KINDS.items() if extension[1:].lower() in known), None)
            if kind is None or file.startswith("."):
                if (mimetypes.guess_type(file)[0] or "").startswith(("image/", "video/")):
                    others[extension.lower()] += 1
                continue
            name = file if below == "." else f"{below}/{file}"
            found[kind].append(name)
            if f"{stem}.txt" not in beside:
                uncaptioned.append(name)
    if links:
        logger.warning("data: %s: links to folders are not followed, e.g. %s (%d)", folder, links[0], len(links))
    if others:
        told = ", ".join(f"{count} {extension}" for extension, count in others.most_common())
        logger.warning("data: %s: left out, of formats that are not read: %s", folder, told)
    if all(found.values()):
        counts = " and ".join(f"{len(v)} {k}" for k, v in found.items())
        raise ShardError(f"{folder} holds {counts}; pack them from separate folders")
    for kind, names in found.items():
        if names:
            return kind, sorted(names, key=_place), sorted(uncaptioned, key=_place)
    raise ShardError(f"{folder} holds no pictures or videos ({', '.join(IMAGE + VIDEO)})")


def _place(name: str) -> list[str]:
    """Files of a folder stay together."""
    return name.split("/")


def _from_csv(table: Path, folder: Path, names: list[str]) -> dict[str, str]:
    """File -> caption."""
    if not table.is_file():
        raise ShardError(f"captions file {table} does not exist")
    texts: dict[str, str] = {}
    for line, file, caption in _rows(table):
        name = _relative(file, folder)
        if name in texts:
            raise ShardError(f"{table}:{line}: {file} has a caption already; a file has one row")
        texts[name] = caption
    if empty := [name for name, text in texts.items() if not text]:
        logger.warning(
            "data: %s: %d of %d captions are empty, the first is that of %s", table, len(empty), len(texts), empty[0]
        )
    known = set(names)
    absent = [name for name in texts if name not in known and not (folder / name).is_file()]
    if absent:
        raise ShardError(
            f"{table} names {folder / absent[0]}, which does not exist ({len(absent)} of {len(texts)} rows)"
        )
    missing = [name for name in names if name not in texts]
    if missing:
        raise ShardError(f"{table} has no caption for {folder / missing[0]} ({len(missing)} of {len(names)} files)")
    return texts


def _rows(table: Path) -> Iterator[tuple[int, str, str]]:
    """(line, file, caption) of each row of a csv."""
    with table.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        try:
            columns = reader.fieldnames or []
            file_column = next((c for c in _FILE_COLUMNS if c in columns), None)
            caption_column = next((c for c in _CAPTION_COLUMNS if c in columns), None)
            if file_column is None or caption_column is None:
                raise ShardError(
                    f"{table} needs a header with a column of files ({', '.join(_FILE_COLUMNS)}) and one of captions "
                    f"({', '.join(_CAPTION_COLUMNS)}); it has: {', '.join(columns) or 'nothing'}"
                )
            for row in reader:
                if not row[file_column]:
                    raise ShardError(f"{table}:{reader.line_num}: the row names no file")
                if None in row:
                    raise ShardError(
                        f"{table}:{reader.line_num}: the row has more cells than the header; a caption with commas "
                        "stands in double quotes"
                    )
                yield reader.line_num, row[file_column], (row[caption_column] or "").strip()
        except UnicodeDecodeError as error:
            raise ShardError(
                f"{table} is not a text in UTF-8 ({error.reason} near line {reader.line_num + 1})"
            ) from None
        except csv.Error as error:  # of a quote that does not end, say
            raise ShardError(f"{table}:{reader.line_num}: {error}") from None


def _relative(file: str, folder: Path) -> str:
    return os.path.relpath(file, folder) if os.path.isabs(file) else os.path.normpath(file)


# -- one shard --------------------------------------------------------------------------------------------------------


def _packer(folder: Path, tolerance: float, total: int, building: Path, _: str) -> Samples:
    """What writes shards; it stops when too many of the `total` files turned out to be unreadable."""
    bad: list[tuple[str, str]] = []

    def samples(number: int) -> Iterator[dict[str, str | bytes]]:
        here: list[tuple[str, str]] = []
        for line in (building / f"{number:06d}.plan").open():
            i, name, caption = json.loads(line)
            # A dot would end the key; the number keeps files of the same name apart.
            key = f"{i:08d}-" + re.sub(r"[^\w-]+", "-", os.path.splitext(name)[0])[:60]
            try:
                yield {"__key__": key, **_members(folder / name, caption)}
            except (BadSample, OSError, UnicodeDecodeError) as error:
                logger.warning("data: %s left out: %s", folder / name, error)
                here.append((str(folder / name), str(error)))
                _refuse_many([*bad, *here], tolerance, total)
        bad.extend(here)
        if here:
            lines = "".join(json.dumps(row) + "\n" for row in here)
            (building / f"{number:06d}.bad").write_text(lines)

    return samples


def _refuse_many(bad: list[tuple[str, str]], tolerance: float, total: int) -> None:
    if len(bad) > tolerance * total:
        file, reason = bad[0]
        raise ShardError(f"{len(bad)} of {total} files cannot be read, the first is {file}: {reason}")


def _members(file: Path, caption: str | None) -> dict[str, str | bytes]:
    """Members of a file's sample; the caption lies beside the file unless it is given."""
    text = file.with_suffix(".txt").read_text(encoding="utf-8").strip() if caption is None else caption
    members: dict[str, str | bytes] = {file.suffix[1:].lower(): file.read_bytes(), "txt": text.encode()}
    if file.with_suffix(".json").is_file():
        members["json"] = file.with_suffix(".json").read_bytes()
    for extension in members.keys() & DECODERS.keys():
        decode(extension, members[extension])  # what training could not read is found now
    return members
