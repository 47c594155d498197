"""Commands run one after the other in one process, to see what they say before torch is imported."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

Answer = tuple[int, str, list[str]]  # status, what was said on stderr, the heavy libraries that were there then

_PROGRAM = """
import io, json, sys
from contextlib import redirect_stderr
from poise.cli.main import main
for line in sys.stdin.read().splitlines():
    sys.stdin = io.StringIO("")
    with redirect_stderr(io.StringIO()) as said:
        code = main(json.loads(line).split())
    heavy = sorted({"torch", "transformers", "trl", "scipy", "datasets"} & sys.modules.keys())
    print("\\n" + json.dumps([code, said.getvalue(), heavy]))
"""


def run_early(place: Path, commands: Sequence[str], environment: Mapping[str, str] | None = None) -> list[Answer]:
    """The answer to each command, in a folder. Words are parted by spaces."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], cwd=place, env=os.environ | dict(environment or {}), capture_output=True,
        text=True, check=False, input="\n".join(map(json.dumps, commands)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == len(commands), done.stdout
    return [(code, said, heavy) for code, said, heavy in found]


def write_files(place: Path) -> None:
    """The data files that the commands name."""
    place.mkdir(exist_ok=True)
    (place / "prompts").write_text('{"prompt": "Tea?"}\n{"prompt": "Coffee?"}\n')
    (place / "samples").write_text('{"prompt": "Tea?", "completion": "Yes."}\n')
    (place / "pairs").write_text('{"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}\n')
