"""Building a set file's shards from the world: in parallel, atomically, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lit_gen.data import stories
from lit_gen.data.decode import encode_image, encode_video
from lit_gen.data.facts import facts_from_scenes
from lit_gen.data.sets import SetFile
from lit_gen.data.shards import INDEX, ShardSet
from lit_gen.data.split import Job, Samples, cores, own_devices
from lit_gen.data.write import write_index, write_tar
from lit_gen.errors import UserError, at_least
from lit_gen.task import Task

_CHUNK = 64  # pictures rendered at once
_NOT_CONTENT = ("sheets.py", "bench.py")  # files of the world that change no picture


def build(
    set_file: str | Path,
    workers: int | None = None,
    force: bool = False,
    device: str | None = None,
    task: Task = Task(),
) -> Path | None:
    """Build the shards of a set file unless they are complete and current.

    Shards are written beside the final folder, which appears by a rename once all are complete; an interrupted build
    continues with the shards it has. A set whose file, or the world's code, changed is built again with a notice.

    Args:
        workers: processes that render; by default one per core, or one for a small set. The bytes do not depend on it.
        force: build again even if nothing changed.
        device: "cpu" or "cuda"; by default all GPUs if there are any, one process each.
        task: the part of the shards to write.

    Returns:
        The folder of the set, or None while other tasks have yet to write their part.

    Raises:
        Paused: a signal asked to stop.
    """
    at_least(1, **{"--workers": workers})
    description = SetFile.read(set_file)
    folder, source = description.folder, source_fingerprint(description)
    if force and task.count > 1:
        raise UserError(f"--force by several tasks would undo each other's work; remove {folder} beforehand instead")

    def index(building: Path, shards: list) -> None:
        write_index(building, description.kind, shards, description.description, source)

    title, sizes = f"building {description.name}", _sizes(description)
    job = Job(folder, source[:12], title, sizes, partial(_renderer, description), index)

    def current() -> bool:
        if force:
            shutil.rmtree(job.building, ignore_errors=True)
            return False
        stale = what_changed(description, source)
        if stale:
            print(f"data: {description.path}: {stale}; building {folder} again", file=sys.stderr)
        return stale is None

    devices = own_devices(device, workers or cores())
    devices = devices if workers else _useful(devices, description)
    return folder if job.run(task, devices, current) else None


def first_sample(description: SetFile, folder: Path) -> ShardSet:
    """A set of nothing but the first sample of another, which need not be built, in an empty folder of its own."""
    shard = write_tar(folder / "000000.tar", _rendering(description)(description, 0, 1, "cpu"))
    write_index(folder, description.kind, [shard], description.description)
    return replace(ShardSet.open(folder), source=str(description.path))


def source_fingerprint(description: SetFile) -> str:
    """Hash of all that determines the pictures: the set file and the world's code."""
    digest = hashlib.sha256(json.dumps(description.description, sort_keys=True).encode())
    world = Path(__file__).parent.parent / "world"
    files = sorted(f for f in world.glob("*.py") if f.name not in _NOT_CONTENT)
    for file in [*files, *(sorted(world.glob("stories/*.py")) if description.kind == "stories" else ())]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _sizes(description: SetFile) -> list[int]:
    """Samples of each shard."""
    each = description.samples_per_shard
    return [min(each, description.count - first) for first in range(0, description.count, each)]


def _rendering(description: SetFile) -> Callable[[SetFile, int, int, str], Iterator[dict[str, str | bytes]]]:
    """(set file, first, last, device) -> samples first … last - 1, encoded."""
    return stories.rendered if description.kind == "stories" else _rendered


def _renderer(description: SetFile, building: Path, device: str) -> Samples:
    """What writes shards on a device."""
    rendered = _rendering(description)

    def samples(number: int) -> Iterator[dict[str, str | bytes]]:
        first = number * description.samples_per_shard
        return rendered(description, first, min(first + description.samples_per_shard, description.count), device)

    return samples


def _rendered(description: SetFile, first: int, last: int, device: str) -> Iterator[dict[str, str | bytes]]:
    """Samples first … last - 1 of the set, encoded."""
    from lit_gen.world.grammar import captions
    from lit_gen.world.render import render, render_video
    from lit_gen.world.sampling import sample

    video = description.kind == "videos"
    extension, encode = ("mp4", encode_video) if video else ("png", encode_image)
    chunk = (max(1, _CHUNK // description.frames) if video else _CHUNK) if device == "cpu" else last - first
    # A GPU outruns one encoding core; several of them share the cores.
    encoders = 1 if device == "cpu" else max(1, cores() // torch.cuda.device_count())
    with ThreadPoolExecutor(encoders) as threads:
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


def _useful(devices: list[str], description: SetFile) -> list[str]:
    """One device for a small set: starting processes takes as long as so many pictures take a core, or a GPU."""
    frames = {"videos": description.frames, "stories": 5 * description.frames}.get(description.kind, 1)
    pictures = description.count * frames
    return devices if pictures >= (1000 if devices[0] == "cpu" else 50_000) else devices[:1]


def what_changed(description: SetFile, source: str) -> str | None:
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
