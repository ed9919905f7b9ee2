"""Prints what completes commands, flags and file names in your shell."""

from importlib import import_module
from typing import Literal

from tyro.conf import Positional

from aatjax.cli.commands import COMMANDS

GROUP = "plan"

SCRIPTS = {
    "bash": """\
_aatjax() {
  local word=${COMP_WORDS[COMP_CWORD]} words
  if ((COMP_CWORD == 1)); then words='@COMMANDS@'
  else case ${COMP_WORDS[1]} in
@CASES@  esac; fi
  if [[ $word == -* || $COMP_CWORD == 1 ]]; then COMPREPLY=($(compgen -W "$words" -- "$word"))
  else COMPREPLY=($(compgen -f -- "$word") $(compgen -W "${words//--*/}" -- "$word")); fi
}
complete -o filenames -F _aatjax aatjax
""",
    "zsh": """\
#compdef aatjax
autoload -U +X bashcompinit && bashcompinit
""",
    "fish": """\
complete -c aatjax -n __fish_use_subcommand -f -a '@COMMANDS@'
@CASES@""",
}


def main(shell: Positional[Literal["bash", "zsh", "fish"]]) -> None:
    """Run `aatjax completion`.

    eval "$(aatjax completion bash)" in ~/.bashrc, the same with zsh in ~/.zshrc,
    or aatjax completion fish > ~/.config/fish/completions/aatjax.fish

    Args:
        shell: bash, zsh or fish
    """
    print(write_script(shell), end="")


def write_script(shell: Literal["bash", "zsh", "fish"]) -> str:
    """Return the script of a shell."""
    words = {name: list_words(name) for name in COMMANDS}
    if shell == "fish":
        cases = [
            f"complete -c aatjax -n '__fish_seen_subcommand_from {name}' "
            + (f"-l {word[2:]}" if word.startswith("--") else f"-a {word}")
            for name, known in words.items()
            for word in known
        ]
    else:
        cases = [f"    {name}) words='{' '.join(known)}' ;;" for name, known in words.items()]
    script = SCRIPTS[shell] + (SCRIPTS["bash"] if shell == "zsh" else "")
    text = "".join(f"{case}\n" for case in cases)
    return script.replace("@COMMANDS@", " ".join(COMMANDS)).replace("@CASES@", text)


def list_words(name: str) -> list[str]:
    """Return the kinds and flags of a command, those of config fields too where it has them."""
    from aatjax.cli.arguments import list_own_flags
    from aatjax.cli.fields import SHORT, list_flags
    from aatjax.config import load_config

    module = import_module(f"aatjax.cli.commands.{name}")
    kinds = getattr(module, "KINDS", {})
    flags: list[str] = []
    for function in kinds.values() or [module.main]:
        own, has_fields = list_own_flags(function)
        flags += own
        if has_fields:
            flags += [*SHORT, *list_flags(load_config("default"))]
    return [*kinds, *dict.fromkeys([*flags, "--help"])]
