"""A few frames of a long video, without keeping all of it in memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lit_gen.data.decode import CLIPS, converter, upright
from lit_gen.data.images import centre_crop

if TYPE_CHECKING:
    from av.container import InputContainer


def read_frames(source: Path | bytes, frames: int) -> np.ndarray:
    """The middle frames of `frames` equal parts of a video: F H W 3, uint8; a short one shows some several times.

    Raises:
        ValueError: it cannot be decoded, or has no frames.
    """
    import av  # here and below: what has no clips needs no video library

    from lit_gen.data.stories import segment_frames

    try:
        count = _count(source)
        if not count:
            raise ValueError("the video has no frames")
        wanted = segment_frames(count, frames, None)
        chosen, kept = set(wanted.tolist()), {}
        convert = converter()
        with _open(source) as container:
            for number, frame in enumerate(container.decode(container.streams.video[0])):
                if number in chosen:
                    pixels = convert(frame, format="rgb24").to_ndarray()
                    kept[number] = upright(pixels, getattr(frame, "rotation", 0))  # PyAV 14 may not tell
                if number >= wanted[-1]:
                    break
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"it cannot be decoded: {error}") from None
    if len(kept) < len(chosen):
        raise ValueError(f"the video ends after {len(kept)} of the {len(chosen)} frames that are wanted")
    return np.stack([kept[number] for number in wanted.tolist()])


def fitted(frames: np.ndarray, size: int) -> np.ndarray:
    """F H W 3 bytes, resized and centre cropped to F size size 3."""
    height, width = frames.shape[1:3]
    if min(height, width) == size:  # as frames are stored that shall cost nothing to read
        top, left = (height - size) // 2, (width - size) // 2
        return frames[:, top : top + size, left : left + size]
    return np.stack([np.asarray(centre_crop(Image.fromarray(frame), size)) for frame in frames])


def _open(source: Path | bytes) -> InputContainer:
    import av

    options = CLIPS if isinstance(source, bytes) else {"format_whitelist": CLIPS["format_whitelist"]}
    return av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), options=options)


def _count(source: Path | bytes) -> int:
    """Frames of a video: what its container says, or by counting its packets."""
    with _open(source) as container:
        stream = container.streams.video[0]
        if stream.frames:
            return stream.frames
        return sum(packet.size > 0 for packet in container.demux(stream))
