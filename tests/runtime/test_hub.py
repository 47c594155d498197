"""A name of the model hub is answered at once: by the cache, or by one question to the hub."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from early import run_early, write_files
from poise.errors import PoiseError
from poise.runtime.hub import Kind, has_weights, on_hub, snapshot

ANSWERS = {
    "/org/model": (200, "", b'{"model_type": "llama"}'), "/org/none": (404, "RepoNotFound", b""),
    "/org/gated": (403, "GatedRepo", b""), "/org/gguf": (404, "EntryNotFound", b""),
    "/org/broken": (500, "", b""), "/org/list": (200, "", b"[]"), "/org/text": (200, "", b"<html>"),
    "/datasets/org/data": (200, "", b""), "/datasets/org/bare": (404, "EntryNotFound", b""),
    "/datasets/org/none": (404, "RepoNotFound", b""), "/datasets/org/gated": (403, "GatedRepo", b""),
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, code, body = ANSWERS[self.path.partition("/resolve")[0]]
        self.server.asked.append((self.command, self.path))  # type: ignore[attr-defined]
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """What was asked of a hub that stands at HF_ENDPOINT; its cache is empty."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []  # type: ignore[attr-defined]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}/")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.asked  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def test_one_question_finds_a_model(hub: list[tuple[str, str]]) -> None:
    assert on_hub("org/model") == {"model_type": "llama"} == on_hub("org/model")
    assert hub == [("GET", "/org/model/resolve/main/config.json")]
    assert on_hub("org/data", "dataset") is None
    assert hub[1:] == [("HEAD", "/datasets/org/data/resolve/main/README.md")]
    assert on_hub("org/bare", "dataset") is None  # without a README


@pytest.mark.parametrize("name", ["broken", "list", "text"])
def test_what_is_no_answer_is_left_to_the_client(name: str, hub: list[tuple[str, str]]) -> None:
    assert on_hub(f"org/{name}") is None
    assert len(hub) == 1


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("org/none", "model", "no model 'org/none' on the model hub, or none that you may read, and no local one"),
        ("org/none", "dataset", "no data set 'org/none' on the model hub, or none that you may read, and no local one"),
        ("org/gated", "model", "model 'org/gated' is gated on the model hub: accept its terms"),
        ("org/gated", "dataset", "data set 'org/gated' is gated"),
        ("org/gguf", "model", "'org/gguf' on the model hub is not a model folder: it has no config.json"),
        ("a--b", "model", "no model 'a--b' on the model hub"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(name: str, kind: Kind, reason: str) -> None:
    with pytest.raises(PoiseError) as refused:
        on_hub(name, kind)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def cached(place: Path, *files: str, index: object = None) -> Path:
    """A model in the hub's cache."""
    folder = place / "models--org--mine" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (place / "models--org--mine" / "refs").mkdir()
    (place / "models--org--mine" / "refs" / "main").write_text("abc")
    for file in files:
        (folder / file).write_text("{}")
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_cached_model_needs_no_question(hub: list[tuple[str, str]], tmp_path: Path) -> None:
    folder = cached(tmp_path, "config.json", "model.safetensors")
    assert on_hub("org/mine") == folder
    (tmp_path / "datasets--org--data").mkdir()
    (tmp_path / "prepared" / "org___other").mkdir(parents=True)
    assert on_hub("org/data", "dataset") is None is on_hub("org/other", "dataset")
    assert hub == []


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("files", "index"),
    [
        (["config.json"], None),  # as one that was looked at only
        (["model.safetensors"], None),
        (["config.json", "a.safetensors"], {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}),
    ],
)
def test_half_a_download_is_no_model(
    files: list[str], index: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cached(tmp_path, *files, index=index)
    assert snapshot("org/mine") is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PoiseError, match="the copy in its cache is not whole"):
        on_hub("org/mine")
    if index:
        (folder / "b.safetensors").touch()
        assert snapshot("org/mine") == folder


@pytest.mark.parametrize("index", [[], {"weight_map": 1}, {}])
def test_a_damaged_index_is_for_the_reader_of_the_folder(index: object, tmp_path: Path) -> None:
    assert has_weights(cached(tmp_path, index=index))


NAMES = [
    "score org/none samples", "inspect org/none", "evaluate-reward --rewards org/none --file pairs",
    "train-policy --prompts prompts --reward org/none", "export org/none --output x --scalar mean",
    "train-policy --prompts prompts --reward org/model --validator org/none", "serve org/none", "chat org/none",
    "ensemble org/none org/model --reference pairs --output x", "train-reward --preferences pairs --model org/none",
    "train-reward --preferences org/none", "reference org/none --preferences pairs", "push org/none --repo a/b",
    "trust org/none --prompts prompts", "best-of-n --prompts prompts --reward org/none", "merge org/none --output x",
    "evaluate-policy --policies org/none", "evaluate-policy --model org/none", "plan --model org/none",
    "plan --reward org/none --model org/model", "data org/none", "data pairs --model org/none", "data org/gated",
    "study --model org/none", "quickstart --model org/none", "score org/gated samples",
    "score org/writer samples", "train-policy --prompts prompts --reward org/writer",
]  # fmt: skip


def test_every_command_says_so_before_torch(
    hub: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    judge = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "x"}}
    monkeypatch.setitem(ANSWERS, "/org/writer", (200, "", json.dumps(writer).encode()))
    monkeypatch.setitem(ANSWERS, "/org/model", (200, "", json.dumps(judge).encode()))
    write_files(tmp_path)
    found = zip(NAMES, run_early(tmp_path, NAMES), strict=True)
    for name, (code, said, heavy) in found:
        assert (code, said.count("\n"), heavy) == (2, 1, []), (name, said)
        assert "org/" in said, (name, said)
    assert hub
