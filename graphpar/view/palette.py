"""Colours that people with any colour vision can tell apart, and names of what they stand for.

The eight colours are those of Okabe and Ito (2008), https://jfly.uni-koeln.de/color/.
"""

from graphpar.schedule import ActionKind

OKABE_ITO = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#f0e442",
    "#999999",
)

ACTION_COLOURS: dict[ActionKind, str] = {
    "F": "#0072b2",
    "B": "#e69f00",
    "I": "#e69f00",
    "W": "#d55e00",
    "R": "#d9d9d9",
    "G": "#d9d9d9",
    "S": "#56b4e9",
    "D": "#f0e442",
    "A": "#009e73",
    "O": "#cc79a7",
}

ACTION_NAMES: dict[ActionKind, str] = {
    "F": "forward",
    "B": "backward",
    "I": "backward, gradients of inputs",
    "W": "gradients of weights",
    "R": "wait for activations",
    "G": "wait for gradients",
    "S": "send activations",
    "D": "send gradients",
    "A": "gradient sum",
    "O": "optimiser step",
}

DARK_TEXT, LIGHT_TEXT = "#1a1a1a", "#ffffff"
_DARK_FILLS = {"#0072b2"}
"""On the others dark text has the larger contrast (WCAG 2.2, 1.4.3)."""


def device_colour(index: int) -> str:
    """The colour of the stage or device with that number; repeats after eight."""
    return OKABE_ITO[index % len(OKABE_ITO)]


def text_on(colour: str) -> str:
    """A text colour that can be read on a fill of the palette."""
    return LIGHT_TEXT if colour in _DARK_FILLS else DARK_TEXT
