"""Where the time of a training step goes: kernels by their kind, what communication hides behind, and idle time."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lit_gen.bench import TRACED

STEPS = TRACED - 1  # are looked at; the first one only fills the profiler's own buffers
LONGEST = 12  # kernels that are told by name

# The first kind whose pattern is in a kernel's name is the kernel's; names of operations on CPUs fit as well.
KINDS = {
    "communication": r"nccl|allreduce|all_reduce|reduce_scatter|all_?gather|gloo|c10d::",
    "copies": r"memcpy|memset|triton_\w*?fused_+(?:to_copy|clone|copy)_\d+$|::_to_copy|::copy_|::contiguous|::clone",
    "fused by the compiler": r"triton",  # before those below: it names what it has fused
    "attention": r"flash|fmha|attention|sdpa",
    "convolutions": r"conv|dgrad|wgrad|fprop|winograd",
    "matrix products": r"gemm|gemv|cutlass|cublas|nvjet|matmul|(?:^|::|_)(?:add)?b?mm\b|linear",
    "optimizer": r"multi_tensor|adam|foreach",
}


class Kernel(NamedTuple):
    """Something the device did, in microseconds."""

    name: str
    start: float
    end: float


class Trace:
    """Records the TRACED steps after it was made; `step()` is called after each, then `found` is there.

    Args:
        device: whose kernels are told: a GPU's, or on a CPU the time each operation takes for itself.
        path: where the trace goes that Perfetto and chrome://tracing show.
    """

    def __init__(self, device: torch.device, path: Path) -> None:
        self.device, self.path = device, path
        self.found: dict[str, Any] | None = None
        self._steps = 0
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        schedule = torch.profiler.schedule(wait=0, warmup=1, active=STEPS, repeat=1)
        self._profile = profile(activities=activities, schedule=schedule, on_trace_ready=self._read)
        self._profile.start()

    def step(self) -> None:
        self._steps += 1
        if self.device.type == "cuda" and self._steps in (1, TRACED):  # what is recorded is whole steps
            torch.cuda.synchronize()
        self._profile.step()
        if self._steps == TRACED:
            self._profile.stop()

    def _read(self, recorded: profile) -> None:
        if self.device.type == "cuda":
            events = [e for e in recorded.events() if e.device_type == DeviceType.CUDA and not _is_note(e)]
            self.found = told([Kernel(e.name, e.time_range.start, e.time_range.end) for e in events])
        else:
            spent = [(e.key, e.self_cpu_time_total, e.count) for e in recorded.key_averages() if not _is_note(e)]
            self.found = {"steps": STEPS, **_sums(spent)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.path))


def _is_note(event: Any) -> bool:
    """Whether an event is a label over others, such as the profiler's own of a step."""
    name = getattr(event, "name", None) or event.key
    return bool(getattr(event, "is_user_annotation", False)) or name.startswith(("ProfilerStep", "Optimizer.", "##"))


def kind_of(name: str) -> str:
    """One of KINDS by the name of a kernel or operation, else "other"."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def told(kernels: list[Kernel]) -> dict[str, Any]:
    """Milliseconds a step by kind, what of communication was not hidden, and how long nothing ran, as plain data."""
    if not kernels:
        return {"steps": STEPS, "kinds": {}, "longest": []}
    everything = _union(kernels)
    other = _union(k for k in kernels if kind_of(k.name) != "communication")
    span = everything[-1][1] - everything[0][0]
    busy, busy_otherwise = _length(everything), _length(other)
    return {
        "steps": STEPS,
        "ms": span / STEPS / 1000,
        "idle_ms": (span - busy) / STEPS / 1000,
        "exposed_communication_ms": (busy - busy_otherwise) / STEPS / 1000,
        **_sums((k.name, k.end - k.start, 1) for k in kernels),
    }


def _sums(spent: Iterable[tuple[str, float, int]]) -> dict[str, Any]:
    """(name, microseconds, how often) -> milliseconds and launches of a step, by kind and of the longest names."""
    kinds, names = defaultdict(lambda: [0.0, 0]), defaultdict(lambda: [0.0, 0])
    for name, microseconds, count in spent:
        for sums in (kinds[kind_of(name)], names[name]):
            sums[0] += microseconds / STEPS / 1000
            sums[1] += count
    ordered = sorted(kinds.items(), key=lambda row: -row[1][0])
    longest = sorted(names.items(), key=lambda row: -row[1][0])[:LONGEST]
    return {
        "kinds": {kind: {"ms": ms, "launches": count / STEPS} for kind, (ms, count) in ordered},
        "longest": [{"name": name, "ms": ms, "launches": count / STEPS} for name, (ms, count) in longest],
    }


def _union(kernels: Iterable[Kernel]) -> list[tuple[float, float]]:
    """The times in which at least one of them ran, in order."""
    parts: list[list[float]] = []
    for start, end in sorted((k.start, k.end) for k in kernels):
        if parts and start <= parts[-1][1]:
            parts[-1][1] = max(parts[-1][1], end)
        else:
            parts.append([start, end])
    return [(start, end) for start, end in parts]


def _length(parts: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in parts)
