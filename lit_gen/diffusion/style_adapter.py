"""The style adapter: everything that StyleCrafter's first stage trains."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lit_gen.diffusion.attention import Style, StyleLayer, cross_attentions
from lit_gen.diffusion.image_prompt import ScalePredictor, StyleExtractor


@dataclass
class Adapter:
    """Size of the style adapter.

    Args:
        tokens: style tokens.
        extractor_layers: transformer blocks over the tokens of the reference.
        predictor_layers: transformer blocks of the scale predictor.
        heads: attention heads of both.
        image_layer: block of the image encoder that is read; -1 the final one, -2 the one before.
        gain: of the style branch's norm at the start; the paper's 1 disturbs the base strongly until it is trained.
    """

    tokens: int = 8
    extractor_layers: int = 3
    predictor_layers: int = 2
    heads: int = 8
    image_layer: int = -1
    gain: float = 1.0


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
        self.predictor = ScalePredictor(width, len(attentions), size.predictor_layers, size.heads)
        self.layers = nn.ModuleList(StyleLayer(attention, size.gain) for attention in attentions)

    def forward(self, tokens: Tensor, text: Tensor, weight: float = 1.0) -> Style:
        """CLIP tokens B N W of the references and text states B L D to a style condition."""
        style = self.extractor(tokens)
        return Style(style, weight * self.predictor(style, text))
