"""YAML files from strangers: no tag, no class path and no alias gets code to run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from security.evil import CANARY
from toy import TOY

Command, Refused = Callable[..., int], Callable[..., str]
POPEN = "{class_path: subprocess.Popen, init_args: {args: touch canary, shell: true}}"
CPU, MODEL, SEED = "accelerator: cpu", "toy.Regression", "seed_everything: 7"
CALLBACK = "accelerator: cpu\n  callbacks: [%s]"
LAMBDA = CALLBACK % "{class_path: LambdaCallback, init_args: {on_fit_start: %s}}"
MIXED = "lit_gen.data.module.ImagesAndVideos\n  init_args: {images: %s, videos: lit_gen.data.module.Videos}"
STRATEGY = "strategy: {class_path: DDPStrategy, init_args: {%s}}"

# name: (what replaces what in toy.yaml, what the line must say)
FILES: dict[str, tuple[tuple[str, str], list[str]]] = {
    "tag on a list": (
        (SEED, "seed_everything: !!python/object/apply:os.system [touch canary]"),
        ["toy.yaml:1", "!!py"],
    ),
    "tag on a mapping": ((SEED, "vars: !!python/object:os.system {a: touch canary}"), ["toy.yaml:1", "!!python"]),
    "tag on a text": ((SEED, "vars: {a: !!python/name:os.system ''}"), ["toy.yaml:1", "!!python"]),
    "tag on a key": ((SEED, "!!python/object/apply:os.system [touch canary]: 3"), ["toy.yaml:1"]),
    "function for a model": ((MODEL, "os.system"), ["toy.yaml:8", "`os.system` is not a class"]),
    "process for a model": ((MODEL, "subprocess.Popen"), ["toy.yaml:8", "not a LightningModule"]),
    "process for data": (("toy.Numbers", "subprocess.Popen"), ["toy.yaml:10", "not a LightningDataModule"]),
    "process for a callback": ((CPU, CALLBACK % POPEN), ["toy.yaml:4", "not a Callback"]),
    "function for a callback": ((CPU, CALLBACK % "builtins.eval"), ["toy.yaml:4", "not a class"]),
    "process for a logger": ((CPU, f"logger: {POPEN}"), ["toy.yaml:3", "not a Logger"]),
    "process among loggers": ((CPU, f"logger: [{POPEN}]"), ["toy.yaml:3", "not a Logger"]),
    "process for a plugin": ((CPU, f"plugins: [{POPEN}]"), ["toy.yaml:3", "Popen` is not a"]),
    "process for a profiler": ((CPU, f"profiler: {POPEN}"), ["toy.yaml:3", "not a Profiler"]),
    "process for a strategy": ((CPU, f"strategy: {POPEN}"), ["toy.yaml:3", "not a Strategy"]),
    "process for a number": ((CPU, f"devices: {POPEN}"), ["toy.yaml:3", "takes no class"]),
    "process for a dataclass": ((MODEL, f"toy.Regression\n  init_args: {{sgd: {POPEN}}}"), ["toy.yaml:9", "not a Sgd"]),
    "process for anything": ((CPU, STRATEGY % f"ddp_comm_state: {POPEN}"), ["toy.yaml:3", "takes no class"]),
    "process for an argument without a name": (
        (CPU, f"strategy: {{class_path: DDPStrategy, dict_kwargs: {{static_graph: {POPEN}}}}}"),
        ["subprocess.Popen", "not allowed"],
    ),
    "process in a data module within": (
        ("toy.Numbers", MIXED % POPEN),
        ["toy.yaml:11", "not a Images"],
    ),
    "function for a hook": ((CPU, LAMBDA % "builtins.breakpoint"), ["toy.yaml:4", "takes a function"]),
    "code in the folder of a set": ((MODEL, "data.shards.evil.payload.Model"), ["toy.yaml:8", "`data` is a folder"]),
    "callback in the folder of a set": ((CPU, CALLBACK % "data.shards.evil.payload.Hook"), ["toy.yaml:4", "`data` is"]),
    "function in the folder of a set": (
        (CPU, LAMBDA % "data.shards.evil.payload.hook"),
        ["toy.yaml:4", "takes a func"],
    ),
    "hook in the folder of a set": (
        (CPU, STRATEGY % "ddp_comm_hook: data.shards.evil.payload.hook"),
        ["toy.yaml:3", "takes a function"],
    ),
    "path out of the run folder": ((SEED, "experiment: ../../home"), ["toy.yaml:1", "cannot be the name of a folder"]),
    "strategy that unpickles": ((CPU, "strategy: fsdp"), ["toy.yaml:3", "can run code"]),
    "class that unpickles": ((CPU, "strategy: {class_path: DeepSpeedStrategy}"), ["toy.yaml:3", "can run code"]),
    "strategy by another name": (
        (f"{SEED}\ntrainer:", "vars: {s: fsdp}\ntrainer:\n  strategy: ${vars.s}"),
        ["toy.yaml:3", "named in its place"],
    ),
    "class by another name": (
        (f"{SEED}\ntrainer:", "vars: {c: subprocess.Popen}\ntrainer:\n  logger: {class_path: '${vars.c}'}"),
        ["toy.yaml:3", "no name of a class"],
    ),
    "own reader of checkpoints": (
        (CPU, "plugins: [{class_path: lightning.fabric.plugins.TorchCheckpointIO}]"),
        ["CheckpointIO"],
    ),
    "own reader in the strategy": (
        (CPU, STRATEGY % "checkpoint_io: {class_path: lightning.fabric.plugins.TorchCheckpointIO}"),
        ["checkpoint_io"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_yaml_runs_nothing(name: str, here: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    (old, new), expected = FILES[name]
    assert old in TOY
    (here / "toy.yaml").write_text(TOY.replace(old, new, 1))
    folder = here / "data" / "shards" / "evil"
    folder.mkdir(parents=True)
    (folder / "payload.py").write_text(
        f"open({CANARY!r}, 'w')\nfrom toy import Regression as Model\nfrom lightning.pytorch import Callback as Hook\n"
        "def hook(*_): pass\n"
    )
    monkeypatch.syspath_prepend(str(here))  # as `python -m` does
    line = refused("fit", "-c", "toy.yaml", "--trainer.max_steps=1")
    for part in expected:
        assert part in line, line
    assert not (here / "runs").exists() or not list((here / "runs").rglob("*.ckpt"))


def test_a_value_of_any_type_stays_a_value(here: Path, lit_gen: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "gadget.py").write_text(f"class Touch:\n    def __init__(self):\n        open({CANARY!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(here))
    gadget = "strategy: {class_path: DDPStrategy, dict_kwargs: {static_graph: {class_path: gadget.Touch}}}"
    (here / "toy.yaml").write_text(TOY.replace(CPU, f"{CPU}\n  {gadget}"))
    with contextlib.suppress(Exception):  # Lightning may not like the value
        lit_gen("fit", "-c", "toy.yaml", "--trainer.max_steps=1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
            f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in zip("abcdefg", "bcdefgh", strict=True)
        ), "aliases"),
        ("a: &a [*a]\n", "within itself"),
        ("[" * 5000, "nested too deeply"),
        ("a: !!int word\n", "is no int"),
        ("a: !!set {b, c}\n", "!!set"),
        ("a: \x00\n", "not valid YAML"),
    ],
    ids=["billion laughs", "endless", "deep", "no number", "set", "control character"],
)  # fmt: skip
def test_a_yaml_cannot_exhaust_or_crash(text: str, said: str, here: Path, refused: Refused) -> None:
    (here / "toy.yaml").write_text(text)
    assert said in refused("fit", "-c", "toy.yaml")


def test_a_yaml_in_no_known_encoding(here: Path, refused: Refused) -> None:
    (here / "toy.yaml").write_bytes(b"a: \xff\xfe\n")
    assert "UTF-8" in refused("fit", "-c", "toy.yaml")
