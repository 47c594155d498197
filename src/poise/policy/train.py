"""`poise train-policy`: PPO against a reward model, conventional or robust; or RLOO and GRPO, through TRL.

    RUN/metrics.jsonl     per step: reward, every head, gap, disagreement, KL, lengths, losses, the monitor's signs
    RUN/samples.jsonl     every completion of every step, with each head's mean and std
    RUN/benchmarks.jsonl  with --eval-every: mean and stderr of each benchmark, at each evaluated step
    RUN/ladder/           the first policies whose KL reached --keep-at-kl; ladder.jsonl says when
    RUN/best/             the policy that --validator likes best
    RUN/final.jsonl       completions of the trained policy on the evaluation prompts
    RUN/policy/           LoRA adapters (PEFT format), or the whole model with --tune full
    RUN/checkpoint.safetensors   all that a killed run needs to resume and end with the same result

Rewards: each head is centered on the initial policy's completions, the objective combines the heads, and the combined
reward is divided by its std on those completions. By default these constants are fixed before step 0 and recorded:
kl_coef keeps one meaning during the whole run.

Under `accelerate launch` or `torchrun` every process takes its share of a step's prompts, and the run computes what one
process would.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from poise.data.in_memory import called
from poise.data.preferences import read_prompts
from poise.data.types import Prompt
from poise.errors import PoiseError
from poise.functional.monitor import Monitor, MonitorConfig
from poise.integrations.lm_eval import Task, evaluate, read_tasks
from poise.integrations.trl_reward import IN_MEMORY, MonitorCallback, RobustReward
from poise.models.loading import HfTokenizer, found_here, load_policy, resolve_model
from poise.models.policy import Policy
from poise.models.reward_model import files_of
from poise.models.row_check import row_check_of, tokenizers_of
from poise.models.run_heads import is_run, reward_folder, say_heads, validator_of
from poise.models.scorer import Ensemble
from poise.models.validator import say_validator
from poise.policy.config import Config
from poise.policy.formats import BenchmarkRow, StepRow
from poise.policy.loop import Training, cut_off, note_of
from poise.policy.reward import PolicyReward
from poise.policy.sampling import sample_policy
from poise.runtime import distributed as processes
from poise.runtime.folders import refuse_deleted
from poise.runtime.ladder import Ladder, best_of
from poise.runtime.progress import console, finish_the_step, progress
from poise.runtime.records import read_rows, undefined_as_none
from poise.runtime.run_folder import (
    Inputs,
    Json,
    Run,
    append_jsonl,
    config_dict,
    is_main_process,
    keep_rows_before,
    write_folder_atomic,
    write_jsonl,
)
from poise.runtime.settings import bounds
from poise.runtime.trackers import Track, tracked

__all__ = ["Config", "run"]


def run(config: Config, given: RobustReward | None = None) -> Run:
    """Train, resuming from the last checkpoint if there is one. A finished run is returned unchanged.

    given: a reward in memory, of `config.reward`, whose model is not loaded again; its objective may be a function.
    """
    processes.refuse_sharding(
        "--shard spreads the weights: launch with accelerate_configs/ddp.yaml or by torchrun, or give RobustReward "
        "(poise.integrations.trl_reward) to a TRL script of your own"
    )
    processes.join()
    config = config.for_command()
    named = given is None or isinstance(given.given, str)
    (config if named else dataclasses.replace(config, objective="mean")).check()  # a function's name says nothing
    out = Run(Path(config.output))
    asked = config
    out.check_config(asked, lambda: _inputs(asked, found_here))
    if out.results is not None and not out.differs(asked, lambda: _inputs(asked, found_here)):
        out.refuse_edited(lambda: _inputs(asked, found_here))
        return out
    check = row_check_of(config.model, config.max_tokens, _readers(config, given))
    prompts = read_prompts(config.prompts, config.on_bad_row, check)
    eval_prompts = read_prompts(config.eval_prompts, config.on_bad_row, check) if config.eval_prompts else prompts
    config = _with_prompts_to_take(asked, len(prompts))
    if given is None:
        _say_which_heads(config)
    if out.results is not None:
        _say_extended(config, out)
    processes.wait()  # until all have looked at what the folder holds
    out = _open(asked)
    started = time.monotonic()
    train = _ppo if config.algorithm == "ppo" else _by_trl
    with tracked(config.trackers, out.folder, config_dict(config)) as track:
        policy, reward, results = train(config, out, prompts, track, given)
    final = sample_policy(
        policy, reward, eval_prompts, config.eval_completions, config.max_tokens, config.seed, results["steps"]
    )
    weights = policy.weights()
    if is_main_process():
        refuse_deleted(out.folder)
        write_jsonl(out.folder / "final.jsonl", final)
        with write_folder_atomic(out.folder / "policy") as scratch:
            policy.save(str(scratch), weights)
        out.finish(
            {
                "reward": sum(row["reward"] for row in final) / len(final),
                "kl": sum(row["kl"] for row in final) / len(final),
                "num_heads": reward.scorer.layout.num_heads,
                "heads": _heads_taken(config),
                "num_truncated": reward.num_truncated,
                "scale": reward.scale.to_json(),
                **results,
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    processes.wait()
    return out


def _readers(config: Config, given: RobustReward | None) -> list[HfTokenizer]:
    """The tokenizers by which reward model and validator read what the policy writes."""
    names = [config.validator] if config.validator else []
    if given is None:
        names.append(reward_folder(config.reward, config.objective, config.heads))
        return tokenizers_of(names)
    scorer = given.scorer
    members = scorer.members if isinstance(scorer, Ensemble) else [scorer]
    return [*tokenizers_of(names), *(member.extract.tokenizer for member in members)]


def _with_prompts_to_take(config: Config, count: int) -> Config:
    """The config, with smaller steps where the default number of prompts is more than there are.

    Raises PoiseError where a number that was asked for is, or too few are left to divide.
    """
    if count >= config.prompts_per_step:
        return config
    least = config.num_minibatches * processes.num_processes()
    fewer = count - count % least
    if not fewer:
        raise PoiseError(
            f"{called(config.prompts)} has {count} prompts, and a step takes at least {least}, one for each minibatch "
            f"of each process; give more prompts, or fewer --num-minibatches"
        )
    if config.prompts_per_step != Config.prompts_per_step:
        raise PoiseError(
            f"{called(config.prompts)} has {count} prompts, --prompts-per-step is {config.prompts_per_step}"
        )
    if is_main_process():
        console.print(
            f"{count} prompts are fewer than --prompts-per-step {config.prompts_per_step}: a step takes {fewer}"
        )
    return dataclasses.replace(config, prompts_per_step=fewer)


def _heads_taken(config: Config) -> str:
    """Of a `poise train-reward` run the kind of heads that is the reward; "" of another reward."""
    if config.reward == IN_MEMORY or not is_run(config.reward):
        return ""
    return Path(reward_folder(config.reward, config.objective, config.heads)).name


def _say_which_heads(config: Config) -> None:
    """Of a run folder one kind of heads is the reward, and its validator is watched: which, and how to take another."""
    if taken := _heads_taken(config):
        say_heads(config.reward, config.objective, taken, "--heads takes others")
    if config.validator and config.validator == validator_of(config.reward) and is_main_process():
        say_validator(config.validator, "--validator None")


def _ppo(
    config: Config, out: Run, prompts: list[Prompt], track: Track, given: RobustReward | None
) -> tuple[Policy, PolicyReward, Json]:
    """Our own loop."""
    tasks = read_tasks(config.eval_tasks, config.eval_data, config.eval_rows) if config.eval_every else []
    training = Training(config, out, prompts, given)
    with finish_the_step() as asked_to_stop:
        with progress(f"PPO on {config.objective}", config.num_steps, training.step) as advance:
            while training.step < config.num_steps and not training.alarms.ended:
                if tasks and training.step % config.eval_every == 0:
                    advance(0, "benchmarks")
                    evaluate_on_benchmarks(training, tasks)
                step = training.step  # a rollback may change it
                metrics = training.one_step()
                track(metrics, step)
                advance(1, note_of(metrics))
                if processes.total(torch.tensor(float(asked_to_stop()))):  # if any process got a signal, all stop
                    training.save()
                    raise KeyboardInterrupt
        training.save()
    if tasks:
        evaluate_on_benchmarks(training, tasks)
    results = {
        "steps": training.step,
        "ended_by": training.alarms.ended or "num_steps",
        "alarms": training.alarms.raised,
        "best": best_of(out.folder) if training.validator else None,
        "scale_std_interval": undefined_as_none(training.scale_interval),
    }
    return training.policy, training.reward, results


def evaluate_on_benchmarks(training: Training, tasks: list[Task]) -> None:
    """Evaluate the policy on benchmarks after `training.step` steps and log the results; training is not affected.

    A step that benchmarks.jsonl already holds is not evaluated again (--on-alarm rollback returns to such a step).
    """
    path, policy = training.out.folder / "benchmarks.jsonl", training.policy
    kept = {row["step"] for row in read_rows(path, BenchmarkRow)} if path.exists() else set()
    with policy.whole():
        if is_main_process() and training.step not in kept:
            rows = []
            for task in tasks:
                with policy.rounding():
                    found = evaluate(policy.model, policy.tokenizer, task)
                score = {
                    "metric": found.metric,
                    "mean": found.mean,
                    "stderr": undefined_as_none(found.stderr),
                    "rows": len(found.outcomes),
                }
                rows.append({"step": training.step, "task": task.name, **score})
            append_jsonl(path, rows)
        processes.wait()  # for the one process that evaluates


def _by_trl(
    config: Config, out: Run, prompts: list[Prompt], track: Track, given: RobustReward | None
) -> tuple[Policy, PolicyReward, Json]:
    """RLOO and GRPO: the same reward, prompts and adapters in TRL's trainers."""
    from poise.integrations import trl_trainers as trl_train

    if config.baseline_completions != Config.baseline_completions and is_main_process():
        console.print(
            f"--baseline-completions is not read: {config.algorithm} fits the reward's scale to its first step",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    names = {field.name for field in dataclasses.fields(trl_train.TrlSettings)}
    settings = trl_train.TrlSettings(**{name: getattr(config, name) for name in names})
    floor, ceiling = bounds(config.reward_floor, config.reward_ceiling)
    of: dict[str, Any] = {
        "scale": str(out.folder / "scale.json"),
        "floor": floor,
        "ceiling": ceiling,
        "regret_bonus": config.regret_bonus,
        "validator": config.validator,
    }
    if given is None:
        place = reward_folder(config.reward, config.objective, config.heads)
        reward = RobustReward.load(place, config.objective, **of)
    else:
        reward = RobustReward.of(given.scorer, given.given, path=given.path, **of)
    step = trl_train.steps_kept(settings, out.folder)
    if is_main_process():
        _drop_from(out, step)
    callback = MonitorCallback(
        Monitor(MonitorConfig(threshold=config.alarm_threshold)), "stop" if config.on_alarm == "stop" else "log"
    )
    steps: list[int] = []
    with progress(f"{config.algorithm.upper()} on {config.objective}", config.num_steps, step) as advance:

        def on_step(metrics: Json) -> None:
            samples = metrics.pop("samples")
            append_jsonl(out.folder / "samples.jsonl", [{"step": metrics["step"], **row} for row in samples])
            score, alarm, signs = callback.reading
            metrics |= {"monitor_score": score, "alarm": alarm, "signs": signs}
            out.log(**metrics)
            track(metrics, metrics["step"])
            steps.append(metrics["step"])
            advance(1, note_of(metrics))
            if metrics["step"] == 0 and metrics.get("ended") == 0.0:
                console.print(cut_off(config.max_tokens, config.reward))

        torch.manual_seed(config.seed)  # initial adapters
        above = trl_train.train(
            settings, reward, *load_policy(config.model), prompts, out.folder, on_step, [callback]
        )  # fmt: skip
    if above and is_main_process():
        _drop_from(out, trl_train.steps_kept(settings, out.folder))
    processes.wait()
    policy = Policy(*load_policy(config.model), adapted_layers=config.adapted_layers, rank=config.lora_rank)
    policy.load_adapters(str(out.folder / "policy"))
    scale = reward.fitted
    assert scale is not None  # it has been called
    done = PolicyReward(reward.scorer, reward.combine, scale=scale)
    rows = out.metrics(StepRow)
    alarms = [
        {"step": row["step"], "score": row["monitor_score"], "action": config.on_alarm} for row in rows if row["alarm"]
    ]
    stopped = "stop" if alarms and config.on_alarm == "stop" else "num_steps"
    results = {
        "steps": rows[-1]["step"] + 1 if rows else 0,
        "ended_by": "max_kl" if above else stopped,
        "alarms": alarms,
        "best": best_of(out.folder) if config.validator else None,
    }
    return policy, done, results


def _drop_from(out: Run, step: int) -> None:
    """Drop what a run of RLOO or GRPO wrote in a step and after it."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        keep_rows_before(out.folder / name, step, first=0)
    Ladder(out.folder, ()).drop_from(step)


def _say_extended(config: Config, out: Run) -> None:
    """Say that a finished run goes on, and where that is no longer run; PoiseError if it ended before its steps."""
    if (out.results or {}).get("ended_by") == "max_kl" and config.max_kl is not None:
        raise PoiseError(f"{out.folder} was ended by --max-kl {config.max_kl:g}; more --num-steps do not make it go on")
    if any(alarm.get("action") in ("stop", "rollback") for alarm in (out.results or {}).get("alarms", [])):
        raise PoiseError(f"{out.folder} was ended by an alarm of the monitor; more --num-steps do not make it go on")
    if is_main_process():
        console.print(f"{out.folder} is finished; it goes on to {config.num_steps} steps")
        if config.final_parameter is not None:
            console.print(
                "--final-parameter moves the objective over all steps, and the earlier ones moved as for the smaller "
                "number: the result is not that of one run of this length"
            )


def _open(config: Config) -> Run:
    """The run folder. The main process creates it."""
    if is_main_process():
        Run.open(config.output, config, lambda: _inputs(config))
    processes.wait()
    return Run(Path(config.output))


def _inputs(config: Config, place: Callable[[str], str] = resolve_model) -> Inputs:
    """What the run reads, by the setting that names it. place: where a model is."""
    files = {
        "--prompts": config.prompts, "--eval-prompts": config.eval_prompts, "--baselines": config.baselines,
    }  # fmt: skip
    found = {name: [Path(path)] for name, path in files.items() if path}
    if config.eval_every and config.eval_data:
        found["--eval-data"] = sorted(Path(config.eval_data).glob("*.jsonl*"))
    if config.validator:
        found["--validator"] = files_of(config.validator, place)
    if config.reward != IN_MEMORY:
        found["--reward"] = files_of(reward_folder(config.reward, config.objective, config.heads), place)
    return found | {"--model": [Path(place(config.model))]}
