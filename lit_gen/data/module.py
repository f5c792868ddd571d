"""Lightning data modules: batches of images, videos, and style pairs from sets of shards.

A set is named by its set file (`data/x.yaml`, built when missing), by a folder with an index.json, or by a brace
pattern or glob of tars. Pictures are float in [-1, 1].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L

from lit_gen import interrupts
from lit_gen.data import images, videos
from lit_gen.data.decode import IMAGE
from lit_gen.data.images import ImageSample
from lit_gen.data.loader import ShardLoader, Transform
from lit_gen.data.mixed import MixedLoader
from lit_gen.data.shards import ShardSet
from lit_gen.data.split import Paused
from lit_gen.data.styled import Rules, StyleSample, rules_of
from lit_gen.data.videos import VideoSample
from lit_gen.errors import ShardError, UserError, at_least

Precision = Literal["float16", "float32"]

# What each verb reads, so that nothing else is built for it.
SPLITS_OF = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class Shards(L.LightningDataModule):
    """What all data modules share: building, opening and splitting sets over ranks; kinds of samples subclass it."""

    kinds: tuple[str, ...] = ()  # of sets that have the samples
    extensions: set[str] = set()  # of members that are read
    encoded: set[str] = set()  # of those that a cache stands for
    caches = False  # whether `prepare_data` makes the caches that are missing

    def __init__(
        self,
        train: str | None,
        val: str | None,
        test: str | None,
        batch_size: int,
        val_batch_size: int | None,
        workers: int,
        seed: int,
        tolerance: float,
        cached: Precision | None = None,
        cache_folder: str | None = None,
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size, val_batch_size=val_batch_size)
        at_least(0, workers=workers, tolerance=tolerance, seed=seed)
        self.sources = {"train": train, "val": val, "test": test}
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.workers, self.seed, self.tolerance = workers, seed, tolerance
        self.cached, self.cache_folder = cached, cache_folder
        self._cache: ShardSet | None = None

    def transform(self, shards: ShardSet, training: bool) -> Transform:
        """What a sample of these shards is made of."""
        raise NotImplementedError

    def preprocessing(self) -> dict[str, Any]:
        """Settings that change what a sample's encodings are; those of random choices do not."""
        raise NotImplementedError

    def look_through(self, shards: ShardSet) -> None:
        """What `check` asks of a set besides single samples; ShardError where something is wrong."""

    def whole(self, shards: ShardSet) -> Transform:
        """What a sample is encoded from for the cache: all that training may see of it but random views."""
        return self.transform(shards, training=False)

    def prepare_data(self) -> None:
        now = str(self.trainer.state.fn.value) if self.trainer and self.trainer.state.fn else ""
        for split in SPLITS_OF.get(now, self.sources):
            source = self.sources[split]
            if source and Path(source).suffix in (".yaml", ".yml"):
                from lit_gen.data.build import build

                try:
                    build(source)
                except Paused:
                    raise SystemExit(interrupts.PAUSED) from None

    def setup(self, stage: str) -> None:
        if self.cached and stage == "fit":  # now, while the encoders' weights are what they were loaded as
            from lit_gen.data.encoded import find

            self._cache = find(self, self.trainer.lightning_module, self.cached)

    def cache_of(self, split: str) -> ShardSet | None:
        """What the samples of a split are encoded to, where that is read instead of encoding."""
        return self._cache if split == "train" else None

    def train_dataloader(self) -> ShardLoader:
        return self.loader("train", self.batch_size)

    def val_dataloader(self) -> ShardLoader | list:
        return self.loader("val", self.val_batch_size) if self.sources["val"] else []

    def test_dataloader(self) -> ShardLoader | list:
        return self.loader("test", self.val_batch_size) if self.sources["test"] else []

    def predict_dataloader(self) -> ShardLoader | list:
        return self.test_dataloader()

    def loader(self, split: str, batch_size: int) -> ShardLoader:
        """Batches of this rank's share of a split; only "train" is shuffled and endless."""
        source = self.sources[split]
        if source is None:
            raise ShardError(f"{type(self).__name__} has no {split} set: name one with data.init_args.{split}")
        shards = ShardSet.open(source)
        if shards.kind and shards.kind not in self.kinds:
            raise ShardError(
                f"{source} is a set of {shards.kind}; {type(self).__name__} reads {' or '.join(self.kinds)}"
            )
        trainer, extensions = self.trainer, self.extensions
        if (cache := self.cache_of(split)) is not None:
            from lit_gen.data.encoded import EncodedSet

            shards, extensions = EncodedSet.of(shards, cache), self.extensions - self.encoded
        return ShardLoader(
            shards,
            self.transform(shards, split == "train"),
            extensions,
            batch_size,
            shuffle=split == "train",
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
            workers=self.workers,
            tolerance=self.tolerance,
        )


