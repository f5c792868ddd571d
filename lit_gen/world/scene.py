"""A batch of scenes as tensors: a pure function of (recipe, split, seed, index).

World units are metres, z is up and the floor is z = 0. A camera at azimuth 0 stands at -y and looks along +y with
+x to its right; azimuth grows towards +x (anticlockwise seen from above). Fronts of objects with yaw 0 face -y.
Letters: B scenes, K = 3 object slots, P style parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class Scenes:
    """Attributes of B scenes; indices refer to `vocabulary`, -1 means absent or unsaid."""

    index: Tensor  # B, the argument the scene is a function of
    kind: Tensor  # B K, into KINDS; absent objects are -1 and come last
    colour: Tensor  # B K, into COLOURS
    pattern: Tensor  # B K, into PATTERNS
    size: Tensor  # B K, into SIZES
    radius: Tensor  # B K, half the object's nominal height, metres
    marked: Tensor  # B K bool, a painted bullseye on the front
    subject: Tensor  # B K, id of a unique texture, -1 for an ordinary object
    position: Tensor  # B K 3, the lowest point of the object's axis, metres
    yaw: Tensor  # B K, radians about z
    relation: Tensor  # B K, into RELATIONS: object k stands in this relation to object `anchor`
    anchor: Tensor  # B K, object slot the relation refers to, -1 for none
    floor: Tensor  # B, into FLOORS; "backdrop" is a seamless plain background
    backdrop: Tensor  # B 3, RGB of the seamless background in 0..1
    time: Tensor  # B, into TIMES
    azimuth: Tensor  # B, radians
    elevation: Tensor  # B, radians above the horizon
    distance: Tensor  # B, camera to target, metres
    fov: Tensor  # B, full vertical field of view, radians
    target: Tensor  # B 3, point the camera looks at, metres
    view: Tensor  # B, into VIEWS where the view of object 0 is unambiguous, else -1
    style: Tensor  # B, into STYLES; -1 for a continuous style that has no name
    style_parameters: Tensor  # B P, see styles.STYLE_PARAMETERS, each in 0..1
    normals: Tensor  # B bool, the picture is a normal map
    motion: Tensor  # B, into MOTIONS
    mover: Tensor  # B, object slot that moves
    speed: Tensor  # B, strength of the motion, 1 = ordinary

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: slice | Tensor) -> Scenes:
        """Select scenes by a slice, a boolean mask or indices."""
        return Scenes(**{f.name: getattr(self, f.name)[item] for f in fields(self)})

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def replace(self, **changes: Tensor) -> Scenes:
        """The same scenes with some attributes changed, e.g. the same layout at night."""
        return replace(self, **changes)

    @staticmethod
    def cat(parts: list[Scenes]) -> Scenes:
        return Scenes(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Scenes)})
