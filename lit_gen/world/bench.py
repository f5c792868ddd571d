"""How fast the world is: `python -m lit_gen bench world`."""

from __future__ import annotations

import argparse
import time

import torch

from lit_gen.world.grammar import captions
from lit_gen.world.render import render
from lit_gen.world.sampling import sample


def main(argv: list[str] | None = None) -> int:
    """Print images and captions per second on the CPU and, where there is one, on the GPU."""
    parser = argparse.ArgumentParser(prog="python -m lit_gen bench world", description="Measure the world's speed.")
    parser.add_argument("--recipes", nargs="+", default=["photo", "base", "styled"], help="recipes to render")
    parser.add_argument("--size", type=int, default=64, help="pixels of a picture")
    parser.add_argument("--supersample", type=int, default=2, help="rays per pixel along each axis")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--count", type=int, help="images per measurement (default 256 on a CPU, 16384 on a GPU)")
    parser.add_argument("--devices", nargs="+", help="devices (default: the CPU, and the GPU if there is one)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    devices = options.devices or ["cpu"] + ["cuda"] * torch.cuda.is_available()
    print(f"{options.size} px, {options.supersample}x supersampling, {options.threads} CPU threads")
    print(f"{'recipe':<10}{'device':<8}{'sampled/s':>12}{'rendered/s':>12}{'CPU ms/image':>14}{'captions/s':>12}")
    for recipe in options.recipes:
        for device in devices:
            count = options.count or (256 if device == "cpu" else 16384)
            index = torch.arange(count, device=device)
            render(sample(recipe, "train", 1, index), options.size, options.supersample)  # warm up
            drawn, scenes, _ = _timed(device, lambda r=recipe, i=index: sample(r, "train", 0, i))
            rendered, _, busy = _timed(device, lambda s=scenes: render(s, options.size, options.supersample))
            told, _, _ = _timed("cpu", lambda s=scenes: captions(s[:256].to("cpu")))
            speeds = f"{count / drawn:>12.0f}{count / rendered:>12.0f}{1e3 * busy / count:>14.2f}"
            print(f"{recipe:<10}{device:<8}{speeds}{min(count, 256) / told:>12.0f}")
    return 0


def _timed(device: str, work):  # noqa: ANN001, ANN202
    """Seconds on the clock, the work's result, and seconds of CPU time."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    start, busy = time.perf_counter(), time.process_time()
    result = work()
    wait()
    return time.perf_counter() - start, result, time.process_time() - busy
