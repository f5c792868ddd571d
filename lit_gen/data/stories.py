"""Long videos with many descriptions each: the samples that text-video retrieval trains on and is scored with.

Frames stay bytes until they are where they are encoded: as floats they are four times as much to carry there.

A sample has its frames as a video (or `npy`, F H W 3 bytes) and a `json`:

    {"id": 17, "captions": [{"level": "full", "text": "…"}, {"level": "partial-short", "text": "…"}, …]}

Exactly one caption, the paragraph of the whole video, has the level "full". Captions of the world also say what they
state ("states"), which events they are made from ("span"), in which "wording" they are and what they can be expanded by
("paraphrases"); "truth" then says what happens in the video.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from lit_gen.data.decode import VIDEO, encode_video
from lit_gen.data.frames import fitted
from lit_gen.data.module import Precision, Shards
from lit_gen.data.sets import SetFile
from lit_gen.data.shards import BadSample, ShardSet
from lit_gen.errors import ShardError

FULL = "full"
END_MARKS = (".", "!", "?")  # of a sentence
FRAMES = (*VIDEO, "npy")
_PER_LEVEL = 3  # tellings of a training video at every level but "full"
_RATE = 30  # frames a second of an ordinary video
_PARAPHRASES = 2  # of each description that is tested
_LOOKED_THROUGH = 2000  # samples whose ids `check` reads, in a second or so; training looks at all
_AT_ONCE = 16, 2**24  # videos, and pixels, rendered together

Captions = Literal["levels", "sentences"]


@dataclass
class StorySample:
    """A video and its paragraph, in training also K other captions of it; in evaluation all that is known of it."""

    frames: int | None  # F; None takes every frame
    size: int | None  # pixels, height and width; None keeps frames as they are
    training: bool
    captions: Captions = "levels"
    per_video: int = 1  # K
    owners: dict[int, str] = field(default_factory=dict)  # id -> sample, of those seen

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        story = check_story(sample.get("json"))
        _claim(self.owners, story["id"], sample["key"])
        paragraph = next(caption["text"] for caption in story["captions"] if caption["level"] == FULL)
        given = {"video_id": torch.tensor(story["id"]), "paragraph": paragraph, "key": sample["key"]}
        given |= self._seen(sample, rng)
        if not self.training:
            return given | {"story": story}
        if self.captions == "sentences":
            chosen = [{"level": "sentences", "text": some_sentences(paragraph, rng)} for _ in range(self.per_video)]
        else:
            chosen = [sample_caption(story["captions"], rng) for _ in range(self.per_video)]
        return given | {"captions": [c["text"] for c in chosen], "levels": [c["level"] for c in chosen]}

    def _seen(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        encoded = sample.get("safetensors")
        if encoded is not None:
            features = torch.from_numpy(encoded["frame_features"])  # F' D
            return {"frame_features": features[self._chosen(len(features), rng)]}
        clip = next((sample[extension] for extension in FRAMES if extension in sample), None)
        if clip is None:
            raise BadSample(f"it has no video ({', '.join(FRAMES)})")
        if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8 or not len(clip):
            raise BadSample(f"its frames are {clip.dtype} {clip.shape}, not bytes F H W 3")
        clip = clip[self._chosen(len(clip), rng)]
        clip = clip if self.size is None else fitted(clip, self.size)
        return {"video": torch.from_numpy(clip).movedim(-1, -3)}  # a view: only what is stacked need be copied

    def _chosen(self, count: int, rng: np.random.Generator) -> np.ndarray:
        if self.frames is None:
            return np.arange(count)
        return segment_frames(count, self.frames, rng if self.training else None)


def _claim(owners: dict[int, str], number: int, name: str) -> None:
    """ShardError where another sample has that id: the losses would take both for one video."""
    if (other := owners.setdefault(number, name)) != name:
        raise ShardError(f"{other} and {name} both have the id {number}; give each video its own in its json")


def require_own_ids(shards: ShardSet, most: int | None = None) -> None:
    """ShardError where two videos of a set have one id; of the first `most`, of all by default."""
    owners: dict[int, str] = {}
    for index in range(min(len(shards), most or len(shards))):
        try:
            name, members = shards.read(index, {"json"})
            _claim(owners, check_story(json.loads(members.get("json", b"null")))["id"], name)
        except (BadSample, ValueError):  # told, and counted, where the sample is used
            continue


def segment_frames(count: int, frames: int, rng: np.random.Generator | None) -> np.ndarray:
    """One frame of each of `frames` equal parts of a video of `count`: a random one, or the middle without `rng`.

    A video with fewer frames shows some of them several times. As COSA and Frozen-in-Time do.
    """
    edges = np.arange(frames + 1) * count // frames
    lengths = np.maximum(edges[1:] - edges[:-1], 1)
    within = rng.random(frames) * lengths if rng is not None else (lengths - 1) / 2
    return edges[:-1] + within.astype(int)


def sample_caption(captions: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
    """One caption that is not the paragraph: first an axis, then a level of it, then one of its captions.

    A video that has no other caption gives its paragraph.
    """
    from lit_gen.world.stories.tell import axis_of

    axes: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for caption in captions:
        if caption["level"] != FULL:
            axes.setdefault(axis_of(caption["level"]), {}).setdefault(caption["level"], []).append(caption)
    if not axes:
        return next(caption for caption in captions if caption["level"] == FULL)
    levels = axes[sorted(axes)[rng.integers(len(axes))]]
    found = levels[sorted(levels)[rng.integers(len(levels))]]
    return found[rng.integers(len(found))]


def some_sentences(paragraph: str, rng: np.random.Generator) -> str:
    """A paragraph with sentences left out at random: half of the time a run of neighbours stays, else any of them."""
    sentences = split_sentences(paragraph)
    keep = int(rng.integers(1, len(sentences) + 1))
    if rng.random() < 0.5:
        first = int(rng.integers(len(sentences) - keep + 1))
        return " ".join(sentences[first : first + keep])
    return " ".join(sentences[i] for i in sorted(rng.permutation(len(sentences))[:keep]))


def split_sentences(paragraph: str) -> list[str]:
    """ "One. Two! Three" -> ["One.", "Two!", "Three."]"""
    parts = re.split(r"(?<=[.!?])\s+", paragraph.strip())
    return [part if part[-1:] in END_MARKS else f"{part}." for part in parts]


def check_story(story: Any) -> dict[str, Any]:
    """The JSON of a sample. Raises BadSample where it is not as described above."""
    if not isinstance(story, dict) or type(story.get("id")) is not int:
        raise BadSample("its json has no whole number `id`")
    captions = story.get("captions")
    if not isinstance(captions, list) or not captions:
        raise BadSample("its json has no `captions`")
    for caption in captions:
        if not isinstance(caption, dict) or not all(isinstance(caption.get(key), str) for key in ("level", "text")):
            raise BadSample("a caption of its json lacks `level` or `text`")
        if not caption["text"].strip():
            raise BadSample(f"its caption at level {caption['level']} is empty")
    if sum(caption["level"] == FULL and "wording" not in caption for caption in captions) != 1:
        raise BadSample(f"its json does not have exactly one caption at level {FULL}")
    return story


class Stories(Shards):
    """Long videos with their paragraphs and captions.

    Training batches: {"video": B F 3 H W bytes or, where cached, "frame_features": B F D; "video_id": B; "paragraph":
    list of B; "captions" and "levels": lists of B lists of K; "key"}. Evaluation has "story" (B dicts, all captions)
    instead of "captions", and "valid": B bool.
    """

    kinds = ("stories",)
    extensions = {*FRAMES, "json"}
    encoded = set(FRAMES)
    caches = True

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        batch_size: int = 64,
        val_batch_size: int | None = None,
        frames: int | None = 18,
        size: int | None = None,
        captions: Captions = "levels",
        captions_per_video: int = 1,
        workers: int = 0,
        seed: int = 0,
        tolerance: float = 0.01,
        cached: Precision | None = None,
        cache_folder: str | None = None,
    ) -> None:
        """Long videos with descriptions.

        Args:
            train: set to train on.
            val: set to validate on; none skips validation.
            test: set for `test`.
            batch_size: videos per step and rank.
            val_batch_size: videos per evaluation step and rank, `batch_size` by default.
            frames: of a video, one of each of so many equal parts: a random one in training, else the middle; null for
                all, where all videos have equally many.
            size: pixels, height and width of a centre crop; by default frames stay as they are.
            captions: what a training step sees beside the paragraph: a caption of a random "levels", or random
                "sentences" of the paragraph itself (plain augmentation, without the synthetic captions).
            captions_per_video: such captions per video and step.
            workers: processes that decode; 0 decodes in the training process. Batches do not depend on it.
            seed: of the order of samples and of the random choices.
            tolerance: share of unreadable samples (replaced, counted and named) above which training stops.
            cached: encode all frames once, with the frozen frame encoder, and keep what it gave in this precision
                beside each set; done before training starts, by this process, or beforehand by `cache`.
            cache_folder: where caches are, by default beside the sets.
        """
        super().__init__(
            *(train, val, test, batch_size, val_batch_size, workers, seed, tolerance, cached, cache_folder)
        )
        self.frames, self.size, self.captions, self.captions_per_video = frames, size, captions, captions_per_video
        self._caches: dict[str, ShardSet] = {}

    def transform(self, shards: ShardSet, training: bool) -> StorySample:
        return StorySample(self.frames, self.size, training, self.captions, self.captions_per_video)

    def whole(self, shards: ShardSet) -> StorySample:
        return StorySample(None, self.size, training=False)

    def look_through(self, shards: ShardSet) -> None:
        require_own_ids(shards, _LOOKED_THROUGH)

    def preprocessing(self) -> dict[str, Any]:
        return {"size": self.size}

    def prepare_data(self) -> None:
        super().prepare_data()
        if not self.cached:
            return
        from lit_gen.data.cache import cache

        for part in self._parts().values():
            device = str(self.trainer.strategy.root_device)
            cache(None, "", self.trainer.lightning_module, part, self.cached, [device])

    def setup(self, stage: str) -> None:
        if self.cached:
            from lit_gen.data.encoded import find

            method = self.trainer.lightning_module
            self._caches = {split: find(part, method, self.cached) for split, part in self._parts().items()}

    def test_fingerprint(self) -> str:
        """What the frames of the test set depend on."""
        return f"{ShardSet.open(self.sources['test']).fingerprint} {self.size} {self.frames}"

    def cache_of(self, split: str) -> ShardSet | None:
        return self._caches.get(split)

    def _parts(self) -> dict[str, Stories]:
        """By split, this module with that split for its training set: caches are made of training sets."""
        from lit_gen.data.module import SPLITS_OF

        now = str(self.trainer.state.fn.value) if self.trainer and self.trainer.state.fn else ""
        parts = {}
        for split in SPLITS_OF.get(now, self.sources):
            if self.sources[split]:
                parts[split] = copy.copy(self)
                parts[split].sources = {"train": self.sources[split]}
        return parts


def rendered(description: SetFile, first: int, last: int, device: str) -> Iterator[dict[str, str | bytes]]:
    """Stories first … last - 1 of a set of the world; `frames` of its file are those of an event."""
    from lit_gen.world.stories.script import MOST, film, sample_script

    pixels_each = MOST * description.frames * description.size**2
    together, ordinary = max(1, min(_AT_ONCE[0], _AT_ONCE[1] // pixels_each)), description.mp4 == "ordinary"
    for start in range(first, last, together):
        numbers = range(start, min(start + together, last))
        scripts = [sample_script(description.split, description.seed, number) for number in numbers]
        videos = film(scripts, description.frames, description.size, device)
        for script, video in zip(scripts, videos, strict=True):
            pixels = (video.clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()
            captions = world_captions(script, description.split == "train")
            story = {"id": script.index, "captions": captions, "truth": script.truth}
            yield {
                "__key__": f"{script.index:08d}",
                "mp4": encode_video(pixels, _RATE, ordinary=True) if ordinary else encode_video(pixels),
                "txt": captions[0]["text"].encode(),
                "json": json.dumps(story, separators=(",", ":")).encode(),
            }


def world_captions(script: Any, training: bool) -> list[dict[str, Any]]:
    """The descriptions of a script, its paragraph first: for training several at each level, for tests one at each in
    every wording, with its paraphrases."""
    from lit_gen.world.stories.tell import LEVELS, WORDINGS, paraphrases, tell

    if training:
        rest = [tell(script, level, seed).plain() for level in LEVELS[1:] for seed in range(_PER_LEVEL)]
        return [tell(script, FULL).plain(), *rest]
    tellings = [tell(script, level, 0, wording) for wording in WORDINGS for level in LEVELS]
    return [
        t.plain() | {"paraphrases": paraphrases(t, _PARAPHRASES)} if t.wording == "seen" else t.plain()
        for t in tellings
    ]
