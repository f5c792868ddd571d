"""An experiment: settings merged from YAML files and the command line, cut into stages, each with its run folder."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gen import interrupts
from lit_gen import settings as trees
from lit_gen.errors import UserError, nearest
from lit_gen.files import read_json, write_whole
from lit_gen.settings import Settings

# Keys of an experiment that this file understands; everything else goes to the parser of `stage.py`.
OWN_KEYS = ("base", "description", "experiment", "run_root", "smoke", "stages", "sweep")

ON_COMMAND_LINE = ("experiment", "run_root")

# `--smoke`: two steps of everything; `stage.py` also makes sizes small. An experiment's own `smoke:` comes over this.
SMOKE_TRAINER = {
    "max_steps": 2,
    "max_epochs": None,
    "val_check_interval": 2,
    "check_val_every_n_epoch": None,
    "limit_val_batches": 1,
    "limit_test_batches": 1,
    "limit_predict_batches": 1,
    "log_every_n_steps": 1,
}

# A finished stage is as good under another value of these.
HARMLESS = (
    "checkpoint",
    "description",
    "speed",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.max_time",
    "trainer.num_nodes",
    "trainer.profiler",
    "trainer.strategy",
)
HARMLESS_OF_DATA = ("workers", "cached", "cache_folder")  # of any data module, also of one within another
LENGTH = ("trainer.max_steps", "trainer.max_epochs")

Override = tuple[str, str | None]  # dotted key and value as typed; None for a bare switch
Changes = dict[str, tuple[Any, Any]]  # dotted key -> (old value, new value)


@dataclass
class Run:
    """One stage of an experiment, or the whole of one that has no stages.

    Args:
        name: as printed: "experiment" or "experiment/stage".
        folder: everything the run writes goes here.
        settings: merged settings of this stage.
        overrides: settings from the command line, as typed.
        smoke: for a run that is to be made small, the names of settings whose size the experiment itself chose.
    """

    name: str
    folder: Path
    settings: Settings
    overrides: list[Override]
    smoke: list[str] | None = None

    @property
    def root(self) -> Path:
        """Where run folders live; `name` is the path from there to this one."""
        return self.folder.parents[self.name.count("/")]

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def done(self) -> Path:
        """Exists once the run is finished."""
        return self.folder / "DONE"

    @property
    def asked(self) -> Path:
        """The request that the run was last trained for; what a later command compares itself with."""
        return self.folder / "fit.json"

    @property
    def has_checkpoint(self) -> bool:
        return self.last.exists() or any(self.last.parent.glob("step-*.ckpt"))

    def write_request(self, verb: str, argv: list[str]) -> Path:
        """Write the file that tells the child process what to run."""
        path = self.folder / f".{verb}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.as_request(verb, argv))
        return path

    def as_request(self, verb: str, argv: list[str]) -> str:
        request = {
            "verb": verb,
            "name": self.name,
            "folder": str(self.folder),
            "argv": argv,
            "settings": self.settings.data,
            "overrides": self.overrides,
            "smoke": self.smoke,
            "origins": [[list(key), where] for key, where in self.settings.origins.items()],
        }
        return json.dumps(request, indent=1)

    @staticmethod
    def read_request(path: Path) -> tuple[str, list[str], Run]:
        """-> (verb, argv, run)"""
        request = json.loads(path.read_text())
        origins = {tuple(key): where for key, where in request["origins"]}
        overrides = [(key, value) for key, value in request["overrides"]]
        settings, folder = Settings(request["settings"], origins), Path(request["folder"])
        return request["verb"], request["argv"], Run(request["name"], folder, settings, overrides, request["smoke"])

    def past(self) -> Run | None:
        """The run as it was last trained; None for one that never was, or whose record cannot be read."""
        if read_json(self.asked) is None:
            return None
        try:
            return self.read_request(self.asked)[2]
        except (AttributeError, KeyError, TypeError, ValueError):
            print(f"warning: {self.asked}: not a record of this version, taken for absent", file=sys.stderr)
            return None

    def effective(self) -> dict[str, Any]:
        """Settings by dotted key, overrides included."""
        flat = dict(_flatten(self.settings.data))
        for key, value in self.overrides:
            for spelling in (key, _with_init_args(key)):
                for old in [k for k in flat if k == spelling or k.startswith(spelling + ".")]:
                    del flat[old]
            flat[_with_init_args(key)] = True if value is None else trees.parse_value(value)
        return flat

    def own_weights(self) -> dict[str, Any]:
        """Weights that the settings themselves give the model, by key: those named `..._weights`."""
        settings = self.effective().items()
        return {k: v for k, v in settings if v and k.startswith("model.init_args.") and k.endswith("_weights")}

    def source(self, checkpoint: Path | None, given: bool = False) -> Path | None:
        """What to take the weights from: `checkpoint`, or None where the settings' own weights stand in for one.

        Args:
            checkpoint: of the run, or the one that was asked for; None where there is none.
            given: whether it was asked for.

        Raises:
            UserError: there is neither, or the checkpoint would silently replace weights that were asked for.
        """
        own = self.own_weights()
        if checkpoint is None:
            if own:
                return None
            raise UserError(
                f"{self.name} has no checkpoint in {self.last.parent}; run `fit` first, or give --ckpt_path FILE"
            )
        if given:
            typed = {_with_init_args(key) for key, _ in self.overrides}
            other = [key for key in own if key in typed]
        else:  # those that training began from are in the checkpoint
            past = self.past()
            began = past.own_weights() if past is not None else {}
            other = [key for key, value in own.items() if began.get(key) != value]
        if other:
            raise UserError(
                f"{self.name}: {checkpoint} would replace what {other[0].replace('.init_args', '')} gives; "
                + ("leave one of them out" if given else "leave that out, or use it under another name, --experiment")
            )
        return checkpoint

    def time_limit(self) -> float | None:
        """`trainer.max_time` in seconds; None where there is none, or where only the parser knows it."""
        settings = self.effective()
        limit = settings.get("trainer.max_time")
        for _ in range(len(settings)):  # of references to references
            if reference := re.fullmatch(r"\$\{([\w.]+)\}", str(limit)):
                limit = settings.get(reference[1])
        units = {key.rpartition(".")[2]: v for key, v in settings.items() if key.startswith("trainer.max_time.")}
        limit = units or limit
        return None if limit is None or "${" in str(limit) else interrupts.seconds(limit)

    def changes(self) -> Changes:
        """Settings that differ, in ways that matter, from those this run was last asked for."""
        past = self.past()
        if past is None:
            return {}
        old, new = past.effective(), self.effective()
        config = self.folder / "config.yaml"
        resolved = dict(_flatten(trees.read(config).data)) if config.is_file() else {}
        for run, values in ((past, old), (past, resolved), (self, new)):  # the folder of all stages may have moved
            if "init_from" in values:
                values["init_from"] = str(values["init_from"]).removeprefix(f"{run.folder.parent}/")
        changed: Changes = {}
        for key in sorted(old.keys() | new.keys()):
            was = [values[key] for values in (old, resolved) if key in values]
            # Spelling a default out is no change; leaving out what was chosen is one.
            if (new[key] not in was if key in new else key in old) and not _is_harmless(key):
                changed[key] = (was[0] if was else None, new.get(key))
        return changed


def read(files: list[str], overrides: list[Override]) -> Settings:
    """Merge experiment files, later ones over earlier ones, each over the files its `base:` names."""
    result = Settings()
    for file in files:
        result = trees.merge(result, _read_with_base(Path(file), ()))
    for key, value in overrides:
        own = key.partition(".")[0]
        if own in OWN_KEYS and own != "stages":
            if key not in ON_COMMAND_LINE:
                raise UserError(f"--{key}: `{own}:` belongs in a file, not on the command line")
            if not value:
                raise UserError(f"--{key} needs a value")
            result.data[key] = value
            result.origins[(key,)] = f"--{key}"
    return result


def runs(files: list[str], overrides: list[Override], smoke: bool = False) -> list[Run]:
    """The runs of an experiment in order.

    Args:
        files: the `-c` files.
        overrides: from the command line; `stages.NAME.key` reaches one stage, any other key every stage.
        smoke: shrink every stage to two small steps, in a run folder under `smoke/`.

    Raises:
        UserError: a file cannot be read, or names no valid stages.
    """
    return cut(read(files, overrides), Path(files[0]).stem, overrides, smoke)


def cut(merged: Settings, name: str, overrides: list[Override], smoke: bool) -> list[Run]:
    """The runs of merged settings; `name` is the experiment's where these give it none. See `runs`."""
    stages = _stages(merged)
    for key, _ in overrides:
        parts = key.split(".")
        if parts[0] == "stages" and (len(parts) < 3 or parts[1] not in stages):
            stage = parts[1] if len(parts) > 1 else ""
            raise UserError(f"--{key}: there is no stage `{stage}`{nearest(stage, stages)}{_among(stages)}")

    name = str(merged.data.get("experiment") or name)
    if not re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", name):
        raise UserError(f"{merged.origin(('experiment',))}: `experiment: {name}` cannot be the name of a folder")
    seed = next((value for key, value in reversed(overrides) if key == "seed_everything"), None)
    if seed is not None:  # seeds of one experiment stand side by side
        name += f"-seed{seed}"
    if smoke:
        name = f"smoke/{name}{_of_the_job()}"
    root = Path(str(merged.data.get("run_root") or "runs")) / name

    common = Settings({k: v for k, v in merged.data.items() if k not in OWN_KEYS})
    common.origins = {k: where for k, where in merged.origins.items() if k[0] not in OWN_KEYS}
    if not stages:
        common, chosen = _shortened(common, merged, None) if smoke else (common, None)
        return [Run(name, root, common, _for_stage(overrides, None), chosen)]
    result: list[Run] = []
    own = (merged.data.get("smoke") or {}).get("stages") or {}
    for stage in stages:
        if smoke and own.get(stage, {}) is None:
            continue
        tree = trees.merge(common, trees.subtree(merged, ("stages", stage)))
        for key in OWN_KEYS:
            if key in tree.data and key != "description":
                raise UserError(f"{tree.origin((key,))}: `{key}` belongs at the top of the file, not in a stage")
        tree.data.pop("description", None)
        tree, chosen = _shortened(tree, merged, stage) if smoke else (tree, None)
        if "init_from" not in tree.data and result:
            tree.data["init_from"] = str(result[-1].last)
            tree.origins[("init_from",)] = f"{merged.origin(('stages', stage))} (the stage before)"
        result.append(Run(f"{name}/{stage}", root / stage, tree, _for_stage(overrides, stage), chosen))
    return result


