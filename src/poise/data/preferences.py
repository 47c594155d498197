"""Preferences, prompts and samples as people have them: reading, checking, and saying what is wrong.

Files: see files.py. Forms of conversations: see conversations.py. docs/data.md has an example of every form.

A preference row is any of
    prompt, chosen, rejected            text, or conversations
    chosen, rejected                    the prompt is what the two share: an implicit prompt
    prompt, response_a, response_b, winner
                                        a, b or a tie; other columns that say so: see verdicts.py
    prompt, response_1, response_2, annotators
                                        one vote per annotator: 1, 2, or anything else for a tie
    prompt, responses, ratings          lists: of each two responses, the higher rated one is chosen
    prompt, completion, rating          the same, one response a row; rows of one prompt are taken together
Other columns that say the same: see other_forms.py. The first two may carry `margin` (by how much the rewards should
differ, >= 0) and `score_chosen`, `score_rejected` (equal scores are a tie); any may carry `source`, and `system`, the
system turn. A prompt that its answers repeat is read once.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from poise.data.conversations import (
    after_system,
    answered,
    but_other_names,
    holds_turns,
    joined,
    looks_like_turns,
    other_completion_name,
    prompt_alone,
    prompt_key,
    prompt_of,
    same_turns,
    split_answer,
    system_of,
    text_of,
    turns_of,
)
from poise.data.files import RawRow, as_object, raw_rows
from poise.data.other_forms import FORMS, in_our_columns, in_our_columns_with_verdict, one_by_one, with_prompt
from poise.data.ratings import Rated, by_prompt, number_of, ranked, rated_list
from poise.data.rows import Check, OnBadRow, Understood, finish, parsed_rows, read_rows, short
from poise.data.types import Preference, Prompt, Sample
from poise.data.verdicts import check_votes, optional_number, scored_equal, votes_of
from poise.runtime.run_folder import write_jsonl
from poise.runtime.settings import HUGE

__all__ = [
    "Check", "OnBadRow", "Preference", "Sample", "as_object", "iter_preferences", "iter_samples", "preferences_of",
    "prompt_of", "raw_rows", "read_preferences", "read_prompts", "read_rows", "read_samples", "write_preferences",
]  # fmt: skip

# A text repeats its prompt if it begins with it, and the prompt is long enough that this is no accident.
_REPEATED_WORDS = 3


def read_preferences(
    path: str | Path,
    on_bad_row: OnBadRow = "error",
    check: Check | None = None,
    understood: Understood | None = None,
    *,
    rows: Iterable[tuple[int, RawRow]] | None = None,
) -> list[Preference]:
    """Every preference of a file, folder or hub id; ties and repeated rows are left out and counted aloud.

    check: is asked about every prompt with its answers; a ValueError of it refuses the row.
    understood: filled with what the rows were.   rows: of the file, if they have been read already.
    """
    understood = understood or Understood(str(path))
    understood.bar = True
    return list(iter_preferences(path, on_bad_row, check, understood, rows=rows))


def iter_preferences(
    path: str | Path,
    on_bad_row: OnBadRow = "error",
    check: Check | None = None,
    understood: Understood | None = None,
    *,
    rows: Iterable[tuple[int, RawRow]] | None = None,
) -> Iterator[Preference]:
    """As `read_preferences`, one at a time as the file is read; only rows of one rated answer wait for its end."""
    understood = understood or Understood(str(path))
    rated: list[Rated] = []
    # Votes repeat a pair on purpose; the same row twice is an accident that would leak from training to validation.
    seen: set[bytes] = set()

    def parse(row: dict[str, Any]) -> _Read:
        read = read_row(row)
        if check:
            _ask(check, read)
        return read

    for number, read in parsed_rows(understood, parse, on_bad_row, rows):
        understood.forms[read.form] += 1
        for what, example in read.notes:
            understood.note(what, f"line {number}: {example}")
        if isinstance(read.found, Rated):
            rated.append(read.found)
        elif not read.found:
            understood.ties += 1
        elif (key := _row_key(read.found)) in seen:
            understood.repeats += 1
        else:
            seen.add(key)
            understood.used += 1
            yield from read.found
    for pairs in by_prompt(rated, understood):
        yield from pairs
    finish(understood)


def read_prompts(
    path: str | Path,
    on_bad_row: OnBadRow = "error",
    check: Check | None = None,
    understood: Understood | None = None,
    *,
    rows: Iterable[tuple[int, RawRow]] | None = None,
) -> list[Prompt]:
    """Rows with a `prompt`: text or a conversation. check, understood, rows: as `read_preferences` takes them."""

    def parse(row: dict[str, Any]) -> Prompt:
        prompt = _prompt_of_any(row)
        if check:
            check(prompt, ())
        return prompt

    understood = understood or Understood(str(path))
    understood.bar = True
    prompts = []
    for number, prompt in parsed_rows(understood, parse, on_bad_row, rows):
        understood.used += 1
        understood.forms["prompt"] += 1
        _note_prompt(understood, number, prompt)
        prompts.append(prompt)
    finish(understood)
    return prompts


def read_samples(path: str | Path, on_bad_row: OnBadRow = "error", check: Check | None = None) -> list[Sample]:
    """Rows of `prompt`, `completion`. check: as `read_preferences` takes it."""
    return list(iter_samples(path, on_bad_row, check, Understood(str(path), bar=True)))


def iter_samples(
    path: str | Path,
    on_bad_row: OnBadRow = "error",
    check: Check | None = None,
    understood: Understood | None = None,
    *,
    rows: Iterable[tuple[int, RawRow]] | None = None,
) -> Iterator[Sample]:
    """Rows of `prompt`, `completion`, one at a time as the file is read; parameters as of `read_preferences`."""

    def parse(row: dict[str, Any]) -> list[Sample]:
        samples = [sample_of(one) for one in one_by_one(row)]
        if check:
            check(samples[0].prompt, [sample.completion for sample in samples])
        return samples

    understood = understood or Understood(str(path))
    for number, samples in parsed_rows(understood, parse, on_bad_row, rows):
        understood.used += 1
        understood.forms["prompt, completions" if len(samples) > 1 else "prompt, completion"] += 1
        _note_prompt(understood, number, samples[0].prompt)
        yield from samples
    finish(understood)


def write_preferences(path: Path, preferences: list[Preference]) -> None:
    """As `read_preferences` reads them."""
    write_jsonl(path, [asdict(preference) for preference in preferences])


def _ask(check: Check, read: "_Read") -> None:
    if isinstance(read.found, Rated):
        check(read.found.prompt, (read.found.response,))
        return
    for pair in dict.fromkeys((json.dumps(pair.prompt), pair.chosen, pair.rejected) for pair in read.found):
        check(json.loads(pair[0]), pair[1:])


def _row_key(votes: list[Preference]) -> bytes:
    """Equal rows have equal keys; a hash, so that memory does not grow by all the texts once more."""
    text = json.dumps([asdict(vote) for vote in votes], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _note_prompt(understood: Understood, number: int, prompt: Prompt) -> None:
    for what, example in _prompt_notes(prompt):
        understood.note(what, f"line {number}: {example}")


# ---- what a row may look like ----


class _Read(NamedTuple):
    """What a row says: its preferences (one, one per vote, one per two ratings), or a rating that waits for others.

    notes: (assumption, example) that a reader of the file should know.
    """

    found: list[Preference] | Rated
    form: str
    notes: tuple[tuple[str, str], ...] = ()


_IMPLICIT = "have no 'prompt'; it is what chosen and rejected share"
_REPEATED = "repeat the prompt in both texts; it is read once"
_ANSWERED = "have a prompt that ends in a turn of the assistant; the answer comes after it"
_EQUAL = "rate several answers the same; such pairs are left out"
_SYSTEM = "have a system turn in a column of its own; the prompt comes after it"
_PLAIN_TEXT = "hold marks of speakers in a prompt that is read as plain text of one user turn"


def preferences_of(row: dict[str, Any]) -> list[Preference] | Rated:
    """The preferences of a row: one, one per vote, one per two ratings; or a rating that waits for others."""
    return read_row(row).found


def sample_of(row: dict[str, Any]) -> Sample:
    """A prompt with one completion: text, or turns that end in the assistant's; or `messages` that do."""
    if found := answered(row):
        if not found[1].strip():
            raise ValueError("the last turn is empty")
        return Sample(*found)
    prompt = prompt_alone(row)
    turns = turns_of(row.get("completion"), "completion")
    if turns is None:
        if "completion" not in row and (other := other_completion_name(row)):
            raise ValueError(f"no 'completion', but {other!r}; rename it to 'completion'")
        if "completion" not in row and "chosen" in row:
            raise ValueError("a preference, not a completion: no 'completion' but 'chosen'; rename the one to score")
        return Sample(after_system(row, prompt), text_of(row, "completion"))
    shared, answer = split_answer(turns, "completion")
    if not answer.strip():
        raise ValueError("'completion' is empty")
    return Sample(after_system(row, joined(prompt, shared, "completion")), answer)


