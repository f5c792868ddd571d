"""Files that are whole or absent, whatever ends the process or the machine."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lit_gen.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name, have the disk keep it, and only then give it its own."""
    # Tasks of one job may write the same one, and on two nodes they may have the same process id.
    temporary = path.with_name(f"{path.name}.{os.environ.get('SLURM_PROCID', 0)}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Write a safetensors file whose earlier content stays until the new one is whole, and which those may read who may
    read other new files (safetensors' own are for their owner alone)."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    ordinary = temporary.with_suffix(".mode")
    try:
        save_file(tensors, temporary, about)
        ordinary.touch()
        shutil.copymode(ordinary, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        ordinary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What a file of this program's own says; None, with a warning, for one that a power cut left unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        print(f"warning: {path}: unreadable, taken for absent", file=sys.stderr)
        return None


def alone_in(folder: Path) -> TextIO | None:
    """Keep a second process out of a run folder; the kernel lets go when this one ends, however it ends.

    Raises:
        UserError: another one is in it, and has not left for half a minute.
    """
    if fcntl is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    for _ in range(30):  # a process that was just killed may take a moment to go
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            time.sleep(1)
        except OSError:  # a file system without locks
            return None
    raise UserError(f"{folder}: another process is using this run folder")
