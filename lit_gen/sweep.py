"""`python -m lit_gen sweep -c experiments/X_ablation.yaml`: an experiment in several arms and seeds, and its report.

The file is an experiment with a section

    sweep:
      seeds: [0, 1, 2]
      test: [adapter]               # stages whose checkpoints are tested; the last one by default
      arms:
        full: {}                    # settings laid over the experiment
        no scale: {model: {init_args: {adapter: {scale: false}}}}
        still: {take: {adapter: full}, stages: {...}}   # a stage that is another arm's is not trained again
        pictures: {stages: {temporal: null}}            # nor one that the arm does without
      report: {...}                 # see lit_gen/report.py

With `over: {guidance: [1, 3, 10]}` every arm is run at each of these values, which the experiment has as
`${vars.guidance}`; the arms are then called "full, guidance 3", and so on. An arm with a list of its own, e.g.
`over: [1, 2, 5.5]`, is given these instead; where it has `null` it is not run.

Each arm and seed is an ordinary experiment, in `runs/<experiment>/<arm>-seed<n>/`, trained by `fit` and scored by
`test`; so a sweep that was interrupted continues, and a SLURM array shares one.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lit_gen import experiment
from lit_gen.errors import UserError, nearest
from lit_gen.files import write_whole
from lit_gen.run import Override, Run
from lit_gen.settings import KeyPath, Settings, merge, subtree
from lit_gen.task import Task

_KEYS = ("seeds", "test", "over", "arms", "report")


@dataclass(frozen=True)
class Arm:
    """Settings laid over an experiment, at one of the values of `over` if there are any."""

    name: str
    written: str  # its name in the file
    settings: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)  # where each setting was written
    value: float | None = None


@dataclass(frozen=True)
class Cell:
    """One arm with one seed."""

    arm: str
    seed: int
    file: Path  # its experiment
    runs: tuple[Run, ...]  # its stages
    taken: dict[str, Path]  # stage -> run folder of the arm it is taken from
    tested: tuple[str, ...]  # stages, "" for an experiment without
    source: str  # the arm whose stages it takes, else its own
    series: str = ""  # the arm's name without the value
    value: float | None = None  # of what the sweep goes over
    settings: dict[str, Any] = field(default_factory=dict)  # what it lays over the sweep's own files

    def has(self, stage: str) -> bool:
        """Whether the arm goes through a stage, or takes it from another."""
        return not stage or stage in self.taken or any(run.folder.name == stage for run in self.runs)

    def folder(self, stage: str) -> Path:
        """Run folder of a stage, wherever it was trained."""
        if stage in self.taken:
            return self.taken[stage]
        if not self.has(stage):
            raise UserError(f"arm `{self.arm}` has no stage `{stage}`")
        return next(run.folder for run in self.runs if not stage or run.folder.name == stage)


@dataclass(frozen=True)
class Sweep:
    """All cells of a sweep file, those of one arm side by side."""

    name: str
    cells: list[Cell]
    report: dict[str, Any]
    over: str = ""  # the name of what it goes over

    def of(self, arm: str) -> list[Cell]:
        found = [cell for cell in self.cells if cell.arm == arm]
        if not found:
            raise UserError(f"{self.name}: there is no arm `{arm}`{nearest(arm, {c.arm for c in self.cells})}")
        return found


def main(argv: list[str]) -> int:
    """Run a sweep, or the part of it that is this task's, then write its report."""
    parser = argparse.ArgumentParser(
        prog="python -m lit_gen sweep", description="Train and test every arm of an experiment with every seed."
    )
    parser.add_argument("-c", "--config", action="append", required=True, metavar="FILE", help="experiment with arms")
    parser.add_argument("--arm", action="append", help="only this arm (may be given several times)")
    parser.add_argument("--seed", type=int, action="append", help="only this seed")
    parser.add_argument("--task", metavar="I/N", help="only the I-th of N parts (default: this SLURM array task's)")
    parser.add_argument("--experiment", metavar="NAME", help="name of the folder of its runs")
    parser.add_argument("--run_root", metavar="DIR", help="where that folder lives (default: runs)")
    parser.add_argument("--report", action="store_true", help="train nothing, write the report of what there is")
    parser.add_argument(
        "--smoke", action="store_true", help="two small steps of every arm, to see that all of it works"
    )
    args, overrides = parser.parse_known_args(argv)
    # Not left among the settings of each run: all of them would share one folder, or lie where nobody looks for them.
    own = {key: value for key in ("experiment", "run_root") if (value := getattr(args, key)) is not None}
    from lit_gen import cli

    _, _, settings = cli.parse(overrides)
    if any(key == "seed_everything" for key, _ in settings):
        raise UserError("a sweep has seeds of its own: write others into `sweep.seeds`, or choose of them by --seed")
    sweep = read(args.config, args.smoke, own, settings)
    cells = [
        cell
        for cell in sweep.cells
        if (not args.arm or cell.arm in args.arm) and (not args.seed or cell.seed in args.seed)
    ]
    for arm in args.arm or ():
        sweep.of(arm)  # says what is wrong with its name
    seeds = sorted({cell.seed for cell in sweep.cells})
    if absent := [seed for seed in args.seed or () if seed not in seeds]:
        raise UserError(f"{sweep.name}: there is no seed {absent[0]}, only {', '.join(map(str, seeds))}")
    if not args.report:
        part = share(cells, Task.parse(args.task) if args.task else Task.of_array())
        for number, cell in enumerate(part, 1):
            print(f"[{number}/{len(part)}] {sweep.name}: {cell.arm}, seed {cell.seed}", flush=True)
            if code := run(cell, overrides, args.smoke):
                return code
    missing = [cell for cell in sweep.cells if not all(is_tested(cell.folder(stage)) for stage in cell.tested)]
    if missing and not args.report:
        print(f"{len(missing)} of {len(sweep.cells)} cells are still to be run; the report waits for them")
        return 0
    from lit_gen.report import write  # after the runs, since it needs numpy and pictures

    for path in write(sweep):
        print(f"written: {path}")
    return 0


