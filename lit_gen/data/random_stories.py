"""Random videos and words in the shape of real ones: what the speed of video-text training is measured on."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from lit_gen.data.random_batches import RandomData
from lit_gen.errors import at_least

_WORDS = (
    "a the red blue green ball cube cone jumps spins grows then first finally grass wood stone sand night fog".split()
)


class RandomStories(RandomData):
    """Batches like those of `Stories`: frames of noise (bytes), or features of frames.

    Args:
        batch_size: videos per step and rank.
        frames: of a video.
        pixels: height and width of a frame.
        features: width of a frame's features, in place of its pixels; null for pixels.
        paragraph_words: in a paragraph.
        caption_words: in a caption.
        batches: different batches, which take turns.
        seed: of the numbers; every rank has others.
    """

    def __init__(
        self,
        batch_size: int = 64,
        frames: int = 32,
        pixels: int = 224,
        features: int | None = None,
        paragraph_words: int = 60,
        caption_words: int = 15,
        batches: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(batches, seed)
        at_least(1, batch_size=batch_size, frames=frames, pixels=pixels, features=features)
        at_least(1, paragraph_words=paragraph_words, caption_words=caption_words)
        self.batch_size = batch_size
        self.shape = (batch_size, frames, features) if features else (batch_size, frames, 3, pixels, pixels)
        self.name = "frame_features" if features else "video"
        self.words = paragraph_words, caption_words

    def batch(self, generator: torch.Generator, rank: int) -> dict[str, Any]:
        device = generator.device
        seen: Tensor
        if self.name == "video":
            seen = torch.randint(256, self.shape, generator=generator, device=device, dtype=torch.uint8)
        else:
            seen = torch.rand(self.shape, generator=generator, device=device) * 2 - 1
        chance = random.Random(int(torch.randint(2**62, (), generator=generator, device=device)))
        paragraphs, captions = (
            [" ".join(chance.choices(_WORDS, k=words)) for _ in range(self.batch_size)] for words in self.words
        )
        ids = torch.arange(self.batch_size, device=device) + rank * self.batch_size
        told = {"paragraph": paragraphs, "captions": [[caption] for caption in captions]}
        return {self.name: seen, "video_id": ids, "key": [str(i) for i in ids.tolist()], **told}
