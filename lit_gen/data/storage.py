"""How the videos of stories are stored: as mp4, or as frames (`npy`, F H W 3 bytes) that are read without decoding."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from lit_gen.data.decode import IMAGE, decode, encode_video, open_picture
from lit_gen.data.frames import fitted, read_frames
from lit_gen.data.shards import BadSample, Shard, ShardSet
from lit_gen.data.split import Job, Samples
from lit_gen.data.stories import FRAMES, require_own_ids, segment_frames
from lit_gen.data.write import write_index
from lit_gen.errors import ShardError
from lit_gen.task import Task

logger = logging.getLogger(__name__)

Store = Literal["mp4", "npy"]


def stored(source: Path, frames: int, size: int | None, store: Store = "mp4") -> tuple[str, bytes]:
    """Extension and bytes of a video as it is stored.

    Args:
        source: a video file, or a folder of frames in the order of their names.
        frames: kept, the middle ones of as many equal parts; 0 for all, of an mp4 the file as it is.
        size: pixels; of an mp4 the short side, where it is longer than that; of "npy" the sides of the middle square.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    if source.is_file():
        if store == "mp4" and not frames:
            read_frames(source, 1)
            return source.suffix[1:].lower(), source.read_bytes()
        pixels = read_frames(source, frames) if frames else decode("mp4", source.read_bytes())
    else:
        files = sorted(file for file in source.iterdir() if file.suffix[1:].lower() in IMAGE)
        if not files:
            raise ValueError("the folder holds no frames")
        chosen = segment_frames(len(files), frames, None) if frames else range(len(files))
        pixels = np.stack([np.asarray(open_picture(files[i]).convert("RGB")) for i in chosen])
    return _encoded(pixels, size, store)


def _encoded(pixels: np.ndarray, size: int | None, store: Store) -> tuple[str, bytes]:
    if store == "npy":
        buffer = io.BytesIO()
        np.save(buffer, pixels if size is None else fitted(pixels, size), allow_pickle=False)
        return "npy", buffer.getvalue()
    if size is not None:
        pixels = np.stack([_short_side(frame, size) for frame in pixels])
    height, width = (side - side % 2 for side in pixels.shape[1:3])  # what video codecs take
    return "mp4", encode_video(np.ascontiguousarray(pixels[:, :height, :width]))


def _short_side(frame: np.ndarray, size: int) -> np.ndarray:
    height, width = frame.shape[:2]
    scale = size / min(height, width)
    if scale >= 1:
        return frame
    if height == width:
        return fitted(frame[None], size)[0]
    return np.asarray(Image.fromarray(frame).resize((round(width * scale), round(height * scale)), Image.LANCZOS))


def store_again(
    source: str | Path,
    out: str | Path,
    frames: int,
    size: int | None,
    store: Store,
    tolerance: float = 0.01,
    workers: int = 1,
    task: Task = Task(),
) -> Path | None:
    """Write a set of stories again, shard by shard, with its videos stored in another way; the rest stays as it is.

    Args:
        source: a set file, which is built where that is to be done, or a folder.
        out: folder of the new set, which must not exist.
        frames, size, store: as in `stored`.
        tolerance: share of videos that may be unreadable; they are named and left out.
        workers: processes that decode.
        task: the part of the shards to write.

    Returns:
        `out`, or None while other tasks have yet to write their part.

    Raises:
        ShardError: the source is no set of stories, or two of its videos have one id; `out` exists, or too much cannot
            be read.
    """
    out = Path(out)
    if out.exists():
        raise ShardError(f"{out} exists already; remove it or choose another --out")
    if Path(source).suffix in (".yaml", ".yml"):
        from lit_gen.data.build import build

        build(source)
    shards = ShardSet.open(source)
    if shards.kind != "stories":
        raise ShardError(f"{source} is a set of {shards.kind or 'unknown kind'}, not of stories")
    require_own_ids(shards)
    key = hashlib.sha256(f"{shards.fingerprint} {frames} {size} {store}".encode()).hexdigest()

    def index(building: Path, written: list[Shard]) -> None:
        lost = len(shards) - sum(shard.samples for shard in written)
        if lost > tolerance * len(shards):
            raise ShardError(f"{lost} of {len(shards)} videos cannot be read (more than {tolerance:.1%}); see the log")
        about = {"stored_from": str(source), "kind": "stories"}
        write_index(building, "stories", [shard for shard in written if shard.samples], about, key)

    start = partial(_restorer, str(source), frames, size, store)
    sizes = [shard.samples for shard in shards.shards]
    job = Job(out, key[:12], f"storing {out.name}", sizes, start, index)
    return out if job.run(task, ["cpu"] * workers, out.exists) else None


def _restorer(source: str, frames: int, size: int | None, store: Store, _: Path, __: str) -> Samples:
    shards = ShardSet.open(source)
    ends = np.cumsum([shard.samples for shard in shards.shards]).tolist()

    def samples(number: int) -> Iterator[dict[str, str | bytes]]:
        for i in range(ends[number] - shards.shards[number].samples, ends[number]):
            name = f"sample {i}"
            try:
                name, members = shards.read(i, {*FRAMES, "txt", "json"})
                found = next((extension for extension in FRAMES if extension in members), None)
                if found is None:
                    raise BadSample("it has no video")
                pixels = decode(found, members.pop(found))
                chosen = segment_frames(len(pixels), frames, None) if frames else slice(None)
                extension, data = _encoded(pixels[chosen], size, store)
            except ValueError as error:  # BadSample is one
                logger.warning("data: %s of %s left out: %s", name, source, error)
                continue
            yield {"__key__": name.partition("/")[2], extension: data} | members

    return samples
