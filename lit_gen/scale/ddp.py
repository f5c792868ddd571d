"""Distributed data parallelism without copies of the gradients: what torch's own does, with less work around it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lit_gen.errors import at_least
from lit_gen.scale import peers
from lit_gen.scale.buckets import Bucket, Buckets, average_all, cut, default_size
from lit_gen.scale.layout import has_no_gaps, lie_alike

LARGE = 2**16  # numbers; from here on a gradient is sent from where it lies
ALIGNED = 4  # numbers; where a small one begins in what is sent, as kernels that read four at a time want it


class DDP(DDPStrategy):
    """Every process holds everything; gradients are averaged while the backward pass goes on.

    torch's DistributedDataParallel copies each gradient into its bucket by a kernel of its own, on the stream of the
    backward pass, and NCCL's kernels then take multiprocessors from that pass. Here GPUs of one node read each other's
    buckets by their copy engines. Where they cannot, gradients of 65,536 numbers and more are averaged where they lie.
    Every trained weight must have a gradient in every step, as there.

    Args:
        bucket: gradients are sent this many numbers at a time; by default an eighth of all, from 25 million on.
        exchange: how gradients go between processes: by "collectives" (NCCL), or by "copies" between the GPUs of one
            node, which leave the multiprocessors to the backward pass; "auto" takes these where they can be.
    """

    def __init__(self, bucket: int | None = None, exchange: peers.Exchange = "auto") -> None:
        if bucket is not None:
            at_least(1, bucket=bucket)
        super().__init__()
        self.bucket, self.exchange = bucket, exchange
        self.averaging: Averaging | None = None

    def _setup_model(self, model: nn.Module) -> nn.Module:
        _sync_module_states(model)
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        copies = peers.by_copies(self.exchange, self.root_device, self.num_nodes)
        self.averaging = (AveragingByCopies if copies else AveragingInPlace)(trained, self.bucket)
        return model

    def _register_ddp_hooks(self) -> None: ...

    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self.averaging is not None:
            share_buffers(self.lightning_module)

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


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Have every process hold what the first has in buffers, such as the statistics of batch norms, which each process
    gathers from its own samples and which only evaluation and checkpoints need to be the same."""
    for buffer in module.buffers():
        sent = buffer.contiguous()
        dist.broadcast(sent, 0)
        buffer.copy_(sent)


