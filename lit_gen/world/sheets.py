"""Contact sheets of the world, to look at what models are trained on: `python -m lit_gen world --out DIR`."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from lit_gen.world.grammar import captions
from lit_gen.world.recipes import RECIPES
from lit_gen.world.render import render, render_video
from lit_gen.world.sampling import sample
from lit_gen.world.scene import Scenes
from lit_gen.world.styles import NAMED, STYLE_PARAMETERS, sample_style
from lit_gen.world.textures import hue_colour
from lit_gen.world.trace import FAR
from lit_gen.world.vocabulary import COLOURS, KINDS, MOTIONS, PATTERNS, SHAPES, STYLES, TIMES

_GAP, _MARGIN = 4, 92  # pixels: between pictures, and for the names of rows


@dataclass
class Setting:
    """What a sheet is drawn from."""

    seed: int
    size: int  # of a picture, pixels
    device: str

    def scenes(self, recipe: str, count: int) -> Scenes:
        return sample(recipe, "train", self.seed, torch.arange(count, device=self.device))

    def pictures(self, scenes: Scenes) -> Tensor:
        """B 3 H W on the CPU."""
        return render(scenes.to(self.device), self.size).rgb.cpu()


def main(argv: list[str] | None = None) -> int:
    """Write one PNG per sheet into a folder."""
    parser = argparse.ArgumentParser(prog="python -m lit_gen world", description="Draw contact sheets of the world.")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write PNG files to")
    parser.add_argument("--only", nargs="+", choices=list(_sheets()), metavar="SHEET", help="names of sheets to draw")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    parser.add_argument("--size", type=int, default=64, help="pixels of a picture")
    parser.add_argument("--zoom", type=int, default=2, help="enlarge pixels this many times")
    parser.add_argument("--device", default="cpu", help="where to render, e.g. cuda")
    options = parser.parse_args(argv)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(options.seed, options.size, options.device)
    for name, draw in _sheets().items():
        if options.only and name not in options.only:
            continue
        rows, names = draw(setting)
        if name == "captions":
            image = captioned(rows, names, options.zoom)
        else:
            image = grid(rows, names, options.zoom)
        image.save(folder / f"{name}.png")
        print(folder / f"{name}.png")
    return 0


def grid(pictures: Tensor, names: list[str], zoom: int = 2) -> Image.Image:
    """A table of pictures (rows columns 3 H W, in 0..1) with the rows' names at the left, where there are any."""
    rows, columns, _, height, width = pictures.shape
    pictures = F.pad((pictures.clamp(0, 1) * 255).round().byte(), (0, _GAP // zoom, 0, _GAP // zoom), value=255)
    table = pictures.permute(0, 3, 1, 4, 2).reshape(rows * (height + _GAP // zoom), -1, 3)
    image = Image.fromarray(table.contiguous().numpy())
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    if not any(names):
        return image
    sheet = Image.new("RGB", (image.width + _MARGIN, image.height), "white")
    sheet.paste(image, (_MARGIN, 0))
    for i, name in enumerate(names):
        top = int((i + 0.5) * image.height / rows) - 6
        ImageDraw.Draw(sheet).text((4, top), name, fill="black")
    return sheet


def captioned(pictures: Tensor, texts: list[str], zoom: int = 2) -> Image.Image:
    """Pictures (rows 1 3 H W), each with its caption beside it."""
    image = grid(pictures, [], zoom)
    sheet = Image.new("RGB", (image.width + 560, image.height), "white")
    sheet.paste(image, (0, 0))
    for i, text in enumerate(texts):
        place = (image.width + 8, int(i * image.height / len(texts)) + 8)
        ImageDraw.Draw(sheet).multiline_text(place, "\n".join(textwrap.wrap(text, 88)), fill="black")
    return sheet


def _sheets() -> dict[str, Callable[[Setting], tuple[Tensor, list[str]]]]:
    recipes = {f"recipe-{name}": _recipe(name) for name in RECIPES if "motion" not in name}
    films = {f"recipe-{name}": _films(name) for name in RECIPES if "motion" in name}
    return {
        **recipes,
        **films,
        "captions": _captions,
        "styles": _styles,
        "continuous": _continuous,
        "parameters": _parameters,
        "kinds": _kinds,
        "looks": _looks,
        "cameras": _cameras,
        "times": _times,
        "motions": _motions,
        "truth": _truth,
        "film-truth": _film_truth,
    }


def _recipe(name: str) -> Callable[[Setting], tuple[Tensor, list[str]]]:
    return lambda setting: (setting.pictures(setting.scenes(name, 64)).unflatten(0, (8, 8)), [])


def _films(name: str) -> Callable[[Setting], tuple[Tensor, list[str]]]:
    def draw(setting: Setting) -> tuple[Tensor, list[str]]:
        scenes = setting.scenes(name, 12)
        names = [MOTIONS[m] if m >= 0 else "" for m in scenes.motion.tolist()]
        return render_video(scenes, size=setting.size).rgb.cpu(), names

    return draw


def _captions(setting: Setting) -> tuple[Tensor, list[str]]:
    scenes = setting.scenes("base", 16)
    return setting.pictures(scenes)[:, None], [c.text for c in captions(scenes)]


def _styled(setting: Setting, styles: Tensor, count: int) -> Tensor:
    """The same scenes in each style (rows P): rows count 3 H W."""
    scenes = setting.scenes("styled", count)
    scenes = Scenes.cat([scenes.replace(style_parameters=row.expand(count, -1).to(setting.device)) for row in styles])
    return setting.pictures(scenes).unflatten(0, (len(styles), count))


def _styles(setting: Setting) -> tuple[Tensor, list[str]]:
    return _styled(setting, NAMED, 6), list(STYLES)


def _continuous(setting: Setting) -> tuple[Tensor, list[str]]:
    draws = torch.rand(24, len(STYLE_PARAMETERS), generator=torch.Generator().manual_seed(setting.seed))
    return _styled(setting, sample_style(draws), 6), []


def _parameters(setting: Setting) -> tuple[Tensor, list[str]]:
    """Each row moves one parameter of one style from one end to the other."""
    middle = sample_style(torch.full((1, len(STYLE_PARAMETERS)), 0.55))[0]
    middle[STYLE_PARAMETERS.index("dots")] = 0
    scene = setting.scenes("styled", 5)[4:]
    rows = middle.repeat(len(STYLE_PARAMETERS), 8, 1)
    for i in range(len(STYLE_PARAMETERS)):
        rows[i, :, i] = torch.linspace(0, 1, 8)
    flat = rows.flatten(0, 1).to(setting.device)
    scenes = Scenes.cat([scene] * len(flat)).replace(style_parameters=flat)
    return setting.pictures(scenes).unflatten(0, (-1, 8)), list(STYLE_PARAMETERS)


def _one(setting: Setting, count: int) -> Scenes:
    """`count` copies of one upright object on a plain ground, to change."""
    scenes = setting.scenes("views", 1)
    scenes = Scenes.cat([scenes] * count)
    return scenes.replace(
        subject=torch.full_like(scenes.subject, -1),
        pattern=torch.zeros_like(scenes.pattern),
        yaw=torch.zeros_like(scenes.yaw),
        style_parameters=NAMED[:1].expand(count, -1).to(setting.device),
        azimuth=torch.zeros_like(scenes.azimuth),
        elevation=torch.full_like(scenes.elevation, math.radians(20)),
        backdrop=torch.full_like(scenes.backdrop, 0.72),
    )


def _with(values: Tensor, column: Tensor) -> Tensor:
    """values (B K) with object 0's replaced."""
    return torch.cat([column[:, None].to(values), values[:, 1:]], 1)


def _kinds(setting: Setting) -> tuple[Tensor, list[str]]:
    """Every kind of object from eight sides."""
    kinds = torch.arange(len(KINDS)).repeat_interleave(8)
    scenes = _one(setting, len(kinds))
    scenes = scenes.replace(
        kind=_with(scenes.kind, kinds),
        colour=_with(scenes.colour, kinds % len(COLOURS)),
        marked=_with(scenes.marked, kinds < len(SHAPES)),
        azimuth=torch.arange(8).repeat(len(KINDS)).to(scenes.azimuth) * (math.pi / 4),
        elevation=torch.tensor([15.0, 30.0] * 4).repeat(len(KINDS)).to(scenes.azimuth).deg2rad(),
    )
    return setting.pictures(scenes).unflatten(0, (-1, 8)), list(KINDS)


def _looks(setting: Setting) -> tuple[Tensor, list[str]]:
    """Every simple shape in every pattern, and in two subject textures, through the colours."""
    rows = [(shape, pattern) for shape in range(len(SHAPES)) for pattern in range(len(PATTERNS) + 1)]
    table = torch.tensor(rows).repeat_interleave(len(COLOURS), 0)
    colours = torch.arange(len(COLOURS)).repeat(len(rows))
    special = table[:, 1] == len(PATTERNS)
    scenes = _one(setting, len(table))
    scenes = scenes.replace(
        kind=_with(scenes.kind, table[:, 0]),
        pattern=_with(scenes.pattern, table[:, 1] % len(PATTERNS)),
        colour=_with(scenes.colour, colours),
        subject=_with(scenes.subject, torch.where(special, colours, -1)),
        marked=torch.zeros_like(scenes.marked),
    )
    names = [f"{(*PATTERNS, 'subject')[pattern]} {SHAPES[shape]}" for shape, pattern in rows]
    return setting.pictures(scenes).unflatten(0, (-1, len(COLOURS))), names


def _cameras(setting: Setting) -> tuple[Tensor, list[str]]:
    """One scene from all round (columns) and from below to above (rows)."""
    heights = [-10, 15, 40, 65, 80]
    scenes = Scenes.cat([setting.scenes("views", 1)] * (8 * len(heights)))
    scenes = scenes.replace(
        azimuth=torch.arange(8).repeat(len(heights)).to(scenes.azimuth) * (math.pi / 4),
        elevation=torch.tensor(heights).repeat_interleave(8).to(scenes.azimuth).deg2rad(),
        style_parameters=NAMED[:1].expand(len(scenes), -1).to(setting.device),
    )
    return setting.pictures(scenes).unflatten(0, (-1, 8)), [f"{h} degrees" for h in heights]


def _times(setting: Setting) -> tuple[Tensor, list[str]]:
    return setting.pictures(setting.scenes("times", 24)).unflatten(0, (8, 3)).transpose(0, 1), list(TIMES)


def _motions(setting: Setting) -> tuple[Tensor, list[str]]:
    """A film of each motion."""
    scenes = setting.scenes("motion", 256)
    first = [int((scenes.motion == m).nonzero()[0]) for m in range(len(MOTIONS))]
    return render_video(scenes[torch.tensor(first)], size=setting.size).rgb.cpu(), list(MOTIONS)


def _truth(setting: Setting) -> tuple[Tensor, list[str]]:
    frames = render(setting.scenes("photo", 8), setting.size)
    return torch.stack(
        [
            frames.rgb.cpu(),
            show_instance(frames.instance.cpu()),
            show_depth(frames.depth.cpu()),
            (frames.normal.cpu() + 1) / 2,
        ]
    ), ["picture", "instance", "depth", "normal"]


def _film_truth(setting: Setting) -> tuple[Tensor, list[str]]:
    scenes = setting.scenes("motion", 64)
    pick = torch.tensor([int((scenes.motion == MOTIONS.index(m)).nonzero()[0]) for m in ("spins", "is circled")])
    clip = render_video(scenes[pick], size=setting.size)
    rows, names = [], []
    for i in range(len(pick)):
        moved = show_flow(clip.flow[i].cpu())
        rows += [clip.rgb[i].cpu(), torch.cat([moved, torch.ones_like(moved[:1])])]
        rows += [show_instance(clip.instance[i].cpu()), show_depth(clip.depth[i].cpu())]
        names += ["picture", "flow", "instance", "depth"]
    return torch.stack(rows), names


def show_instance(instance: Tensor) -> Tensor:
    """Instances (B H W) as colours (B 3 H W)."""
    colours = torch.tensor([[0.15, 0.15, 0.18], [0.95, 0.45, 0.35], [0.35, 0.75, 0.55], [0.40, 0.55, 0.95]])
    return colours[instance].permute(0, 3, 1, 2)


def show_depth(depth: Tensor) -> Tensor:
    """Depth (B H W, metres) as greys (B 3 H W), near is bright; the sky is black."""
    near = depth.flatten(1).amin(1)[:, None, None]
    return (near / depth).masked_fill(depth >= FAR, 0)[:, None].expand(-1, 3, -1, -1)


def show_flow(flow: Tensor) -> Tensor:
    """Flow (B 2 H W, pixels) as colours (B 3 H W): direction is hue, speed is depth of colour."""
    speed = flow.square().sum(1).sqrt()
    hue = torch.atan2(flow[:, 1], flow[:, 0]) / (2 * math.pi) % 1
    strength = (speed / speed.amax().clamp(min=1e-3))[..., None]
    return (1 - strength + strength * hue_colour(hue, 1.0, 1.0).sqrt()).permute(0, 3, 1, 2)
