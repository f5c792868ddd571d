"""Particles distilled out of a tiny base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lit_gen.diffusion.compile import Compile
from lit_gen.distillation.contract import Prompts
from lit_gen.errors import UserError
from lit_gen.methods.asd import Particles
from lit_gen.metrics.counterparts import WorldPrompts, pictures_of
from lit_gen.metrics.palette import coverage_error, palette_error

Command = Callable[..., int]


def settings(base: Path, **more: object) -> dict:
    return {
        "trainer": {"accelerator": "cpu", "max_steps": 4, "val_check_interval": 4, "check_val_every_n_epoch": None},
        "model": {
            "class_path": "lit_gen.methods.asd.Particles",
            "init_args": {"base": str(base), "world": {"count": 2}, "particles": 2, "truths": 8, **more},
        },
    }


@pytest.mark.parametrize(
    "more",
    [
        {"sibling": "asd"},
        {"sibling": "vsd", "discriminator": "embedding", "shared": False},
        {"sibling": "sds", "space": "pixels"},
        {"sibling": "classifier", "prompts": ["a red cube", "a cat"]},
        {"sibling": "asd", "gamma": -0.5, "discriminator_steps": 2},
    ],
    ids=lambda m: "-".join(map(str, m.values())),
)
def test_a_run_moves_the_particles_and_draws_them(lit_gen: Command, tiny_base: Path, here: Path, more: dict) -> None:
    (here / "x.yaml").write_text(yaml.safe_dump(settings(tiny_base, **more)))
    assert lit_gen("fit", "-c", "x.yaml", "--trainer.callbacks+", "lit_gen.callbacks.samples.Samples") == 0
    weights = torch.load("runs/x/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    start = Particles(**settings(tiny_base, **more)["model"]["init_args"] | {"world": WorldPrompts(2)}).latents
    assert weights["latents"].shape == start.shape and not torch.equal(weights["latents"], start)
    assert len(weights) == 1 or any("lora" in name or "embeddings" in name for name in weights)
    assert not any("lora" not in name and name.startswith("base.") for name in weights)
    assert list(Path("runs/x/samples").glob("step-000004/particles.png"))
    measured = json.loads(Path("runs/x/metrics.json").read_text())["validate"]
    assert ("palette error" in measured) == ("prompts" not in more)
    assert (measured.get("drift", 0) > 0) == ("prompts" not in more and "space" not in more)
    assert lit_gen("predict", "-c", "x.yaml") == 0
    assert len(list(Path("runs/x/samples/predict").glob("??-??.png"))) == len(start)


@pytest.mark.parametrize("more", [{"sibling": "sds"}, {"discriminator": "lora"}, {"discriminator": "embedding"}])
def test_compiled_is_plain(tiny_base: Path, more: dict) -> None:
    def gradient(compile: Compile | None) -> torch.Tensor:
        torch.manual_seed(0)
        method = Particles(str(tiny_base), prompts=["a red ball"], particles=2, compile=compile, **more)
        method.configure_model()
        prompts = Prompts(*(states.expand(2, -1, -1) for states in (method.text, method.null)))
        method.distillation(method.as_latents(), prompts).total.backward()
        return torch.cat([p.grad.flatten() for p in method.trainable_parameters()])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(gradient(Compile(backend="eager")), gradient(None))
    counters = torch._dynamo.utils.counters
    # the frozen teacher's, and the discriminator's with gradient
    assert counters["stats"]["unique_graphs"] == (1 if "sibling" in more else 2) and not counters["graph_break"]


def test_true_pictures_have_the_true_palette_and_garish_ones_do_not() -> None:
    told, scenes = WorldPrompts(4).draw()
    assert len({(int(s.kind[0, 0]), int(s.colour[0, 0])) for s in (scenes[i : i + 1] for i in range(4))}) == 4
    truth, shown = pictures_of(scenes[:1], 48)
    assert (shown.kind[:, 0] == scenes.kind[0, 0]).all() and (shown.colour[:, 0] == scenes.colour[0, 0]).all()
    again = palette_error(pictures_of(scenes[:1], 48, seed=5)[0], truth)
    garish = palette_error((truth * 3).clamp(-1, 1), truth)
    grey = palette_error(truth.mean(1, keepdim=True).expand_as(truth), truth)
    assert again["palette error"] < 0.06 < garish["palette error"] and again["palette error"] < grey["palette error"]
    assert grey["saturation"] < -0.1 < 0.1 < garish["saturation"]
    assert coverage_error(torch.tensor([0, 1, 2, 3]), torch.tensor([3, 2, 1, 0]), 4) == 0
    assert coverage_error(torch.tensor([0, 0, 0, -1]), torch.tensor([0, 1]), 4) == 0.5


def test_what_is_wrong_is_one_line(tiny_base: Path) -> None:
    for wrong, message in (({"prompts": []}, "at least one text"), ({"gamma": -2.0}, "gamma is -2.0")):
        with pytest.raises(UserError, match=message):
            Particles(str(tiny_base), **{"prompts": ["a ball"], **wrong})
