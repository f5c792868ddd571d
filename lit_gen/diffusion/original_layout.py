"""Diffusers models in the key layout of the original checkpoints: Stable Diffusion 1.x, 2.x and XL, and VideoCrafter1.

What the layouts have in common: `model.diffusion_model.*` is the UNet with flat `input_blocks`, `middle_block` and
`output_blocks`, `first_stage_model.*` the autoencoder, `cond_stage_model.*` or `conditioner.*` the text encoders.
Reading plain Stable Diffusion is diffusers' part; this file writes all of them and reads VideoCrafter1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_gen.diffusion.videocrafter import INIT, TemporalLayers
from lit_gen.errors import UserError
from lit_gen.weights import read_torch

UNET = "model.diffusion_model."
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# What checkpoints of the LVDM code also hold and a model does not need: the schedule, which its config repeats, and of
# OpenCLIP what comes after the penultimate block.
_SCHEDULE = re.compile(
    r"(betas|alphas_cumprod(_prev)?|sqrt_(one_minus_|recip_|recipm1_)?alphas_cumprod|log_one_minus_alphas_cumprod"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar|scale_factor|scale_arr)"
)
_OPEN_CLIP_REST = r"cond_stage_model\.model\.(text_projection|logit_scale|attn_mask|transformer\.resblocks\.{last}\..*)"


# -- names ------------------------------------------------------------------------------------------------------------


def original_name(name: str, layers: int) -> str:
    """Name of a UNet's module or parameter in the original layout, without its prefix.

    Args:
        name: diffusers' name, e.g. "up_blocks.1.attentions.0.proj_in.weight".
        layers: the UNet's layers_per_block.
    """
    down = re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)(.*)", name)
    up = re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)(.*)", name)
    if down:
        block, kind, j, rest = int(down[1]), down[2], int(down[3]), down[4]
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (block + 1)}.0{rest.replace('conv', 'op')}"
        name = f"input_blocks.{(layers + 1) * block + j + 1}.{int(kind == 'attentions')}{rest}"
    elif up:
        block, kind, j, rest = int(up[1]), up[2], int(up[3]), up[4]
        if kind == "upsamplers":  # the last of its block, where unet_keys counts on
            return f"output_blocks.{(layers + 1) * block + layers}.1{rest}"
        name = f"output_blocks.{(layers + 1) * block + j}.{int(kind == 'attentions')}{rest}"
    for theirs, original in _UNET.items():
        name = re.sub(rf"^{re.escape(theirs)}(?=\.|$)", original, name)
    if "transformer_blocks" not in name:
        for theirs, original in _RESNET.items():
            name = name.replace(f".{theirs}.", f".{original}.")
    return name


def temporal_name(place: str, layers: int) -> str:
    """Name of VideoCrafter1's temporal layer behind a spatial transformer, e.g. "input_blocks.1.2"."""
    return "init_attn.0" if place == INIT else original_name(place, layers).removesuffix("1") + "2"


def unet_keys(unet: nn.Module, temporal: TemporalLayers | None = None) -> dict[str, Tensor]:
    """`model.diffusion_model.*`, with the temporal layers of VideoCrafter1 if they are given."""
    layers, state = unet.config.layers_per_block, unet.state_dict()
    attended = {".".join(name.split(".")[:2]) for name in state if ".attentions." in name}
    keys = {}
    for name, value in state.items():
        original, block = original_name(name, layers), ".".join(name.split(".")[:2])
        if ".upsamplers." in name and block in attended:
            original = original.replace(".1.conv.", f".{2 + (temporal is not None)}.conv.")
        if temporal is not None:
            original = re.sub(r"^middle_block\.2\.", "middle_block.3.", original)
        keys[UNET + original] = value
    if temporal is not None:
        for place in temporal.config.places:
            name = UNET + temporal_name(place, temporal.config.layers_per_block)
            keys |= {f"{name}.{k}": v for k, v in temporal[place].state_dict().items()}
    return keys


def vae_keys(vae: nn.Module) -> dict[str, Tensor]:
    """`first_stage_model.*`"""
    count = len(vae.config.block_out_channels)
    state = {}
    for key, value in vae.state_dict().items():
        key = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{count - 1 - int(m[1])}.block.", key)
        key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{count - 1 - int(m[1])}.upsample", key)
        for theirs, original in _VAE.items():
            key = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\1{original}.", key)
        if "mid.attn_1" in key and value.ndim == 2:
            value = value[:, :, None, None]  # the original's attention projections are 1x1 convolutions
        state[f"first_stage_model.{key}"] = value.contiguous()
    return state


def clip_keys(text_encoder: nn.Module, prefix: str = "cond_stage_model.transformer.") -> dict[str, Tensor]:
    """`cond_stage_model.transformer.*` of Stable Diffusion 1.x; XL: `conditioner.embedders.0.transformer.*`."""
    state = text_encoder.state_dict()
    return {f"{prefix}text_model.{k.removeprefix('text_model.')}": v for k, v in state.items()}


