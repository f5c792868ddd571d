"""One run of Lightning's trainer: what a child process of the front door does."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from lit_gen import interrupts
from lit_gen.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint, newest
from lit_gen.callbacks.pause import Pause
from lit_gen.callbacks.progress import Progress
from lit_gen.callbacks.record import Record
from lit_gen.cli import PAUSED, TRAINER_VERBS, as_words
from lit_gen.errors import UserError
from lit_gen.experiment import Run
from lit_gen.methods.base import Method

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class ParserError(Exception):
    """What the parser objects to, in its own words."""


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        raise ParserError(message)


class Command(LightningCLI):
    """LightningCLI over settings that were already merged, whose `fit` resumes by itself.

    Args:
        verb: fit, validate, test or predict.
        runs: the first is run; those after it are only bound, so that their mistakes show at once.
        argv: words of the user's command line, for the record.
    """

    def __init__(self, verb: str, runs: list[Run], argv: list[str]) -> None:
        self.verb, self.runs, self.argv = verb, runs, argv
        super().__init__(
            model_class=L.LightningModule,
            datamodule_class=L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            parser_class=_Parser,
            parser_kwargs={"parser_mode": "omegaconf+", **{v: {"parser_mode": "omegaconf+"} for v in TRAINER_VERBS}},
            auto_configure_optimizers=False,
            trainer_defaults={"enable_model_summary": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--vars", type=dict[str, Any] | None, default=None, help="Free values for ${vars.NAME}.")
        parser.add_argument("--init_from", type=str | None, default=None, help="Checkpoint whose weights a run starts from.")
        parser.add_argument(
            "--validate_first", type=bool, default=False, help='Validate before training too, kept as "before" in metrics.json.'
        )
        parser.add_lightning_class_args(Checkpoint, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config, *_ = [bind(parser, self.verb, run) for run in self.runs]

    def _parse_ckpt_path(self) -> None:
        """Not Lightning's: there a checkpoint's hyper-parameters silently override the settings."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        run, settings = self.runs[0], self.config[self.verb]
        fitting = self.verb == "fit"
        if settings.trainer.logger in (None, True):
            folder = run.folder if fitting else run.folder / self.verb
            kwargs["logger"] = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
        config = self._parser(self.verb).dump(_without_root(settings), skip_none=False, format="yaml")
        self.pause = Pause(settings.trainer.max_time)
        kwargs["max_time"] = None
        kwargs["plugins"] = [*(self._get(self.config_init, "trainer").plugins or []), AtomicCheckpointIO()]
        callbacks = [Record(config, tuple(self.argv)), self.pause]
        if settings.trainer.enable_progress_bar is not False:
            callbacks.append(Progress(run.name))
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)

    # -- verbs --------------------------------------------------------------------------------------------------------

    def fit(self, model: L.LightningModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Train until done or paused, from the newest checkpoint if there is one."""
        run, settings = self.runs[0], self.config["fit"]
        resume = ckpt_path or newest(run.last.parent)
        if resume is not None:
            self.trainer.num_sanity_val_steps = 0
        else:
            if settings.validate_first:
                self.trainer.num_sanity_val_steps = float("inf")
            if settings.init_from:
                load_weights(model, settings.init_from)
        self.trainer.fit(model, ckpt_path=resume, **kwargs)
        if self.pause.paused:
            return
        self._measure_the_end(model, kwargs)
        if self.trainer.is_global_zero:
            run.done.write_text(json.dumps({"step": self.trainer.global_step}) + "\n")

    def _measure_the_end(self, model: L.LightningModule, kwargs: dict[str, Any]) -> None:
        """Validate the final weights, unless training ended with a validation that was recorded."""
        record = next(c for c in self.trainer.callbacks if isinstance(c, Record))
        history = record.metrics.get("history") or [{"step": -1}]
        if self.trainer.enable_validation and history[-1]["step"] != self.trainer.global_step:
            self.trainer.validate(model, datamodule=kwargs.get("datamodule"), verbose=False)


def bind(parser: LightningArgumentParser, verb: str, run: Run) -> Namespace:
    """Check a run's settings against the signatures they name.

    Raises:
        UserError: they do not fit.
    """
    words = [verb, f"--config={json.dumps(run.settings.data)}", f"--trainer.default_root_dir={run.folder}"]
    try:
        return parser.parse_args([*words, *as_words(run.overrides)])
    except ParserError as error:
        raise UserError(f"{run.name}: {error}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{run.name}: {str(error).splitlines()[0]}") from None


def load_weights(model: L.LightningModule, path: str) -> None:
    """Start a model from the weights of an earlier stage or run."""
    if isinstance(model, Method):
        return model.load_weights(path)
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint to start from")
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    if not weights.keys() & model.state_dict().keys():
        raise UserError(f"{path}: holds no weight of {type(model).__name__}")
    model.load_state_dict(weights, strict=False)


def main(argv: list[str]) -> int:
    """`run REQUEST...`, `help VERB WORDS...` or `print VERB SETTINGS WORDS...`; returns the exit status."""
    interrupts.die_with_parent()
    for name in ("lightning.pytorch", "lightning.fabric"):  # device tables and tips; warnings stay
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated")  # Lightning's, with torch 2.13
    what, *rest = argv
    if what == "run":
        requests = [Run.read_request(Path(path)) for path in rest]
        verb, words, run = requests[0]
        command = Command(verb, [r for _, _, r in requests], words)
        return PAUSED if command.pause.paused else 0
    return 0


def _without_root(settings: Namespace) -> Namespace:
    """The settings without the run folder, which a user's own command will choose anew."""
    settings = settings.clone()
    settings.trainer.default_root_dir = None
    return settings
