"""What RLOO and GRPO cannot do without; nothing heavy is imported to know it."""

import importlib.util

from poise.errors import PoiseError


def check_trl(algorithm: str, completions_per_prompt: int) -> None:
    """Raise PoiseError unless TRL is installed, and there are completions of a prompt to compare."""
    if importlib.util.find_spec("trl") is None:
        raise PoiseError(f"--algorithm {algorithm} needs TRL: pip install 'poise-rlhf[trl]'")
    check_group(algorithm, completions_per_prompt)


def check_group(algorithm: str, completions_per_prompt: int) -> None:
    """Raise PoiseError for a single completion of each prompt."""
    if completions_per_prompt < 2:
        raise PoiseError(
            f"--algorithm {algorithm} compares a prompt's completions: --completions-per-prompt must be at least 2"
        )
