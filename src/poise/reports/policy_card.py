"""The model card of a policy: a README.md beside it that says what it was trained to please.

The card is written from what the run folder holds, so a finished run gets one, too. It names files and models, not
folders of this machine.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from poise.functional.objectives import RewardScale
from poise.models.loading import HfTokenizer, load_tokenizer
from poise.models.model_card import front_matter, is_hub_id, public_name
from poise.policy.formats import Outcome
from poise.runtime.display import markdown_cell, markdown_code, on_one_line
from poise.runtime.ladder import kept_on_the_way
from poise.runtime.run_folder import Json, Run, load_config_file, versions_of, write_atomic

AFTER_ALARM = {
    "log": "Training went on all the same",
    "stop": "Training ended there",
    "rollback": "Training ended there, and went back to the last policy that looked safe, which is this one",
    "pessimism": "Training went on, each time with twice the KL penalty and a more pessimistic objective",
}
SCALE_FROM = {
    "initial": "of {count} completions of the initial policy, which so gets 0 on average, fixed for the whole run",
    "running": "of the {count} completions up to the last step",
    "batch": "of the {count} completions of the last step",
}
SHOWN_ALARMS = 10


def write_card(out: Run, settings: Json, unread: Collection[str] = ()) -> None:
    """README.md of RUN/policy and of the policies kept on the way, in place of the empty form that PEFT leaves there.

    settings: the config of the training, as plain values; unread: names of those that its algorithm did not read.
    """
    results, versions = out.finished(Outcome) or {}, versions_of(out)
    RewardScale.from_json(results["scale"])  # refuses a wrong one in one line
    tokenizer = load_tokenizer(str(out.folder / "policy"))
    for folder, kept in {out.folder / "policy": "", **kept_on_the_way(out.folder)}.items():
        write_atomic(folder / "README.md", card(tokenizer, settings, results, versions, unread, kept=kept))


def write_merged_card(policy: Path, target: Path) -> None:
    """README.md of a model that the adapters of a run's policy were folded into; nothing for a policy of no run.

    policy: the run, or the folder in it of its policy or of one kept on the way.
    """
    out = next((Run(path) for path in (policy, *policy.parents[:2]) if (path / "policy").is_dir()), None)
    if out is None or out.results is None:
        return
    kept = {out.folder: "", out.folder / "policy": "", **kept_on_the_way(out.folder)}.get(policy)
    if kept is None:
        return
    settings = load_config_file(out.folder / "config.yaml")
    text = card(load_tokenizer(str(target)), settings, out.results, {}, merged=True, kept=kept)
    write_atomic(target / "README.md", text)


def card(
    tokenizer: HfTokenizer,
    settings: Json,
    results: Json,
    versions: Json,
    unread: Collection[str] = (),
    *,
    merged: bool = False,
    kept: str = "",
) -> str:
    """The card's text.

    settings: the config of the training; versions: of the packages; unread: settings to leave out.
    merged: the adapters have been folded into the model. kept: which of the run's policies it is, if not the last.
    """
    whole = merged or settings["tune"] != "lora"
    folded = ", folded into it" if merged and settings["tune"] == "lora" else ""
    algorithm, reward = settings["algorithm"].upper(), markdown_code(public_name(settings["reward"]))
    sections = [
        f"# Policy trained by {algorithm}",
        kept if kept else _alarms(settings, results),
        f"{_what(settings)}{folded}, trained by {algorithm} to please the reward model {reward} "
        f"({_heads(results)}, "
        f"objective {markdown_code(settings['objective'])}, kl_coef {settings['kl_coef']:g}).",
        "## What it is not",
        _limits(settings),
        "## Reading it",
        _snippet(settings, tokenizer, whole),
        "" if kept else "## What came out",
        "" if kept else _outcome(settings, results),
        "## The reward's scale",
        _scale(settings, results["scale"]),
        "## Training settings",
        _settings(settings, unread),
        f"Written by Poise; made with {on_one_line(', '.join(f'{key} {value}' for key, value in versions.items()))}."
        if versions
        else "",
    ]
    return _front_matter(settings, whole) + "\n" + "\n\n".join(filter(None, sections)) + "\n"


# ---- sections ----


def _front_matter(settings: Json, whole: bool) -> str:
    return front_matter(
        settings["model"] if is_hub_id(settings["model"]) else "",
        library="transformers" if whole else "peft",
        task="text-generation",
        tags=("poise", "reward-robust-rlhf", settings["algorithm"]),
    )


def _alarms(settings: Json, results: Json) -> str:
    alarms = results["alarms"]
    if not alarms:
        return ""
    steps = [str(alarm["step"]) for alarm in alarms[:SHOWN_ALARMS]]
    more = f" and {len(alarms) - SHOWN_ALARMS} later ones" * (len(alarms) > SHOWN_ALARMS)
    highest = max(alarm["score"] for alarm in alarms)
    return (
        f"> **The monitor raised an alarm: signs of over-optimization** at step{'s' * (len(alarms) > 1)} "
        f"{', '.join(steps)}{more} (score {highest:.2f} at most, threshold {settings['alarm_threshold']:g}). "
        f"{AFTER_ALARM[settings['on_alarm']]}. Read what it writes before you use it."
    )


def _what(settings: Json) -> str:
    model, layers = markdown_code(public_name(settings["model"])), settings["adapted_layers"]
    where = f"the upper {layers} layers" if layers else "all layers"
    if settings["tune"] == "lora":
        return f"LoRA adapters of rank {settings['lora_rank']} on {where} of {model}"
    return f"The whole of {model} with {where} tuned"


def _heads(results: Json) -> str:
    count, kind = results["num_heads"], results.get("heads", "")
    named = f"{on_one_line(kind)} " if kind else ""
    return f"{count} {named}head{'s' * (count > 1)}"


def _limits(settings: Json) -> str:
    lines = [
        "The reward is a model's guess of what people prefer, not a person's judgment. A higher one is what it was "
        "trained for, and no evidence of better text.",
        "No gold was seen, in training or for this card: whether people like what it writes is not known.",
        f"Trained on the prompts of {markdown_code(public_name(settings['prompts']))}, on completions of at most "
        f"{settings['max_tokens']} tokens, sampled at temperature 1 from the whole distribution. What it writes "
        f"to other prompts, at greater length or by greedy decoding was not looked at.",
        "That the monitor is silent proves nothing: it compares a run with its own first steps only.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _snippet(settings: Json, tokenizer: HfTokenizer, whole: bool) -> str:
    if not whole:
        hub = is_hub_id(settings["model"])
        base = json.dumps(settings["model"]) if hub else 'PeftConfig.from_pretrained(".").base_model_name_or_path'
        imports = f"from peft import {'PeftModel' if hub else 'PeftConfig, PeftModel'}\n"
        load = (
            f'base = AutoModelForCausalLM.from_pretrained({base})\nmodel = PeftModel.from_pretrained(base, ".").eval()'
        )
        merging = "\n\n`poise merge RUN --output DIR` folds the adapters into the model, for tools that know none."
    else:
        imports, load, merging = "", 'model = AutoModelForCausalLM.from_pretrained(".").eval()', ""
    prompt, special = 'prompt = "Review a film."', "True"
    if tokenizer.chat_template is not None:
        turns = 'turns = [{"role": "user", "content": "Review a film."}]'
        template = "prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)"
        prompt, special = f"{turns}\n{template}", "False"
    return f"""\
