"""One run of Lightning's trainer: what a child process of the front door does."""

from __future__ import annotations

import errno
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from lit_gen import interrupts, mistakes
from lit_gen.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint, continued, step_of, whole
from lit_gen.callbacks.pause import Pause, take_over_signals
from lit_gen.callbacks.progress import Progress
from lit_gen.callbacks.record import Record
from lit_gen.callbacks.speed import Speed
from lit_gen.cli import TRAINER_VERBS, as_words
from lit_gen.data.split import Paused
from lit_gen.errors import OutOfRange, UserError
from lit_gen.files import alone_in, write_whole
from lit_gen.methods.base import Method
from lit_gen.run import Run
from lit_gen.scale.zero import refuse_other
from lit_gen.settings import leaves
from lit_gen.weights import read_checkpoint

set_parsing_settings(
    omegaconf_absolute_to_relative_paths=True,
    instantiate_subclass_spec_in_any=False,  # or a setting of type Any would make an instance of any class at all
    import_path_denylist=[],  # beside its own, which this makes binding: os, subprocess, pickle and their like
)


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
            datamodule_class=None,  # methods that distil a model need no data
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            parser_class=_Parser,
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "prog": "python -m lit_gen",
                **{v: {"parser_mode": "omegaconf+"} for v in TRAINER_VERBS},
            },
            auto_configure_optimizers=False,
            trainer_defaults={"enable_model_summary": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--vars", type=dict[str, Any] | None, default=None, help="Free values for ${vars.NAME}.")
        parser.add_argument(
            "--init_from", type=str | None, default=None, help="Checkpoint whose weights a run starts from."
        )
        parser.add_argument(
            "--validate_first",
            type=bool,
            default=False,
            help='Validate before training too, kept as "before" in metrics.json.',
        )
        parser.add_argument(
            "--matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="Of float32 matrix products, see torch.set_float32_matmul_precision: `high` allows TF32 on GPUs.",
        )
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(Speed, "speed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        found: list[str] = []
        self.bound: list[Namespace | None] = []
        self.top_level = {key.split(".")[0] for key in self._parser(self.verb).get_defaults().keys()} - {"config"}
        for run in self.runs:
            try:
                self.bound.append(bind(parser, self.top_level, self.verb, run))
            except UserError as error:
                self.bound.append(None)
                found += [line for line in str(error).splitlines() if line not in found]
        if found:
            self.refuse(found)
        for run, settings in zip(self.runs, self.bound, strict=True):
            if run.smoke is not None and settings is not None:
                _shrink(settings[self.verb], run.smoke)
        self.config = next(filter(None, self.bound), Namespace(subcommand=self.verb))

    def refuse(self, mistakes: list[str]) -> None:
        """What to do about settings that do not fit."""
        raise UserError("\n".join(mistakes))

    def _parse_ckpt_path(self) -> None:
        """Not Lightning's: there a checkpoint's hyper-parameters silently override the settings."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        run, settings = self.runs[0], self.config[self.verb]
        torch.set_float32_matmul_precision(settings.matmul_precision)
        fitting = self.verb == "fit"
        if settings.ckpt_path and not fitting:
            settings.ckpt_path = self.config_init[self.verb].ckpt_path = str(whole(settings.ckpt_path))
        self.resume = continued(run.last.parent, settings.ckpt_path) if fitting else settings.ckpt_path
        if settings.trainer.logger in (None, True):
            folder = run.folder if fitting else run.folder / self.verb
            # Events that a killed run wrote after the checkpoint are of steps that will be made again.
            purge = {"purge_step": step_of(Path(self.resume)) if self.resume else 0} if fitting else {}
            kwargs["logger"] = TensorBoardLogger(folder, name="", version="", default_hp_metric=False, **purge)
        config = self._parser(self.verb).dump(_without_root(settings), skip_none=False, format="yaml")
        config = f"experiment: {run.name}\nrun_root: {run.root}\n{config}"
        self.pause = Pause(settings.trainer.max_time)
        kwargs["max_time"] = None
        kwargs["plugins"] = [*(self._get(self.config_init, "trainer").plugins or []), AtomicCheckpointIO()]
        callbacks = [Record(config, tuple(self.argv), run.as_request(self.verb, self.argv)), self.pause]
        if settings.trainer.enable_progress_bar is not False:
            callbacks.append(Progress(run.name))
        self.trainer_defaults["callbacks"] = callbacks
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except TypeError as error:  # `devices: two`
            raise MisconfigurationException(str(error)) from error
        refuse_other(trainer.strategy)
        take_over_signals(trainer)
        return trainer

    # -- verbs --------------------------------------------------------------------------------------------------------

    def fit(self, model: L.LightningModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Train until done or paused, from the newest checkpoint if there is one."""
        run, settings = self.runs[0], self.config["fit"]
        if self.resume is not None:
            self.trainer.num_sanity_val_steps = 0
        else:
            if settings.validate_first:
                self.trainer.num_sanity_val_steps = float("inf")
            if settings.init_from:
                load_weights(model, str(whole(settings.init_from)))
        self.trainer.fit(model, ckpt_path=self.resume, **kwargs)
        if self.pause.status:
            return
        self._measure_the_end(model, kwargs)
        if self.trainer.is_global_zero:
            write_whole(run.done, json.dumps({"step": self.trainer.global_step}) + "\n")

    def predict(self, model: L.LightningModule, datamodule: L.LightningDataModule | None = None, **kwargs: Any) -> None:
        """Generate; from the model's own inputs if it has any."""
        if is_overridden("predict_dataloader", model):
            datamodule = None  # Lightning would prefer the data module's
        self.trainer.predict(model, datamodule=datamodule, **kwargs)

    def _measure_the_end(self, model: L.LightningModule, kwargs: dict[str, Any]) -> None:
        """Validate the final weights, unless training ended with a validation that was recorded."""
        record = next(c for c in self.trainer.callbacks if isinstance(c, Record))
        if self.trainer.enable_validation and not record.validated(self.trainer):
            # Its figures belong at the step they have in a run that was not killed: within training Lightning tells
            # it one lower, and after it a resumed loop has not counted its last step.
            loop = self.trainer.fit_loop.epoch_loop
            due = loop._should_check_val_fx(self.trainer.fit_loop._data_fetcher)
            loop._batches_that_stepped = self.trainer.global_step - due
            self.trainer.validate(model, datamodule=kwargs.get("datamodule"), verbose=False)


def bind(parser: LightningArgumentParser, top_level: set[str], verb: str, run: Run) -> Namespace:
    """Hold a run's settings against the signatures they name; `top_level` are the keys that stand by themselves.

    Raises:
        UserError: they do not fit; one line per mistake.
    """
    if found := mistakes.find(run, top_level):
        raise UserError("\n".join(mistake.line for mistake in found))
    words = [verb, f"--config={json.dumps(run.settings.data)}", f"--trainer.default_root_dir={run.folder}"]
    try:
        return parser.parse_args([*words, *as_words(run.overrides)])
    except ParserError as error:
        raise UserError(f"{run.name}: {mistakes.shorten(str(error))}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{run.name}: {mistakes.shorten(str(error))}") from None


# What `--smoke` makes of settings that are known by their names to be large, or to write outside of the run folder.
SMOKE_AT_MOST = {"batch_size": 2, "val_batch_size": 2, "pool": 8, "val_pool": 4, "workers": 1}
SMOKE_AT_MOST |= {"steps": 2, "sample_steps": 2}
SMOKE_NOTHING = ("export",)


def _shrink(settings: Namespace, chosen: list[str]) -> None:
    """Make bound settings small, in place, but for those whose names are in `chosen`."""
    for key, value in list(settings.items()):
        name = key.rpartition(".")[2]
        if name in chosen:
            continue
        if name in SMOKE_AT_MOST and type(value) is int:
            settings[key] = min(value, SMOKE_AT_MOST[name])
        elif name in SMOKE_NOTHING:
            settings[key] = None


def load_weights(model: L.LightningModule, path: str) -> None:
    """Start a model from the weights of an earlier stage or run."""
    if isinstance(model, Method):
        return model.load_weights(path)
    weights = read_checkpoint(path)["state_dict"]
    if not weights.keys() & model.state_dict().keys():
        raise UserError(f"{path}: holds no weight of {type(model).__name__}")
    model.load_state_dict(weights, strict=False)


def main(argv: list[str]) -> int:
    """`run REQUEST...`, `bench REQUEST`, `bind REQUEST...`, `print REQUEST WORD` or `help VERB WORD... -- REQUEST...`.

    Returns:
        The exit status.
    """
    quieten()
    what, *rest = argv
    if what != "run":
        interrupts.leave_at_once()
    if what == "help":
        from lit_gen.help import explain

        cut = rest.index("--")
        return explain(rest[0], rest[1:cut], [Run.read_request(Path(path))[2] for path in rest[cut + 1 :]])
    requests = [Run.read_request(Path(path)) for path in (rest[:1] if what == "print" else rest)]
    verb, words, run = requests[0]
    if verb != "fit":
        interrupts.leave_at_once()
    if what == "print":
        _Print(verb, run, rest[1])
    if what == "bind":
        Binding(verb, [r for _, _, r in requests])
        return 0
    # The other verbs read a whole checkpoint, also of a run in training.
    lock = alone_in(run.folder) if verb == "fit" and not rank_zero_only.rank else None
    if what == "bench":
        from lit_gen.measure import Bench as kind
    else:
        kind = Command
    try:
        command = kind(verb, [r for _, _, r in requests], words)
    except Paused:  # while data was built
        return interrupts.PAUSED
    except Exception as error:
        raise as_user_error(error, run) from error
    finally:
        if lock is not None:
            lock.close()
    return command.pause.status


class Binding(Command):
    """Binds the settings of runs, kept in `bound`, and stops there."""

    def __init__(self, verb: str, runs: list[Run]) -> None:
        super().__init__(verb, runs, [])

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class _Print(Command):
    """Prints a run's merged settings and exits."""

    def __init__(self, verb: str, run: Run, word: str) -> None:
        self.word = word
        super().__init__(verb, [run], [])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        run = self.runs[0]
        parser.parse_args([self.verb, f"--config={json.dumps(run.settings.data)}", *as_words(run.overrides), self.word])


def as_user_error(error: Exception, run: Run) -> Exception:
    """Lightning's objections to settings, and files that are not there, in one line; real bugs as they are."""
    error = unwrapped(error)
    if isinstance(error, OutOfRange):
        return UserError("\n".join(_told(error, run)))
    if isinstance(error, UserError):
        return UserError(_located(str(error), run))
    text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError) and error.filename:
        return UserError(_located(f"{error.filename}: no such file or folder", run))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or run.folder
        return UserError(f"{where}: {error.strerror}; make room, and the same command continues from {run.last}")
    if isinstance(error, RuntimeError) and re.search("onnection (closed|reset) by (peer|remote)", text):
        lost = UserError(f"{run.name}: another process of this run has ended; the same command continues it")
        lost.status = 1
        return lost
    if isinstance(error, RuntimeError) and "Error(s) in loading state_dict" in text:
        return UserError(
            f"{run.name}: the checkpoint does not fit the model of these settings; use --fresh. {text[:300]}"
        )
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    raised_by_lightning = frame is not None and frame.tb_frame.f_globals.get("__name__", "").startswith("lightning.")
    if isinstance(error, MisconfigurationException) or (raised_by_lightning and isinstance(error, ValueError)):
        return UserError(f"{run.name}: {text}")
    return error


def unwrapped(error: Exception) -> Exception:
    """What a constructor raised, which jsonargparse wraps."""
    while isinstance(error, ValueError) and "Union subtypes" in str(error) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _told(error: OutOfRange, run: Run) -> Iterator[str]:
    """A line for each setting, with the place where it was written."""
    tree, _ = mistakes.resolved(mistakes.with_overrides(run))
    for line, (name, value) in zip(str(error).splitlines(), error.found.items(), strict=True):
        where = [tree.origin(path) for path in mistakes.places(tree, name, value)]
        where += [f"--{key}" for key, _ in run.overrides if key.endswith(f".{name}")]  # into a list, say
        yield f"{where[0]}: {line}" if where and where[0] else line


def _located(message: str, run: Run) -> str:
    """A message that quotes a setting's value, with the place where that value was written."""
    tree = mistakes.with_overrides(run)
    values = [(re.split(r"[{*?\[]", v)[0], path) for path, v in leaves(tree.data) if isinstance(v, str)]
    # A plain word may stand in a message by chance; a path hardly does.
    quoted = [(len(v), tree.origin(p)) for v, p in values if v and (v in message if "/" in v else f"'{v}'" in message)]
    where = max(quoted)[1] if quoted else ""
    return message if not where or where in message else f"{where}: {message}"


def quieten() -> None:
    """Keep Lightning's tables and tips off the screen, and warnings of what is meant to be so; others stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"The `srun` command is available")  # no need to use it
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated")  # Lightning's, with torch 2.13
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # what is frozen is
    warnings.filterwarnings("ignore", message=r"Already found a `peft_config`")  # for two discriminators on one network
    # Its successor is not in all versions of torch that are supported.
    warnings.filterwarnings("ignore", message=r"torch.distributed.nn.functional.all_gather is deprecated")


def _without_root(settings: Namespace) -> Namespace:
    """The settings without the run folder, which a user's own command will choose anew."""
    settings = settings.clone()
    settings.trainer.default_root_dir = None
    return settings
