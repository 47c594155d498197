"""What is wrong with settings, folders and what is piped in is said before torch is imported, and leaves no folder."""

import json
import os
import shutil
from pathlib import Path

import pytest

from early import run_early, write_files

# In one process: each command with the line it must say. Names are of `place`.
POLICY = "train-policy --prompts prompts --reward reward --model lm"
REFUSED = [
    ("best-of-n --prompts prompts --reward run --objectives zzz:mean", "--reward run holds no reward model 'zzz'"),
    ("best-of-n --prompts prompts --reward nope", "'brme'; name `poise train-reward` runs (there is no such folder)"),
    ("best-of-n --prompts prompts --reward prompts", "--reward prompts is a file, and holds no reward model 'brme'"),
    ("compare --arms mine run", "mine is not a finished policy run: it is an ensemble of reward models"),
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
    # settings that the files and models named with them rule out
    (f"{POLICY} --algorithm rloo --completions-per-prompt 1", "--completions-per-prompt must be at least 2"),
    (f"{POLICY} --adapted-layers 99", "--adapted-layers must be at most 3, the layers of lm"),
    (f"{POLICY} --eval-every 1 --eval-tasks zzz", "no benchmark 'zzz'"),
    (f"{POLICY} --eval-every 1 --eval-data nope", "no such folder: nope"),
    (f"{POLICY} --eval-every 1 --eval-data mine", "mine has no lambada.jsonl"),
    (f"{POLICY} --trackers zzz", "no tracker 'zzz'; accelerate knows tensorboard"),
    (f"{POLICY} --reward two --objective tradeoff(0.4)", "all 2 heads of this reward model are point heads"),
    (f"{POLICY} --objective typical(1)", "needs reference texts, which this reward model does not have"),
    ("best-of-n --prompts prompts --reward run --objectives brme:typical(1)", "needs reference texts"),
    ("evaluate-reward --rewards reward two --file pairs --objective nominal", "all 2 heads of this reward model"),
    ("score two samples --objective nominal", "all 2 heads of this reward model are point heads"),
    ("serve two --objective nominal", "all 2 heads of this reward model are point heads"),
    ("serve reward run --reference pairs --objective nominal", "all 2 heads of this reward model"),
    ("score ens samples --objective nominal", "all 2 heads of this reward model are point heads"),
    ("trust two --prompts prompts --model lm --objective nominal", "all 2 heads of this reward model"),
    ("evaluate-policy --policies lm --model lm --tasks zzz", "no benchmark 'zzz'"),
    ("train-reward --preferences pairs --model lm --batch-size 3", "--batch-size 3 is no multiple of"),
    ("export ens --output out --scalar mean", "ens is an ensemble, whose members have features of their own"),
    ("export reward --output out --scalar head --head 9", "--head 9: the reward model has heads 0 to 0"),
    ("serve reward --max-length 1", "--max-length must be 0, or at least 8"),
    ("inspect reward --max-length 7", "--max-length must be 0, or at least 8"),
    ("choose samples", "samples:1: 'kl' must be the rung's KL to the start in nats, and 0 for the start's own texts\n"),
    ("serve reward run --reference samples", "one of the other forms in docs/data.md\n"),
    ("choose samples --rungs 3", "--rungs is only read with a run; samples is a file"),
    # the same thing twice
    ("evaluate-reward --rewards reward ./reward --file pairs", "--rewards names ./reward twice"),
    ("best-of-n --prompts prompts --reward run run/", "--reward names run/ twice"),
    (
        "best-of-n --prompts prompts --reward run --objectives brme:tradeoff(0.4) brme:tradeoff(.40)",
        "--objectives names brme:tradeoff(.40), which is brme:tradeoff(0.4), twice",
    ),
    ("ensemble reward ./reward --reference pairs --output out", "--members names ./reward twice"),
    ("serve reward run/../reward --reference pairs", "--rewards names run/../reward twice"),
    ("compare --arms done done2 --labels x x", "--labels names x twice"),
    ("evaluate-reward --rewards run run/brme --file pairs", "--rewards names run/brme, which is run, twice"),
    ("ensemble run/brme/ ./run --reference pairs --output out", "--members names ./run, which is run/brme/, twice"),
    ("report done ./done", "--folders names ./done twice"),
    ("watch done done/", "--folders names done/ twice"),
    ("serve run run/brme --reference pairs", "--rewards names run/brme, which is run, twice"),
    ("evaluate-policy --policies tuned tuned/policy --model lm", "names tuned/policy, which is tuned, twice"),
    ("evaluate-policy --policies ./lm --model lm", "--policies ./lm is --model, which every policy is compared with"),
    # outputs that cannot be
    ("toy --output prompts/x", "prompts/x cannot be made: prompts is no folder"),
    ("toy --output nothing", "nothing is a link to nothing"),
    ("score reward samples --output mine", "--output mine is a folder; name a file"),
    ("toy --output bon", "--output bon is a run of `poise best-of-n`; choose another folder"),
    ("compare --arms done done2 --output bon", "--output bon is a run of `poise best-of-n`"),
    # folders of another kind
    ("reference bon --preferences pairs", "bon is a run of `poise best-of-n`, not a reward model"),
    ("reference done --preferences pairs", "done is a folder without config.json, not a reward model"),
    ("best-of-n --prompts prompts --reward bon", "--reward bon is a run of `poise best-of-n`, and holds no reward"),
    ("reference tuned/policy --preferences pairs", "tuned/policy is a folder of adapters, not a reward model"),
    ("reference pairs --preferences pairs", "pairs is a file; a reference is written into"),
    ("best-of-n --prompts prompts --reward lm", "--reward lm is the folder of one model, and holds no reward model"),
    ("choose samples --output done", "--output done holds other files; choose another folder or delete it"),
    ("choose bon", "bon is no `poise train-policy` run: it is a run of `poise best-of-n`"),
    ("compare --arms bon done", "bon is not a finished policy run: it is a run of `poise best-of-n`"),
    (
        "best-of-n --prompts prompts --reward run --objectives brme:mean --gold run",
        "--gold is the reward model itself, which agrees with itself; name another one",
    ),
    ("compare --arms done paid --gold ./run", "--gold is the reward model itself, which agrees with itself"),
    ("compare --arms pairs done", "pairs is not a finished policy run: it is a file"),
    ("compare --arms done done2 --pool pairs", "--pool pairs is no `poise best-of-n` run: it is a file"),
    ("compare --arms nope done", "nope is not a finished policy run: there is no such folder"),
    ("compare --arms done done2 --pool mine", "--pool mine is no `poise best-of-n` run: it is an ensemble of reward"),
    ("data lm", "lm is a folder that `datasets` did not save; name a file"),
    ("train-reward --preferences lm --model lm", "lm is a folder that `datasets` did not save; name a file"),
    ("merge prompts --output out", "prompts holds no policy (it is a file); name a finished"),
    ("merge nope --output out", "or the policy folder in it (there is no such folder)"),
    ("report .", ". is not a run folder: it has no config.yaml"),
    ("report prompts", "prompts is not a run folder: it is a file"),
    ("chat adapters", "no LoRA adapters of a language model, but of a reward model (task_type SEQ_CLS)"),
    (f"{POLICY} --model adapters", "adapters holds no LoRA adapters of a language model"),
    ("merge adapters --output out", "adapters holds no LoRA adapters of a language model"),
    ("score adapters samples", "they are a reward model's: of a `poise train-reward` run name the run"),
    # what was deleted from a run
    ("chat gone", "gone has no policy: policy was deleted since it finished; delete gone/results.json and start its"),
    ("evaluate-policy --policies gone --model lm", "gone has no policy: policy was deleted since it finished; delete"),
    ("merge gone --output out", "gone holds no policy (policy was deleted since it finished; delete gone/results.json"),
    ("score half samples", "half/brme has no weights in safetensors form: a part of brme was deleted since it"),
    ("score half/single samples", "half/single has no config.json: a part of single was deleted since it finished"),
    ("score bare samples", "bare holds no reward model: brme was deleted since it finished; delete bare/results.json"),
    ("score bare/single samples", "bare/single has no config.json: a part of single was deleted since it finished"),
    # slips on the command line
    (f"{POLICY} --kl-target 0", "--kl-target, --kl-horizon and --kl-coef must be above 0 for β to adapt; --kl-target"),
    ("toy --num-seeds=5 --config=nope", "cannot read config 'nope': No such file"),
    ("export reward --output out --adapter", "reward has no adapters beside it: train it with `--trunk lora`"),
    ("export run/brme --output out --adapter", "run/brme has no adapters beside it"),
    ("export plain --output out --scalar mean", "plain has no `poise` block in its config.json"),
    ("report bon --png x.png", "--png is of one quickstart"),
    ("serve reward --log mine", "--log mine is a folder; name a file"),
    ("serve reward --log drawn", "--log drawn exists and holds no log of `poise serve`; choose another name"),
    ("score reward samples --output drawn", "--output drawn exists and holds no scores; choose another name"),
    ("score reward samples --output ./samples", "--output ./samples is the file that is scored; choose another name"),
    ("serve reward --log pairs", "--log pairs exists and holds no log of `poise serve`; choose another name"),
    (f"{POLICY} --settle false", "a switch takes no value: --settle turns it on, --no-settle off"),
    (f"{POLICY} --settle=False", "a switch takes no value: --settle turns it on, --no-settle off"),
    (f"{POLICY} --keep-at-kl 5,10", "--keep-at-kl takes values with spaces between, got '5,10'"),
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
    (place / "lm").mkdir()
    for file in Path(tiny_model).iterdir():
        os.link(file, place / "lm" / file.name)
    shutil.copytree(place / "reward", place / "two")
    block = {"num_heads": 2, "kind": "point", "offset": [0.0, 0.0]}
    settings = json.dumps(config | {"poise": block, "id2label": {"0": "x", "1": "y"}})
    (place / "two" / "config.json").write_text(settings)
    for name in ("done", "done2", "bon", "comparison", "adapters"):
        (place / name).mkdir()
    for name in ("done/final.jsonl", "done2/final.jsonl", "bon/selected.jsonl"):
        (place / name).write_text("")
    (place / "paid").mkdir()
    (place / "paid" / "final.jsonl").write_text("")
    (place / "paid" / "config.yaml").write_text("prompts: p\nreward: run/brme\nobjective: mean\nkl_coef: 0.1\n")
    (place / "bon" / "config.yaml").write_text("objectives: [brme:mean]\nper_prompt: 4\n")
    (place / "comparison" / "results.json").write_text("{}")
    adapters = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "lm"}
    (place / "adapters" / "adapter_config.json").write_text(json.dumps(adapters))
    (place / "tuned" / "policy").mkdir(parents=True)
    (place / "tuned" / "policy" / "adapter_config.json").write_text(json.dumps(adapters | {"task_type": "CAUSAL_LM"}))
    of_reward, of_policy = "preferences: p\nhead_loss: crps\nnum_heads: 1\n", "prompts: p\nreward: r\nkl_coef: 0\n"
    for name, settings in (("half", of_reward), ("bare", of_reward), ("gone", f"{of_policy}objective: mean\n")):
        (place / name / "single").mkdir(parents=True)
        (place / name / "config.yaml").write_text(settings)
        (place / name / "results.json").write_text("{}")
    shutil.copytree(place / "reward", place / "half" / "brme", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(place / "reward", place / "plain")
    settings = json.dumps({name: value for name, value in config.items() if name != "poise"})
    (place / "plain" / "config.json").write_text(settings)
    (place / "nothing").symlink_to("nowhere")
    (place / "mine").mkdir()
    (place / "mine" / "ensemble.json").write_text('{"mine": 1}')
    write_files(place)
    (place / "drawn").write_text('{"step": 0, "prompt": "p", "completion": "c", "reward": 0.5, "mean": [1.0]}\n')
    (place / "yes.yaml").write_text("yes: 1\n")
    (place / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    before = {path: path.lstat().st_mtime_ns for path in place.rglob("*")}
    answers = run_early(place, [command for command, _ in REFUSED], {"HF_HUB_OFFLINE": "1"})
    assert {path: path.lstat().st_mtime_ns for path in place.rglob("*")} == before
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
