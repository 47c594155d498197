"""Figures of long runs: lines are drawn as means of steps, and stretches of alarms are shaded."""

import re

import numpy as np
import pytest

from poise.reports import run_plots
from poise.reports.run_plots import Line, shaded, steps_per_point, thinned


@pytest.mark.parametrize(("steps", "size"), [(1, 1), (300, 1), (301, 2), (600, 2), (601, 3)])
def test_a_point_is_the_mean_of_as_few_steps_as_fit(steps: int, size: int) -> None:
    assert steps_per_point(steps) == size
    assert len(thinned(Line("", np.arange(steps), np.zeros(steps))).x) == -(-steps // size)


def test_a_long_line_keeps_means_and_gaps() -> None:
    y = np.arange(601.0)
    y[:3], y[3] = np.nan, np.nan
    line = thinned(Line("reward", np.arange(601.0), y, low=y - 1, high=y + 1))
    assert line.x[:2].tolist() == [1.0, 4.0]
    assert np.isnan(line.y[0])
    assert line.y[1] == 4.5  # of steps 4 and 5: step 3 has no number
    assert line.y[-1] == 600.0  # the last part is one step
    assert line.low is not None
    assert line.high is not None
    assert line.high[1] - line.low[1] == 2.0
    short = Line("", np.arange(300.0), np.arange(300.0))
    assert thinned(short) is short


def test_alarms_side_by_side_are_one_stretch() -> None:
    assert shaded([10.0, 11.0, 12.0, 40.0], last=60.0) == [(9.5, 3.0), (39.5, 1.0)]
    assert shaded([100.0], last=15_000.0) == [(50.0, 100.0)]  # wide enough to be seen


def test_a_figure_of_many_steps_and_alarms_stays_small() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(20_000.0)
    line = Line(
        "", steps, rng.normal(size=len(steps)), low=rng.normal(size=len(steps)), high=rng.normal(size=len(steps))
    )
    text = run_plots.panel([line], "Reward", "a", alarms=steps[100::2].tolist())
    assert len(text) < 100_000
    assert len(re.findall("stroke: var\\(--alarm", text)) == 1  # the line at the first alarm
