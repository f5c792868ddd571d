"""Memory that the GPUs of one node read from each other with their copy engines, which leave the multiprocessors alone.

NCCL's kernels run on multiprocessors, and what computes beside them is slowed down by nearly as long as they take.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lit_gen.errors import UserError

Exchange = Literal["auto", "copies", "collectives"]

_shared: weakref.WeakSet[Shared] = weakref.WeakSet()


@dataclass(eq=False)
class Shared:
    """A vector of each process, which the others read.

    Args:
        own: of this process, [numel].
        others: of the others, by rank; to be read between two barriers.
        barrier: has the device wait, in the current stream, until all devices have come to their barriers.
    """

    own: Tensor
    others: dict[int, Tensor]
    barrier: Callable[[], None]


def share(numel: int, dtype: torch.dtype, device: torch.device, group: Any) -> Shared:
    """Make a vector on each process of a group; all must call.

    Raises:
        UserError: the devices cannot read each other's memory.
    """
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # which nothing here uses
    from torch.distributed import _symmetric_memory as symmetric

    try:
        own = symmetric.empty(numel, dtype=dtype, device=device)
        handle = symmetric.rendezvous(own, group)
    except RuntimeError as error:
        told = str(error).strip().splitlines()[0]
        raise UserError(
            f"trainer.strategy: exchange: copies needs GPUs that read each other's memory ({told}); use collectives"
        ) from None
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    # From the next one on, so that not all read from the same device at once.
    ranks = [(rank + step) % count for step in range(1, count)]
    shared = Shared(own, {other: handle.get_buffer(other, (numel,), dtype) for other in ranks}, handle.barrier)
    _shared.add(shared)
    return shared


def held() -> int:
    """Bytes that this process shares; torch's own count of a device's memory leaves them out."""
    return sum(shared.own.nbytes for shared in _shared)


def by_copies(exchange: Exchange, device: torch.device, nodes: int) -> bool:
    """Whether processes are to read each other's memory; all must call.

    Args:
        exchange: "auto" for whether they can.
        device: of this process.
        nodes: that the processes run on.

    Raises:
        UserError: "copies" are asked for on several nodes.
    """
    if exchange == "copies" and nodes > 1:
        raise UserError("trainer.strategy: exchange: copies needs all GPUs in one node; use collectives")
    if exchange != "auto":
        return exchange == "copies"
    if nodes > 1 or dist.get_world_size() == 1:
        return False
    can = torch.ones(1, device=device)
    try:
        share(1, torch.float32, device, dist.group.WORLD)
    except UserError:
        can.zero_()
    dist.all_reduce(can, dist.ReduceOp.MIN)
    return bool(can.item())
