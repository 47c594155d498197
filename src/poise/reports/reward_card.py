"""The model card of a reward model: a README.md in every checkpoint that says what it is and what it is not.

The card is written from what the run folder holds, so a finished run gets one, too, and nothing is computed again but
the picture. It names files, not folders of this machine.
"""

from typing import Any

from poise.models.loading import HfTokenizer, load_tokenizer
from poise.models.model_card import front_matter, is_hub_id, public_name, validation_accuracy
from poise.models.run_heads import VALIDATOR
from poise.models.scoring_template import UNCHANGED, ends_where_read
from poise.reports import plots
from poise.reward.config import PAIR_LOSSES
from poise.reward.formats import Trained
from poise.runtime.display import markdown_cell, markdown_code, on_one_line
from poise.runtime.folders import write_file_atomic
from poise.runtime.records import checked, read_object
from poise.runtime.run_folder import Json, Run, versions_of, write_atomic

WHAT = {
    "single": (
        "Conventional reward model",
        "One linear head, fitted to preferences by Bradley–Terry likelihood. It gives no uncertainty.",
    ),
    "brme": (
        "Reward model of {num_heads} Gaussian heads (BRME)",
        "{num_heads} linear heads with a mean and a std each (arXiv 2409.15360); their loss and which pairs each was "
        "trained on are among the settings below. Poise weighs the mean of the head with the lowest std against the "
        "lowest mean.",
    ),
    "ensemble": (
        "Reward model of {num_heads} Bradley–Terry heads",
        "{num_heads} linear heads, each fitted by Bradley–Terry maximum likelihood to a bootstrap of the preferences.",
    ),
    "posterior": (
        "Reward model of {num_heads} posterior heads",
        "{num_heads} linear heads drawn from the Laplace posterior of a conventional Bradley–Terry head. Their mean is "
        "that head; their spread grows with the distance from the preferences they were fitted to.",
    ),
    "validator": (
        "Validator of a reward model",
        "One linear head, fitted by Bradley–Terry likelihood to preferences that were held back from the reward model "
        "it watches, on another depth of the language model. Nothing should be trained on what it says, or it no "
        "longer tells what that reward model alone believes.",
    ),
}
_POINT_HEADS = (
    "Reward model of {num_heads} Bradley–Terry heads with adapters of their own",
    "{num_heads} linear heads, each fitted to its own part of the preferences by Bradley–Terry likelihood, together "
    "with LoRA adapters that only it reads the trunk through; which pairs each was trained on is among the settings "
    "below.",
)
STD_MEANS = {
    "sampled_mse": "A head's std is not an error bar: `sampled_mse` makes it count how much of the training data the "
    "head covers.",
    "probit_pairs": "A head's std is the noise it sees in preferences, not its own lack of data.",
    "bradley_terry": "A head has no std: what it does not know shows only where the heads differ. Objectives that read "
    "the head with the lowest std, such as `nominal` and `tradeoff(0.4)`, are refused.",
}
STD_OF_REWARD = "A head's std is about the conventional model's reward that it was fitted to, not what people prefer."
COLLAPSED = (
    "> **Std collapse.** While these heads were trained their std fell more than tenfold and validation error stood "
    "still. Do not read the std as an error bar, nor trust the head that it selects."
)

_ADAPTERS = (
    "Each head reads the trunk through LoRA adapters of its own, in `adapters/head_0`, `adapters/head_1` and so on. "
    "Without its adapter a label means nothing."
)

COIN = (
    "> **No better than a coin, as far as the validation pairs can say**: the interval of its accuracy includes 50 %. "
    "Do not optimize against it."
)
_COIN_WATCHES = COIN.replace("Do not optimize against it.", "What it says of a reward means nothing.")


def write_cards(out: Run, settings: Json) -> None:
    """The card of every reward model of a run; weights are not touched. `settings` as for `write_card`."""
    for name in WHAT:
        if (out.folder / name / "config.json").exists():
            write_card(out, settings, name)


def write_card(out: Run, settings: Json, name: str) -> None:
    """README.md of RUN/`name`, and calibration.png where the results have reliability bins.

    settings: the config of its training, as plain values.
    """
    folder, results = out.folder / name, out.finished(Trained) or {}
    if name == VALIDATOR:
        results = checked(results.get(VALIDATOR), Trained, f"{out.folder}/results.json: validator")
    bins = results["models"][name].get("reliability")
    if bins:
        with write_file_atomic(folder / "calibration.png") as picture:
            plots.save_reliability(bins, picture)
    block = read_object(folder / "config.json", strict=False)["poise"]
    versions = versions_of(out)
    tokenizer = load_tokenizer(str(folder))
    write_atomic(folder / "README.md", card(name, block, tokenizer, settings, results, versions))


