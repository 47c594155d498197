"""What a program may give by mistake: one line says what was wrong, and nothing is trained on what was not meant."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from as_installed import poise_as_installed

PROMPT = "Review a film."
TURNS = [
    {"role": "user", "content": PROMPT}, {"role": "assistant", "content": "Which?"}, {"role": "user", "content": "M."},
]  # fmt: skip
PAIRS = [{"prompt": PROMPT, "chosen": f"Good {i}.", "rejected": f"Bad {i}."} for i in range(4)]


@pytest.fixture(scope="module")
def poise() -> Iterator[Any]:
    with poise_as_installed() as package:
        yield package


@pytest.fixture(scope="module")
def rm(poise: Any, reward_folder: Path) -> Any:
    return poise.RewardModel.from_pretrained(reward_folder)


def refused(poise: Any, call: Callable[[], Any]) -> str:
    """What a call says that must fail with one line."""
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        call()
    assert type(caught.value) is poise.PoiseError, repr(caught.value)
    return str(caught.value)


# ---- data ----


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pd.DataFrame(PAIRS), r'a DataFrame gives the names of its columns, not its rows; give .to_dict("records")'),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(PAIRS)), "not a DatasetDict, which has names; give one"),
        ({"prompt": [PROMPT], "chosen": ["a"]}, "not a dict, which has names"),
        (5, "a list was expected, not int"),
        (b"abc", "a list was expected, not bytes"),
        ([{**PAIRS[0], "chosen": b"Good."}], "row 1 of WHAT: 'chosen' holds a value of type bytes; convert it"),
        ([{**PAIRS[0], "chosen": object()}], "row 1 of WHAT: 'chosen' holds a value of type object"),
    ],
    ids=["frame", "splits", "columns", "number", "bytes", "text as bytes", "object"],
)  # fmt: skip
def test_data_that_is_no_list_of_rows_is_refused(poise: Any, rm: Any, tiny_model: str, data: Any, said: str) -> None:
    """Iterated over, a frame or a mapping gives names: as prompts they were trained on."""
    reward = rm.heads("brme").reward("mean")
    calls = {
        "train_dataset": lambda: poise.RewardTrainer(tiny_model, data).train(),
        "prompts": lambda: poise.PolicyTrainer(tiny_model, reward, data).train(),
        "samples": lambda: rm.score(data),
    }
    for what, call in calls.items():
        assert said.replace("WHAT", what) in refused(poise, call), what


def test_arrays_and_tensors_are_read_as_the_lists_that_they_are(rm: Any) -> None:
    """As pandas gives the turns of a Parquet file. Written as text, two turns were one prompt of plain text."""
    from poise.data.in_memory import as_row

    given = np.array(TURNS, dtype=object)
    row = {
        "prompt": given,
        "margin": np.float32(0.5),
        "score": torch.tensor([1, 2]),
        "no": pd.NA,
        "nan": np.float64("nan"),
    }
    plain = {"prompt": TURNS, "margin": 0.5, "score": [1, 2], "no": None, "nan": None}
    assert as_row(row, 1, "rows") == plain
    assert as_row(tuple(TURNS), 1, "prompts", "prompt") == {"prompt": TURNS}
    for prompt in (given, tuple(TURNS)):
        assert torch.equal(rm.score(prompt, ["A film."]).mean, rm.score(TURNS, ["A film."]).mean)


def test_a_row_that_holds_itself_is_refused(poise: Any, rm: Any) -> None:
    row: dict[str, Any] = {"prompt": PROMPT, "completion": "A film."}
    row["row"] = row
    assert "row 1 of samples: 'row' holds itself, or is nested too deep" in refused(poise, lambda: rm.score([row]))


def test_samples_and_completions_of_any_iterable(poise: Any, rm: Any) -> None:
    wanted = rm.score(PROMPT, ["a", "bb"]).mean
    assert torch.equal(rm.score([poise.Sample(PROMPT, "a"), poise.Sample(PROMPT, "bb")]).mean, wanted)
    assert torch.equal(rm.score(PROMPT, (text for text in ("a", "bb"))).mean, wanted)
    assert refused(poise, lambda: rm.score(PROMPT, 3)) == "completions: a list was expected, not int"


def test_rows_of_an_iterator_are_there_for_a_second_training(poise: Any) -> None:
    trainer = poise.RewardTrainer("m", iter(PAIRS))
    assert list(trainer.train_dataset) == list(trainer.train_dataset) == PAIRS
    prompts = poise.PolicyTrainer("m", "rm", iter(["a", "b"])).prompts
    assert list(prompts) == list(prompts) == ["a", "b"]


def test_rows_in_memory_are_named_as_the_program_names_them(
    poise: Any, rm: Any, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by the temporary file that they are written to, and with settings that the program has."""
    hint = ' (args.on_bad_row="skip" leaves bad rows out)'
    bad = {"prompt": "", "chosen": "a", "rejected": "b", "completion": "c"}
    skip = poise.RewardConfig(on_bad_row="skip")
    said = refused(poise, poise.RewardTrainer(tiny_model, [*PAIRS, bad]).train)
    assert said == f"train_dataset, row 5: 'prompt' is empty{hint}"
    assert refused(poise, poise.RewardTrainer(tiny_model, [bad], skip).train) == "train_dataset has no usable row"
    assert "train_dataset: 1 bad rows of 1 left out, e.g. row 1: 'prompt' is empty" in "".join(capsys.readouterr())
    reward, short = rm.heads("brme").reward("mean"), poise.PolicyConfig(max_tokens=8)
    said = refused(poise, poise.PolicyTrainer(tiny_model, reward, ["Say.", ""], short).train)
    assert said == f"prompts, row 2: 'prompt' is empty{hint}"
    assert refused(poise, lambda: rm.score([bad])) == "samples, row 1: 'prompt' is empty"


