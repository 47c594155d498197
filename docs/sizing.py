"""Writes the table of GPU memory in start/several-gpus.md: what `poise plan` computes for three models.

    python docs/sizing.py

The models are described by the config.json that their makers publish, as far as it says sizes.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from poise.cli.plan import Config, gib, plan_of

PAGE = Path(__file__).parent / "start" / "several-gpus.md"
BEGIN, END = "<!-- sizes: written by docs/sizing.py -->", "<!-- sizes end -->"
QWEN: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768}
MODELS: dict[str, dict[str, Any]] = {
    "1.5B (Qwen2.5)": {
        **QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "8B (Llama 3)": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "32B (Qwen2.5)": {
        **QWEN, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
HEAD = (
    "| Model | Trained | GPUs | train-reward, GiB | largest part | PPO, GiB | largest part "
    "| GRPO, GiB | largest part |",
    "|---|---|---|---|---|---|---|---|---|",
)


def row(name: str, tune: Any, gpus: int) -> str:
    """A row of the table: all layers trained, in parts as small as they can be (GRPO: the default minibatches of
    adapters); several GPUs share the weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[name]))
        ppo = Config(
            model=folder, tune=tune, gpus=gpus, shard=gpus > 1, gradient_checkpointing=True, adapted_layers=0,
            accumulation=16, device_batch_size=1, memory=1e6,
        )  # fmt: skip
        memory = [*plan_of(ppo).memory.values()]
        if tune == "lora":
            grpo = replace(ppo, algorithm="grpo", accumulation=Config.accumulation)
            memory.append(plan_of(grpo).memory["train-policy"])
    cells = [cell for one in memory for cell in (_sized(one.total), one.bottleneck)]
    return f"| {name} | {tune} | {gpus} | {' | '.join(cells + [''] * (6 - len(cells)))} |"


def _sized(total: int) -> str:
    """In bold what fits a GPU of 80 GiB, of which a tenth is left."""
    text = gib(total)[:-1]
    return f"**{text}**" if total <= 72 * 2**30 else text


def table() -> str:
    """All rows."""
    rows = [row(name, tune, gpus) for name in MODELS for tune in ("lora", "full") for gpus in (1, 8)]
    return "\n".join([*HEAD, *rows])


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
