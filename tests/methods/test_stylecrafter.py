import os
import socket
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lit_gen import sweep
from lit_gen.callbacks.samples import Samples
from lit_gen.data.facts import facts_from_scenes
from lit_gen.data.sets import SetFile
from lit_gen.data.styled import strip_style
from lit_gen.diffusion.compile import Compile
from lit_gen.diffusion.style_adapter import Adapter
from lit_gen.errors import UserError
from lit_gen.methods.base import Optimizer
from lit_gen.methods.style_transfer import ClipScores, partners, plain_prompts, strangers, values_of
from lit_gen.methods.stylecrafter import Sampling, StyleCrafter
from lit_gen.methods.stylecrafter_judgement import real_samples
from lit_gen.methods.stylecrafter_requests import read_requests
from lit_gen.metrics import scores
from lit_gen.metrics.agreement import compare
from lit_gen.metrics.oracle import Oracle
from lit_gen.world.grammar import captions
from lit_gen.world.sampling import sample

ROOT = Path(__file__).parents[2]
FAST = Sampling(steps=2, eta=0.0, text_scale=3.0, style_scale=2.0)


def method(base, stage="adapter", **changes):
    torch.manual_seed(0)
    size = Adapter(tokens=3, extractor_layers=1, predictor_layers=1, heads=2)
    given = dict(adapter=size, image_sampling=FAST, video_sampling=FAST, optimizer=Optimizer(lr=3e-3))
    return StyleCrafter(str(base), stage, **{**given, **changes})


def tinted(count, seed=0):
    """Pictures whose only style is their tint, which the caption does not tell; the reference has it too."""
    generator = torch.Generator().manual_seed(seed)
    tint = torch.rand(count, 3, 1, 1, generator=generator) * 2 - 1
    return {
        "image": tint.expand(-1, -1, 64, 64).contiguous(),
        "style": (tint + 0.05 * torch.randn(count, 3, 64, 64, generator=generator)).clamp(-1, 1),
        "caption": ["a red ball"] * count,
    }


def world(recipe, count, frames=None):
    """A validation batch with true facts and arbitrary pixels."""
    scenes = sample(recipe, "test", 0, torch.arange(count))
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, 64, 64) if frames is None else (count, frames, 3, 64, 64)
    pixels = torch.rand(shape, generator=generator) * 2 - 1
    return {
        **({"video": pixels} if frames else {"image": pixels, "style": pixels.flip(0)}),
        "caption": [strip_style(c.text) for c in captions(scenes)],
        "key": [f"{i:06d}" for i in range(count)],
        "facts": facts_from_scenes(scenes),
        "style_parameters": scenes.style_parameters,
        "valid": torch.tensor([True] * (count - 1) + [False]),
    }


def trainer(folder, **changes):
    logger = TensorBoardLogger(folder, name="", version="")
    given = dict(max_steps=2, accelerator="cpu", logger=logger, enable_progress_bar=False, num_sanity_val_steps=0)
    given |= dict(enable_model_summary=False, log_every_n_steps=1, callbacks=[Samples()])
    return L.Trainer(default_root_dir=folder, **{**given, **changes})


def loader(*batches):
    return DataLoader(list(batches), batch_size=None)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """An untrained oracle: its scores mean nothing, but they are scores."""
    return str(Oracle(channels=(8, 8, 8, 8), width=16, layers=1).save_pretrained(tmp_path_factory.mktemp("oracle")))


@pytest.mark.parametrize("stage", ["adapter", "temporal"])
def test_compiled_and_checkpointed_is_plain(tiny_base, stage, monkeypatch):
    clip = {"posterior": torch.randn(1, 4, 2, 8, 16, 16), "video": torch.rand(1, 4, 3, 64, 64)}
    picture = {"posterior": torch.randn(1, 2, 8, 16, 16), "style": torch.rand(1, 3, 64, 64)}
    batch = (picture if stage == "adapter" else clip) | {"text_states": torch.randn(1, 9, 32), "caption": ["a ball"]}

    def gradient(**options):
        model = method(tiny_base, stage, **options)
        model.configure_model()
        torch.manual_seed(1)
        model.loss(batch).mean().backward()
        return torch.cat([p.grad.flatten() for p in model.trainable_parameters()])

    plain = gradient()
    recomputed, real = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: recomputed.append(a) or real(*a, **k))
    assert torch.equal(gradient(checkpointing=True), plain) and len(recomputed) >= 5
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(gradient(compile=Compile(backend="eager")), plain)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]  # in one piece, style and all


