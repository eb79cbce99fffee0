"""Completion of commands, presets and flags in a shell: `blockwise-lr --print-completion bash`."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
from collections.abc import Mapping, Sequence

from blockwise_lr.errors import UserError

_BASH = """\
# Completion of blockwise-lr in bash, and in zsh through bashcompinit.
_blockwise_lr() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} words=
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    words="{commands}"
  else
    case "$command $previous" in
{choices}
    esac
    if [[ -z $words && $word == -* ]]; then
      case "$command" in
{flags}
      esac
    elif [[ -z $words ]] && (( COMP_CWORD == 2 )); then
      case "$command" in
        {with_presets}) words="{presets}" ;;
      esac
    fi
  fi
  COMPREPLY=( $(compgen -W "$words" -- "$word") )
  if (( ${{#COMPREPLY[@]}} == 0 )) && [[ $word != -* ]]; then
    COMPREPLY=( $(compgen -f -- "$word") )
  fi
}}
complete -o filenames -F _blockwise_lr blockwise-lr
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
_WITH_PRESET = ("train", "compare", "tune", "robustness", "ablation", "inspect", "sharpness")
"""Commands whose first word may be a preset."""


def completion(shell: str, commands: Sequence[str]) -> str:
    """Return a script that completes the command line in a shell.

    Args:
        shell: "bash" or "zsh".
        commands: all commands; each is a module of this folder.

    Raises:
        UserError: another shell.
    """
    if shell not in ("bash", "zsh"):
        raise UserError(
            f"there is no completion for {shell or 'no shell'!r}; expected bash or zsh: "
            "blockwise-lr --print-completion bash"
        )
    from blockwise_lr.train.presets import PRESETS

    flags = {command: flags_of(command) for command in commands if command != "presets"}
    choices = [
        f'      "{command} {flag}") words="{" ".join(values)}" ;;'
        for command, of_command in flags.items()
        for flag, values in of_command.items()
        if values
    ]
    script = _BASH.format(
        commands=" ".join([*commands, "--help", "--version"]),
        choices="\n".join(choices),
        flags="\n".join(
            f'        {command}) words="{" ".join(found)}" ;;' for command, found in flags.items()
        ),
        with_presets="|".join(_WITH_PRESET),
        presets=" ".join(PRESETS),
    )
    return _ZSH + script if shell == "zsh" else script


def flags_of(command: str) -> Mapping[str, Sequence[str]]:
    """Return the flags of a command, and the values that each takes where they are a fixed set.

    tyro writes them, as a Python literal, into the completion script that it makes for a single command. That script
    alone is of no use here: it completes a program, and a program's name has no spaces.
    """
    training = ("train", "compare", "tune", "robustness", "ablation", "inspect")
    first = ["quickstart"] if command in training else []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        importlib.import_module(f"blockwise_lr.cli.{command}").run(
            [*first, "--tyro-print-completion", "bash"]
        )
    found = re.search(r"^COMPLETION_SPEC = (\{.*\})$", printed.getvalue(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"tyro's completion of {command} has no COMPLETION_SPEC: has its format changed?")
    options = ast.literal_eval(found[1])["options"]
    return {
        flag: tuple(map(str, option.get("choices") or ()))
        for option in options
        for flag in option["flags"]
        if "tyro" not in flag
    }
