"""Buckets hold gradients in the order their weights have in memory, whatever order the gradients have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_gen.scale.buckets import cut
from lit_gen.scale.layout import has_no_gaps, in_order, lie_alike, order_in_memory

WEIGHTS = {
    "plain": torch.zeros(4, 6),
    "turned": torch.zeros(6, 4).t(),
    "channels last": torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last),
    "a side of one": torch.zeros(4, 3, 1, 1).to(memory_format=torch.channels_last),
    "with gaps": torch.zeros(4, 12)[:, ::2],
}


def gradients(weight: Tensor) -> dict[str, Tensor]:
    values = torch.arange(1.0, weight.numel() + 1).view(weight.shape)
    turned = values.transpose(0, 1).contiguous().transpose(0, 1)
    return {"as the weight": torch.empty_like(weight).copy_(values), "plain": values, "turned": turned}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("lies", ["as the weight", "plain", "turned"])
def test_a_bucket_takes_each_gradient_in_its_weights_order(kind: str, lies: str) -> None:
    weight, other = nn.Parameter(WEIGHTS[kind]), nn.Parameter(torch.zeros(3))
    start, end = 4, 4 + weight.numel() + 5
    (bucket,) = cut([[(0, other), (start, weight), (end, other)]], 1000)
    bucket.lie_in(torch.full((bucket.end,), float("nan"), dtype=torch.bfloat16))
    weight.grad = gradients(weight)[lies]
    bucket.fill()
    run = bucket.numbers[start : start + weight.numel()].float()
    order = order_in_memory(weight) if has_no_gaps(weight) else range(weight.ndim)
    assert torch.equal(in_order(run, weight.shape, list(order)), weight.grad)
    assert bucket.numbers.count_nonzero() == weight.numel()  # the rest, which had no gradient or is a gap, is zero


def test_what_lies_alike_and_without_gaps() -> None:
    assert [name for name, weight in WEIGHTS.items() if not has_no_gaps(weight)] == ["with gaps"]
    one = WEIGHTS["a side of one"]
    assert lie_alike(one, torch.zeros(4, 3, 1, 1)) and one.stride() != torch.zeros(4, 3, 1, 1).stride()
    assert not lie_alike(WEIGHTS["turned"], torch.zeros(4, 6))
    assert not lie_alike(WEIGHTS["channels last"], torch.zeros(4, 3, 2, 2))
