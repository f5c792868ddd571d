"""Small sets of shards whose samples can be told apart by their pixels."""

import json
from pathlib import Path

import numpy as np

from lit_gen.data.decode import encode_image, encode_video
from lit_gen.data.write import write_index, write_tar


def picture(number: int, size: int = 8) -> np.ndarray:
    """size size 3 uint8, the colour says which sample it is."""
    return np.full((size, size, 3), number, np.uint8)


def image_set(folder: Path, sizes: tuple[int, ...] = (7, 5, 6, 4), kind: str = "images") -> Path:
    """Shards of unequal size; sample i is a picture of grey value i with caption "sample i" and facts {"i": i}."""
    folder.mkdir(parents=True)
    shards, first = [], 0
    for number, size in enumerate(sizes):
        samples = (
            {
                "__key__": f"{i:06d}",
                "png": encode_image(picture(i)),
                "txt": f"sample {i}".encode(),
                "json": json.dumps({"i": i}).encode(),
            }
            for i in range(first, first + size)
        )
        shards.append(write_tar(folder / f"{number:06d}.tar", samples))
        first += size
    write_index(folder, kind, shards, {})
    return folder


def video_set(folder: Path, count: int = 6, frames: int = 8, lost: dict[int, int] | None = None) -> Path:
    """One shard; frame f of clip i is grey value 8 * f + i. `lost`: clip -> frames that are left of it."""
    folder.mkdir(parents=True)
    lengths = {i: frames for i in range(count)} | (lost or {})
    clips = (np.stack([picture(8 * f + i, 16) for f in range(length)]) for i, length in lengths.items())
    samples = ({"__key__": f"{i}", "mp4": encode_video(clip), "txt": b"a clip"} for i, clip in enumerate(clips))
    write_index(folder, "videos", [write_tar(folder / "000000.tar", samples)], {})
    return folder