def read_row(row: dict[str, Any]) -> _Read:
    """What a row says, by the columns it has; ValueError says what is wrong."""
    given, (row, found) = row, in_our_columns_with_verdict(row)
    source = str(row.get("source") or "")
    margin = optional_number(row, "margin") or 0.0
    if not 0 <= margin <= HUGE:
        raise ValueError(f"'margin' must be at least 0 and at most {HUGE:g}, not {margin}")
    if "chosen" not in row and "annotators" not in row and ("rating" in row or "ratings" in row):
        if margin:
            raise ValueError("'margin' goes with one pair, not with ratings")
        return _rated(given, row, source)
    if "annotators" in row:
        first, second = (text_of(row, key) for key in ("response_1", "response_2"))
        order = {1: (first, second), 2: (second, first)}
        votes = votes_of(row["annotators"])
        check_votes(votes, found)
        prompt = prompt_of(row)
        pairs = [(prompt, *order[vote]) for vote in votes if vote in order]
        form, notes = "prompt, response_1, response_2, annotators", _prompt_notes(prompt)
        if first.strip() == second.strip():
            raise ValueError("'response_1' and 'response_2' are the same text")
    else:
        tie = scored_equal(row)
        prompt, chosen, rejected, notes = _pair(row)
        sides = ["chosen", "rejected"] if "chosen" in given or found is None else ["two responses", found.column]
        form = ", ".join([name for name in (prompt_key(row),) if name] + sides)
        if chosen.strip() == rejected.strip():
            raise ValueError("'chosen' and 'rejected' are the same text, but for white space at their ends")
        pairs = [] if tie else [(prompt, chosen, rejected)]
        for key, text in (("chosen", chosen), ("rejected", rejected)):
            if not text.strip():
                raise ValueError(f"{key!r} is empty")
    notes += _system_notes(row)
    return _Read([Preference(prompt, c, r, source, margin) for prompt, c, r in pairs], form, notes)


