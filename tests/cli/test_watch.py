"""`poise watch`: what it serves, to whom, and that it follows a run that goes on."""

import http.client
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from poise.cli import watch
from poise.errors import PoiseError
from poise.reports import live, run_pages
from poise.runtime.run_folder import append_jsonl, write_json


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A policy run of two steps, in progress."""
    folder = tmp_path / "policy"
    folder.mkdir()
    settings = {"prompts": "p", "reward": "r", "objective": "mean", "kl_coef": 0.01, "num_steps": 9, "max_tokens": 5}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    append_jsonl(folder / "metrics.jsonl", [{"step": i, "reward": 0.5, "kl": 1.0, "ended": 1.0} for i in range(2)])
    return folder


@pytest.fixture
def port(run: Path) -> Iterator[int]:
    with watch.server(watch.Config(folders=(str(run),), port=0)) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield serving.server_port
        serving.shutdown()
        thread.join()


def get(port: int, path: str = "/", host: str = "127.0.0.1", method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.mark.slow
def test_the_page_follows_the_run_and_nothing_is_written(run: Path, port: int) -> None:
    before = sorted(path.name for path in run.iterdir())
    status, text = get(port)
    assert status == 200
    assert "2 of 9 steps" in text
    assert 'http-equiv="refresh"' in text
    append_jsonl(run / "metrics.jsonl", [{"step": 2, "reward": 0.7, "kl": 1.0, "ended": 1.0}])
    assert "3 of 9 steps" in get(port)[1]
    assert sorted(path.name for path in run.iterdir()) == before
    write_json(run / "results.json", {"reward": 0.7, "kl": 1.0, "alarms": []})
    assert 'http-equiv="refresh"' not in get(port)[1]


def test_other_names_other_files_and_writing_are_refused(port: int) -> None:
    assert get(port, host="evil.example")[0] == 403  # a page elsewhere, through a name that leads here
    assert get(port, host="localhost")[0] == 200
    assert get(port, "/../policy/config.yaml")[0] == get(port, "/config.yaml")[0] == 404
    assert get(port, method="POST")[0] == 501


def test_bad_folders_and_ports_are_one_line(run: Path, port: int, tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match="is not a run folder"):
        watch.server(watch.Config(folders=(str(tmp_path / "nowhere"),), port=0))
    with pytest.raises(PoiseError, match=f"cannot serve on port {port}: .*choose another --port"):
        watch.server(watch.Config(folders=(str(run),), port=port))


def test_a_page_is_written_while_a_run_goes_on(run: Path) -> None:
    page = run / "report.html"
    with live.refreshed(run, seconds=0.01):
        for _ in range(600):
            if page.exists():
                break
            threading.Event().wait(0.05)
    assert "2 of 9 steps" in page.read_text()


def test_a_page_that_cannot_be_made_does_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{")
    with live.refreshed(tmp_path, seconds=0.01):
        threading.Event().wait(0.1)
    assert not (tmp_path / "report.html").exists()


def test_a_page_is_made_again_only_when_something_was_written(
    run: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def html(folders: list[Path]) -> str:
        made.append(folders)
        return f"page {len(made)}"

    monkeypatch.setattr(run_pages, "html", html)
    assert [get(port)[1] for _ in range(3)] == ["page 1"] * 3
    os.utime(run / "metrics.jsonl", (2e9, 2e9))
    assert get(port, "/report.html?now")[1] == "page 2"
    assert made == [[run]] * 2


def test_a_page_that_cannot_be_made_now_is_asked_for_again(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def html(_: list[Path]) -> str:
        raise PoiseError("results.json is half written")

    monkeypatch.setattr(run_pages, "html", html)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Refresh"]) == (503, "5")
    assert answer.read() == b"results.json is half written; load again"
