"""The report of a sweep: every measure of every arm with intervals, what is claimed and whether it holds, pictures.

The section `sweep: report:` of an experiment file:

    title: StyleCrafter
    out: docs/results/stylecrafter.md
    text: what was compared, in a few lines of Markdown
    findings: what the figures below say, in words; of the runs that the committed report is of
    reference: full                       # the arm that others are compared with
    measures:
      style error: {stage: adapter, better: lower}   # or higher, or neither; left out where no arm has it
    claims:
      - {say: "the style is nearer with decoupled crops", measure: style error, arm: full, below: no decoupling}
      - {say: "...", measure: leak rate, arm: full, below: appended to text, times: 0.33}
      - {say: "...", measure: R@1 short, arm: full, below: full, against: R@1 long}   # another measure
      - {say: "as often right, within two points", measure: accuracy, arm: full, above: no scale, margin: 0.02}
    overviews:                            # tables of means: a row for each name, a column for each measure and arm
      - {measures: [R@1], of: [short, long]}                # "R@1 short", "R@1 long"; claims may be made of them too
      - {measures: [rank], of: [short, long], arms: [full], statistic: median}   # mean over seeds of medians
    pictures: {adapter: prompts-x-styles.png}   # stage -> latest sample of that name, of the first seed
    shown: [full, no scale]               # arms whose pictures are shown; all by default

A sweep that goes `over` values has tables with a column for each, and may have

    plots: [palette error]                # measures drawn over the values
      # in claims: how fast a measure changes with the logarithm of the value, of arms without a value
      - {say: "...", slope: palette error, arm: asd, below: vsd, times: 0.25}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lit_gen.errors import UserError, nearest
from lit_gen.metrics import scores
from lit_gen.metrics.scores import Estimate
from lit_gen.sweep import Cell, Sweep, is_tested, slug

_KEYS = (
    "title",
    "out",
    "text",
    "findings",
    "reference",
    "measures",
    "claims",
    "pictures",
    "shown",
    "plots",
    "overviews",
)
_WIDTH = 640  # pixels of a picture in the report, at most

Points = dict[float, list[Cell]]  # value that the sweep went over -> cells, one for each seed


@dataclass(frozen=True)
class Verdict:
    """A claim, the figure it rests on, and whether that bears it out."""

    say: str
    figure: Estimate | None  # arm - times * other
    holds: str  # yes | no | not shown | no samples


def write(sweep: Sweep) -> list[Path]:
    """Write the report and its pictures; returns the files.

    Raises:
        UserError: the section is not as described above, or nothing has been tested yet.
    """
    section = sweep.report
    for key in section:
        if key not in _KEYS:
            raise UserError(f"{sweep.name}: there is no setting `sweep.report.{key}`{nearest(key, _KEYS)}")
    measures = section.get("measures") or {}
    arms = list(dict.fromkeys(cell.arm for cell in sweep.cells))
    tested = {arm: [cell for cell in sweep.of(arm) if _is_complete(cell)] for arm in arms}
    if not measures or not any(tested.values()):
        raise UserError(f"{sweep.name}: no measures are named, or no arm has been tested, so there is no report yet")
    series = _series(sweep, tested)
    out = Path(section.get("out") or f"docs/results/{slug(sweep.name)}.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {section.get('title') or sweep.name}", "", (section.get("text") or "").strip(), ""]
    if findings := (section.get("findings") or "").strip():
        lines += ["## Findings", "", findings, "", "## Figures", ""]
    plots = _plots(sweep, series, measures, out)
    for title, file in plots:
        lines += [f"![{title}]({file.relative_to(out.parent).as_posix()})", ""]
    lines += _tables_over(sweep, series, measures) if sweep.over else _tables(sweep, tested, measures)
    # of arms that have been tested; an arm that does not exist is a mistake that `judge` tells
    known = {**tested, **{name: [c for cells in points.values() for c in cells] for name, points in series.items()}}
    lines += _overviews(section.get("overviews") or (), tested)
    named = ("arm", "below", "above")
    claims = [c for c in section.get("claims") or () if all(known.get(c.get(key), True) for key in named)]
    if claims:
        shown = {f"{m} {of}": {} for o in section.get("overviews") or () for m in o["measures"] for of in o["of"]}
        lines += _claims([judge(claim, tested, shown | measures, series) for claim in claims])
    pictures = _pictures(sweep, tested, out)
    for title, file in pictures:
        lines += [f"**{title}**", "", f"![{title}]({file.relative_to(out.parent).as_posix()})", ""]
    out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return [out, *(file for _, file in (*plots, *pictures))]


def judge(
    claim: dict[str, Any],
    tested: dict[str, list[Cell]],
    measures: dict[str, Any],
    series: dict[str, Points] | None = None,
) -> Verdict:
    """Whether arm < times * other + margin (or > times * other - margin) beyond the interval of the paired difference.

    The figure told is the difference itself, without the margin.
    """
    directions = [d for d in ("below", "above") if d in claim]
    measure = claim.get("slope", claim.get("measure"))
    if len(directions) != 1 or "arm" not in claim or measure not in measures:
        raise UserError(f"claim {claim}: needs `measure` (one of the measures), `arm`, and `below` or `above` an arm")
    known: dict[str, Any] = (series or {}) if "slope" in claim else tested
    for arm in (claim["arm"], claim[directions[0]]):
        if arm not in known:
            raise UserError(f"claim {claim.get('say', claim)!r}: there is no arm `{arm}`{nearest(arm, known)}")
    other = claim.get("against", measure)
    if other not in measures:
        raise UserError(f"claim {claim.get('say', claim)!r}: there is no measure `{other}`{nearest(other, measures)}")
    one, two = known[claim["arm"]], known[claim[directions[0]]]
    if "slope" in claim:
        ours, theirs = (_slopes(points, measure, measures[measure]) for points in _same_seeds(one, two))
    else:
        same = _same_seeds({0: one}, {0: two})
        ours, theirs = _read(same[0][0], measures[measure]), _read(same[1][0], measures[other])
    factor = float(claim.get("times", 1.0))
    scaled = [{measure: {k: factor * v for k, v in run.get(other, {}).items()}} for run in theirs]
    try:
        figure = scores.difference(ours, scaled, measure)
    except UserError:  # the measure applies to no sample that both have
        return Verdict(str(claim.get("say", claim)), None, "no samples")
    margin = float(claim.get("margin", 0.0))
    if directions[0] == "below":
        right, wrong = figure.high < margin, figure.low > margin
    else:
        right, wrong = figure.low > -margin, figure.high < -margin
    return Verdict(str(claim.get("say", claim)), figure, "yes" if right else "no" if wrong else "not shown")


def _series(sweep: Sweep, tested: dict[str, list[Cell]]) -> dict[str, Points]:
    """What the sweep went over, by the arms' names without the value; empty for those that have not been tested."""
    found: dict[str, Points] = {cell.series: {} for cell in sweep.cells if cell.value is not None}
    for cells in tested.values():
        if cells and cells[0].value is not None:
            found[cells[0].series][cells[0].value] = cells
    return found


