"""Messages of the library in the words of the command line: flags in place of Python arguments."""

import re

_FIELD = re.compile(
    r"\b(training|optim|data|model|augment|mesh|petl)\.([a-z_0-9]+)=(?:'([^']*)'|([\w.+-]*\w))"
)
_ARGUMENTS: dict[str, str] = {
    r"run_dir=": "--out",
    r"to=\)": "--out)",
    r"allow_change=\['([^']*)'\]": r"--allow-change \1",
    r"allow_change:": "--allow-change:",
    r"chosen_on_test=": "--protocol",
    r"valid=": "--data.valid-fraction",
    r"base=": "--base",
    r"pooling='(\w+)'": r"--data.pooling \1",
    r"truncated='(\w+)'": r"--data.truncated \1",
    r"channels='(\w+)'": r"--data.channels \1",
    r"dtype='(\w+)'": r"--model.dtype \1",
    r"frames=(\d+)": r"--model.frames \1",
    r"scan=False": "--model.no-scan",
}
"""Arguments of functions, and the flags that set the same."""


def spell_flags(message: str) -> str:
    """Return a message with `training.select='best'` as `--training.select best`, and so on."""
    message = _FIELD.sub(_write_flag, message)
    for argument, flag in _ARGUMENTS.items():
        message = re.sub(rf"(?<![\w.-]){argument}", flag, message)
    return message


def _write_flag(found: "re.Match[str]") -> str:
    part, name, quoted, plain = found.groups()
    name = name.replace("_", "-")
    if plain in ("True", "False"):
        return f"--{part}.{'' if plain == 'True' else 'no-'}{name}"
    return f"--{part}.{name} {plain if quoted is None else quoted}"
