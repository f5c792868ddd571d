"""Is this the same subject, and is it where it should be?"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_gen.metrics.oracle import Oracle
from lit_gen.metrics.prompt import OracleMetric
from lit_gen.metrics.reading import Reading
from lit_gen.metrics.supervision import all_orders, arrange
from lit_gen.world.vocabulary import OBJECTS_PER_SCENE


def subject_embedding(reading: Reading) -> Tensor:
    """Embedding of the special object (the largest one where there is none or several): B 64, unit length."""
    area = reading.mask.sum((2, 3)).float() * reading.present
    slot = (area + 1e6 * (reading.special & reading.present)).argmax(1)
    return reading.embedding[torch.arange(len(slot), device=slot.device), slot]


class SubjectSimilarity(OracleMetric):
    """`similarity`: mean cosine between the subject's embedding in a picture and in its reference; `identity`: how
    often it is nearer to its own reference than to any distractor.

    Args:
        oracle: an oracle or the folder of one.
    """

    higher_is_better = True

    def __init__(self, oracle: Oracle | str = "data/oracle") -> None:
        super().__init__(oracle)
        self.add_state("similarity", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("identified", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("pictures", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(
        self, images: Tensor | Reading, references: Tensor | Reading, distractors: Tensor | Reading | None = None
    ) -> None:
        """images and their references: B 3 H W in [-1, 1], or readings. distractors: N pictures of other subjects; when
        None, the batch's other references, which must then show different subjects."""
        shown, own = (subject_embedding(self.read(x)) for x in (images, references))
        right = (shown * own).sum(-1)
        if distractors is None:
            others = (shown @ own.T).masked_fill(torch.eye(len(own), dtype=torch.bool, device=own.device), -1)
        else:
            others = shown @ subject_embedding(self.read(distractors)).T
        self.similarity += right.sum()
        self.identified += (right > others.amax(1)).sum()
        self.pictures += len(own)

    def compute(self) -> dict[str, Tensor]:
        return {"similarity": self.similarity / self.pictures, "identity": self.identified / self.pictures}


def mask_iou(reading: Reading, instance: Tensor) -> Tensor:
    """Intersection over union of read masks with an instance map (B 64 64: 0 background, k + 1 object k), in the best
    order of slots: B K, -1 where the map has no such object."""
    slots = torch.arange(1, OBJECTS_PER_SCENE + 1, device=instance.device)
    truth = (instance[:, None] == slots[:, None, None]).float().flatten(2)
    found = (reading.mask & reading.present[..., None, None]).float().flatten(2)
    both = torch.einsum("bqn,bkn->bqk", found, truth)
    either = found.sum(-1)[..., None] + truth.sum(-1)[:, None] - both
    iou = both / either.clamp(min=1)  # B Q K
    orders = all_orders(instance.device)
    total = sum(iou[:, orders[:, k], k] for k in range(OBJECTS_PER_SCENE))  # B 6
    chosen = arrange(iou, orders[total.argmax(1)]).diagonal(dim1=1, dim2=2)
    return chosen.where(truth.sum(-1) > 0, torch.full_like(chosen, -1))


class MaskIoU(OracleMetric):
    """Mean intersection over union of the objects' masks with true instance maps.

    Args:
        oracle: an oracle or the folder of one.
        smallest: objects of fewer pixels do not count.
    """

    higher_is_better = True

    def __init__(self, oracle: Oracle | str = "data/oracle", smallest: int = 1) -> None:
        super().__init__(oracle)
        self.smallest = smallest
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("objects", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, images: Tensor | Reading, instance: Tensor) -> None:
        """images: B 3 H W in [-1, 1] or their reading; instance: B 64 64."""
        iou = mask_iou(self.read(images), instance)
        pixels = torch.stack([(instance == k + 1).sum((1, 2)) for k in range(OBJECTS_PER_SCENE)], 1)
        valid = (iou >= 0) & (pixels >= self.smallest)
        self.total += (iou * valid).sum()
        self.objects += valid.sum()

    def compute(self) -> Tensor:
        return self.total / self.objects
