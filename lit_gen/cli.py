"""The front door: verbs, help, and the stages of an experiment run one after another.

Nothing heavy is imported here (Lightning alone takes seconds): each stage runs in a child process of its own, which
also gives each its own process group under DDP, DeepSpeed and srun.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from lit_gen import experiment, interrupts, usage
from lit_gen import settings as trees
from lit_gen.errors import UserError, nearest
from lit_gen.files import alone_in
from lit_gen.run import LENGTH, Changes, Override, Run

Options = dict[str, str | bool]

TRAINER_VERBS = {
    "fit": "run every stage of an experiment, resuming what was interrupted",
    "validate": "measure the last checkpoint on the validation set",
    "test": "measure the last checkpoint on the test set",
    "predict": "generate with the last checkpoint",
}
MODULE_VERBS = {
    "check": ("lit_gen.check.command", "say in seconds, without a GPU, what would go wrong"),
    "data": ("lit_gen.data.command", "build or pack the shards of a data set"),
    "cache": ("lit_gen.data.cache", "encode the training sets of an experiment once, instead of in every step"),
    "export": ("lit_gen.export", "write a run's weights as safetensors, or its sharded checkpoint as one file"),
    "sweep": ("lit_gen.sweep", "an experiment's arms and seeds, and the report that compares them"),
    "world": ("lit_gen.world.sheets", "draw contact sheets of the procedural world"),
}
VERBS = {
    **TRAINER_VERBS,
    **{verb: text for verb, (_, text) in MODULE_VERBS.items()},
    "bench": "measure how fast experiments train (-c FILE), or a part, e.g. `bench world`",
    "list": "name the experiments here",
}

SWITCHES = ("fresh", "help", "print_config", "smoke")


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit status (2 for errors that are the user's to fix)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(argv)
    except UserError as error:
        print(f"error: {error}".replace("\n", "\nerror: "), file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `lit_gen list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _dispatch(argv: list[str]) -> int:
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if verb == "stage":  # how this file starts a child
        interrupts.die_with_parent()
        return importlib.import_module("lit_gen.stage").main(rest)
    if verb in usage.OF and ("-h" in rest or "--help" in rest):  # the others' modules know better, and take longer
        print(usage.OF[verb])
        return 0
    if verb == "list":
        return _list(rest)
    if verb == "bench":
        return _bench(rest)
    if verb in MODULE_VERBS:
        if verb not in ("cache", "data", "sweep"):  # which stop at a good place, and go on from there
            interrupts.leave_at_once()
        return importlib.import_module(MODULE_VERBS[verb][0]).main(rest) or 0
    if verb in TRAINER_VERBS:
        return _run(verb, rest)
    raise UserError(f"there is no verb `{verb}`{nearest(verb, VERBS)} (verbs: {', '.join(VERBS)})")


def _usage() -> str:
    verbs = "\n".join(f"  {verb:9} {text}" for verb, text in VERBS.items())
    options = "\n".join(f"  {line}" for line in usage.OPTIONS.splitlines())
    return (
        f"usage: python -m lit_gen VERB [options]\n\nverbs:\n{verbs}\n\n"
        f"options of fit, validate, test, predict, check:\n{options}\n\n"
        "`python -m lit_gen fit --help` explains every setting; `python -m lit_gen list` names the experiments."
    )


def _list(argv: list[str]) -> int:
    folder = Path(argv[0]) if argv else Path("experiments")
    files = sorted(p for p in folder.rglob("*.yaml"))
    if not files:
        raise UserError(
            f"{folder}: no experiments here; run this where the repository's experiments/ is, or name a folder"
        )
    width = max(len(str(p)) for p in files)
    for path in files:
        print(f"{str(path):{width}}  {experiment.describe(path)}".rstrip())
    return 0


def _bench(argv: list[str]) -> int:
    parts = sorted(p.parent.name for p in Path(__file__).parent.glob("*/bench.py"))
    if argv and argv[0].startswith("-"):
        return importlib.import_module("lit_gen.bench").main(argv)
    if not argv or argv[0] not in parts:
        what = argv[0] if argv else ""
        raise UserError(f"bench needs an experiment, -c FILE, or one of: {', '.join(parts)}{nearest(what, parts)}")
    interrupts.leave_at_once()
    return importlib.import_module(f"lit_gen.{argv[0]}.bench").main(argv[1:]) or 0


def parse(argv: list[str]) -> tuple[list[str], Options, list[Override]]:
    """Split a command line -> (files, options of ours, overrides in order).

    Raises:
        UserError: a word that belongs to no option.
    """
    files: list[str] = []
    options: Options = {}
    overrides: list[Override] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "-h":
            word = "--help"
        if word == "-c":
            word = "--config"
        if not word.startswith("--") or word == "--":
            raise UserError(f"`{word}` belongs to no option; settings are given as --key VALUE, files as -c FILE")
        key, equals, value = word[2:].partition("=")
        given: str | None = value if equals else None
        if given is None and key not in SWITCHES and words and not re.match("--|-[a-z]$", words[0]):
            given = words.pop(0)
        given = given and trees.at_home(given)
        if key in ("config", "stage"):
            if not given:
                raise UserError(f"--{key} needs a {'file' if key == 'config' else 'name'}")
            if key == "config":
                files.append(given)
            else:
                options["stage"] = given
        elif key in ("fresh", "smoke"):
            options[key] = _yes(key, given)
        elif key in SWITCHES:
            options[key] = given or True
        else:
            overrides.append((key, given))
    return files, options, overrides


def _yes(key: str, given: str | None) -> bool:
    value = True if given is None else trees.parse_value(given)
    if not isinstance(value, bool):
        raise UserError(f"--{key} is true or false, not `{given}`")
    return value


def as_words(overrides: list[Override]) -> list[str]:
    return [f"--{key}" if value is None else f"--{key}={value}" for key, value in overrides]


def _run(verb: str, argv: list[str]) -> int:
    files, options, overrides = parse(argv)
    if verb == "predict":
        overrides = _fill_lists(overrides)
    if options.get("help") or any(key.endswith(".help") for key, _ in overrides):
        return _help(verb, files, options, overrides, argv)
    if not files:
        raise UserError(f"{verb} needs an experiment: -c FILE (`python -m lit_gen list` names those here)")
    runs = chosen(files, options, overrides)
    for run in runs:
        refuse_own_folder(run)
    if options.get("print_config"):
        for run in runs:
            print(f"# {run.name}", flush=True)
            flag = "" if options["print_config"] is True else f"={options['print_config']}"
            with tempfile.TemporaryDirectory() as folder:
                printed = dataclasses.replace(run, folder=Path(folder))
                if code := launch(["print", str(printed.write_request(verb, argv)), f"--print_config{flag}"]):
                    return code
        return 0
    if verb != "fit":
        return _measure(verb, runs[-1], argv)
    if options.get("smoke"):
        for run in runs:
            with _alone_in(run.folder):
                shutil.rmtree(run.folder, ignore_errors=True)
    # SLURM requeues a job with the words it was submitted with: only its first start is meant.
    fresh = bool(options.get("fresh")) and int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0
    with interrupts.ctrl_c_pauses():
        return _fit(runs, argv, fresh)


def _help(verb: str, files: list[str], options: Options, overrides: list[Override], argv: list[str]) -> int:
    """Explain every setting, with files also those of the classes they name; `--KEY.help` those of one class."""
    asked = [(key, value) for key, value in overrides if key.endswith(".help")]
    words = as_words(asked) if asked else ["--help"]
    rest = [override for override in overrides if override not in asked]
    runs = chosen(files, options, rest) if files else []
    if not asked:
        print(
            f"usage: python -m lit_gen {verb} -c FILE [options]\n\n{usage.OPTIONS}\n{usage.FILE_KEYS}\nsettings:",
            flush=True,
        )
    with tempfile.TemporaryDirectory() as folder:
        copies = [dataclasses.replace(run, folder=Path(folder) / str(i)) for i, run in enumerate(runs)]
        requests = [str(copy.write_request(verb, argv)) for copy in copies]
        return launch(["help", verb, *words, "--", *requests])


def _fit(runs: list[Run], argv: list[str], fresh: bool) -> int:
    if fresh and any(run.folder.exists() for run in runs):
        if code := bind(runs, argv):  # a slip on the command line should not cost a run its place
            return code
        _move_aside(runs)
    waiting = []
    for run in runs:
        changes = run.changes()
        if run.done.is_file() and _wrong(changes) and (code := bind(runs, argv)):
            return code  # a slip, not a wish for other settings
        if not _finished(run, changes):
            waiting.append(run)
    interrupts.start_clock()
    for run in runs:
        if run not in waiting:
            _say(f"{run.name}: finished already, skipped")
    if waiting and (stale := [r for r in runs[runs.index(waiting[0]) :] if r not in waiting]):
        names = ", ".join(run.name for run in stale)
        _say(f"{names}: finished, but from earlier weights of {waiting[0].name}; --stage NAME --fresh redoes it")
    for before, run in itertools.pairwise(runs):
        if before not in waiting and run not in waiting and before.done.stat().st_mtime > run.done.stat().st_mtime:
            _say(f"{run.name}: finished, but before {before.name} was; --stage NAME --fresh redoes it")
    requests = [str(run.write_request("fit", argv)) for run in waiting]
    for i, run in enumerate(waiting):
        status = interrupts.status(run.time_limit() if i > 0 else None)
        if status and _tasks() == 1:  # several agree within the stage, or some would wait for the others there
            return _paused(run, status)
        # The first child also binds the settings of the stages after it: a mistake there shows now, not in an hour.
        try:
            code = launch(["run", requests[i], *(requests[i + 1 :] if i == 0 else [])])
        except KeyboardInterrupt:
            _say(f"{run.name}: interrupted; the same command continues from its last checkpoint")
            raise
        if code in (interrupts.PAUSED, interrupts.OUT_OF_TIME):
            return _paused(run, code)
        if code > 128:
            print(f"error: {run.name}: killed by signal {code - 128}; the same command continues it", file=sys.stderr)
        if code:
            return code
    if not waiting:
        _say(f"nothing left to do; results are in {runs[-1].folder}")
    return 0


def _measure(verb: str, run: Run, argv: list[str]) -> int:
    if "ckpt_path" not in dict(run.overrides) and run.settings.data.get("ckpt_path") is None:
        source = run.source(run.last if run.has_checkpoint else None)
        run.settings.data["ckpt_path"] = source and str(source)
    elif given := run.effective()["ckpt_path"]:
        run.source(Path(str(given)), given=True)
    return launch(["run", str(run.write_request(verb, argv))])


def _fill_lists(overrides: list[Override]) -> list[Override]:
    """`predict --prompt A --prompt B` fills the model's list `prompts`, and so on for every word of its own."""
    known = (*experiment.OWN_KEYS, "seed_everything", "trainer", "model", "data", "checkpoint", "speed", "vars")
    known += ("init_from", "validate_first", "ckpt_path", "matmul_precision", "return_predictions", "weights_only")
    lists: dict[str, list[str]] = {}
    rest: list[Override] = []
    for key, value in overrides:
        if "." in key or key in known or value is None:
            rest.append((key, value))
        else:
            lists.setdefault(f"model.init_args.{key}s", []).append(value)
    return rest + [(key, json.dumps(values)) for key, values in lists.items()]


