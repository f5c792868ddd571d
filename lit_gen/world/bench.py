"""How fast the world is: `python -m lit_gen bench world`."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch

from lit_gen.world.grammar import captions
from lit_gen.world.render import render
from lit_gen.world.sampling import sample

_CAPTIONED = 2048


def main(argv: list[str] | None = None) -> int:
    """Print scenes sampled, images rendered and captions written per second, on the CPU and a GPU if there is one."""
    parser = argparse.ArgumentParser(prog="python -m lit_gen bench world", description="Measure the world's speed.")
    parser.add_argument("--recipes", nargs="+", default=["photo", "base", "styled"], help="recipes to render")
    parser.add_argument("--size", type=int, default=64, help="pixels of a picture")
    parser.add_argument("--supersample", type=int, default=2, help="rays per pixel along each axis")
    parser.add_argument("--processes", type=int, default=2, help="on the CPU, each of one thread, as in `data`")
    parser.add_argument("--count", type=int, help="images per process (default 256 on a CPU, 16384 on a GPU)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, of which the median is printed")
    parser.add_argument("--devices", nargs="+", help="devices (default: the CPU, and the GPU if there is one)")
    options = parser.parse_args(argv)
    devices = options.devices or ["cpu"] + ["cuda"] * torch.cuda.is_available()
    print(f"{options.size} px, {options.supersample}x supersampling, {options.processes} CPU processes")
    print(f"{'recipe':<10}{'device':<8}{'sampled/s':>12}{'rendered/s':>12}{'captions/s':>12}")
    for device in devices:
        processes = options.processes if device == "cpu" else 1
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            for recipe in options.recipes:
                count = options.count or (256 if device == "cpu" else 16384)
                job = (recipe, device, count, options.size, options.supersample, options.repeats)
                runs = list(pool.map(measure, [job] * processes))
                sampled, rendered, told = (sum(run[i] for run in runs) for i in range(3))
                print(f"{recipe:<10}{device:<8}{sampled:>12.0f}{rendered:>12.0f}{told:>12.0f}", flush=True)
    return 0


def measure(job: tuple[str, str, int, int, int, int]) -> tuple[float, float, float]:
    """Scenes, images and captions per second of one process of one thread: medians."""
    recipe, device, count, size, supersample, repeats = job
    torch.set_num_threads(1)
    index = torch.arange(count, device=device)
    scenes = sample(recipe, "train", 1, index)
    render(scenes, size, supersample)  # warm up
    told_of = sample(recipe, "train", 1, torch.arange(_CAPTIONED))
    sampled = _median(device, repeats, lambda: sample(recipe, "train", 0, index))
    rendered = _median(device, repeats, lambda: render(scenes, size, supersample))
    told = _median("cpu", repeats, lambda: captions(told_of))
    return count / sampled, count / rendered, len(told_of) / told


def _median(device: str, repeats: int, work: Callable[[], object]) -> float:
    """Seconds on the clock, without those in which Python looks for garbage, which is now and then and takes long."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    seconds = []
    gc.disable()  # as timeit does
    try:
        for _ in range(repeats):
            wait()
            start = time.perf_counter()
            work()
            wait()
            seconds.append(time.perf_counter() - start)
    finally:
        gc.enable()
    return sorted(seconds)[len(seconds) // 2]
