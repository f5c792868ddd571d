"""Captions of rendered scenes and their tokens.

Apart from `world.py`, so that the processes that write them start without importing Lightning.
"""

from __future__ import annotations

import torch
from torch import Tensor


def write_captions(
    recipe: str, index: Tensor, split: str, seed: int, captions: int, tokenizer: str | None, twins: bool = False
) -> tuple[list[list[str]], dict[str, Tensor]]:
    """Several captions of each scene, and with a tokenizer folder their "tokens" (scenes x captions x L, int16).

    The first caption of a scene is always full, so that validation prompts say everything. With `twins` there are also
    "twin_tokens": the same captions, wrong in one fact.
    """
    from lit_gen.world.grammar import captions as write
    from lit_gen.world.sampling import sample
    from lit_gen.world.twins import twins as altered

    torch.set_num_threads(1)
    scenes = sample(recipe, split, seed, index)
    told = {"tokens": scenes} | ({"twin_tokens": altered(scenes, seed)} if twins else {})
    texts: dict[str, list[list[str]]] = {name: [[] for _ in range(len(index))] for name in told}
    for name, of in told.items():
        for version in range(captions):
            level = "mixed" if version else "full"
            for row, caption in zip(texts[name], write(of, level, seed=seed + version), strict=True):
                row.append(caption.text)
    if tokenizer is None:
        return texts["tokens"], {}
    from transformers import CLIPTokenizer

    tokenize = CLIPTokenizer.from_pretrained(tokenizer)
    tokens = {}
    for name, rows in texts.items():
        flat = [text for row in rows for text in row]
        ids = tokenize(flat, padding="max_length", truncation=True, return_tensors="pt").input_ids
        tokens[name] = ids.to(torch.int16).view(len(index), captions, -1)
    return texts["tokens"], tokens