def _same_seeds(*groups: Points) -> list[Points]:
    """The groups with only those cells whose seeds all of them have, at every value; the others are still to be run."""
    seeds = set.intersection(*({cell.seed for cell in cells} for points in groups for cells in points.values()))
    return [{value: [c for c in cells if c.seed in seeds] for value, cells in points.items()} for points in groups]


def _slopes(points: Points, measure: str, how: dict[str, Any] | None) -> list[dict[str, dict[str, float]]]:
    """By seed and sample: change of a measure with the natural logarithm of the value, by least squares."""
    runs = {value: _read(cells, how) for value, cells in points.items() if value > 0}
    result = []
    for seed in range(min(map(len, runs.values()), default=0)):
        columns = {value: of_seeds[seed].get(measure, {}) for value, of_seeds in runs.items()}
        keys = set.intersection(*(set(column) for column in columns.values()))
        x = [math.log(value) for value in columns]
        slopes = {key: np.polyfit(x, [column[key] for column in columns.values()], 1)[0] for key in keys if len(x) > 1}
        result.append({measure: {key: float(slope) for key, slope in slopes.items()}})
    return result


def _plots(sweep: Sweep, series: dict[str, Points], measures: dict[str, Any], out: Path) -> list[tuple[str, Path]]:
    found = []
    for measure in sweep.report.get("plots") or ():
        if measure not in measures:
            raise UserError(f"{sweep.name}: plots: there is no measure `{measure}`{nearest(measure, measures)}")
        from lit_gen.plot import draw

        file = out.parent / "images" / f"{slug(sweep.name)}-{slug(measure)}.svg"
        shown = {name: _estimates(points, measure, measures[measure]) for name, points in series.items()}
        draw({name: points for name, points in shown.items() if points}, sweep.over, measure, file)
        found.append((f"{measure} over {sweep.over}", file))
    return found


def _estimates(points: Points, measure: str, how: dict[str, Any] | None) -> dict[float, Estimate]:
    found = {}
    for value, cells in sorted(points.items()):
        try:
            found[value] = scores.bootstrap(scores.table(_read(cells, how), measure)[0])
        except UserError:  # a measure that this arm does not have
            continue
    return found


def _tables_over(sweep: Sweep, series: dict[str, Points], measures: dict[str, Any]) -> list[str]:
    values = sorted({value for points in series.values() for value in points})
    lines = []
    for name, how in measures.items():
        better = (how or {}).get("better", "higher")
        lines.append(f"| {name} ({better} is better) | " + " | ".join(f"{sweep.over} {v:g}" for v in values) + " |")
        lines.append("|---|" + "---|" * len(values))
        for arm, points in series.items():
            found = _estimates(points, name, how)
            if found:
                lines.append(f"| {arm} | " + " | ".join(str(found.get(v, "")) for v in values) + " |")
        lines.append("")
    fewest = min(len(cells) for points in series.values() for cells in points.values())
    return [*lines, f"At least {fewest} seeds; mean and 95 % bootstrap interval over seeds and samples.", ""]