def open_clip_keys(text_encoder: nn.Module, prefix: str = "cond_stage_model.model.") -> dict[str, Tensor]:
    """`cond_stage_model.model.*` of Stable Diffusion 2.x; XL: `conditioner.embedders.1.model.*`."""
    source = {k.removeprefix("text_model."): v for k, v in text_encoder.state_dict().items()}
    state = {}
    for key, value in source.items():
        if key == "text_projection.weight":
            state[f"{prefix}text_projection"] = value.T.contiguous()
            continue
        key = key.replace("embeddings.token_embedding", "token_embedding").replace("final_layer_norm", "ln_final")
        key = key.replace("embeddings.position_embedding.weight", "positional_embedding")
        key = key.replace("encoder.layers.", "transformer.resblocks.")
        for theirs, original in _OPEN_CLIP.items():
            key = key.replace(theirs, original)
        if not re.search(r"\.self_attn\.[qkv]_proj", key):
            state[prefix + key] = value
    for layer in range(text_encoder.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [source[f"encoder.layers.{layer}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            state[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return state


# -- files ------------------------------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> dict[str, Any]:
    """What a `.safetensors` or pickled file of weights holds, unwrapped from `state_dict`; no code in it is run.

    Tensors of pickled files come from the disk when they are used.

    Raises:
        UserError: no such file, or one that holds anything but weights.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    if Path(path).suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged, or not a safetensors file ({error})") from error
    state = read_torch(path, lazily=True)
    while isinstance(state, dict) and "state_dict" in state:
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: holds no weights by name")
    return state


def weight_names(path: str | Path) -> set[str]:
    """Names of the weights in a file, which stay on the disk.

    Raises:
        UserError: as `read_weights`.
    """
    if Path(path).suffix != ".safetensors":
        return set(read_weights(path))
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged, or not a safetensors file ({error})") from error


def require_same(given: Mapping[str, Any], wanted: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are not exactly those of a model.

    Args:
        given: weights by name.
        wanted: tensors of the shapes that are to be there, by name.
        what: they are, for the message.

    Raises:
        UserError: some are missing, unknown or of another shape; how many of each, and the first few.
    """
    shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in given.items()}
    wrong = [k for k in wanted if k in given and shapes[k] != tuple(wanted[k].shape)]
    problems = [
        _first_few("missing", [k for k in wanted if k not in given]),
        _first_few("unknown", [k for k in given if k not in wanted]),
        _first_few("of another shape", [f"{k} {shapes[k]} for {tuple(wanted[k].shape)}" for k in wrong]),
    ]
    if any(problems):
        raise UserError(f"{what}: " + "; ".join(filter(None, problems)))


def _first_few(kind: str, names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    rest = ", ..." if len(names) > most else ""
    return f"{len(names)} {kind} ({', '.join(names[:most])}{rest})" if names else ""


# -- VideoCrafter1 ----------------------------------------------------------------------------------------------------


def is_sdxl(names: Iterable[str]) -> bool:
    """Whether keys of a checkpoint are those of a Stable Diffusion XL base."""
    return any(name.startswith("conditioner.embedders.1.") for name in names)


def is_videocrafter(names: Iterable[str]) -> bool:
    """Whether keys of a checkpoint are those of a VideoCrafter1 base."""
    return f"{UNET}init_attn.0.proj_in.weight" in set(names)


def videocrafter_scheduler() -> DDIMScheduler:
    """VideoCrafter1's noise schedule and the steps its sampler takes (StyleCrafter card 5)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


def videocrafter_keys(
    unet: nn.Module, temporal: TemporalLayers, vae: nn.Module, text_encoder: nn.Module
) -> dict[str, Tensor]:
    """A VideoCrafter1 base checkpoint's weights; `torch.save({"state_dict": ...})` of it is one."""
    return unet_keys(unet, temporal) | vae_keys(vae) | open_clip_keys(text_encoder)


def read_videocrafter(
    state: Mapping[str, Tensor],
    unet: nn.Module,
    temporal: TemporalLayers,
    vae: nn.Module,
    text_encoder: nn.Module,
    what: str,
) -> None:
    """Fill the parts of a base with the weights of a VideoCrafter1 checkpoint.

    Args:
        state: the checkpoint.
        unet, temporal, vae, text_encoder: the parts, of the checkpoint's size.
        what: the checkpoint is, for error messages.

    Raises:
        UserError: its weights are not exactly those of the parts.
    """
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_open_clip_checkpoint,
    )

    rest = re.compile(_OPEN_CLIP_REST.format(last=text_encoder.config.num_hidden_layers))
    state = {k: v for k, v in state.items() if not _SCHEDULE.fullmatch(k) and not rest.fullmatch(k)}
    require_same(state, videocrafter_keys(unet, temporal, vae, text_encoder), what)
    for place in temporal.config.places:
        name = f"{UNET}{temporal_name(place, temporal.config.layers_per_block)}."
        temporal[place].load_state_dict({k.removeprefix(name): state.pop(k) for k in [*state] if k.startswith(name)})
    # without them the UNet is one of Stable Diffusion 2.x, whose middle and upsampling layers come one place earlier
    flat = {re.sub(r"(middle_block)\.3\.|(output_blocks\.\d+)\.3\.", _one_earlier, k): v for k, v in state.items()}
    unet.load_state_dict(convert_ldm_unet_checkpoint(flat, unet.config))
    vae.load_state_dict(convert_ldm_vae_checkpoint(flat, vae.config))
    text = convert_open_clip_checkpoint(text_encoder, flat)
    wrapped = hasattr(text_encoder, "text_model")
    text_encoder.load_state_dict({k if wrapped else k.removeprefix("text_model."): v for k, v in text.items()})


def _one_earlier(match: re.Match[str]) -> str:
    return f"{match[1] or match[2]}.2."
