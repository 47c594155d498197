"""The page of `poise choose`: one comparison at a time, nothing in it is run, every answer is on disk at once."""

import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from poise.runtime.records import read_rows
from poise.studies.judging import Judging
from poise.studies.judgments import read_judgments

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e'\"&"
COMPARISONS = [
    {"id": 0, "prompt": HOSTILE, "a": HOSTILE, "b": "fine"},
    {"id": 1, "prompt": [{"role": "user", "content": "Which film?"}], "a": "one", "b": "two"},
    {"id": 2, "prompt": "last", "a": "", "b": "x"},
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Judging]:
    judging = Judging(COMPARISONS, {}, tmp_path / "judgments.jsonl")
    judging.timeout = 0.02
    thread = threading.Thread(target=judging.serve, daemon=True)
    thread.start()
    yield judging
    judging.judged = dict.fromkeys(range(len(COMPARISONS)), "tie")
    thread.join(5)
    judging.server_close()
    assert not thread.is_alive()


def asked(address: str, host: str = "", **fields: str) -> tuple[int, str]:
    data = urllib.parse.urlencode(fields).encode() if fields else None
    request = urllib.request.Request(address, data, {"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_judgments_are_asked_one_after_the_other(server: Judging) -> None:
    status, page = asked(server.address)
    assert (status, "1 of 3" in page) == (200, True)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m\\u202e&#x27;&quot;&amp;" in page
    for number, better in enumerate(("a", "tie", "b")):
        status, page = asked(server.address, id=str(number), better=better)
        assert status == 200
        assert len(list(read_rows(server.path))) == number + 1
        assert ("user: Which film?" in page) == (number == 0)
    assert "All are judged" in page
    assert read_judgments(server.path, 3) == server.serve() == {0: "a", 1: "tie", 2: "b"}


def test_an_answer_is_given_once(server: Judging) -> None:
    asked(server.address, id="0", better="a")
    asked(server.address, id="0", better="b")  # a second click, or the browser's back
    assert read_judgments(server.path, 3) == {0: "a"}


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "3", "better": "a"}, {"id": "-1", "better": "a"}, {"id": "0", "better": "c"}, {"id": "²"}, {"x": "1"},
        {"id": "0", "better": "a" * 2000},
    ],
)  # fmt: skip
def test_other_answers_are_refused(server: Judging, fields: dict[str, str]) -> None:
    assert asked(server.address, **fields)[0] == 400
    assert not server.path.exists()


def test_nobody_else_sees_it(server: Judging) -> None:
    root = server.address.rsplit("/", 1)[0]
    for address in (root, f"{root}/", f"{root}/index.html", f"{server.address}x"):
        assert asked(address)[0] == 404
        assert asked(address, id="0", better="a")[0] == 404
    assert asked(server.address, host="evil.example")[0] == 404  # a name that was pointed at this machine
    assert server.server_address[0] == "127.0.0.1"
    assert not server.path.exists()


def test_it_goes_on_where_it_was_left(tmp_path: Path) -> None:
    judging = Judging(COMPARISONS, {0: "a", 2: "b"}, tmp_path / "judgments.jsonl")
    assert "3 of 3" in judging.page()
    assert "Which film?" in judging.page()
    judging.server_close()
