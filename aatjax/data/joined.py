"""Several labelled sets as one, the classes of each kept apart."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int16

from aatjax.data.source import Clip, Reader, Source


class JoinedReader(Reader):
    """Reads a clip with the reader of its own set."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.clips: dict[str, tuple[Reader, Clip]] = {
            f"{number}:{clip.id}": (source.reader, clip)
            for number, source in enumerate(sources)
            for clip in source.clips
        }

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        reader, own = self.clips[clip.id]
        return reader.read(own)

    def key(self, clip: Clip) -> str | None:
        reader, own = self.clips[clip.id]
        return reader.key(own)


def join_sources(sources: Sequence[Source], names: Sequence[str] = ()) -> Source:
    """Return one source of all clips; the sets have names of their own, or these.

    A class `dog` of the set `farm` becomes `farm/dog`; two sets of one name are numbered. Where one
    set has several labels per clip, the classes of another set count as not annotated.
    """
    if len(sources) == 1:
        return sources[0]
    clips: list[Clip] = []
    classes: list[str] = []
    names = names or [source.name for source in sources]
    many = any(source.multi_label for source in sources)
    for number, (source, own_name) in enumerate(zip(sources, names, strict=True)):
        first = len(classes)
        name = own_name if names.count(own_name) == 1 else f"{own_name}-{number + 1}"
        classes += [f"{name}/{one}" for one in source.classes]
        own = range(first, len(classes))
        for clip in source.clips:
            observed = own if clip.observed is None else [first + index for index in clip.observed]
            clips.append(
                dataclasses.replace(
                    clip,
                    id=f"{number}:{clip.id}",
                    label=tuple(first + index for index in clip.label),
                    group=None if clip.group is None else f"{number}:{clip.group}",
                    observed=tuple(observed) if many else None,
                )
            )
    name = "+".join(names)
    return Source(clips, classes, name=name, multi_label=many, reader=JoinedReader(sources))
