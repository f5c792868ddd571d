"""`python -m lit_gen bench -c FILE`: how fast experiments train, and why, in a table that can be compared with.

Each arm and stage is a fit of its own, with the trainer, callbacks and data of `fit` but without validation and
checkpoints, in a temporary run folder, from the weights it would have at its start (those of no earlier stage).
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_gen import cli, experiment, interrupts
from lit_gen.errors import UserError
from lit_gen.files import read_json, write_whole
from lit_gen.run import Override, Run
from lit_gen.sweep import slug
from lit_gen.task import Task

USAGE = """\
usage: python -m lit_gen bench -c FILE [options] [settings]
       python -m lit_gen bench PART [options]

options, besides those of fit:
  --warmup N            steps before the measured window (default 10)
  --steps N             steps of a round (default 20)
  --rounds N            rounds of the window; the device is waited for only between them (default 3)
  --arm "NAME: WORDS"   measure the experiment with these settings and files added; may be given several times,
                        e.g. --arm "one: --trainer.devices 1" --arm "two: --trainer.devices 2 -c ddp.yaml";
                        the efficiency of the others is told against the first
  --bare                after each round do the same work in a bare loop, and tell what `fit` costs over it;
                        among the words of an arm, of that arm only
  --trace               trace two more steps: a table of what they spend their time on, and OUT/traces/ARM.json.gz for
                        https://ui.perfetto.dev; among the words of an arm, of that arm only
  --baseline FILE       compare with an earlier bench.json; exit status 1 if an arm is slower
  --tolerance X         by more than this share (default 0.05)
  --out DIR             where bench.json and bench.md go (default: runs/bench/EXPERIMENT)
  --continue            measure only what --out does not have yet of the same measurements
  --task I/N            measure only the I-th of N parts of the arms and stages, e.g. each on a GPU of its own; the
                        parts share --out
