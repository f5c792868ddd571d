"""`python -m lit_gen check -c ...`: what would go wrong, told in seconds and without a GPU; nothing is trained."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_gen import cli, experiment
from lit_gen.check.report import Report, bytes_of
from lit_gen.errors import UserError, nearest
from lit_gen.experiment import Run
from lit_gen.settings import KeyPath, leaves

# Settings that name what a run writes, not what it reads.
WRITTEN = ("export", "out", "save_dir", "dirpath", "filename", "cache_folder")
SPLITS = ("train", "val", "test")


def main(argv: list[str]) -> int:
    """Print every problem of an experiment and, per stage, what it would do; returns 2 if there are problems."""
    files, options, overrides = cli.parse(argv)
    if not files:
        raise UserError("check needs an experiment: -c FILE (`python -m lit_gen list` names those here)")
    stage, smoke = options.get("stage"), bool(options.get("smoke"))
    runs = experiment.select(experiment.runs(files, overrides, smoke), stage if isinstance(stage, str) else None)
    mistakes, bound = _bind(runs)
    reports = [check(run, settings, runs) for run, settings in zip(runs, bound, strict=True)]
    _check_disk(reports)
    for report in reports:
        print(f"{report.run.name}: {', '.join(v for k, v in report.facts.items() if k in ('model', 'state'))}")
        for topic in ("data", "memory", "disk"):
            if topic in report.facts:
                print(f"  {topic:7} {report.facts[topic]}")
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        print(f"note: {note}")
    problems = list(dict.fromkeys([*mistakes, *(problem for report in reports for problem in report.problems)]))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{len(problems)} problem{'s' * (len(problems) != 1)} found")
    return 2 if problems else 0


def _bind(runs: list[Run]) -> tuple[list[str], list[dict[str, Any] | None]]:
    """-> (mistakes in the settings of all runs, settings by run, None for a run whose own do not fit)"""
    from lit_gen.stage import Binding  # heavy, so only now that the files themselves are in order

    class Lenient(Binding):
        mistakes: list[str] = []

        def refuse(self, mistakes: list[str]) -> None:
            self.mistakes = mistakes

    binding = Lenient("fit", runs)
    return binding.mistakes, [None if s is None else s.as_dict()["fit"] for s in binding.bound]


def check(run: Run, settings: dict[str, Any] | None, runs: list[Run]) -> Report:
    """Find out what one run would do.

    Args:
        run: the run.
        settings: as the parser resolved them; None where it objects to some: then what can be told without them.
        runs: all runs of the experiment, whose checkpoints will be there in time.
    """
    from lit_gen.check.data import check_data
    from lit_gen.check.training import check_model, check_times, check_trainer
    from lit_gen.mistakes import with_overrides

    report = Report(run, with_overrides(run))
    known = settings or report.tree.data
    _check_paths(report, known, runs)
    check_times(report, known.get("trainer") or {})
    if settings is None:
        check_data(report, known)
        return report
    model = settings["model"]["class_path"].rpartition(".")[2]
    report.facts["model"] = model
    paths_are_good = not report.problems
    check_trainer(report, settings)
    batch = check_data(report, settings)
    if paths_are_good:  # or building the model would only say the same
        check_model(report, settings, batch)
    started = f"would continue from {run.last}" if run.last.exists() else "not started"
    report.facts["state"] = "finished" if run.done.is_file() else started
    _check_writable(report)
    return report


def _check_paths(report: Report, settings: dict[str, Any], runs: list[Run]) -> None:
    """Texts that can only be meant as paths, and lead nowhere."""
    coming = {str(other.last) for other in runs}
    for path, text in _texts(settings):
        if path[-1] in WRITTEN or text in coming or "/" not in text or re.search(r"[{*?\s:]", text):
            continue
        if path[0] == "data" and path[-1] in SPLITS:  # sets of shards, which can be built
            continue
        place = Path(text)
        first = place.parts[0]
        is_local = place.is_absolute() or first in (".", "..") or Path(first).is_dir() or path == ("init_from",)
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
