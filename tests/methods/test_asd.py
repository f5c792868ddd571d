"""Particles distilled out of a tiny base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lit_gen.diffusion.compile import Compile
from lit_gen.distillation.contract import Prompts
from lit_gen.errors import UserError
from lit_gen.methods.asd import Particles, latent_shape
from lit_gen.metrics import scores
from lit_gen.metrics.counterparts import WorldPrompts, judge_prompts, pictures_of
from lit_gen.metrics.palette import coverage_error, palette_error, sliced_distance

Command = Callable[..., int]
# By its whole path: oracles are kept by theirs, and other tests have one at this relative path.
ORACLE = str(Path(__file__).parents[2] / "data/oracle")


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
        {"sibling": "asd", "frozen_dtype": "bfloat16"},
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
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert list(Path("runs/x/samples").glob("step-000004/particles.png"))
    measured = json.loads(Path("runs/x/metrics.json").read_text())["validate"]
    assert ("palette error" in measured) == ("prompts" not in more)
    assert (measured.get("drift", 0) > 0) == ("prompts" not in more)
    assert lit_gen("predict", "-c", "x.yaml") == 0
    assert len(list(Path("runs/x/samples/predict").glob("??-??.png"))) == len(start)
    assert lit_gen("export", "-c", "x.yaml") == 0
    exported = load_file("runs/x/export/weights.safetensors")
    assert exported.keys() == weights.keys() and all(torch.equal(exported[name], weights[name]) for name in weights)


def test_trained_pictures_are_not_taken_for_other_prompts(
    lit_gen: Command, tiny_base: Path, here: Path, capsys: pytest.CaptureFixture
) -> None:
    short = settings(tiny_base, sibling="sds", prompts=["a red cube", "a ball"])
    short["trainer"] |= {"max_steps": 1, "val_check_interval": 1}
    (here / "x.yaml").write_text(yaml.safe_dump(short))
    assert lit_gen("fit", "-c", "x.yaml") == 0
    for others, message in (
        ('["a red cube", "a cat"]', "are of 'a ball' (number 2 of 2), not 'a cat': give the settings"),
        ('["a red cube"]', "are of 2 subjects, not 1: give the settings"),
    ):
        capsys.readouterr()
        assert lit_gen("predict", "-c", "x.yaml", "--model.prompts", others) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1
    assert lit_gen("predict", "-c", "x.yaml") == 0


def test_seeds_start_from_particles_of_their_own(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(seed: int) -> torch.Tensor:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        return Particles(str(tiny_base), prompts=["a ball", "a cube"], particles=2, sibling="sds").latents.flatten(1)

    assert torch.equal(start(0), start(0))
    assert torch.cat([start(0), start(1)]).unique(dim=0).shape[0] == 8


def test_particles_are_held_while_the_discriminator_catches_up(
    lit_gen: Command, tiny_base: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With three steps of the discriminator for one of theirs, they move in every third alone, momentum or not."""
    seen: list[torch.Tensor] = []
    remember = Particles.remember

    def note(self: Particles, shown: torch.Tensor) -> None:
        seen.append(
            torch.cat([p.detach().flatten().clone() for p in (self.latents, *self.discriminators[0].trained())])
        )
        remember(self, shown)

    monkeypatch.setattr(Particles, "remember", note)
    alternating = settings(tiny_base, prompts=["a ball"], discriminator_steps=3, discriminator_lr=0.01)
    alternating["trainer"] |= {"max_steps": 8, "val_check_interval": 8}
    (here / "x.yaml").write_text(yaml.safe_dump(alternating))
    assert lit_gen("fit", "-c", "x.yaml") == 0
    model = Particles(**alternating["model"]["init_args"])
    particles = model.latents.numel()
    moves = [
        [not torch.equal(b[k], a[k]) for k in (slice(particles), slice(particles, None))] for a, b in pairwise(seen)
    ]
    assert moves == [[step % 3 == 2, True] for step in range(7)]
    assert "discriminator_steps" in model.refuses_zero


