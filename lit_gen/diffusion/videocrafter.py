"""VideoCrafter1's temporal layers (arXiv 2310.19512) over the spatial layers of a Stable-Diffusion-2.x UNet.

Each layer is a transformer with two self-attentions over the frames of every position, which know how far apart two
frames are by learned keys and values (relative positions, arXiv 1803.02155). One stands behind `conv_in` ("init_attn"),
one behind every spatial transformer. Parameter names inside a layer are those of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INIT = "init_attn"
INIT_HEADS = 8  # whatever the width, as in the released code


class RelativePosition(nn.Module):
    """A learned vector for each distance between two frames, clipped to `reach`.

    Args:
        width: of the vectors.
        reach: largest distance that is told apart; 16 in the released model, hence its tables of 33 rows.
    """

    def __init__(self, width: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.embeddings_table = nn.Parameter(torch.empty(2 * reach + 1, width))
        nn.init.xavier_uniform_(self.embeddings_table)

    def forward(self, frames: int) -> Tensor:
        """F F d; [t, s] is the vector of frame s as seen from frame t."""
        frame = torch.arange(frames, device=self.embeddings_table.device)
        distance = (frame[None] - frame[:, None]).clamp(-self.reach, self.reach)
        return self.embeddings_table[distance + self.reach]


class RelativeAttention(nn.Module):
    """Self-attention over frames whose keys and values also depend on the distance between them.

    Args:
        width: of the input and the output.
        heads, head_dim: of the attention.
        reach: of the relative positions.
    """

    def __init__(self, width: int, heads: int, head_dim: int, reach: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width))
        self.relative_position_k = RelativePosition(head_dim, reach)
        self.relative_position_v = RelativePosition(head_dim, reach)

    def forward(self, x: Tensor) -> Tensor:
        """x N F C -> N F C"""
        split = (projection(x).unflatten(-1, (self.heads, -1)) for projection in (self.to_q, self.to_k, self.to_v))
        query, key, value = (part.transpose(1, 2) for part in split)  # N heads F d
        far_key, far_value = self.relative_position_k(x.shape[1]), self.relative_position_v(x.shape[1])  # F F d
        logits = query @ key.transpose(-1, -2) + torch.einsum("nhtd,tsd->nhts", query, far_key)
        weights = (logits * query.shape[-1] ** -0.5).softmax(-1).to(value.dtype)  # N heads F F
        out = weights @ value + torch.einsum("nhts,tsd->nhtd", weights, far_value)
        return self.to_out(out.transpose(1, 2).flatten(2))


class TemporalBlock(nn.Module):
    """Pre-norm transformer block of two temporal self-attentions and a GEGLU MLP."""

    def __init__(self, width: int, heads: int, head_dim: int, reach: int) -> None:
        super().__init__()
        self.attn1 = RelativeAttention(width, heads, head_dim, reach)
        self.attn2 = RelativeAttention(width, heads, head_dim, reach)
        self.ff = FeedForward(width, activation_fn="geglu")
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """x N F C -> N F C"""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x))
        return x + self.ff(self.norm3(x))


class Pointwise(nn.Conv1d):
    """A linear layer with the weight shape (out, in, 1) of the Conv1d that the released `init_attn` has."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """x N F C -> N F D"""
        return F.linear(x, self.weight[..., 0], self.bias)


class TemporalTransformer(nn.Module):
    """What the frames of a clip tell each other, position by position; the identity until it is trained.

    Args:
        channels: of the feature maps.
        heads, head_dim: of the attention, heads x head_dim wide.
        reach: of the relative positions.
        groups: of the norm.
        linear: whether the projections are linear layers, or 1-wide convolutions.
    """

    def __init__(self, channels: int, heads: int, head_dim: int, reach: int, groups: int, linear: bool) -> None:
        super().__init__()
        inner, projection = heads * head_dim, nn.Linear if linear else Pointwise
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, inner)
        self.transformer_blocks = nn.ModuleList([TemporalBlock(inner, heads, head_dim, reach)])
        self.proj_out = projection(inner, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x (B F) C h w, b-major -> the same shape"""
        height, width = x.shape[-2:]
        clips = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(2)  # B C (F h w): the norm is over whole clips
        y = self.norm(clips).unflatten(2, (frames, -1)).permute(0, 3, 2, 1).flatten(0, 1)  # (B h w) F C
        y = self.proj_in(y)
        for block in self.transformer_blocks:
            y = block(y)
        y = self.proj_out(y).unflatten(0, (len(clips), -1)).permute(0, 2, 3, 1)  # B F C (h w)
        return x + y.flatten(0, 1).unflatten(2, (height, width))


