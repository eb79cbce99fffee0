"""The Tab key in bash completes what the command line takes."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from blockwise_lr.cli.completion import completion, flags_of
from blockwise_lr.cli.entry import _COMMANDS, main
from blockwise_lr.errors import UserError

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="there is no bash")


@pytest.fixture(scope="module")
def script() -> str:
    return completion("bash", _COMMANDS)


def completed(script: str, *words: str) -> list[str]:
    """Return what bash offers for the last of the words."""
    line = " ".join(f"'{word}'" for word in ("blockwise-lr", *words))
    press = f'COMP_WORDS=({line}); COMP_CWORD={len(words)}; _blockwise_lr; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run([BASH, "-c", f"{script}\n{press}"], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], ["train"]),
        (["e"], ["eval", "export"]),
        (["train", "quick"], ["quickstart"]),
        (["compare", "quickstart", "--ar"], ["--arms"]),
        (["train", "quickstart", "--base-l"], ["--base-lr"]),
        (["tune", "quickstart", "--sampler", "c"], ["cma-es"]),
        (["sharpness", "runs/mine", "--estimator", "fi"], ["fisher"]),
        (["eval", "runs/mine", "--ov"], ["--overlap"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bash_offers(script, words, offered):
    assert completed(script, *words) == offered


def test_file_names_are_completed_where_nothing_else_fits(script, tmp_path, monkeypatch):
    (tmp_path / "speeches.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert completed(script, "train", "quickstart", "--data", "spee") == ["speeches.jsonl"]


@pytest.mark.parametrize("command", [command for command in _COMMANDS if command != "presets"])
def test_every_command_has_flags(command):
    assert "--help" in flags_of(command)
    assert len(flags_of(command)) > 2


def test_the_command_prints_the_script(script, capsys):
    main(["--print-completion", "bash"])
    assert capsys.readouterr().out == script


def test_zsh_takes_the_same_script(script):
    assert completion("zsh", _COMMANDS).endswith(script)


def test_another_shell_is_refused():
    with pytest.raises(UserError, match="no completion for 'tcsh'; expected bash or zsh"):
        completion("tcsh", _COMMANDS)
