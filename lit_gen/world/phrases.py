"""The wordings the grammar chooses from: one phrase book per register.

Every list holds paraphrases of one meaning, the most usual first; `{}` takes what the phrase is about.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_gen.world.vocabulary import COLOURS, KINDS, PATTERNS, RELATIONS, SIZES


def _same(words: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {word: (word,) for word in words}


@dataclass(frozen=True)
class PhraseBook:
    """Wordings of every attribute in one register; keys are the words of `vocabulary`."""

    kind: dict[str, tuple[str, ...]]
    colour: dict[str, tuple[str, ...]]
    pattern: dict[str, tuple[str, ...]]
    size: dict[str, tuple[str, ...]]
    relation: dict[str, tuple[str, ...]]
    floor: dict[str, tuple[str, ...]]
    time: dict[str, tuple[str, ...]]
    view: dict[str, tuple[str, ...]]
    motion: dict[str, tuple[str, ...]]
    marked: tuple[str, ...] = ("with a painted spot",)
    subject: tuple[str, ...] = ("special",)
    stands: tuple[str, ...] = ("",)  # between an object and its relation
    joints: tuple[str, str, str] = ("first", "then", "finally")  # before the first, middle and last of several events


STANDARD = PhraseBook(
    kind=_same(KINDS),
    colour=_same(COLOURS),
    pattern=_same(PATTERNS),
    size=_same(SIZES),
    relation={
        "left of": ("left of", "to the left of"),
        "right of": ("right of", "to the right of"),
        "behind": ("behind",),
        "in front of": ("in front of",),
        "on top of": ("on top of",),
        "next to": ("next to", "beside"),
    },
    floor={
        "grass": ("on grass", "on the grass"),
        "wood": ("on wood", "on a wooden floor"),
        "stone": ("on stone", "on a stone floor"),
        "sand": ("on sand", "on the sand"),
        "backdrop": ("on a plain background",),
    },
    time={"day": ("by day",), "night": ("at night",), "fog": ("in fog", "in the fog")},
    view={
        "front": ("front view", "seen from the front"),
        "side": ("side view", "seen from the side"),
        "back": ("back view", "seen from the back"),
        "above": ("seen from above", "view from above"),
    },
    motion={
        "stays still": ("{} stays still", "{} does not move"),
        "moves left": ("{} moves left", "{} moves to the left"),
        "moves right": ("{} moves right", "{} moves to the right"),
        "jumps": ("{} jumps", "{} jumps up and down"),
        "spins": ("{} spins", "{} spins around"),
        "grows": ("{} grows", "{} grows larger"),
        "shrinks": ("{} shrinks", "{} shrinks smaller"),
        "is circled": ("{} is circled", "{} is circled by the camera"),
    },
)

ELEMENTARY = PhraseBook(
    kind={
        **_same(KINDS),
        "cube": ("box", "block"),
        "cylinder": ("can", "tube"),
        "cone": ("party hat", "cone"),
        "ring": ("hoop", "donut"),
        "dumbbell": ("weight",),
    },
    colour=_same(COLOURS),
    pattern={"plain": ("plain",), "striped": ("stripy",), "checkered": ("checked",), "dotted": ("dotty",)},
    size={"small": ("little",), "large": ("big",)},
    relation={**_same(RELATIONS), "on top of": ("on",), "next to": ("by",)},
    floor={
        "grass": ("on the grass",),
        "wood": ("on the wood",),
        "stone": ("on the rock",),
        "sand": ("on the sand",),
        "backdrop": ("with nothing around",),
    },
    time={"day": ("in the day",), "night": ("in the dark",), "fog": ("in the mist",)},
    view={
        "front": ("we see its front",),
        "side": ("we see its side",),
        "back": ("we see its back",),
        "above": ("we look down at it",),
    },
    motion={
        "stays still": ("{} does nothing",),
        "moves left": ("{} goes left",),
        "moves right": ("{} goes right",),
        "jumps": ("{} hops",),
        "spins": ("{} turns around",),
        "grows": ("{} gets bigger",),
        "shrinks": ("{} gets smaller",),
        "is circled": ("{} is what we walk around",),
    },
    marked=("with a dot on it",),
    subject=("funny",),
    stands=("sitting",),
    joints=("first,", "then", "at the end,"),
)

INTERMEDIATE = PhraseBook(
    kind={**_same(KINDS), "cylinder": ("cylinder", "drum"), "ring": ("ring", "loop")},
    colour={**_same(COLOURS), "purple": ("violet",)},
    pattern={"plain": ("plain",), "striped": ("banded",), "checkered": ("chequered",), "dotted": ("spotted",)},
    size={"small": ("smaller",), "large": ("larger",)},
    relation={
        "left of": ("on the left side of",),
        "right of": ("on the right side of",),
        "behind": ("at the back of",),
        "in front of": ("ahead of",),
        "on top of": ("upon",),
        "next to": ("close to", "near"),
    },
    floor={
        "grass": ("on a lawn",),
        "wood": ("on wooden boards",),
        "stone": ("on paving stones",),
        "sand": ("on a sandy beach",),
        "backdrop": ("against an empty background",),
    },
    time={"day": ("in daylight",), "night": ("during the night",), "fog": ("in foggy weather",)},
    view={
        "front": ("viewed from the front",),
        "side": ("viewed from one side",),
        "back": ("viewed from the rear",),
        "above": ("viewed from overhead",),
    },
    motion={
        "stays still": ("{} remains still",),
        "moves left": ("{} travels towards the left",),
        "moves right": ("{} travels towards the right",),
        "jumps": ("{} leaps into the air",),
        "spins": ("{} rotates",),
        "grows": ("{} becomes larger",),
        "shrinks": ("{} becomes smaller",),
        "is circled": ("{} is filmed from all around",),
    },
    marked=("with a target painted on it",),
    subject=("peculiar",),
    stands=("standing",),
    joints=("to begin with,", "after that,", "finally,"),
)

UNIVERSITY = PhraseBook(
    kind={
        "ball": ("sphere", "orb"),
        "cube": ("cuboid", "hexahedron"),
        "cylinder": ("cylindrical solid",),
        "cone": ("conical solid",),
        "ring": ("torus", "annulus"),
        "snowman": ("snow figure",),
        "house": ("dwelling", "residence"),
        "mushroom": ("fungus", "toadstool"),
        "dumbbell": ("barbell",),
        "rocket": ("spacecraft", "missile"),
    },
    colour={
        "red": ("crimson", "scarlet"),
        "orange": ("amber",),
        "yellow": ("golden",),
        "green": ("emerald", "verdant"),
        "blue": ("azure", "cobalt"),
        "purple": ("mauve",),
        "white": ("ivory",),
        "black": ("ebony",),
    },
    pattern={
        "plain": ("unadorned",),
        "striped": ("striated",),
        "checkered": ("tessellated",),
        "dotted": ("speckled", "stippled"),
    },
    size={"small": ("diminutive",), "large": ("substantial",)},
    relation={
        "left of": ("to the sinistral side of",),
        "right of": ("to the dextral side of",),
        "behind": ("to the rear of",),
        "in front of": ("anterior to",),
        "on top of": ("superimposed on", "surmounting"),
        "next to": ("adjacent to", "adjoining"),
    },
    floor={
        "grass": ("upon verdure",),
        "wood": ("upon timber flooring",),
        "stone": ("upon masonry",),
        "sand": ("upon arid terrain",),
        "backdrop": ("before a featureless backdrop",),
    },
    time={"day": ("under diurnal illumination",), "night": ("under nocturnal illumination",), "fog": ("amid haze",)},
    view={
        "front": ("depicted in frontal elevation",),
        "side": ("depicted in profile",),
        "back": ("depicted in posterior elevation",),
        "above": ("depicted in plan",),
    },
    motion={
        "stays still": ("{} remains stationary",),
        "moves left": ("{} traverses leftward",),
        "moves right": ("{} traverses rightward",),
        "jumps": ("{} ascends and subsequently descends",),
        "spins": ("{} revolves about its vertical axis",),
        "grows": ("{} undergoes enlargement",),
        "shrinks": ("{} undergoes contraction",),
        "is circled": ("{} is orbited by the vantage point",),
    },
    marked=("bearing a circular emblem",),
    subject=("idiosyncratic",),
    stands=("situated",),
    joints=("initially,", "subsequently,", "ultimately,"),
)

BOOKS = {"elementary": ELEMENTARY, "intermediate": INTERMEDIATE, "university": UNIVERSITY}

PHOTO = ("a photo of {}",)
NORMALS = ("a normal map of {}",)
UNNAMED = ("an artwork of {}", "a stylised picture of {}")
# %s is the name of the style, in front of or after what is shown.
NAMED = ("{}, in %s style", "%s picture of {}")