# ---- objectives ----

FOUR = ([PROMPT] * 4, ["one", "two", "three", "four"])


@pytest.mark.parametrize(
    ("objective", "got"),
    [
        (lambda heads: heads.mean, "one of (4, 5)"),
        (lambda heads: heads.mean[:, :1], "one of (4, 1)"),
        (lambda heads: heads.mean[1:, 0], "one of (3,)"),
        (lambda heads: heads.mean.mean(), "one of ()"),
        (lambda heads: heads.mean[:, 0].tolist(), "list"),
        (lambda heads: heads.mean[:, 0].numpy(), "ndarray"),
        (lambda _: None, "NoneType"),
        (lambda heads: heads.mean[:, 0] * 1j, "complex numbers"),
    ],
)
def test_an_objective_returns_one_number_for_each(poise: Any, rm: Any, objective: Any, got: str) -> None:
    """A column of the heads' means, or of another number of completions, was broadcast or passed on."""
    said = refused(poise, lambda: rm.heads("brme").reward(objective)(*FOUR))
    assert said == f"an objective must return one number per completion, a tensor of shape (4,); it gave {got}"


def test_an_objective_may_count_and_may_change_what_it_is_given(rm: Any) -> None:
    def changes(heads: Any) -> torch.Tensor:
        heads.std.mul_(100)
        return heads.mean.mul_(2).mean(-1) - heads.std.mean(-1)

    reward = rm.heads("brme").reward(changes)
    first = reward(*FOUR)
    assert reward(*FOUR) == first
    assert torch.equal(reward.last.heads.std, rm.heads("brme").score([PROMPT, *FOUR][0], FOUR[1]).std)
    counted = rm.heads("brme").reward(lambda heads: heads.mean.mean(-1) > heads.mean.mean())
    assert len(set(counted(*FOUR))) == 2


