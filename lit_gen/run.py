"""A run: one stage of an experiment, what it was asked for, and how that differs from what it was trained with."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gen import interrupts
from lit_gen import settings as trees
from lit_gen.errors import UserError
from lit_gen.files import read_json, write_whole
from lit_gen.settings import Settings

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


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _is_harmless(key: str) -> bool:
    of_data = key.startswith("data.") and key.rpartition(".")[2] in HARMLESS_OF_DATA
    return of_data or key.startswith(HARMLESS)


def _with_init_args(key: str) -> str:
    """`model.lr` and `model.init_args.lr` are the same setting on the command line."""
    parts = key.split(".")
    if len(parts) > 1 and parts[0] in ("model", "data") and parts[1] not in ("class_path", "init_args"):
        parts.insert(1, "init_args")
    return ".".join(parts)