class TemporalLayers(ModelMixin, ConfigMixin):
    """All temporal layers of a UNet by the place they stand behind; saved and loaded like any diffusers model.

    Args:
        places: [channels, heads, head_dim] of each layer by its place, "init_attn" or the name of a spatial
            transformer in diffusers' UNet ("down_blocks.0.attentions.0").
        layers_per_block: of the UNet; what the released checkpoints call a place depends on it.
        reach: of the relative positions; the clip length the model is trained for (16).
        groups: of the norms.
        linear: whether projections are linear layers, as the UNet's; those of init_attn are convolutions anyway.
    """

    @register_to_config
    def __init__(
        self,
        places: dict[str, list[int]],
        layers_per_block: int = 2,
        reach: int = 16,
        groups: int = 32,
        linear: bool = True,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                # a module's name has no dots
                place.replace(".", "_"): TemporalTransformer(*places[place], reach, groups, linear and place != INIT)
                for place in sorted(places, key=_execution)
            }
        )

    @classmethod
    def for_unet(cls, unet: UNet2DConditionModel, reach: int = 16) -> TemporalLayers:
        """Fresh layers that fit `unet`, where they change nothing until they are trained."""
        return cls(
            places=cls.places_of(unet),
            layers_per_block=unet.config.layers_per_block,
            reach=reach,
            groups=unet.config.norm_num_groups,
            linear=bool(unet.config.use_linear_projection),
        )

    @staticmethod
    def places_of(unet: UNet2DConditionModel) -> dict[str, list[int]]:
        """[channels, heads, head_dim] of the temporal layer behind each place of `unet`."""
        sizes = {place: _sizes(attention) for place, attention in spatial_transformers(unet)}
        first = next(iter(sizes.values()))
        return {INIT: [unet.config.block_out_channels[0], INIT_HEADS, first[2]], **sizes}

    def __getitem__(self, place: str) -> TemporalTransformer:
        return self.layers[place.replace(".", "_")]


def _execution(place: str) -> tuple[int, str]:
    # one order wherever the places come from: a saved config has them by the alphabet
    return (INIT, "down_blocks", "mid_block", "up_blocks").index(place.split(".")[0]), place


def spatial_transformers(unet: UNet2DConditionModel) -> Iterator[tuple[str, nn.Module]]:
    """(name, transformer) of every spatial transformer, in the order the UNet executes them (down, mid, up)."""
    for blocks in ("down_blocks", "mid_block", "up_blocks"):
        for name, module in getattr(unet, blocks).named_modules(prefix=blocks):
            if name.split(".")[-2:-1] == ["attentions"]:
                yield name, module


def _sizes(attention: nn.Module) -> list[int]:
    """[channels, heads, head_dim] of a spatial transformer; diffusers' config calls the heads attention_head_dim."""
    inner = attention.transformer_blocks[0].attn1
    return [attention.config.in_channels, inner.heads, inner.to_q.out_features // inner.heads]


class VideoUNet(nn.Module):
    """A UNet for clips: the spatial layers *are* those of `unet`, the temporal ones stand between them.

    Called like diffusers' UNetMotionModel. Pictures go through `unet` itself and truly skip the temporal layers.

    Args:
        unet: whose spatial layers are shared.
        layers: temporal layers that fit it.
    """

    def __init__(self, unet: UNet2DConditionModel, layers: TemporalLayers) -> None:
        super().__init__()
        self.unet, self.motion_modules = unet, layers
        self.gradient_checkpointing = False

    @property
    def config(self) -> Any:
        return self.unet.config

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each layer in the backward pass instead of keeping what is inside it."""
        self.gradient_checkpointing = True

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        encoder_hidden_states: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """The network's output at noisy clips.

        Args:
            sample: B C F h w.
            timestep: B, or one for all.
            encoder_hidden_states: text states of each frame, (B F) L D, b-major.
            cross_attention_kwargs: for the spatial attention layers.

        Returns:
            `.sample` B C F h w.
        """
        unet, frames = self.unet, sample.shape[2]
        time = unet.time_embedding(unet.get_time_embed(sample, timestep)).repeat_interleave(frames, 0)
        condition = {
            "encoder_hidden_states": encoder_hidden_states,
            "cross_attention_kwargs": cross_attention_kwargs,
            "return_dict": False,
        }
        x = unet.conv_in(sample.transpose(1, 2).flatten(0, 1))  # (B F) C h w, but inside temporal layers
        x = self._run(self.motion_modules[INIT], x, frames)
        skips = [x]
        for i, block in enumerate(unet.down_blocks):
            for j, resnet in enumerate(block.resnets):
                x = self._attend(block, f"down_blocks.{i}", j, self._run(resnet, x, time), condition, frames)
                skips.append(x)
            for downsampler in block.downsamplers or ():
                x = downsampler(x)
                skips.append(x)
        first, *others = unet.mid_block.resnets
        x = self._run(first, x, time)
        for j, resnet in enumerate(others):
            x = self._run(resnet, self._attend(unet.mid_block, "mid_block", j, x, condition, frames), time)
        for i, block in enumerate(unet.up_blocks):
            for j, resnet in enumerate(block.resnets):
                x = self._run(resnet, torch.cat([x, skips.pop()], dim=1), time)
                x = self._attend(block, f"up_blocks.{i}", j, x, condition, frames)
            for upsampler in block.upsamplers or ():
                x = upsampler(x, skips[-1].shape[-2:])  # a size that was odd is not twice the smaller one
        x = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
        x = x.unflatten(0, (-1, frames)).transpose(1, 2)
        return UNet2DConditionOutput(sample=x) if return_dict else (x,)

    def _attend(self, block: nn.Module, name: str, j: int, x: Tensor, condition: dict[str, Any], frames: int) -> Tensor:
        """x (B F) C h w through the block's j-th spatial transformer, if it has any, and the temporal layer behind."""
        if not getattr(block, "attentions", None):
            return x
        x = self._run(block.attentions[j], x, **condition)[0]
        return self._run(self.motion_modules[f"{name}.attentions.{j}"], x, frames)

    def _run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False, **kwargs)
        return layer(*args, **kwargs)