def test_every_subpixel_has_a_gradient(tiny_base: Path) -> None:
    """Also those that a normal start puts beyond black and white; and the encoder keeps its own precision."""
    model = Particles(str(tiny_base), prompts=["a ball"], particles=2, sibling="sds", space="pixels")
    beyond = model.latents.abs() > 1
    with torch.autocast("cpu", torch.bfloat16):
        latents = model.as_latents()
    assert torch.equal(latents, model.as_latents()) and latents.dtype == torch.float32
    latents.backward(torch.randn_like(latents))
    assert 0.3 < beyond.float().mean() < 0.34 and (model.latents.grad != 0)[beyond].float().mean() > 0.999
    clamped = model.base.encode_mean(model.latents.detach().clamp(-1, 1))
    torch.testing.assert_close(latents.detach(), clamped, atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize("discriminator", ["lora", "embedding"])
def test_compiled_is_plain(tiny_base: Path, discriminator: str) -> None:
    more = {"discriminator": discriminator}

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
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_what_a_pass_predicted_outlives_the_next(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs return the same buffer from every pass; here the network does so."""
    method = Particles(str(tiny_base), prompts=["a ball"], particles=2, sibling="sds")
    buffer, passes = torch.empty(2, *latent_shape(method.base)), iter((1.0, 2.0))
    monkeypatch.setattr(
        method.base.unet, "forward", lambda *_, **__: SimpleNamespace(sample=buffer.fill_(next(passes)))
    )
    given = (torch.zeros_like(buffer), torch.zeros(2, dtype=torch.long), method.text.expand(2, -1, -1))
    first, second = (method.distillation.teacher(*given) for _ in range(2))
    assert (first == 1).all() and (second == 2).all()


def test_cuda_graphs_and_accumulation_exclude_each_other(
    lit_gen: Command, tiny_base: Path, here: Path, capsys: pytest.CaptureFixture
) -> None:
    graphs = settings(tiny_base, sibling="sds", prompts=["a ball"], compile={"mode": "reduce-overhead"})
    graphs["trainer"]["accumulate_grad_batches"] = 2
    (here / "x.yaml").write_text(yaml.safe_dump(graphs))
    assert lit_gen("fit", "-c", "x.yaml") == 2
    assert "trainer.accumulate_grad_batches is 2, which the CUDA graphs" in capsys.readouterr().err
    Compile().refuse_accumulation(2)
    Compile("reduce-overhead").refuse_accumulation(1)


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
    assert coverage_error(torch.tensor([0, 1]), torch.tensor([]), 4) == 1


def test_true_pictures_cover_what_prompts_leave_open_and_copies_of_one_do_not() -> None:
    """Everything is as in true pictures, as the text of asd_ablation.yaml says; one many times shows no variety."""
    _, scenes = WorldPrompts(1).draw()
    own = pictures_of(scenes, 64, seed=2)[0]
    fair, poor = (judge_prompts(x, scenes, 256, ORACLE) for x in (own, own[:1].expand(64, -1, -1, -1)))
    assert fair["prompt accuracy"] > 0.95 and fair["coverage error"] < 0.1 < 0.4 < poor["coverage error"]
    assert fair["palette error"] < 0.025 and fair["sliced Wasserstein"] < 0.045 and fair["saturation"].abs() < 0.02
    for name in ("size", "floor", "elevation", "across", "height"):
        assert fair[f"{name} coverage error"] < poor[f"{name} coverage error"], name
    truth = pictures_of(scenes, 200)[1]  # captions would say so of the others
    assert (truth.pattern[:, 0] == 0).float().mean() > 0.7 and (truth.time == 0).float().mean() > 0.9


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"prompts": []}, "at least one text"),
        ({"gamma": -2.0}, "gamma is -2.0"),
        ({"particles": 0}, "`particles` must be at least 1, not 0"),
        ({"discriminator_steps": 0}, "`discriminator_steps` must be at least 1, not 0"),
        ({"rank": 0}, "`rank` must be at least 1, not 0"),
        ({"spread": 0.0}, "spread is 0.0"),
        ({"discriminator_lr": -1e-3}, "`discriminator_lr` must be at least 0, not -0.001"),
        ({"discriminator_lr": float("nan")}, "`discriminator_lr` must be at least 0, not nan"),
    ],
)
def test_what_is_wrong_is_one_line(tiny_base: Path, wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        Particles(str(tiny_base), **{"prompts": ["a ball"], **wrong})
    assert len(str(told.value).splitlines()) == 1


def test_a_base_that_predicts_something_else_is_named(tiny_base: Path, here: Path) -> None:
    shutil.copytree(tiny_base, here / "other")
    config = json.loads((here / "other/scheduler/scheduler_config.json").read_text())
    (here / "other/scheduler/scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "sample"}))
    with pytest.raises(UserError, match="^base '.*other' predicts 'sample'.*$"):
        Particles(str(here / "other"), prompts=["a ball"])
