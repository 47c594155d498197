"""`poise report`: the page of any run folder, or one page of several. No model, no torch, no network.

The settings in config.yaml say which command made a folder, so a run has its page from its first minute.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from poise.reports import comparison_run, policy_run, quickstart_page, reward_page, reward_run, study_page, trust_run
from poise.reports.blocks import Cell, Made, Page, Section, Table, render
from poise.reports.config import ReportConfig as Config
from poise.reports.quickstart_page import Verdict, number, one_line_if_damaged, percent, read_json
from poise.runtime.folders import write_file_atomic
from poise.runtime.run_kinds import kind_of

NAME = "report.html"


def run(config: Config) -> None:
    """Build the page and say where it is."""
    folders = [Path(folder) for folder in config.folders]
    print(build(folders, Path(config.output) if config.output else None))
    if config.png:
        quickstart_page.save_png(folders[0], config.png)


def build(folders: Sequence[str | Path], output: Path | None = None) -> Path:
    """Write the page and return its path: RUN/report.html of one run (of `evaluate-reward` RUN/evaluation.html), and
    report.html beside the first of several."""
    places = [Path(folder) for folder in folders]
    if len(places) == 1 and output is None and (own := _own_page(places[0])):
        return own(places[0])
    path = output or (places[0] / NAME if len(places) == 1 else places[0].resolve().parent / NAME)
    text = html(places)
    with write_file_atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def html(folders: Sequence[Path]) -> str:
    """The page of runs as text; nothing is written."""
    if len(folders) == 1 and (text := _text_of_own_page(folders[0])) is not None:
        return text
    pages = [page for folder in _expanded(folders) for page in _pages(folder)]
    policies = [folder for folder in _expanded(folders) if kind_of(folder) == "train-policy"]
    if len(policies) > 1:
        pages.insert(0, _together(policies))
    title = "" if len(pages) == 1 else " and ".join(folder.resolve().name for folder in folders[:3])
    unfinished = not all(is_finished(folder) for folder in folders)
    return render(pages, title + (" …" if len(folders) > 3 else ""), unfinished=unfinished)


def is_finished(folder: Path) -> bool:
    """Is a run complete?"""
    return (folder / "results.json").exists()


def _own_page(folder: Path) -> Callable[[str | Path], Path] | None:
    """What builds the page of a run that has one of its own."""
    kind = kind_of(folder)
    if kind == "quickstart" and (folder / "comparison" / "results.json").exists():
        return quickstart_page.build
    if kind in ("study", "evaluate-reward") and is_finished(folder):
        return {"study": study_page.build, "evaluate-reward": reward_page.build}[kind]
    return None


def _text_of_own_page(folder: Path) -> str | None:
    kind = kind_of(folder)
    if kind == "quickstart" and (folder / "comparison" / "results.json").exists():
        return quickstart_page.html(folder)
    name = {"study": NAME, "evaluate-reward": "evaluation.html"}.get(kind)
    if name and (folder / name).exists():
        return (folder / name).read_text(encoding="utf-8")
    return None


def _expanded(folders: Sequence[Path]) -> list[Path]:
    """The runs inside a quickstart in its place."""
    found: list[Path] = []
    for folder in folders:
        if kind_of(folder) == "quickstart":
            policies = sorted(folder.glob("policy-*"))  # what is being trained is looked at first
            inner = [*policies, folder / "pool", folder / "reward", folder / "comparison"]
            found += [path for path in inner if (path / "config.yaml").exists()] or [folder]
        else:
            found.append(folder)
    return found


def _pages(folder: Path) -> list[Page]:
    """The parts of a page about one run."""
    kind = kind_of(folder)
    known: dict[str, Callable[[Path], Page]] = {
        "train-policy": policy_run.page, "train-reward": reward_run.page, "best-of-n": comparison_run.best_of_n,
        "compare": comparison_run.comparison, "evaluate-reward": _evaluation, "evaluate-policy": _benchmarks,
        "trust": trust_run.page,
    }  # fmt: skip
    make = known.get(kind, _other)
    return [_checked(make, folder)]


def _checked(make: Callable[[Path], Page], folder: Path) -> Page:
    found: list[Page] = []

    def once(place: str | Path) -> Path:
        found.append(make(Path(place)))
        return Path(place)

    one_line_if_damaged(once)(folder)
    return found[0]


def _together(folders: list[Path]) -> Page:
    return _checked(lambda _: policy_run.together(folders), folders[0])


def _evaluation(folder: Path) -> Page:
    """`poise evaluate-reward` in short; its own page has all of it."""
    results, title = read_json(folder / "results.json"), f"evaluation {folder.resolve().name}"
    made = Section("How it was made", [Made.of(folder)])
    if results is None:
        return Page(title, [], [made], unfinished="This evaluation is not finished.")
    return Page(title, reward_page.verdicts(results), [made])


def _benchmarks(folder: Path) -> Page:
    """`poise evaluate-policy`."""
    results, title = read_json(folder / "results.json"), f"benchmarks {folder.resolve().name}"
    made = Section("How it was made", [Made.of(folder)])
    if results is None:
        return Page(title, [], [made], unfinished="This evaluation is not finished.")
    policies = results["policies"]
    rows: list[list[Cell]] = []
    for name in [*results["tasks"], "average"]:
        found = [policy["average"] if name == "average" else policy["tasks"][name] for policy in policies]
        rows.append([name, *map(_score, found)])
    table = Table("Benchmarks", ["Benchmark", *(policy["name"] for policy in policies)], rows, "Share right.")
    said = [
        f"{policy['name']} is right on {percent(policy['average']['mean'])} on average"
        + (
            f", {number(100 * policy['average']['difference'], 1)} points from the start "
            f"(p {policy['average']['p_value']:.2g})"
            if "difference" in policy["average"]
            else ""
        )
        for policy in policies
    ]
    return Page(title, [Verdict("unclear", f"{text}.") for text in said], [Section("Benchmarks", [table]), made])


def _score(result: dict[str, float]) -> Cell:
    mean = percent(result["mean"])
    return (mean, f"{100 * result['difference']:+.1f} points") if "difference" in result else mean


def _other(folder: Path) -> Page:
    """A study, or a quickstart that has made nothing yet."""
    text = "" if is_finished(folder) else "This run has no results yet."
    name = folder.resolve().name
    return Page(f"{kind_of(folder)} {name}", [], [Section("How it was made", [Made.of(folder)])], unfinished=text)
