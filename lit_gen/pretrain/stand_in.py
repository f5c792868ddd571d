"""A tiny base with random weights, for tests and for trying a pipeline before a real base exists."""

from __future__ import annotations

from pathlib import Path

import torch

from lit_gen.pretrain.architecture import (
    build_autoencoder,
    build_clip,
    build_motion_adapter,
    build_scheduler,
    build_unet,
    save_base,
)
from lit_gen.pretrain.tokenizer import build_tokenizer


def write_stand_in(folder: str | Path, seed: int = 0, words: list[str] | None = None) -> Path:
    """Write a base of about a hundred thousand parameters in the layout of the bundled one.

    Args:
        folder: where to.
        seed: of the random weights.
        words: vocabulary; the world's grammar by default.
    """
    if words is None:
        from lit_gen.world.grammar import vocabulary_words

        words = vocabulary_words()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(words)
        unet = build_unet(widths=(16, 32), text_width=32, heads_of=16)
        parts = {
            "tokenizer": tokenizer,
            "clip": build_clip(len(tokenizer), tokenizer.model_max_length, tokenizer.eos_token_id, 32, 32, 1),
            "vae": build_autoencoder(widths=(8, 16, 16)),
            "unet": unet,
            "scheduler": build_scheduler(),
            "motion_adapter": build_motion_adapter(unet, heads=2),
        }
    save_base(folder, parts, dtype=torch.float32)
    return Path(folder)
