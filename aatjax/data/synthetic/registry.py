"""The thirty sounds by name: each draws a clean sound, at any level, for a take."""

from collections.abc import Callable

from aatjax.data.synthetic import nature, objects, tonal
from aatjax.data.synthetic.primitives import Samples, Take

# The order is part of what a seed means: the place of a sound seeds its random stream.
MAKERS: dict[str, Callable[[Take], Samples]] = {
    "rain": nature.rain,
    "wind": nature.wind,
    "waves": nature.waves,
    "thunder": nature.thunder,
    "fire": nature.fire,
    "clock": objects.clock_ticks,
    "bell": tonal.bell,
    "siren": tonal.siren,
    "alarm": tonal.alarm,
    "helicopter": objects.helicopter,
    "engine": objects.engine,
    "chainsaw": objects.chainsaw,
    "bark": nature.bark,
    "crow": nature.crow,
    "bird": nature.bird,
    "cricket": nature.cricket,
    "frog": nature.frog,
    "drops": nature.drops,
    "knock": objects.knock,
    "steps": objects.steps,
    "glass": nature.glass,
    "phone": tonal.phone,
    "horn": tonal.horn,
    "applause": objects.applause,
    "typing": objects.typing,
    "whistle": tonal.whistle,
    "pluck": tonal.pluck,
    "organ": tonal.organ,
    "flute": tonal.flute,
    "brass": tonal.brass,
}