def read(
    files: list[str],
    smoke: bool = False,
    own: dict[str, str] | None = None,
    overrides: list[Override] | None = None,
    write: bool = True,
) -> Sweep:
    """Read a sweep and write the experiment file of each of its cells.

    Args:
        files: the `-c` files.
        smoke: of runs made small, which lie below `smoke/`.
        own: another `experiment` or `run_root` than the files give.
        overrides: settings of every run.
        write: whether the files are written.

    Raises:
        UserError: there is no `sweep:` section, or it is not as described above.
    """
    merged = experiment.read(files, list((own or {}).items()))
    where, section = merged.origin(("sweep",)), merged.data.get("sweep")
    if not isinstance(section, dict) or not isinstance(section.get("arms"), dict):
        raise UserError(f"{where or files[-1]}: a sweep needs `sweep: {{arms: {{NAME: SETTINGS}}}}`")
    for key in section:
        if key not in _KEYS:
            raise UserError(f"{merged.origin(('sweep', key))}: there is no setting `sweep.{key}`{nearest(key, _KEYS)}")
    name = str(merged.data.get("experiment") or Path(files[-1]).stem)
    root = Path(str(merged.data.get("run_root") or "runs"))
    over, arms = _arms(merged, section)
    seeds = section.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"{merged.origin(('sweep', 'seeds'))}: `seeds` is a list of numbers from 0 on: [0, 1, 2]")
    cells = [_cell(merged, name, root, arm, seed, smoke, overrides or []) for seed in seeds for arm in arms]
    if write:
        for cell in cells:
            _write(cell, files)
    report = dict(section.get("report") or {})
    if smoke:  # whose figures mean nothing
        report["out"] = str(root / "smoke" / name / "report.md")
    return Sweep(name, cells, report, over)


