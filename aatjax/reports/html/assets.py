"""Pictures and sounds as data URIs: PNG with a palette, WAV of 16 bits."""

import base64
import io
import struct
import wave
import zlib

import numpy as np
from jaxtyping import Float, Int16

LEVELS = 64
# Cividis (Nuñez, Anderton and Renslow 2018): lightness rises evenly, with or without colour vision.
CIVIDIS = (
    (0, 32, 77),
    (10, 48, 111),
    (61, 79, 108),
    (102, 105, 112),
    (124, 123, 120),
    (149, 143, 120),
    (175, 164, 111),
    (203, 186, 105),
    (233, 210, 88),
    (255, 234, 70),
)


def palette(levels: int = LEVELS) -> list[tuple[int, int, int]]:
    """Colours from dark (low) to light (high)."""
    at = np.linspace(0, len(CIVIDIS) - 1, levels)
    channels = np.array(CIVIDIS, float).T
    mixed = [np.interp(at, np.arange(len(CIVIDIS)), channel) for channel in channels]
    return [(round(r), round(g), round(b)) for r, g, b in zip(*mixed, strict=True)]


def colour(share: float) -> str:
    """The colour of a share between 0 and 1, as `#rrggbb`."""
    level = min(LEVELS - 1, max(0, int(share * LEVELS)))
    return "#{:02x}{:02x}{:02x}".format(*palette()[level])


def picture(values: Float[np.ndarray, "r k"], low: float, high: float) -> str:
    """A PNG of a grid, the first row at the bottom, as a data URI; NaN is the lowest colour.

    Args:
        values: the grid.
        low, high: values of the darkest and the lightest colour; what lies outside is cut.
    """
    scaled = (np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-12)
    index = np.clip(scaled * LEVELS, 0, LEVELS - 1).astype(np.uint8)[::-1]
    rows = np.concatenate([np.zeros((len(index), 1), np.uint8), index], axis=1)  # filter: none

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    height, width = index.shape
    data = b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", bytes(part for rgb in palette() for part in rgb)),
            chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            chunk(b"IEND", b""),
        ]
    )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def sound(samples: Int16[np.ndarray, " s"], rate: int) -> str:
    """A mono WAV of 16 bits as a data URI."""
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(samples, "<i2").tobytes())
    return f"data:audio/wav;base64,{base64.b64encode(held.getvalue()).decode()}"
