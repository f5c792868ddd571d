"""Video samples: (video, caption, facts)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lit_gen.data.decode import VIDEO
from lit_gen.data.images import centre_crop, encoded, member, said, to_tensor
from lit_gen.data.shards import BadSample

BY_FRAME = ("posterior", "frame_")  # beginnings of the names of encodings that have a row for each frame of the file
EXTENSIONS = {*VIDEO, "txt", "json"}


@dataclass
class VideoSample:
    """Consecutive frames of a clip, centre cropped; of a cached set also what the same frames were encoded to."""

    size: int | tuple[int, int] | None = None  # pixels of a square, or height and width; None keeps frames as they are
    frames: int | None = None  # F; None takes every frame
    stride: int = 1  # every so many frames of the file
    random_start: bool = True  # anywhere in longer clips, else the middle
    stored: int | None = None  # frames that every file of the set has, where that is known

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        clip = member(sample, VIDEO)  # F' H' W' 3
        encodings = encoded(sample)
        by_frame = {name: value for name, value in encodings.items() if name.startswith(BY_FRAME)}
        for name, value in by_frame.items():
            if len(value) != len(clip):
                raise BadSample(f"the video has {len(clip)} frames, its cached {name} {len(value)}")
        if self.stored is not None and len(clip) != self.stored:
            raise BadSample(f"the video has {len(clip)} of {self.stored} frames")
        if self.frames is not None:
            span = (self.frames - 1) * self.stride + 1
            spare = len(clip) - span
            if spare < 0:
                raise BadSample(f"the video has {len(clip)} frames, {span} are needed")
            start = int(rng.integers(spare + 1)) if self.random_start else spare // 2
        else:
            start, span = 0, len(clip)
        chosen = slice(start, start + span, self.stride)
        clip = clip[chosen]
        encodings |= {name: value[chosen] for name, value in by_frame.items()}
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        if size is not None and clip.shape[1:3] != tuple(size):
            clip = np.stack([np.asarray(centre_crop(Image.fromarray(frame), size)) for frame in clip])
        return {"video": to_tensor(clip)} | encodings | said(sample)
