"""Gradients in buckets, which are reduced over the processes while the backward pass goes on.

A bucket is a run of a long vector, in which weights lie one after another. It is sent once all its gradients are there,
beside the backward pass and not in its way; nothing waits for the device. Where gradients are copied for it, one kernel
does so. Weights in channels last lie in the vector as they lie in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_gen.scale.layout import has_no_gaps, lie_alike

LEAST = 25_000_000  # numbers in a bucket where no other size is asked for


@dataclass
class Bucket:
    """Weights that lie one after another in a vector, from `start` to `end`."""

    vector: int
    start: int
    end: int
    weights: list[nn.Parameter]
    starts: list[int]  # of each weight
    numbers: Tensor = field(init=False)  # what is sent, [end - start]
    runs: list[Tensor] = field(default_factory=list)  # of it, one per weight
    views: list[Tensor] = field(default_factory=list)  # the same, shaped and laid out as the weight
    gaps: list[Tensor] = field(default_factory=list)  # of it, between weights
    arrived: set[int] = field(default_factory=set)  # positions in `weights`

    @property
    def is_whole(self) -> bool:
        return len(self.arrived) == len(self.weights)

    def lie_in(self, numbers: Tensor) -> None:
        """Have `numbers`, of this length, be what is sent."""
        self.numbers, at = numbers, 0
        for weight, start in zip(self.weights, self.starts, strict=True):
            run = numbers[start - self.start :][: weight.numel()]
            self.runs.append(run)
            view = run.as_strided(weight.shape, weight.stride()) if has_no_gaps(weight) else run.view_as(weight)
            self.views.append(view)
            self.gaps.append(numbers[at : start - self.start])
            at = start - self.start + weight.numel()
        self.gaps = [gap for gap in [*self.gaps, numbers[at:]] if len(gap)]

    def fill(self) -> None:
        """Take the gradients, and zeros for those that there are not."""
        pairs = [
            # In a row where they can be: one kernel copies only what has the same strides, also along a side of one.
            (run, g.as_strided(run.shape, (1,))) if g is not None and lie_alike(view, g) else (view, g)
            for run, view, g in zip(self.runs, self.views, [weight.grad for weight in self.weights], strict=True)
        ]
        if empty := [*self.gaps, *(view for view, gradient in pairs if gradient is None)]:
            torch._foreach_zero_(empty)
        there = [(v, g) for v, g in pairs if g is not None and g.data_ptr() != v.data_ptr()]
        if there:
            torch._foreach_copy_(*(list(side) for side in zip(*there, strict=True)))


def cut(vectors: Sequence[Sequence[tuple[int, nn.Parameter]]], size: int) -> Iterator[Bucket]:
    """Buckets of whole weights, of up to `size` numbers if these are no larger, from the last to the first.

    Args:
        vectors: the weights of each, and where they start, in order.
        size: numbers in a bucket.
    """
    for vector, runs in reversed(list(enumerate(vectors))):
        members: list[tuple[int, nn.Parameter]] = []
        end = runs[-1][0] + runs[-1][1].numel()
        for start, weight in reversed(runs):
            if members and end - start > size:
                yield Bucket(vector, members[0][0], end, [w for _, w in members], [s for s, _ in members])
                end, members = members[0][0], []
            members.insert(0, (start, weight))
        yield Bucket(vector, members[0][0], end, [w for _, w in members], [s for s, _ in members])


def default_size(weights: Iterable[nn.Parameter]) -> int:
    """Numbers in a bucket: an eighth of all, and no less than `LEAST`.

    Each holds the backward pass up a little, so that few are faster; but the last is sent when the pass is over.
    docs/results/speed.md has what smaller ones cost a network of 860 million.
    """
    return max(LEAST, -(-sum(weight.numel() for weight in weights) // 8))


class Buckets(ABC):
    """Reduces gradients as they arrive; a subclass says what becomes of a bucket.

    Args:
        buckets: of all weights.
        device: of the weights.
    """

    takes = True  # whether gradients are copied into the buckets as these are sent, and freed

    def __init__(self, buckets: list[Bucket], device: torch.device) -> None:
        self.buckets, self.device = buckets, device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.filling = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.producers: set[Any] = set()  # streams that gradients are written on, as seen in the first pass
        self.sent = 0  # buckets of this backward pass
        self.started = False  # whether a gradient has arrived since the last pass
        self._taken: tuple[Any, list[Tensor | None]] | None = None  # the bucket before's gradients, and from when on
        self._emptied: dict[int, Any] = {}  # by where a bucket's numbers are, from when on they may change
        self._whole: list[int] = []  # buckets of the first pass, as they became whole
        self._ordered = False
        self._find_places()
        weights = [weight for bucket in buckets for weight in bucket.weights]
        self.hooks = [weight.register_post_accumulate_grad_hook(self.ready) for weight in weights]

    @abstractmethod
    def reduce(self, bucket: Bucket) -> None:
        """Send a bucket. On GPUs the current stream is the side stream, for which `finish` waits."""

    def _take(self, bucket: Bucket) -> None:
        """Fill a bucket with its gradients, which are the weights' no longer.

        On a stream of its own, so that the backward pass waits for no other process when it gets their memory back,
        which is with the next bucket: to free it at once, `Tensor.record_stream` would need an event for each.
        """
        self._give_back()
        if self.filling is None:
            bucket.fill()
        else:
            for stream in self.producing():
                self.filling.wait_stream(stream)
            if (emptied := self._emptied.get(bucket.numbers.data_ptr())) is not None:
                self.filling.wait_event(emptied)
            with torch.cuda.stream(self.filling):
                bucket.fill()
            self._taken = self.filling.record_event(), [weight.grad for weight in bucket.weights]
            self.side.wait_event(self._taken[0])
        for weight in bucket.weights:
            weight.grad = None

    def _give_back(self) -> None:
        if self._taken is not None:
            for stream in self.producing():
                stream.wait_event(self._taken[0])
            self._taken = None

    def done(self) -> None:  # noqa: B027
        """Follow the last bucket of a backward pass, on the side stream."""

    def _find_places(self) -> None:
        self.place = {id(w): (b, i) for b, bucket in enumerate(self.buckets) for i, w in enumerate(bucket.weights)}

    def ready(self, weight: nn.Parameter) -> None:
        """A gradient is there; buckets that are whole are sent, in the same order on every process."""
        index, position = self.place[id(weight)]
        if index < self.sent:
            raise RuntimeError("a weight had two gradients in one backward pass; checkpointing must not be reentrant")
        bucket, self.started = self.buckets[index], True
        bucket.arrived.add(position)
        if self.side is not None and not self._ordered:
            self.producers.add(torch.cuda.current_stream(self.device))
        if not bucket.is_whole:
            return
        if not self._ordered:
            self._whole.append(index)
        while self.sent < len(self.buckets) and self.buckets[self.sent].is_whole:
            self.send(self.buckets[self.sent])
            self.sent += 1

    @torch.no_grad()
    def send(self, bucket: Bucket) -> None:
        """Reduce a bucket that is whole, or of which no more will come, beside what the device does now."""
        if self.takes:
            self._take(bucket)
        with self.aside():
            self.reduce(bucket)
            if self.takes and self.side is not None:
                self._emptied[bucket.numbers.data_ptr()] = self.side.record_event()
        bucket.arrived.clear()

    def aside(self) -> AbstractContextManager:
        """Within, the device works on what follows when what came before is done, beside what comes after."""
        if self.side is None:
            return nullcontext()
        for stream in self.producing():
            self.side.wait_stream(stream)
        return torch.cuda.stream(self.side)

    def producing(self) -> set[Any]:
        """The device's streams that gradients are written on."""
        return self.producers | {torch.cuda.current_stream(self.device)}

    def finish(self) -> bool:
        """After a backward pass: send the rest, in which what had no gradient counts as zero.

        Returns:
            Whether there was one.
        """
        if not self.started:
            return False
        for bucket in self.buckets[self.sent :]:
            self.send(bucket)
        with self.aside():
            self.done()
        self.sent, self.started = 0, False
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
        self._give_back()
        if not self._ordered:
            self._take_order()
        return True

    def _take_order(self) -> None:
        """From now on send buckets in the order in which they became whole in the first process's first pass."""
        late = [i for i in range(len(self.buckets)) if i not in self._whole]
        order = torch.tensor([*self._whole, *late], device=self.device)
        dist.broadcast(order, 0)
        self.buckets = [self.buckets[i] for i in order.tolist()]
        self._ordered = True
        self._find_places()


def average(numbers: Tensor, group: Any, owner: int) -> None:
    """Have numbers, which change in place, become their mean over a group's processes on one, and spoil on the others.

    Args:
        numbers: of this process.
        group: of processes.
        owner: rank in the group of the one process.
    """
    dist.reduce(numbers, dist.get_global_rank(group, owner), _mean([numbers], group), group=group)


def average_all(runs: Sequence[Tensor], group: Any) -> Any:
    """Have vectors, which change in place, become their means over a group's processes, all by one kernel.

    Returns:
        What `wait` is to be called on before they are used.
    """
    op = _mean(runs, group)
    with dist._coalescing_manager(group, async_ops=True) as works:
        for numbers in runs:
            dist.all_reduce(numbers, op, group=group)
    return works


def _mean(runs: Sequence[Tensor], group: Any) -> Any:
    """The operation of which a mean comes; NCCL divides as it sums, for others vectors are divided before."""
    if dist.get_backend(group) == "nccl":
        return dist.ReduceOp.AVG
    torch._foreach_div_(list(runs), dist.get_world_size(group))
    return dist.ReduceOp.SUM
