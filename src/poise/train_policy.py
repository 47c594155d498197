"""`poise train-policy`: PPO against a reward model, conventional or robust.

    RUN/metrics.jsonl     per step: reward, every head, gap, disagreement, KL, lengths, losses, the monitor's signs
    RUN/samples.jsonl     every completion of every step with what each head said
    RUN/final.jsonl       completions of the trained policy on the evaluation prompts
    RUN/policy/           LoRA adapters (PEFT format), or the whole model with --tune full
    RUN/checkpoint.safetensors   everything needed to go on after a kill, to the same result

Rewards: each head is centred on the initial policy's completions, the objective combines the heads, and the combined
reward is divided by its std on those completions. By default the constants are fixed before step 0 and recorded, so
kl_coef means the same from the first step to the last.

Under `accelerate launch` or `torchrun` every process takes its share of a step's prompts, and the run computes what one
process would.
"""

import time
from pathlib import Path

import torch

from poise import processes
from poise.data import read_prompts
from poise.errors import PoiseError
from poise.policy_config import Config
from poise.progress import finish_the_step, progress
from poise.runs import Run, config_dict, is_main_process, write_jsonl
from poise.trackers import tracked
from poise.training import Training

__all__ = ["Config", "run"]


def run(config: Config) -> Run:
    """Train to the end, from the last checkpoint if there is one; a finished run is returned as it is."""
    processes.join()
    config.check()
    out = _open(config)
    if out.results is not None:
        return out
    prompts = read_prompts(config.prompts, config.on_bad_row)
    eval_prompts = read_prompts(config.eval_prompts, config.on_bad_row) if config.eval_prompts else prompts
    if len(prompts) < config.prompts_per_step:
        raise PoiseError(
            f"{config.prompts} has {len(prompts)} prompts, --prompts-per-step is {config.prompts_per_step}"
        )
    training = Training(config, out, prompts)
    started = time.monotonic()
    with finish_the_step() as asked_to_stop, tracked(config.trackers, out.folder, config_dict(config)) as track:
        with progress(f"PPO on {config.objective}", config.num_steps, training.step) as advance:
            while training.step < config.num_steps and not training.ended:
                metrics = training.one_step()
                track(metrics, training.step - 1)
                advance(1, f"reward {metrics['reward']:+.2f}  KL {metrics['kl']:.1f}")
                if processes.total(torch.tensor(float(asked_to_stop()))):  # one process was asked: all stop
                    training.save()
                    raise KeyboardInterrupt
        training.save()
    final = training.sample(eval_prompts, config.eval_completions)
    if is_main_process():
        write_jsonl(out.folder / "final.jsonl", final)
        training.policy.save(str(out.folder / "policy"))
        out.finish(
            {
                "reward": sum(row["reward"] for row in final) / len(final),
                "kl": sum(row["kl"] for row in final) / len(final),
                "num_heads": training.reward.scorer.layout.num_heads,
                "num_truncated": training.reward.scorer.num_truncated,
                "scale": training.reward.scale.to_json(),
                "steps": training.step,
                "alarms": training.alarms,
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    processes.wait()
    return out


def _open(config: Config) -> Run:
    """The run folder, opened by the process that writes."""
    if is_main_process():
        Run.open(config.output, config)
    processes.wait()
    return Run(Path(config.output))