def _arms(merged: Settings, section: dict[str, Any]) -> tuple[str, list[Arm]]:
    """-> (what the sweep goes over, arms; those that take a stage from another come after it)"""
    over = section.get("over") or {}
    if not isinstance(over, dict) or len(over) > 1 or not all(map(_are_numbers, over.values())):
        where = merged.origin(("sweep", "over"))
        raise UserError(f"{where}: `over` is one name with a list of numbers: {{guidance: [1, 3]}}")
    key = next(iter(over), "")
    arms = []
    for written, settings in section["arms"].items():
        _require_mapping(merged, ("sweep", "arms", written), settings)
        for part in ("take", "stages", "vars"):
            _require_mapping(merged, ("sweep", "arms", written, part), (settings or {}).get(part))
    for written, settings in section["arms"].items():
        origins = subtree(merged, ("sweep", "arms", written)).origins if settings else {}
        settings = dict(settings or {})
        own = settings.pop("over", None)
        for stage, source in (settings.get("take") or {}).items():
            if source not in section["arms"] or (section["arms"][source] or {}).get("take"):
                where = merged.origin(("sweep", "arms", written, "take", stage))
                raise UserError(
                    f"{where}: `{written}` cannot take a stage from `{source}`{nearest(source, section['arms'])}"
                )
        if own is not None and (not _are_numbers(own, or_null=True) or len(own) != len(over.get(key, ()))):
            where = merged.origin(("sweep", "arms", written, "over"))
            needed = f"needs a list of {len(over[key])}, one for each {key}" if key else "goes with `sweep.over`"
            raise UserError(f"{where}: `over` of `{written}` {needed}")
        if not key:
            arms.append(Arm(written, written, settings, origins))
            continue
        for value, given in zip(over[key], own or over[key], strict=True):
            if given is None:
                continue
            at = f", {key} {value:g}"
            more = {"vars": {**settings.get("vars", {}), key: given}}
            listed = origins.get(("over",)) or merged.origin(("sweep", "over", key))
            if take := settings.get("take"):
                more["take"] = {stage: source + at for stage, source in take.items()}
            arms.append(Arm(written + at, written, settings | more, origins | {("vars", key): listed}, float(value)))
    names = {arm.name for arm in arms}
    slugs: dict[str, Arm] = {}
    for arm in arms:
        if (other := slugs.setdefault(slug(arm.name), arm)) is not arm:
            where = merged.origin(("sweep", "arms", arm.written))
            raise UserError(f"{where}: `{other.name}` and `{arm.name}` would share their folders; rename one of them")
        for stage, source in (arm.settings.get("take") or {}).items():
            if source not in names:
                where = merged.origin(("sweep", "arms", arm.written, "take", stage))
                raise UserError(f"{where}: `{arm.name}` takes a stage from `{source}`, which is not run")
    return key, sorted(arms, key=lambda arm: bool(arm.settings.get("take")))


def _require_mapping(merged: Settings, path: KeyPath, value: Any) -> None:
    if not isinstance(value, dict | None):
        raise UserError(f"{merged.origin(path)}: `{path[-1]}` must be a mapping, not {value!r}")


def _are_numbers(values: Any, or_null: bool = False) -> bool:
    given = [v for v in values if v is not None or not or_null] if isinstance(values, list) else []
    return bool(given) and all(isinstance(v, int | float) for v in given)


