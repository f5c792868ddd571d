"""Channels last throughout a network, as the convolutions of GPUs prefer it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _ChannelsLast(torch.autograd.Function):
    """The same numbers with channels last in memory, and so their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)


def keep_channels_last(network: nn.Module) -> None:
    """Keep the weights of a network's 2D convolutions channels last, and what goes through them, both ways.

    Weights alone are not enough: group norms and the ends of attention blocks give their results channels first, in
    the backward pass too, and each convolution then copies what it gets. Asked for beforehand, the compiler has the
    operation before the convolution write its result that way.
    """
    network.to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and _before not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_before)
            module.register_forward_hook(_after)


def _before(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_ChannelsLast.apply(given[0]), *given[1:])


def _after(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
    return _ChannelsLast.apply(output)
