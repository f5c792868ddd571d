"""Words of the world: every attribute a scene can have, in the order of its index."""

SHAPES = ("ball", "cube", "cylinder", "cone", "ring")
COMPOUNDS = ("snowman", "house", "mushroom", "dumbbell", "rocket")
KINDS = SHAPES + COMPOUNDS
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
PATTERNS = ("plain", "striped", "checkered", "dotted")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "behind", "in front of", "on top of", "next to")
FLOORS = ("grass", "wood", "stone", "sand", "backdrop")
TIMES = ("day", "night", "fog")
VIEWS = ("front", "side", "back", "above")
MOTIONS = ("stays still", "moves left", "moves right", "jumps", "spins", "grows", "shrinks", "is circled")

# Index 0 is the unstyled picture; the rest are named points of the continuous style family (styles.py).
STYLES = ("photo", "ink sketch", "neon", "blueprint", "watercolor", "comic", "sepia print", "poster", "chalk")

OBJECTS_PER_SCENE = 3
ABSENT = -1
