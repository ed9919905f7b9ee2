"""Weights by their Hugging Face name: fetched once, checked, and found again offline."""

import hashlib
import re
from pathlib import Path

from aatjax.errors import DataError, UnavailableError, UsageError

NAME = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
SMALL_FILES = ("config.json", "preprocessor_config.json")
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
FILE_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".zip", ".gz", ".json")
"""Endings of weight files: a missing path with one of them is a path, not a repository id."""


def is_repository_id(name: str) -> bool:
    """Whether a name has the form `owner/name` of the Hugging Face Hub.

    Any dot may stand in it (`MIT/ast-finetuned-audioset-10-10-0.4593`): only the endings of weight
    files are taken for paths.
    """
    valid = re.fullmatch(NAME, name) is not None and ".." not in name and "--" not in name
    return valid and not name.lower().endswith(FILE_ENDINGS)


def fetch_weights(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    sha256: str | None = None,
) -> Path:
    """Turns an `owner/name` of the Hugging Face Hub (or a path) into files on this machine.

    Only the weights and their two descriptions are fetched; .safetensors are preferred to
    pickles. What is in the cache is used when the Hub cannot be reached or `HF_HUB_OFFLINE` is
    set.

    Args:
        name: `owner/name`, or a path, which is given back.
        revision: branch, tag or commit; a commit never changes.
        cache_dir: another cache than Hugging Face's own.
        sha256: what the weight file must hash to.

    Returns:
        The folder of the snapshot, for `read_checkpoint`; the path itself if one was given.

    Raises:
        UsageError: neither a path nor a name of the Hub.
        UnavailableError: not in the cache, and the Hub cannot be reached.
        DataError: no such repository or revision, no weights in it, or another sha256.
    """
    path = Path(name)
    if not str(name) or not path.exists():
        path = _snapshot(str(name), revision, Path(cache_dir) if cache_dir else None)
    if sha256 is not None:
        _check_sha(path, sha256)
    return path


def _snapshot(name: str, revision: str | None, cache: Path | None) -> Path:
    if not re.fullmatch(NAME, name) or ".." in name or "--" in name:
        raise UsageError(
            f"{name[:200]!r}: no such path, and not an owner/name of the Hugging Face Hub"
        )
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise UnavailableError(
            f"{name}: fetching from the Hugging Face Hub needs the package huggingface_hub: "
            "install it, or pass the path of a downloaded file or folder"
        ) from None
    cache = cache or Path(constants.HF_HUB_CACHE)
    at = f"revision {revision!r} of {name}" if revision else name
    failure = "offline (HF_HUB_OFFLINE is set)"
    if not constants.HF_HUB_OFFLINE:
        try:
            patterns = _patterns(_listing(name, revision), at)
            found = snapshot_download(
                name, revision=revision, cache_dir=cache, allow_patterns=list(patterns)
            )
            return Path(found)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            kind = "revision" if isinstance(error, RevisionNotFoundError) else "repository"
            raise DataError(
                f"{at}: no such {kind} on the Hugging Face Hub, or it needs a login: check the name"
            ) from None
        except DataError:
            raise
        except Exception as error:
            if not _is_network(error):
                raise
            failure = f"the Hugging Face Hub cannot be reached ({type(error).__name__})"
    try:
        found = Path(
            snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True)
        )
        if _weights(found):
            return found
    except Exception as error:
        if not _is_network(error):
            raise
    cached = _cached_revisions(cache, name)
    have = f"cached revisions: {', '.join(cached)}" if cached else "none of it is cached"
    raise UnavailableError(
        f"{at}: {failure} and not in the cache {cache} ({have}): connect once, pass one of these "
        "as revision=, or pass the path of a downloaded file or folder"
    )


def _is_network(error: Exception) -> bool:
    """Whether the Hub, the connection or the cache failed, and not this program."""
    clients = ("httpx", "httpcore", "requests", "huggingface_hub")
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in clients


def _listing(name: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    return HfApi().list_repo_files(name, revision=revision)


def _patterns(files: list[str], at: str) -> tuple[str, ...]:
    """What to fetch of a repository: .safetensors if there are any, else the pickle."""
    top = [file for file in files if "/" not in file]
    if any(file.endswith(".safetensors") for file in top):
        return (*SMALL_FILES, *SAFETENSORS)
    if any(file.startswith("pytorch_model") and file.endswith(".bin") for file in top):
        return (*SMALL_FILES, *PICKLES)
    raise DataError(f"{at}: holds neither .safetensors nor pytorch_model.bin: not weights to load")


def _weights(folder: Path) -> list[Path]:
    """The weight files of a snapshot, .safetensors before pickles."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if found := sorted(file for file in folder.glob(pattern) if file.is_file()):
            return found
    return []


def _cached_revisions(cache: Path, name: str) -> list[str]:
    """Branches, tags and commits of the repository whose weights are in the cache."""
    folder = cache / f"models--{name.replace('/', '--')}"
    commits = sorted(p.name for p in folder.glob("snapshots/*") if p.is_dir() and _weights(p))
    refs = [ref for ref in sorted(folder.glob("refs/**/*")) if ref.is_file()]
    names = {ref.read_text().strip(): str(ref.relative_to(folder / "refs")) for ref in refs}
    return [f"{commit} ({names[commit]})" if commit in names else commit for commit in commits]


def _check_sha(path: Path, expected: str) -> None:
    """Compares the sha256 of the weight file, or of the one weight file in the folder."""
    files = _weights(path) if path.is_dir() else [path]
    if len(files) != 1:
        raise DataError(f"{path}: sha256 is of one weight file, the folder holds {len(files)}")
    with files[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.strip().lower():
        raise DataError(
            f"{files[0]}: sha256 is {found}, expected {expected}: the file changed under the same "
            "name or is damaged; pin revision= to a commit, or fetch it again"
        )