"""

WINDOW, RESULT, TRACE = "window.json", "bench.json", "trace.json.gz"  # in a run folder: what to measure, what was found
TRACED = 3  # steps after the window that are traced, where that is asked for
FLAGS = ("bare", "trace")  # words without a value that an arm may have for itself

# A window is neither validated nor limited by anything but its steps, and weights do not change its speed.
FIXED: list[Override] = [
    ("trainer.max_epochs", "-1"),
    ("trainer.max_time", "null"),
    ("trainer.limit_val_batches", "0"),
    ("trainer.num_sanity_val_steps", "0"),
    ("trainer.val_check_interval", "1.0"),
    ("trainer.check_val_every_n_epoch", "1"),
    ("validate_first", "false"),
]


@dataclass
class Part:
    """One arm and stage to measure, and all that its figures depend on but code and machine."""

    arm: str
    stage: str
    run: Run
    request: dict[str, Any]

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.arm, self.stage)))

    def kept(self, out: Path) -> Path:
        """Where its result lies, so that other tasks, and the same command again, find it."""
        return out / "rows" / f"{slug(self.name)}.json"

    def traced(self, out: Path) -> Path:
        return out / "traces" / f"{slug(self.name)}.json.gz"


@dataclass
class Options:
    """What `bench` understands besides the settings of an experiment."""

    warmup: int = 10
    steps: int = 20
    rounds: int = 3
    tolerance: float = 0.05
    baseline: str = ""
    out: str = ""
    task: str = ""
    bare: bool = False
    trace: bool = False


def main(argv: list[str]) -> int:
    """Measure, print and store; returns 1 if the baseline was faster, and the status of an arm that failed."""
    flags = {flag: f"--{flag}" in argv for flag in FLAGS}
    files, given, overrides = cli.parse([w for w in argv if w not in ("--continue", *(f"--{flag}" for flag in FLAGS))])
    if given.get("help"):
        print(USAGE)
        return 0
    if wrong := given.keys() - {"stage"}:
        raise UserError(f"bench has no option --{min(wrong)} (`python -m lit_gen bench --help` names its own)")
    if not files:
        raise UserError("bench needs an experiment: -c FILE (`python -m lit_gen list` names those here)")
    options, arms, overrides = _options(overrides, flags)
    baseline = _read(Path(options.baseline)) if options.baseline else None
    stage = given.get("stage")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="lit_gen-bench-") as folder:
        plan = _plan(files, overrides, arms, str(stage) if stage else None, options, folder)
        name = str(experiment.read(files, overrides).data.get("experiment") or Path(files[-1]).stem)
        out = Path(options.out or Path("runs", "bench", name))
        task = Task.parse(options.task) if options.task else Task()
        own = plan[task.number :: task.count]
        if "--continue" not in argv:
            for part in own:
                part.kept(out).unlink(missing_ok=True)
        waiting = [part.run for part in own if _row(part, out) is None]
        if len(waiting) > 1 and (code := cli.bind(waiting, argv)):  # a slip in the last arm shows now, not in an hour
            return code
        for part in own:
            if _row(part, out) is not None:
                print(f"bench: {part.name}: measured before", flush=True)
                continue
            print(f"bench: {part.name}", flush=True)
            code = cli.launch(["bench", str(part.run.write_request("fit", argv))])
            if code in (interrupts.PAUSED, interrupts.OUT_OF_TIME):  # what was measured is stored
                return code
            if code or not (part.run.folder / RESULT).is_file():
                print(f"error: {part.arm}: failed with exit status {code}", file=sys.stderr)
                failed = failed or code or 1
                continue
            row = {"arm": part.arm, "stage": part.stage} | json.loads((part.run.folder / RESULT).read_text())
            if (traced := part.run.folder / TRACE).is_file():
                row["trace"]["file"] = str(part.traced(out))
                part.traced(out).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(traced, part.traced(out))
            part.kept(out).parent.mkdir(parents=True, exist_ok=True)
            write_whole(part.kept(out), json.dumps({"request": part.request, "row": row}, indent=1))
            store(out, {"experiment": name, "argv": argv, "rows": _rows(plan, out)})
    rows = _rows(plan, out)
    if not rows:
        return failed or 1
    print(f"\n{report(rows)}\n\nstored in {out}/bench.json and bench.md")
    slower = compare(rows, baseline, options.tolerance) if baseline else False
    return failed or int(slower)


def _row(part: Part, out: Path) -> dict[str, Any] | None:
    """What was measured of a part, if it was."""
    found = read_json(part.kept(out))
    return found["row"] if found and found["request"] == part.request else None


def _rows(plan: list[Part], out: Path) -> list[dict[str, Any]]:
    """What has been measured so far, by whichever task, each held against the first of its stage."""
    rows = [row for part in plan if (row := _row(part, out)) is not None]
    _compare_with_first(rows)
    return rows


def _options(overrides: list[Override], flags: dict[str, bool]) -> tuple[Options, list[str], list[Override]]:
    """-> (options of ours, arms as written, settings of the experiment)"""
    options, arms, rest = Options(**flags), [], []
    for key, value in overrides:
        if key == "arm" and value:
            arms.append(value)
        elif key in asdict(options) and key not in FLAGS:
            kind = type(getattr(options, key))
            try:
                setattr(options, key, kind(value))
            except (TypeError, ValueError):
                raise UserError(f"--{key} needs {'a number' if kind is not str else 'a path'}, not {value!r}") from None
        else:
            rest.append((key, value))
    least = {"warmup": 1, "steps": 1, "rounds": 1}
    for name, number in least.items():
        if getattr(options, name) < number:
            raise UserError(f"--{name} must be at least {number}")
    return options, arms, rest


def _plan(
    files: list[str], overrides: list[Override], arms: list[str], stage: str | None, options: Options, folder: str
) -> list[Part]:
    """Every arm and stage, with `window.json` in its run folder, before any is run: slips show now."""
    plan: list[Part] = []
    for i, arm in enumerate(arms or ["fit:"]):
        name, colon, words = arm.partition(":")
        if not colon:
            raise UserError(f'--arm "{arm}": write it as "NAME: --key value …"')
        try:
            more_words = shlex.split(words)
        except ValueError as error:
            raise UserError(f'--arm "{arm}": {error}') from None
        flags = {flag: getattr(options, flag) or f"--{flag}" in more_words for flag in FLAGS}
        more_files, more_options, more = cli.parse([w for w in more_words if w not in [f"--{flag}" for flag in FLAGS]])
        if more_options:
            raise UserError(f'--arm "{arm}": --{next(iter(more_options))} has no place in an arm')
        wanted = [*overrides, *more]
        own = [*wanted, ("run_root", f"{folder}/{i}")]
        length = options.warmup + options.steps * options.rounds + flags["trace"] * TRACED
        staged = bool(experiment.read([*files, *more_files], own).data.get("stages"))
        for run in experiment.select(experiment.runs([*files, *more_files], own), stage):
            run.overrides += [*FIXED, ("trainer.max_steps", str(length))]
            run.settings.data["init_from"] = None
            run.folder.mkdir(parents=True)
            window = {"warmup": options.warmup, "steps": options.steps, "rounds": options.rounds, **flags}
            (run.folder / WINDOW).write_text(json.dumps(window))
            request = {"files": [*files, *more_files], "settings": [list(pair) for pair in wanted], "window": window}
            part = Part(name.strip(), run.folder.name if staged else "", run, request)
            if slug(part.name) in (slug(other.name) for other in plan):  # by which its files are called
                raise UserError(f'--arm "{arm}": there is another arm of this name')
            plan.append(part)
    return plan


def _compare_with_first(rows: list[dict[str, Any]]) -> None:
    """Scaling efficiency: samples a second and device, relative to the first arm that measured the same stage."""
    for row in rows:
        first = next(r for r in rows if r["stage"] == row["stage"])
        ratio = row["samples_per_second_per_device"] / first["samples_per_second_per_device"]
        row["efficiency_percent"] = round(100 * ratio, 2)


# -- tables -----------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what was measured on what, and the figures."""
    first = rows[0]
    machine, versions = first["machine"], first["versions"]
    where = ", ".join([str(machine["device"]), f"{machine['cores']} cores ({machine['threads']} threads)"])
    what = ", ".join(f"{name} {versions[name]}" for name in ("torch", "lightning", "deepspeed") if name in versions)
    columns: dict[str, list[str]] = {}
    for row in rows:
        cells = {
            "arm": " ".join(filter(None, (row["arm"], row["stage"]))),
            "devices": str(row["devices"]),
            "precision": row["precision"],
            "batch": f"{row['samples_per_step_per_device']:.4g}",
            "samples/s": _text(row["samples_per_second"]),
            "a device": _text(row["samples_per_second_per_device"]),
            "ms/step (10-90 %)": _text(row["ms_per_step"]) + _between(row),
            "data wait": _text(row["data_wait_percent"], " %"),
            "memory": _text(row["peak_memory_gib"], " GiB"),
            "MFU": _text(row["mfu_percent"], " %"),
            "efficiency": _text(row["efficiency_percent"], " %") if len(rows) > 1 else "",
            "bare loop": _text(row.get("bare_samples_per_second_per_device"), "/s"),
            "fit costs": _overhead(row),
        }
        for title, cell in cells.items():
            columns.setdefault(title, []).append(cell)
    told = {title: cells for title, cells in columns.items() if any(cells)}
    lines = [list(told), ["---"] * len(told), *zip(*told.values(), strict=True)]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{where}; {what}; {first['steps']} steps after {first['warmup']} of warm-up\n\n{body}"


