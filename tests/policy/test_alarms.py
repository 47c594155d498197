"""What a run does at an alarm, step by step, without a run."""

import json
from typing import Any

import pytest

from poise.errors import PoiseError
from poise.policy.alarms import PAUSE, Alarms, OnAlarm

QUIET, LOUD = {"kl": 0.0}, {"kl": 1e6}


def watched(action: OnAlarm, metrics: list[dict[str, float]]) -> tuple[Alarms, list[float]]:
    """An alarm's state after these steps, which follow four of the baseline, and the KL coefficient after each."""
    alarms, kl_coefs = Alarms(action, 1.0), [0.5]
    for step, now in enumerate([*[QUIET] * 4, *metrics]):
        reading, kl_coef = alarms.watch(now, step, kl_coefs[-1])
        assert reading["alarm"] == (reading["monitor_score"] > 1.0)
        kl_coefs.append(kl_coef)
    return alarms, kl_coefs[5:]


def test_without_a_sign_nothing_happens(capsys: pytest.CaptureFixture[str]) -> None:
    alarms, kl_coefs = watched("stop", [QUIET] * 3)
    assert (alarms.raised, alarms.ended, alarms.pessimism, kl_coefs) == ([], "", 0, [0.5] * 3)
    assert alarms.policy_looks_safe
    assert capsys.readouterr().err == ""


def test_an_alarm_is_logged_and_not_again_before_the_pause_is_over() -> None:
    alarms, kl_coefs = watched("log", [LOUD] * (PAUSE + 1))
    assert [alarm["step"] for alarm in alarms.raised] == [4, 4 + PAUSE]
    assert all(alarm["action"] == "log" and alarm["score"] > 1 for alarm in alarms.raised)
    assert (kl_coefs, alarms.ended, alarms.pessimism) == ([0.5] * (PAUSE + 1), "", 0)


def test_pessimism_doubles_the_kl_coefficient_at_each_alarm(capsys: pytest.CaptureFixture[str]) -> None:
    alarms, kl_coefs = watched("pessimism", [LOUD] * (PAUSE + 1))
    assert kl_coefs == [1.0] * PAUSE + [2.0]
    assert (alarms.pessimism, alarms.ended) == (2, "")
    said = capsys.readouterr()
    assert "β is now 1" in said.out + said.err


@pytest.mark.parametrize(("action", "said"), [("stop", "; stopping"), ("rollback", "going back to the last policy")])
def test_an_alarm_ends_the_run_where_it_should(action: OnAlarm, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    alarms, kl_coefs = watched(action, [QUIET, LOUD])
    assert (alarms.ended, kl_coefs) == (action, [0.5, 0.5])
    assert [alarm["step"] for alarm in alarms.raised] == [5]
    shown = capsys.readouterr()
    assert said in (shown.out + shown.err).replace("\n", " ")


def test_other_processes_do_the_same_and_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    alarms, kl_coefs = watched("pessimism", [LOUD])
    assert (kl_coefs, alarms.pessimism) == ([1.0], 1)
    assert capsys.readouterr().err == ""


def test_a_policy_looks_safe_below_half_the_threshold_and_before_any_alarm() -> None:
    alarms = Alarms("log", 2.0)
    for score, safe in ((0.99, True), (1.0, False), (3.0, False), (0.0, True)):
        alarms.last_score = score
        assert alarms.policy_looks_safe == safe
    alarms.raised.append({"step": 1, "score": 3.0, "action": "log"})
    assert not alarms.policy_looks_safe


def test_restored_alarms_go_on_as_if_nothing_had_been() -> None:
    whole, _ = watched("pessimism", [QUIET, LOUD, LOUD])
    again = Alarms("pessimism", 1.0)
    again.restore(json.loads(json.dumps(whole.state() | {"step": 7})))
    assert again.state() == whole.state()
    for step in range(7, 12):
        assert again.watch(LOUD, step, 1.0) == whole.watch(LOUD, step, 1.0)
    assert again.state() == whole.state()


def test_a_state_that_is_none_is_refused() -> None:
    state: Any = Alarms("log", 1.0).state()
    with pytest.raises(PoiseError, match="the monitor's state in the checkpoint"):
        Alarms("log", 1.0).restore(state | {"monitor": {"steps": "four"}})


def test_an_alarm_says_what_a_validator_sees(capsys: pytest.CaptureFixture[str]) -> None:
    watched("stop", [LOUD | {"transfer": 0.4}])
    assert ": the validator sees 40 % of what the reward gained; stopping" in " ".join(capsys.readouterr().err.split())
