"""Weights that ZeRO-3 has cut into one flat piece per process."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard(weight: nn.Parameter) -> Tensor:
    """This process's part of a weight: a flat piece under ZeRO-3, the whole weight otherwise."""
    return getattr(weight, "ds_tensor", weight).data


def size(weight: nn.Parameter) -> int:
    """How many numbers a weight has, whoever holds them."""
    return getattr(weight, "ds_numel", weight.numel())


def refresh(weights: Iterable[nn.Parameter]) -> None:
    """Bring the whole copies that ZeRO-3 keeps of small weights in line with their pieces; all processes must call."""
    kept = [w for w in weights if getattr(w, "ds_persist", False)]
    if kept:
        kept[0].partition(kept)
        kept[0].all_gather(kept)


def unshard(piece: Tensor, shape: torch.Size) -> Tensor:
    """The whole weight of the pieces [N] that the processes hold; all must call."""
    pieces = [torch.empty_like(piece) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, piece.contiguous())
    return join(pieces, shape)


def join(pieces: Iterable[Tensor], shape: torch.Size) -> Tensor:
    """Pieces [N] of a weight, the last padded, as the weight."""
    return torch.cat(list(pieces))[: shape.numel()].view(shape)
