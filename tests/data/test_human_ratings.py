"""Human ratings: the archive as it is, pairs as people would judge them, a split that never moves."""

import contextlib
import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from poise.data import human_ratings as ratings_module
from poise.data.human_ratings import Rated, is_held_out, judged_by_all, preference_pairs
from poise.data.types import Preference
from poise.errors import PoiseError


def rated_texts(count: int = 60) -> list[Rated]:
    return [
        Rated(("film", "phone")[i % 2], f"text {i}", tuple(min(4, max(-4, i % 9 - 4 + d)) for d in (-1, 0, 1)))
        for i in range(count)
    ]


def test_pairs_stay_in_their_domain_and_repeat_with_their_seed() -> None:
    texts = rated_texts()
    domain = {rated.text: rated.domain for rated in texts}
    pairs = preference_pairs(texts, lambda name: f"about a {name}", 300, seed=1)
    assert len(pairs) == 300
    assert all(domain[p.chosen] == domain[p.rejected] == p.source for p in pairs)
    assert all(p.prompt == f"about a {p.source}" for p in pairs)
    assert pairs == preference_pairs(texts, lambda name: f"about a {name}", 300, seed=1)
    assert pairs != preference_pairs(texts, lambda name: f"about a {name}", 300, seed=2)


def test_noise_is_the_raters_own_and_flips_add_to_it() -> None:
    texts = rated_texts()
    mean = {rated.text: rated.mean for rated in texts}

    def wrong(flip: float) -> float:
        pairs = preference_pairs(texts, str, 4000, seed=0, flip=flip)
        return sum(mean[p.chosen] < mean[p.rejected] for p in pairs) / len(pairs)

    assert 0.0 < wrong(0.0) < 0.15
    assert wrong(0.25) == pytest.approx(0.25 + wrong(0.0) * 0.5, abs=0.04)
    assert wrong(1.0) > 0.8


def test_held_out_share_is_fixed() -> None:
    share = sum(is_held_out(f"some text {i}") for i in range(20_000)) / 20_000
    assert share == pytest.approx(51 / 256, abs=0.01)
    assert [is_held_out(t) for t in ("a", "b", "c", "d", "e")] == [False, False, True, True, False]


def test_ratings_are_read_from_the_nested_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real layout in miniature: byte order mark, HTML entities, a rating without its text."""
    inner = tmp_path / "inner.tar.gz"
    files = {}
    for domain in ratings_module.DOMAINS:
        files[f"hutto_ICWSM_2014/{domain}_GroundTruth.txt"] = "1_1\t-0.9\tgood &amp; bad\n1_2\t0.5\tfine\n"
        files[f"hutto_ICWSM_2014/{domain}_anonDataRatings.txt"] = (
            "\ufeff1_1\t-0.9\t0.76\t[0, -1, 2]\n9\t1\t1\t[1]\n1_2\t0.5\t0.1\t[1, 0]\n"
        )
    with tarfile.open(inner, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    outer = tmp_path / "package.tar.gz"
    with tarfile.open(outer, "w:gz") as archive:
        archive.add(inner, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")

    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    asked: list[str] = []

    def package_file(name: str, *_: object, **__: object) -> contextlib.nullcontext[Path]:
        asked.append(name)
        return contextlib.nullcontext(outer)

    monkeypatch.setattr(ratings_module, "package_file", package_file)
    with pytest.raises(PoiseError, match="human-ratings is not what this version of poise knows"):
        ratings_module.human_ratings()
    assert not (tmp_path / "cache" / "human-ratings").exists()
    ratings_module._fetch_ratings(tmp_path)
    monkeypatch.setattr(ratings_module, "_ROWS_SHA256", ratings_module._digest(tmp_path))
    ratings = ratings_module.human_ratings()
    assert Counter(r.domain for r in ratings) == dict.fromkeys(ratings_module.DOMAINS, 2)
    assert ratings[0] == Rated("movieReviewSnippets", "good & bad", (0, -1, 2))
    assert len(asked) == 3
    assert ratings_module.human_ratings() == ratings
    assert len(asked) == 3  # it was in the cache
    file = tmp_path / "cache" / "human-ratings" / "ratings.jsonl"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole.replace(b"-1", b"+1", 1)):
        file.write_bytes(damaged)
        assert ratings_module.human_ratings() == ratings
        assert file.read_bytes() == whole
    assert len(asked) == 6
    monkeypatch.delattr(ratings_module, "package_file")
    assert ratings_module.human_ratings() == ratings


def test_judged_by_all_turns_what_a_single_rater_saw_differently() -> None:
    ratings = [Rated("d", "liked", (4, 3)), Rated("d", "disliked", (-1, -3)), Rated("d", "as much", (3, 4))]
    as_seen = [
        Preference("p", "disliked", "liked"),
        Preference("p", "liked", "disliked"),
        Preference("p", "as much", "liked"),
    ]
    found = [(pair.chosen, pair.rejected) for pair in judged_by_all(as_seen, ratings)]
    assert found == [("liked", "disliked"), ("liked", "disliked"), ("as much", "liked")]
