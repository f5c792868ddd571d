"""StyleCrafter's frozen weights in another precision than the trained ones, and its compiled network."""

import json

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from lit_gen.diffusion.base import load_base
from lit_gen.diffusion.compile import Compile
from lit_gen.diffusion.style_adapter import Adapter
from lit_gen.methods.base import Optimizer
from lit_gen.methods.stylecrafter import Sampling, StyleCrafter

FAST = Sampling(steps=2, eta=0.0, text_scale=3.0, style_scale=2.0)


def method(base, stage, **changes):
    torch.manual_seed(0)
    size = Adapter(tokens=3, extractor_layers=1, predictor_layers=1, heads=2)
    given = dict(adapter=size, image_sampling=FAST, video_sampling=FAST, optimizer=Optimizer(lr=1e-3))
    return StyleCrafter(str(base), stage, **given, **changes)


def pixels(*shape, seed=0):
    return torch.rand(*shape, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


PICTURES = {"image": pixels(2), "style": pixels(2, seed=1), "caption": ["a red ball", "a blue cube"]}
CLIPS = {"video": pixels(2, 3), "caption": ["a red ball", "a blue cube"]}


def train(model, batch, folder, precision="bf16-mixed"):
    """The loss of the one step, and the weights after it."""
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", precision=precision, default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader([batch], batch_size=None))
    return float(trainer.callback_metrics[f"train/loss on {'clips' if 'video' in batch else 'pictures'}"])


@pytest.mark.parametrize("stage,batch", [("adapter", PICTURES), ("temporal", CLIPS), ("joint", CLIPS)])
def test_frozen_weights_in_bfloat16_train_the_same(tiny_base, tmp_path, stage, batch):
    plain, lowered = method(tiny_base, stage), method(tiny_base, stage, frozen_dtype="bfloat16")
    frames = 1 if stage == "adapter" else 3
    for model in (plain, lowered):
        model.eval()
    drawn = [m.sample(["a red ball"], pixels(1), [3], frames=frames) for m in (plain, lowered)]  # without autocast
    assert drawn[1].dtype == torch.float32 and (drawn[0] - drawn[1]).abs().mean() < 0.02
    losses = [train(model, batch, tmp_path) for model in (plain, lowered)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)

    kept = lowered.state_dict()
    assert kept.keys() == plain.state_dict().keys() and all(w.dtype == torch.float32 for w in kept.values())
    kinds = {name: weight.dtype for name, weight in lowered.named_parameters()}
    trained = {name for name, weight in lowered.named_parameters() if weight.requires_grad}
    assert trained and all(kinds[name] == torch.float32 for name in trained)
    for name in kinds.keys() - trained:
        low = name.startswith(("base.unet.", "base.text_encoder.", "base.image_encoder.", "motion_unet."))
        assert kinds[name] == (torch.bfloat16 if low else torch.float32), name
    assert all(w.dtype == torch.float32 for w in (*lowered.adapter.parameters(), *lowered.base.vae.parameters()))
    # the precision of the optimizer's weights: a step far below that of bfloat16 is kept
    before, start = dict(method(tiny_base, stage).named_parameters()), dict(lowered.named_parameters())
    assert any((before[name] != start[name]).any() for name in trained)

    plain.export(tmp_path / "plain")
    lowered.export(tmp_path / "lowered")
    told = [json.loads((tmp_path / name / "adapter" / "config.json").read_text()) for name in ("plain", "lowered")]
    assert told[0] == told[1]  # the same base, by its fingerprint


def test_frozen_bfloat16_needs_no_mixed_precision(tiny_base, tmp_path):
    model = method(tiny_base, "adapter", frozen_dtype="bfloat16")
    assert train(model, PICTURES, tmp_path, "32-true") == pytest.approx(
        train(method(tiny_base, "adapter"), PICTURES, tmp_path, "32-true"), rel=0.02
    )


def test_a_base_is_loaded_in_any_precision(tiny_base):
    parts = ("text_encoder", "vae", "unet", "image_encoder", "motion_adapter")
    whole, half = (load_base(str(tiny_base), parts=parts, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert b.dtype == torch.bfloat16 and torch.equal(a.to(torch.bfloat16), b)


def test_only_training_is_compiled(tiny_base):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = method(tiny_base, "adapter", compile=Compile(backend="eager"))
    plain = method(tiny_base, "adapter")
    model.configure_model()
    model.loss(PICTURES).mean().backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for count in (1, 3):
        prompts, seeds = ["a red ball"] * count, list(range(count))
        drawn = [m.eval().sample(prompts, pixels(count), seeds) for m in (model, plain)]
        assert torch.equal(*drawn)
    one = {k: v[:1] for k, v in PICTURES.items()}
    L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False).validate(
        model, DataLoader([one | {"key": ["0"], "facts": [{}]}], batch_size=None), verbose=False
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs == 1
    model.train().loss(one)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # a shape of training, however, is
