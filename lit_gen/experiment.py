"""An experiment: settings merged from YAML files and the command line, cut into stages, each with its run folder."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from lit_gen import settings as trees
from lit_gen.errors import UserError, nearest
from lit_gen.run import Override, Run
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


def _of_the_job() -> str:
    """A suffix that all tasks of a job agree on and no other job has; none for a command that runs alone."""
    several = int(os.environ.get("SLURM_NTASKS", 1)) > 1  # none of them may empty the folder under the others
    return f"-job{os.environ['SLURM_JOB_ID']}" if several else ""


def _among(names: list[str]) -> str:
    return f" (stages: {', '.join(names)})" if names else " (the experiment has no stages)"
