"""What the cards of reward models and policies share: the front matter, and which names may be shown."""

import re
from pathlib import Path

import yaml

from poise.runtime.run_folder import Json


def front_matter(base_model: str = "") -> str:
    """The YAML head of a model card. base_model: the hub id of the language model, if it has one."""
    known: Json = {"base_model": base_model} if base_model else {}
    known |= {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["poise", "reward-model", "reward-robust-rlhf"],
    }
    return f"---\n{yaml.safe_dump(known, sort_keys=False)}---\n"


def is_hub_id(name: str) -> bool:
    """Is this `user/name` on the hub, and no folder of this machine?

    >>> is_hub_id("Qwen/Qwen3-0.6B"), is_hub_id("/models/mine"), is_hub_id("../mine")
    (True, False, False)
    """
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(name).exists()


def public_name(source: str) -> str:
    """A hub id as it is; of a path only the last part, because the rest is about a machine.

    >>> public_name("/home/me/pairs.jsonl"), public_name("data/pairs.jsonl"), public_name("org/pairs")
    ('pairs.jsonl', 'pairs.jsonl', 'org/pairs')
    """
    is_file = Path(source).name.endswith((".jsonl", ".json", ".gz", ".csv", ".parquet"))
    return source if is_hub_id(source) and not is_file else Path(source).name
