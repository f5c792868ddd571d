"""Building a set file's shards from the world: in parallel, atomically, the same bytes every time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from lit_gen.data.decode import encode_image, encode_video
from lit_gen.data.facts import facts_from_scenes
from lit_gen.data.sets import SetFile
from lit_gen.data.shards import INDEX, Shard, ShardSet, write_index, write_tar
from lit_gen.errors import UserError

_CHUNK = 64  # pictures rendered at once
_NOT_CONTENT = ("sheets.py", "bench.py")  # files of the world that change no picture


def build(set_file: str | Path, workers: int | None = None, force: bool = False, device: str | None = None) -> Path:
    """Build the shards of a set file unless they are complete and current; returns their folder.

    Shards are written beside the final folder, which appears by a rename once all are complete; an interrupted build
    continues with the shards it has. A set whose file, or the world's code, changed is built again with a notice.

    Args:
        workers: processes that render; by default one per core, or one for a small set. The bytes do not depend on it.
        force: build again even if nothing changed.
        device: "cpu" or "cuda"; by default a GPU if there is one.
    """
    description = SetFile.read(set_file)
    folder = description.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{folder.name}.lock"):  # of two runs that need a set, one builds it
        source = source_fingerprint(description)
        stale = _what_changed(description, source)
        if stale is None and not force:
            return folder
        if stale:
            print(f"data: {description.path}: {stale}; building {folder} again", file=sys.stderr)
        for leftover in folder.parent.glob(f".{folder.name}.*.building"):
            if force or source[:12] not in leftover.name:
                shutil.rmtree(leftover)
        building = folder.parent / f".{folder.name}.{source[:12]}.building"
        building.mkdir(exist_ok=True)
        shards = _write_all(description, building, workers or _useful_workers(description), device)
        write_index(building, description.kind, shards, description.description, source)
        _replace(building, folder)
    return folder


def source_fingerprint(description: SetFile) -> str:
    """Hash of all that determines the pictures: the set file and the world's code."""
    digest = hashlib.sha256(json.dumps(description.description, sort_keys=True).encode())
    world = Path(__file__).parent.parent / "world"
    for file in sorted(f for f in world.glob("*.py") if f.name not in _NOT_CONTENT):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def write_shard(description: SetFile, folder: Path, number: int, device: str) -> Shard:
    """Render samples number * samples_per_shard … into one tar, unless an interrupted build already has."""
    file = folder / f"{number:06d}.tar"
    done = file.with_suffix(".json")
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return Shard(**json.loads(done.read_text()) | {"file": file})
    first = number * description.samples_per_shard
    last = min(first + description.samples_per_shard, description.count)
    shard = write_tar(file, _rendered(description, first, last, device))
    done.write_text(json.dumps(asdict(shard) | {"file": file.name}))
    return shard


def _rendered(description: SetFile, first: int, last: int, device: str) -> Iterator[dict[str, str | bytes]]:
    """Samples first … last - 1 of the set, encoded."""
    from lit_gen.world.grammar import captions
    from lit_gen.world.render import render, render_video
    from lit_gen.world.sampling import sample

    video = description.kind == "videos"
    extension, encode = ("mp4", encode_video) if video else ("png", encode_image)
    chunk = (max(1, _CHUNK // description.frames) if video else _CHUNK) if device == "cpu" else last - first
    with ThreadPoolExecutor(1 if device == "cpu" else os.cpu_count()) as threads:  # a GPU outruns one encoding core
        for start in range(first, last, chunk):
            index = torch.arange(start, min(start + chunk, last), device=device)
            scenes = sample(description.recipe, description.split, description.seed, index)
            if video:
                rgb = render_video(scenes, frames=description.frames, size=description.size).rgb
            else:
                rgb = render(scenes, size=description.size).rgb
            pixels = (rgb.clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()  # B [F] H W 3
            texts = captions(scenes, description.captions.level, description.captions.style_words, description.seed)
            members = zip(index.tolist(), threads.map(encode, pixels), texts, facts_from_scenes(scenes), strict=True)
            for i, media, text, facts in members:
                truth = json.dumps(facts, separators=(",", ":")).encode()
                yield {"__key__": f"{i:08d}", extension: media, "txt": text.text.encode(), "json": truth}


def _write_all(description: SetFile, folder: Path, workers: int, device: str | None) -> list[Shard]:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    count = -(-description.count // description.samples_per_shard)
    write = partial(write_shard, description, folder, device=device)
    with tqdm(total=description.count, desc=f"building {description.name}", unit="sample", **_bar()) as bar:
        if device != "cpu" or min(workers, count) == 1:
            shards = []
            for number in range(count):
                shards.append(write(number))
                bar.update(shards[-1].samples)
        else:
            shards = _in_processes(write, count, min(workers, count), bar)
    for file in folder.glob("*.json"):
        file.unlink()
    return shards


def _useful_workers(description: SetFile) -> int:
    pictures = description.count * (description.frames if description.kind == "videos" else 1)
    return 1 if pictures < 1000 else os.cpu_count() or 1  # starting processes takes as long as some hundred pictures


def _in_processes(write: partial, count: int, workers: int, bar: tqdm) -> list[Shard]:
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        futures = [pool.submit(write, number) for number in range(count)]
        try:
            for future in as_completed(futures):
                bar.update(future.result().samples)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _start_worker() -> None:
    torch.set_num_threads(1)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # the parent was killed: nobody wants the rest, and a second build may have begun

    threading.Thread(target=end_with_parent, daemon=True).start()


def _what_changed(description: SetFile, source: str) -> str | None:
    """Why the built set cannot be used; "" when there is none yet, None when it is current."""
    try:
        index = json.loads((description.folder / INDEX).read_text())
        ShardSet.open(description.folder)
    except FileNotFoundError:
        return ""
    except (json.JSONDecodeError, UserError) as error:
        return str(error)
    if index["source"] == source:
        return None
    old, new = index["description"], description.description
    keys = [k for k in new.keys() | old.keys() if new.get(k) != old.get(k)]
    changes = ", ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in sorted(keys))
    return changes or "the world's code changed"


def _replace(new: Path, old: Path) -> None:
    aside = old.with_name(f".{old.name}.old")
    if aside.exists():
        shutil.rmtree(aside)
    if old.exists():
        old.rename(aside)
    new.rename(old)
    if aside.exists():
        shutil.rmtree(aside)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _bar() -> dict:
    # In a log file a line every ten seconds, on a terminal a live bar.
    return {} if sys.stderr.isatty() else {"mininterval": 10, "maxinterval": 10, "ascii": True}