def _rated(given: dict[str, Any], row: dict[str, Any], source: str) -> _Read:
    """Of several rated responses of a row, or of one."""
    if "responses" in row and "ratings" in row:
        rated = rated_list(row, source)
        equal = len({one.rating for one in rated}) < len(rated)
        notes = ((_EQUAL, short([one.rating for one in rated])),) if equal else ()
        return _Read(ranked(rated), "prompt, responses, ratings", notes + _system_notes(row))
    key = "completion" if "completion" in row else "response"
    one = Rated(prompt_of(row), text_of(row, key), number_of(row, "rating"), source)
    asked = prompt_key(given) or "prompt"
    form = f"{asked}, {key}, rating" if key in given else f"{asked}, rating"
    return _Read(one, form, _system_notes(row))


def _prompt_of_any(row: dict[str, Any]) -> Prompt:
    """The prompt of a row of prompts, or of a row that was made to train on: what comes before the answer."""
    row = with_prompt(row)
    key = prompt_key(row)
    if key is None and "chosen" in in_our_columns(row):
        found = read_row(row).found
        if isinstance(found, list) and found:
            return found[0].prompt
    prompt = prompt_of(row)
    if key in ("messages", "conversations") and isinstance(prompt, list) and len(prompt) > 1:
        return prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
    return prompt


