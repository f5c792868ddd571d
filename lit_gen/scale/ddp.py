"""Distributed data parallelism with fewer kernels: what torch's own does, for networks of many small weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lit_gen.errors import at_least
from lit_gen.scale.buckets import Bucket, Buckets, average, cut

ALIGNED = 4  # numbers; where a weight begins in its vector, as kernels that read four at a time want it


class DDP(DDPStrategy):
    """Every process holds everything; gradients are averaged while the backward pass goes on.

    torch's DistributedDataParallel copies each gradient into its bucket by a kernel of its own, on the stream of the
    backward pass. Here one kernel copies a bucket's, beside it. Every trained weight must have a gradient in every
    step, as there.

    Args:
        bucket: gradients are sent this many numbers at a time.
    """

    def __init__(self, bucket: int = 25_000_000) -> None:
        at_least(1, bucket=bucket)
        super().__init__()
        self.bucket = bucket
        self.averaging: Averaging | None = None

    def _setup_model(self, model: nn.Module) -> nn.Module:
        _sync_module_states(model)
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.averaging = Averaging(trained, self.bucket)
        return model

    def _register_ddp_hooks(self) -> None: ...

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within, gradients are added up on each process alone."""
        if self.averaging is None:
            yield
            return
        self.averaging.paused = True
        try:
            yield
        finally:
            self.averaging.paused = False

    def teardown(self) -> None:
        if self.averaging is not None:
            self.averaging.remove()
            self.averaging = None
        super().teardown()


class Averaging(Buckets):
    """Has weights' gradients be means over all processes after each backward pass, as views of the buckets.

    Args:
        weights: by name, on their device.
        size: numbers in a bucket.

    Raises:
        RuntimeError: in a backward pass that gave some weight no gradient.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], size: int) -> None:
        self.names = {id(weight): name for name, weight in weights.items()}
        self.paused = False
        self.works: list[Any] = []  # what is on its way
        kinds: dict[torch.dtype, list[tuple[int, nn.Parameter]]] = {}
        for weight in weights.values():
            runs = kinds.setdefault(weight.dtype, [])
            end = runs[-1][0] + runs[-1][1].numel() if runs else 0
            runs.append((-(-end // ALIGNED) * ALIGNED, weight))
        buckets = list(cut(list(kinds.values()), size))
        for bucket in buckets:
            like = bucket.weights[0]
            bucket.lie_in(torch.zeros(bucket.end - bucket.start, dtype=like.dtype, device=like.device))
        device = next(iter(weights.values())).device if weights else torch.device("cpu")
        super().__init__(buckets, device)

    def ready(self, weight: nn.Parameter) -> None:
        if self.paused:
            return
        if not self.started:
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)
        super().ready(weight)

    def reduce(self, bucket: Bucket) -> None:
        if without := [self.names[id(w)] for w in bucket.weights if w.grad is None]:
            raise RuntimeError(
                f"{len(without)} of {len(bucket.weights)} weights had no gradient, e.g. {without[0]}: under DDP every "
                "trained weight must take part in every step; freeze those that do not, or use "
                "--trainer.strategy ddp_find_unused_parameters_true"
            )
        self.works.append(average(bucket.numbers, torch.distributed.group.WORLD, wait=False))

    def finish(self) -> bool:
        there = super().finish()
        if there:
            for work in self.works:
                work.wait()
            self.works.clear()
            for bucket in self.buckets:
                for weight, view in zip(bucket.weights, bucket.views, strict=True):
                    weight.grad = view
        return there

    def remove(self) -> None:
        """Leave the weights alone from now on."""
        for hook in self.hooks:
            hook.remove()
