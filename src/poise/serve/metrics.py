"""What a server shows of its rewards while others train: Prometheus metrics, and a JSON lines log.

The monitor reads the mean of every READING completions as one step. Its baseline begins when the server does.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest

from poise.data.types import Sample
from poise.functional.monitor import Monitor, text_signs, transfer_ratio
from poise.functional.shaping import rows_by_prompt
from poise.runtime.progress import console
from poise.runtime.run_folder import Json, append_jsonl

READING = 256
_SIGNALS = (
    "reward",
    "nominal",
    "worst_case",
    "gap",
    "disagreement",
    "routing_std",
    "total_std",
    "distance",
    "validator",
)
_READ = ("reward", "nominal", "worst_case", "gap", "disagreement", "routing_std", "distance")  # by the monitor
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# They may be negative: their sums fall, which Prometheus's rate() and increase() take for a restart.
_SIGNED = ("reward", "nominal", "worst_case", "validator", "head_mean")


def _falls(name: str) -> str:
    """What the help of a summary says of a sum that falls."""
    if name not in _SIGNED:
        return ""
    return f"; its sum falls, too: mean by delta(poise_{name}_sum[5m]) / delta(poise_{name}_count[5m]), not by rate()"


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, log: str = ""):
        self.registry = registry = CollectorRegistry()
        self._log = Path(log) if log else None
        self.requests = Counter("poise_requests", "Requests by answer", ["path", "status"], registry=registry)
        self.seconds = Histogram("poise_seconds", "Time of a request", ["path"], registry=registry, buckets=_SECONDS)
        self.waiting = Gauge("poise_waiting_completions", "Completions that wait or are scored", registry=registry)
        self.batch = Summary("poise_batch_completions", "Completions scored in one call", registry=registry)
        self._truncated = Counter("poise_truncated", "Completions that lost their oldest tokens", registry=registry)
        self._signals = {
            name: Summary(f"poise_{name}", f"{name} of completions{_falls(name)}", registry=registry)
            for name in _SIGNALS
        }
        self._head_mean = Summary(
            "poise_head_mean", f"Reward by head{_falls('head_mean')}", ["head"], registry=registry
        )  # fmt: skip
        self._head_std = Summary("poise_head_std", "Std by head", ["head"], registry=registry)
        self._nominal_head = Counter("poise_nominal_head", "Completions by nominal head", ["head"], registry=registry)
        self._suspicion = Gauge("poise_monitor_score", "Signs of over-optimization", registry=registry)
        self._alarm = Gauge("poise_alarm", "1 if that score is above the monitor's threshold", registry=registry)
        self._transfer = Gauge(
            "poise_transfer", "Validator's gain over the reward's, in stds of the first completions", registry=registry
        )
        self._transfer.set(math.nan)  # not defined yet
        self._start: tuple[float, float, float, float] | None = None  # mean and std of the reward, of the validator
        self._monitor = Monitor()
        self._gathered: list[tuple[Json, Sample]] = []

    def scored(self, path: str, request: str, samples: Sequence[Sample], rows: Sequence[Json]) -> None:
        """Count the rows of one answered request, and add them to the log."""
        for sample, row in zip(samples, rows, strict=True):
            for name, summary in self._signals.items():
                if name in row:  # not every reward model has distances, nor a server a validator
                    summary.observe(row[name])
            for k, (mean, std) in enumerate(zip(row["mean"], row["std"], strict=True)):
                self._head_mean.labels(k).observe(mean)
                self._head_std.labels(k).observe(std)
            self._nominal_head.labels(row["nominal_head"]).inc()
            self._truncated.inc(row["truncated"])
            self._gathered.append((row, sample))
        if len(self._gathered) >= READING:
            self._read()
        if self._log is not None:
            self._append(path, request, samples, rows)

    def page(self) -> bytes:
        """The metrics as Prometheus reads them."""
        return generate_latest(self.registry)

    def _append(self, path: str, request: str, samples: Sequence[Sample], rows: Sequence[Json]) -> None:
        """Add to the log. A disk that is full ends the log, with one line, and not the training that it is about."""
        assert self._log is not None
        head = {"time": round(time.time(), 3), "path": path, "request": request}
        lines = [
            {**head, "prompt": sample.prompt, "completion": sample.completion, **row}
            for sample, row in zip(samples, rows, strict=True)
        ]
        try:
            append_jsonl(self._log, lines)
        except OSError as error:
            console.print(f"nothing more is written to {self._log}: {error.strerror}", markup=False, soft_wrap=True)
            self._log = None

    def _read(self) -> None:
        rows, samples = [row for row, _ in self._gathered], [sample for _, sample in self._gathered]
        self._gathered.clear()
        names = [name for name in _READ if all(name in row for row in rows)]
        stats = {name: fmean(row[name] for row in rows) for name in names} | text_signs(
            [sample.completion for sample in samples]
        )
        reading = self._monitor.update(stats | {"reward_std": pstdev(row["reward"] for row in rows)})
        self._suspicion.set(reading.score)
        self._alarm.set(reading.alarm)
        if all("validator" in row for row in rows):
            num_prompts = len(rows_by_prompt([sample.prompt for sample in samples]))
            self._watch_transfer([row["reward"] for row in rows], [row["validator"] for row in rows], num_prompts)

    def _watch_transfer(self, reward: Sequence[float], validator: Sequence[float], num_prompts: int) -> None:
        """Gains are those since the first reading; there is no ratio while the reward has gained next to nothing."""
        if self._start is None:
            self._start = (fmean(reward), pstdev(reward), fmean(validator), pstdev(validator))
            return
        zero, unit, other_zero, other_unit = self._start
        if unit > 0 and other_unit > 0:
            gain, other = (fmean(reward) - zero) / unit, (fmean(validator) - other_zero) / other_unit
            ratio = transfer_ratio(gain, other, num_prompts)
            self._transfer.set(math.nan if ratio is None else ratio)
