"""How ZeRO-2 averages gradients here: the same sums as DeepSpeed's, with less work around them.

DeepSpeed's own code copies each gradient into a bucket, casts the bucket, waits for the device after each backward pass
and then walks all parameters in Python several times, all of which costs a tenth of a step and more where steps are
short. Here buckets are runs of the flat vector that DeepSpeed keeps the weights in, each reduced to the process that
owns that run; and weights are sent while those after them are stepped.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_gen.scale import peers
from lit_gen.scale.buckets import Bucket, Buckets, average, cut, default_size
from lit_gen.scale.layout import order_in_memory
from lit_gen.scale.pieces import step_in_pieces

ROOMS = 2  # for buckets: one is filled while the one before is sent
PIECES = 8  # of a process's weights; each costs the host a step and a broadcast
ALIGNED = 128  # numbers; where a piece begins, as kernels like it


class Reduction(Buckets):
    """Takes the place of the reduction of DeepSpeed's optimizer for ZeRO-2, of float32 weights on the device.

    Values differ from DeepSpeed's in one thing: all gradients are sent in `dtype`, there only those of some layers.

    Args:
        optimizer: `DeepSpeedZeroOptimizer` of stage 2, nothing of which is offloaded.
        dtype: what gradients are sent in; they are kept in float32.
        size: numbers in a bucket; by default `default_size`.
    """

    terms = 1  # gradients, as they are added up, are that many times the mean over the processes

    def __init__(self, optimizer: Any, dtype: torch.dtype, size: int | None) -> None:
        self.optimizer = optimizer
        device = optimizer.bit16_groups_flat[0].device
        pairs = zip(optimizer.round_robin_bit16_offsets, optimizer.round_robin_bit16_groups, strict=True)
        vectors = [list(zip(starts, weights, strict=True)) for starts, weights in pairs]
        buckets = list(cut(vectors, size or default_size(weight for vector in vectors for _, weight in vector)))
        longest = max(bucket.end - bucket.start for bucket in buckets)
        rooms = [self._make_room(longest, dtype, device) for _ in range(ROOMS)]
        for bucket, room in zip(buckets, itertools.cycle(rooms), strict=False):
            bucket.lie_in(room[: bucket.end - bucket.start])
        self.parts = [torch.zeros(int(n), device=device) for n in optimizer.partition_size]
        self.fresh = True  # whether nothing has been added up since the last step
        for hook in optimizer._grad_acc_hooks:  # which look through all weights in each backward pass
            hook.remove()
        super().__init__(buckets, device)
        self._take_over()

    @abstractmethod
    def _make_room(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What a bucket is sent in."""

    @abstractmethod
    def _gather(self, group: int, low: int, high: int) -> None:
        """Numbers low to high of every process's own weights, from each to all others."""

    def _take_over(self) -> None:
        optimizer = self.optimizer
        optimizer._grad_acc_hooks = self.hooks  # it removes them in the end
        optimizer.independent_gradient_partition_epilogue = self.finish
        # The weights are views of the flat vector, into which all-gather writes.
        optimizer._update_model_bit16_weights = lambda group: None
        # Not a float32 copy of float32 weights, which would have to be copied back after each step.
        for group, owned in enumerate(optimizer.parallel_partitioned_bit16_groups):
            rank = dist.get_rank(optimizer.real_dp_process_group[group])
            optimizer.single_partition_of_fp32_groups[group].data = owned[rank].data
        for weight in itertools.chain.from_iterable(optimizer.bit16_groups):
            weight._hp_mapping = None  # to that copy, which it would keep alive, and from another of the weight
        optimizer.step = self.step

    def _own(self, bucket: Bucket) -> tuple[slice, Tensor]:
        """Where this process's own numbers are in a bucket, and what they are added up in."""
        part, processes = self.parts[bucket.vector], self.optimizer.real_dp_process_group[bucket.vector]
        begin = dist.get_rank(processes) * part.numel()
        low = max(bucket.start, begin)
        high = max(low, min(bucket.end, begin + part.numel()))
        return slice(low - bucket.start, high - bucket.start), part[low - begin : high - begin]

    def _add(self, numbers: Tensor, own: Tensor) -> None:
        own.copy_(numbers) if self.fresh else own.add_(numbers)

    def finish(self) -> bool:
        """After a backward pass; see Buckets.finish."""
        there = super().finish()
        self.fresh = self.fresh and not there
        self.optimizer._epilogue_ran_this_backward = True
        return there

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip, step and gather the weights; gradients that are not finite change nothing, as with DeepSpeed."""
        optimizer, inner, own = self.optimizer, self.optimizer.optimizer, self.optimizer.single_partition_of_fp32_groups
        square = torch.stack([torch.linalg.vector_norm(part) for part in self.parts]).square().sum()
        dist.all_reduce(square, group=optimizer.dp_process_group)
        optimizer._global_grad_norm = norm = square.sqrt() / self.terms
        scale = ((norm + 1e-6) / optimizer.clip_grad).clamp(min=1) if optimizer.clip_grad > 0 else torch.ones_like(norm)
        scale = scale * self.terms
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
        self.fresh = True

    def _step_and_gather(self) -> None:
        """A piece of the weights goes to the other processes while the next is stepped."""
        size = -(-max(len(part) for part in self.parts) // (PIECES * ALIGNED)) * ALIGNED
        for low, high in step_in_pieces(self.optimizer.optimizer, size):
            with self.aside():
                for group in range(len(self.parts)):
                    self._gather(group, low, high)
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.side)


class ReductionByCollectives(Reduction):
    """Each run of a bucket is reduced to the process that owns it, and each process broadcasts its weights."""

    def _make_room(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)

    def reduce(self, bucket: Bucket) -> None:
        processes, size = self.optimizer.real_dp_process_group[bucket.vector], self.parts[bucket.vector].numel()
        for owner in range(bucket.start // size, (bucket.end - 1) // size + 1):
            low, high = max(bucket.start, owner * size), min(bucket.end, (owner + 1) * size)
            average(bucket.numbers[low - bucket.start : high - bucket.start], processes, owner)
        place, own = self._own(bucket)
        self._add(bucket.numbers[place], own)

    def _gather(self, group: int, low: int, high: int) -> None:
        processes = self.optimizer.real_dp_process_group[group]
        owned = self.optimizer.parallel_partitioned_bit16_groups[group]
        if low >= len(owned[0]):
            return
        # All at once, so that each direction is used; NCCL's own all-gather would need them to lie side by side, and
        # takes longer where they first have to be copied there.
        at_once = dist._coalescing_manager(processes, self.device) if self.side is not None else nullcontext()
        with at_once:
            for rank, weights in enumerate(owned):
                source = dist.get_global_rank(processes, rank)
                dist.broadcast(weights[low:high], source, group=processes, async_op=self.side is not None)


class ReductionByCopies(Reduction):
    """Each process reads what it owns of the others' buckets, and then their weights."""

    def __init__(self, optimizer: Any, dtype: torch.dtype, size: int | None) -> None:
        self.rooms: dict[int, peers.Shared] = {}  # by where they are
        self.weights = [_share_weights(optimizer, group) for group in range(len(optimizer.bit16_groups_flat))]
        super().__init__(optimizer, dtype, size)
        self.terms = dist.get_world_size()
        longest = max(len(bucket.numbers) for bucket in self.buckets)
        self.read = torch.empty(longest, dtype=dtype, device=self.device)  # from another process

    def _make_room(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        room = peers.share(numel, dtype, device, dist.group.WORLD)
        self.rooms[room.own.data_ptr()] = room
        return room.own.zero_()

    def reduce(self, bucket: Bucket) -> None:
        room = self.rooms[bucket.numbers.data_ptr()]
        room.barrier()  # all have filled theirs
        place, own = self._own(bucket)
        self._add(bucket.numbers[place], own)
        for other in room.others.values():
            own.add_(self.read[: len(own)].copy_(other[place]))
        room.barrier()  # all have read: another bucket may be filled in

    def _gather(self, group: int, low: int, high: int) -> None:
        weights, part = self.weights[group], len(self.parts[group])
        weights.barrier()
        for rank, other in weights.others.items():
            place = slice(rank * part + low, min(rank * part + high, (rank + 1) * part))
            weights.own[place].copy_(other[place])

    def _step_and_gather(self) -> None:
        super()._step_and_gather()
        for weights in self.weights:
            weights.barrier()  # all have read: weights may change


def _share_weights(optimizer: Any, group: int) -> peers.Shared:
    """Have a flat vector of weights lie where the other processes read it."""
    flat = optimizer.bit16_groups_flat[group]
    shared = peers.share(flat.numel(), flat.dtype, flat.device, dist.group.WORLD)
    optimizer.bit16_groups_flat[group] = shared.own.copy_(flat)
    optimizer.parallel_partitioned_bit16_groups[group] = optimizer.get_data_parallel_partitions(shared.own, group)
    starts = optimizer.round_robin_bit16_offsets[group]
    for weight, start in zip(optimizer.round_robin_bit16_groups[group], starts, strict=True):
        weight.data = shared.own.narrow(0, start, weight.numel()).as_strided(weight.shape, weight.stride())
    return shared


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
