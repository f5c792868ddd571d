"""`export` of checkpoints that several processes saved in parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

from lit_gen.weights import read_checkpoint


@pytest.mark.parametrize("case", ["zero1", "zero2", "zero3"])
def test_averaged_weights_and_one_file(
    case: str, trainings: tuple[Path, dict], lit_gen: Callable[..., int], toy: Path
) -> None:
    folder, results = trainings
    source = str(folder / case / "checkpoints" / "last.ckpt")
    assert lit_gen("export", "-c", "toy.yaml", "--ckpt_path", source, "--out", "out") == 0
    weights, trained = load_file("out/weights.safetensors"), results[case][0]["weights"]
    assert weights.keys() == trained.keys()  # what training ended with is the average
    assert all(torch.equal(weights[name], w) for name, w in trained.items())
    assert lit_gen("export", "-c", "toy.yaml", "--ckpt_path", source, "--out", "out", "--format", "checkpoint") == 0
    one, parts = read_checkpoint("out/checkpoint.ckpt"), read_checkpoint(source)
    assert one.keys() == parts.keys() and one["global_step"] == 4
    assert all(torch.equal(one["state_dict"][n], w) for n, w in parts["state_dict"].items())