def _cell(merged: Settings, name: str, root: Path, arm: Arm, seed: int, smoke: bool, overrides: list[Override]) -> Cell:
    section = merged.data["sweep"]
    own = dict(arm.settings)
    take = own.pop("take", None) or {}
    folder = f"{name}/{slug(arm.name)}-seed{seed}"
    file = root / name / "cells" / f"{slug(arm.name)}-seed{seed}.yaml"
    content = {
        "experiment": folder,
        "run_root": str(root),
        "seed_everything": seed,
        **{key: value for key, value in own.items() if key != "stages"},
    }
    given = own.get("stages") or {}
    stages = {stage: None if settings is None else dict(settings) for stage, settings in given.items()}
    names = [stage for stage, settings in (merged.data.get("stages") or {}).items() if settings is not None]
    taken = {}
    for stage, source in take.items():
        if stage not in names:
            where = merged.origin(("sweep", "arms", arm.written, "take", stage))
            raise UserError(f"{where}: there is no stage `{stage}`{nearest(stage, names)}")
        taken[stage] = root / ("smoke" if smoke else "") / name / f"{slug(source)}-seed{seed}" / stage
        stages[stage] = None
        after = names[names.index(stage) + 1 :]
        following = [s for s in after if s not in take and stages.get(s, {}) is not None][:1]
        for later in following:
            stages.setdefault(later, {}).setdefault("init_from", str(taken[stage] / "checkpoints" / "last.ckpt"))
    if stages:
        content["stages"] = stages
    origins = arm.origins | {("seed_everything",): merged.origin(("sweep", "seeds"))}
    runs = tuple(experiment.cut(merge(merged, Settings(content, origins)), folder, overrides, smoke))
    tested = tuple(section.get("test") or ([runs[-1].folder.name] if len(names) else [""]))
    for stage in tested:
        if names and stage not in names:
            where = merged.origin(("sweep", "test"))
            raise UserError(f"{where}: there is no stage `{stage}` to test{nearest(stage, names)}")
    source = next(iter(take.values()), arm.name)
    cell = Cell(arm.name, seed, file, runs, taken, tested, source, arm.written, arm.value, content)
    return replace(cell, tested=tuple(stage for stage in tested if cell.has(stage)))


def _write(cell: Cell, files: list[str]) -> None:
    """Write a cell's experiment file, over the sweep's own files."""
    folder = cell.file.parent
    folder.mkdir(parents=True, exist_ok=True)
    content = {"base": [os.path.relpath(f, folder) for f in files], **cell.settings}
    text = f"# {folder.parent.name}: {cell.arm}, seed {cell.seed}\n" + yaml.safe_dump(content, sort_keys=False)
    if not cell.file.is_file() or cell.file.read_text() != text:
        write_whole(cell.file, text)


def run(cell: Cell, overrides: list[str], smoke: bool) -> int:
    """Train a cell's stages and test those that are to be; what is done already is skipped."""
    from lit_gen import cli

    common = ["-c", str(cell.file), *overrides, *(["--smoke"] if smoke else [])]
    # Also with what was finished with other settings, which `fit` then refuses.
    waiting = [run for run in cell.runs if not run.done.is_file() or run.changes()]
    if waiting and (code := cli.main(["fit", *common])):
        return code
    for stage in cell.tested:
        if stage in cell.taken or is_tested(cell.folder(stage)):
            continue
        if not cell.runs[-1].done.is_file():
            return 0  # paused: the next command continues
        if code := cli.main(["test", *common, *(["--stage", stage] if stage else [])]):
            return code
        if not is_tested(cell.folder(stage)):
            raise UserError(
                f"{cell.folder(stage)}: its test gave no scores, and a sweep is there to compare them; the method "
                "judges nothing with these settings"
            )
    return 0


def is_tested(folder: Path) -> bool:
    """Whether a run has scores of its final weights."""
    scores, done = folder / "scores.json", folder / "DONE"
    return scores.is_file() and done.is_file() and scores.stat().st_mtime >= done.stat().st_mtime


def share(cells: list[Cell], task: Task) -> list[Cell]:
    """The cells of one task; cells that take stages from each other stay together."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.source, cell.seed), []).append(cell)
    return [cell for group in list(groups.values())[task.number :: task.count] for cell in group]


def slug(name: str) -> str:
    """A name as it can stand in a path."""
    return re.sub(r"[^\w.+-]+", "-", name.strip().lower()).strip("-")