def _prompt_notes(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    if isinstance(prompt, str):
        return ((_PLAIN_TEXT, short(prompt)),) if looks_like_turns(prompt) else ()
    return ((_ANSWERED, short(prompt[-1]["content"])),) if prompt[-1]["role"] == "assistant" else ()


def _system_notes(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return () if (text := system_of(row)) is None else ((_SYSTEM, short(text)),)


# ---- pairs ----

_Notes = tuple[tuple[str, str], ...]


def _pair(row: dict[str, Any]) -> tuple[Prompt, str, str, _Notes]:
    """(prompt, chosen, rejected, notes) of a row whose parts agree."""
    prompt, chosen, rejected, notes = _pair_alone(row)
    return after_system(row, prompt), chosen, rejected, notes


def _pair_alone(row: dict[str, Any]) -> tuple[Prompt, str, str, _Notes]:
    """As `_pair`, without the column `system`."""
    prompt = prompt_alone(row) if prompt_key(row) is not None else None
    if prompt is None and (names := but_other_names(row)):
        raise ValueError(f"no 'prompt'{names}")
    if "chosen" not in row and "rejected" not in row:
        raise ValueError(f"no 'chosen' and no 'rejected', but {', '.join(map(repr, row)) or 'nothing'}; {FORMS}")
    one, other = (turns_of(row.get(key), key) for key in ("chosen", "rejected"))
    if one is not None and other is not None:
        return _pair_of_conversations(prompt, one, other)
    chosen, rejected = (_plain(row, key, turns) for key, turns in (("chosen", one), ("rejected", other)))
    if (one is None) != (other is None):
        talks, says = ("chosen", "rejected") if other is None else ("rejected", "chosen")
        raise ValueError(f"{talks!r} is a conversation, and {says!r} is text")
    if prompt is None:
        if name := holds_turns(row):
            raise ValueError(f"no 'prompt', but the turns in {name!r}; rename it to 'prompt'")
        # Not in the middle of a word: "a good film" and "a gory one" share "a ", not "a g".
        cut = chosen.rfind(" ", 0, _num_shared(chosen, rejected)) + 1
        if not cut:
            raise ValueError("no 'prompt', and 'chosen' and 'rejected' share no beginning")
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        return prompt, chosen, rejected, ((_IMPLICIT, f"{short(prompt)}, then {short(chosen)}"),)
    notes = _prompt_notes(prompt)
    if isinstance(prompt, str) and _repeat_the_prompt(prompt, chosen, rejected):
        length = len(prompt.rstrip())
        notes += ((_REPEATED, f"{short(prompt)}, then {short(chosen[length:])}"),)
        chosen, rejected = chosen[length:], rejected[length:]
    return prompt, chosen, rejected, notes


def _plain(row: dict[str, Any], key: str, turns: list[dict[str, Any]] | None) -> str:
    return text_of(row, key) if turns is None else ""


def _pair_of_conversations(
    prompt: Prompt | None, one: list[dict[str, Any]], other: list[dict[str, Any]]
) -> tuple[Prompt, str, str, _Notes]:
    (shared, chosen), (others, rejected) = split_answer(one, "chosen"), split_answer(other, "rejected")
    if not same_turns(shared, others):
        raise ValueError("'chosen' and 'rejected' must be one conversation that differs in its last turn only")
    if prompt is not None:
        return joined(prompt, shared, "chosen"), chosen, rejected, ()
    if not shared:
        raise ValueError("no 'prompt', and 'chosen' and 'rejected' share no turn")
    return shared, chosen, rejected, ((_IMPLICIT, f"{len(shared)} turns, then {short(chosen)}"),)


def _repeat_the_prompt(prompt: str, chosen: str, rejected: str) -> bool:
    """Do both texts begin with the prompt, as those of whole documents do?"""
    text = prompt.rstrip()
    if len(text.split()) < _REPEATED_WORDS:
        return False
    return all(
        answer.startswith(text) and (text != prompt or answer[len(text) : len(text) + 1].isspace())
        for answer in (chosen, rejected)
    )


def _num_shared(one: str, other: str) -> int:
    """Length of the common beginning of two texts."""
    shortest = min(len(one), len(other))
    return next((i for i in range(shortest) if one[i] != other[i]), shortest)