def card(name: str, block: Json, tokenizer: HfTokenizer, settings: Json, results: Json, versions: Json) -> str:
    """The card's text.

    block: the `poise` block of the checkpoint; settings: the config of its training; versions: of the packages.
    """
    gaussian = block["kind"] == "gaussian"
    title, what = (text.format(**block) for text in (WHAT[name] if name != "brme" or gaussian else _POINT_HEADS))
    model = results["models"][name]
    sections = [
        f"# {title}",
        (_COIN_WATCHES if name == VALIDATOR else COIN)
        if (model.get("validation_accuracy_interval") or [1.0])[0] <= 0.5
        else "",
        COLLAPSED if gaussian and results.get("std_collapsed") else "",
        f"{what} A stock `AutoModelForSequenceClassification` on {_trunk(settings, results)}.",
        _ADAPTERS if block.get("adapters") else "",
        "## What it is not",
        _limits(gaussian, block, settings, results),
        "## Reading it",
        _with_transformers(block, tokenizer),
        _with_poise(),
        "## Data",
        _data(settings, results),
        "## On validation pairs",
        _metrics(model, results),
        _calibration(model),
        "## Training settings",
        _settings(settings),
        f"Written by Poise; made with {on_one_line(', '.join(f'{key} {value}' for key, value in versions.items()))}."
        if versions
        else "",
    ]
    return _front_matter(settings, title, model) + "\n" + "\n\n".join(filter(None, sections)) + "\n"


def _front_matter(settings: Json, title: str, model: Json) -> str:
    base, accuracy = settings["model"], model.get("validation_accuracy")
    results = [] if accuracy is None else [validation_accuracy(accuracy, settings["preferences"])]
    return front_matter(base if is_hub_id(base) else "", title=title, results=results)


# ---- sections ----


def _trunk(settings: Json, results: Json) -> str:
    layers, model = results.get("num_layers"), markdown_code(public_name(settings["model"]))
    tuned = {"lora": ", tuned by LoRA", "full": ", tuned"}.get(settings["trunk"], ", as they are")
    return f"the first {layers} layers of {model}{tuned}" if layers else f"{model}{tuned}"


def _limits(gaussian: bool, block: Json, settings: Json, results: Json) -> str:
    scale, of_brme = block.get("reward_scale", 1.0), gaussian or block.get("adapters")
    own_unit = of_brme and settings["head_loss"] in PAIR_LOSSES
    unit = "in the unit of the heads' loss" if own_unit else "in units of their std over the training texts"
    lines = [
        f"No judge beyond its data: it orders texts as the {results['num_train']} pairs below do.",
        "The prior and the end of training were chosen on the validation pairs, so the numbers below are slightly "
        "optimistic.",
        f"Rewards are {unit}. For two answers to one prompt, "
        f"sigmoid({scale:.4g} × difference) is the probability that the first is preferred; otherwise a reward has no "
        f"meaning of its own.",
    ]
    if of_brme:
        lines.append(STD_MEANS.get(settings["head_loss"], STD_OF_REWARD))
        if block.get("std_scale"):
            factors = ", ".join(f"{factor:.3g}" for factor in block["std_scale"])
            lines.append(
                f"Times the head's `std_scale` ({factors}) in the `poise` block, it is an error bar for the "
                "conventional model's reward: mean ± std then covers 68 % of the validation texts."
            )
    return "\n".join(f"- {line}" for line in lines)


_LOGITS = """\
logits = model(torch.tensor([ids])).logits[0].detach() - torch.tensor(model.config.poise["offset"])"""


def _logits_by_adapters(num_heads: int) -> str:
    """Each head's labels, k and K + k, read with its own adapter."""
    return f"""\
model = peft.PeftModel.from_pretrained(model, "adapters/head_0", "head_0").eval()
logits = -torch.tensor(model.config.poise["offset"])
for k in range({num_heads}):
    model.load_adapter(f"adapters/head_{{k}}", f"head_{{k}}")
    model.set_adapter(f"head_{{k}}")
    logits[k::{num_heads}] += model(torch.tensor([ids])).logits[0, k::{num_heads}].detach()"""


