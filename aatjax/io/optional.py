"""Libraries that only some verbs need."""

from importlib.util import find_spec

from aatjax.errors import UnavailableError

WHERE = {
    **dict.fromkeys(("torch", "transformers"), "convert"),
    **dict.fromkeys(("fastapi", "uvicorn"), "serve"),
}


def need(*modules: str, what: str) -> None:
    """Raises an UnavailableError that names the pip line where one is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        extras = ",".join(sorted({WHERE.get(module, "export") for module in missing}))
        raise UnavailableError(
            f"{what} needs {' and '.join(missing)}, not installed here: "
            f"pip install 'aatjax[{extras}]'"
        )
