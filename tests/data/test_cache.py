"""Training from what was encoded beforehand: the same losses, no encoders, and never from something else."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPTextModel

from lit_gen import experiment, interrupts
from lit_gen.data import cache as caching
from lit_gen.data import encoded
from lit_gen.data.module import Images, StyledImages, Videos
from lit_gen.data.shards import ShardSet
from lit_gen.data.write import write_index
from lit_gen.methods.stylecrafter import StyleCrafter

EXPERIMENT = "experiments/stylecrafter.yaml"
COUNT, PER_SHARD = 14, 4
# Seeds of the order and of the training are the experiment's; nothing is validated, which would encode as well.
ADAPTER = ("--stage", "adapter", "--trainer.max_steps", "4", "--data.val", "null", "--data.batch_size", "4")
TEMPORAL = ("--stage", "temporal", "--trainer.max_steps", "4", "--init_from", "null", "--data.image_probability", "0.5")
TEMPORAL += ("--data.videos.init_args.val", "null")
QUICK = ("--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--validate_first", "false")
QUICK += ("--trainer.limit_val_batches", "0", "--trainer.callbacks", "[]")


@pytest.fixture(scope="module")
def prepared(universe, tmp_path_factory):
    """A universe whose sets have several shards, with caches of both precisions."""
    folder = tmp_path_factory.mktemp("cached") / "universe"
    shutil.copytree(universe, folder, ignore=shutil.ignore_patterns("shards", "runs"))
    for name in ("styled-images", "motion-videos"):
        file = folder / "data" / f"{name}.yaml"
        small = dict(count=COUNT, samples_per_shard=PER_SHARD)
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | small))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for dtype in ("float16", "float32"):
            assert caching.main(["-c", EXPERIMENT, "--dtype", dtype, "--device", "cpu", "--task", "0/1"]) == 0
    return folder


@pytest.fixture
def place(prepared, here):
    """A copy of it to work in."""
    shutil.copytree(prepared, here, dirs_exist_ok=True)
    return here


def caches(dtype=None, name="styled-images"):
    found = [p.parent for p in Path("data/shards").glob(f"{name}.cache-*/index.json")]
    return sorted(
        p for p in found if dtype in (None, json.loads((p / "index.json").read_text())["description"]["dtype"])
    )


@pytest.fixture
def calls(monkeypatch):
    """How often the autoencoder's encoder and the text encoder ran."""
    counted = Counter()

    def count(cls, name):
        real = getattr(cls, name)

        def counting(self, *args, **kwargs):
            counted[cls.__name__] += 1
            return real(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, counting)

    count(AutoencoderKL, "encode")
    count(CLIPTextModel, "forward")
    return counted


def losses(run):
    events = EventAccumulator(f"runs/{run}").Reload()
    found = {(tag, e.step): e.value for tag in events.Tags()["scalars"] if "loss" in tag for e in events.Scalars(tag)}
    assert {step for _, step in found} == set(range(4))
    return found


@pytest.mark.parametrize(
    "stage, cached",
    [
        (ADAPTER, ["--data.cached"]),
        (TEMPORAL, ["--data.images.init_args.cached", "--data.videos.init_args.cached"]),
    ],
    ids=["adapter", "temporal"],
)
def test_cached_training_has_the_same_losses_and_runs_no_encoder(lit_gen, place, calls, stage, cached):
    name = stage[1]

    def fit(experiment, *words):
        calls.clear()
        assert lit_gen("fit", "-c", EXPERIMENT, *stage, *QUICK, "--experiment", experiment, *words) == 0
        return losses(f"{experiment}/{name}"), dict(calls)

    plain, counted = fit("plain")
    assert counted == {"AutoencoderKL": 4, "CLIPTextModel": 4}  # once a step
    exact, counted = fit("exact", *(word for key in cached for word in (key, "float32")))
    assert counted == {}
    half, counted = fit("half", *(word for key in cached for word in (key, "float16")))
    assert counted == {}
    # Pictures were encoded in other batches than they are trained in, which changes the last bits.
    assert exact == pytest.approx(plain, rel=1e-5) and half == pytest.approx(plain, rel=2e-3)
    assert half != exact and len(set(plain.values())) == 4
    assert len({tag for tag, _ in plain}) == (2 if stage is TEMPORAL else 1)  # pictures and clips


