"""`python -m lit_gen check -c ...`: what would go wrong, told in seconds and without a GPU; nothing is trained."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_gen import cli, experiment, sweep
from lit_gen.check.report import Report, bytes_of
from lit_gen.errors import UserError, nearest
from lit_gen.run import Override, Run
from lit_gen.settings import KeyPath, leaves

# Settings that name what a run writes, not what it reads.
WRITTEN = ("export", "out", "save_dir", "dirpath", "filename", "cache_folder")
SPLITS = ("train", "val", "test")


def main(argv: list[str]) -> int:
    """Print every problem of an experiment and, per stage, what it would do; returns 2 if there are problems."""
    files, options, overrides = cli.parse(argv)
    if not files:
        raise UserError("check needs an experiment: -c FILE (`python -m lit_gen list` names those here)")
    runs = cli.chosen(files, options, overrides)
    reports, cells, mistakes = [Report(run) for run in runs], [], []
    try:
        cells = _cells(files, options, overrides)
    except UserError as error:  # in the section itself
        mistakes.append(str(error))
    # Of each arm the first: with another seed, or at another of its values, it is the same but for a number.
    firsts = {cell.series: cell for cell in reversed(cells)}
    arms = {series: [Report(run) for run in cell.runs] for series, cell in reversed(firsts.items())}
    everything = [*reports, *(report for arm in arms.values() for report in arm)]
    mistakes += _bind(everything)
    for report in reports:
        check(report, runs)
    _check_disk(reports)
    if cells:
        _check_arms(reports[0], arms, cells)
    for report in reports:
        print(f"{report.run.name}: {', '.join(v for k, v in report.facts.items() if k in ('model', 'state'))}")
        for topic in ("data", "memory", "disk", "sweep"):
            if topic in report.facts:
                print(f"  {topic:7} {report.facts[topic]}")
    for note in _each_once(note for report in everything for note in report.notes):
        print(f"note: {note}")
    problems = _each_once([*mistakes, *(problem for report in everything for problem in report.problems)])
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{len(problems)} problem{'s' * (len(problems) != 1)} found")
    return 2 if problems else 0


def _cells(files: list[str], options: cli.Options, overrides: list[Override]) -> list[sweep.Cell]:
    """The cells of the sweep in the files, if there is one."""
    if "sweep" not in experiment.read(files, overrides).data:
        return []
    own = {key: value for key, value in overrides if key in experiment.ON_COMMAND_LINE}
    rest = [(key, value) for key, value in overrides if key not in (*own, "seed_everything")]  # it has seeds of its own
    cells = sweep.read(files, bool(options.get("smoke")), own, rest, write=False).cells
    stage = options.get("stage")
    return [replace(cell, runs=tuple(r for r in cell.runs if not stage or r.folder.name == stage)) for cell in cells]


def _check_arms(first: Report, arms: dict[str, list[Report]], cells: list[sweep.Cell]) -> None:
    """Find out what each arm of a sweep would do; `first` is told what all its runs take together."""
    runs, cells_of = [run for cell in cells for run in cell.runs], Counter(cell.series for cell in cells)
    stored = 0
    for arm, reports in arms.items():
        for report in reports:
            check(report, runs, is_arm=True)
            stored += report.stored * cells_of[arm]
    told = f"{len(arms)} arm{'s' * (len(arms) != 1)}"
    first.facts["sweep"] = f"{len(cells)} runs of {told}, {bytes_of(stored)} of checkpoints"
    place = _existing(first.run.folder)
    if stored > (free := shutil.disk_usage(place).free):
        problem = f"the sweep's checkpoints take {bytes_of(stored)}, but only {bytes_of(free)} are free at {place}"
        first.problem(("sweep",), problem)


def _each_once(lines: Iterable[str]) -> list[str]:
    """Lines without those that others say of another run."""
    kept: dict[str, str] = {}
    for line in lines:
        where, _, text = line.partition(": ")
        kept.setdefault(line if ":" in where else text, line)
    return list(kept.values())


def _bind(reports: list[Report]) -> list[str]:
    """Give each report the settings of its run; returns the mistakes in those of all runs."""
    from lit_gen.mistakes import sound, with_overrides  # heavy, so only now that the files themselves are in order
    from lit_gen.stage import Binding, quieten

    class Lenient(Binding):
        def __init__(self, runs: list[Run]) -> None:
            self.mistakes: list[str] = []
            super().__init__("fit", runs)

        def refuse(self, mistakes: list[str]) -> None:
            self.mistakes = mistakes

    quieten()
    binding = Lenient([report.run for report in reports])
    for report in reports:
        try:
            cli.refuse_own_folder(report.run)
        except UserError as error:
            binding.mistakes.append(str(error))
    for report, bound in zip(reports, binding.bound, strict=True):
        report.tree, report.bound = with_overrides(report.run), bound is not None
        if bound is not None:
            report.settings = bound.as_dict()["fit"]
        else:
            report.settings, report.gone = sound(report.run, binding.top_level)
    return binding.mistakes


def check(report: Report, runs: list[Run], is_arm: bool = False) -> None:
    """Find out what one run would do.

    Args:
        report: of the run.
        runs: all of the experiment, whose checkpoints will be there in time.
        is_arm: whether only problems and notes, and what it stores, will be told.
    """
    from lit_gen.check.data import check_data
    from lit_gen.check.training import check_model, check_times, check_trainer

    run, settings = report.run, report.settings
    _check_paths(report, settings, runs)
    check_times(report, settings.get("trainer") or {})
    if not report.bound:
        check_data(report, settings)
        return
    report.facts["model"] = settings["model"]["class_path"].rpartition(".")[2]
    paths_are_good = not report.problems
    check_trainer(report, settings)
    batch = check_data(report, settings)
    if paths_are_good:  # or building the model would only say the same
        check_model(report, settings, batch, is_arm)
    started = f"would continue from {run.last}" if run.last.exists() else "not started"
    report.facts["state"] = "finished" if run.done.is_file() else started
    _check_writable(report)


def _check_paths(report: Report, settings: dict[str, Any], runs: list[Run]) -> None:
    """Texts that can only be meant as paths, and lead nowhere."""
    coming = {str(other.last) for other in runs}
    for path, text in _texts(settings):
        if path[-1] in WRITTEN or text in coming or re.search(r"[{*?\s:]", text):
            continue
        if "/" not in text and path[0] not in ("init_from", "ckpt_path"):
            continue
        if path[0] == "data" and path[-1] in SPLITS:  # sets of shards, which can be built
            continue
        place = Path(text)
        first = place.parts[0]
        is_local = (
            place.is_absolute() or first in (".", "..") or Path(first).is_dir() or path[0] in ("init_from", "ckpt_path")
        )
        if is_local and not place.exists():
            parent = next(p for p in place.parents if p.exists())
            lost = place.relative_to(parent).parts[0]
            near = nearest(lost, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""
            report.problem(
                path, f"`{'.'.join(map(str, path))}` names {text}, but there is no `{lost}` in {parent}{near}"
            )


def _texts(settings: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    parts: dict[KeyPath, Any] = {(key,): settings.get(key) for key in ("model", "data", "init_from", "ckpt_path")}
    parts["trainer", "callbacks"] = (settings.get("trainer") or {}).get("callbacks")
    for start, part in parts.items():
        yield from ((path, leaf) for path, leaf in leaves(part, start) if isinstance(leaf, str))


def _check_writable(report: Report) -> None:
    place = _existing(report.run.folder)
    if not os.access(place, os.W_OK):
        report.problem(("run_root",), f"nothing can be written to {place}, where the run folder would be")


def _check_disk(reports: list[Report]) -> None:
    """Whether the checkpoints of all runs fit on their disk together."""
    needed = sum(report.stored for report in reports if report.facts.get("state") != "finished")
    if not needed:
        return
    place = _existing(reports[0].run.folder)
    free = shutil.disk_usage(place).free
    for report in reports:
        if report.stored:
            report.facts["disk"] += f"; {bytes_of(free)} are free at {place}"
    if needed > free:
        reports[0].problem(
            ("checkpoint",),
            f"the checkpoints of {'all stages' if len(reports) > 1 else 'this run'} take {bytes_of(needed)}, but only "
            f"{bytes_of(free)} are free at {place}; set `run_root`, or checkpoint.keep and keep_every_n_steps",
        )


def _existing(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    return next(p for p in (path, *path.parents, Path(".")) if p.exists())