def select(all_runs: list[Run], stage: str | None) -> list[Run]:
    """The runs that `--stage` asks for; all of them without it."""
    if stage is None:
        return all_runs
    names = [run.folder.name for run in all_runs] if len(all_runs) > 1 or "/" in all_runs[0].name else []
    chosen = [run for run, name in zip(all_runs, names, strict=False) if name == stage]
    if not chosen:
        raise UserError(f"--stage {stage}: there is no such stage{nearest(stage, names)}{_among(names)}")
    return chosen


def describe(file: Path) -> str:
    """One line about an experiment file, without reading it as YAML: its `description:`, else its first comment."""
    comment = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("description:"):
            return line.partition(":")[2].strip().strip("\"'")
        if line.startswith("#") and not comment:
            comment = line.lstrip("# ").strip()
    return comment


def _stages(merged: Settings) -> list[str]:
    stages = merged.data.get("stages")
    if stages is None:
        return []
    where = merged.origin(("stages",))
    if not isinstance(stages, dict):
        raise UserError(f"{where}: `stages:` must map stage names to settings")
    for name, value in stages.items():
        where = merged.origin(("stages", name))
        if not re.fullmatch(r"\w[\w-]*", name):
            raise UserError(f"{where}: `{name}` cannot be the name of a stage (letters, digits, _ and -)")
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{where}: stage `{name}` must be a mapping of settings")
    with_data = [name for name, value in stages.items() if "data" in (value or {})]
    for name, value in stages.items():  # of an overlay, that were to change another's
        if value is not None and "data" not in value and difflib.get_close_matches(name, with_data, cutoff=0.8):
            where = merged.origin(("stages", name))
            raise UserError(f"{where}: there is no stage `{name}` with data of its own{nearest(name, with_data)}")
    return [name for name, value in stages.items() if value is not None]  # an overlay removes a stage with `name: null`


