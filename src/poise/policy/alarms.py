"""What a PPO run does when the monitor sees signs of over-optimization (--on-alarm)."""

from typing import Literal

from poise.functional.monitor import Monitor, MonitorConfig, Reading
from poise.policy.formats import MonitorState
from poise.runtime.progress import console
from poise.runtime.records import checked
from poise.runtime.run_folder import Json, is_main_process

OnAlarm = Literal["log", "stop", "rollback", "pessimism"]
PAUSE = 5  # steps between two alarms that log or raise pessimism


class Alarms:
    """A run's monitor, the alarms so far, and their consequences.

    raised: step, score and action of each alarm; pessimism: how many times the objective became more pessimistic;
    ended: what has ended the run early, else "": an alarm's "stop" or "rollback", or "max_kl", the KL budget.
    """

    def __init__(self, action: OnAlarm, threshold: float):
        self.action, self.monitor = action, Monitor(MonitorConfig(threshold=threshold))
        self.raised: list[Json] = []
        self.pessimism, self.ended, self.last_score = 0, "", 0.0

    def watch(self, metrics: Json, step: int, kl_coef: float) -> tuple[Json, float]:
        """Feed the monitor one step's metrics; returns (its reading, for the log; the KL coefficient from here on)."""
        reading = self.monitor.update(metrics)
        self.last_score = reading.score
        if reading.alarm:
            kl_coef = self._respond(reading, step, kl_coef)
        return {"monitor_score": reading.score, "alarm": reading.alarm, "signs": reading.signs}, kl_coef

    def _respond(self, reading: Reading, step: int, kl_coef: float) -> float:
        score = reading.score
        last = self.raised[-1]["step"] if self.raised else -PAUSE
        if self.action in ("log", "pessimism") and step - last < PAUSE:
            return kl_coef
        self.raised.append({"step": step, "score": score, "action": self.action})
        message = f"step {step}: signs of over-optimization (score {score:.2f})"
        if "transfer" in reading.signs:
            message += (
                f": the validator sees {100 * max(1 - reading.signs['transfer'], 0.0):.0f} % of what the reward gained"
            )
        if self.action == "pessimism":
            self.pessimism += 1
            kl_coef *= 2
            message += f"; β is now {kl_coef:g}"
        elif self.action in ("stop", "rollback"):
            self.ended = self.action
            message += "; stopping" if self.action == "stop" else "; going back to the last policy that looked safe"
        if is_main_process():
            console.print(message)
        return kl_coef

    @property
    def policy_looks_safe(self) -> bool:
        """No alarm so far, and the last score is below half the threshold."""
        return not self.raised and self.last_score < self.monitor.config.threshold / 2

    def state(self) -> Json:
        """For a checkpoint."""
        return {
            "pessimism": self.pessimism, "alarms": self.raised, "ended": self.ended, "monitor": self.monitor.state(),
            "last_score": self.last_score,
        }  # fmt: skip

    def restore(self, state: Json) -> None:
        """Inverse of `state`; other keys of `state` are ignored."""
        checked(state["monitor"], MonitorState, "the monitor's state in the checkpoint")
        self.pessimism, self.raised, self.ended = state["pessimism"], state["alarms"], state["ended"]
        self.monitor, self.last_score = Monitor.restore(state["monitor"], self.monitor.config), state["last_score"]
