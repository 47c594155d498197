"""What the page of a `poise train-reward` run shows, from its folder alone."""

from pathlib import Path

from poise.models.card_warnings import card_warnings
from poise.models.run_heads import VALIDATOR
from poise.reports import run_plots
from poise.reports.blocks import Cell, Chart, Charts, Made, Page, Part, Section, Table, Text
from poise.reports.quickstart_page import REWARD_MODELS, Verdict, number, percent, read_json
from poise.runtime.run_folder import Json

_UNCERTAINTIES = ("disagreement", "routing_std", "total_std", "last_layer_std")


def page(folder: Path) -> Page:
    """The page of one run."""
    results = read_json(folder / "results.json")
    title = f"reward models {folder.resolve().name}"
    made = Section("How it was made", [Made.of(folder)])
    if results is None:
        text = "This run is not finished: its reward models are not written yet."
        return Page(title, [], [made], unfinished=text)
    models = results["models"]
    warned: dict[str, list[str]] = {}
    for name in (*models, VALIDATOR):
        for text in card_warnings(folder / name):
            warned.setdefault(text, []).append(name)
    sections = [
        Section("Validation pairs", [_table(results), _note(results)]),
        Section("Figures", _figures(results, folder.resolve().name)),
        made,
    ]
    findings = [finding(name, model, results) for name, model in models.items()]
    if of_validator := results.get(VALIDATOR):
        findings.append(finding(VALIDATOR, of_validator["models"][VALIDATOR], of_validator))
    return Page(
        title, findings, [s for s in sections if s.parts],
        [f"{', '.join(names)}: {text}" for text, names in warned.items()], glossary=("accuracy", "NLL", "AUROC"),
    )  # fmt: skip


def finding(name: str, model: Json, results: Json) -> Verdict:
    """One reward model's accuracy as a sentence that claims no more than its interval."""
    low, high = model.get("validation_accuracy_interval") or (None, None)
    text = (
        f"{name} orders {percent(model.get('validation_accuracy'))} of {results['num_validation']} validation pairs as "
        f"people did"
    )
    if low is not None:
        text += f" (95\xa0% interval {percent(low)} to {percent(high)})"
    if (longer := model.get("length_accuracy")) is not None:
        text += f"; picking the longer answer gets {percent(longer)}"
    if low is None:
        return Verdict("unclear", f"{text}.")
    if low <= 0.5:
        return Verdict("worse", f"{text}: no better than a coin, as far as these pairs can say.")
    return Verdict("better" if longer is None or low > longer else "unclear", f"{text}.")


def _table(results: Json) -> Table:
    models = results["models"]
    known = [name for name in _UNCERTAINTIES if any(name in _auroc(model) for model in models.values())]
    head = ["Reward model", "Heads", "Accuracy", "Longer answer", "NLL", *(f"AUROC, {name}" for name in known)]
    rows: list[list[Cell]] = []
    for name, model in models.items():
        low, high = model.get("validation_accuracy_interval") or (None, None)
        accuracy: Cell = percent(model.get("validation_accuracy"))
        if low is not None:
            accuracy = (str(accuracy), f"{percent(low)} to {percent(high)}")
        rows.append(
            [
                name, str(model.get("num_heads", "")), accuracy, percent(model.get("length_accuracy")),
                number(model.get("validation_nll"), 3), *(number(_auroc(model).get(one)) for one in known),
            ]
        )  # fmt: skip
    kinds = "; ".join(f"{name}: {REWARD_MODELS[name]}" for name in models if name in REWARD_MODELS)
    return Table("Reward models", head, rows, kinds)


def _auroc(model: Json) -> Json:
    return model.get("auroc_wrong_order") or {}


def _note(results: Json) -> Text:
    text = (
        f"Trained on {results['num_train']} pairs, judged on {results['num_validation']} held out. The prior and the "
        f"end of training were chosen on these pairs, so the numbers are slightly optimistic: poise evaluate-reward "
        f"judges on others."
    )
    if of_validator := results.get(VALIDATOR):
        text += (
            f" The validator reads {of_validator['num_layers']} layers, the reward models {results['num_layers']}; it "
            f"was trained on {of_validator['num_train']} other pairs and judged on {of_validator['num_validation']}."
        )
    if cut := results.get("num_truncated"):
        text += f" {cut} texts were too long and lost their oldest tokens."
    return Text(text, "note")


def _figures(results: Json, name: str) -> list[Part]:
    charts = [
        Chart(
            run_plots.reliability(model["reliability"], f"{name}-{kind}", f"Reliability of {kind}"),
            f"Reliability of {kind}.",
        )
        for kind, model in results["models"].items()
        if model.get("reliability")
    ]
    parts: list[Part] = []
    if charts:
        text = "Below the diagonal a model is surer than it is right."
        parts.append(Charts(charts, text))
    if history := results.get("stage2_history"):
        error = run_plots.over_steps(history, "mse")
        std = run_plots.over_steps(history, "std", style=1)
        parts.append(
            Charts(
                [
                    Chart(run_plots.panel([error], "BRME: held-out squared error", f"{name}-mse", floor=0.0), "Error."),
                    Chart(run_plots.panel([std], "BRME: median std of the heads", f"{name}-std", floor=0.0), "Std."),
                ],
                "While the BRME heads were fitted; the step with the lowest error is kept.",
            )
        )
    return parts