def _tables(sweep: Sweep, tested: dict[str, list[Cell]], measures: dict[str, Any]) -> list[str]:
    reference = sweep.report.get("reference")
    if reference is not None:
        sweep.of(reference)
    lines = []
    for name, how in measures.items():
        better = (how or {}).get("better", "higher")
        heading = f"| arm | {name} ({better} is better) |"
        heading += f" minus {reference} |" if reference else ""
        lines += [heading, "|---|---|" + ("---|" if reference else "")]
        first, shape = len(lines), (0, 0)
        for arm, cells in tested.items():
            try:
                runs = _read(cells, how)
                values, _ = scores.table(runs, name)
            except UserError:
                continue  # not tested, or a measure that this arm does not have
            shape = max(shape, values.shape)
            row = f"| {arm} | {scores.bootstrap(values)} |"
            if reference:
                row += f" {'' if arm == reference else _apart(cells, tested[reference], name, how)} |"
            lines.append(row)
        if len(lines) == first:  # tested before there was this measure
            del lines[-2:]
            continue
        lines += ["", f"{shape[1]} samples, {shape[0]} seeds; mean and 95 % bootstrap interval over both.", ""]
    return lines


def _overviews(overviews: Sequence[dict[str, Any]], tested: dict[str, list[Cell]]) -> list[str]:
    lines = []
    for overview in overviews:
        if unknown := overview.keys() - {"measures", "of", "arms", "statistic"}:
            raise UserError(f"an overview has no setting `{min(unknown)}`; it has measures, of, arms and statistic")
        measures, arms = overview["measures"], [arm for arm in overview.get("arms") or tested if tested.get(arm)]
        columns = [(measure, arm) for measure in measures for arm in arms]
        heads = [", ".join(([m] if len(measures) > 1 else []) + ([a] if len(arms) > 1 else [])) for m, a in columns]
        statistic = np.median if overview.get("statistic") == "median" else np.mean
        about = f"{measures[0]} of" if len(measures) == 1 else f"{arms[0]}:" if len(arms) == 1 else ""
        lines += [f"| {about} | " + " | ".join(heads) + " |", "|---|" + "---|" * len(columns)]
        runs = {arm: _read(tested[arm], None) for arm in arms}
        for name in overview["of"]:
            cells = []
            for measure, arm in columns:
                found = [list(run[f"{measure} {name}"].values()) for run in runs[arm] if f"{measure} {name}" in run]
                cells.append(f"{np.mean([statistic(values) for values in found]):.3g}" if found else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _apart(cells: list[Cell], reference: list[Cell], measure: str, how: dict[str, Any] | None) -> Estimate | str:
    ours, theirs = (_read(points[0], how) for points in _same_seeds({0: cells}, {0: reference}))
    try:
        return scores.difference(ours, theirs, measure)
    except UserError:  # no seed in common yet
        return ""


def _claims(verdicts: list[Verdict]) -> list[str]:
    lines = ["| claim | holds | difference |", "|---|---|---|"]
    return [*lines, *(f"| {v.say} | {v.holds} | {v.figure or ''} |" for v in verdicts), ""]


def _pictures(sweep: Sweep, tested: dict[str, list[Cell]], out: Path) -> list[tuple[str, Path]]:
    """Copies of the first seed's latest samples, beside the report."""
    found = []
    shown = sweep.report.get("shown") or list(tested)
    for arm in shown:
        sweep.of(arm)  # says what is wrong with its name
    for stage, name in (sweep.report.get("pictures") or {}).items():
        for arm in shown:
            cells = tested[arm]
            if not cells or stage in cells[0].taken or not cells[0].has(stage):  # the arm it was taken from shows it
                continue
            files = sorted(cells[0].folder(stage).glob(f"samples/step-*/{name}"))
            if not files:
                continue
            target = out.parent / "images" / f"{slug(sweep.name)}-{slug(arm)}-{Path(name).stem}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(files[-1]) as picture:
                picture.thumbnail((_WIDTH, 2 * _WIDTH))
                picture.convert("RGB").save(target, quality=88)  # not png: a repository keeps every version
            found.append((arm, target))
    return found


def _read(cells: list[Cell], how: dict[str, Any] | None) -> list[dict[str, dict[str, float]]]:
    return [scores.read(cell.folder((how or {}).get("stage") or cell.tested[-1])) for cell in cells]


def _is_complete(cell: Cell) -> bool:
    return all(is_tested(cell.folder(stage)) for stage in cell.tested)
