"""bash completes commands and options by the script that `poise completion` prints."""

import shutil
import subprocess

import pytest

from poise.cli.completion import script
from poise.cli.main import COMMANDS

BASH = shutil.which("bash")


def completed(*words: str) -> list[str]:
    """What bash offers after `poise WORD …`, the last word being typed."""
    assert BASH is not None
    typed = " ".join(f'"{word}"' for word in ("poise", *words))
    program = f'{script()}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words)}; _poise; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run([BASH, "-c", program], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.split()


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_bash_completes_commands_and_options() -> None:
    assert completed("") == list(COMMANDS)
    assert completed("train-r") == ["train-reward"]
    assert completed("train-policy", "--kl-c") == ["--kl-coef"]
    assert completed("study", "--policy.kl-c") == ["--policy.kl-coef"]
    assert completed("train-reward", "runs/") == []  # bash goes on with file names
