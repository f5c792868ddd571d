"""A step in pieces gives what the whole step gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_gen.scale.pieces import step_in_pieces

OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "fused AdamW": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1, "fused": True}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
}


def train(name: str, size: int | None, infinite: int | None = None) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Weights and state after four steps on two vectors, in pieces of `size`."""
    draw = torch.Generator().manual_seed(0)
    vectors = [torch.randn(n, generator=draw) for n in (1000, 300)]
    kind, options = OPTIMIZERS[name]
    optimizer = kind([{"params": [vectors[0]]}, {"params": [vectors[1]], "lr": 0.01}], **options)
    for step in range(4):
        for vector in vectors:
            vector.grad = torch.randn(len(vector), generator=draw)
        if options.get("fused"):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(step == infinite))
        if size is None:
            optimizer.step()
        else:
            ranges = list(step_in_pieces(optimizer, size))
            assert ranges[0][0] == 0
            assert ranges[-1][1] >= 1000
            assert all(before[1] == after[0] for before, after in zip(ranges, ranges[1:], strict=False))
            assert len(ranges) == (1 if step == 0 else -(-1000 // size))
    return vectors, [optimizer.state[vector] for vector in vectors]


@pytest.mark.parametrize("size", [7, 128, 999, 5000])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_in_pieces_is_the_step(name: str, size: int) -> None:
    for found, wanted in zip(train(name, size), train(name, None), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_every_piece_skips_a_step_that_is_not_finite() -> None:
    found, wanted = train("fused AdamW", 128, infinite=2), train("fused AdamW", None, infinite=2)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert found[1][0]["step"] == 3
