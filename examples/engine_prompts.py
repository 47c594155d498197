"""Prompts as other engines read them: verl, OpenRLHF, SkyRL, slime, miles, Molt, ms-swift and TRL all take this file.

python examples/engine_prompts.py prompts.jsonl data/prompts.jsonl

Takes every form of prompts that Poise reads. Each row gets the conversation as `prompt` and, for ms-swift, as `messages`;
verl groups what it logs by `data_source`.
"""

import json
import sys
from pathlib import Path

from poise.data.preferences import read_prompts

if __name__ == "__main__":
    source, target = sys.argv[1:]
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with Path(target).open("w", encoding="utf-8") as file:
        for prompt in read_prompts(source):
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            file.write(json.dumps({"prompt": turns, "messages": turns, "data_source": Path(source).stem}) + "\n")