def _read_with_base(file: Path, within: tuple[Path, ...]) -> Settings:
    if file.resolve() in within:
        raise UserError(f"{file}: `base:` leads in a circle: {' -> '.join(p.name for p in (*within, file))}")
    own = trees.read(file)
    base = own.data.pop("base", None) or []
    result = Settings()
    for i, name in enumerate([base] if isinstance(base, str) else base):
        path = file.parent / str(name)
        if not path.is_file():
            near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [])
            where = own.origins.get(("base", i)) or own.origin(("base",))
            raise UserError(f"{where}: `base:` names {path}, which does not exist{near}")
        result = trees.merge(result, _read_with_base(path, (*within, file.resolve())))
    return trees.merge(result, own)


def _shortened(tree: Settings, merged: Settings, stage: str | None) -> tuple[Settings, list[str]]:
    """A stage's settings for `--smoke`, and the names of those that the file's own `smoke:` section chose."""
    parts = [Settings({"trainer": SMOKE_TRAINER})]
    if "smoke" in merged.data:
        own = trees.subtree(merged, ("smoke",))
        parts.append(Settings({k: v for k, v in own.data.items() if k != "stages"}, own.origins))
        if stage in (own.data.get("stages") or {}):
            parts.append(trees.subtree(own, ("stages", stage)))
    for part in parts:
        tree = trees.merge(tree, part)
    return tree, [str(path[-1]) for part in parts[1:] for path, _ in trees.leaves(part.data)]


