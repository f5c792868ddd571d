"""What several test files share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny; threads only get in each other's way
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parents[1]


# Files that take minutes; begun last, one of them would run alone in the end.
LONG = ("test_resume.py", "test_slurm.py", "test_zero.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def toy(here: Path) -> Path:
    """`toy.yaml`, an experiment of two short stages, in an empty working directory."""
    from toy import TOY, TWO_STAGES

    (here / "toy.yaml").write_text(TOY + TWO_STAGES)
    return here / "toy.yaml"


@pytest.fixture
def lit_gen(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`lit_gen("fit", "-c", ...)`: a command line whose stages run in this process, which saves their imports."""
    from lit_gen import cli, interrupts, stage

    monkeypatch.setattr(cli, "launch", stage.main)
    monkeypatch.setattr(interrupts, "install", lambda: None)
    monkeypatch.setattr(interrupts, "leave_at_once", lambda: None)
    monkeypatch.setattr(interrupts, "received", None)
    monkeypatch.setattr(sys, "argv", ["lit_gen"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that what a run sets is forgotten
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("LIT_GEN_STARTED", "0")

    def run(*argv: str) -> int:
        return cli.main([str(word) for word in argv])

    return run


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """For modules whose tests train under DDP or ZeRO in this process: the group they use, forgotten in the end."""
    import torch

    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def no_address() -> Iterator[None]:
    """What a test's trainer leaves in the environment must not call later tests' processes to its own group."""
    yield
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"):
        os.environ.pop(name, None)


@pytest.fixture
def distributed(process_group: None) -> None:
    """A test that trains under DDP or ZeRO in this process."""


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder like `data/world-base`, with random weights and tiny widths."""
    from lit_gen.pretrain.stand_in import write_stand_in

    return write_stand_in(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def universe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory like the repository's, with a tiny base, a tiny oracle and tiny sets."""
    from lit_gen.metrics.oracle import Oracle

    folder = tmp_path_factory.mktemp("universe")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    (folder / "data").mkdir()
    shutil.copytree(tiny_base, folder / "data" / "world-base")
    Oracle(channels=(8, 8, 8, 8), width=16, layers=1).save_pretrained(folder / "data" / "oracle")
    for file in (ROOT / "data").glob("*.yaml"):
        described = yaml.safe_load(file.read_text())
        described.update(count=min(described["count"], 8), samples_per_shard=8)
        (folder / "data" / file.name).write_text(yaml.safe_dump(described))
    return folder
