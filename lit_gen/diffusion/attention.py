"""Attention of a UNet with a second, style cross-attention beside the text's (StyleCrafter, arXiv 2312.00330, Eq. 1).

The style layers belong to the adapter; the UNet's processors only refer to them, so every weight has one owner and one
name. The condition travels through diffusers' `cross_attention_kwargs={"style": Style}`; without it, or where its mask
is 0, the UNet is exactly the untouched base.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Temporal self-attentions are also called attn2 in diffusers; they are never styled.
TEMPORAL = ("motion_modules", "temp_attentions", "transformer_in")
EXECUTION_ORDER = ("down_blocks", "mid_block", "up_blocks")


@dataclass
class Style:
    """A style condition for one forward pass of the UNet over B pictures (or B*F frames, b-major).

    Args:
        tokens: style tokens, B S D.
        scale: factor of each styled layer, B N, in execution order.
        mask: B, 1 styled and 0 the plain base; None for all ones.
    """

    tokens: Tensor
    scale: Tensor
    mask: Tensor | None = None

    def repeat_frames(self, frames: int) -> Style:
        """B clips to B*F frames, b-major like the latents inside a motion UNet."""
        mask = None if self.mask is None else self.mask.repeat_interleave(frames, 0)
        return Style(self.tokens.repeat_interleave(frames, 0), self.scale.repeat_interleave(frames, 0), mask)

    @staticmethod
    def cat(parts: list[Style]) -> Style:
        ones = [torch.ones_like(p.scale[:, 0]) if p.mask is None else p.mask for p in parts]
        return Style(torch.cat([p.tokens for p in parts]), torch.cat([p.scale for p in parts]), torch.cat(ones))

    def null(self) -> Style:
        """The same shapes with the style switched off."""
        return Style(self.tokens, self.scale, torch.zeros_like(self.scale[:, 0]))


class StyleLayer(nn.Module):
    """Style keys, values and norm of one cross-attention layer, started from the text's keys and values.

    Args:
        attention: the diffusers `Attention` this layer goes with; read once, not kept.
        gain: of the norm at the start.
        scaled: whether the style's attention divides by sqrt(d), as the paper has it.
        values_from_keys: start the style's values from the text's keys instead of its values.
    """

    def __init__(
        self, attention: nn.Module, gain: float = 1.0, scaled: bool = True, values_from_keys: bool = False
    ) -> None:
        super().__init__()
        self.scale = None if scaled else 1.0  # of scaled_dot_product_attention, whose None is 1/sqrt(d)
        inner, width = attention.to_k.weight.shape
        self.to_k_style = nn.Linear(width, inner, bias=False)
        self.to_v_style = nn.Linear(width, inner, bias=False)
        with torch.no_grad():
            self.to_k_style.weight.copy_(attention.to_k.weight)
            self.to_v_style.weight.copy_((attention.to_k if values_from_keys else attention.to_v).weight)
        self.norm_style = nn.LayerNorm(inner)
        nn.init.constant_(self.norm_style.weight, gain)


def cross_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """Spatial cross-attention layers by name, in the order the UNet executes them (down, mid, up).

    diffusers registers down, up, mid, so its own enumeration must not number the layers.
    """
    found = {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(".attn2") and not any(part in name.split(".") for part in TEMPORAL)
    }
    return dict(sorted(found.items(), key=lambda item: EXECUTION_ORDER.index(item[0].split(".")[0])))


def attach_style(unet: nn.Module, layers: nn.ModuleList | None) -> None:
    """Give `unet` processors that read the style layers, which stay the property of their owner.

    Args:
        unet: UNet2DConditionModel or UNetMotionModel.
        layers: one StyleLayer per spatial cross-attention, in execution order; None to append the style tokens to the
            text instead (the paper's ablation).
    """
    styled = cross_attentions(unet)
    if layers is not None and len(styled) != len(layers):
        raise ValueError(f"{len(layers)} style layers for {len(styled)} cross-attention layers")
    for name, module in unet.named_modules():
        if name.endswith(".attn1") and not any(part in name.split(".") for part in TEMPORAL):
            module.set_processor(TextAttention())
    for index, attention in enumerate(styled.values()):
        attention.set_processor(AppendedAttention() if layers is None else StyledAttention(layers[index], index))


class TextAttention:
    """diffusers' standard attention, which would warn about and drop the `style` argument."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,  # B N C
        encoder_hidden_states: Tensor | None = None,  # B L D
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        style: Style | None = None,
    ) -> Tensor:
        batch = len(hidden_states)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        query = _heads(attn.to_q(hidden_states), attn.heads)
        key, value = _heads(attn.to_k(context), attn.heads), _heads(attn.to_v(context), attn.heads)
        out = _join(F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask))  # B N C
        if style is not None:
            out = self.add_style(out, attn, query, key, value, style)
        return attn.to_out[1](attn.to_out[0](out))

    def add_style(
        self, out: Tensor, attn: nn.Module, query: Tensor, key: Tensor, value: Tensor, style: Style
    ) -> Tensor:
        """`out` B N C with the style in it; unchanged in layers that are not styled.

        Args:
            out: what attention to the text gave.
            attn: the layer.
            query, key, value: of the text's attention, B h N d and twice B h L d.
            style: the condition.
        """
        return out


class StyledAttention(TextAttention):
    """W_o(o_t + s_i LN(o_s)): text and style attention with a shared query and a shared output projection.

    Args:
        layer: style keys, values and norm; referred to, not owned.
        index: the layer's place in execution order, which selects its scale.
    """

    def __init__(self, layer: StyleLayer, index: int) -> None:
        self.layer, self.index = layer, index

    def add_style(
        self, out: Tensor, attn: nn.Module, query: Tensor, key: Tensor, value: Tensor, style: Style
    ) -> Tensor:
        key = _heads(self.layer.to_k_style(style.tokens), attn.heads)
        value = _heads(self.layer.to_v_style(style.tokens), attn.heads)
        seen = F.scaled_dot_product_attention(query, key, value, scale=self.layer.scale)
        branch = self.layer.norm_style(_join(seen))
        # The mask multiplies after the norm: LN(0) is its bias, not 0.
        scale = style.scale[:, self.index] if style.mask is None else style.scale[:, self.index] * style.mask
        return out + scale.to(branch.dtype).view(-1, 1, 1) * branch


class AppendedAttention(TextAttention):
    """One attention to text and style tokens together, through the text's keys and values (ablation of the paper)."""

    def add_style(
        self, out: Tensor, attn: nn.Module, query: Tensor, key: Tensor, value: Tensor, style: Style
    ) -> Tensor:
        key = torch.cat([key, _heads(attn.to_k(style.tokens), attn.heads)], dim=2)
        value = torch.cat([value, _heads(attn.to_v(style.tokens), attn.heads)], dim=2)
        both = _join(F.scaled_dot_product_attention(query, key, value))
        return both if style.mask is None else torch.where(style.mask.view(-1, 1, 1) > 0, both, out)


def _heads(x: Tensor, heads: int) -> Tensor:
    """B N (h d) -> B h N d"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    """B h N d -> B N (h d)"""
    return x.transpose(1, 2).flatten(2)
