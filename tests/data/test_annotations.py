"""Annotated long videos become stories; captions are written by a local model, checked, and continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_gen.data.annotations import Annotated, pack_stories, read_annotations
from lit_gen.data.decode import encode_video, read_video
from lit_gen.data.describe import REQUESTS, Work, Writer, describe, plan, refusal
from lit_gen.data.frames import read_frames
from lit_gen.data.shards import ShardSet
from lit_gen.errors import ShardError, UserError

Command = Callable[..., int]
SENTENCES = ["A man lifts a box", " He puts it down. ", "", "The box breaks!"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three videos, one as frames; grey tells which is which."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, name in enumerate(("abc", "def")):
        pixels = np.full((20, 24, 32, 3), 40 + 60 * number, np.uint8)
        (videos / f"{name}.mp4").write_bytes(encode_video(pixels))
    (videos / "ghi").mkdir()
    for i in range(5):
        Image.new("RGB", (32, 24), (200 + i,) * 3).save(videos / "ghi" / f"{i:03d}.png")
    annotations = {
        f"v_{name}": {"duration": 9.0, "timestamps": [[4, 5], [1, 2], [0, 9], [6, 7]], "sentences": SENTENCES}
        for name in ("abc", "def", "ghi")
    }
    (tmp_path / "anet.json").write_text(json.dumps(annotations))
    rows = [{"video": "v_def", "level": "full-short", "text": "man breaks box"}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def stories(folder: Path) -> list[tuple[dict, np.ndarray]]:
    shards = ShardSet.open(folder)
    found = [shards.read(i, {"json", "mp4"})[1] for i in range(len(shards))]
    return [(json.loads(members["json"]), read_video(members["mp4"])) for members in found]


def test_a_paragraph_is_all_segments_in_order_of_time() -> None:
    one = Annotated("a", ["A man lifts a box", "He puts it down.", "The box breaks!"])
    assert one.paragraph == "A man lifts a box. He puts it down. The box breaks!"
    spans = {tuple(part["span"]): part["text"] for part in one.partials()}
    assert set(spans) == {(0, 1), (1, 2), (2, 3), (0, 2), (1, 3)}
    assert spans[1, 3] == "He puts it down. The box breaks!"


def test_files_frames_and_captions_are_packed_together(lit_gen: Command, corpus: Path) -> None:
    words = ["--videos", corpus / "videos", "--captions", corpus / "captions.jsonl", "--frames", 6, "--size", 16]
    assert lit_gen("data", "pack-stories", corpus / "anet.json", "--out", corpus / "set", *words) == 0
    found = stories(corpus / "set")
    for number, (story, pixels) in enumerate(found):
        assert story["id"] == number and story["video"] == f"v_{['abc', 'def', 'ghi'][number]}"
        assert pixels.shape == (6, 16, 20, 3) and abs(int(pixels.mean()) - (40, 100, 202)[number]) < 4
        assert story["captions"][0]["text"] == "He puts it down. A man lifts a box. The box breaks!"
        shorts = [c["text"] for c in story["captions"] if c["level"] == "full-short"]
        assert shorts == (["man breaks box"] if number == 1 else [])
    assert lit_gen("data", "pack-stories", corpus / "anet.json", "--out", corpus / "set", *words) == 2  # is there


def test_missing_and_broken_videos_are_named_and_counted(
    corpus: Path, caplog: pytest.LogCaptureFixture, lit_gen: Command
) -> None:
    (corpus / "videos" / "abc.mp4").write_bytes(b"")
    (corpus / "videos" / "def.mp4").unlink()
    with pytest.raises(ShardError, match=r"1 of 3 annotated videos are not in .* v_def; raise --tolerance"):
        pack_stories(corpus / "anet.json", corpus / "videos", corpus / "set")
    with pytest.raises(ShardError, match="1 of 2 videos cannot be read"):
        pack_stories(corpus / "anet.json", corpus / "videos", corpus / "set", tolerance=0.4)
    pack_stories(corpus / "anet.json", corpus / "videos", corpus / "set2", tolerance=0.7, frames=4)
    assert [story["id"] for story, _ in stories(corpus / "set2")] == [2]  # as when nothing is missing
    assert "abc.mp4 left out" in caplog.text and "v_def is annotated but not in" in caplog.text


def test_a_video_that_was_repaired_is_packed(corpus: Path) -> None:
    video = corpus / "videos" / "def.mp4"
    whole = video.read_bytes()
    video.write_bytes(b"cut off")
    for _ in range(2):
        with pytest.raises(ShardError, match="1 of 3 videos cannot be read"):
            pack_stories(corpus / "anet.json", corpus / "videos", corpus / "set", frames=4)
    video.write_bytes(whole)
    pack_stories(corpus / "anet.json", corpus / "videos", corpus / "set", frames=4)
    assert len(stories(corpus / "set")) == 3
    assert not list(corpus.glob(".set*"))  # nor is anything left of the attempts that failed


def test_frames_are_stored_ready(lit_gen: Command, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    """From annotations and from a set of mp4: the same pixels that the loader would make of the videos."""
    from lit_gen.data.stories import Stories

    words = ("data", "pack-stories", corpus / "anet.json", "--videos", corpus / "videos", "--frames")
    assert lit_gen(*words, 5, "--size", 16, "--store", "npy", "--out", corpus / "ready") == 0
    assert lit_gen(*words, 0, "--size", 0, "--out", corpus / "mp4", "--samples-per-shard", 2) == 0
    again = ("data", "pack-stories", corpus / "mp4", "--out", corpus / "again", "--frames", 5, "--size", 16)
    assert lit_gen(*again, "--store", "npy") == 0
    found = {}
    for name in ("ready", "mp4", "again"):
        data = Stories(test=str(corpus / name), batch_size=3, frames=5, size=16)
        found[name] = next(iter(data.test_dataloader()))
    for name in ("ready", "again"):
        shards = ShardSet.open(corpus / name)
        assert set(shards.read(1, {"mp4", "npy", "json", "txt"})[1]) == {"npy", "json", "txt"}
        assert list(found[name]["story"]) == list(found["mp4"]["story"])
        apart = (found[name]["video"].int() - found["mp4"]["video"].int()).abs()
        assert apart[:2].max() == 0 and apart[2].max() <= 3  # "ghi" is pictures, which an mp4 is only nearly
    assert lit_gen(*again) == 2 and "exists already" in capsys.readouterr().err
    assert lit_gen("data", "pack-stories", corpus / "mp4", "--out", "x", "--videos", corpus / "videos") == 2
    assert "has its videos and captions already" in capsys.readouterr().err
    assert lit_gen("data", "pack-stories", corpus / "anet.json", "--out", "x") == 2
    assert "with --videos" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text,message",
    [
        ('{"a": {"sentences": ["x"]}, "a": {"sentences": ["y"]}}', "a is there twice"),
        ('[{"video": "a", "sentences": ["x"]}, {"video": "a", "sentences": ["y"]}]', "a is annotated twice"),
        ('{"a": {"sentences": ["x"], "timestamps": []}, "b": {}}', "b has neither `sentences`"),
        ('{"a": {"sentences": ["x", "y"], "timestamps": [[0, 1]]}}', "2 sentences but 1 timestamps"),
        ('[{"video": "../a", "sentences": ["x"]}]', "no `video`, the plain name"),
        ('{"a": {"sentences": [" "]}}', "no video has a sentence"),
        ("[1]", "0 is no object"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_annotations_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ShardError, match=message):
        read_annotations(tmp_path / "a.json")


def test_captions_of_unknown_videos_and_empty_ones_are_refused(corpus: Path) -> None:
    for row, message in (
        ({"video": "zzz", "level": "full-short", "text": "x"}, r"jsonl:1: a caption of zzz, which the annotations"),
        ({"video": "v_abc", "level": "full-short", "text": " "}, "an empty caption"),
        ({"video": "v_abc", "level": "full-shrt", "text": "x"}, "no level `full-shrt`, did you mean `full-short`"),
        ({"video": ["v_abc"], "level": "full-short", "text": "x"}, "must be texts"),
        ({"video": "v_abc", "text": "x"}, "not an object with"),
    ):
        (corpus / "captions.jsonl").write_text(json.dumps(row))
        with pytest.raises(ShardError, match=message):
            pack_stories(corpus / "anet.json", corpus / "videos", corpus / "s", [str(corpus / "captions.jsonl")])


def test_few_frames_of_a_long_video(tmp_path: Path) -> None:
    pixels = np.broadcast_to((10 * np.arange(20))[:, None, None, None], (20, 16, 16, 3)).astype(np.uint8)
    (tmp_path / "a.mp4").write_bytes(encode_video(np.ascontiguousarray(pixels)))
    found = read_frames(tmp_path / "a.mp4", 4)
    assert np.abs(found.mean((1, 2, 3)) - [20, 70, 120, 170]).max() < 4
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_frames(b"", 4)


# -- captions by a model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of some thousand random weights with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["<end>", "<unk>", *"a man lifts box he puts it down the breaks small large video".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), **sizes, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def annotated() -> list[Annotated]:
    return [Annotated(name, ["A man lifts a box.", "He puts it down.", "The box breaks."]) for name in ("a", "b")]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_every_level_is_written_or_refused_and_a_killed_run_continues(model: Path, tmp_path: Path) -> None:
    writer, out = Writer(model), tmp_path / "captions.jsonl"
    written, refused = describe(annotated(), writer, out, batch_size=5, attempts=2)
    kept, log = lines(out), lines(tmp_path / "captions.refused.jsonl")
    assert len(kept) == written and len(log) == refused and written + refused == 2 * 2 * len(REQUESTS)
    by_name = {work.name: work for work in plan(annotated())}
    assert all(refusal(row["text"], by_name[row["video"], row["level"]]) is None for row in kept)
    for row in log:
        work = by_name[row["video"], row["level"]]
        assert row["reason"] in (refusal(row["text"], work), refusal(row["text"], work, whole=False))
    whole = out.read_bytes() + (tmp_path / "captions.refused.jsonl").read_bytes()
    # Cut off in the middle of a line, as by a kill; the rest is written again, the same.
    longer = out if len(kept) >= len(log) else tmp_path / "captions.refused.jsonl"
    longer.write_bytes(longer.read_bytes()[:-20])
    describe(annotated(), writer, out, batch_size=5, attempts=2)
    again = out.read_bytes() + (tmp_path / "captions.refused.jsonl").read_bytes()
    assert sorted(again.splitlines()) == sorted(whole.splitlines())
    assert describe(annotated(), writer, out) == (0, 0)
    written, refused = describe(annotated(), writer, out, attempts=1, again=True)
    assert written + refused == len(log) and len(lines(tmp_path / "captions.refused.jsonl")) == refused
    out.write_text('{"video": "a"}\n')
    with pytest.raises(UserError, match=r"captions.jsonl:1: not an object with `video` and `level`"):
        describe(annotated(), writer, out)


def test_answers_that_do_not_stop_and_other_models_are_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer, out = Writer(model), tmp_path / "captions.jsonl"
    row = {"video": "a", "level": "full-short", "text": "x"}
    out.write_text(json.dumps(row) + "\n")
    with caplog.at_level("WARNING"):
        describe([], writer, out)
    assert "does not tell whose captions it has" in caplog.text
    described = writer.fingerprint()
    said = iter([[[5, 6, 7]], [[5, 0, 0]], [[5, 6]]])  # at most three tokens; 0 ends an answer
    monkeypatch.setattr(
        writer.model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor(next(said))], 1)
    )
    assert [writer.answer(["a man"], 3, 0, greedy=True)[0].whole for _ in range(3)] == [False, True, True]
    writer.model.lm_head.weight.data.neg_()
    assert writer.fingerprint() != described
    with pytest.raises(UserError, match=r"has the captions of another model \(.*model0\); choose another --out"):
        describe([], writer, out)


def test_answers_are_checked() -> None:
    source = "A man lifts a box. He puts it down. The box breaks."
    short, plain = Work("a", "full-short", source), Work("a", "full-elementary", source)
    assert refusal("man breaks a box", short) is None
    assert refusal("man breaks a box", short, whole=False) == "cut off, as long as answers may be"
    assert refusal("a man lifts a box", short) == "a copy of one sentence of the description"
    assert refusal("", short) == "empty"
    assert refusal("man " * 11, short) == "11 words, not 2 to 10"
    assert refusal("Sure! man breaks box", short) == refusal("man\nbox", short) == "not the text alone"
    assert refusal(source.lower(), plain) == "a copy of the description"
    assert refusal("A box.", plain) == "2 words, not 5 to 46"


def test_the_command_says_what_is_wrong(lit_gen: Command, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    words = ("data", "describe", corpus / "anet.json", "--out", corpus / "c.jsonl", "--model")
    assert lit_gen(*words, corpus / "nothing") == 2
    assert "no such folder" in capsys.readouterr().err
    assert lit_gen(*words, corpus / "videos") == 2
    assert "no language model" in capsys.readouterr().err