def launch(words: list[str]) -> int:
    """Run `python -m lit_gen stage WORDS` as a child."""
    return interrupts.call([sys.executable, "-m", "lit_gen", "stage", *words])


def bind(runs: list[Run], argv: list[str]) -> int:
    """Have a child hold the settings against their signatures, and do nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        copies = [dataclasses.replace(run, folder=Path(folder) / str(i)) for i, run in enumerate(runs)]
        return launch(["bind", *(str(copy.write_request("fit", argv)) for copy in copies)])


def _finished(run: Run, changes: Changes) -> bool:
    """Whether nothing is left to do; a longer training than the finished one is something left to do.

    Raises:
        UserError: the run is finished, but with other settings.
    """
    if not run.done.is_file():
        if changes and run.has_checkpoint:
            _say(f"{run.name}: continuing with changed settings ({_told(changes)})")
        return False
    if wrong := _wrong(changes):
        raise UserError(
            f"{run.name} is finished with other settings ({_told(wrong)}); "
            "start over with --fresh or choose another name with --experiment"
        )
    if changes:
        run.done.unlink(missing_ok=True)  # another task of the same job may have been quicker
    return not changes


def _wrong(changes: Changes) -> Changes:
    """Changes other than a longer training."""
    return {k: v for k, v in changes.items() if not (k in LENGTH and _grew(*v))}


def _told(changes: Changes) -> str:
    return "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())


def _grew(old: object, new: object) -> bool:
    return isinstance(new, int) and (new == -1 or (isinstance(old, int) and old < new))


def _move_aside(runs: list[Run]) -> None:
    if _tasks() > 1:
        raise UserError(
            "--fresh in a job of several tasks would race with itself; move the run folder aside beforehand"
        )
    for run in runs:
        if run.folder.exists():
            n = 1
            while (aside := run.folder.with_name(f"{run.folder.name}.old{n}")).exists():
                n += 1
            with _alone_in(run.folder):
                run.folder.rename(aside)
            print(f"{run.name}: the earlier run is now in {aside}", flush=True)


def _alone_in(folder: Path) -> AbstractContextManager:
    """Within, no training is in a run folder; several tasks of one job, which start together, do not wait."""
    lock = alone_in(folder) if folder.exists() and _tasks() == 1 else None
    return lock or nullcontext()


def _tasks() -> int:
    """Processes that were started with this same command line, this one included."""
    return max(int(os.environ.get(name, 1)) for name in ("SLURM_NTASKS", "WORLD_SIZE"))


def _say(text: str) -> None:
    """Print it, once for all tasks of a job."""
    if int(os.environ.get("SLURM_PROCID", os.environ.get("RANK", 0))) == 0:
        print(text, flush=True)


def _paused(run: Run, status: int) -> int:
    _say(f"{run.name}: paused; the same command continues it")
    if status == interrupts.OUT_OF_TIME:
        return 0
    return 128 + signal.SIGINT if interrupts.received == signal.SIGINT else status


def refuse_own_folder(run: Run) -> None:
    """UserError where a run is to write elsewhere than into its folder."""
    path = ("trainer", "default_root_dir")
    given = [f"--{key}" for key, _ in run.overrides if key == ".".join(path)]
    if path in run.settings.origins and run.settings.data["trainer"]["default_root_dir"] is not None:
        given.append(run.settings.origin(path))
    if given:
        raise UserError(
            f"{given[0]}: trainer.default_root_dir is the run folder; set `run_root` and `experiment` instead"
        )


def chosen(files: list[str], options: Options, overrides: list[Override]) -> list[Run]:
    """The runs that a command line asks for."""
    stage = options.get("stage")
    runs = experiment.runs(files, overrides, bool(options.get("smoke")))
    return experiment.select(runs, stage if isinstance(stage, str) else None)
