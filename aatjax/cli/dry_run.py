"""The flag --dry-run: everything is checked, and nothing is computed or written."""

from collections.abc import Callable

from aatjax.errors import DryRun


def make_begin(dry_run: bool, what: str) -> Callable[[], None]:
    """Return what a command calls where its work begins; in a dry run this ends it.

    Args:
        dry_run: whether the flag was given.
        what: what would be done, such as `would write x.html`.
    """

    def begin() -> None:
        if dry_run:
            raise DryRun(f"dry run: all is well so far; {what}")

    return begin
