"""How good is the oracle itself? Its answers on held-out renders, and the table of them in its card.

python -m lit_gen.metrics.evaluate    # prints the figures of data/oracle and writes them into its README.md
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from lit_gen.errors import UserError
from lit_gen.metrics.agreement import compare
from lit_gen.metrics.objects import SubjectSimilarity, mask_iou
from lit_gen.metrics.oracle import Oracle
from lit_gen.metrics.reading import decode
from lit_gen.metrics.supervision import Targets, arrange, match, size_shows, targets
from lit_gen.metrics.video import MotionAccuracy
from lit_gen.world.motion import animate
from lit_gen.world.render import render, render_video
from lit_gen.world.sampling import sample
from lit_gen.world.scene import Scenes
from lit_gen.world.styles import style_error
from lit_gen.world.vocabulary import PATTERNS

LEGIBLE = 60  # visible pixels (of 64 x 64) from which an object's attributes are expected to be read
CONTRAST = 0.05  # root mean square difference, of colours 0..1, from which two patterns are expected to be told apart
Found = dict[str, tuple[Tensor, Tensor]]  # name -> total and number of cases


@torch.no_grad()
def judge(oracle: Oracle, images: Tensor, scenes: Scenes, instance: Tensor) -> Found:
    """Answers on renders (B 3 64 64 in [-1, 1]), slots paired with objects by their true masks (B 64 64).

    Shares right for the attributes of `compare`, and size, floor, special; errors for style, facing and elevation
    (degrees), box (pixels); iou of masks. A pattern or size counts where the picture tells it.
    """
    out = oracle.look(images)
    truth, reading = targets(scenes, instance), decode(out)
    order = match(out, truth)
    legible = truth.mask.sum((2, 3)) >= LEGIBLE
    agreement = compare(reading, scenes, order, legible)
    agreement.counted["pattern"] &= pattern_tells(scenes, images, truth.mask)
    found = {n: ((agreement.right[n] & c).sum(), c.sum()) for n, c in agreement.counted.items()}

    def add(name: str, value: Tensor, counted: Tensor) -> None:
        found[name] = ((value * counted).sum(), counted.sum())

    plain = ~scenes.normals
    add("size", arrange(reading.size, order) == scenes.size, legible & size_shows(scenes))
    add("special", arrange(reading.special, order) == (scenes.subject >= 0), legible & plain[:, None])
    add("floor", reading.floor == scenes.floor, plain & (scenes.style == 0))
    add("style_error", style_error(reading.style_parameters, scenes.style_parameters), plain)
    add("facing_error", _degrees(arrange(reading.facing, order) - truth.facing), _faced(truth, scenes) & legible)
    add("elevation_error", _degrees(reading.elevation - scenes.elevation), plain)
    add("box_error", 64 * (arrange(reading.box, order) - truth.box).abs().mean(-1), legible)
    add("iou", mask_iou(reading, instance), legible)
    return found


def pattern_tells(scenes: Scenes, images: Tensor, mask: Tensor) -> Tensor:
    """Objects (B K bool) whose part of the picture (mask B K H W) every other pattern would change visibly.

    The same scenes are rendered with each of the other patterns: a style may leave nothing of them, and an object that
    is small or seen from above may show one check. images: the B renders, 3 H W in [-1, 1].
    """
    least = torch.full_like(scenes.radius, math.inf)
    for turn in range(1, len(PATTERNS)):
        other = torch.where(scenes.pattern >= 0, (scenes.pattern + turn) % len(PATTERNS), scenes.pattern)
        changed = animate(scenes.replace(pattern=other), torch.zeros(1))  # as it begins, if it moves
        squares = ((render(changed, images.shape[-1]).rgb * 2 - 1 - images) / 2).square().mean(1, keepdim=True)
        least = torch.minimum(least, (squares * mask).sum((2, 3)) / mask.sum((2, 3)).clamp(min=1))
    return least.sqrt() >= CONTRAST


def _degrees(angle: Tensor) -> Tensor:
    return (torch.remainder(angle + math.pi, 2 * math.pi) - math.pi).abs() * (180 / math.pi)


def _faced(truth: Targets, scenes: Scenes) -> Tensor:
    """Where the front can be seen: from behind or above, how far round one stands cannot be told exactly."""
    return truth.faced & (truth.facing.cos() > 0) & (scenes.elevation < math.radians(50))[:, None]


@torch.no_grad()
def judge_motion(oracle: Oracle, videos: Tensor, scenes: Scenes) -> Found:
    """Answers on rendered videos (B F 3 64 64 in [-1, 1]): shares right of motion and mover."""
    metric = MotionAccuracy(oracle).to(videos.device)
    metric.update(videos, scenes)
    return {"motion": (metric.right, metric.videos), "mover": (metric.right_mover, metric.movers)}


# -- the card ---------------------------------------------------------------------------------------------------------

# Columns of the card: a recipe of split "test", whose combinations, styles and subjects were never trained on.
COLUMNS = {
    "photo": "photo",
    "named styles": "named",
    "unnamed styles": "styled",
    "turntable": "objects",
    "views": "views",
    "pairs": "pairs",
    "times": "times",
    "normal maps": "normals",
}
ROWS = {  # name -> (how it is printed, columns it says something about; all when empty)
    "shape": ("%", ()),
    "colour": ("%", ()),
    "pattern": ("%", ()),
    "marked": ("%", ("views",)),
    "size": ("%", ()),
    "count": ("%", ()),
    "relation": ("%", ()),
    "view": ("%", ("views", "turntable")),
    "style": ("%", ("named styles",)),
    "photo": ("%", ("photo", "turntable", "views", "pairs", "times")),
    "time": ("%", ("photo", "times", "pairs")),
    "floor": ("%", ("photo", "times", "pairs")),
    "normals": ("%", ()),
    "special": ("%", ()),
    "style_error": ("", ()),
    "facing_error": ("deg", ()),
    "elevation_error": ("deg", ()),
    "box_error": ("px", ()),
    "iou": ("", ()),
}
BEGIN, END = "<!-- figures: written by `python -m lit_gen.metrics.evaluate` -->", "<!-- end of figures -->"


def _pieces(recipe: str, count: int, device: torch.device, chunk: int = 256) -> list[Scenes]:
    return [sample(recipe, "test", 0, i.to(device)) for i in torch.arange(count).split(chunk)]


def figures(oracle: Oracle, count: int, device: torch.device) -> dict[str, dict[str, float]]:
    """column -> name -> figure, on `count` renders a column (a quarter as many videos)."""
    oracle, table = oracle.to(device), {}
    for column, recipe in COLUMNS.items():
        total: dict[str, float] = {}
        cases: dict[str, float] = {}
        for scenes in _pieces(recipe, count, device):
            picture = render(scenes)
            for name, (value, number) in judge(oracle, picture.rgb * 2 - 1, scenes, picture.instance).items():
                total[name] = total.get(name, 0.0) + float(value)
                cases[name] = cases.get(name, 0.0) + float(number)
        table[column] = {name: total[name] / cases[name] for name in total if cases[name] >= 20}
    for column, recipe in {"videos": "motion", "styled videos": "styled-motion"}.items():
        metric = MotionAccuracy(oracle).to(device)
        for scenes in _pieces(recipe, max(count // 4, 32), device, 64):
            metric.update(render_video(scenes).rgb * 2 - 1, scenes)
        table[column] = {name: float(value) for name, value in metric.compute().items()}
    metric = SubjectSimilarity(oracle).to(device)
    for start in range(0, max(count // 8, 64) // 64 * 64, 64):  # galleries of 64 subjects, two pictures of each
        first = torch.arange(start, start + 64, device=device) * 8
        pair = [sample("subjects", "test", 0, first + i) for i in (0, 1)]
        metric.update(*(render(scenes).rgb * 2 - 1 for scenes in pair))
    table["subjects"] = {name: float(value) for name, value in metric.compute().items()}
    return table


def as_markdown(table: dict[str, dict[str, float]]) -> str:
    """The figures as Markdown tables."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, (unit, columns) in ROWS.items():
        cells = []
        for column in COLUMNS:
            value = table[column].get(name) if not columns or column in columns else None
            if value is None:
                cells.append("")
            else:
                cells.append({"%": f"{100 * value:.1f}", "": f"{value:.3f}"}.get(unit, f"{value:.1f}"))
        lines.append(f"| {name.replace('_', ' ')}{f' ({unit})' if unit else ''} | " + " | ".join(cells) + " |")
    lines += ["", "| | videos | styled videos |", "|---|---|---|"]
    for name, label in {"motion": "motion class (%)", "mover": "moving object: shape and colour (%)"}.items():
        lines.append(f"| {label} | {100 * table['videos'][name]:.1f} | {100 * table['styled videos'][name]:.1f} |")
    identity, similarity = table["subjects"]["identity"], table["subjects"]["similarity"]
    lines += ["", f"Subjects never seen: the right one of 64 in {100 * identity:.1f} % (mean cosine {similarity:.2f})."]
    return "\n".join(lines)


def write_card(card: Path, text: str) -> None:
    """Put the figures between the card's markers."""
    if not card.is_file():
        raise UserError(f"{card}: no card to write the figures into")
    before, begin, rest = card.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{card}: the lines `{BEGIN}` and `{END}` are missing")
    card.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main(argv: list[str] | None = None) -> int:
    """`python -m lit_gen.metrics.evaluate`."""
    about = "Measure the oracle on held-out renders."
    parser = argparse.ArgumentParser(prog="python -m lit_gen.metrics.evaluate", description=about)
    parser.add_argument("--oracle", default="data/oracle", help="folder of the oracle")
    parser.add_argument("--count", type=int, default=1024, help="renders per column of the table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    parser.add_argument("--no-card", action="store_true", help="print only; leave README.md as it is")
    args = parser.parse_args(argv)
    oracle = Oracle.from_pretrained(args.oracle)
    began = time.perf_counter()
    text = as_markdown(figures(oracle, args.count, torch.device(args.device)))
    print(text)
    print(f"({args.count} renders per column, {time.perf_counter() - began:.0f} s on {args.device})")
    if not args.no_card:
        write_card(Path(args.oracle) / "README.md", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
