"""Weights by their Hugging Face name, downloaded once and found again offline."""

import re
from pathlib import Path

from aatjax.errors import AatjaxError, DataError, UnavailableError, UsageError
from aatjax.io.digest import hash_file

NAME = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
SMALL_FILES = ("config.json", "preprocessor_config.json")
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
FILE_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".zip", ".gz", ".json")
"""Endings of weight files: a missing path with one of them is a path, not a repository id."""


def is_repository_id(name: str) -> bool:
    """Whether a name has the form `owner/name` of the Hugging Face Hub.

    It may hold any dot (`MIT/ast-finetuned-audioset-10-10-0.4593`): only the endings of weight
    files mark a path.
    """
    return _is_name(name) and not name.lower().endswith(FILE_ENDINGS)


def fetch_weights(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    sha256: str | None = None,
) -> Path:
    """Return the local folder of a repository's weights, downloaded if needed.

    Only the weights and their two descriptions are downloaded, .safetensors in preference to
    pickles. The cache serves when the Hub cannot be reached or `HF_HUB_OFFLINE` is set.

    Args:
        name: `owner/name`, or a path, which is returned.
        revision: branch, tag or commit; a commit never changes.
        cache_dir: another cache than Hugging Face's own.
        sha256: expected SHA-256 of the weight file.

    Raises:
        UsageError: neither a path nor a name of the Hub.
        UnavailableError: not in the cache, and the Hub cannot be reached.
        DataError: no such repository or revision, no weights in it, or another SHA-256.
    """
    path = Path(name)
    if not str(name) or not path.exists():
        path = _find_snapshot(str(name), revision, cache_dir)
    if sha256 is not None:
        _check_sha256(path, sha256)
    return path


def _is_name(name: str) -> bool:
    return re.fullmatch(NAME, name) is not None and ".." not in name and "--" not in name


def _find_snapshot(name: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    if not _is_name(name):
        raise UsageError(
            f"{name[:200]!r}: no such path, and not an owner/name of the Hugging Face Hub"
        )
    if (owner := Path(name.partition("/")[0])).is_file():
        raise DataError(f"{name}: no such file: {owner} is a file, not a folder")
    from huggingface_hub import constants

    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    title = f"revision {revision!r} of {name}" if revision else name
    failure = "offline (HF_HUB_OFFLINE is set)"
    if not constants.HF_HUB_OFFLINE:
        try:
            return _download(name, revision, cache, _choose_files(name, revision, title))
        except AatjaxError:
            raise
        except Exception as error:
            if not _is_network_error(error):
                raise
            failure = f"the Hugging Face Hub cannot be reached ({type(error).__name__})"
    for wanted in (SAFETENSORS, PICKLES):
        try:
            path = _download(name, revision, cache, wanted, local_files_only=True)
        except Exception as error:
            if not _is_network_error(error):
                raise
        else:
            if _list_weights(path):
                return path
    cached = _list_cached(cache, name)
    known = f"cached revisions: {', '.join(cached)}" if cached else "none of it is cached"
    raise UnavailableError(
        f"{title}: {failure} and not in the cache {cache} ({known}): connect once, choose a cached "
        "revision, or give the path of a downloaded file or folder"
    )


def _choose_files(name: str, revision: str | None, title: str) -> tuple[str, ...]:
    """Patterns of the weight files that the Hub has: .safetensors, or pickles if there are none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = HfApi().model_info(name, revision=revision, timeout=10).siblings or ()
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        kind = "revision" if isinstance(error, RevisionNotFoundError) else "repository"
        raise DataError(
            f"{title}: no such {kind} on the Hugging Face Hub, or it needs a login: check the name"
        ) from None
    files = [file.rfilename for file in found if "/" not in file.rfilename]
    if any(file.endswith(".safetensors") for file in files):
        return SAFETENSORS
    if any(re.fullmatch(r"pytorch_model.*\.bin", file) for file in files):
        return PICKLES
    raise DataError(
        f"{title}: holds neither .safetensors nor pytorch_model.bin: not weights to load"
    )


def _download(
    name: str,
    revision: str | None,
    cache: Path,
    wanted: tuple[str, ...],
    *,
    local_files_only: bool = False,
) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            name,
            revision=revision,
            cache_dir=cache,
            allow_patterns=[*SMALL_FILES, *wanted],
            local_files_only=local_files_only,
        )
    )


def _is_network_error(error: Exception) -> bool:
    """Whether the Hub, the connection or the cache failed, and not this program."""
    clients = ("httpx", "httpcore", "requests", "huggingface_hub")  # httpx2 since version 2
    return isinstance(error, OSError) or type(error).__module__.startswith(clients)


def _list_weights(folder: Path) -> list[Path]:
    """The weight files of a snapshot: .safetensors, or pickles if there are none."""
    found = [folder.glob(pattern) for pattern in (SAFETENSORS[0], PICKLES[0])]
    kinds = [sorted(file for file in files if file.is_file()) for files in found]
    return kinds[0] or kinds[1]


def _list_cached(cache: Path, name: str) -> list[str]:
    """Revisions of a repository whose weights are in the cache, with their branch or tag."""
    folder = cache / f"models--{name.replace('/', '--')}"
    commits = sorted(path.name for path in folder.glob("snapshots/*") if _list_weights(path))
    refs = [ref for ref in sorted(folder.glob("refs/**/*")) if ref.is_file()]
    names = {ref.read_text().strip(): str(ref.relative_to(folder / "refs")) for ref in refs}
    return [f"{commit} ({names[commit]})" if commit in names else commit for commit in commits]


def _check_sha256(path: Path, expected: str) -> None:
    files = _list_weights(path) if path.is_dir() else [path]
    if len(files) != 1:
        raise DataError(f"{path}: sha256 is of one weight file, the folder holds {len(files)}")
    found = hash_file(files[0])
    if found != expected.strip().lower():
        raise DataError(
            f"{files[0]}: sha256 is {found}, expected {expected}: the file changed under the same "
            "name or is damaged; pin revision= to a commit, or download it again"
        )
