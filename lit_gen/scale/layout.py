"""How tensors lie in memory: weights in channels last are sent, and stored, without being copied into another order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def order_in_memory(weight: Tensor) -> tuple[int, ...]:
    """Its dimensions from the one with the longest stride to that with the shortest."""
    return tuple(sorted(range(weight.ndim), key=lambda d: (-weight.stride(d), -weight.shape[d], d)))


def in_order(values: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """Values [N] as they lie in memory, as the tensor of this shape whose dimensions lie there in this order."""
    return values.view([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


def has_no_gaps(tensor: Tensor) -> bool:
    """Whether its numbers fill a run of memory, each place once."""
    return tensor.permute(order_in_memory(tensor)).is_contiguous()


def lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their numbers at the same distances in memory."""
    if a.stride() == b.stride():
        return True
    return all(n == 1 or i == j for n, i, j in zip(a.shape, a.stride(), b.stride(), strict=True))
