"""The continuous family of picture styles: named styles are points of it.

A style is a function of the screen-space buffers of a picture (colour, albedo, light, edges), steered by P numbers in
0..1. The drawing itself is in `stylise.py`; this file knows what the numbers mean, how to draw them and how far apart
two of them look. Letters: B batch, P style parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_gen.world.vocabulary import STYLES

STYLE_PARAMETERS = (
    "outline",  # width of drawn edges: 0 none, 1 about 3 pixels of a 64-pixel picture
    "ink_hue",  # hue of edges and hatching (circular)
    "own_ink",  # 0 ink has the ink hue, 1 ink has the colour of what it draws
    "paper",  # how much of the surroundings gives way to paper
    "paper_hue",  # hue of the paper (circular)
    "paper_lightness",  # 0 dark paper with bright ink, 1 white paper with dark ink
    "fill",  # how much of the objects' own colour is painted, 0 leaves paper
    "saturation",  # 0 tones between ink and paper only, 0.5 natural, 1 vivid
    "flatness",  # 0 smooth light, 1 flat areas of two tones
    "hatch",  # how strongly shade is drawn with lines or dots
    "hatch_angle",  # 0..1 is 0..180 degrees (circular)
    "hatch_period",  # 0..1 is 5..10 pixels of a 64-pixel picture
    "dots",  # 0 lines, 1 dots
    "bleed",  # colours and ink run softly over their borders: a glow on dark paper, wet pigment on white
)
CIRCULAR = ("ink_hue", "paper_hue", "hatch_angle")
_COLUMN = {name: i for i, name in enumerate(STYLE_PARAMETERS)}

# fmt: off
_NAMED = {  #       outline ink_hue own  paper p_hue p_light fill  sat  flat  hatch angle period dots bleed
    "photo":        (0.00, 0.62, 0.0, 0.00, 0.12, 1.00, 1.00, 0.50, 0.00, 0.00, 0.25, 0.50, 0.0, 0.00),
    "ink sketch":   (0.40, 0.64, 0.0, 1.00, 0.12, 1.00, 0.00, 0.50, 0.40, 1.00, 0.25, 0.10, 0.0, 0.00),
    "neon":         (0.35, 0.85, 1.0, 1.00, 0.75, 0.00, 0.12, 1.00, 0.60, 0.00, 0.25, 0.50, 0.0, 0.80),
    "blueprint":    (0.40, 0.55, 0.0, 1.00, 0.61, 0.32, 0.00, 0.50, 0.60, 0.30, 0.75, 0.10, 0.0, 0.00),
    "watercolor":   (0.10, 0.62, 1.0, 0.65, 0.12, 1.00, 0.90, 1.00, 0.50, 0.00, 0.25, 0.50, 0.0, 1.00),
    "comic":        (0.60, 0.66, 0.0, 0.15, 0.14, 1.00, 1.00, 0.90, 0.90, 0.80, 0.25, 0.10, 1.0, 0.00),
    "sepia print":  (0.00, 0.08, 0.0, 0.30, 0.11, 0.85, 1.00, 0.00, 0.00, 0.00, 0.25, 0.50, 0.0, 0.10),
    "poster":       (0.00, 0.95, 0.0, 1.00, 0.47, 0.70, 1.00, 0.80, 1.00, 0.00, 0.25, 0.50, 0.0, 0.00),
    "chalk":        (0.50, 0.15, 0.8, 1.00, 0.42, 0.15, 0.20, 0.45, 0.30, 0.90, 0.15, 0.30, 0.0, 0.15),
}
# fmt: on
NAMED = torch.tensor([_NAMED[name] for name in STYLES])  # len(STYLES) P; row 0, photo, changes nothing
KEEPS_COLOUR = tuple(name not in ("ink sketch", "blueprint", "chalk", "sepia print") for name in STYLES)

# Ranges of the continuous family: every parameter is visible nearly everywhere and colours stay recognisable.
_RANGE = {
    "outline": (0.3, 0.9),
    "own_ink": (0.0, 0.3),
    "paper": (0.4, 1.0),
    "paper_lightness": (0.0, 1.0),
    "fill": (0.7, 1.0),
    "saturation": (0.35, 1.0),
    "flatness": (0.0, 1.0),
    "hatch": (0.35, 1.0),
    "hatch_period": (0.0, 1.0),
    "dots": (0.0, 1.0),
    "bleed": (0.0, 1.0),
}
_LOW = torch.tensor([_RANGE.get(name, (0.0, 1.0))[0] for name in STYLE_PARAMETERS])
_HIGH = torch.tensor([_RANGE.get(name, (0.0, 1.0))[1] for name in STYLE_PARAMETERS])

# The held-out box: greenish-blue to violet paper drawn on with yellow-green to blue ink (about 12 % of the family).
_HELD_OUT = {"paper_hue": (0.30, 0.65), "ink_hue": (0.15, 0.50)}


def sample_style(u: Tensor, held_out: bool | None = None) -> Tensor:
    """Map uniforms u (B P, in 0..1) to parameters of the continuous family (B P).

    held_out True gives only styles of the held-out box, False only styles outside it, None the whole family.
    """
    style = _LOW.to(u) + (_HIGH - _LOW).to(u) * u
    ink, paper = _COLUMN["ink_hue"], _COLUMN["paper_hue"]
    if held_out is None:
        return style
    style = style.clone()
    (ink_low, ink_high), (low, high) = _HELD_OUT["ink_hue"], _HELD_OUT["paper_hue"]
    if held_out:
        # A little off the border, so that rounding never carries a style outside.
        style[:, ink] = ink_low + (ink_high - ink_low) * (0.001 + 0.998 * u[:, ink])
        style[:, paper] = low + (high - low) * (0.001 + 0.998 * u[:, paper])
        return style
    # Where the ink is within the box, the paper's hue is spread over what the box leaves of the circle.
    beside = (high + 0.001 + (0.998 - (high - low)) * u[:, paper]) % 1
    within = (style[:, ink] >= ink_low) & (style[:, ink] <= ink_high)
    style[:, paper] = torch.where(within, beside, style[:, paper])
    return style


def style_is_held_out(style_parameters: Tensor) -> Tensor:
    """Which of B styles (B P) lie in the region never trained on: B bool. No named style does."""
    inside = torch.ones_like(style_parameters[:, 0], dtype=torch.bool)
    for name, (low, high) in _HELD_OUT.items():
        value = style_parameters[:, _COLUMN[name]]
        inside = inside & (value >= low) & (value <= high)
    return inside & ~_is_named(style_parameters)


def style_error(a: Tensor, b: Tensor) -> Tensor:
    """How different two styles look: B numbers in 0..1, from parameters a and b (B P).

    Mean absolute distance over parameters, around the circle where a parameter is circular, each weighted by how
    visible it is in either style (the hue of ink that is nowhere drawn does not count).
    """
    distance = (a - b).abs()
    for name in CIRCULAR:
        column = _COLUMN[name]
        around = distance[:, column] % 1
        distance[:, column] = 2 * torch.minimum(around, 1 - around)
    weight = (visibility(a) + visibility(b)) / 2
    return (distance.clamp(0, 1) * weight).sum(1) / weight.sum(1)


def visibility(style: Tensor) -> Tensor:
    """How much each parameter of a style (B P) shows in the picture: B P in 0..1."""
    value = dict(zip(STYLE_PARAMETERS, style.clamp(0, 1).unbind(1), strict=True))
    one = torch.ones_like(value["outline"])
    tones = (1 - 2 * value["saturation"]).clamp(min=0)  # the two-tone ramp uses ink and paper everywhere
    drawn = torch.maximum(value["outline"], value["hatch"])
    papered = torch.maximum(torch.maximum(value["paper"], 1 - value["fill"]), tones)
    shown = {
        "ink_hue": torch.maximum(drawn * (1 - value["own_ink"]), tones),
        "own_ink": drawn,
        "paper_hue": papered,
        "paper_lightness": torch.maximum(papered, drawn),
        "saturation": torch.maximum(value["fill"], 1 - value["paper"]),
        "hatch_angle": value["hatch"] * (1 - value["dots"]),
        "hatch_period": value["hatch"],
        "dots": value["hatch"],
    }
    return torch.stack([shown.get(name, one) for name in STYLE_PARAMETERS], dim=1)


def nearest_named(style_parameters: Tensor) -> Tensor:
    """The named style that looks most like each of B styles (B P): B long, into STYLES."""
    named = NAMED.to(style_parameters)
    errors = [style_error(style_parameters, row.expand_as(style_parameters)) for row in named]
    return torch.stack(errors, dim=1).argmin(1)


def _is_named(style_parameters: Tensor) -> Tensor:
    named = NAMED.to(style_parameters)
    return (style_parameters[:, None] - named).abs().amax(2).amin(1) < 1e-6
