"""The style adapter: everything that StyleCrafter's first stage trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lit_gen.diffusion.attention import Style, StyleLayer, attach_style, cross_attentions
from lit_gen.diffusion.image_prompt import ProjectedScalePredictor, ScalePredictor, StyleExtractor


@dataclass
class Adapter:
    """Size of the style adapter.

    The defaults of sizes are those of the released adapter for VideoCrafter1.

    Args:
        tokens: style tokens.
        extractor_layers: transformer blocks over the tokens of the reference.
        predictor_layers: transformer blocks of the scale predictor.
        heads: attention heads of both; 8 in the released code.
        predictor_heads: attention heads of the scale predictor, if other than `heads`.
        predictor_width: width that style and text are projected to for the scale predictor; null: they are not.
        image_layer: block of the image encoder that is read; -1 the final one, -2 the one before.
        gain: of the style branch's norm at the start; the paper's 1 disturbs the base strongly until it is trained.
        fixed_scale: one factor for all styled layers instead of predicted ones (the paper's ablation).
        fusion: a "dual" cross-attention to the style beside the text's, as in the paper; or the style tokens are
            "appended" to the text, where neither scale nor weight applies (the paper's ablation).
        style_attention: "scaled" by 1/sqrt(d), as in the paper and the released code with xformers; "unscaled" is what
            the released code computes without xformers.
        values_from: what the style's values start from, the text's "values"; or its "keys", as the released SDXL code
            has it.
    """

    tokens: int = 8
    extractor_layers: int = 3
    predictor_layers: int = 2
    heads: int = 8
    predictor_heads: int | None = None
    predictor_width: int | None = None
    image_layer: int = -1
    gain: float = 1.0
    fixed_scale: float | None = None
    fusion: Literal["dual", "appended"] = "dual"
    style_attention: Literal["scaled", "unscaled"] = "scaled"
    values_from: Literal["values", "keys"] = "values"


# Sizes of the released adapters (StyleCrafter card 2.2, 2.4, 2.6).
VIDEOCRAFTER = Adapter()
SDXL = Adapter(tokens=16, extractor_layers=4, heads=20, predictor_heads=8, predictor_width=512, image_layer=-2)


class StyleAdapter(nn.Module):
    """Everything that stage "adapter" trains: extractor, scale predictor and one style layer per cross-attention.

    Args:
        unet: whose cross-attentions are styled; read for its text keys and values, not kept.
        image_width: of the image encoder's tokens.
        size: of the adapter.
    """

    def __init__(self, unet: nn.Module, image_width: int, size: Adapter) -> None:
        super().__init__()
        attentions = cross_attentions(unet).values()
        width = unet.config.cross_attention_dim
        self.extractor = StyleExtractor(image_width, width, size.tokens, size.extractor_layers, size.heads)
        self.fixed_scale, self.appended = size.fixed_scale, size.fusion == "appended"
        self.predictor: nn.Module | None = None
        if size.fixed_scale is None and not self.appended:
            heads, inner = size.predictor_heads or size.heads, size.predictor_width
            self.predictor = (
                ScalePredictor(width, len(attentions), size.predictor_layers, heads)
                if inner is None
                else ProjectedScalePredictor(width, len(attentions), inner, size.predictor_layers, heads)
            )
        styled = () if self.appended else attentions
        scaled, from_keys = size.style_attention == "scaled", size.values_from == "keys"
        self.layers = nn.ModuleList(StyleLayer(attention, size.gain, scaled, from_keys) for attention in styled)

    def attach(self, unet: nn.Module) -> None:
        """Make the cross-attentions of `unet` read the style; without one they stay exactly what they were."""
        attach_style(unet, None if self.appended else self.layers)

    def forward(
        self, tokens: Tensor, text: Tensor, weight: float | Tensor = 1.0, padding: Tensor | None = None
    ) -> Style:
        """A style condition.

        Args:
            tokens: CLIP tokens of the references, B N W; those of several references one after the other, in any order.
            text: states, B L D.
            weight: of the style, lambda; one for all or B.
            padding: B N, True where a token is none, where samples have different numbers of references.
        """
        style = self.extractor(tokens, padding)
        if isinstance(weight, Tensor):
            weight = weight.to(style).view(-1, 1)
        if self.predictor is not None:
            return Style(style, weight * self.predictor(style, text))
        fixed = 1.0 if self.fixed_scale is None else self.fixed_scale
        return Style(style, weight * torch.full((len(style), max(len(self.layers), 1)), fixed).to(style))
