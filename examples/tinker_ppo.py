"""PPO of a language model in another engine, SkyRL's Tinker server, with the rewards of `poise serve`.

python examples/tinker_ppo.py MODEL PROMPTS.jsonl [STEPS]

MODEL is what the Tinker server serves, PROMPTS has one {"prompt": …} a line. Advantages are rewards less the mean of
their prompt; the engine's loss `ppo` clips ratios. docs/serving.md has the commands of both servers. No GPU is needed.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tinker
from tinker import types

from poise.serve.client import Client

Score = Callable[[str, list[str]], list[float]]


class Step(NamedTuple):
    """What one step sampled, got and did."""

    texts: list[tuple[str, str]]  # prompt and completion
    rewards: list[float]
    metrics: dict[str, float]  # the engine's own, and the mean loss
    seconds: float


def served(prompt: str, completions: list[str]) -> list[float]:
    """Rewards of the server that POISE_URL names."""
    return [row["reward"] for row in Client().score(prompt, completions)]


def train(
    policy: tinker.TrainingClient, tokenizer: Any, prompts: list[str], steps: int, score: Score = served,
    group: int = 8, max_tokens: int = 32, learning_rate: float = 1e-4,
) -> Iterator[Step]:  # fmt: skip
    """Steps of sampling `group` completions of each prompt, scoring them and one update."""
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    starts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    for step in range(steps):
        began, data, sampled, rewards = time.perf_counter(), [], [], []
        sampler = policy.save_weights_and_get_sampling_client()
        for prompt, start in zip(prompts, starts, strict=True):
            how = types.SamplingParams(max_tokens=max_tokens, seed=step, stop=[tokenizer.eos_token_id])
            answers = sampler.sample(types.ModelInput.from_ints(start), group, how).result().sequences
            completions = [tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers]
            scores = score(prompt, completions)
            for answer, reward in zip(answers, scores, strict=True):
                before, count = len(start) - 1, len(answer.tokens)  # the prompt's own tokens count for nothing
                inputs = {
                    "target_tokens": [*start[1:], *answer.tokens],
                    "weights": [0.0] * before + [1.0] * count,
                    "logprobs": [0.0] * before + list(answer.logprobs or []),
                    "advantages": [0.0] * before + [reward - sum(scores) / group] * count,
                }
                model_input = types.ModelInput.from_ints([*start, *answer.tokens[:-1]])
                data.append(types.Datum(model_input=model_input, loss_fn_inputs=inputs))
            sampled += [(prompt, completion) for completion in completions]
            rewards += scores
        update = policy.forward_backward(data, "ppo")
        stepped = policy.optim_step(types.AdamParams(learning_rate=learning_rate))
        losses = [x for output in update.result().loss_fn_outputs for x in output["elementwise_loss"].data]
        metrics = {"loss": sum(losses) / len(losses), **(stepped.result().metrics or {})}
        yield Step(sampled, rewards, metrics, time.perf_counter() - began)


if __name__ == "__main__":
    model, file, *more = sys.argv[1:]
    url = os.environ.get("TINKER_BASE_URL", "http://127.0.0.1:8000")
    policy = tinker.ServiceClient(base_url=url, api_key="tml-none").create_lora_training_client(model, rank=8)
    prompts = [json.loads(line)["prompt"] for line in Path(file).read_text().splitlines()]
    for step in train(policy, policy.get_tokenizer(), prompts, int(more[0]) if more else 10):
        mean = sum(step.rewards) / len(step.rewards)
        print(f"reward {mean:.3f}, {step.seconds:.0f} s, {step.metrics}", flush=True)
