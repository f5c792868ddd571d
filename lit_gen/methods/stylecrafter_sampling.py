"""Guidance by text and style at separate scales (StyleCrafter Eq. 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_gen.diffusion.attention import Style
from lit_gen.diffusion.sampling import Denoise, classifier_free, two_scale
from lit_gen.diffusion.text import TextCondition

Network = Callable[[Tensor, Tensor, TextCondition, Style | None], Tensor]  # noisy, t, text, style -> output


@dataclass
class Sampling:
    """How pictures and clips are drawn.

    Args:
        steps: DDIM steps; 50 in the released code.
        eta: 0 deterministic, 1 as noisy as DDPM and the released code.
        text_scale: guidance towards the prompt, l_t of Eq. 2; the paper's 7.5 is of pictures, 15 of clips.
        style_scale: guidance towards the style, l_s of Eq. 2; the paper's 5 is of pictures, 7.5 of clips.
        guidance: "paper" is Eq. 2; "released" is what the released video sampler computes, which starts from
            e(c_t, c_s) instead of e(0) and so acts as Eq. 2 with 1 more in both scales.
        size: height and width in pixels; by default the base's own (VideoCrafter1's clips: [320, 512]).
    """

    steps: int = 50
    eta: float = 1.0
    text_scale: float = 7.5
    style_scale: float = 5.0
    guidance: Literal["paper", "released"] = "paper"
    size: tuple[int, int] | None = None


def guided(network: Network, null: TextCondition, text: TextCondition, style: Style | None, how: Sampling) -> Denoise:
    """Guided network output; all terms of Eq. 2 go through the network as one batch.

    Args:
        network: what predicts the noise of B samples.
        null: unconditional text of B samples.
        text: of the prompts.
        style: of the references, or None for guidance by text alone.
        how: the scales.
    """
    more = 1.0 if how.guidance == "released" and style is not None else 0.0  # StyleCrafter card 7.4.1
    text_scale, style_scale = how.text_scale + more, how.style_scale + more
    # With equal scales e(c_t) falls out of Eq. 2, and with it a third of the work.
    joint = style is None or text_scale == style_scale
    told = TextCondition.cat([null, text] if joint else [null, text, text])
    terms = len(told) // len(text)
    styles = None if style is None else Style.cat([style.null()] * (terms - 1) + [style])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        outputs = network(torch.cat([x] * terms), torch.cat([t] * terms), told, styles).chunk(terms)
        return classifier_free(*outputs, text_scale) if joint else two_scale(*outputs, text_scale, style_scale)

    return denoise
