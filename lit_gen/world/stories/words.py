"""Words and sentence frames of stories: those of training, and others that only tests use."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lit_gen.world.phrases import BOOKS, STANDARD, PhraseBook

# One elementary word for several kinds: what it is said of is stated less exactly.
HYPERNYMS = {
    "round thing": ("ball", "ring"),
    "box or can": ("cube", "cylinder"),
    "thing that comes to a point": ("cone", "rocket"),
}

REGISTERS: dict[str, PhraseBook] = {"standard": STANDARD, **BOOKS}

# Never said in training; whoever finds the video by them has understood the rest of the sentence, or the word's parts.
UNSEEN = replace(
    STANDARD,
    kind={
        "ball": ("globe",),
        "cube": ("die",),
        "cylinder": ("column",),
        "cone": ("funnel",),
        "ring": ("bracelet",),
        "snowman": ("frosty",),
        "house": ("cottage",),
        "mushroom": ("shroom",),
        "dumbbell": ("handweight",),
        "rocket": ("spaceship",),
    },
    colour={
        "red": ("ruby",),
        "orange": ("tangerine",),
        "yellow": ("lemon",),
        "green": ("lime",),
        "blue": ("navy",),
        "purple": ("plum",),
        "white": ("snowy",),
        "black": ("inky",),
    },
    motion={
        "stays still": ("{} rests",),
        "moves left": ("{} slides leftwards",),
        "moves right": ("{} slides rightwards",),
        "jumps": ("{} bounces",),
        "spins": ("{} twirls",),
        "grows": ("{} swells",),
        "shrinks": ("{} dwindles",),
        "is circled": ("{} is rounded by the lens",),
    },
)


@dataclass(frozen=True)
class Frames:
    """How sentences are put together; `{}` takes the event, `{floor}` and `{time}` the place."""

    place: tuple[str, ...]  # says where it is; before the events unless `place_last`
    first: tuple[str, ...]
    middle: tuple[str, ...]
    last: tuple[str, ...]
    linked: tuple[str, ...] = ("{}, then {}", "{}, after that {}")  # two events in one sentence
    place_last: bool = False


SEEN_FRAMES = {
    "standard": Frames(
        ("{floor} {time}", "{time} {floor}"),
        ("first {}", "to begin with {}"),
        ("then {}", "after that {}"),
        ("finally {}",),
    ),
    "elementary": Frames(("we look {time} {floor}",), ("first {}",), ("then {}",), ("at the end {}",)),
    "intermediate": Frames(("filmed {floor} {time}",), ("to begin with {}",), ("after that {}",), ("finally {}",)),
    "university": Frames(
        ("situated {floor} {time}",),
        ("initially {}",),
        ("subsequently {}",),
        ("ultimately {}",),
        ("{} and subsequently {}",),
    ),
}
UNSEEN_FRAMES = Frames(
    ("everything takes place {floor} {time}",),
    ("in the opening shot {}",),
    ("a moment later {}", "next up, {}"),
    ("the closing shot is of how {}",),
    ("{} before {}",),
    place_last=True,
)
