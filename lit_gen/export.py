"""`python -m lit_gen export -c FILE`: the weights of a run as safetensors, or its checkpoint as one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_gen import cli
from lit_gen.errors import UserError, nearest
from lit_gen.files import write_tensors
from lit_gen.run import Run

FORMATS = ("safetensors", "checkpoint")


def main(argv: list[str]) -> int:
    """Write what a stage trained (the last stage, unless `--stage` names one) to `--out`, or `export/` of its folder.

    * `--format safetensors`, the default: `weights.safetensors`, averaged weights where the run averaged them, with
      `export.json` that says what they are, and what the method's own `export(folder)` writes, if it has one. Only the
      latter where the settings themselves give the weights (`--model.adapter_weights FILE`) and nothing was trained.
    * `--format checkpoint`: `checkpoint.ckpt`, one file that any strategy but ZeRO continues from, on any number of
      processes.
    """
    files, options, overrides = cli.parse(argv)
    given = dict(overrides)
    kind, out, path = given.pop("format", None) or FORMATS[0], given.pop("out", None), given.pop("ckpt_path", None)
    if not files:
        raise UserError("export needs an experiment: -c FILE (`python -m lit_gen list` names those here)")
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: {' or '.join(FORMATS)}{nearest(kind, FORMATS)}")
    overrides = [(key, value) for key, value in overrides if key in given]
    run = cli.chosen(files, options, overrides)[-1]
    if overrides and (code := cli.bind([run], argv)):  # before anything is written
        return code

    from lit_gen.callbacks.checkpoint import newest, whole  # heavy, so only now that the files themselves are in order
    from lit_gen.callbacks.record import provenance
    from lit_gen.weights import read_checkpoint

    source = run.source(whole(path) if path else newest(run.last.parent), given=bool(path))
    folder = Path(out) if out else run.folder / "export"
    if source is None:
        if kind == "checkpoint":
            raise UserError(f"{run.name} has no checkpoint in {run.last.parent} that could be made one file")
        if not _write_own_layout(run, None, folder):
            raise UserError(f"{run.name}: its model has no layout of its own to export to, and no checkpoint")
        print(f"{run.name}: {', '.join(map(str, run.own_weights().values()))} is now in {folder}")
        return 0
    checkpoint = read_checkpoint(source)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "checkpoint":
        written = _write_checkpoint(checkpoint, folder / "checkpoint.ckpt")
    else:
        about = {"run": run.name, "checkpoint": str(source.resolve()), **provenance(tuple(argv))}
        written = write_safetensors(checkpoint, folder, about)
        _write_own_layout(run, source, folder)
    print(f"{run.name}: step {checkpoint['global_step']} of {source} is now in {written}")
    return 0


def write_safetensors(checkpoint: dict[str, Any], folder: Path, about: dict[str, Any]) -> Path:
    """Write `weights.safetensors` and `export.json` of a checkpoint that is in memory.

    Args:
        checkpoint: in Lightning's layout; its "ema" replaces the weights it averages.
        folder: where to; it exists.
        about: what else `export.json` says.
    """
    average = checkpoint.get("ema", {})
    weights = {**checkpoint["state_dict"], **average}
    path = folder / "weights.safetensors"
    # Tied weights are written once per name: safetensors knows no shared memory.
    write_tensors(path, {name: weight.clone().contiguous() for name, weight in weights.items()}, {"format": "pt"})
    about = {
        **about,
        "step": checkpoint["global_step"],
        "weights": len(weights),
        "parameters": sum(weight.numel() for weight in weights.values()),
        "averaged": sorted(average),
    }
    (folder / "export.json").write_text(json.dumps(about, indent=1) + "\n")
    return path


def _write_checkpoint(checkpoint: dict[str, Any], path: Path) -> Path:
    from lit_gen.callbacks.checkpoint import AtomicCheckpointIO

    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    return path


def _write_own_layout(run: Run, source: Path | None, folder: Path) -> bool:
    """Let the method write its weights, those of a checkpoint if there is one, as others read them; whether it can."""
    import lightning.pytorch as L
    from jsonargparse import ArgumentParser

    from lit_gen.classes import resolve
    from lit_gen.stage import Binding, as_user_error, load_weights

    settings = Binding("fit", [run]).bound[0]["fit"]["model"].as_dict()
    if not callable(getattr(resolve(settings["class_path"], L.LightningModule), "export", None)):
        return False
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model")
    try:
        model = parser.instantiate_classes(parser.parse_object({"model": settings})).model
    except Exception as error:
        raise as_user_error(error, run) from error
    if source is not None:
        load_weights(model, str(source))
    folder.mkdir(parents=True, exist_ok=True)
    model.export(folder)
    return True