def test_a_scale_is_of_as_many_heads_and_of_some_completions(poise: Any) -> None:
    """A scale of one head, or a reward of one, was broadcast."""
    from poise.functional.objectives import RewardScale, mean

    heads = poise.HeadRewards(torch.randn(3, 2), torch.zeros(3, 2))
    one = poise.HeadRewards(heads.mean[:, :1], heads.std[:, :1])
    assert refused(poise, lambda: RewardScale.fit(heads, mean).combine(one, mean)) == "1 heads on a scale of 2"
    assert refused(poise, lambda: RewardScale.fit(one, mean).centered(heads)) == "2 heads on a scale of 1"
    assert "(0, 2)" in refused(poise, lambda: RewardScale.fit(heads.each(lambda part: part[:0]), mean))


# ---- rewards ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"objective": None}, "an objective is a name or a function of HeadRewards, not NoneType"),
        ({"objective": 3}, "an objective is a name or a function of HeadRewards, not int"),
        ({"ceiling": None}, "ceiling must be a number, got None; without a bound leave it out"),
        ({"ceiling": "2"}, "ceiling must be a number, got '2'; without a bound leave it out"),
        ({"regret_bonus": "1"}, "regret_bonus must be a number, got '1'; without a bound leave it out"),
        ({"floor": 2, "ceiling": 1}, "the reward's floor must be below its ceiling, got 2 and 1"),
        ({"floor": float("nan")}, "the reward's floor must be below its ceiling, got nan and inf"),
        ({"validator": 3}, "a validator is the name of a reward model, not int"),
    ],
)
def test_a_reward_says_at_once_what_it_cannot_be_made_of(
    poise: Any, rm: Any, reward_folder: Path, arguments: dict[str, Any], said: str
) -> None:
    asked = {"objective": "mean", **arguments}
    objective = asked.pop("objective")
    assert refused(poise, lambda: rm.heads("brme").reward(objective, **asked)) == said
    assert refused(poise, lambda: poise.RobustReward.load(reward_folder, objective, **asked)) == said


@pytest.mark.parametrize("length", [-1, 1, "64", 30.5])
def test_a_length_is_that_of_the_settings(poise: Any, reward_folder: Path, length: Any) -> None:
    """At -1 every text lost its last token; at 1 all texts were one."""
    wrong = "a whole number" if not isinstance(length, int) else "0, or at least 8"
    for load in (poise.RewardModel.from_pretrained, poise.RobustReward.load):
        said = refused(poise, lambda load=load: load(reward_folder, max_length=length))
        assert said == f"max_length must be {wrong}, got {length!r}"


def test_heads_that_are_no_name_are_refused(poise: Any, rm: Any) -> None:
    assert "no heads ['brme'] in this reward model; it has" in refused(poise, lambda: rm.heads(["brme"]))


def test_the_objective_of_a_reward_stays_what_it_is(rm: Any) -> None:
    """Its name was changed, and what it computed was not."""
    with pytest.raises(AttributeError, match="no setter"):
        rm.heads("brme").reward("mean").objective = "worst_case"


