"""10k Words: its losses, and its encoders within it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lit_gen.data.encoded import fingerprint
from lit_gen.errors import UserError
from lit_gen.methods.base import Optimizer
from lit_gen.methods.tenk_words import Objective, TenKWords
from lit_gen.retrieval.ranking import rank
from lit_gen.retrieval.towers import LoRA, TextTower, VideoTower

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


def test_features_are_kept_apart_by_what_is_no_weight(tiny_base: Path) -> None:
    def told(cells: int, mean: float | None = None) -> str:
        encoder = method(tiny_base, video_tower=VideoTower(cells=cells)).frame_encoder
        if mean is not None:
            encoder.normalisation = ([mean] * 3, encoder.normalisation[1])
        return fingerprint(encoder)

    assert len({told(0), told(2), told(2, 0.1)}) == 3
