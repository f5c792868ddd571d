"""The encoders of frames and texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_gen.errors import UserError
from lit_gen.retrieval.towers import FrameEncoder, Size, TemporalPooling, TextEncoder, TextTower, VideoTower


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