def test_adapter_learns_and_leaves_the_base_alone(tiny_base):
    model = method(tiny_base)
    before = {k: v.clone() for k, v in model.base.state_dict().items()}
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=3e-3)
    val = tinted(16, seed=1)

    @torch.no_grad()
    def error():
        torch.manual_seed(0)
        return float(model.loss(val).mean())

    first = error()
    for step in range(20):
        torch.manual_seed(step)
        loss = model.loss(tinted(8, seed=step + 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error() < 0.95 * first
    assert all(torch.equal(v, before[k]) for k, v in model.base.state_dict().items())


def test_both_stages_train_only_their_part_and_pass_the_adapter_on(tiny_base, tmp_path, oracle):
    first = method(tiny_base, oracle=oracle)
    run = trainer(tmp_path / "adapter")
    run.fit(first, loader(tinted(4), tinted(4, 1)), loader(world("styled", 5)))
    run.save_checkpoint(tmp_path / "adapter.ckpt")
    saved = torch.load(tmp_path / "adapter.ckpt", weights_only=True)["state_dict"]
    assert saved and all(name.startswith("adapter.") for name in saved)
    scores = {k: float(v) for k, v in run.callback_metrics.items()}
    for group in ("adapter", "base with style words"):
        assert {f"{group}/{s}" for s in ("style error", "content accuracy", "leak rate")} <= scores.keys()
    ratio = scores["adapter/style error"] / scores["base with style words/style error"]
    assert scores["style error, adapter over words"] == pytest.approx(ratio)

    second = method(tiny_base, "temporal", oracle=oracle)
    second.load_weights(tmp_path / "adapter.ckpt")
    start = {k: v.clone() for k, v in second.state_dict().items()}
    assert all(torch.equal(start[k], saved[k]) for k in saved)
    clips = {"video": torch.rand(2, 4, 3, 64, 64) * 2 - 1, "caption": ["a red ball moves left"] * 2}
    run = trainer(tmp_path / "temporal")
    run.fit(second, loader(clips, tinted(4)), loader(world("styled-motion", 4, frames=4)))
    run.save_checkpoint(tmp_path / "temporal.ckpt")
    end = torch.load(tmp_path / "temporal.ckpt", weights_only=True)["state_dict"]
    changed = {k for k in end if not torch.equal(end[k], start[k])}
    assert changed and all("motion_modules" in k for k in changed)
    assert saved.keys() < end.keys()  # one checkpoint is enough to predict from
    assert {"clips/flicker", "clips/flicker, times real", "clips/motion accuracy"} <= run.callback_metrics.keys()

    events = EventAccumulator(str(tmp_path / "temporal")).Reload()
    gif = events.Images("samples/clips")[-1].encoded_image_string
    assert gif.startswith(b"GIF") and (tmp_path / "temporal/samples/step-000002/clips.mp4").stat().st_size > 0
    sheet = Image.open(tmp_path / "adapter/samples/step-000002/prompts-x-styles.png")
    assert sheet.width > sheet.height / 2
    png = EventAccumulator(str(tmp_path / "adapter")).Reload().Images("samples/prompts x styles")
    assert (png[-1].width, png[-1].height) == sheet.size


@pytest.mark.parametrize("stage", ["adapter", "temporal"])
def test_interrupted_training_ends_with_the_same_weights(tiny_base, tmp_path, stage):
    clips = {"video": torch.rand(2, 3, 3, 64, 64) * 2 - 1, "caption": ["a red ball"] * 2}
    batches = loader(*[clips if stage == "temporal" else tinted(2)] * 4)
    quiet = dict(logger=False, callbacks=[], enable_checkpointing=False)
    whole, part, rest = (method(tiny_base, stage) for _ in range(3))
    trainer(tmp_path, max_steps=4, **quiet).fit(whole, batches)
    half = trainer(tmp_path, max_steps=2, **quiet)
    half.fit(part, batches)
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_steps=4, **quiet).fit(rest, batches, ckpt_path=tmp_path / "half.ckpt")
    end, resumed, middle = whole.state_dict(), rest.state_dict(), part.state_dict()
    assert all(torch.equal(end[k], resumed[k]) for k in end)
    assert not all(torch.equal(end[k], middle[k]) for k in end)


def test_pictures_and_clips_both_reach_every_temporal_weight(tiny_base):
    model = method(tiny_base, "temporal")
    for batch in (tinted(4), {"video": torch.rand(2, 4, 3, 64, 64) * 2 - 1, "caption": ["a red ball"] * 2}):
        model.zero_grad()
        model.loss(batch).mean().backward()
        # what a batch leaves without a gradient would hang or fail DDP
        assert all(p.grad is not None for p in model.trainable_parameters())
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all("motion_modules" in n for n in names)


def test_dropped_style_is_the_plain_base(tiny_base):
    model, plain = method(tiny_base, drop_style=1.0), method(tiny_base, style_weight=0.0)
    torch.manual_seed(0)
    dropped = model.loss(tinted(4))
    torch.manual_seed(0)
    assert torch.allclose(dropped, plain.loss(tinted(4)))
    torch.manual_seed(0)
    assert not torch.allclose(dropped, method(tiny_base).loss(tinted(4)))


def test_a_sample_depends_on_its_seed_not_on_its_batch(tiny_base):
    model = method(tiny_base)
    views = tinted(2)["style"]
    both = model.sample(["a red ball", "a blue cube"], views, [7, 8])
    alone = model.sample(["a blue cube"], views[1:], [8])
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-3)
    several = model.sample(["a blue cube"], views[None], [8])  # two references for one picture
    assert several.shape == alone.shape and not torch.allclose(several, alone, atol=1e-3)
    assert not torch.allclose(model.sample(["a blue cube"], None, [8]), alone, atol=1e-3)