def test_a_scale_of_a_trial_is_told_from_that_of_a_training(rm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class State:
        global_step = 0

    tried, fresh = rm.heads("brme").reward("mean"), rm.heads("brme").reward("mean")
    tried(*FOUR)
    for reward in (fresh, tried, tried):
        reward(*FOUR, trainer_state=State())
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("its scale is that of the 4 completions of an earlier call") == 1


ANSWER = {"role": "assistant", "content": "A film."}


@pytest.mark.parametrize(
    ("prompts", "completions", "said"),
    [
        ("ab", "cd", "a reward takes a list of prompts, not str"),
        (None, ["a"], "a reward takes a list of prompts, not NoneType"),
        ([PROMPT], "a", "a reward takes a list of completions, not str"),
        ([PROMPT] * 3, ["a", "b"], "3 prompts and 2 completions; there must be one for each"),
        ([None], ["a"], "a prompt must be text or a list of turns, not NoneType"),
        ([[]], ["a"], "a prompt that is a list must hold turns, {'role': …, 'content': text}, at least one"),
        ([[{"role": "user", "content": [{"type": "image"}]}]], ["a"], "turn 1 of 'prompt' holds something"),
        ([PROMPT], [None], "a completion must be text or a list of turns, not NoneType"),
        ([PROMPT], [b"a"], "a completion must be text or a list of turns, not bytes"),
        ([PROMPT], [ANSWER], "a completion must be text or a list of turns, not dict"),
        ([PROMPT], [[]], "a completion that is a list must hold turns, {'role': …, 'content': text}, at least one"),
        ([PROMPT], [["a"]], "a completion that is a list must hold turns, {'role': …, 'content': text}, at least one"),
        ([PROMPT], [[{"role": "assistant", "content": 3}]], "turn 1 of 'completion' must have text, not int"),
        ([PROMPT], ["a\ud800"], "'completion' holds the lone surrogate U+D800 at character 2: half a character"),
        (["a\ud800"], ["b"], "'prompt' holds the lone surrogate U+D800 at character 2: half a character"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_or_completion_is_refused(
    poise: Any, rm: Any, prompts: Any, completions: Any, said: str
) -> None:
    """Texts were taken letter by letter, and parts of a turn scored as Python writes them."""
    from poise.integrations.trl_http import ServedReward

    for reward in (rm.heads("brme").reward("mean"), ServedReward("http://127.0.0.1:9")):
        assert refused(poise, lambda reward=reward: reward(prompts, completions)).startswith(said)


def test_text_in_parts_is_the_text(rm: Any) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Review "}, {"type": "text", "text": "a film."}]}]
    told = [{"role": "assistant", "content": [{"type": "text", "text": "Good."}]}]
    rewards = [rm.heads("brme").reward("mean") for _ in range(2)]
    same = rewards[0]([PROMPT] * 2, ["Good.", "Bad."]), rewards[1]([parts, np.array(parts)], [told, "Bad."])
    assert same[0] == same[1]


# ---- trainers ----


class Anything:
    """Of a type that no trainer takes, and that says more than one line of itself."""

    def __str__(self) -> str:
        return "one\ntwo"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"args": {"num_steps": 1}}, "args must be a WANTED, not dict"),
        ({"args": {}}, "args must be a WANTED, not dict"),
        ({"args": "other"}, "args must be a WANTED, not OTHER"),
        ({"model": Anything()}, "model must be the folder or hub id of a language model, not Anything"),
        ({"model": 3}, "model must be the folder or hub id of a language model, not int"),
    ],
)
def test_a_trainer_says_what_it_was_given_instead(poise: Any, arguments: dict[str, Any], said: str) -> None:
    kinds = {"RewardConfig": poise.RewardTrainer, "PolicyConfig": poise.PolicyTrainer}
    for wanted, other in (("RewardConfig", "PolicyConfig"), ("PolicyConfig", "RewardConfig")):
        given = {**arguments}
        if given.get("args") == "other":
            given["args"] = getattr(poise, other)()
        expected = said.replace("WANTED", wanted).replace("OTHER", other)
        assert refused(poise, lambda given=given, wanted=wanted: kinds[wanted](**given)) == expected


@pytest.mark.parametrize(
    "reward", [len, [1], 5, Anything(), Anything], ids=["function", "list", "number", "object", "class"]
)
def test_a_reward_that_is_none_is_no_name_of_one(poise: Any, reward: Any) -> None:
    assert "reward must be a RewardModel, its .reward(…), or the name of one, not " in refused(
        poise, lambda: poise.PolicyTrainer("m", reward, ["a"])
    )


def test_names_may_be_paths(poise: Any) -> None:
    args = poise.RewardConfig(output=Path("out"), preferences=Path("pairs"))
    trainer = poise.RewardTrainer(Path("a/model"), args=args)
    assert (trainer.args.model, trainer.args.output, trainer.train_dataset) == ("a/model", "out", "pairs")
    assert poise.PolicyTrainer(Path("a/model"), Path("rm"), ["a"]).args.model == "a/model"


def test_a_wrong_value_is_shown_on_one_line(poise: Any) -> None:
    assert refused(poise, lambda: poise.RewardConfig(model=Anything()).check()) == "--model must be text, got one two"


