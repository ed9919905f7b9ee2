"""Names what a file holds in place of what was wanted, from its first bytes."""

import re

HEAD = 512
"""Bytes of a file that tell what it is."""

_FORMS = (
    (rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|body|\?xml|svg)", "a web page", "fetch"),
    (rb"\s*version https://git-lfs", "a Git LFS pointer", "run `git lfs pull`"),
    (rb"\x1f\x8b|BZh\d|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "a compressed file", "unpack"),
    (rb"PK(?:\x03\x04|\x05\x06)|.{257}ustar", "an archive", "unpack"),
    (rb"\x89HDF", "an HDF5 file", "export what it holds"),
    (rb"\x93NUMPY", "a NumPy array", "pass the array to the Python API, or convert it"),
    (rb"%PDF", "a PDF document", "name"),
    (rb"\x89PNG|\xff\xd8\xff[\xdb\xe0-\xef]|GIF8", "a picture", "name"),
    (rb"RIFF.{4}WAVE|fLaC|OggS|ID3[\x02-\x04]", "a sound file", "name"),
    (rb"MThd", "a MIDI file", "render its notes to samples first"),
    (rb"#EXTM3U|\[playlist\]|ffconcat", "a playlist", "name the files on its lines"),
    (rb"(?:\xef\xbb\xbf)?\s*[{\[]\s*[\"{\[\d\]}-]", "JSON", "fetch"),
    (rb"(?:\xef\xbb\xbf)?[\t\n\r\x20-\x7e]{8,}\Z", "text", "name"),
    (rb"\0{8,}\Z", "filled with zeros at its start", "fetch"),
)
_ADVICE = {
    "fetch": "the download went wrong, fetch it again",
    "name": "check the name of the file",
    "unpack": "unpack it first",
}


def describe_foreign(start: bytes, wanted: str) -> str | None:
    """Return what a file is that is not what was wanted, and what to do; None if not known.

        a Git LFS pointer, not the weights: run `git lfs pull`

    Args:
        start: the first `HEAD` bytes of the file.
        wanted: what the file should be, such as `the weights`.
    """
    for pattern, name, advice in _FORMS:
        if re.match(pattern, start[:HEAD], re.IGNORECASE | re.DOTALL):
            return f"{name}, not {wanted}: {_ADVICE.get(advice, advice)}"
    return None
