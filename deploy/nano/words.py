"""The closed world of the nano checkpoint: colours, shapes, backgrounds and spoken words."""

from typing import Final

# sRGB centres. The patch embedder normalises each patch, which removes brightness and
# saturation; hue is what is left, so the six colours are spread over the hues.
COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (240, 225, 40),
    "green": (30, 170, 60),
    "blue": (35, 75, 220),
    "purple": (160, 45, 190),
}
SHAPES: Final = ("circle", "square", "triangle", "star", "cross", "ring")
# "grey" has no hue at all, "noisy" is grain, "mixed" is the photographed look.
BACKGROUNDS: Final = ("grey", *COLOURS, "noisy", "mixed")

DIGITS: Final = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
)
_OTHER_SPOKEN: Final = (
    "left right above below apple banana river window garden morning paper music winter doctor "
    "kitchen mountain hello table"
)
SPOKEN: Final = (*DIGITS, *COLOURS, *SHAPES, *_OTHER_SPOKEN.split())

# Words of the answers that are in none of the lists above.
ANSWER_WORDS: Final = (
    "a an and of on background moves up down left right appears changes to at stays still no speech"
)


def article(noun_phrase: str) -> str:
    """Return the phrase with "a" or "an" before it."""
    return f"{'an' if noun_phrase[0] in 'aeio' else 'a'} {noun_phrase}"
