"""Memory that the GPUs of one node read from each other with their copy engines, which leave the multiprocessors alone.

NCCL's kernels run on multiprocessors, and what computes beside them is slowed down by nearly as long as they take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_gen.errors import UserError


@dataclass
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
    from torch.distributed import _symmetric_memory as symmetric

    try:
        own = symmetric.empty(numel, dtype=dtype, device=device)
        handle = symmetric.rendezvous(own, group)
    except RuntimeError as error:
        told = str(error).strip().splitlines()[0]
        raise UserError(f"trainer.strategy: exchange: copies: GPUs cannot read each other's memory ({told})") from None
    ranks = range(dist.get_world_size(group))
    others = {rank: handle.get_buffer(rank, (numel,), dtype) for rank in ranks if rank != dist.get_rank(group)}
    return Shared(own, others, handle.barrier)
