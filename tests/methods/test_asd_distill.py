"""A one-step generator distilled from a tiny base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from data.shard_sets import image_set
from safetensors.torch import load_file

from lit_gen.callbacks.samples import save
from lit_gen.errors import UserError
from lit_gen.methods.asd import latent_shape
from lit_gen.methods.asd_distill import OneStep

Command = Callable[..., int]
SMALL = {"pictures": 2, "teacher_steps": 2}


def settings(base: Path, data: Path, **more: object) -> dict:
    return {
        "trainer": {"accelerator": "cpu", "max_steps": 3, "val_check_interval": 3, "check_val_every_n_epoch": None},
        "model": {
            "class_path": "lit_gen.methods.asd_distill.OneStep",
            "init_args": {"base": str(base), **SMALL, **more},
        },
        "data": {
            "class_path": "lit_gen.data.module.Images",
            "init_args": {"train": str(data), "val": str(data), "batch_size": 4, "size": 64},
        },
    }


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_trains_both_players_and_draws(lit_gen: Command, tiny_base: Path, here: Path, cached: bool) -> None:
    data = image_set(here / "set", (4, 4))
    file = settings(tiny_base, data)
    file["data"]["init_args"] |= {"cached": "float32"} if cached else {}
    (here / "x.yaml").write_text(yaml.safe_dump(file))
    if cached:
        assert lit_gen("cache", "-c", "x.yaml") == 0
    assert lit_gen("fit", "-c", "x.yaml", "--trainer.callbacks+", "lit_gen.callbacks.samples.Samples") == 0
    weights = torch.load("runs/x/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    start = OneStep(str(tiny_base), **SMALL)
    before = dict(start.named_parameters())
    moved = [name for name, weight in weights.items() if not torch.equal(weight, before[name])]
    assert any(name.startswith("generator.") for name in moved) and any("lora_B" in name for name in moved)
    assert all(name.startswith("generator.") or "lora" in name for name in weights)
    assert list(Path("runs/x/samples").glob("step-000003/pictures.png"))
    measured = json.loads(Path("runs/x/metrics.json").read_text())["validate"]
    assert "palette error" in measured and measured["variety"] > 0
    assert lit_gen("predict", "-c", "x.yaml", "--model.prompts", '["a red cube"]') == 0
    assert len(list(Path("runs/x/samples/predict").glob("00-*.png"))) == 2
    assert lit_gen("export", "-c", "x.yaml") == 0
    exported = load_file("runs/x/export/weights.safetensors")
    untrained = start.draw(["a red cube"])
    assert not start.load_state_dict(exported, strict=False).unexpected_keys
    drawn = start.draw(["a red cube"])
    save(here / "again", drawn[0])
    assert (here / "again.png").read_bytes() == Path("runs/x/samples/predict/00-00.png").read_bytes()
    assert not torch.equal(drawn, untrained)


def test_the_generator_starts_as_the_bases_estimate_and_draws_in_one_pass(tiny_base: Path) -> None:
    model = OneStep(str(tiny_base), **SMALL)
    noise, states = torch.randn(3, *latent_shape(model.base)), model._states(["a", "b", "c"])
    passes: list[int] = []
    model.generator.register_forward_hook(lambda *_: passes.append(1))
    drawn = model.generate(noise, states)
    assert passes == [1] and drawn.requires_grad
    t = torch.full((3,), model.level)
    own = model.distillation.teacher(noise, t, states)
    abar = model.schedule.alphas_cumprod[model.level]
    torch.testing.assert_close(drawn, (noise - (1 - abar).sqrt() * own) / abar.sqrt(), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="noise_level is 1.0"):
        OneStep(str(tiny_base), noise_level=1.0)


def test_a_process_that_has_only_padding_logs_what_the_others_do(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would wait for it: the last batch of an evaluation may be all padding on some."""
    model = OneStep(str(tiny_base), **SMALL)
    alone = SimpleNamespace(reduce=lambda sums, reduce_op: sums)
    model._oracle, model._trainer = "data/oracle", SimpleNamespace(testing=True, strategy=alone)
    logged: dict[str, int] = {}

    def log(name: str, value: float, batch_size: int = 1, sync_dist: bool = False) -> None:
        logged[name] = batch_size

    monkeypatch.setattr(model, "log", log)
    batch = {"image": torch.zeros(2, 3, 32, 32), "caption": ["a", "b"], "facts": [{}, {}], "key": ["a", "b"]}
    model.validation_step(batch | {"valid": torch.zeros(2, dtype=torch.bool)}, 0)
    model.on_validation_epoch_end()
    judged = dict.fromkeys(("shape", "colour", "pattern"), 0)  # of no sample
    assert logged == judged | dict.fromkeys(("palette error", "saturation", "variety", "variety of the teacher"), 1)
