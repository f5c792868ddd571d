"""A few frames of a long video, without keeping all of it in memory."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from lit_gen.data.decode import _ALONE, _CLIPS


def read_frames(source: Path | bytes, frames: int) -> np.ndarray:
    """The middle frames of `frames` equal parts of a video: F H W 3, uint8; a short one shows some several times.

    Raises:
        ValueError: it cannot be decoded, or has no frames.
    """
    from lit_gen.data.stories import segment_frames

    try:
        count = _count(source)
        if not count:
            raise ValueError("the video has no frames")
        wanted = segment_frames(count, frames, None)
        chosen, kept = set(wanted.tolist()), {}
        to_rgb = VideoReformatter()
        with _open(source) as container:
            for number, frame in enumerate(container.decode(container.streams.video[0])):
                if number in chosen:
                    kept[number] = to_rgb.reformat(frame, format="rgb24", **_ALONE).to_ndarray()
                if number >= wanted[-1]:
                    break
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"it cannot be decoded: {error}") from None
    if len(kept) < len(chosen):
        raise ValueError(f"the video ends after {len(kept)} of the {len(chosen)} frames that are wanted")
    return np.stack([kept[number] for number in wanted.tolist()])


def _open(source: Path | bytes) -> av.container.InputContainer:
    options = _CLIPS if isinstance(source, bytes) else {"format_whitelist": _CLIPS["format_whitelist"]}
    return av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), options=options)


def _count(source: Path | bytes) -> int:
    """Frames of a video: what its container says, or by counting its packets."""
    with _open(source) as container:
        stream = container.streams.video[0]
        if stream.frames:
            return stream.frames
        return sum(packet.size > 0 for packet in container.demux(stream))
