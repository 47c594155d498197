"""The parts that run pages are made of (text, tables, charts, completions), and the one template that shows them.

Everything but the charts is escaped by the template. Tables become lists on a narrow screen, so no column is cut.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from markupsafe import Markup

from poise.reports.quickstart_page import Verdict, page_template, read_json
from poise.runtime.run_folder import Json

RELOAD_SECONDS = 30

Cell = str | tuple[str, str]  # a value, and a smaller line below it


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    part: ClassVar = "text"
    text: str
    kind: Literal["", "note", "warning", "code"] = ""


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first cell of a row names it."""

    part: ClassVar = "table"
    label: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure as SVG text that we drew, and what it shows in words."""

    svg: str
    description: str

    @property
    def markup(self) -> Markup:
        return Markup(self.svg)


@dataclass(frozen=True)
class Charts:
    """Small figures side by side."""

    part: ClassVar = "charts"
    charts: Sequence[Chart]
    caption: str = ""


@dataclass(frozen=True)
class Answer:
    """One completion and what is said of it."""

    title: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Answers:
    """Completions of prompts, those of one prompt side by side."""

    part: ClassVar = "answers"
    prompts: Sequence[tuple[str, Sequence[Answer]]]
    note: str = ""


@dataclass(frozen=True)
class Made:
    """How a run was made: its command, versions and config.yaml."""

    part: ClassVar = "made"
    command: str
    environment: Json
    config: str

    @classmethod
    def of(cls, folder: Path) -> "Made":
        environment = read_json(folder / "environment.json") or {}
        config = folder / "config.yaml"
        text = config.read_text(encoding="utf-8") if config.exists() else ""
        return cls(shlex.join(environment.get("command") or []), environment, text)


Part = Text | Table | Charts | Answers | Made


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """What is known of one run: what it came to first, then warnings, then sections.

    unfinished: what the run still does; the page of such a run loads itself anew.
    """

    title: str
    findings: Sequence[Verdict]
    sections: Sequence[Section]
    warnings: Sequence[str] = ()
    unfinished: str = ""
    glossary: Sequence[str] = field(default=())


GLOSSARY = {
    "reward": "What the policy was trained for: the reward model’s heads, combined by the objective, minus the mean "
    "and divided by the std on the initial policy’s completions. Rewards of different objectives have different units.",
    "KL": "Distance from the initial policy, in nats per completion.",
    "gap": "Reward of the nominal head minus that of the worst head.",
    "disagreement": "Std of the heads’ mean rewards.",
    "routing std": "Std that the nominal head gives itself.",
    "ended": "Share of completions that ended by themselves; the others were cut at the largest length.",
    "monitor": "An online sign of over-optimization; it compares a run with its own first steps, and reads no gold.",
    "gold": "A reference score that stands for human judgment. No training reads it.",
    "proxy": "The learned reward that is optimized in place of human judgment.",
    "accuracy": "Share of pairs that the reward model orders as people did; a coin has 50 %.",
    "NLL": "Negative log-likelihood of people’s choices, in nats a pair; a coin has 0.693.",
    "AUROC": "How often a wrongly ordered pair has the larger uncertainty than a rightly ordered one; a coin has 0.50.",
    "validator": "Another reward model that is only watched: nothing is trained on what it says.",
    "transfer": "The validator’s gain divided by the reward’s own, each in stds of the initial completions.",
    "best-of-n": "Of n completions the one with the highest reward.",
}


def render(pages: Sequence[Page], title: str = "", *, unfinished: bool = False) -> str:
    """One HTML page of one run, or of several with a table of contents. unfinished: the page loads itself anew."""
    terms = dict.fromkeys(term for page in pages for term in page.glossary)
    return page_template("run.html.j2").render(
        title=title or pages[0].title,
        pages=pages,
        reload=RELOAD_SECONDS if unfinished else None,
        glossary={term: GLOSSARY[term] for term in terms},
        num_sections=sum(len(page.sections) for page in pages),
    )
