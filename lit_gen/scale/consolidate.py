"""A ZeRO checkpoint, a folder with a part per process, read as if one process had saved it.

The parts hold tensors in layouts that DeepSpeed's `zero_to_fp32.py` documents by undoing them. Here they are undone
with the optimizer's state, without unpickling code, and without DeepSpeed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_gen.errors import UserError
from lit_gen.scale.layout import in_order
from lit_gen.scale.shards import join
from lit_gen.weights import read_torch

TAG = "checkpoint"  # Lightning's name of the folder within the folder
FROZEN = "frozen_state_dict"  # weights and buffers that are stored but not trained
NAMES = "optimizer_names"  # trained parameters by parameter group, in the optimizer's order
ORDERS = "memory_orders"  # of dimensions, of weights that lie otherwise than their shape says, e.g. channels last
# What DeepSpeed adds to a checkpoint of Lightning's.
DEEPSPEED = (
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version", "checkpoint_parallel_dims",
)  # fmt: skip


class _Inert:
    """Stands in for DeepSpeed's own objects, of which nothing is needed."""

    def __init__(self, *_: Any) -> None: ...


INERT = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def read_part(path: Path) -> dict[str, Any]:
    """One process's part.

    Raises:
        UserError: as `read_torch`.
    """
    allowed: list[Any] = [(_Inert, name) for name in INERT]
    allowed.append((int, "deepspeed.runtime.zero.config.ZeroStageEnum"))
    with torch.serialization.safe_globals(allowed):
        return read_torch(path)


def parts_of(folder: Path, kind: Literal["model", "optim"]) -> list[Path]:
    """The files of one kind in the order of the processes; ZeRO-1 and 2 have one "model" file for all."""

    def rank(path: Path) -> int:
        found = re.search(r"zero_pp_rank_(\d+)", path.name)
        return int(found[1]) if found else 0

    return sorted((folder / TAG).glob(f"*_{kind}_states.pt"), key=rank)


def consolidate(folder: Path) -> dict[str, Any]:
    """The checkpoint on the CPU in Lightning's layout: "state_dict", "optimizer_states", "ema", "callbacks", ...

    Raises:
        UserError: parts are missing, damaged, or hold more than tensors and plain values.
    """
    if not (folder / "latest").is_file():
        raise UserError(f"{folder}: not a whole checkpoint of DeepSpeed: its file `latest` is missing")
    models = [read_part(p) for p in parts_of(folder, "model")]
    parts = [read_part(p)["optimizer_state_dict"] for p in parts_of(folder, "optim")]
    if not models or not parts or len(parts) != models[0]["dp_world_size"]:
        wanted = models[0]["dp_world_size"] if models else "all"
        raise UserError(f"{folder}: holds {len(parts)} parts of {wanted}; were all written to the same file system?")
    client = {k: v for k, v in models[0].items() if k not in (*DEEPSPEED, FROZEN, NAMES, ORDERS)}
    shapes = models[0]["param_shapes"]  # [{name: shape}], one per flat group
    three = parts[0]["zero_stage"] == 3
    flat = [part["fp32_flat_groups" if three else "single_partition_of_fp32_groups"] for part in parts]
    paddings = parts[0].get("param_alignment_paddings")
    orders = models[0].get(ORDERS, {})

    def cut(values: list[list[Tensor]]) -> dict[str, Tensor]:
        """Weights by name of flat values by process and group."""
        cuts: dict[str, Tensor] = {}
        for i, group in enumerate(shapes):
            pieces = [of_process[i] for of_process in values]
            cuts |= _cut_each(pieces, group) if three else _cut_whole(pieces, group, paddings and paddings[i], orders)
        return cuts

    trained = cut(flat)
    client["state_dict"] = {**models[0][FROZEN], **trained}
    client["optimizer_states"] = [_optimizer_state(parts, three, models[0][NAMES], cut)]
    if "ema" in client and three:
        whole = {n: shape for group in shapes for n, shape in group.items()}
        client["ema"] = {n: join([m["ema"][n] for m in models], whole[n]) for n in client["ema"]}
    return client


def _cut_whole(
    pieces: Iterable[Tensor],
    group: dict[str, torch.Size],
    paddings: list[int] | None,
    orders: dict[str, list[int]],
) -> dict[str, Tensor]:
    """ZeRO-1 and 2: a group's weights one after another, the whole cut into one piece per process."""
    flat, offset, cuts = torch.cat([p.flatten() for p in pieces]), 0, {}
    for i, (name, shape) in enumerate(group.items()):
        values = flat[offset : offset + shape.numel()]
        cuts[name] = in_order(values, shape, orders.get(name, range(len(shape)))).contiguous()
        offset += shape.numel() + (paddings[i] if paddings else 0)
    return cuts


def _cut_each(pieces: list[Tensor], group: dict[str, torch.Size]) -> dict[str, Tensor]:
    """ZeRO-3: each weight cut into one piece per process; each process has its pieces one after another."""
    offset, cuts = 0, {}
    for name, shape in group.items():
        size = -(-shape.numel() // len(pieces))
        cuts[name] = join([p.flatten()[offset : offset + size] for p in pieces], shape)
        offset += size
    return cuts


def _optimizer_state(parts: list[dict[str, Any]], three: bool, names: list[list[str]], cut: Any) -> dict[str, Any]:
    """torch's optimizer state of one process."""
    inner = [part["optimizer_state_dict" if three else "base_optimizer_state"] for part in parts]
    by_group = inner[0]["state"]  # {flat group: {"exp_avg": flat, "step": 0-d, ...}}
    flat = [key for key, value in next(iter(by_group.values()), {}).items() if value.ndim > 0]
    tensors = {key: cut([[of["state"][i][key] for i in sorted(by_group)] for of in inner]) for key in flat}
    scalars = {key: value for key, value in next(iter(by_group.values()), {}).items() if key not in flat}
    state: dict[int, dict[str, Tensor]] = {}
    groups: list[dict[str, Any]] = []
    for settings, group in zip(inner[0]["param_groups"], names, strict=True):
        positions = range(len(state), len(state) + len(group))
        for i, name in zip(positions, group, strict=True):
            state[i] = {k: v.clone() for k, v in scalars.items()} | {k: tensors[k][name].clone() for k in flat}
        plain = {k: v for k, v in settings.items() if k != "params" and not k.startswith("_")}
        groups.append({**plain, "params": list(positions)})
    return {"state": state, "param_groups": groups}
