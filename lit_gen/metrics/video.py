"""Does a video move as its prompt says, and steadily?"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_gen.metrics.oracle import MOVES_ITSELF, Oracle
from lit_gen.metrics.prompt import OracleMetric
from lit_gen.metrics.reading import VideoReading
from lit_gen.world.scene import Scenes


class MotionAccuracy(OracleMetric):
    """`motion`: share of videos whose motion class is right; `mover`: share of those with a moving object in which the
    right kind of object of the right colour moves; `still`: share read as standing still though they should move.

    Args:
        oracle: an oracle or the folder of one.
    """

    higher_is_better = True

    def __init__(self, oracle: Oracle | str = "data/oracle") -> None:
        super().__init__(oracle)
        for name in ("videos", "right", "movers", "right_mover", "moving", "read_still"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, videos: Tensor | VideoReading, scenes: Scenes) -> None:
        """videos: B F 3 H W in [-1, 1] or their reading; scenes: B scenes that the prompts describe."""
        reading = videos if isinstance(videos, VideoReading) else self.oracle(videos.device).read_video(videos)
        itself = torch.tensor(MOVES_ITSELF, device=scenes.motion.device)
        moving = itself[scenes.motion.clamp(min=0)] & (scenes.mover >= 0) & (scenes.motion >= 0)
        mover = scenes.mover.clamp(min=0)[:, None]
        same = reading.mover_is("kind") == scenes.kind.gather(1, mover).squeeze(1)
        ordinary = scenes.subject.gather(1, mover).squeeze(1) < 0
        same = same & ((reading.mover_is("colour") == scenes.colour.gather(1, mover).squeeze(1)) | ~ordinary)
        self.videos += len(scenes)
        self.right += (reading.motion == scenes.motion.clamp(min=0)).sum()
        self.movers += moving.sum()
        self.right_mover += (same & moving).sum()
        self.moving += (scenes.motion > 0).sum()
        self.read_still += ((reading.motion == 0) & (scenes.motion > 0)).sum()

    def compute(self) -> dict[str, Tensor]:
        return {
            "motion": self.right / self.videos,
            "mover": self.right_mover / self.movers.clamp(min=1),
            "still": self.read_still / self.moving.clamp(min=1),
        }


def flicker(video: Tensor) -> Tensor:
    """Mean |f[t-1] - 2 f[t] + f[t+1]| over pixels and frames: B F 3 H W in [-1, 1] to B. Steady motion costs little,
    a static picture nothing, independent noise most."""
    return (video[:, :-2] - 2 * video[:, 1:-1] + video[:, 2:]).abs().mean((1, 2, 3, 4))


class Flicker(Metric):
    """Mean `flicker` of videos; compare with that of real renders."""

    full_state_update = False
    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("videos", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, video: Tensor) -> None:
        """video: B F 3 H W in [-1, 1], at least 3 frames."""
        self.total += flicker(video.float()).sum()
        self.videos += len(video)

    def compute(self) -> Tensor:
        return self.total / self.videos
