"""How ZeRO-2 averages gradients here: the same sums as DeepSpeed's, with less work around them.

DeepSpeed's own code copies each gradient into a bucket, casts the bucket, waits for the device after each backward pass
and then walks all parameters in Python several times, all of which costs a tenth of a step and more where steps are
short. Here buckets are runs of the flat vector that DeepSpeed keeps the weights in, filled by one kernel in the
precision they are sent in, and summed into the process that owns that run while the backward pass goes on; nothing
waits for the device. Weights are sent while those after them are stepped. Weights in channels last stay so: they lie in
the flat vector as they lie in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_gen.scale.pieces import step_in_pieces

SLOTS = 2  # buckets that can be on their way at once


@dataclass
class Bucket:
    """Parameters that lie one after another in the flat vector of a group, from `start` to `end`."""

    group: int
    start: int
    end: int
    weights: list[nn.Parameter]
    starts: list[int]  # of each weight
    views: list[Tensor] = field(default_factory=list)  # of its slot, one per weight, shaped and laid out as it
    gaps: list[Tensor] = field(default_factory=list)  # of its slot, between weights
    arrived: set[int] = field(default_factory=set)  # positions in `weights`


class Reduction:
    """Takes the place of the reduction of DeepSpeed's optimizer for ZeRO-2, of float32 weights on the device.

    Values differ from DeepSpeed's in one thing: all gradients are sent in `dtype`, there only those of some layers.

    Args:
        optimizer: `DeepSpeedZeroOptimizer` of stage 2, nothing of which is offloaded.
        dtype: what gradients are sent in; they are kept in float32.
        size: numbers in a bucket, and in a piece of the weights.
    """

    def __init__(self, optimizer: Any, dtype: torch.dtype, size: int) -> None:
        self.optimizer, self.size = optimizer, size
        self.device = optimizer.bit16_groups_flat[0].device
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.producers: set[Any] = set()  # streams that gradients of this backward pass were written on
        self.free: list[Any] = [None] * SLOTS  # events: what was in the slot has been sent
        self.parts = [torch.zeros(int(n), device=self.device) for n in optimizer.partition_size]
        self.buckets = list(self._cut(size))
        self.place = {id(w): (b, i) for b, bucket in enumerate(self.buckets) for i, w in enumerate(bucket.weights)}
        largest = max(b.end - b.start for b in self.buckets)
        self.slots = [torch.zeros(largest, dtype=dtype, device=self.device) for _ in range(SLOTS)]
        for i, bucket in enumerate(self.buckets):
            self._lay_out(bucket, self.slots[i % SLOTS])
        self.sent = 0  # buckets of this backward pass
        self.started = False  # whether a gradient has arrived since the last epilogue
        self.fresh = True  # whether nothing has been added up since the last step
        self._take_over()

    def _cut(self, size: int) -> Iterator[Bucket]:
        """Buckets of whole parameters from the last to the first, as a backward pass reaches them."""
        for group, weights in reversed(list(enumerate(self.optimizer.round_robin_bit16_groups))):
            starts = self.optimizer.round_robin_bit16_offsets[group]
            end, members = starts[-1] + weights[-1].numel(), []
            for start, weight in reversed(list(zip(starts, weights, strict=True))):
                if members and end - start > size:
                    yield Bucket(group, members[0][0], end, [w for _, w in members], [s for s, _ in members])
                    end, members = members[0][0], []
                members.insert(0, (start, weight))
            yield Bucket(group, members[0][0], end, [w for _, w in members], [s for s, _ in members])

    @staticmethod
    def _lay_out(bucket: Bucket, slot: Tensor) -> None:
        at = 0
        for weight, start in zip(bucket.weights, bucket.starts, strict=True):
            run = slot[start - bucket.start :][: weight.numel()]
            bucket.views.append(run.as_strided(weight.shape, weight.stride()))
            bucket.gaps.append(slot[at : start - bucket.start])
            at = start - bucket.start + weight.numel()
        bucket.gaps = [gap for gap in [*bucket.gaps, slot[at : bucket.end - bucket.start]] if len(gap)]

    def _take_over(self) -> None:
        optimizer = self.optimizer
        optimizer.process_gradients = self.ready
        optimizer.independent_gradient_partition_epilogue = self.finish
        # The weights are views of the flat vector, into which all-gather writes.
        optimizer._update_model_bit16_weights = lambda group: None
        # Not a float32 copy of float32 weights, which would have to be copied back after each step.
        for group, owned in enumerate(optimizer.parallel_partitioned_bit16_groups):
            rank = dist.get_rank(optimizer.real_dp_process_group[group])
            optimizer.single_partition_of_fp32_groups[group].data = owned[rank].data
        optimizer.step = self.step

    # -- in the backward pass -----------------------------------------------------------------------------------------

    def ready(self, weight: nn.Parameter, group: int) -> None:
        """A gradient is there; buckets that are whole are sent, in the same order on every process."""
        index, position = self.place[id(weight)]
        if index < self.sent:
            raise RuntimeError("a weight had two gradients in one backward pass; checkpointing must not be reentrant")
        bucket, self.started = self.buckets[index], True
        bucket.arrived.add(position)
        if self.side is not None:
            self.producers.add(torch.cuda.current_stream(self.device))
        while self.sent < len(self.buckets) and self._is_whole(self.buckets[self.sent]):
            self._send(self.buckets[self.sent], self.sent % SLOTS)
            self.sent += 1

    @staticmethod
    def _is_whole(bucket: Bucket) -> bool:
        return len(bucket.arrived) == len(bucket.weights)

    @torch.no_grad()
    def _send(self, bucket: Bucket, slot: int) -> None:
        """Sum a bucket over the processes, and add the part of it that is this process's own."""
        if self.side is not None:
            current = torch.cuda.current_stream(self.device)
            for stream in self.producers - {current}:
                current.wait_stream(stream)
                for weight in bucket.weights:
                    if weight.grad is not None:
                        weight.grad.record_stream(current)  # it was written on another
            if self.free[slot] is not None:
                current.wait_event(self.free[slot])
        pairs = list(zip(bucket.views, bucket.weights, strict=True))
        there = [(view, weight.grad) for view, weight in pairs if weight.grad is not None]
        if empty := [*bucket.gaps, *(view for view, weight in pairs if weight.grad is None)]:
            torch._foreach_zero_(empty)
        if there:
            torch._foreach_copy_(*(list(side) for side in zip(*there, strict=True)))
        for weight in bucket.weights:
            weight.grad = None
        bucket.arrived.clear()
        with self._aside():
            self._sum(bucket, self.slots[slot])
            if self.side is not None:
                self.free[slot] = torch.cuda.current_stream(self.device).record_event()

    def _sum(self, bucket: Bucket, slot: Tensor) -> None:
        processes = self.optimizer.real_dp_process_group[bucket.group]
        part, rank, count = self.parts[bucket.group], dist.get_rank(processes), dist.get_world_size(processes)
        mean = dist.get_backend(processes) == "nccl"  # which divides as it sums
        for owner in range(bucket.start // part.numel(), (bucket.end - 1) // part.numel() + 1):
            low, high = max(bucket.start, owner * part.numel()), min(bucket.end, (owner + 1) * part.numel())
            run = slot[low - bucket.start : high - bucket.start]
            op = dist.ReduceOp.AVG if mean else dist.ReduceOp.SUM
            dist.reduce(run, dist.get_global_rank(processes, owner), op, group=processes)
            if owner == rank:
                own = part[low - owner * part.numel() : high - owner * part.numel()]
                run = run if mean else run.div_(count)
                own.copy_(run) if self.fresh else own.add_(run)

    def _aside(self) -> AbstractContextManager:
        if self.side is None:
            return nullcontext()
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.side)

    # -- after it -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """After a backward pass: what had no gradient counts as zero. The device is not waited for."""
        if self.started:
            for i in range(self.sent, len(self.buckets)):
                self._send(self.buckets[i], i % SLOTS)
            self.sent, self.started, self.fresh = 0, False, False
            self.producers.clear()
            if self.side is not None:
                torch.cuda.current_stream(self.device).wait_stream(self.side)
        self.optimizer._epilogue_ran_this_backward = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip, step and gather the weights; gradients that are not finite change nothing, as with DeepSpeed."""
        optimizer, inner, own = self.optimizer, self.optimizer.optimizer, self.optimizer.single_partition_of_fp32_groups
        square = torch.stack([torch.linalg.vector_norm(part) for part in self.parts]).square().sum()
        dist.all_reduce(square, group=optimizer.dp_process_group)
        optimizer._global_grad_norm = norm = square.sqrt()
        scale = ((norm + 1e-6) / optimizer.clip_grad).clamp(min=1) if optimizer.clip_grad > 0 else torch.ones_like(norm)
        for weights, part in zip(own, self.parts, strict=True):
            weights.grad = part
        if all(group.get("fused") for group in inner.param_groups):  # it heeds both on the device
            inner.grad_scale, inner.found_inf = scale, norm.isfinite().logical_not().float()
            self._step_and_gather()
            del inner.grad_scale, inner.found_inf
        elif norm.isfinite():
            for part in self.parts:
                part.div_(scale)
            self._step_and_gather()
        for weights in own:
            weights.grad = None
        optimizer._lazy_init_hp_params_optimizer_state()
        self.fresh = True

    def _step_and_gather(self) -> None:
        """A piece of the weights goes to the other processes while the next is stepped."""
        for low, high in step_in_pieces(self.optimizer.optimizer, self.size):
            with self._aside():
                for group in range(len(self.parts)):
                    self._gather(group, low, high)
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.side)

    def _gather(self, group: int, low: int, high: int) -> None:
        """Numbers low to high of every process's own weights, from each to all others."""
        processes = self.optimizer.real_dp_process_group[group]
        owned = self.optimizer.parallel_partitioned_bit16_groups[group]
        if low >= len(owned[0]):
            return
        # All at once, so that each direction is used; NCCL's own all-gather would need them to lie side by side.
        at_once = dist._coalescing_manager(processes, self.device) if self.side is not None else nullcontext()
        with at_once:
            for rank, weights in enumerate(owned):
                source = dist.get_global_rank(processes, rank)
                dist.broadcast(weights[low:high], source, group=processes, async_op=self.side is not None)


