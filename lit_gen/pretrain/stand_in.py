"""Bases with random weights: a tiny one for tests, and one of real size to measure speed and memory with.

python -m lit_gen.pretrain.stand_in FOLDER     # 4.3 GB
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

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


def sd15_parts() -> dict[str, Callable[[], nn.Module]]:
    """What builds the networks of Stable Diffusion 1.5, AnimateDiff's v1-5-2 motion modules and CLIP ViT-H/14."""
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    vision = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
        projection_dim=1024, hidden_act="gelu",
    )  # fmt: skip
    return {
        "text_encoder": lambda: CLIPTextModel(text),
        "image_encoder": lambda: CLIPVisionModelWithProjection(vision),
        "vae": lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
        ),
        "unet": lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        "motion_adapter": lambda: MotionAdapter(use_motion_mid_block=True, motion_max_seq_length=32),
    }


def write_sd15(folder: str | Path, seed: int = 0) -> Path:
    """Write a base of `sd15_parts` with random weights in float16, drawn on a GPU where there is one.

    The tokenizer is the world's, whose words lie in the first rows of the text encoder's vocabulary.
    """
    from lit_gen.world.grammar import vocabulary_words

    torch.manual_seed(seed)
    tokenizer = build_tokenizer(vocabulary_words())
    given = {"tokenizer": tokenizer, "scheduler": build_scheduler(), "feature_extractor": CLIPImageProcessorPil()}
    save_base(folder, given)
    for name, build in sd15_parts().items():  # one at a time, since all of them are nine gigabytes
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            part = build()
        save_base(folder, {name: part}, file_size="5GB")
        print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:.0f} million random weights", flush=True)
    return Path(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m lit_gen.pretrain.stand_in FOLDER")
    write_sd15(sys.argv[1])
