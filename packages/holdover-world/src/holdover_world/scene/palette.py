"""The colours and the light of the world, from 0 to 1: what the simulator renders with and a drawn layout shares.

They are the same in every clip.
"""

from __future__ import annotations

from collections.abc import Mapping

Colour = tuple[float, float, float]

KERB: Colour = (0.74, 0.74, 0.72)
PAINT: Colour = (0.93, 0.93, 0.90)
YELLOW: Colour = (0.90, 0.70, 0.16)

#: The kinds of ground, in the order of their numbers in a layout, and their colours. The first three are the mean
#: colours of the simulator's textures of these names.
GROUNDS: Mapping[str, Colour] = {
    "grass": (0.43990693933823527, 0.5577512254901961, 0.282778990502451),
    "asphalt": (0.3860409007352941, 0.3899816176470588, 0.40966413909313726),
    "slabs": (0.6509803921568628, 0.6352941176470588, 0.6058823529411764),
    "kerb": KERB,
    "paint": PAINT,
    "yellow": YELLOW,
}

HORIZON: Colour = (0.80, 0.87, 0.93)
ZENITH: Colour = (0.36, 0.58, 0.86)
FOG = (90.0, 480.0)  # metres: things fade into the horizon from the first distance to the second

SUN = (0.42, 0.24, 0.87)  # unit vector towards the sun
SHADE = (0.62, 0.44, 0.1)  # brightness of a face along the sun's rays; what is added per unit of facing it, or away
