"""The pictures that samples take their style from, as the style adapter reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen.diffusion.image_prompt import encode_image, resized

Pictures = Tensor | Sequence[Tensor]


@dataclass
class References:
    """CLIP tokens of the references of B samples.

    Args:
        tokens: B N W, those of several references one after the other.
        padding: B N, True where a token is none, as samples may have different numbers of references.
        given: B, which samples have any; None for all.
    """

    tokens: Tensor
    padding: Tensor | None = None
    given: Tensor | None = None

    def expand(self, batch: int) -> References:
        """The references of one sample for a batch."""
        parts = (self.tokens, self.padding, self.given)
        return References(*(None if x is None else x.expand(batch, *x.shape[1:]) for x in parts))


@torch.no_grad()
def read(encoder: nn.Module, processor: Any, pictures: Pictures, layer: int) -> References:
    """Encode each reference once.

    Args:
        encoder, processor, layer: as of `encode_image`.
        pictures: B 3 h w in [-1, 1]; B N 3 h w, N references each; or for each sample its own N 3 h w, where N may
            differ and may be 0, as may h and w.
    """
    if isinstance(pictures, Tensor) and pictures.ndim == 4:
        pictures = pictures[:, None]
    if isinstance(pictures, Tensor):
        counts, images = [pictures.shape[1]] * len(pictures), pictures.flatten(0, 1)
    else:
        counts, side = [len(own) for own in pictures], encoder.config.image_size
        images = torch.cat([resized(own, side) for own in pictures if len(own)] or [torch.empty(0)])
    if not any(counts):  # any token will do where none is looked at
        none = torch.zeros(len(counts), 1, encoder.config.hidden_size, device=encoder.device)
        return References(none, given=torch.zeros(len(counts), dtype=torch.bool, device=encoder.device))
    tokens = encode_image(encoder, processor, images, layer)  # of all, one after the other: sum(N) T W
    given = None if all(counts) else torch.tensor([count > 0 for count in counts], device=tokens.device)
    if len(set(counts)) == 1:
        return References(tokens.unflatten(0, (len(counts), -1)).flatten(1, 2), given=given)
    parts = [own.flatten(0, 1) for own in tokens.split(counts)]
    padding = torch.arange(max(map(len, parts)), device=tokens.device)
    padding = padding >= torch.tensor([len(own) for own in parts], device=tokens.device)[:, None]
    return References(nn.utils.rnn.pad_sequence(parts, batch_first=True), padding, given)