In this folder, or with its hub id in place of `"."`:

```python
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
{load}
{prompt}
ids = tokenizer(prompt, add_special_tokens={special}, return_tensors="pt").input_ids
written = model.generate(
    ids, max_new_tokens={settings["max_tokens"]}, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
)
print(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
```{merging}"""


def _outcome(settings: Json, results: Json) -> str:
    judged = public_name(settings["eval_prompts"] or settings["prompts"])
    steps = [alarm["step"] for alarm in results["alarms"]]
    rows = {
        "steps": f"{results['steps']} of {settings['num_steps']}",
        "reward": _number(results["reward"], "+.2f"),
        "KL to the initial policy, nats per completion": _number(results["kl"], ".2f"),
        "alarms of the monitor": f"{len(steps)}, the first at step {steps[0]}" if steps else "none",
    }
    return (
        f"Reward and KL over {settings['eval_completions']} completions of each prompt of {markdown_code(judged)}.\n\n"
        f"{_table(rows)}"
    )


def _scale(settings: Json, scale: Json) -> str:
    norm = settings["reward_norm"] if settings["algorithm"] == "ppo" else "initial"
    rows = {
        "subtracted from each head": ", ".join(f"{value:.4g}" for value in scale["head_baseline"]),
        "mean of the objective": f"{scale['mean']:.6g}",
        "std of the objective": f"{scale['std']:.6g}",
        "floor": _number(scale.get("floor"), "g") or "none",
        "ceiling": _number(scale.get("ceiling"), "g") or "none",
    }
    return (
        f"reward = (objective of the centered heads − mean) / std, held between floor and ceiling; mean and std "
        f"{SCALE_FROM[norm].format(**scale)}.\n\n{_table(rows)}"
    )


def _settings(settings: Json, unread: Collection[str]) -> str:
    left_out = {"output", *unread}
    rows = {key: _shown(value) for key, value in settings.items() if key not in left_out}
    return _table({key: value for key, value in rows.items() if value})  # what is empty was not asked for


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {markdown_cell(value)} |" for key, value in rows.items())])


def _shown(value: Any) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return markdown_code(public_name(value)) if isinstance(value, str) else f"{value}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
