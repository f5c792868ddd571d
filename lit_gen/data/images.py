"""Image samples: (image, caption, facts)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_gen.data.decode import IMAGE, MORE_PICTURES, read_image
from lit_gen.data.shards import BadSample
from lit_gen.errors import UserError

EXTENSIONS = {*IMAGE, "txt", "json"}


@dataclass
class ImageSample:
    """A centre crop and its caption; of a cached set what they were encoded to instead of the picture."""

    size: int | None = None  # pixels, height and width; None keeps pictures as they are

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        if "safetensors" in sample:
            return encoded(sample) | said(sample)
        picture = member(sample, IMAGE)
        image = to_tensor(picture if self.size is None else centre_crop(picture, self.size))
        return {"image": image} | said(sample)


def member(sample: dict[str, Any], extensions: tuple[str, ...]) -> Any:
    """The first of several alternative members; BadSample when there is none."""
    for extension in extensions:
        if extension in sample:
            return sample[extension]
    raise BadSample(f"it has none of the members {', '.join(extensions)}")


def said(sample: dict[str, Any]) -> dict[str, Any]:
    """Name, caption and facts; facts are empty for data whose truth nobody wrote down."""
    return {"caption": member(sample, ("txt",)), "key": sample["key"], "facts": sample.get("json", {})}


def encoded(sample: dict[str, Any]) -> dict[str, Tensor]:
    """What a cached sample was encoded to, by name; nothing for others."""
    return {name: torch.tensor(value) for name, value in sample.get("safetensors", {}).items()}


def resize_short_side(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its shorter side `side` pixels long."""
    scale = side / min(picture.size)
    size = tuple(max(side, round(length * scale)) for length in picture.size)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)


def centre_crop(picture: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """The middle of a picture that was resized to just cover `size`: height and width, or the side of a square."""
    height, width = (size, size) if isinstance(size, int) else size
    scale = max(height / picture.height, width / picture.width)
    covering = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    if covering != picture.size:
        picture = picture.resize(covering, Image.Resampling.BICUBIC)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def to_tensor(picture: Image.Image | np.ndarray) -> Tensor:
    """[..] H W 3 uint8 to [..] 3 H W in [-1, 1]."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels.movedim(-1, -3).float().div_(127.5).sub_(1).contiguous()


def read_picture(file: Path, size: int, what: str = "style") -> Tensor:
    """The middle of a picture file, 3 size size in [-1, 1], read as the pictures of sets are.

    Raises:
        UserError: it is no picture; `what` says what it was for.
    """
    try:
        picture = read_image(file.read_bytes(), MORE_PICTURES)
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UserError(f"{what} {str(file)!r} has more than {most:,} pixels; make it smaller") from error
    except Exception as error:  # damaged bytes raise nearly anything
        raise UserError(f"{what} {str(file)!r} is not a picture that can be read") from error
    return to_tensor(centre_crop(picture, size))
