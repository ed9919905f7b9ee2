"""The sounds that an adapter names: opened only where its own run folder names them too."""

import dataclasses

from aatjax.config import Config, Data
from aatjax.errors import DataError, UsageError
from aatjax.io.json_fields import check_json_fields, shorten
from aatjax.train.adapter_file import TrainedAdapter
from aatjax.train.own_run import check_stored_path, lies_in_run


def find_own_data(adapter: TrainedAdapter) -> Data:
    """Return the data of the run that wrote an adapter.

    A file may come from anybody, and paths in it are not those of its reader. They are used where
    the file lies in its run folder: beside the config.json with which it was trained. A cache
    folder is never taken from a file: decoded sounds are kept in the user's own.

    Args:
        adapter: from `aatjax.load_adapter`.

    Raises:
        UsageError: the adapter holds no config, or does not lie in its run folder.
        DataError: the config is damaged.
    """
    stated, path = adapter.info.get("config"), adapter.path
    if stated is None:
        raise UsageError("the adapter holds no config: name the sounds to evaluate on")
    if not lies_in_run(path, stated):
        raise UsageError(
            f"{path or 'the adapter'}: does not lie in the folder of the run that wrote it (with "
            "the config.json of that run), and paths in a file from elsewhere are not followed: "
            "name the sounds to evaluate on"
        )
    try:
        check_json_fields("config", stated, Config)
        data = dataclasses.replace(Config.from_json(stated).data, cache=None)
    except UsageError as error:
        raise DataError(f"{path}: damaged or changed: {error}") from error
    paths = data.path.values() if isinstance(data.path, dict) else (data.path,)
    for place in filter(None, (*paths, data.root)):
        try:
            check_stored_path(place)
        except DataError as error:
            raise UsageError(
                f"{path}: its config names {shorten(place)}: {error}; name the sounds to evaluate "
                "on"
            ) from error
    return data
