"""Style samples: (reference, target, caption) cut from one stylised picture, what StyleCrafter trains on.

Reference and target are different crops of the same picture, so that the reference shares the style but not the layout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from lit_gen.data.decode import IMAGE
from lit_gen.data.images import centre_crop, encoded, member, resize_short_side, said, to_tensor
from lit_gen.world import grammar

Rules = Literal["paper", "careful", "none"]

_MEDIUM = (
    r"(?:digital art|black and white photograph|photograph|painting|drawing|mural|artwork|view|portrait|photo"
    r"|watercolou?r|illustration|picture)"
)
# What StyleCrafter removes from captions so that they do not tell the style (paper, supplement; released SDXL code): a
# leading "(a) ... MEDIUM of", any "in (a) ... MEDIUM", a leading "MEDIUM - ", whatever is between.
_PAPER = (
    rf"^(?:an? )?(?:.*? )??{_MEDIUM} of ",
    rf",? in (?:an? )?(?:.*? )??{_MEDIUM}\b",
    r"^(?:painting|(?:black and white )?photograph|digital art) - ",
)
# Ours: what is between only describes the medium. A word that begins another phrase ("a room with a view of") ends it,
# and a medium before an article is a verb ("in a red hat painting a wall").
_BEGINS = (
    "a|an|the|his|her|their|its|my|your|our|this|that|these|those|which|who|is|are|was|has|have|with|without|of|in|on"
    "|at|by|from|to|into|near|over|under|above|below|beside|behind|before|between|through|against|around|for|as|like"
    "|while|holding|looking|next|front|inside|outside"
)
_DESCRIBES = rf"(?:(?!(?:{_BEGINS})\b)[\w'-]+,? )*?"
_CAREFUL = (
    rf"^(?:(?:an?|the) )?{_DESCRIBES}{_MEDIUM} of ",
    rf",? in (?:(?:an?|the) )?{_DESCRIBES}{_MEDIUM}\b(?! (?:an?|the|his|her|their|its) )",
    rf"^{_MEDIUM} - ",
)
_RULES: dict[str, list[re.Pattern[str]]] = {
    name: [re.compile(pattern, re.IGNORECASE) for pattern in patterns]
    for name, patterns in {"paper": _PAPER, "careful": _CAREFUL, "none": ()}.items()
}


@dataclass
class StyleSample:
    """Target: centre crop, or of a cached set its encodings. Reference: random crop of the picture, `zoom` as large."""

    size: int = 64  # pixels of target and reference, height and width
    zoom: float = 800 / 512  # short side of the picture the reference is cropped from, in units of `size`; 1: no crop
    strip_style: Rules = "careful"  # by which words that tell the style are removed from captions

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
        batch["caption"] = strip_style(batch["caption"], self.strip_style)
        if "style_parameters" in batch["facts"]:  # a picture of the world
            batch["style_parameters"] = torch.tensor(batch["facts"]["style_parameters"])
            if self.strip_style != "none":
                batch["caption"] = grammar.strip_style(batch["caption"])
        return batch


def rules_of(setting: Rules | bool) -> Rules:
    """The rules that a setting names; true and false are "careful" and "none"."""
    return {True: "careful", False: "none"}[setting] if isinstance(setting, bool) else setting


def strip_style(caption: str, rules: Rules = "careful") -> str:
    """A caption without words that name a medium, e.g. "a painting of a dog" -> "a dog"."""
    previous = None
    while previous != caption:  # "a picture of a painting of a dog"
        previous = caption
        for pattern in _RULES[rules]:
            caption = pattern.sub("", caption)
    return caption.strip()
