"""Captions of rendered scenes and their tokens.

Apart from `world.py`, so that the processes that write them start without importing Lightning.
"""

from __future__ import annotations

import torch
from torch import Tensor


def write_captions(
    recipe: str, index: Tensor, split: str, seed: int, captions: int, tokenizer: str | None
) -> tuple[list[list[str]], Tensor | None]:
    """Several captions of each scene, and with a tokenizer folder their tokens (scenes x captions x L, int16).

    The first caption of a scene is always full, so that validation prompts say everything.
    """
    from lit_gen.world.grammar import captions as write
    from lit_gen.world.sampling import sample

    torch.set_num_threads(1)
    scenes = sample(recipe, split, seed, index)
    texts: list[list[str]] = [[] for _ in range(len(index))]
    for version in range(captions):
        level = "mixed" if version else "full"
        for row, caption in zip(texts, write(scenes, level, seed=seed + version), strict=True):
            row.append(caption.text)
    if tokenizer is None:
        return texts, None
    from transformers import CLIPTokenizer

    tokenize = CLIPTokenizer.from_pretrained(tokenizer)
    flat = [text for row in texts for text in row]
    tokens = tokenize(flat, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return texts, tokens.to(torch.int16).view(len(index), captions, -1)