def _with_transformers(block: Json, tokenizer: HfTokenizer) -> str:
    num_heads, gaussian = block["num_heads"], block["kind"] == "gaussian"
    prompt, answer = '"Review a film."', '"A warm, funny film."'
    if tokenizer.chat_template is None:
        encoded = f"""\
prompt = {prompt}
text = prompt + {answer}  # encoded as one: no template comes between
ids = tokenizer(text).input_ids"""
    else:  # the whole conversation: a template may write another prompt before an answer than before a generation
        encoded = f"""\
turns = [{{"role": "user", "content": {prompt}}}, {{"role": "assistant", "content": {answer}}}]
text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()  # the score is read at the end of turn
ids = tokenizer(text, add_special_tokens=False).input_ids"""
    layout, last = f"[{num_heads} rewards]", "mean = logits"
    if gaussian:
        layout = f"[{num_heads} means | {num_heads} raw stds]"
        softplus = f"torch.nn.functional.softplus(logits[{num_heads}:])"
        last = f'mean, std = logits[:{num_heads}], model.config.poise["floor"] + {softplus}'
    imports = "import peft\nimport torch" if block.get("adapters") else "import torch"
    return f"""\
The labels are {layout}, minus the `offset` in the `poise` block of config.json. In this folder, or with its hub id in
place of `"."`:

```python
{imports}
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(".", dtype=torch.float32).eval()
{encoded}
{_logits_by_adapters(num_heads) if block.get("adapters") else _LOGITS}
{last}
```{
        ""
        if ends_where_read(tokenizer)
        else f'''

The chat template {UNCHANGED}.'''
    }"""


def _with_poise() -> str:
    return """\
With Poise, which also does batches, truncation and every objective:

```python
from poise import Sample, Scorer

heads = Scorer.load(".")([Sample("Review a film.", "A warm, funny film.")])  # heads.mean, heads.std
```"""


def _data(settings: Json, results: Json) -> str:
    truncated = results.get("num_truncated", 0)
    share = _percent(results["num_validation"] / results["num_preferences"], 0)
    return (
        f"{results['num_preferences']} preferences from {markdown_code(public_name(settings['preferences']))}: "
        f"{results['num_train']} to train on, {results['num_validation']} held out for validation ({share}). "
        f"{_split(results)}{_held_back(results)}{truncated or 'No'} sample{'s' * (truncated > 1)} "
        f"lost the oldest tokens (longer than {settings['max_length']})."
    )


def _split(results: Json) -> str:
    """What the two sides do not share; nothing for runs of versions that split pairs at random."""
    split = results.get("split")
    if not split:
        return ""
    unit = split["unit"]
    return f"No {unit} is on both sides ({split['num_train']} and {split['num_validation']} {unit}s). "


def _held_back(results: Json) -> str:
    """How many other preferences trained the validator of these reward models, if any did."""
    of_validator = results.get("validator")
    if not of_validator:
        return ""
    return f"{of_validator['num_preferences']} more were held back, for the validator in the folder beside this one. "


def _metrics(model: Json, results: Json) -> str:
    low, high = model.get("validation_accuracy_interval") or (None, None)
    interval = f" (95 % interval {_percent(low)} to {_percent(high)})" if low is not None and high is not None else ""
    rows = {
        "accuracy": _percent(model.get("validation_accuracy")) + interval,
        "accuracy of preferring the longer answer, for comparison": _percent(model.get("length_accuracy")),
        "negative log-likelihood, nats a pair (a coin: 0.693)": _number(model.get("validation_nll")),
    }
    for name, value in (model.get("auroc_wrong_order") or {}).items():
        rows[f"AUROC of {name.replace('_', ' ')} for pairs in the wrong order (a coin: 0.5)"] = _number(value)
    lines = [f"| {label} | {value} |" for label, value in rows.items() if value]
    return "\n".join([f"| {results['num_validation']} pairs | |", "|---|---|", *lines])


def _calibration(model: Json) -> str:
    bins = model.get("reliability")
    if not bins:
        return ""
    count = sum(item["count"] for item in bins)
    return (
        f"![Reliability on validation pairs](calibration.png)\n\n"
        f"Of the pairs for which the model claims a probability, how many it has in the right order ({count} pairs). "
        f"On the diagonal it claims what it keeps."
    )


def _settings(settings: Json) -> str:
    rows = [(key, markdown_cell(_shown(value))) for key, value in settings.items() if key != "output"]
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return markdown_code(public_name(value)) if isinstance(value, str) and value else f"{value}"


def _percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
