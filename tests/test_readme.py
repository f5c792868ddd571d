"""Every command of README.md runs, as written but for `--smoke` and names of the reader's own files.

The one with real models from the Hub is bound to its settings, not run.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
OWN_FILES = {"painting.png": "painting.png", "/models/stable-diffusion-v1-5": "data/world-base", "FOLDER": "pictures"}


def commands() -> list[list[str]]:
    """Arguments of every `python -m lit_gen` line, its continuation lines joined."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S) + re.findall(r"^    (\S.*)$", text, re.M)
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    found = [re.search(r"python -m lit_gen (.*)", line) for line in lines]
    inline = re.findall(r"`python -m lit_gen (data pack [^`]*)`", text)
    return [shlex.split(m[1]) for m in found if m] + [shlex.split(line) for line in inline]


def test_there_are_commands_of_every_kind() -> None:
    assert {c[0] for c in commands()} >= {"fit", "list", "check", "predict", "data"}


@pytest.fixture(scope="session")
def reader(universe: Path) -> Path:
    """A working directory with the files that the README takes for granted."""
    Image.new("RGB", (80, 64), "teal").save(universe / "painting.png")
    (universe / "pictures").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), "red").save(universe / "pictures" / f"{name}.png")
        (universe / "pictures" / f"{name}.txt").write_text("a red picture")
    return universe


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command(
    command: list[str], lit_gen: Callable[..., int], reader: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(reader)
    command = [OWN_FILES.get(word, word) for word in command]
    if "model.ckpt" in command:
        return  # tests/methods/test_stylecrafter_released.py runs it, with small files in the place of real ones
    real = any(word.startswith("experiments/scale/") for word in command)
    small = {"bench": ["--warmup", "1", "--steps", "1", "--rounds", "1"], "data": [], "list": []}.get(
        command[0], ["--print_config" if real else "--smoke"]
    )
    try:
        status = lit_gen(*command, *small)
    except SystemExit as done:  # how --print_config ends
        status = done.code
    assert not status


def test_setup_scripts_are_shell() -> None:
    for script in (".ci/setup", ".ci/run", "experiments/base/train.sh"):
        assert subprocess.run(["sh", "-n", str(ROOT / script)]).returncode == 0
