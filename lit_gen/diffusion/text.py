"""Prompts to text states."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen.errors import UserError

log = logging.getLogger(__name__)
_told: list[str] = []


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