def _for_stage(overrides: list[Override], stage: str | None) -> list[Override]:
    chosen: list[Override] = []
    for key, value in overrides:
        parts = key.split(".", 2)
        if parts[0] in OWN_KEYS and parts[0] != "stages":
            continue
        if parts[0] != "stages":
            chosen.append((key, value))
        elif parts[1] == stage:
            chosen.append((parts[2], value))
    return chosen


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _of_the_job() -> str:
    """A suffix that all tasks of a job agree on and no other job has; none for a command that runs alone."""
    several = int(os.environ.get("SLURM_NTASKS", 1)) > 1  # none of them may empty the folder under the others
    return f"-job{os.environ['SLURM_JOB_ID']}" if several else ""


def _is_harmless(key: str) -> bool:
    of_data = key.startswith("data.") and key.rpartition(".")[2] in HARMLESS_OF_DATA
    return of_data or key.startswith(HARMLESS)


def _with_init_args(key: str) -> str:
    """`model.lr` and `model.init_args.lr` are the same setting on the command line."""
    parts = key.split(".")
    if len(parts) > 1 and parts[0] in ("model", "data") and parts[1] not in ("class_path", "init_args"):
        parts.insert(1, "init_args")
    return ".".join(parts)


def _among(names: list[str]) -> str:
    return f" (stages: {', '.join(names)})" if names else " (the experiment has no stages)"
