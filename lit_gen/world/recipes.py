"""What kinds of scenes there are and in which proportions each recipe mixes them.

A `Layout` is one way of arranging objects and camera; a `Recipe` is a mixture of layouts with styles, times of day and
perhaps motion. `sampling.sample` turns a recipe's name into scenes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lit_gen.world.vocabulary import MOTIONS, TIMES


@dataclass(frozen=True)
class Layout:
    """One arrangement of objects, place and camera. Numbers are probabilities unless a unit is given."""

    objects: tuple[float, float, float] = (1.0, 0.0, 0.0)  # of one, two and three objects
    camera: str = "front"  # "front": |azimuth| <= 20 degrees; "round": anywhere; "view": where a view word is plain
    elevation: tuple[float, float] = (10.0, 35.0)  # degrees
    relations: str = "facing"  # "facing": all of them; "round": those that hold from everywhere; "film": in front of
    backdrop: float = 0.0  # a seamless background instead of a floor
    marked: float = 0.0  # object 0 carries the painted bullseye (where its kind allows)
    compound: float = 0.12  # an object is a compound one
    subject: float = 0.0  # object 0 has a texture of its own
    normals: float = 0.0  # the picture is a normal map
    styled: float = 1.0  # times the recipe's share of styles
    moving: bool = False  # object 0 moves; room is left for it


LAYOUTS = {
    "turntable": Layout(camera="round", elevation=(-10, 80), backdrop=1, marked=0.4, compound=0.22, styled=0.7),
    "view": Layout(camera="view", backdrop=1, marked=1, compound=0, styled=0.4),
    "cluster": Layout(
        objects=(0, 1, 0), camera="round", elevation=(10, 50), relations="round", backdrop=1, marked=0.1, styled=0.7
    ),
    "walkaround": Layout(camera="round", elevation=(8, 40), marked=0.25, compound=0.25),
    "single": Layout(backdrop=0.25, marked=0.15, compound=0.25),
    "pair": Layout(objects=(0, 1, 0), elevation=(12, 35), backdrop=0.25),
    "triple": Layout(objects=(0, 0, 1), elevation=(20, 35), backdrop=0.15),
    "subject": Layout(objects=(0.75, 0.25, 0), backdrop=0.25, compound=0, subject=1, styled=0.3),
    "normal": Layout(camera="round", elevation=(-10, 80), backdrop=1, marked=0, compound=0.25, normals=1, styled=0),
    "film": Layout(
        objects=(0.65, 0.35, 0), elevation=(12, 30), relations="film", backdrop=0.2, marked=0.15, moving=True
    ),
    "event": Layout(objects=(0.65, 0.35, 0), elevation=(12, 30), relations="film", marked=0.15, styled=0, moving=True),
}


@dataclass(frozen=True)
class Recipe:
    """A mixture of layouts, and what is drawn the same way in all of them."""

    layouts: dict[str, float]  # weight of each layout
    named: float = 0.0  # share of pictures in one of the named styles
    continuous: float = 0.0  # share of pictures in a style without a name
    times: tuple[float, float, float] = (0.72, 0.16, 0.12)  # day, night, fog where there is a floor and no style
    motions: tuple[str, ...] = MOTIONS  # of what moves, one as often as the other
    # How many consecutive indices share a "layout" (all but the time), a "place" (floor, time, camera) or a "subject".
    shared: dict[str, int] = field(default_factory=dict)


EVENT_CLIPS = 8  # clips that one place has room for
_FRONT = {"single": 0.35, "pair": 0.43, "triple": 0.22}

RECIPES = {
    "base": Recipe(
        layouts={
            "turntable": 0.17,
            "view": 0.12,
            "cluster": 0.07,
            "walkaround": 0.05,
            "single": 0.08,
            "pair": 0.28,
            "triple": 0.13,
            "subject": 0.06,
            "normal": 0.04,
        },
        named=0.26,
        continuous=0.26,
        times=(0.5, 0.27, 0.23),
    ),
    "photo": Recipe({"turntable": 0.2, "walkaround": 0.1, "single": 0.2, "pair": 0.3, "triple": 0.2}),
    "styled": Recipe(_FRONT, continuous=1),
    "named": Recipe(_FRONT, named=1),
    "objects": Recipe({"turntable": 1}),
    "views": Recipe({"view": 1}),
    "pairs": Recipe({"pair": 1}),
    "times": Recipe({"walkaround": 0.2, "single": 0.3, "pair": 0.35, "triple": 0.15}, shared={"layout": len(TIMES)}),
    "subjects": Recipe({"subject": 1}, shared={"subject": 8}),
    "motion": Recipe({"film": 1}, times=(0.84, 0.08, 0.08)),
    "sideways-motion": Recipe({"film": 1}, times=(0.84, 0.08, 0.08), motions=("moves left", "moves right")),
    "styled-motion": Recipe({"film": 1}, continuous=1),
    "events": Recipe({"event": 1}, shared={"place": EVENT_CLIPS}),
    "normals": Recipe({"normal": 1}),
}
