"""Preferences, prompts and human ratings: reading, checking, splitting."""

import hashlib
import html
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from poise.errors import PoiseError
from poise.models import Prompt
from poise.registry import cached, package_file
from poise.runs import read_jsonl, write_jsonl

Row = TypeVar("Row")
OnBadRow = Literal["error", "skip"]


@dataclass(frozen=True)
class Preference:
    """Somebody preferred `chosen` to `rejected` as the answer to `prompt`."""

    prompt: Prompt
    chosen: str
    rejected: str
    source: str = ""


@dataclass(frozen=True)
class Sample:
    """A prompt with one completion of it."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True)
class Rated:
    """A text with every rating it got, -4 (most negative) … 4 (most positive)."""

    domain: str
    text: str
    ratings: tuple[int, ...]

    @property
    def mean(self) -> float:
        return sum(self.ratings) / len(self.ratings)


def read_preferences(path: str | Path, on_bad_row: OnBadRow = "error") -> list[Preference]:
    """JSON lines of `prompt`, `chosen`, `rejected` (text; the prompt may be a conversation), `source` optional."""
    return _read(path, _preference, on_bad_row)


def read_prompts(path: str | Path, on_bad_row: OnBadRow = "error") -> list[Prompt]:
    """JSON lines of `prompt`: text or a conversation."""
    return _read(path, lambda row: _prompt(row), on_bad_row)


def read_samples(path: str | Path, on_bad_row: OnBadRow = "error") -> list[Sample]:
    """JSON lines of `prompt`, `completion`."""
    return _read(path, lambda row: Sample(_prompt(row), _text(row, "completion")), on_bad_row)


def _read(path: str | Path, parse: Callable[[dict[str, Any]], Row], on_bad_row: OnBadRow) -> list[Row]:
    """Every row of a JSON-lines file.

    A bad row raises PoiseError with file:line and the reason; with on_bad_row="skip" it is set aside, with its
    reason, in FILE.bad.jsonl, and counted aloud.
    """
    path = Path(path)
    rows: list[Row] = []
    bad: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            rows.append(parse(_object(line)))
        except ValueError as error:
            if on_bad_row == "error":
                raise PoiseError(f"{path}:{number}: {error} (--on-bad-row skip sets bad rows aside)") from None
            bad.append({"line": number, "reason": str(error), "row": line.rstrip("\n")})
    if bad:
        aside = path.with_suffix(".bad.jsonl")
        write_jsonl(aside, bad)
        print(f"{path}: {len(bad)} bad rows of {len(bad) + len(rows)} set aside in {aside}")
    if not rows:
        raise PoiseError(f"{path} has no usable row")
    return rows


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except FileNotFoundError:
        raise PoiseError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PoiseError(f"cannot read {path}: {error}") from None


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object was expected, not {type(row).__name__}")
    return row


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f"no {key!r}")
    if not isinstance(row[key], str):
        raise ValueError(f"{key!r} must be text, not {type(row[key]).__name__}")
    if not row[key].strip():
        raise ValueError(f"{key!r} is empty")
    return row[key]


def _prompt(row: dict[str, Any]) -> Prompt:
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        for turn in prompt:
            if not isinstance(turn, dict) or set(turn) < {"role", "content"} or not isinstance(turn["content"], str):
                raise ValueError("a conversation is a list of {'role': …, 'content': text}")
        if not prompt:
            raise ValueError("'prompt' is an empty conversation")
        return prompt
    return _text(row, "prompt")


def _preference(row: dict[str, Any]) -> Preference:
    preference = Preference(_prompt(row), _text(row, "chosen"), _text(row, "rejected"), str(row.get("source", "")))
    if preference.chosen == preference.rejected:
        raise ValueError("'chosen' and 'rejected' are the same text")
    return preference


def write_preferences(path: Path, preferences: list[Preference]) -> None:
    """As `read_preferences` reads them."""
    write_jsonl(path, [asdict(preference) for preference in preferences])


# ---- human ratings: every rating of 23,504 short texts, from the source package of VADER (Hutto & Gilbert 2014) ----

_RATINGS_PACKAGE = "vaderSentiment==3.3.2"
_RATINGS_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
DOMAINS = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")


def human_ratings() -> list[Rated]:
    """All texts with all ratings, fetched once from the package registry and cached."""
    folder = cached("human-ratings", _fetch_ratings)
    rows = read_jsonl(folder / "ratings.jsonl")
    return [Rated(row["domain"], row["text"], tuple(row["ratings"])) for row in rows]


def _fetch_ratings(folder: Path) -> None:
    with package_file(_RATINGS_PACKAGE, _RATINGS_SHA256, source=True) as archive, tarfile.open(archive) as outer:
        member = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(_member(outer, member))) as inner:
            rows = [row for domain in DOMAINS for row in _parse_ratings(inner, domain)]
    write_jsonl(folder / "ratings.jsonl", rows)


def _parse_ratings(archive: tarfile.TarFile, domain: str) -> Iterator[dict[str, Any]]:
    def lines(kind: str) -> Iterator[list[str]]:
        raw = _member(archive, f"hutto_ICWSM_2014/{domain}_{kind}.txt").decode("utf-8-sig", "replace")
        return (line.split("\t") for line in raw.splitlines() if line.count("\t") >= 2)

    texts = {fields[0]: html.unescape("\t".join(fields[2:])).strip() for fields in lines("GroundTruth")}
    for fields in lines("anonDataRatings"):
        if text := texts.get(fields[0]):
            yield {"domain": domain, "text": text, "ratings": json.loads(fields[3])}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None
    return file.read()


def is_held_out(text: str) -> bool:
    """The fixed split: a fifth of all texts, by their hash, is never trained on."""
    return hashlib.sha256(text.encode()).digest()[0] < 51


def preference_pairs(
    ratings: list[Rated],
    prompt: Callable[[str], Prompt],
    num_pairs: int,
    seed: int,
    *,
    flip: float = 0.0,
) -> list[Preference]:
    """Pairs as a person would judge them: two texts of one domain, one randomly drawn rater each.

    The better rated is chosen; a tie is drawn anew. So the label noise is the raters' own.
    prompt: the question a text of a domain answers.   flip: share of labels turned round on top of that.
    """
    generator = random.Random(seed)
    by_domain: dict[str, list[Rated]] = {}
    for rated in ratings:
        by_domain.setdefault(rated.domain, []).append(rated)
    domains = sorted(by_domain)
    weights = [len(by_domain[domain]) for domain in domains]
    pairs: list[Preference] = []
    while len(pairs) < num_pairs:
        (domain,) = generator.choices(domains, weights)
        first, second = generator.sample(by_domain[domain], 2)
        one, two = generator.choice(first.ratings), generator.choice(second.ratings)
        if one == two or first.text == second.text:
            continue
        chosen, rejected = (first, second) if (one > two) != (generator.random() < flip) else (second, first)
        pairs.append(Preference(prompt(domain), chosen.text, rejected.text, domain))
    return pairs
