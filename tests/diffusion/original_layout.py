"""Diffusers models in the key layout of the original Stable Diffusion checkpoints, for tests of reading them."""

import re

import torch
from torch import Tensor, nn

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


def unet_keys(unet: nn.Module) -> dict[str, Tensor]:
    """`model.diffusion_model.*`"""
    layers = unet.config.layers_per_block
    return {f"model.diffusion_model.{_unet_key(k, layers)}": v for k, v in unet.state_dict().items()}


def _unet_key(key: str, layers: int) -> str:
    down = re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.*)", key)
    up = re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.*)", key)
    if down:
        block, kind, j, rest = int(down[1]), down[2], int(down[3]), down[4]
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (block + 1)}.0.{rest.replace('conv', 'op')}"
        key = f"input_blocks.{(layers + 1) * block + j + 1}.{int(kind == 'attentions')}.{rest}"
    elif up:
        block, kind, j, rest = int(up[1]), up[2], int(up[3]), up[4]
        if kind == "upsamplers":
            return f"output_blocks.{(layers + 1) * block + layers}.2.{rest}"
        key = f"output_blocks.{(layers + 1) * block + j}.{int(kind == 'attentions')}.{rest}"
    for theirs, original in _UNET.items():
        key = re.sub(rf"^{re.escape(theirs)}\.", f"{original}.", key)
    if "transformer_blocks" not in key:
        for theirs, original in _RESNET.items():
            key = key.replace(f".{theirs}.", f".{original}.")
    return key


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


def clip_keys(text_encoder: nn.Module) -> dict[str, Tensor]:
    """`cond_stage_model.transformer.*` of Stable Diffusion 1.x."""
    return {f"cond_stage_model.transformer.text_model.{k}": v for k, v in text_encoder.state_dict().items()}


def open_clip_keys(text_encoder: nn.Module) -> dict[str, Tensor]:
    """`cond_stage_model.model.*` of Stable Diffusion 2.x."""
    source, state = text_encoder.state_dict(), {}
    for key, value in source.items():
        key = key.replace("embeddings.token_embedding", "token_embedding").replace("final_layer_norm", "ln_final")
        key = key.replace("embeddings.position_embedding.weight", "positional_embedding")
        key = key.replace("encoder.layers.", "transformer.resblocks.")
        for theirs, original in _OPEN_CLIP.items():
            key = key.replace(theirs, original)
        if not re.search(r"\.self_attn\.[qkv]_proj", key):
            state[f"cond_stage_model.model.{key}"] = value
    for layer in range(text_encoder.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [source[f"encoder.layers.{layer}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            state[f"cond_stage_model.model.transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return state