class Images(Shards):
    """Batches {"image": B 3 H W, "caption", "key", "facts": lists of B}; evaluation adds "valid": B bool."""

    kinds = ("images", "style")
    extensions = images.EXTENSIONS
    encoded = set(IMAGE)

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        batch_size: int = 16,
        val_batch_size: int | None = None,
        size: int | None = None,
        workers: int = 0,
        seed: int = 0,
        tolerance: float = 0.01,
        cached: Precision | None = None,
        cache_folder: str | None = None,
    ) -> None:
        """Images with captions.

        Args:
            train: set to train on.
            val: set to validate on; none skips validation.
            test: set for `test` and `predict`.
            batch_size: samples per step and rank.
            val_batch_size: samples per evaluation step and rank, `batch_size` by default.
            size: pixels, height and width of a centre crop; by default pictures stay as they are.
            workers: processes that decode; 0 decodes in the training process. Batches do not depend on it.
            seed: of the order of samples.
            tolerance: share of unreadable samples (replaced, counted and named) above which training stops.
            cached: train from what `python -m lit_gen cache` stored in this precision, instead of encoding each step.
            cache_folder: where caches are, by default beside the training set.
        """
        super().__init__(
            *(train, val, test, batch_size, val_batch_size, workers, seed, tolerance, cached, cache_folder)
        )
        at_least(1, size=size)
        self.size = size

    def transform(self, shards: ShardSet, training: bool) -> ImageSample:
        return ImageSample(self.size)

    def preprocessing(self) -> dict[str, Any]:
        return {"size": self.size}


class Videos(Shards):
    """Batches {"video": B F 3 H W, "caption", "key", "facts": lists of B}; evaluation adds "valid": B bool."""

    kinds = ("videos",)
    extensions = videos.EXTENSIONS

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        batch_size: int = 4,
        val_batch_size: int | None = None,
        size: int | tuple[int, int] | None = None,
        frames: int | None = None,
        stride: int = 1,
        workers: int = 0,
        seed: int = 0,
        tolerance: float = 0.01,
        cached: Precision | None = None,
        cache_folder: str | None = None,
    ) -> None:
        """Videos with captions.

        Args:
            train: set to train on.
            val: set to validate on; none skips validation.
            test: set for `test` and `predict`.
            batch_size: clips per step and rank.
            val_batch_size: clips per evaluation step and rank, `batch_size` by default.
            size: pixels of a centre crop, the side of a square or [height, width]; by default frames stay as they are.
            frames: frames per clip, from a random place of longer videos (the middle in evaluation); all by default.
            stride: take every so many frames of the file.
            workers: processes that decode; 0 decodes in the training process. Batches do not depend on it.
            seed: of the order of samples and of the places clips are taken from.
            tolerance: share of unreadable samples (replaced, counted and named) above which training stops.
            cached: train from what `python -m lit_gen cache` stored in this precision, instead of encoding each step.
            cache_folder: where caches are, by default beside the training set.
        """
        super().__init__(
            *(train, val, test, batch_size, val_batch_size, workers, seed, tolerance, cached, cache_folder)
        )
        at_least(1, size=size if isinstance(size, int | None) else min(size), frames=frames, stride=stride)
        self.size, self.frames, self.stride = size, frames, stride

    def transform(self, shards: ShardSet, training: bool) -> VideoSample:
        stored = shards.description.get("frames")
        return VideoSample(self.size, self.frames, self.stride, random_start=training, stored=stored)

    def preprocessing(self) -> dict[str, Any]:
        # a list, as it comes back from a file
        return {"size": list(self.size) if isinstance(self.size, tuple) else self.size}

    def whole(self, shards: ShardSet) -> VideoSample:
        return VideoSample(self.size, stored=shards.description.get("frames"))