class Averaging(Buckets):
    """Has weights' gradients be means over all processes after each backward pass.

    Args:
        weights: by name, on their device.
        size: numbers in a bucket; by default `default_size`.

    Raises:
        RuntimeError: in a backward pass that gave some weight no gradient.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], size: int | None) -> None:
        self.names = {id(weight): name for name, weight in weights.items()}
        self.paused = False
        kinds: dict[torch.dtype, list[nn.Parameter]] = {}
        for weight in weights.values():
            kinds.setdefault(weight.dtype, []).append(weight)
        buckets = list(cut([_in_a_row(kind) for kind in kinds.values()], size or default_size(weights.values())))
        device = next(iter(weights.values())).device if weights else torch.device("cpu")
        super().__init__(buckets, device)

    def ready(self, weight: nn.Parameter) -> None:
        if self.paused:
            return
        if not self.started:
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)
        super().ready(weight)

    def send(self, bucket: Bucket) -> None:
        if without := [self.names[id(w)] for w in bucket.weights if w.grad is None]:
            raise RuntimeError(
                f"{len(without)} of {len(bucket.weights)} weights had no gradient, e.g. {without[0]}: under DDP every "
                "trained weight must take part in every step; freeze those that do not, or use "
                "--trainer.strategy ddp_find_unused_parameters_true"
            )
        super().send(bucket)

    def remove(self) -> None:
        """Leave the weights alone from now on."""
        for hook in self.hooks:
            hook.remove()


class AveragingInPlace(Averaging):
    """By collectives; large gradients are averaged where they lie."""

    takes = False

    def __init__(self, weights: Mapping[str, nn.Parameter], size: int | None) -> None:
        super().__init__(weights, size)
        self.works: list[Any] = []  # what is on its way
        self.parts = {id(bucket): _split(bucket) for bucket in self.buckets}

    def send(self, bucket: Bucket) -> None:
        for weight in bucket.weights:
            if weight.grad is not None and not lie_alike(weight.grad, weight):  # as it does on the other processes
                weight.grad = torch.empty_like(weight).copy_(weight.grad)
        super().send(bucket)

    def reduce(self, bucket: Bucket) -> None:
        staying, copied = self.parts[id(bucket)]
        numbers = [weight.grad.as_strided((weight.numel(),), (1,)) for weight in staying]
        if copied is not None:
            copied.fill()
            numbers.append(copied.numbers)
        self.works.append(average_all(numbers, torch.distributed.group.WORLD))

    def finish(self) -> bool:
        there = super().finish()
        if there:
            for work in self.works:
                work.wait()
            self.works.clear()
            for _, copied in self.parts.values():
                for weight, view in zip(copied.weights, copied.views, strict=True) if copied else ():
                    weight.grad = view
        return there


class AveragingByCopies(Averaging):
    """By copies between GPUs; each process sums its share of a bucket, which all others then read."""

    def __init__(self, weights: Mapping[str, nn.Parameter], size: int | None) -> None:
        super().__init__(weights, size)
        processes = torch.distributed.group.WORLD
        self.rank, self.count = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.shared: dict[int, peers.Shared] = {}
        for bucket in self.buckets:
            shared = peers.share(bucket.end - bucket.start, bucket.weights[0].dtype, self.device, processes)
            bucket.lie_in(shared.own)
            self.shared[id(bucket)] = shared
        self.read = {
            dtype: torch.empty(max(self._share(b, 0).stop for b in self.buckets), dtype=dtype, device=self.device)
            for dtype in {bucket.weights[0].dtype for bucket in self.buckets}
        }

    def _share(self, bucket: Bucket, rank: int) -> slice:
        """Of a bucket's numbers, those that a process sums."""
        length = bucket.end - bucket.start
        size = -(-length // (self.count * ALIGNED)) * ALIGNED
        return slice(min(rank * size, length), min((rank + 1) * size, length))

    def reduce(self, bucket: Bucket) -> None:
        shared, share = self.shared[id(bucket)], self._share(bucket, self.rank)
        shared.barrier()
        own = shared.own[share]
        for terms, other in enumerate(shared.others.values(), start=2):  # the mean of what has been read so far
            own.lerp_(self.read[own.dtype][: len(own)].copy_(other[share]), 1 / terms)
        shared.barrier()
        for rank, other in shared.others.items():
            place = self._share(bucket, rank)
            shared.own[place].copy_(other[place])

    def done(self) -> None:
        next(iter(self.shared.values())).barrier()  # all have read everything: gradients may change

    def finish(self) -> bool:
        there = super().finish()
        if there:
            for bucket in self.buckets:
                for weight, view in zip(bucket.weights, bucket.views, strict=True):
                    weight.grad = view
        return there


def _in_a_row(weights: Sequence[nn.Parameter]) -> list[tuple[int, nn.Parameter]]:
    """Weights and where each starts in a vector of them all."""
    ends = itertools.accumulate((-(-weight.numel() // ALIGNED) * ALIGNED for weight in weights), initial=0)
    return list(zip(ends, weights, strict=False))


def _split(bucket: Bucket) -> tuple[list[nn.Parameter], Bucket | None]:
    """The weights whose gradients are sent from where they lie, and the others with what theirs are sent in."""
    staying = [weight for weight in bucket.weights if weight.numel() >= LARGE and has_no_gaps(weight)]
    if len(staying) == len(bucket.weights):
        return staying, None
    stays = {id(weight) for weight in staying}
    (copied,) = cut([_in_a_row([weight for weight in bucket.weights if id(weight) not in stays])], sys.maxsize)
    copied.lie_in(torch.zeros(copied.end, dtype=copied.weights[0].dtype, device=copied.weights[0].device))
    return staying, copied