def test_the_loss_of_a_batch_is_the_same_to_the_last_bit(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    run = experiment.runs([EXPERIMENT], [])[1]
    method, _ = caching.instances(run)
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, 3, 3, 64, 64, generator=generator) * 2 - 1
    for batch in (
        {"video": video, "caption": ["a red ball moves left", "a cone"]},
        {"image": video[:, 0], "style": video[:, 1], "caption": ["a red ball", "a cone"]},
    ):
        encodings = method.encode_for_cache(batch)
        torch.manual_seed(1)
        plain = method.loss(batch)
        torch.manual_seed(1)
        assert torch.equal(method.loss({k: v for k, v in batch.items() if k != "image"} | encodings), plain)
        torch.manual_seed(2)
        assert not torch.equal(method.loss(batch), plain)  # the latents and the noise are drawn anew


def test_latents_are_drawn_as_the_autoencoder_draws_them(tiny_base):
    from lit_gen.diffusion.base import load_base

    base = load_base(str(tiny_base))
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    torch.manual_seed(5)
    theirs = base.vae.encode(images).latent_dist.sample() * base.vae.config.scaling_factor
    torch.manual_seed(5)
    assert torch.allclose(base.encode(images), theirs, atol=1e-6)


def test_clips_are_cut_from_the_latents_where_they_are_cut_from_the_frames(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    method, _ = caching.instances(experiment.runs([EXPERIMENT], [])[1])
    data = Videos(train="data/motion-videos.yaml", batch_size=3, frames=3, stride=2, cached="float32")
    data._cache = encoded.find(data, method, "float32")
    starts = set()
    for batch in data.train_dataloader():
        assert batch["video"].shape[:2] == batch["posterior"].shape[:2] == (3, 3)
        found = method.base.posterior(batch["video"].flatten(0, 1)).unflatten(0, (3, 3))
        torch.testing.assert_close(batch["posterior"], found, rtol=1e-3, atol=1e-4)
        starts.add(batch["posterior"][0, 0].sum().item())
    assert len(starts) > 1


def test_plain_pictures_are_not_even_read(place):
    method, _ = caching.instances(experiment.runs([EXPERIMENT], [])[0])
    data = Images(train="data/styled-images.yaml", batch_size=5, size=64, cached="float16")
    caching.cache(None, "", method, data)
    data._cache = encoded.find(data, method, "float16")
    loader = data.train_dataloader()
    assert not loader._batches.extensions & {"png", "jpg"}
    batch = next(iter(loader))
    assert batch.keys() == {"posterior", "text_states", "caption", "key", "facts"}
    assert batch["posterior"].dtype == batch["text_states"].dtype == torch.float16
    plain = next(iter(Images(train="data/styled-images.yaml", batch_size=5, size=64).train_dataloader()))
    assert plain["key"] == batch["key"]
    text = method.text(plain["caption"]).states
    torch.testing.assert_close(batch["text_states"].float(), text, rtol=2e-3, atol=2e-3)


FINETUNE = """\
experiment: finetune
model:
  class_path: lit_gen.pretrain.finetune.Finetune
  init_args: {base: data/world-base}
data:
  class_path: lit_gen.data.module.Images
  init_args: {train: data/styled-images.yaml, batch_size: 4, size: 64}
"""


def test_a_full_finetune_trains_on_a_cache_without_the_encoders(lit_gen, place, calls, capsys):
    Path("finetune.yaml").write_text(FINETUNE)
    words = ("fit", "-c", "finetune.yaml", "--trainer.max_steps", "4", *QUICK)
    assert lit_gen(*words) == 2
    assert "Finetune trains on cached latents: run `cache`" in capsys.readouterr().err
    assert lit_gen("cache", "-c", "finetune.yaml") == 0
    assert "train from it with --data.init_args.cached float16" in capsys.readouterr().out
    calls.clear()
    assert lit_gen(*words, "--data.cached", "float16", "--fresh") == 0
    assert calls == {} and all(0 < loss < 5 for loss in losses("finetune").values())
    weights = torch.load("runs/finetune/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert weights and all(name.startswith("unet.") for name in weights)


# -- stale ------------------------------------------------------------------------------------------------------------


def refused(lit_gen, capsys, *words):
    capsys.readouterr()
    assert lit_gen("fit", "-c", EXPERIMENT, *ADAPTER, *QUICK, *words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "python -m lit_gen cache" in error
    return error


def test_a_stale_cache_is_an_error_that_says_what_changed(lit_gen, place, capsys):
    for folder in caches("float32"):
        shutil.rmtree(folder)
    half = ("--data.cached", "float16")
    assert "dtype: float16 -> float32" in refused(lit_gen, capsys, "--data.cached", "float32")
    error = refused(lit_gen, capsys, *half, "--data.size", "32")
    assert "size: 64 -> 32" in error and "weights" not in error
    assert "strip_style: careful -> none" in refused(lit_gen, capsys, *half, "--data.strip_style", "false")
    # what does not reach the encoders does not matter
    assert lit_gen("fit", "-c", EXPERIMENT, *ADAPTER, *QUICK, *half, "--data.zoom", "1.2", "--data.seed", "5") == 0

    weights = place / "data/world-base/vae/diffusion_pytorch_model.safetensors"
    changed = load_file(weights)
    changed["encoder.conv_in.bias"][0] += 1e-3
    save_file(changed, weights, metadata={"format": "pt"})
    error = refused(lit_gen, capsys, *half, "--experiment", "other")
    assert "weights of vae" in error and "text_encoder" not in error
    assert caching.main(["-c", EXPERIMENT, "--stage", "adapter"]) == 0
    assert lit_gen("fit", "-c", EXPERIMENT, *ADAPTER, *QUICK, *half, "--experiment", "other") == 0

    file = place / "data/styled-images.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"seed": 9}))
    assert "samples of the set" in refused(lit_gen, capsys, *half, "--experiment", "third")
    for folder in caches():
        shutil.rmtree(folder)
    assert "not cached yet" in refused(lit_gen, capsys, *half, "--experiment", "third")


def test_a_cache_of_other_shards_is_never_joined(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(prepared)
    source = ShardSet.open("data/styled-images.yaml")
    (good,) = caches("float16")
    tars = ShardSet.open(good).shards
    shuffled = tmp_path / "shuffled"
    shutil.copytree(good, shuffled)
    write_index(shuffled, "encodings", [tars[1], tars[0], *tars[2:]], {})
    joined = encoded.EncodedSet.of(source, ShardSet.open(shuffled))
    with pytest.raises(encoded.ShardError, match="in the place of 000000.tar/00000000"):
        joined.read(0, {"txt"})
    write_index(shuffled, "encodings", tars[:2], {})
    with pytest.raises(encoded.ShardError, match="does not have the shards of"):
        encoded.EncodedSet.of(source, ShardSet.open(shuffled))


def test_what_cannot_be_cached_is_one_line(place, capsys, lit_gen):
    assert lit_gen("cache") == 2
    assert "cache needs an experiment" in capsys.readouterr().err
    assert lit_gen("cache", "-c", EXPERIMENT, "--dtype", "int8") == 2
    assert "--dtype must be float16 or float32" in capsys.readouterr().err
    assert lit_gen("cache", "-c", "experiments/base/text_to_image.yaml") == 2
    assert "nothing to cache" in capsys.readouterr().err
    assert lit_gen("cache", "-c", EXPERIMENT, "--task", "4/4") == 2
    assert "a task is I/N" in capsys.readouterr().err
    method = StyleCrafter("data/world-base")
    method.base.vae.requires_grad_(True)
    with pytest.raises(encoded.UserError, match="trains its vae"):
        encoded.description(Images(train="data/styled-images.yaml"), method, None, "float16")


# -- damage -----------------------------------------------------------------------------------------------------------


def test_an_unreadable_sample_is_replaced_by_the_same_one_with_and_without_a_cache(place, caplog):
    file = Path("data/shards/styled-images/000001.tar")
    content = bytearray(file.read_bytes())
    start = content.index(b"IDAT")
    content[start + 40 : start + 80] = bytes(40)
    file.write_bytes(content)
    method, _ = caching.instances(experiment.runs([EXPERIMENT], [])[0])
    given = dict(train="data/shards/styled-images", batch_size=COUNT, tolerance=0.5)
    plain, data = StyledImages(**given), StyledImages(**given, cached="float16")
    for folder in caches():
        shutil.rmtree(folder)
    caching.cache(None, "", method, data)
    assert "000001.tar" not in caplog.text and "cannot be encoded" in caplog.text
    data._cache = encoded.find(data, method, "float16")
    batches = [next(iter(module.train_dataloader())) for module in (plain, data)]
    assert batches[0]["key"] == batches[1]["key"] and len(set(batches[0]["key"])) == COUNT - 1
    assert torch.equal(batches[0]["style"], batches[1]["style"])
    for folder in caches():
        shutil.rmtree(folder)
    with pytest.raises(encoded.ShardError, match="1 of 14 samples cannot be encoded"):
        caching.cache(None, "", method, StyledImages(**given | {"tolerance": 0.01}))


# -- shared work ------------------------------------------------------------------------------------------------------


def tars(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.tar")}


def test_array_tasks_add_up_to_the_same_bytes_and_go_on_after_a_signal(lit_gen, place, monkeypatch, capsys):
    (whole,) = caches("float16")
    expected = tars(whole)
    shutil.rmtree(whole)
    words = ("cache", "-c", EXPERIMENT, "--stage", "adapter", "--device", "cpu")

    def task(number):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(10 + number))
        return lit_gen(*words)

    for name, value in {"COUNT": 3, "MIN": 10, "MAX": 12, "STEP": 1}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert task(2) == 0 and task(1) == 0
    assert "2 of 4 shards are still to come" in capsys.readouterr().out and not whole.exists()

    encode, seen = StyleCrafter.encode_for_cache, []

    def interrupted(self, batch):
        seen.append(len(batch["caption"]))
        monkeypatch.setattr(interrupts, "received", 15)
        return encode(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(StyleCrafter, "encode_for_cache", interrupted)
        assert task(0) == interrupts.PAUSED and seen == [4]  # the shard it was at is finished
        assert not whole.exists()
    monkeypatch.setattr(interrupts, "received", None)
    seen.clear()
    monkeypatch.setattr(
        StyleCrafter, "encode_for_cache", lambda self, b: seen.append(len(b["caption"])) or encode(self, b)
    )
    assert task(0) == 0
    assert seen == [2] and tars(whole) == expected  # its second shard, the last of the set
    assert task(0) == 0 and task(1) == 0 and seen == [2]  # there is nothing left to do
    assert not list(whole.parent.glob(".*"))


def test_several_processes_of_one_task(place, capfd):
    (whole,) = caches("float16")
    expected = tars(whole)
    shutil.rmtree(whole)
    words = ["-c", EXPERIMENT, "--stage", "adapter", "--device", "cpu", "--workers", "2"]
    assert caching.main(words) == 0
    assert tars(whole) == expected
    out, err = capfd.readouterr()
    assert "14/14" in err and "sample/s" in err and "--stages.adapter.data.init_args.cached float16" in out
