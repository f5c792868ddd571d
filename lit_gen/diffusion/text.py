"""Prompts to text states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen.errors import UserError

log = logging.getLogger(__name__)
_told: list[str] = []


@dataclass
class TextCondition:
    """What a UNet is told of B prompts.

    Args:
        states: of the text encoders, B L D.
        added: what SDXL's UNet also reads, by name, each B ...; None for other UNets.
    """

    states: Tensor
    added: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.states)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a diffusers UNet."""
        added = {} if self.added is None else {"added_cond_kwargs": self.added}
        return {"encoder_hidden_states": self.states, **added}

    def expand(self, batch: int) -> TextCondition:
        """The condition of one prompt for a batch."""
        return self._each(lambda x: x.expand(batch, *x.shape[1:]))

    def repeat_frames(self, frames: int) -> TextCondition:
        """B clips to B*F frames, b-major like the latents inside a motion UNet."""
        return self._each(lambda x: x.repeat_interleave(frames, 0))

    def where(self, keep: Tensor, other: TextCondition) -> TextCondition:
        """Of B samples the own condition where `keep` (B, bool) is true, else that of `other`."""

        def choose(own: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(keep.view(-1, *[1] * (own.ndim - 1)), own, theirs.to(own.dtype))

        added = None if self.added is None else {name: choose(x, other.added[name]) for name, x in self.added.items()}
        return TextCondition(choose(self.states, other.states), added)

    @staticmethod
    def cat(parts: Sequence[TextCondition]) -> TextCondition:
        names = parts[0].added
        added = None if names is None else {k: torch.cat([part.added[k] for part in parts]) for k in names}
        return TextCondition(torch.cat([part.states for part in parts]), added)

    def _each(self, change: Callable[[Tensor], Tensor]) -> TextCondition:
        added = None if self.added is None else {name: change(x) for name, x in self.added.items()}
        return TextCondition(change(self.states), added)


def tokenize(tokenizer: Any, prompts: Sequence[str], strict: bool = False) -> Tensor:
    """Token ids [B L], L the tokenizer's length; longer prompts are cut with a warning, or refused if `strict`.

    Raises:
        UserError: a prompt is too long and `strict` is set.
    """
    length = tokenizer.model_max_length
    ids = tokenizer(list(prompts), padding="max_length", max_length=length).input_ids
    too_long = [(prompt, len(row) - 2) for prompt, row in zip(prompts, ids, strict=True) if len(row) > length]
    for prompt, count in too_long:
        message = f"prompt of {count} tokens is longer than the {length - 2} this base reads: {prompt!r}"
        if strict:
            raise UserError(message)
        if not _told:  # once: a data set may have thousands
            log.warning("%s; the rest is cut off, here and in other prompts", message)
            _told.append(message)
    # the end token stays the last one, as truncation by the tokenizer itself would leave it
    return torch.tensor([row if len(row) == length else [*row[: length - 1], row[-1]] for row in ids])


@torch.no_grad()
def encode_text(tokenizer: Any, text_encoder: nn.Module, prompts: Sequence[str], strict: bool = False) -> Tensor:
    """Text states [B L D] as the UNet's cross-attention reads them."""
    ids = tokenize(tokenizer, prompts, strict)
    return text_encoder(ids.to(text_encoder.device)).last_hidden_state


@torch.no_grad()
def encode_text_twice(
    tokenizers: Sequence[Any], text_encoders: Sequence[nn.Module], prompts: Sequence[str], strict: bool = False
) -> tuple[Tensor, Tensor]:
    """SDXL's text states [B L D] and its pooled text embedding [B P] of the second encoder.

    The states are those before each encoder's last block and without its final norm, side by side.
    """
    states, pooled = [], None
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        output = encoder(tokenize(tokenizer, prompts, strict).to(encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]
    return torch.cat(states, dim=-1), pooled
