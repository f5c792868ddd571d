"""Style samples: (reference, target, caption) cut from one stylised picture, what StyleCrafter trains on.

Reference and target are different crops of the same picture, so that the reference shares the style but not the layout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lit_gen.data.decode import IMAGE
from lit_gen.data.images import centre_crop, encoded, member, resize_short_side, said, to_tensor
from lit_gen.world import grammar

# What StyleCrafter removes from captions so that they do not tell the style: a leading "<words> MEDIUM of", any
# "in a <words> MEDIUM", a leading "MEDIUM - ". We allow fewer words between, so that content words survive.
_MEDIUM = (
    r"(?:digital art|black and white photograph|photograph|painting|drawing|mural|artwork|view|portrait|photo"
    r"|watercolou?r|illustration|picture)"
)
_LEADING_OF = re.compile(rf"^(?:(?:an?|the) )?(?:[\w-]+ ){{0,4}}?{_MEDIUM} of ", re.IGNORECASE)
_INSIDE = re.compile(rf",? in (?:an? )?(?:[\w-]+ ){{0,2}}?{_MEDIUM}\b", re.IGNORECASE)
_LEADING_DASH = re.compile(rf"^{_MEDIUM} - ", re.IGNORECASE)


@dataclass
class StyleSample:
    """Target: centre crop, or of a cached set its encodings. Reference: random crop of the picture, `zoom` as large."""

    size: int = 64  # pixels of target and reference, height and width
    zoom: float = 800 / 512  # short side of the picture the reference is cropped from, in units of `size`; 1: no crop
    strip_style: bool = True  # remove words that tell the style from captions

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        picture = member(sample, IMAGE)
        if self.zoom > 1:
            enlarged = resize_short_side(picture, round(self.size * self.zoom))
            left = int(rng.integers(enlarged.width - self.size + 1))
            top = int(rng.integers(enlarged.height - self.size + 1))
            reference = enlarged.crop((left, top, left + self.size, top + self.size))
        else:
            reference = centre_crop(picture, self.size)
        target = encoded(sample) or {"image": to_tensor(centre_crop(picture, self.size))}
        batch = target | {"style": to_tensor(reference)} | said(sample)
        if self.strip_style:
            batch["caption"] = strip_style(batch["caption"])
        if "style_parameters" in batch["facts"]:  # a picture of the world
            batch["style_parameters"] = torch.tensor(batch["facts"]["style_parameters"])
            if self.strip_style:
                batch["caption"] = grammar.strip_style(batch["caption"])
        return batch


def strip_style(caption: str) -> str:
    """A caption without words that name a medium, e.g. "a painting of a dog" -> "a dog"."""
    previous = None
    while previous != caption:  # "a picture of a painting of a dog"
        previous = caption
        caption = _LEADING_DASH.sub("", _INSIDE.sub("", _LEADING_OF.sub("", caption)))
    return caption.strip()
