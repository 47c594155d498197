"""What is wrong with settings, folders and what is piped in is said before torch is imported, and leaves no folder."""

import json
import os
from pathlib import Path

import pytest

from early import run_early, write_files

# In one process: each command with the line it must say. Names are of `place`.
REFUSED = [
    ("best-of-n --prompts prompts --reward run --objectives zzz:mean", "--reward run holds no reward model 'zzz'"),
    ("best-of-n --prompts prompts --reward nope", "--reward nope holds no reward model 'brme'"),
    ("best-of-n --prompts prompts --reward prompts", "--reward prompts holds no reward model 'brme'"),
    ("compare --arms mine run", "mine is not a finished policy run: it has no final.jsonl"),
    ("choose nope", "no such file: nope"),
    ("choose mine", "mine is no `poise train-policy` run"),
    ("export reward --output out", "vLLM serves the checkpoint as it is"),
    ("export reward --output out --scalar worst_case", "only mean and head are linear"),
    ("export reward --output out --head 0", "--scalar head and --head NUMBER go together"),
    ("export reward --output mine --scalar mean", "--output mine exists and is no earlier export"),
    ("export reward --output reward --scalar mean", "--output reward is the reward model itself"),
    ("export run --output run/brme --scalar mean", "--output run/brme is the reward model itself"),
    ("export reward --output prompts --scalar mean", "--output prompts is a file"),
    ("ensemble reward ens --reference pairs --output out", "ens is itself an ensemble"),
    ("ensemble reward run --reference pairs --output mine", "--output mine exists and is no earlier ensemble"),
    ("reference ens --preferences pairs", "ens is an ensemble"),
    ("merge run --output out", "run holds no policy"),
    ("merge reward --output mine", "--output mine exists"),
    ("push reward --repo ../x", "--repo ../x is not of the form user/name"),
    ("push reward --repo name", "--repo name is not of the form user/name"),
    ("inspect reward", "nothing to score"),
    ("serve", "name at least one reward model"),
    ("serve reward --backend vllm --url localhost:1", "an address was expected"),
    ("serve reward --backend vllm --url http://x:99999", "an address was expected"),
    ("serve reward --backend vllm --url http://x/v1?key=secret", "an address was expected"),
    ("serve reward --backend vllm --url http://me:secret@x", "the address holds a user's name or password"),
    ("trust reward --prompts prompts --judge http://me:secret@x", "the address holds a user's name or password"),
    ("serve reward --token-file prompts", "holds more than one word of ASCII"),
    ("chat reward --system \udcff", "'--system' holds the lone surrogate U+DCFF"),
    ("plan --prompt-tokens 2147483647", "tokens in a step are more than any run draws"),
    ("report run --png figure.gif", "must end in .png"),
    ("report run --output pairs", "--output pairs exists and is no earlier one"),
    ("report run --output mine", "--output mine exists and is no earlier one"),
    ("score reward samples --output pairs", "--output pairs exists and holds no scores"),
    ("train-reward --preferences pairs --output mine", "--output mine holds files that no run of Poise wrote"),
    ("evaluate-reward --rewards reward --file pairs --output mine", "--output mine holds files that no run"),
    ("trust reward --prompts prompts --output mine", "--output mine holds files that no run of Poise wrote"),
    ("toy --output mine", "--output mine holds files that no run of Poise wrote"),
    ("toy --output ~/x", "~ is not read as the home folder here"),
    ("toy --config yes.yaml", "holds no settings, each as `name: value`"),
    ("toy --config twice.yaml", "'seed' is there twice"),
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> dict[str, tuple[int, str, list[str]]]:
    """By command: status, what it said, and the heavy libraries that were there then; what it changed fails here."""
    place = tmp_path_factory.mktemp("early")
    block = {"num_heads": 1, "kind": "point", "offset": [0.0]}
    config = json.loads((Path(tiny_model) / "config.json").read_text()) | {"poise": block, "id2label": {"0": "x"}}
    for name in ("reward", "run/brme"):
        folder = place / name
        folder.mkdir(parents=True)
        for file in Path(tiny_model).iterdir():
            os.link(file, folder / file.name)
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
    (place / "ens").mkdir()
    ensemble = {"members": ["../reward", "../run/brme"], "means": [0.0, 0.0], "stds": [1.0, 1.0]}
    (place / "ens" / "ensemble.json").write_text(json.dumps(ensemble))
    (place / "mine").mkdir()
    (place / "mine" / "ensemble.json").write_text('{"mine": 1}')
    write_files(place)
    (place / "yes.yaml").write_text("yes: 1\n")
    (place / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    answers = run_early(place, [command for command, _ in REFUSED], {"HF_HUB_OFFLINE": "1"})
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
    return dict(zip([command for command, _ in REFUSED], answers, strict=True))


@pytest.mark.parametrize(("command", "reason"), REFUSED, ids=[command[:60] for command, _ in REFUSED])
def test_it_is_refused_in_one_line_before_torch_and_leaves_no_trace(
    command: str, reason: str, found: dict[str, tuple[int, str, list[str]]]
) -> None:
    code, said, heavy = found[command]
    assert code == 2, said
    assert reason in said
    assert said.startswith("poise: ")
    assert said.count("\n") == 1
    assert not heavy
    assert "secret" not in said or "expected" in said
