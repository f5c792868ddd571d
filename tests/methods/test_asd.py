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
from lit_gen.metrics import scores
from lit_gen.metrics.counterparts import WorldPrompts, judge_prompts, pictures_of
from lit_gen.metrics.palette import coverage_error, palette_error, sliced_distance

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
    assert len(weights) == 1 or any("lora" in name or "offsets" in name for name in weights)
    assert not any("lora" not in name and name.startswith("base.") for name in weights)
    assert list(Path("runs/x/samples").glob("step-000004/particles.png"))
    measured = json.loads(Path("runs/x/metrics.json").read_text())["validate"]
    assert ("palette error" in measured) == ("prompts" not in more)
    assert (measured.get("drift", 0) > 0) == ("prompts" not in more)
    assert lit_gen("predict", "-c", "x.yaml") == 0
    assert len(list(Path("runs/x/samples/predict").glob("??-??.png"))) == len(start)


def test_seeds_start_from_particles_of_their_own(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(seed: int) -> torch.Tensor:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        return Particles(str(tiny_base), prompts=["a ball", "a cube"], particles=2, sibling="sds").latents.flatten(1)

    assert torch.equal(start(0), start(0))
    assert torch.cat([start(0), start(1)]).unique(dim=0).shape[0] == 8


def test_drift_is_of_all_particles_over_the_last_steps(lit_gen: Command, tiny_base: Path, here: Path) -> None:
    """Eight moments for the strips, the latents of the middle of a short run for the drift; `test` finds both in the
    checkpoint."""
    long = settings(tiny_base, sibling="sds")
    long["trainer"] |= {"max_steps": 10, "val_check_interval": 10}
    (here / "x.yaml").write_text(yaml.safe_dump(long))
    assert lit_gen("fit", "-c", "x.yaml") == 0
    kept = torch.load("runs/x/checkpoints/last.ckpt", weights_only=True)
    assert len(kept["strips"]) == 8 and kept["late"][0] == 5
    model = Particles(**long["model"]["init_args"] | {"world": WorldPrompts(2)})
    before, after = (model.pictures(x) for x in (kept["late"][1], kept["state_dict"]["latents"]))
    expected = ((after - before) / 2).square().mean((1, 2, 3)).sqrt().mean() * 100 / 5
    measured = json.loads(Path("runs/x/metrics.json").read_text())["validate"]["drift"]
    assert measured == pytest.approx(float(expected), rel=1e-3)
    assert lit_gen("test", "-c", "x.yaml") == 0
    tested = scores.read(Path("runs/x"))["drift"]
    assert sum(tested.values()) / 2 == pytest.approx(measured, rel=1e-4)


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
    assert sliced_distance(truth, truth) == 0 and sliced_distance(truth + 0.2, truth) == pytest.approx(0.1, rel=0.2)
    assert sliced_distance(truth[:1].expand_as(truth), truth) > 0.1
    assert coverage_error(torch.tensor([0, 1, 2, 3]), torch.tensor([3, 2, 1, 0]), 4) == 0
    assert coverage_error(torch.tensor([0, 0, 0, -1]), torch.tensor([0, 1]), 4) == 0.5
    assert coverage_error(torch.tensor([-1]), torch.tensor([0, 1]), 4) == 1


def test_true_pictures_cover_what_prompts_leave_open_and_copies_of_one_do_not() -> None:
    """Everything is as in true pictures, but for the sizes of samples; one picture many times shows no variety."""
    _, scenes = WorldPrompts(1).draw()
    own = pictures_of(scenes, 32, seed=5)[0]
    fair, poor = (judge_prompts(x, scenes, 64, "data/oracle") for x in (own, own[:1].expand(32, -1, -1, -1)))
    assert fair["prompt accuracy"] > 0.9 and fair["coverage error"] < 0.25 < 0.4 < poor["coverage error"]
    for name in ("size", "floor", "elevation", "across", "height"):
        assert fair[f"{name} coverage error"] < poor[f"{name} coverage error"], name
    truth = pictures_of(scenes, 200)[1]  # captions would say so of the others
    assert (truth.pattern[:, 0] == 0).float().mean() > 0.7 and (truth.time == 0).float().mean() > 0.9


def test_what_is_wrong_is_one_line(tiny_base: Path) -> None:
    for wrong, message in (({"prompts": []}, "at least one text"), ({"gamma": -2.0}, "gamma is -2.0")):
        with pytest.raises(UserError, match=message):
            Particles(str(tiny_base), **{"prompts": ["a ball"], **wrong})
