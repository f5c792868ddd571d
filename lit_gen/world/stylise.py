"""Draw a picture in a style: screen-space functions of colours, light, edges and the style's parameters.

Lengths are in pixels of a 64-pixel picture and grow with the picture, so that a style looks the same at every size and
nothing it draws is finer than an autoencoder with 4x downsampling can keep. Letters: B batch, H W picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gen.world.styles import STYLE_PARAMETERS
from lit_gen.world.textures import hue_colour, part_of

_REFERENCE = 64  # pixels
DARK_PAPER = 0.4  # paper of less lightness is dark, and ink on it bright


@dataclass
class Layers:
    """What the pixels of B pictures show, before any style."""

    rgb: Tensor  # B 3 H W, displayed colours 0..1
    light: Tensor  # B 1 H W, brightness of the light that falls there, about 0..1
    label: Tensor  # B 1 H W float, 0 sky, 1 floor, 2 and more: parts of objects
    normal: Tensor  # B 3 H W

    def __getitem__(self, item: Tensor) -> Layers:
        return Layers(self.rgb[item], self.light[item], self.label[item], self.normal[item])


def stylise(layers: Layers, style: Tensor) -> Tensor:
    """B 3 H W pictures in the styles of B parameter rows (B P); the parameters of a photo change nothing."""
    values = {name: v[:, None, None, None] for name, v in zip(STYLE_PARAMETERS, style.unbind(1), strict=True)}
    scale = layers.rgb.shape[-1] / _REFERENCE
    paper, ink = _paper_and_ink(style)
    dark_paper = values["paper_lightness"] < DARK_PAPER
    thing = (layers.label > 1.5).to(layers.rgb)
    light = layers.light.clamp(0.02, 1.2)

    tone = _two_tone(light, values["flatness"])
    colour = layers.rgb + (_flat(layers, thing, light) - layers.rgb) * values["flatness"]
    colour = _saturate(colour, values["saturation"], paper, ink)
    own, nearby = _own_ink(colour, thing, dark_paper, scale)
    # Paper keeps a trace of the shade, so that things still stand on it.
    sheet = paper * (0.68 + 0.32 * (1.25 * tone).clamp(max=1))
    colour = colour + (sheet - colour) * torch.where(thing > 0, 1 - values["fill"], values["paper"])
    colour = _bleed(colour, values["bleed"], dark_paper, scale)

    drawing = ink + (own - ink) * (values["own_ink"] * nearby)
    # Hatching over painted things takes half of their colour, which keeps its name that way.
    hatch = values["hatch"] * _hatching(layers, tone, thing, values, dark_paper, scale)
    colour = colour + (drawing + (own - drawing) * (0.5 * values["fill"] * thing) - colour) * (0.85 * hatch)
    line = _outline(layers, values["outline"], scale)
    colour = colour + (drawing - colour) * line
    halo = _blur(line * drawing, 2.2 * scale)
    # What is painted is not outshone by its own rim.
    colour = colour + halo * torch.where(dark_paper, values["bleed"] * (1 - 0.7 * values["fill"] * thing), 0)
    return colour.clamp(0, 1)


def _paper_and_ink(style: Tensor) -> tuple[Tensor, Tensor]:
    """Displayed colours of paper and of ink: each B 3 1 1. Ink is dark on light paper and bright on dark paper."""
    value = dict(zip(STYLE_PARAMETERS, style.unbind(1), strict=True))
    lightness = value["paper_lightness"][:, None]
    dark = lightness < DARK_PAPER
    # Never in between: on middling paper neither things nor ink stand out.
    paper = _hsv(
        value["paper_hue"],
        torch.where(dark, 0.85 - 0.4 * lightness, 0.75 - 0.66 * lightness),
        torch.where(dark, 0.07 + 1.0 * lightness, 0.75 + 0.25 * lightness),
    )
    ink = _hsv(value["ink_hue"], torch.where(dark, 0.40, 0.85), torch.where(dark, 1.0, 0.30))
    return paper[:, :, None, None], ink[:, :, None, None]


def _hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    pure = hue_colour(hue, 1.0, 1.0).sqrt()
    return value * (1 - saturation + saturation * pure)


def _luminance(colour: Tensor) -> Tensor:
    return (colour * colour.new_tensor([0.3, 0.55, 0.15])[:, None, None]).sum(1, keepdim=True)


def _step(x: Tensor, low: float, high: float) -> Tensor:
    x = ((x - low) / (high - low)).clamp(0, 1)
    return x * x * (3 - 2 * x)


def _two_tone(light: Tensor, flatness: Tensor) -> Tensor:
    """Light that falls in two flat steps as flatness grows."""
    steps = 0.55 + 0.45 * _step(light, 0.50, 0.58)
    return light + (steps - light) * flatness


def _flat(layers: Layers, thing: Tensor, light: Tensor) -> Tensor:
    """Colours with light in two tones and without the fine texture of floors and skies."""
    tone = 0.55 + 0.45 * _step(light, 0.50, 0.58)
    things = layers.rgb * (tone / light).sqrt()
    ground = (layers.label == 1).to(thing)
    sky = (layers.label == 0).to(thing)
    flat = things * thing
    for mask in (ground, sky):
        mean = (layers.rgb * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp(min=1)
        flat = flat + mask * mean * torch.where(mask > 0, (0.62 + 0.38 * _step(light, 0.62, 0.74)), 1).sqrt()
    return flat


def _saturate(colour: Tensor, saturation: Tensor, paper: Tensor, ink: Tensor) -> Tensor:
    """Below one half towards tones between ink and paper, above it towards purer colours."""
    dark, bright = torch.where(_luminance(paper) < _luminance(ink), paper, ink), torch.maximum(paper, ink)
    tones = dark + (bright - dark) * _step(_luminance(colour), -0.05, 0.95)
    muted = colour + (tones - colour) * (1 - 2 * saturation).clamp(min=0)
    return _purer(muted, (saturation - 0.5).clamp(min=0) * 1.2)


def _purer(colour: Tensor, gain: Tensor) -> Tensor:
    """Colours with less white in them: the span of the channels grows by a factor 1 + gain, hue and maximum stay."""
    top = colour.amax(1, keepdim=True)
    most = top / (top - colour.amin(1, keepdim=True)).clamp(min=1e-4) - 1  # the smallest channel ends at zero
    return colour - (top - colour) * most.clamp(min=0).minimum(gain)


def _own_ink(colour: Tensor, thing: Tensor, dark_paper: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Ink in the colour of the nearest object, bright on dark paper and deep on light paper, and where one is near."""
    weight = _blur(thing, 1.5 * scale)
    own = _blur(colour * thing, 1.5 * scale) / weight.clamp(min=1e-3)
    pure = _purer(own, own.new_tensor(0.9))
    bright = (pure / pure.amax(1, keepdim=True).clamp(min=0.4)).clamp(max=1)
    return torch.where(dark_paper, bright, own * 0.55), (weight * 1e3).clamp(max=1)


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur (sigma in pixels) of B C H W: two products with a banded matrix, far quicker than a convolution."""
    place = torch.arange(image.shape[-1], device=image.device, dtype=image.dtype)
    weight = (-0.5 * ((place[:, None] - place) / sigma) ** 2).exp()
    weight = weight / weight.sum(1, keepdim=True)
    return weight @ image @ weight.T


def _bleed(colour: Tensor, amount: Tensor, dark_paper: Tensor, scale: float) -> Tensor:
    """Wet colour: wobbling borders, soft inside, with darker rims on light paper."""
    size = colour.shape[-1]
    grid = torch.linspace(-1, 1, size, device=colour.device, dtype=colour.dtype)
    y, x = grid[:, None].expand(size, size), grid[None, :].expand(size, size)
    push = torch.stack([(7 * y + 3 * x).sin() + (13 * y - 5).sin(), (8 * x - 2 * y + 1).sin() + (12 * x + 2).sin()], -1)
    wobble = torch.stack([x, y], -1) + push * (0.022 * amount.view(-1, 1, 1, 1))
    moved = F.grid_sample(colour, wobble, mode="bilinear", padding_mode="border", align_corners=True)
    soft = _blur(moved, 1.6 * scale)
    rim = (moved - soft).abs().sum(1, keepdim=True)
    wet = soft + (0.35 * (moved - soft)) - torch.where(dark_paper, 0, 0.30 * rim)
    return colour + (wet - colour) * amount


def _hatching(
    layers: Layers, tone: Tensor, thing: Tensor, values: dict[str, Tensor], dark_paper: Tensor, scale: float
) -> Tensor:
    """Coverage (B 1 H W) of lines or dots that draw the shade, or the light where the paper is dark."""
    size = layers.rgb.shape[-1]
    period = (5 + 5 * values["hatch_period"]) * scale
    angle = values["hatch_angle"] * math.pi
    place = torch.arange(size, device=tone.device, dtype=tone.dtype) + 0.5
    x, y = place.view(1, 1, 1, -1), place.view(1, 1, -1, 1)
    across = part_of((x * angle.cos() + y * angle.sin()) / period) - 0.5
    along = part_of((y * angle.cos() - x * angle.sin()) / period) - 0.5
    line = 2 * across.abs()
    dot = (across * across + along * along).sqrt() * 1.7
    profile = line + (dot - line) * values["dots"]
    lightness = (0.55 * tone + 0.45 * _luminance(layers.rgb)).clamp(0, 1)
    shade = torch.where(dark_paper, lightness, 1 - lightness)
    shadow = (1.1 - 1.3 * tone).clamp(0, 1)
    wanted = torch.where(thing > 0, 0.18 + 0.8 * shade, 0.33 + 0.35 * shadow)
    strength = torch.where(thing > 0, 1, torch.where(dark_paper, 0.18, 0.16 + 0.84 * (2 * shadow).clamp(max=1)))
    return ((wanted - profile) * (period / 1.2) + 0.5).clamp(0, 1) * strength


def _outline(layers: Layers, width: Tensor, scale: float) -> Tensor:
    """Coverage (B 1 H W) of lines along borders of parts, creases and the horizon."""
    edge = torch.zeros_like(layers.light)
    for axis in (2, 3):
        length = edge.shape[axis] - 1
        a, b = (layers.label.narrow(axis, i, length) for i in (0, 1))
        m, n = (layers.normal.narrow(axis, i, length) for i in (0, 1))
        crease = (m * n).sum(1, keepdim=True) < 0.7
        border = ((a != b) | (crease & (a > 1.5))).to(edge)
        border = border * torch.where(torch.maximum(a, b) > 1.5, 1, 0.6)  # the horizon is a finer line
        for i in (0, 1):
            edge.narrow(axis, i, length).copy_(torch.maximum(edge.narrow(axis, i, length), border))
    sigma = 1.1 * scale
    # Across a straight line, two pixels thick, the blurred edge falls like a bell: a level is a width.
    near = _blur(edge, sigma) * (sigma * math.sqrt(2 * math.pi) / 2)
    level = (-0.5 * ((0.35 + 1.35 * width) * scale / sigma) ** 2).exp()
    return ((near / level - 0.75) * 2).clamp(0, 1) * (width * 8).clamp(max=1)
