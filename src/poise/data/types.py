"""What the whole of Poise reads and writes: prompts, completions, preferences."""

from dataclasses import dataclass

# A prompt is text, or a conversation: [{"role": "user", "content": "…"}, …]
Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Preference:
    """Somebody preferred `chosen` to `rejected` as the answer to `prompt`."""

    prompt: Prompt
    chosen: str
    rejected: str
    source: str = ""
    margin: float = 0.0


@dataclass(frozen=True)
class Sample:
    """A prompt with one completion of it."""

    prompt: Prompt
    completion: str
