"""Reading what users have, and saying clearly what is wrong with it."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from poise import data
from poise.data import Preference, Rated, Sample, is_held_out, preference_pairs, read_preferences, read_prompts
from poise.errors import PoiseError


def write(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b", "other": 3}'


def test_rows_as_they_come(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    path = write(tmp_path, GOOD, "", json.dumps({"prompt": turns, "chosen": "c", "rejected": "d", "source": "s"}))
    assert read_preferences(path) == [Preference("p", "a", "b"), Preference(turns, "c", "d", "s")]
    assert read_prompts(path) == ["p", turns]


def test_samples(tmp_path: Path) -> None:
    assert data.read_samples(write(tmp_path, '{"prompt": "p", "completion": "c"}')) == [Sample("p", "c")]


BAD = {
    "{oops": "not JSON: Expecting property name enclosed in double quotes at column 2",
    "[1]": "a JSON object was expected, not list",
    '{"prompt": "p", "chosen": "a"}': "no 'rejected'",
    '{"prompt": "p", "chosen": "a", "rejected": 3}': "'rejected' must be text, not int",
    '{"prompt": "p", "chosen": " ", "rejected": "b"}': "'chosen' is empty",
    '{"prompt": "p", "chosen": "a", "rejected": "a"}': "the same text",
    '{"prompt": [], "chosen": "a", "rejected": "b"}': "empty conversation",
    '{"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}': "a conversation is a list of",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_row_names_file_line_and_reason(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, GOOD, line)
    with pytest.raises(PoiseError) as caught:
        read_preferences(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert BAD[line] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_rows_can_be_set_aside_and_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, GOOD, *BAD)
    assert read_preferences(path, "skip") == [Preference("p", "a", "b")]
    aside = [json.loads(line) for line in (tmp_path / "rows.bad.jsonl").read_text().splitlines()]
    assert [row["line"] for row in aside] == list(range(2, 2 + len(BAD)))
    assert [row["row"] for row in aside] == list(BAD)
    assert f"{len(BAD)} bad rows of {len(BAD) + 1}" in capsys.readouterr().out


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match="no such file"):
        read_preferences(tmp_path / "nothing.jsonl")
    with pytest.raises(PoiseError, match="no usable row"):
        read_preferences(write(tmp_path, ""))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PoiseError, match="cannot read"):
        read_preferences(tmp_path / "binary")


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
    for domain in data.DOMAINS:
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

    import contextlib

    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "package_file", lambda *_, **__: contextlib.nullcontext(outer))
    ratings = data.human_ratings()
    assert Counter(r.domain for r in ratings) == dict.fromkeys(data.DOMAINS, 2)
    assert ratings[0] == Rated("movieReviewSnippets", "good & bad", (0, -1, 2))
    monkeypatch.delattr(data, "package_file")
    assert data.human_ratings() == ratings  # from the cache
