"""Run folders of older versions: fields that they lack, and defaults that were others."""

import json
from typing import Any

from aatjax.config import Config
from aatjax.convert.load import EMBEDDED, read_source
from aatjax.errors import UsageError
from aatjax.petl import Method
from aatjax.petl.base import pin_sizes
from aatjax.train.run_dir import RunClaims

Fields = dict[str, Any]

BODY = ("dim", "depth", "heads", "mlp_dim", "patch", "stride")
"""Fields of a model's shape that its weights decide."""


def fill_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a stored config with the defaults of fields that its version did not have yet."""
    try:
        return json.loads(json.dumps(Config.from_json(fields).to_json()))
    except UsageError:  # a field that no longer exists: reported as a difference
        return fields


def was_stratified(claims: RunClaims) -> bool:
    """Whether the folder holds a run of a version that had no other split."""
    stored = claims.read("config.json")
    data = None if stored is None else stored.get("data")
    return isinstance(data, dict) and "split_method" not in data


def find_weights(claims: RunClaims, config: Config) -> str:
    """Return the weights of the run in a folder: those in the package may have been older ones."""
    stored = claims.read("settings.json")
    shape = None if stored is None else stored.get("model")
    if config.model.source == "embedded" and isinstance(shape, dict):
        for name in EMBEDDED:
            present = json.loads(json.dumps(read_source(name).config.to_json()))
            if all(shape.get(field) == present[field] for field in BODY):
                return name
    return config.model.source


def find_older_method(claims: RunClaims, config: Config) -> tuple[Fields, Fields] | None:
    """Return the method of the run in a folder, as it was written and with the sizes that it had.

    Args:
        claims: of the run folder.
        config: the config that it is resumed with.

    Returns:
        None where there is no run, or the config means the same method today.

    Raises:
        DataError: the stored config, or the weights whose width sets the sizes, cannot be read.
    """
    content = claims.read("config.json")
    stored = None if content is None else content.get("petl")
    if (
        not isinstance(stored, dict)
        or not _names_no_width(stored)
        or pin_sizes(stored, 1) == stored
    ):
        return None
    if Method.from_json(stored) != config.petl:
        return None
    weights = read_source(config.model.source, revision=config.model.revision)
    pinned = Method.from_json(pin_sizes(stored, weights.config.dim))
    return None if pinned == config.petl else (stored, pinned.to_json())


def _names_no_width(fields: Fields) -> bool:
    """Whether a method was written before its width was a field."""
    parts = fields.get("methods")
    if isinstance(parts, list):
        return any(isinstance(part, dict) and _names_no_width(part) for part in parts)
    return not {"width", "rank"} & fields.keys()
