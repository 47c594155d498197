"""Judgments of comparisons, read from FOLDER/judgments.jsonl: written by hand, on the page, or by a chat model."""

from collections import Counter
from pathlib import Path
from textwrap import shorten
from typing import Any

from poise.data.rows import read_rows
from poise.errors import PoiseError
from poise.runtime import records
from poise.runtime.display import visible
from poise.runtime.progress import console, progress
from poise.runtime.run_folder import append_jsonl
from poise.studies.chat_judge import NEITHER, ChatJudge, agree
from poise.studies.judge_settings import JudgeSettings
from poise.studies.judging import Judging

_REASONS = 5  # kinds that are shown


def judgments_of(folder: Path, judge: JudgeSettings) -> dict[int, str] | None:
    """By number of the comparison: a, b or tie. Those that are not judged yet are judged, as the settings say.

    folder: holds comparisons.jsonl (`id`, `prompt`, `a`, `b`). Returns None, and says what to do, if nothing is judged
    and nobody is named to do it. Ctrl-C and errors leave what was judged.
    """
    path = folder / "judgments.jsonl"
    comparisons = list(records.read_rows(folder / "comparisons.jsonl"))
    judged = read_judgments(path, len(comparisons)) if path.exists() else {}
    if judge.page:
        judged = _by_page(comparisons, judged, path)
    elif judge.judge:
        judged = _by_model(ChatJudge(judge.judge, judge.judge_model), comparisons, judged, path)
    elif not path.exists():
        console.print(f"{len(comparisons)} comparisons to judge: {folder / 'comparisons.jsonl'}", soft_wrap=True)
        console.print(
            f'write {{"id": 0, "better": "a"}} (or b, or tie) for each into {path} and start again; or use --page, or '
            "--judge for a chat model",
            soft_wrap=True,
        )
        return None
    if not judged:
        raise PoiseError(f"{path} has no judgments")
    _refuse_judge_of_places(path)
    return judged


def read_judgments(path: Path, num: int) -> dict[int, str]:
    """By number of the comparison: a, b or tie. Raises PoiseError for another answer, and for one given twice."""
    found: dict[int, str] = {}

    def parse(row: dict[str, Any]) -> None:
        number, better = row.get("id"), row.get("better")
        if type(number) is not int or not 0 <= number < num:
            raise ValueError(f"'id' must be the number of a comparison, 0 to {num - 1}")
        if better not in ("a", "b", "tie"):
            raise ValueError("'better' must be a, b or tie")
        if number in found:
            raise ValueError(f"comparison {number} is judged twice")
        found[number] = better

    read_rows(path, parse)
    return found


def _by_page(comparisons: list[dict[str, Any]], judged: dict[int, str], path: Path) -> dict[int, str]:
    server = Judging(comparisons, judged, path)
    console.print(f"judge at {server.address}", soft_wrap=True)
    try:
        return server.serve()
    finally:
        server.server_close()


def _by_model(
    judge: ChatJudge, comparisons: list[dict[str, Any]], judged: dict[int, str], path: Path
) -> dict[int, str]:
    left = [row for row in comparisons if row["id"] not in judged]
    consistent, found, why, unread = 0, dict(judged), Counter[str](), ""
    with progress(f"judged by {judge.model}", len(comparisons), len(judged)) as advance:
        for one in judge.judge(left):
            consistent += one.consistent
            if one.better is None:
                why[one.left_out] += 1
                unread = unread or one.unread
            else:
                found[one.number] = one.better
                row = {"id": one.number, "better": one.better, "judge": judge.model, "replies": list(one.replies)}
                append_jsonl(path, [row])
            advance()
    such = f", such as {shorten(visible(unread), 80, placeholder='…')!r}" if unread else ""
    if not found:
        raise PoiseError(f"no reply of the judge was a, b or tie{such or f': {why.most_common(1)[0][0]}'}")
    if asked := len(left) - why.total():
        console.print(f"the judge's answer was the same in both orders for {consistent} of {asked} comparisons")
    if why:
        console.print(f"{why.total()} comparisons are left out; start again to ask again")
        for reason, count in why.most_common(_REASONS):
            console.print(f"  {count}: {reason}{such if reason == NEITHER else ''}", markup=False, soft_wrap=True)
    return found


def _refuse_judge_of_places(path: Path) -> None:
    """Raise PoiseError for judgments by a chat model that never named the same completion in both orders.

    All of them are ties then, and would say that no completion is better than another.
    """
    both: dict[str, list[bool]] = {}
    for row in records.read_rows(path):
        if replies := row.get("replies"):
            both.setdefault(str(row.get("judge")), []).append(agree(replies))
    for judge, agreed in both.items():
        if len(agreed) > 1 and not any(agreed):
            raise PoiseError(
                f"{path}: {judge} named one completion in one order and the other one in the other, in all "
                f"{len(agreed)} comparisons: it judges places, not answers; delete its rows, and take another judge"
            )
