"""What is wrong with a model folder, from its JSON files alone; templates that are tried before a model is loaded."""

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from poise.errors import PoiseError
from poise.models import model_folder, template_trial
from poise.models.model_folder import check_model, check_precision, check_reward_model, stored_tensor
from poise.models.template_trial import try_template

CONFIG: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "num_labels": 1}


def made(folder: Path, *files: str, **changes: Any) -> str:
    """A folder with a config.json, and empty files of these names."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    for name in files:
        (folder / name).touch()
    return str(folder)


def whole(folder: Path, **changes: Any) -> str:
    path = made(folder, "tokenizer.json", **changes)
    save_file({"score.weight": torch.ones(1, 2)}, folder / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("tokenizer.json",), "has no weights in safetensors form$"),
        (("tokenizer.json", "pytorch_model.bin"), "safetensors form; weights in pickle form are not read, save them"),
        (("model.safetensors",), "has no tokenizer: no tokenizer.json"),
    ],
)
def test_a_folder_needs_weights_and_a_tokenizer(files: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match=said):
        check_model(made(tmp_path / "x", *files))


def test_a_file_or_a_hub_id_may_stand_for_a_model_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "on_hub", lambda _: None)
    (tmp_path / "file").touch()
    for check in (check_model, check_reward_model):
        with pytest.raises(PoiseError, match=r"file is not a model folder: it is a file"):
            check(str(tmp_path / "file"))
        check("org/model")  # left to loading
        with pytest.raises(PoiseError, match="is neither a local folder nor reachable"):
            check("no such/model of a hub")


def test_a_hub_id_is_refused_at_once_where_the_hub_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        check_model("org/model")  # left to the client
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(PoiseError, match="'org/model' is neither a local folder nor reachable on the model hub"):
            check_model("org/model")
        monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(PoiseError, match="does not answer; give the folder"):
        check_reward_model("org/model")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    check_model("org/model")
    monkeypatch.delenv("HTTPS_PROXY")
    cached = tmp_path / "models--org--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    with pytest.raises(PoiseError, match="the copy in its cache is not whole"):
        check_model("org/model")
    files = ("model.safetensors", "tokenizer.json")
    made(cached / "snapshots" / "abc", *files, architectures=["LlamaForCausalLM"])
    check_model("org/model")
    with pytest.raises(PoiseError, match="org/model is a language model, not a reward model"):
        check_reward_model("org/model")


def test_a_run_that_is_no_model_is_called_what_it_is(tmp_path: Path) -> None:
    names = ("prompts", "reward", "objective", "kl_coef")
    (tmp_path / "config.yaml").write_text("".join(f"{name}: x\n" for name in names))
    with pytest.raises(PoiseError, match="is a run of `poise train-policy`, not a reward model"):
        check_reward_model(str(tmp_path))
    with pytest.raises(PoiseError, match="is a run of `poise train-policy`, not a language model"):
        check_model(str(tmp_path))


def test_every_member_of_an_ensemble_is_checked(tmp_path: Path) -> None:
    for name in ("a", "b"):
        whole(tmp_path / name)
    (tmp_path / "both").mkdir()
    names = {"members": ["../a", "../b"], "means": [0.0, 0.0], "stds": [1.0, 1.0]}
    (tmp_path / "both" / "ensemble.json").write_text(json.dumps(names))
    check_reward_model(str(tmp_path / "both"))
    (tmp_path / "b" / "tokenizer.json").unlink()
    with pytest.raises(PoiseError, match=r"b has no tokenizer"):
        check_reward_model(str(tmp_path / "both"))


def test_quantized_weights_need_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_folder._QUANTIZERS, "hqq", "no_such_package.inside")
    with pytest.raises(PoiseError, match=r"are quantized \(hqq\), and the package no_such_package.inside is not inst"):
        check_model(whole(tmp_path / "x", quantization_config={"quant_method": "hqq"}))
    monkeypatch.setitem(model_folder._QUANTIZERS, "hqq", "json")
    check_model(whole(tmp_path / "y", quantization_config={"quant_method": "hqq"}))
    few = {"a.weight": torch.ones(2, dtype=torch.int8)}
    for folder, config in (("p", {"quantization_config": {"quant_method": "hqq"}}), ("q", {})):
        place = whole(tmp_path / folder, **config)
        save_file(few, tmp_path / folder / "model.safetensors")
        if config:
            check_precision(place)
        else:
            with pytest.raises(PoiseError, match=r"a.weight is quantized \(I8\), and config.json has no quantization"):
                check_precision(place)


def test_a_tensor_is_found_in_whichever_file_it_is(tmp_path: Path) -> None:
    folder = whole(tmp_path / "x")
    save_file({"score.bias": torch.full((1,), 3.0)}, tmp_path / "x" / "more.safetensors")
    assert stored_tensor(folder, "score.bias").item() == 3
    assert stored_tensor(folder, "score.weight").shape == (1, 2)
    with pytest.raises(PoiseError, match=r"x has no lm_head.weight in its safetensors files"):
        stored_tensor(folder, "lm_head.weight")


# ---- chat templates ----


def test_several_templates_are_left_to_the_rows(tmp_path: Path) -> None:
    folder = whole(tmp_path / "x")
    several = [{"name": "default", "template": "{% if %}"}]
    (tmp_path / "x" / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    check_model(folder)
    (tmp_path / "x" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% if %}"}))
    with pytest.raises(PoiseError, match=r"the chat template of .*x is no template: "):
        check_model(folder)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0]['content'] }}", "writes nothing of an answer; use another tokenizer"),
        ("{{ messages[0]['nothing'] }}", "writes nothing; use another tokenizer"),
        ("{% if x %}", "is no template: "),
    ],
)
def test_a_template_with_a_fault_in_itself_is_refused(template: str, said: str) -> None:
    with pytest.raises(PoiseError, match=f"^the chat template of m {said}"):
        try_template(template, "m", {})


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% generation %}{{ messages[1]['content'] }}{% endgeneration %}",  # a tag of transformers
        "{{ raise_exception('roles') }}",  # what it refuses is left to the rows
    ],
)
def test_other_templates_pass_also_where_no_time_limit_can_be_set(template: str) -> None:
    passed: list[bool] = []

    def trial() -> None:
        try_template(template, "m", {"eos_token": "</s>"})
        passed.append(True)

    trial()
    thread = threading.Thread(target=trial)  # signals come to the main thread alone
    thread.start()
    thread.join()
    assert passed == [True, True]


def test_a_template_without_an_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_trial, "SECONDS", 0.05)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(PoiseError, match=r"^the chat template of m did not end within 0.05 s; use another tokenizer$"):
        try_template(endless, "m", {})
