"""Shapes of the bundled base: ordinary diffusers and transformers classes at the size of the world."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

IMAGE_SIZE = 64
LATENT_CHANNELS = 8
LATENT_SIZE = 16
FRAMES = 8


def build_autoencoder(widths: tuple[int, ...] = (64, 128, 128), layers: int = 1) -> AutoencoderKL:
    """Images 3 x 64 x 64 to latents 8 x 16 x 16; three widths mean two halvings."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=min(32, min(widths)),
        sample_size=IMAGE_SIZE,
    )


def build_clip(
    vocabulary: int, tokens: int, end_token: int, width: int = 128, vision_width: int = 192, layers: int = 4
) -> CLIPModel:
    """Text and image towers whose pooled outputs are compared.

    The text tower's projection is the identity and stays so: a `CLIPTextModel` saved for a Stable Diffusion pipeline
    has no projection, and this way its pooled output is the text embedding all the same.
    """
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 32, 1),
        max_position_embeddings=tokens,
        bos_token_id=end_token - 1,
        eos_token_id=end_token,
        pad_token_id=end_token,
    )
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        projection_dim=width,
        num_hidden_layers=layers + 1,
        num_attention_heads=max(vision_width // 32, 1),
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=width))
    nn.init.eye_(model.text_projection.weight)
    model.text_projection.requires_grad_(False)
    return model


def build_unet(
    widths: tuple[int, ...] = (96, 160), layers: int = 1, text_width: int = 128, heads_of: int = 32
) -> UNet2DConditionModel:
    """Text-conditional noise predictor with cross-attention at every resolution."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        norm_num_groups=min(32, min(widths)),
        cross_attention_dim=text_width,
        # diffusers names the number of heads attention_head_dim
        attention_head_dim=tuple(max(w // heads_of, 1) for w in widths),
    )


def build_motion_adapter(unet: UNet2DConditionModel, heads: int = 4) -> MotionAdapter:
    """Temporal layers after every spatial block of `unet`, for clips of up to 32 frames."""
    config = unet.config
    return MotionAdapter(
        block_out_channels=tuple(config.block_out_channels),
        motion_layers_per_block=config.layers_per_block,
        motion_num_attention_heads=heads,
        motion_norm_num_groups=config.norm_num_groups,
        motion_max_seq_length=32,
        use_motion_mid_block=False,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x, predicting noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def save_base(
    folder: str | Path, parts: Mapping[str, Any], dtype: torch.dtype = torch.float16, file_size: str = "15MB"
) -> None:
    """Write a Stable Diffusion folder with the extra parts this project uses beside it.

    Args:
        folder: where to; created if missing.
        parts: tokenizer, clip (both encoders), text_encoder, image_encoder, vae, unet, scheduler, motion_adapter and
            feature_extractor; what is not given is left as it is.
        dtype: of the weights on disk.
        file_size: at most; by default small enough for a repository.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        if name == "clip":
            _save_clip(folder, part, dtype)
        elif name in ("text_encoder", "image_encoder"):
            _save_tower(folder / name, part, dtype)
        elif isinstance(part, nn.Module):
            _cast(part, dtype).save_pretrained(folder / name, max_shard_size=file_size)
        else:
            part.save_pretrained(folder / name)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.40.0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save_clip(folder: Path, clip: CLIPModel, dtype: torch.dtype) -> None:
    from transformers import CLIPTextModel, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    vision = CLIPVisionModelWithProjection(clip.config.vision_config)
    vision.vision_model.load_state_dict(clip.vision_model.state_dict())
    vision.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    for name, tower in (("text_encoder", text), ("image_encoder", vision)):
        _save_tower(folder / name, tower, dtype)
    size = {"shortest_edge": IMAGE_SIZE}
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size=size, crop_size=crop).save_pretrained(folder / "feature_extractor")


def _save_tower(folder: Path, tower: nn.Module, dtype: torch.dtype) -> None:
    _cast(tower, dtype).save_pretrained(folder)
    # transformers loads in the dtype that the config names, diffusers in float32: a pipeline needs one of them
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    import copy

    return copy.deepcopy(module).to("cpu", dtype)