# -- memory layout ----------------------------------------------------------------------------------------------------


def order_in_memory(weight: Tensor) -> tuple[int, ...]:
    """Its dimensions from the one with the longest stride to that with the shortest."""
    return tuple(sorted(range(weight.ndim), key=lambda d: (-weight.stride(d), -weight.shape[d], d)))


def in_order(values: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """Values [N] as they lie in memory, as the tensor of this shape whose dimensions lie there in this order."""
    return values.view([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


@contextmanager
def flattened_as_they_lie() -> Iterator[None]:
    """Within, DeepSpeed's optimizer for ZeRO-2 is built with weights whose dimensions keep their order in memory."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Optimizer

    flatten, view = Optimizer.flatten_dense_tensors_aligned, Optimizer._update_model_bit16_weights

    def flatten_as_they_lie(
        self: Any, weights: list[Any], alignment: int, use_cpu_data: bool = False, param_padding: Any = None
    ) -> Tensor:
        weights = [weight.cpu_data if use_cpu_data else weight for weight in weights]
        return flatten(self, [w.permute(order_in_memory(w)) for w in weights], alignment, False, param_padding)

    def view_as_they_lay(self: Any, group: int) -> None:
        flat, starts = self.bit16_groups_flat[group], self.round_robin_bit16_offsets[group]
        metas = self.round_robin_bit16_meta[group]
        for weight, meta, start in zip(self.round_robin_bit16_groups[group], metas, starts, strict=True):
            weight.data = flat.narrow(0, start, meta.numel()).as_strided(meta.shape, meta.stride()).data

    Optimizer.flatten_dense_tensors_aligned, Optimizer._update_model_bit16_weights = (
        flatten_as_they_lie,
        view_as_they_lay,
    )
    try:
        yield
    finally:
        Optimizer.flatten_dense_tensors_aligned, Optimizer._update_model_bit16_weights = flatten, view
