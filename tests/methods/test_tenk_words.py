"""10k Words end to end on a tiny base, its losses, its towers, and the search of a folder."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lit_gen.data.decode import encode_video
from lit_gen.errors import UserError
from lit_gen.methods.base import Optimizer
from lit_gen.methods.tenk_words import Objective, TenKWords
from lit_gen.metrics.scores import read
from lit_gen.retrieval.ranking import rank
from lit_gen.retrieval.towers import FrameEncoder, LoRA, Size, TemporalPooling, TextEncoder, TextTower, VideoTower

Command = Callable[..., int]
FILE = "experiments/tenk_words.yaml"
PLAIN = Objective(projected=0, text_to_text=0)


def method(base: Path, objective: Objective = Objective(), **more: Any) -> TenKWords:
    torch.manual_seed(0)
    settings = {
        "video_tower": VideoTower(width=16, layers=1, heads=2, dropout=0.0),
        "text_tower": TextTower(max_tokens=64),
        "aligned": False,
        "width": 16,
    } | more
    parts = (str(base / name) for name in ("image_encoder", "text_encoder", "tokenizer"))
    return TenKWords(*parts, objective=objective, **settings)


def batch(count: int = 6, per_video: int = 1) -> dict[str, Any]:
    """Videos of plain colours, told by number."""
    words = "red green blue white black yellow orange purple".split()
    generator = torch.Generator().manual_seed(1)
    colours = torch.rand(count, 1, 3, 1, 1, generator=generator) * 2 - 1
    return {
        "video": colours.expand(-1, 3, -1, 16, 16).contiguous(),
        "video_id": torch.arange(count) + 7,
        "paragraph": [f"a {words[i]} ball jumps then a {words[i]} cube spins" for i in range(count)],
        "captions": [[f"{words[i]} ball {'again ' * k}" for k in range(per_video)] for i in range(count)],
        "key": [str(i) for i in range(count)],
    }


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective,names,projects",
    [
        (Objective("paragraph", projected=0, text_to_text=0), {"itc"}, False),
        (PLAIN, {"itc"}, False),
        (Objective(), {"itc", "proj", "t2t"}, True),
        (Objective("blend", text_to_text=0), {"itc", "proj"}, True),
        (Objective(projected=0, text_to_text=0, multi_positive=True), {"itc"}, False),
    ],
    ids=["domain", "10k words", "ours", "blend", "multi-positive"],
)
def test_every_objective_trains_all_it_has(
    tiny_base: Path, objective: Objective, names: set[str], projects: bool
) -> None:
    model = method(tiny_base, objective)
    losses = model.losses(batch())
    assert losses.keys() == names
    sum(losses.values()).backward()
    assert (model.projection is not None) == projects
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert all("token_embedding" in n or "k_proj.bias" in n or "in_proj" in n for n in without), without
    assert all(p.grad is None for p in model.frame_encoder.parameters())


def test_mixing_only_paragraphs_is_the_baseline(tiny_base: Path) -> None:
    domain = method(tiny_base, Objective("paragraph", projected=0, text_to_text=0)).losses(batch())["itc"]
    for mix in ("choose", "blend"):
        mixed = method(tiny_base, Objective(mix, paragraph=1.0)).losses(batch())["itc"]
        torch.testing.assert_close(mixed, domain)
    captions = method(tiny_base, Objective("choose", paragraph=0.0, projected=0, text_to_text=0)).losses(batch())["itc"]
    told = batch() | {"paragraph": [group[0] for group in batch()["captions"]]}
    as_paragraphs = method(tiny_base, Objective("paragraph", projected=0, text_to_text=0)).losses(told)["itc"]
    torch.testing.assert_close(captions, as_paragraphs)


def test_the_control_gives_videos_the_captions_of_others(tiny_base: Path) -> None:
    how = {"mix": "choose", "paragraph": 0.0, "projected": 0, "text_to_text": 0}
    exchanged = method(tiny_base, Objective(**how, exchanged=True)).losses(batch())["itc"]
    moved = batch()
    moved["captions"] = moved["captions"][1:] + moved["captions"][:1]
    torch.testing.assert_close(exchanged, method(tiny_base, Objective(**how)).losses(moved)["itc"])


def test_several_captions_need_several_positives(tiny_base: Path) -> None:
    with pytest.raises(UserError, match="captions_per_video above 1 needs objective.multi_positive"):
        method(tiny_base, PLAIN).losses(batch(per_video=2))
    losses = method(tiny_base, Objective(projected=0, text_to_text=0, multi_positive=True)).losses(batch(per_video=2))
    assert losses["itc"].isfinite()
    with pytest.raises(UserError, match='query_head "projected" needs'):
        method(tiny_base, PLAIN, query_head="projected")


def test_training_finds_the_videos_by_their_captions(tiny_base: Path) -> None:
    model = method(tiny_base, Objective()).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(), lr=3e-3)
    told = batch()
    told |= model.encode_for_cache(told)
    for _ in range(80):
        loss = sum(model.losses(told).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        videos = torch.nn.functional.normalize(model.embed_videos(told), dim=-1)
        for texts in (told["paragraph"], [group[0] for group in told["captions"]]):
            assert rank(model.embed_queries(texts), videos, torch.arange(6)).recall(1).mean() == 1
    assert model.scale <= 100


def test_the_temperature_stays_in_its_bounds(tiny_base: Path) -> None:
    model = method(tiny_base)
    assert model.scale.item() == pytest.approx(1 / 0.07)
    model.log_scale.data.fill_(9.0)
    assert model.scale.item() == pytest.approx(100)


def test_the_temperature_learns_at_a_rate_of_its_own(tiny_base: Path) -> None:
    settings = Optimizer(lr=1e-3, weight_decay=0.1)
    model = method(tiny_base, PLAIN, temperature_rate=20.0, optimizer=settings).train()
    groups = model.parameter_groups()
    trained = [p for group in groups for p in group["params"]]
    assert len(trained) == len(set(trained)) == len(model.trainable_parameters())
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    before = model.log_scale.item()
    model.losses(batch())["itc"].backward()
    optimizer.step()
    assert abs(model.log_scale.item() - before) == pytest.approx(0.02, rel=0.01)  # AdamW's first step is lr long


def test_queries_are_scored_through_both_heads(tiny_base: Path) -> None:
    model = method(tiny_base, Objective()).eval()
    texts = ["a red ball", "a blue cube"]
    plain = F.normalize(model.embed_texts(texts), dim=-1)
    torch.testing.assert_close(model.embed_queries(texts), plain.detach())
    through = F.normalize(model.projection(model.embed_texts(texts)), dim=-1).detach()
    torch.testing.assert_close(model.embed_queries(texts, "projected"), through)
    other = method(tiny_base, Objective(), query_head="projected").eval()
    torch.testing.assert_close(other.embed_queries(texts), through)


# -- towers -----------------------------------------------------------------------------------------------------------


def test_texts_are_the_same_alone_and_among_longer_ones(tiny_base: Path) -> None:
    tower = TextEncoder(str(tiny_base / "text_encoder"), str(tiny_base / "tokenizer"), TextTower(max_tokens=64)).eval()
    texts = ["a red ball " * (1 + i % 7) for i in range(70)]  # more than are encoded together
    together = tower(texts)
    for i in (0, 6, 33, 69):
        torch.testing.assert_close(together[i], tower([texts[i]])[0], rtol=1e-4, atol=1e-5)


def test_more_positions_leave_short_texts_as_they_were(tiny_base: Path) -> None:
    folders = str(tiny_base / "text_encoder"), str(tiny_base / "tokenizer")
    short, long = (TextEncoder(*folders, TextTower(max_tokens=n)).eval() for n in (40, 80))
    torch.testing.assert_close(short(["a red ball"]), long(["a red ball"]))
    words = "a ball " * 30
    assert short.cuts(words) and not short.cuts("a ball") and not long.cuts(words)
    ids = short.tokens([words])["input_ids"][0]
    assert len(ids) == 40 and ids[-1] == short.tokenizer.eos_token_id
    assert long([words]).isfinite().all()


def test_bert_is_read_at_its_first_token(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=1300, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path / "bert")
    tower = TextEncoder(str(tmp_path / "bert"), str(tiny_base / "tokenizer"), TextTower(max_tokens=48)).eval()
    assert len(tower.tokens(["a ball " * 40])["input_ids"][0]) == 48
    found = tower(["a red ball", "a ball " * 22])
    torch.testing.assert_close(found[0], tower(["a red ball"])[0])
    tower(["a ball"]).sum().backward()
    assert all(p.grad is not None for p in tower.parameters())  # nothing that DDP would wait for


def test_adapters_train_and_the_towers_stay(tiny_base: Path) -> None:
    model = method(
        tiny_base,
        video_tower=VideoTower(lora=LoRA(rank=2), pooling="mean", cells=2),
        text_tower=TextTower(lora=LoRA(rank=2)),
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    towers = {n for n in trained if n.startswith(("frame_encoder", "text_encoder"))}
    assert towers and all("lora_" in n for n in towers)
    assert not any("base_layer" in name for name in model.state_dict())
    sum(model.losses(batch()).values()).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)
    with pytest.raises(UserError, match="trains its frame_encoder"):
        from lit_gen.data.encoded import description
        from lit_gen.data.shards import ShardSet
        from lit_gen.data.stories import Stories

        description(Stories(), model, ShardSet("x", [_shard()], "f"), "float16")


def _shard() -> Any:
    from lit_gen.data.shards import Shard

    return Shard(Path("x"), 1)


def test_it_starts_as_the_image_text_model_that_its_encoders_are(tiny_base: Path) -> None:
    """As CLIP says of each frame, averaged; what a trained pooling adds comes on top of that."""
    from lit_gen.metrics.clip import CLIPEncoders

    model, clip = method(tiny_base, aligned=True, width=None).eval(), CLIPEncoders(tiny_base)
    frames = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        video = model.embed_videos({"video": frames})
        size = clip.vision.config.image_size
        pixels = torch.nn.functional.interpolate(frames.flatten(0, 1), (size, size), mode="bicubic", antialias=True)
        pixels = ((pixels + 1) / 2 - clip.mean) / clip.std
        expected = clip.vision(pixel_values=pixels).image_embeds.unflatten(0, (2, 3)).mean(1)
    torch.testing.assert_close(video, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.embed_queries(["a red ball"]), clip.embed_text(["a red ball"]), rtol=1e-4, atol=1e-5
    )
    model.losses(batch())["itc"].backward()
    assert model.video_head.project.weight.grad.any()
    with pytest.raises(UserError, match="share no space"):
        method(tiny_base, aligned=True, width=17)


def test_bytes_are_the_pixels_that_they_stand_for(tiny_base: Path) -> None:
    from lit_gen.data.images import to_tensor

    model = method(tiny_base, video_tower=VideoTower(cells=2)).eval()
    pixels = np.random.default_rng(0).integers(256, size=(2, 3, 20, 20, 3), dtype=np.uint8)
    carried = torch.from_numpy(pixels).movedim(-1, -3)
    found = model.encode_for_cache({"video": carried})["frame_features"]
    assert torch.equal(found, model.encode_for_cache({"video": to_tensor(pixels)})["frame_features"])
    assert torch.equal(model.embed_videos({"video": carried}), model.embed_videos({"video": to_tensor(pixels)}))


def test_frames_and_time(tiny_base: Path) -> None:
    tower = FrameEncoder(str(tiny_base / "image_encoder"), VideoTower(cells=2, frames_at_once=2))
    frames = torch.rand(5, 3, 16, 16) * 2 - 1
    features = tower(frames)
    whole = FrameEncoder(str(tiny_base / "image_encoder"), VideoTower(cells=2))
    torch.testing.assert_close(features, whole(frames))
    assert features.shape == (5, tower.width) and not features.requires_grad
    with pytest.raises(UserError, match="cells is 3, which does not divide"):
        FrameEncoder(str(tiny_base / "image_encoder"), VideoTower(cells=3))
    torch.manual_seed(0)
    pool = TemporalPooling(tower.width, VideoTower(width=16, layers=1, heads=2)).eval()
    clip = features.detach()[None]
    assert not torch.allclose(pool(clip), pool(clip.flip(1)), atol=1e-4)  # it knows what came first
    mean = TemporalPooling(tower.width, VideoTower(pooling="mean"))
    torch.testing.assert_close(mean(clip), mean(clip.flip(1)))
    assert not list(mean.parameters())


def test_towers_with_random_weights_and_folders_that_are_none(tiny_base: Path, tmp_path: Path) -> None:
    small = Size(16, 1, 2, image_size=32)
    tower = FrameEncoder(None, VideoTower(frozen=False, checkpointing=True, untrained=small)).train()
    tower(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for n, p in tower.named_parameters() if "layers" in n)
    text = TextEncoder(None, str(tiny_base / "tokenizer"), TextTower(max_tokens=20, untrained=small))
    assert text(["a ball"]).shape == (1, 16)
    for make in (
        lambda: FrameEncoder(str(tmp_path), VideoTower()),
        lambda: FrameEncoder(None, VideoTower()),
        lambda: TextEncoder(str(tmp_path), str(tiny_base / "tokenizer"), TextTower()),
        lambda: TextEncoder(None, None, TextTower()),
    ):
        with pytest.raises(UserError):
            make()


def test_several_processes_do_not_share_an_index(tiny_base: Path) -> None:
    model = method(tiny_base, folders=["."])
    model._trainer = SimpleNamespace(world_size=2)
    with pytest.raises(UserError, match="one index, which 2 processes would overwrite.*--trainer.devices 1"):
        model.predict_dataloader()


# -- end to end -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(universe: Path) -> Path:
    """A working directory with a run of two steps."""
    from lit_gen import cli, interrupts, stage

    patch = pytest.MonkeyPatch()
    patch.setattr(cli, "launch", stage.main)
    patch.setattr(interrupts, "install", lambda: None)
    patch.setattr(interrupts, "leave_at_once", lambda: None)
    patch.chdir(universe)
    try:
        assert cli.main(["fit", "-c", FILE, "--smoke", "--trainer.accelerator", "cpu"]) == 0
        yield universe
    finally:
        patch.undo()


RUN = Path("runs/smoke/tenk_words")
WORDS = ("-c", FILE, "--smoke", "--trainer.accelerator", "cpu", "--trainer.limit_test_batches", "null")


def test_testing_scores_every_level_and_keeps_the_features(
    lit_gen: Command, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    built = {path.name.partition(".")[0] for path in Path("data/shards").glob("stories*")}
    assert built == {"stories-val"} and list(Path("data/shards").glob("stories-val.cache-*"))
    assert lit_gen("test", *WORDS) == 0
    scores = read(RUN)
    assert len(scores["R@1 full"]) == len(scores["R@1 of ceiling mean of short"]) == 8
    assert {"R@1 mean of all unseen words", "R@1 expanded mean of all", "cut off full-university"} <= scores.keys()
    assert {"R@1 projected mean of short", "fitting first mean of short"} <= scores.keys()
    figures = json.loads((RUN / "metrics.json").read_text())["test"]
    assert figures["test/full/R@10"] == 1 and 0 < figures["test/full-short/ceiling"] <= 1
    levels = [v for k, v in figures.items() if k.endswith("/R@1") and "mean" not in k and "unseen" not in k]
    assert len(levels) == 14 and figures["test/mean of all/R@1"] == pytest.approx(sum(levels) / 14)
    before = (RUN / "scores.json").read_text()
    with monkeypatch.context() as kept:
        kept.setattr(TenKWords, "embed_videos", lambda *_: pytest.fail("a video was encoded again"))
        kept.setattr(TenKWords, "embed_texts", lambda *_: pytest.fail("a text was encoded again"))
        assert lit_gen("test", *WORDS) == 0
    assert (RUN / "scores.json").read_text() == before
    with monkeypatch.context() as changed:  # other frames are other features
        called = []
        original = TenKWords.embed_videos
        changed.setattr(TenKWords, "embed_videos", lambda *a: called.append(1) or original(*a))
        assert lit_gen("test", *WORDS, "--data.init_args.frames", "6") == 0
        assert called


def test_cached_features_give_the_same_losses(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_gen.data.cache import cache
    from lit_gen.data.encoded import find
    from lit_gen.data.stories import Stories

    monkeypatch.chdir(trained)
    model = method(trained / "data/world-base", PLAIN, video_tower=VideoTower(cells=2, pooling="mean"))
    data = Stories("data/stories-val.yaml", batch_size=4, frames=5, cached="float32")
    plain = next(iter(data.train_dataloader()))
    cache(None, "", model, data, "float32", ["cpu"])
    data._caches = {"train": find(data, model, "float32")}
    cached = next(iter(data.train_dataloader()))
    assert "video" not in cached and cached["captions"] == plain["captions"] and cached["key"] == plain["key"]
    torch.testing.assert_close(model.embed_videos(cached), model.embed_videos(plain), rtol=1e-4, atol=1e-5)


def test_a_folder_is_indexed_once_and_searched_with_words(
    lit_gen: Command,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(trained)
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(3):
        pixels = np.full((7, 24, 32, 3), 60 * i, np.uint8)
        (folder / f"clip-{i}.mp4").write_bytes(encode_video(pixels))
    (folder / "broken.mp4").write_bytes(b"nothing")
    words = ("predict", *WORDS, "--trainer.limit_predict_batches", "null", "--folder", folder)
    asked = ("--prompt", "a red ball jumps", "--prompt", "night", "--model.init_args.top", "2")
    with caplog.at_level(logging.WARNING):
        assert lit_gen(*words, *asked) == 0
    assert "3 videos in the index" in (out := capsys.readouterr().out) and "1 cannot be read" in out
    assert "broken.mp4 left out" in caplog.text
    (folder / "clip-0.mp4").rename(tmp_path / "kept")
    (folder / "clip-0.mp4").write_bytes(b"broken since")
    assert lit_gen(*words, *asked) == 0
    assert "2 videos in the index" in (out := capsys.readouterr().out) and "2 cannot be read" in out
    (tmp_path / "kept").replace(folder / "clip-0.mp4")
    assert lit_gen(*words, *asked) == 0 and "3 videos in the index" in capsys.readouterr().out
    answers = (RUN / "samples/predict/answers.csv").read_text().splitlines()
    assert len(answers) == 5 and answers[1].startswith("a red ball jumps,1,") and "clip-" in answers[1]
    with Image.open(RUN / "samples/predict/answers.png") as sheet:
        assert sheet.width > 3 * 128
    (folder / "broken.mp4").unlink()
    counted = []
    original = TenKWords.embed_videos
    monkeypatch.setattr(TenKWords, "embed_videos", lambda *a: counted.append(1) or original(*a))
    assert lit_gen(*words, *asked) == 0 and not counted  # all of it is in the index
    assert (RUN / "samples/predict/answers.csv").read_text().splitlines() == answers
    os.utime(folder / "clip-1.mp4", (1, 1))
    shutil.copy(folder / "clip-2.mp4", folder / "clip-3.mp4")
    assert lit_gen(*words, *asked) == 0 and len(counted) == 2  # the one that changed, and the new one
    assert lit_gen(*words, *asked, "--model.init_args.frames", "2") == 0 and len(counted) == 6  # other features
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_bytes(b"nothing")
    assert lit_gen(*words[:-1], tmp_path / "bad", *asked) == 2
    assert "none of the 1 videos can be read" in capsys.readouterr().err
    assert lit_gen(*words, *asked, "--model.init_args.frames", "2") == 0 and len(counted) == 6  # which stays known
    capsys.readouterr()
    assert lit_gen(*words, "--prompt", " ") == 2 and "is empty" in capsys.readouterr().err
    assert lit_gen("predict", *WORDS, "--folder", "nowhere") == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert lit_gen("predict", *WORDS) == 2 and "--folder FOLDER" in capsys.readouterr().err
