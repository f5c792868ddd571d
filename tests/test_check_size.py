"""What `check` says about the size of a training is what the training then has."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_gen.check.size import activations, build, measure, outline
from lit_gen.methods.base import Method

Command = Callable[..., int]


def settings(stage: str, base: Path) -> dict:
    arguments = {"base": str(base), "stage": stage, "adapter": {"heads": 2}, "oracle": None}
    return {"class_path": "lit_gen.methods.stylecrafter.StyleCrafter", "init_args": arguments}


def batch(stage: str) -> dict:
    caption = ["a red cube", "a blue ball"]
    if stage == "adapter":
        return {"image": torch.zeros(2, 3, 64, 64), "style": torch.zeros(2, 3, 64, 64), "caption": caption}
    return {"video": torch.zeros(2, 3, 3, 64, 64), "caption": caption}


def kept(model: Method, batch: object) -> int:
    """Bytes that a real training step keeps for its backward pass, weights apart."""
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train().training_step(batch, 0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(t.untyped_storage().nbytes() for place, t in found.items() if place not in own)


@pytest.mark.parametrize("stage", ["adapter", "temporal"])
def test_an_outline_has_the_size_of_the_model(stage: str, tiny_base: Path) -> None:
    model: Method = build(Method, settings(stage, tiny_base))
    drawn = outline(settings(stage, tiny_base))
    assert {p.device.type for p in drawn.parameters()} == {"meta"}

    def shapes(module: torch.nn.Module) -> dict:
        return {n: (p.shape, p.dtype, p.requires_grad) for n, p in module.named_parameters()}

    assert shapes(drawn) == shapes(model)
    size = measure(drawn, 10, "32-true")
    assert size.trainable == sum(p.numel() for p in model.trainable_parameters())
    assert size.weights == 4 * (size.trainable + size.frozen)
    assert (size.gradients, size.optimizer, size.optimizers) == (4 * size.trainable, 8 * size.trainable, 1)  # Adam
    assert size.stored == sum(t.numel() * t.element_size() for t in model.state_dict().values())

    real = kept(model, batch(stage))
    found = activations(drawn, batch(stage), "32-true")
    assert found == pytest.approx(real, rel=0.05)
    if stage == "adapter":
        assert activations(drawn, batch(stage), "bf16-mixed") < 0.8 * found


@pytest.mark.parametrize("method", ["asd.Particles", "asd_edit.Edits"])
def test_activations_of_a_method_that_needs_no_data(method: str, tiny_base: Path) -> None:
    made = {"class_path": f"lit_gen.methods.{method}", "init_args": {"base": str(tiny_base)}}
    model = build(Method, made)
    batch = next(iter(model.train_dataloader()))
    assert activations(outline(made), batch, "32-true") == pytest.approx(kept(model, batch), rel=0.05)


def test_a_large_network_takes_no_memory() -> None:
    arguments = {"network": {"widths": [320, 640, 1280, 1280], "layers": 2, "heads": 8, "text_width": 768}}
    size = measure(
        outline({"class_path": "lit_gen.pretrain.finetune.Finetune", "init_args": arguments}), 10, "bf16-mixed"
    )
    assert (size.trainable, size.frozen) == (859_520_964, 0)  # the UNet of Stable Diffusion 1.5
    ordinary = torch.nn.Linear(4, 4).weight
    assert ordinary.device.type == "cpu" and bool(ordinary.any())  # outlines have ended


def test_disk_is_what_checkpoints_take(
    universe: Path, here: Path, lit_gen: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(universe, here, dirs_exist_ok=True)
    words = ["-c", "experiments/stylecrafter.yaml", "--stage", "adapter", "--smoke"]
    assert lit_gen("check", *words) == 0
    told = capsys.readouterr().out
    assert lit_gen("fit", *words) == 0
    real = Path("runs/smoke/stylecrafter/adapter/checkpoints/last.ckpt").stat().st_size
    number, unit = re.search(r"for 3 checkpoints of ([\d.]+) (kB|MB)", told).groups()
    assert float(number) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(real, rel=0.15)  # each tensor has a header
    assert "77,985 of 504,684 parameters" in capsys.readouterr().out and "0.1 M of 0.5 M parameters" in told
