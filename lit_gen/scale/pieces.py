"""An optimizer's step in pieces, so that what has been stepped can be sent while the rest is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def step_in_pieces(optimizer: torch.optim.Optimizer, size: int) -> Iterator[tuple[int, int]]:
    """Step an optimizer on `size` numbers of each of its tensors at a time, to the result of one step on all.

    That holds of optimizers that treat each number by itself, as ZeRO supposes anyway. The first step, in which the
    state is made, is one piece.

    Args:
        optimizer: over vectors [N], with their gradients.
        size: numbers of a piece.

    Yields:
        The range of numbers, of each tensor that is so long, that has just been stepped.
    """
    vectors = [weight for group in optimizer.param_groups for weight in group["params"]]
    longest = max(len(vector) for vector in vectors)
    if not optimizer.state or longest <= size:
        optimizer.step()
        yield 0, longest
        return
    groups, state = [group["params"] for group in optimizer.param_groups], optimizer.state
    counts: dict[Tensor, dict[str, Any]] = {}  # what a vector's state has but once, e.g. how many steps were taken
    try:
        for low in range(0, longest, size):
            pieces = {vector: _piece(vector, low, low + size) for vector in vectors if low < len(vector)}
            optimizer.state = defaultdict(dict)
            for vector, piece in pieces.items():
                optimizer.state[piece] = _state_of_piece(state[vector], vector, low, low + size)
            for group, whole in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = [pieces[vector] for vector in whole if vector in pieces]
            optimizer.step()
            for vector, piece in pieces.items():
                once = [name for name, value in state[vector].items() if not _is_like(vector, value)]
                counts[vector] = {name: optimizer.state[piece][name] for name in once}
            yield low, low + size
    finally:
        optimizer.state = state
        for group, whole in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = whole
    for vector, values in counts.items():
        state[vector].update(values)


def _piece(vector: Tensor, low: int, high: int) -> Tensor:
    piece = vector.detach()[low:high]
    piece.grad = None if vector.grad is None else vector.grad[low:high]
    return piece


def _state_of_piece(state: dict[str, Any], vector: Tensor, low: int, high: int) -> dict[str, Any]:
    """Views of what there is for each number; copies of the rest, since every piece takes the same step."""
    return {
        name: value[low:high] if _is_like(vector, value) else value.clone() if torch.is_tensor(value) else value
        for name, value in state.items()
    }


def _is_like(vector: Tensor, value: Any) -> bool:
    return torch.is_tensor(value) and value.shape == vector.shape
