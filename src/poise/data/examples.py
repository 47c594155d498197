"""One example row of each kind of file, as `--help` shows it and docs/data.md lists it among all forms."""

from typing import Literal

Kind = Literal["preferences", "prompts", "samples", "questions"]

EXAMPLES: dict[Kind, str] = {
    "preferences": '{"prompt": "Is tea hot?", "chosen": "Mostly.", "rejected": "Blue."}',
    "prompts": '{"prompt": "Is tea hot?"}',
    "samples": '{"prompt": "Is tea hot?", "completion": "Mostly."}',
    "questions": '{"prompt": "Is tea hot?", "chosen": "Mostly.", "rejected": "Blue.", "subset": "hep-python"}',
}
