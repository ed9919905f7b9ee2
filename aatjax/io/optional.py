"""Libraries that only some commands need, each in an extra of the package."""

from importlib.util import find_spec

from aatjax.errors import UnavailableError


def need(*modules: str, extra: str) -> None:
    """Check that modules are installed.

    Raises:
        UnavailableError: one is missing; the message names the extra that brings it.
    """
    if missing := [module for module in modules if find_spec(module) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise UnavailableError(
            f"{' and '.join(missing)} {verb} needed here and not installed: "
            f"pip install 'aatjax[{extra}]'"
        )
