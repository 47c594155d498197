"""GRPO by TRL with the reward of a `poise serve` in another terminal. A laptop without a GPU is enough.

poise serve runs/quickstart/reward --log runs/rewards.jsonl
python examples/trl_grpo_served.py HuggingFaceTB/SmolLM2-135M-Instruct prompts.jsonl runs/grpo [STEPS]

The prompts are JSON lines with a `prompt` each. POISE_URL names a server elsewhere.
"""

import json
import sys
from pathlib import Path

import datasets
import torch
import trl

from poise.integrations.trl_http import ServedReward

if __name__ == "__main__":
    model, prompts, output, *steps = sys.argv[1:]
    rows = [json.loads(line) for line in Path(prompts).read_text(encoding="utf-8").splitlines()]
    data = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows])
    on_gpu = torch.cuda.is_available()
    config = trl.GRPOConfig(
        output_dir=output,
        max_steps=int(steps[0]) if steps else 20,
        per_device_train_batch_size=8,  # one prompt a step,
        num_generations=8,  # with so many completions
        max_completion_length=48,
        learning_rate=1e-5,
        beta=0.05,
        logging_steps=1,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=False,
        report_to=[],
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = trl.GRPOTrainer(model, reward_funcs=[ServedReward()], args=config, train_dataset=data)
    trainer.train()
    trainer.save_model()
    for row in trainer.state.log_history:
        if "reward" in row:
            print(f"step {row['step']}: reward {row['reward']:.3f}, gap {row['poise/gap']:.3f}")