class StyledImages(Shards):
    """Batches as Images, plus "style": B 3 H W, a reference view, and "style_parameters": B P where they are known."""

    kinds = ("style", "images")
    extensions = images.EXTENSIONS

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        batch_size: int = 16,
        val_batch_size: int | None = None,
        size: int = 64,
        zoom: float = 800 / 512,
        strip_style: bool | Rules = "careful",
        workers: int = 0,
        seed: int = 0,
        tolerance: float = 0.01,
        cached: Precision | None = None,
        cache_folder: str | None = None,
    ) -> None:
        """Style references with the pictures they come from (StyleCrafter §4).

        Args:
            train: set to train on.
            val: set to validate on; none skips validation.
            test: set for `test` and `predict`.
            batch_size: samples per step and rank.
            val_batch_size: samples per evaluation step and rank, `batch_size` by default.
            size: pixels, height and width of target (centre crop) and reference (random crop).
            zoom: short side of the picture that the reference is cropped from, in units of `size`, in the paper 800 of
                512; 1 makes the reference the target itself (the paper's ablation without decoupling).
            strip_style: by which rules words that tell the style are removed from captions: those of the "paper", which
                also take content with them ("a room with a view of the sea" becomes "the sea"), "careful" ones or
                "none"; true and false are the latter two.
            workers: processes that decode; 0 decodes in the training process. Batches do not depend on it.
            seed: of the order of samples and of the random crops.
            tolerance: share of unreadable samples (replaced, counted and named) above which training stops.
            cached: train from what `python -m lit_gen cache` stored in this precision, instead of encoding each step.
            cache_folder: where caches are, by default beside the training set.
        """
        super().__init__(
            *(train, val, test, batch_size, val_batch_size, workers, seed, tolerance, cached, cache_folder)
        )
        at_least(1, size=size, zoom=zoom)
        self.size, self.zoom, self.strip_style = size, zoom, rules_of(strip_style)

    def transform(self, shards: ShardSet, training: bool) -> StyleSample:
        return StyleSample(self.size, self.zoom, self.strip_style)

    def preprocessing(self) -> dict[str, Any]:
        return {"size": self.size, "strip_style": self.strip_style}


class ImagesAndVideos(L.LightningDataModule):
    """Steps of image batches (keys as `images` gives them) among steps of video batches; validation is of videos."""

    def __init__(
        self, images: Images | StyledImages, videos: Videos, image_probability: float = 0.2, seed: int = 0
    ) -> None:
        """Mix two sets; each step is of one kind, the same on every rank.

        Args:
            images: data module of the images.
            videos: data module of the videos.
            image_probability: share of steps that are image batches; 0.2 is StyleCrafter's (paper, stage 2).
            seed: of the choice.
        """
        super().__init__()
        if not 0 <= image_probability < 1:
            raise UserError(f"`image_probability` must be at least 0 and below 1, not {image_probability}")
        self.images, self.videos, self.image_probability, self.seed = images, videos, image_probability, seed

    def prepare_data(self) -> None:
        self.images.prepare_data()
        self.videos.prepare_data()

    def setup(self, stage: str) -> None:
        self.images.trainer = self.videos.trainer = self.trainer
        self.images.setup(stage)
        self.videos.setup(stage)

    def train_dataloader(self) -> MixedLoader:
        loaders = self.images.train_dataloader(), self.videos.train_dataloader()
        return MixedLoader(*loaders, self.image_probability, self.seed)

    def val_dataloader(self) -> ShardLoader | list:
        return self.videos.val_dataloader()

    def test_dataloader(self) -> ShardLoader | list:
        return self.videos.test_dataloader()

    def predict_dataloader(self) -> ShardLoader | list:
        return self.videos.predict_dataloader()
