"""Pictures as conditions: CLIP tokens, the style extractor and the context-aware scale (StyleCrafter card 2.2, 2.4)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def encode_image(encoder: nn.Module, processor: Any, images: Tensor, layer: int = -1) -> Tensor:
    """CLIP tokens B 1+M W of images B 3 H W in [-1, 1].

    Args:
        encoder: a CLIPVisionModelWithProjection.
        processor: its image processor, for the mean and deviation of its input.
        images: any size; resized to the encoder's.
        layer: -1 is the final block, its class token after the final norm and its patch tokens without it, as the
            paper's code has it; -2 and below are raw earlier blocks (SDXL variant: -2).
    """
    images = resized(images, encoder.config.image_size)
    pixels = ((images + 1) / 2 - _colour(tuple(processor.image_mean), images.device)) / _colour(
        tuple(processor.image_std), images.device
    )
    tower = encoder.vision_model
    if layer != -1:
        return tower(pixels.to(encoder.dtype), output_hidden_states=True).hidden_states[layer].float()
    tokens = tower(pixels.to(encoder.dtype)).last_hidden_state
    return torch.cat([tower.post_layernorm(tokens[:, :1]), tokens[:, 1:]], dim=1).float()


def resized(images: Tensor, size: int) -> Tensor:
    """Images B 3 H W as B 3 size size, whatever their shape was, as the paper's code has it."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True)


@lru_cache
def _colour(values: tuple[float, ...], device: torch.device) -> Tensor:
    """3 1 1, copied to the device once: a copy waits for all that the device has to do."""
    return torch.tensor(values, device=device).view(3, 1, 1)


class Block(nn.Module):
    """Pre-norm transformer block with a 4x GELU MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """x B N W; padding B N bool, True where a token is to be ignored."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, key_padding_mask=padding, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class QueryTransformer(nn.Module):
    """Learnable queries prepended to a token sequence; all attend to all, only the queries come out.

    Args:
        queries: how many.
        width: of the tokens.
        heads: attention heads.
        layers: transformer blocks.
    """

    def __init__(self, queries: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, queries, width) * width**-0.5)
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """tokens B N W (padding B N, True = ignore) -> B Q W"""
        count = self.queries.shape[1]
        x = self.ln1(torch.cat([self.queries.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1))
        if padding is not None:
            padding = F.pad(padding, (count, 0), value=False)
        for block in self.blocks:
            x = block(x, padding)
        return self.ln2(x[:, :count])


class StyleExtractor(nn.Module):
    """CLIP tokens of one or more reference pictures to S style tokens.

    There is no positional embedding, so several references are simply concatenated along the sequence, in any order.

    Args:
        width: of the CLIP tokens.
        out: width of the style tokens, that of the text states.
        tokens, layers, heads: 8, 3, 8 in the released code.
    """

    def __init__(self, width: int, out: int, tokens: int = 8, layers: int = 3, heads: int = 8) -> None:
        super().__init__()
        self.transformer = QueryTransformer(tokens, width, heads, layers)
        self.proj = nn.Parameter(torch.randn(width, out) * width**-0.5)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """tokens B N W -> B S D"""
        return self.transformer(tokens, padding) @ self.proj


class ScalePredictor(nn.Module):
    """Factor of each styled layer, 1 + tanh in (0, 2), from the style and the text.

    Args:
        width: of style tokens and text states.
        count: styled layers; query i belongs to the i-th in execution order.
        layers, heads, hidden: 2, 8, 32 in the released code.
    """

    def __init__(self, width: int, count: int, layers: int = 2, heads: int = 8, hidden: int = 32) -> None:
        super().__init__()
        self.transformer = QueryTransformer(count, width, heads, layers)
        self.out = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, style: Tensor, text: Tensor) -> Tensor:
        """style B S D, text B L D -> B N"""
        context = torch.cat([style, text], dim=1)  # style first, as in the paper's code
        return 1 + torch.tanh(self.out(self.transformer(context)).squeeze(-1))


class ProjectedScalePredictor(nn.Module):
    """`ScalePredictor` of the SDXL variant: style and text are first projected to a smaller width.

    Args:
        width: of style tokens and text states.
        count: styled layers; query i belongs to the i-th in execution order.
        inner: width it works at; 512 in the released model.
        layers, heads, hidden: 2, 8, 32 in the released model.
    """

    def __init__(
        self, width: int, count: int, inner: int = 512, layers: int = 2, heads: int = 8, hidden: int = 32
    ) -> None:
        super().__init__()
        self.text_proj, self.style_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.transformer = QueryTransformer(count, inner, heads, layers)
        self.proj = nn.Parameter(torch.randn(inner, inner) * inner**-0.5)
        self.out = nn.Sequential(nn.Linear(inner, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, style: Tensor, text: Tensor) -> Tensor:
        """style B S D, text B L D -> B N"""
        # text first, unlike the other variant: without positions the order changes nothing but rounding
        context = torch.cat([self.text_proj(text), self.style_proj(style)], dim=1)
        return 1 + torch.tanh(self.out(self.transformer(context) @ self.proj).squeeze(-1))