def test_reference_never_shares_the_prompts_content():
    scenes = sample("styled", "test", 0, torch.arange(16))
    batch = {"caption": [""] * 16, "facts": facts_from_scenes(scenes)}
    kinds = [{k for k in row if k >= 0} for row in scenes.kind.tolist()]
    for own, j in enumerate(partners(batch)):
        assert own != j and not kinds[own] & kinds[j]
    prompts = set().union(*kinds[:3])
    assert not any(kinds[j] & prompts or j < 3 for j in strangers(batch, 3, 2))
    untold = {"caption": ["a dog", "a dog", "a cat"], "facts": [{}, {}, {}]}
    assert partners(untold) == [2, 2, 0]


def test_samples_that_only_fill_a_batch_up_are_not_scored():
    batch = real_samples(world("styled", 3))
    assert len(batch["caption"]) == len(batch["image"]) == len(batch["facts"]) == 2


class Promptless(L.LightningDataModule):
    """An experiment's data module, which must not be asked for what to draw."""

    def predict_dataloader(self):
        return []


@pytest.mark.parametrize("stage,suffix", [("adapter", "png"), ("temporal", "mp4")])
def test_predict_draws_every_prompt_in_every_style(tiny_base, tmp_path, stage, suffix):
    styles = tmp_path / "styles"
    styles.mkdir()
    for name in ("one", "two"):
        Image.new("RGB", (90, 70), "teal").save(styles / f"{name}.png")
    prompts = ["a red ball", "a blue cube", "a cone"]
    model = method(tiny_base, stage, prompts=prompts, styles=[str(styles)], frames=4 if stage == "temporal" else 1)
    run = trainer(tmp_path, logger=False, callbacks=[])
    drawn = run.predict(model, datamodule=Promptless())
    assert len(drawn) == 2 and len(drawn[0]) == 3
    folder = tmp_path / "samples" / "predict"
    names = {f"{style}-{i:02d}" for style in ("one", "two") for i in range(3)} | {"contact-sheet"}
    assert {p.name for p in folder.iterdir()} == {f"{name}.{suffix}" for name in names}