def double() -> Any:
    """A program's own default dtype, as a context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, before)
        return stack.pop_all()


MODES = {
    "no_grad": torch.no_grad, "inference": torch.inference_mode, "double": double,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16), "device": lambda: torch.device("meta"),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_trainers_find_torch_as_commands_do(poise: Any, rm: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from poise.api import trainers

    def found() -> tuple[Any, ...]:
        plain = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        return *plain, torch.zeros(1).dtype, torch.zeros(1).device.type

    seen: list[tuple[Any, ...]] = []

    def run(*_: Any) -> None:
        seen.append(found())
        raise KeyboardInterrupt

    monkeypatch.setattr(trainers.reward_training, "run", run)
    monkeypatch.setattr(trainers.policy_training, "run", run)
    with MODES[mode]():
        before = found()
        for trainer in (poise.RewardTrainer("m", PAIRS), poise.PolicyTrainer("m", rm, ["a"])):
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        assert found() == before
    assert seen == [(True, False, False, torch.float32, "cpu")] * 2


@pytest.mark.parametrize("mode", ["no_grad", "inference", "double", "autocast"])
def test_a_score_is_the_same_in_any_mode_of_torch(rm: Any, mode: str) -> None:
    """Under autocast it was rounded to bfloat16; in double precision it failed."""
    wanted = rm.score(PROMPT, ["a", "bb"])
    with MODES[mode]():
        found = rm.score(PROMPT, ["a", "bb"])
    assert torch.equal(found.mean, wanted.mean)
    assert torch.equal(found.std, wanted.std)


# ---- alarms and budgets ----


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"limits": {"repitition": 1.0}}, "the monitor has no sign 'repitition'; it has repetition, variety"),
        ({"limits": {"kl": float("nan")}}, "the monitor's limit of kl must be a finite number, got nan"),
        ({"threshold": float("nan")}, "the monitor's threshold must be a finite number, got nan"),
        ({"threshold": 0}, "the monitor's threshold must be above 0, got 0"),
        ({"window": 1.5}, "the monitor's window must be a whole number, got 1.5"),
        ({"baseline_steps": 1}, "the monitor's baseline_steps must be at least 2, got 1"),
    ],
)
def test_a_monitor_that_could_never_raise_an_alarm_is_refused(poise: Any, settings: dict[str, Any], said: str) -> None:
    from poise.functional.monitor import MonitorConfig

    assert refused(poise, lambda: MonitorConfig(**settings)).startswith(said)


def test_a_callback_knows_what_it_can_do(poise: Any) -> None:
    from poise.functional.monitor import Monitor

    callback = poise.MonitorCallback
    assert refused(poise, lambda: callback(action="halt")) == "action must be one of log, stop, got 'halt'"
    assert refused(poise, lambda: callback(3)) == "monitor must be a Monitor, not int"
    assert refused(poise, lambda: Monitor({"threshold": 2})) == "a monitor takes a MonitorConfig, not dict"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep_at_kl": 5}, "keep_at_kl must be a list of KLs, got 5"),
        ({"keep_at_kl": "5"}, "keep_at_kl must be a list of KLs, got '5'"),
        ({"keep_at_kl": ["5"]}, "a KL must be above 0 and finite, got '5'"),
        ({"max_kl": "20"}, "a KL must be above 0 and finite, got '20'"),
        ({"max_kl": True}, "a KL must be above 0 and finite, got True"),
        ({"updates_per_step": 0}, "updates_per_step must be at least 1, got 0"),
    ],
)
def test_a_budget_is_one_of_nats(poise: Any, settings: dict[str, Any], said: str) -> None:
    from poise.integrations.trl_kl import KLBudgetCallback

    trainer = SimpleNamespace(
        args=SimpleNamespace(beta=0.1, save_strategy="steps", save_total_limit=2), is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
    )  # fmt: skip
    assert refused(poise, lambda: KLBudgetCallback(trainer, **settings)) == said
