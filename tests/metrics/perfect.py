"""Readings that say exactly what scenes hold, with the slots in any order."""

import torch

from lit_gen.metrics.reading import Reading
from lit_gen.metrics.supervision import BENEATH, relations
from lit_gen.world.scene import Scenes


def perfect_reading(scenes: Scenes, order: torch.Tensor) -> Reading:
    """The reading of `scenes` with object k in slot order[:, k] (B K)."""
    b, k = scenes.kind.shape
    rows = torch.arange(b)[:, None]
    inverse = order.argsort(1)  # object of each slot

    def shuffled(value):
        return value[rows, inverse].clone()

    known = relations(scenes)[rows[..., None], inverse[:, :, None], inverse[:, None]]
    probability = torch.nn.functional.one_hot(known.clamp(min=0), 6).float()
    probability[..., -1] = ((known != BENEATH) & (known != 4)).float()  # next to: neither is stacked on the other
    masks = torch.zeros(b, k, 64, 64, dtype=torch.bool)
    return Reading(
        present=shuffled(scenes.kind >= 0),
        kind=shuffled(scenes.kind.clamp(min=0)),
        colour=shuffled(scenes.colour),
        pattern=shuffled(scenes.pattern),
        size=shuffled(scenes.size),
        marked=shuffled(scenes.marked),
        special=shuffled(scenes.subject >= 0),
        facing=torch.zeros(b, k),
        facing_certainty=torch.ones(b, k),
        box=torch.zeros(b, k, 4),
        mask=masks,
        embedding=torch.nn.functional.normalize(torch.randn(b, k, 64), dim=-1),
        relation=probability,
        style=scenes.style.clone(),
        style_parameters=scenes.style_parameters.clone(),
        time=scenes.time.clone(),
        floor=scenes.floor.clone(),
        view=scenes.view.clone(),
        elevation=scenes.elevation.clone(),
        normals=scenes.normals.clone(),
    )


def random_order(b: int) -> torch.Tensor:
    return torch.stack([torch.randperm(3) for _ in range(b)])