def test_predict_mistakes_are_one_line(tiny_base, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.png").write_text("not a picture")
    for path, expected in [("empty", "no pictures"), ("notes.png", "not a picture"), ("gone.png", "no such file")]:
        with pytest.raises(UserError, match=expected):
            read_requests(["a ball"], [str(tmp_path / path)], None, 64)
    with pytest.raises(UserError, match="--prompt"):
        method(tiny_base, styles=["x.png"]).predict_dataloader()
    with pytest.raises(UserError, match="clips need stage"):
        method(tiny_base, frames=8)


@pytest.mark.parametrize("stage", ["adapter", "temporal"])
def test_every_test_sample_is_scored_by_itself(tiny_base, tmp_path, oracle, stage):
    model = method(tiny_base, stage, oracle=oracle)
    clips = stage == "temporal"
    batch = world("styled-motion" if clips else "styled", 5, frames=3 if clips else None)
    run = trainer(tmp_path, logger=False, callbacks=[])
    (means,) = run.test(model, loader(batch), verbose=False)
    found = scores.read(tmp_path)
    keys = [f"{i:06d}" for i in range(4)]  # the fifth only fills the batch up
    end = " of clips" if clips else ""
    assert list(found[f"style error{end}"]) == keys
    group = "clips" if clips else "adapter"
    for name in ("style error", "leak rate"):
        mean = sum(found[name + end].values()) / len(found[name + end])
        assert means[f"{group}/{name}"] == pytest.approx(mean, abs=1e-5)
    assert all(0 <= value <= 1 for value in found[f"content accuracy{end}"].values())
    if clips:
        flicker = sum(found["flicker of clips"].values()) / 4
        assert means["clips/flicker"] == pytest.approx(flicker, rel=1e-4)
        real = sum(found["flicker of real clips"].values()) / 4
        assert means["clips/flicker, times real"] == pytest.approx(flicker / real, rel=1e-4)  # of means, not of clips
        assert {"motion accuracy of clips", "style drift of clips"} <= found.keys()
    else:
        words = found["style error, base with style words"]
        assert means["base with style words/style error"] == pytest.approx(sum(words.values()) / 4, abs=1e-5)
        assert found["style error"] != words


def test_every_arm_of_the_ablation_tests_the_same_clips_and_all_of_them(here):
    cells = sweep.read([str(ROOT / "experiments" / "stylecrafter_ablation.yaml")]).cells
    runs = {c.arm: r.settings.data for c in cells for r in c.runs if r.folder.name == "temporal"}
    assert runs.keys() == {"full", "no temporal finetune", "joint training"}
    for settings in runs.values():
        videos = settings["data"]["init_args"]["videos"]["init_args"]
        assert SetFile.read(ROOT / videos["test"]).count == 128 and "limit_test_batches" not in settings["trainer"]


def test_values_of_single_pictures_against_plain_loops():
    scenes = sample("styled", "test", 0, torch.arange(24))
    wanted = scenes[torch.arange(24).roll(5)]
    reading = Oracle(channels=(8, 8, 8, 8), width=16, layers=1).eval().read(torch.rand(24, 3, 64, 64) * 2 - 1)
    values = values_of(reading, scenes, wanted)
    agreement = compare(reading, scenes)
    for i in range(24):
        objects = [k for k in range(3) if scenes.kind[i, k] >= 0]
        asked = [(n, k) for n in ("shape", "colour") for k in objects if agreement.counted[n][i, k]]
        right = sum(bool(agreement.right[n][i, k]) for n, k in asked) / len(asked)
        assert values["content accuracy"][i] == pytest.approx(right)
        several = values["content accuracy of several objects"][i]
        assert several == pytest.approx(right) if len(objects) > 1 else several.isnan()
        foreign = int(wanted.kind[i, 0])
        leak = values["leak rate"][i]
        if foreign in scenes.kind[i].tolist():
            assert leak.isnan()
        else:
            shown = [int(reading.kind[i, k]) for k in range(3) if reading.present[i, k]]
            assert leak == float(foreign in shown)


def test_clips_that_keep_their_style_do_not_drift(oracle):
    kept = ClipScores(oracle)
    still = torch.rand(2, 1, 3, 64, 64).expand(-1, 4, -1, -1, -1) * 2 - 1
    changing = torch.rand(2, 4, 3, 64, 64) * torch.linspace(0.1, 2, 4).view(4, 1, 1, 1) - 1
    assert kept.drift(still).abs().max() < 1e-5 < kept.drift(changing).min()


def test_validation_prompts_never_tell_the_style():
    scenes = sample("named", "test", 0, torch.arange(8))
    told = [c.text for c in captions(scenes)]
    batch = {"caption": told, "facts": facts_from_scenes(scenes)}
    plain = plain_prompts(batch)
    assert plain != told and plain == plain_prompts(batch | {"caption": plain})
    untold = plain_prompts({"caption": ["a painting of a dog", "a dog"], "facts": [{}, {}]})
    assert untold == ["a dog", "a dog"]


def one_rank(rank, base, oracle, folder, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    batch = world("styled-motion", 3, frames=3)
    if rank:
        batch["valid"] = torch.zeros(3, dtype=torch.bool)
    quiet = dict(logger=False, callbacks=[], enable_checkpointing=False, strategy="ddp", devices=2)
    run = trainer(folder, **quiet)
    (means,) = run.validate(method(base, "temporal", oracle=oracle), loader(batch), verbose=False)
    torch.save(means, f"{folder}/rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_rank_that_has_only_fillers_leaves_nobody_waiting(tiny_base, tmp_path, oracle):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_rank, (str(tiny_base), oracle, str(tmp_path), port), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    quiet = dict(logger=False, callbacks=[], enable_checkpointing=False)
    model = method(tiny_base, "temporal", oracle=oracle)
    (alone,) = trainer(tmp_path, **quiet).validate(model, loader(world("styled-motion", 3, frames=3)), verbose=False)
    assert {"validation loss", "clips/motion accuracy"} <= alone.keys()
    for means in ranks:
        assert means == pytest.approx(alone, rel=1e-4, abs=1e-5)