def report(rows: list[dict[str, Any]]) -> str:
    """Markdown: the table, and where the steps that were traced spent their time."""
    parts = [table(rows)]
    for row in rows:
        if row.get("trace"):
            name = " ".join(filter(None, (row["arm"], row["stage"])))
            parts.append(f"## Where a step of `{name}` goes\n\n{_where_time_goes(row['trace'])}")
    return "\n\n".join(parts)


def _where_time_goes(found: dict[str, Any]) -> str:
    """A table of kinds of kernels, and one of the longest (see lit_gen/trace.py)."""
    whole = found.get("ms") or sum(kind["ms"] for kind in found["kinds"].values()) or 1.0
    rows = [(kind, row["ms"], f"{row['launches']:.0f}") for kind, row in found["kinds"].items()]
    if "idle_ms" in found:
        rows += [("communication that nothing hides", found["exposed_communication_ms"], "")]
        rows += [("nothing ran", found["idle_ms"], ""), ("a step, traced", found["ms"], "")]
    lines = ["| | ms a step | share | launches |", "|---|---|---|---|"]
    lines += [f"| {name} | {ms:.2f} | {100 * ms / whole:.1f} % | {launches} |" for name, ms, launches in rows]
    lines += ["", "| longest | ms a step | launches |", "|---|---|---|"]
    for row in found["longest"]:
        name = row["name"].replace("|", "\\|")
        lines.append(f"| `{name[:90]}` | {row['ms']:.2f} | {row['launches']:.0f} |")
    return "\n".join(lines)


