"""The schema of an adapter file's metadata: every field with its type and bounds."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np

from aatjax.audio.frontend import FrontEnd
from aatjax.audio.scoring import Scoring
from aatjax.data.synthetic.synthesize import MAKERS
from aatjax.errors import Range, UsageError, check_fields, printable
from aatjax.io.json_fields import check_json_fields, read_json_fields, shorten
from aatjax.io.json_file import parse_json
from aatjax.models.config import ASTConfig
from aatjax.models.provenance import Origin
from aatjax.petl import Method
from aatjax.petl.base import pin_sizes
from aatjax.train.forward import check_fit
from aatjax.train.metrics.decisions import Calibration, compute_probabilities

MOST_BYTES = 2**26  # of the metadata as text
MOST_LEVELS = 24  # of objects and lists in each other
MOST_NUMBER = 2**63 - 1
MOST = {
    **{"classes": 10**6, "data": 256, "weights": 64, "source": 2**12, "fingerprint": 256},
    **{"revision": 256, "metric": 256, "sound": 64, "label": 2**16},
}
"""The longest texts and lists. Those of model, front end and method are in their `from_json`."""

_APART = 1e-3  # largest difference of a probability from that of the stored logits


@dataclasses.dataclass(frozen=True)
class StoredFigure:
    """A figure on labelled clips, the bounds of its interval, and the clips and their groups."""

    metric: str
    value: float | None
    low: float | None
    high: float | None
    clips: Annotated[int, Range(0)]
    groups: Annotated[int, Range(0)] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "")


@dataclasses.dataclass(frozen=True)
class GoldenSample:
    """A synthetic sound, and what the model computed for it when the file was written.

    Attributes:
        sound, seed, seconds: see `synthesize`.
        logits: one per class; None where they were not finite.
        label: the most probable class.
        probabilities: calibrated, one per class.
    """

    sound: str
    seed: Annotated[int, Range(0)]
    seconds: Annotated[float, Range(above=0, high=60)]
    logits: tuple[float, ...] | None
    label: str | None = None
    probabilities: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "golden.")
        if self.sound not in MAKERS:
            raise UsageError(f"golden.sound={shorten(self.sound)} is no sound of aatjax")


@dataclasses.dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter file states of itself.

    Attributes:
        format: version of the file's layout.
        kind: kind of file.
        classes: names in the order of the logits.
        multi_label: whether a clip may have any number of classes.
        frontend: the front end of training.
        model: shape of the backbone.
        method: the adaptation method.
        base: where the backbone came from.
        versions: of aatjax and the libraries that numbers depend on.
        scoring: how the score of a clip is made of its windows.
        golden: see `GoldenSample`.
        decisions: calibration.
        test, valid: figures on the test and validation clips.
        weights: which weights of the run they are: last, best or average.
        data: fingerprint of the training clips.
        about: what reports state of the data.
        config: config of the run.
        sha256: digest of everything else and of the tensors.
    """

    format: int
    kind: Literal["adapter"]
    classes: tuple[str, ...]
    multi_label: bool
    frontend: FrontEnd
    model: ASTConfig
    method: Method
    base: Origin
    versions: dict[str, str]
    scoring: Scoring | None = None
    golden: GoldenSample | None = None
    decisions: Calibration | None = None
    test: StoredFigure | None = None
    valid: StoredFigure | None = None
    weights: str | None = None
    data: str | None = None
    about: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    sha256: str | None = None

    @classmethod
    def from_json(cls, info: Mapping[str, Any]) -> "AdapterMetadata":
        """Check and read metadata; fields that aatjax does not know are the user's own.

        Raises:
            UsageError, DataError: a field is missing, of another type, out of range, or does not
                go with the others; the message names it.
        """
        check_json_values("metadata", info)
        fields = {f.name: info[f.name] for f in dataclasses.fields(cls) if f.name in info}
        check_json_fields("metadata", fields, cls, most=MOST)
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in fields:
                raise UsageError(f"metadata.{field.name} is missing")
        fields["classes"] = tuple(fields["classes"])
        fields["frontend"] = FrontEnd.from_dict(fields["frontend"])
        fields["model"] = ASTConfig.from_json(fields["model"])
        if fields["format"] < 2:
            fields["method"] = pin_sizes(fields["method"], fields["model"].dim)
        fields["method"] = Method.from_json(fields["method"])
        for name, part in (("base", Origin), ("golden", GoldenSample), ("scoring", Scoring)):
            if fields.get(name) is not None:
                fields[name] = read_json_fields(name, fields[name], part, most=MOST)
        for name in ("test", "valid"):
            if fields.get(name) is not None:
                fields[name] = read_json_fields(name, fields[name], StoredFigure, most=MOST)
        if fields.get("decisions") is not None:
            fields["decisions"] = Calibration.from_json(fields["decisions"])
        found = cls(**fields)
        found.check()
        return found

    def check(self) -> None:
        """Check the fields against each other.

        Raises:
            UsageError: they do not go together.
        """
        count, golden = len(self.classes), self.golden
        if not count or len(set(self.classes)) < count or "" in self.classes:
            raise UsageError(
                "metadata.classes has no class, an empty name, or a name twice: class names must "
                "differ"
            )
        check_fit(self.model, count, self.frontend)
        if self.decisions is not None:
            thresholds = self.decisions.thresholds
            if (thresholds is not None) != self.multi_label:
                raise UsageError("decisions.thresholds are those of another kind of task")
            if thresholds is not None and len(thresholds) != count:
                raise UsageError(
                    f"decisions.thresholds: {len(thresholds)} thresholds for {count} classes"
                )
        if golden is None or golden.logits is None:
            return
        if len(golden.logits) != count:
            raise UsageError(f"golden.logits: {len(golden.logits)} logits for {count} classes")
        if golden.probabilities is None:
            return
        label, probabilities = self.compute_decision(np.asarray(golden.logits))
        given = golden.probabilities
        if len(given) != count or float(np.abs(probabilities - given).max()) > _APART:
            raise UsageError("golden.probabilities are not those of golden.logits")
        if golden.label != label:
            raise UsageError(
                f"golden.label={shorten(golden.label)} is not the most probable class, "
                f"{shorten(label)}: the class names or the logits were changed"
            )

    def compute_decision(self, logits: np.ndarray) -> tuple[str, np.ndarray]:
        """Return the most probable class of logits `[c]`, and calibrated probabilities `[c]`."""
        temperature = 1.0 if self.decisions is None else self.decisions.temperature
        scores = np.asarray(logits, np.float64)[None]
        found = compute_probabilities(scores, temperature, self.multi_label)[0]
        return self.classes[int(scores[0].argmax())], found


def parse_metadata(text: str) -> Any:
    """Return JSON text as a value; None where it is none, or a name stands twice in an object."""

    try:
        return parse_json(text) if len(text) <= MOST_BYTES else None
    except (ValueError, RecursionError):
        return None


def check_json_values(where: str, value: Any, levels: int = MOST_LEVELS) -> None:
    """Refuse numbers that are not finite or very large, and deep nesting.

    Raises:
        UsageError: there is one; the message says where.
    """
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        if not levels:
            raise UsageError(f"{where[:80]}: more than {MOST_LEVELS} levels of objects and lists")
        for key, item in value.items():
            check_json_values(f"{where}.{printable(str(key))[:60]}", item, levels - 1)
    elif isinstance(value, int | float) and not -MOST_NUMBER <= value <= MOST_NUMBER:
        raise UsageError(f"{where[:80]}={shorten(value)} is not a finite number, or too large")
