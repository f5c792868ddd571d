"""Reading torch's files as what they should be, tensors and plain values: nothing in them can run."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from lit_gen.errors import UserError


def read_torch(path: str | Path, map_location: Any = "cpu", lazily: bool = False) -> Any:
    """The content of a file that `torch.save` wrote; `lazily`: tensors come from the disk only when they are used.

    Raises:
        UserError: no such file, damaged, or it holds objects other than tensors, containers and plain values.
    """
    try:
        where = "cpu" if map_location is None else map_location
        return torch.load(path, map_location=where, weights_only=True, mmap=lazily and zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if named:
            raise UserError(
                f"{path}: refused, since it holds more than tensors and plain values ({named[1]}), which could run code"
            ) from error
        raise UserError(f"{path}: not a checkpoint that can be read") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files raise nearly anything: RuntimeError, EOFError, ValueError, KeyError…
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: damaged, or not a checkpoint ({reason[:200]})") from error


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint of Lightning's, which has its weights under "state_dict"; a folder of DeepSpeed's as one file.

    Raises:
        UserError: as `read_torch`, or it has no weights, or a folder lacks parts.
    """
    if Path(path).is_dir():
        from lit_gen.scale.consolidate import consolidate  # which reads the parts by `read_torch`

        return consolidate(Path(path))
    found = read_torch(path, map_location)
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        raise UserError(f"{path}: no checkpoint of a run: it has no `state_dict`")
    return found