def _text(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.{1 if abs(value) < 1000 else 0}f}{unit}"


def _range(row: dict[str, Any], low: str, high: str) -> str:
    return f"{_text(row[low])} to {_text(row[high])}"


def _between(row: dict[str, Any]) -> str:
    return "" if row["ms_per_step_p10"] is None else f" ({_range(row, 'ms_per_step_p10', 'ms_per_step_p90')})"


def _overhead(row: dict[str, Any]) -> str:
    if "overhead_percent" not in row:
        return ""
    spread = _range(row, "overhead_percent_min", "overhead_percent_max")
    return f"{row['overhead_percent']:.1f} % ({spread})"


def store(folder: Path, found: dict[str, Any]) -> None:
    """Write bench.json and bench.md."""
    folder.mkdir(parents=True, exist_ok=True)
    found = found | {"measured": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    command = shlex.join(["python", "-m", "lit_gen", "bench", *found["argv"]])
    write_whole(folder / RESULT, json.dumps(found, indent=1) + "\n")
    write_whole(folder / "bench.md", f"# {found['experiment']}\n\n`{command}`\n\n{report(found['rows'])}\n")


# -- baseline ---------------------------------------------------------------------------------------------------------


def compare(rows: list[dict[str, Any]], baseline: list[dict[str, Any]], tolerance: float) -> bool:
    """Print each arm's speed against the baseline's; returns whether one is slower by more than the tolerance."""
    before = {(row["arm"], row["stage"]): row for row in baseline}
    slower = False
    for row in rows:
        old = before.get((row["arm"], row["stage"]))
        name = " ".join(filter(None, (row["arm"], row["stage"])))
        if old is None:
            print(f"{name}: not in the baseline")
            continue
        ratio = row["samples_per_second_per_device"] / old["samples_per_second_per_device"] - 1
        too_slow = ratio < -tolerance
        slower = slower or too_slow
        verdict = ", slower than tolerated" if too_slow else ""
        print(f"{name}: {100 * ratio:+.1f} % against the baseline{verdict}{_differences(old, row)}")
    return slower


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What else is not as it was, e.g. " (devices 1 -> 2)"; a comparison of other things says little."""
    parts = {key: (old.get(key), new.get(key)) for key in ("devices", "precision", "samples_per_step_per_device")}
    parts |= {key: (old["machine"].get(key), new["machine"].get(key)) for key in ("device", "cores", "threads")}
    parts |= {key: (old["versions"].get(key), new["versions"].get(key)) for key in ("torch", "lightning")}
    told = [f"{key} {a} -> {b}" for key, (a, b) in parts.items() if a != b]
    return f" ({'; '.join(told)})" if told else ""


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text())["rows"])
    except FileNotFoundError:
        raise UserError(f"--baseline {path}: no such file") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--baseline {path}: not a bench.json that `bench` wrote") from None
