"""Does a generated picture show its prompt? torchmetrics over the oracle's readings and the scenes of the prompts."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_gen.metrics.agreement import ATTRIBUTES, as_stated, compare
from lit_gen.metrics.oracle import Oracle, bundled
from lit_gen.metrics.reading import Reading
from lit_gen.world.grammar import Caption
from lit_gen.world.scene import Scenes


class OracleMetric(Metric):
    """A metric that reads pictures.

    Args:
        oracle: an oracle or the folder of one. It is shared, not copied, and is no part of the metric's state.
    """

    full_state_update = False

    def __init__(self, oracle: Oracle | str = "data/oracle") -> None:
        super().__init__()
        # A function, so that the oracle is not registered: it must not enter checkpoints, and clones share it.
        self._load = (lambda: bundled(oracle)) if isinstance(oracle, str) else (lambda: oracle)

    def oracle(self, device: torch.device) -> Oracle:
        """The oracle, on `device`."""
        return self._load().to(device)

    def read(self, images: Tensor | Reading) -> Reading:
        """Read images (B 3 H W in [-1, 1]); readings pass through, so that several metrics can share one."""
        return images if isinstance(images, Reading) else self.oracle(images.device).read(images)


class PromptAccuracy(OracleMetric):
    """Accuracy of every attribute of the prompts' scenes: shape, colour, pattern, marked, relation (per object), count,
    view, style, photo, time, normals, all (per picture). Attributes that never counted are left out.

    Args:
        oracle: an oracle or the folder of one.
        attributes: those to report; all by default.
    """

    higher_is_better = True

    def __init__(self, oracle: Oracle | str = "data/oracle", attributes: tuple[str, ...] = ATTRIBUTES) -> None:
        super().__init__(oracle)
        self.attributes = tuple(attributes)
        self.add_state("right", torch.zeros(len(ATTRIBUTES)), dist_reduce_fx="sum")
        self.add_state("counted", torch.zeros(len(ATTRIBUTES)), dist_reduce_fx="sum")

    def update(self, images: Tensor | Reading, scenes: Scenes, captions: list[Caption] | None = None) -> None:
        """images: B 3 H W in [-1, 1] or their reading; scenes: B scenes that the prompts describe; captions: the B
        prompts, where only what they say shall count."""
        scenes = scenes if captions is None else as_stated(scenes, captions)
        agreement = compare(self.read(images), scenes)
        self.right += torch.stack([(agreement.right[n] & agreement.counted[n]).sum() for n in ATTRIBUTES])
        self.counted += torch.stack([agreement.counted[n].sum() for n in ATTRIBUTES])

    def compute(self) -> dict[str, Tensor]:
        share = self.right / self.counted
        return {
            name: share[i] for i, name in enumerate(ATTRIBUTES) if name in self.attributes and bool(self.counted[i] > 0)
        }


class ContentAccuracy(OracleMetric):
    """Share of the objects' attributes and relations that are as the prompt says, whatever the style.

    Args:
        oracle: an oracle or the folder of one.
        attributes: what counts as content.
    """

    higher_is_better = True

    def __init__(
        self,
        oracle: Oracle | str = "data/oracle",
        attributes: tuple[str, ...] = ("shape", "colour", "pattern", "relation"),
    ) -> None:
        super().__init__(oracle)
        self.attributes = tuple(attributes)
        self.add_state("right", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("counted", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, images: Tensor | Reading, scenes: Scenes) -> None:
        """images: B 3 H W in [-1, 1] or their reading; scenes: B scenes that the prompts describe."""
        agreement = compare(self.read(images), scenes)
        for name in self.attributes:
            self.right += (agreement.right[name] & agreement.counted[name]).sum()
            self.counted += agreement.counted[name].sum()

    def compute(self) -> Tensor:
        return self.right / self.counted


class LeakRate(OracleMetric):
    """How often a picture shows the kind of object of its style reference instead of its prompt's.

    Counted are pairs whose prompt does not contain the reference's first object."""

    higher_is_better = False

    def __init__(self, oracle: Oracle | str = "data/oracle") -> None:
        super().__init__(oracle)
        self.add_state("leaked", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("counted", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, images: Tensor | Reading, scenes: Scenes, references: Scenes) -> None:
        """images: B 3 H W in [-1, 1] or their reading; scenes of the prompts and of the style references."""
        reading, foreign = self.read(images), references.kind[:, :1]
        fair = (scenes.kind != foreign).all(1)
        shown = ((reading.kind == foreign) & reading.present).any(1)
        self.leaked += (shown & fair).sum()
        self.counted += fair.sum()

    def compute(self) -> Tensor:
        return self.leaked / self.counted
