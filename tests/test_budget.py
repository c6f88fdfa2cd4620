"""The clock and every curve that follows it, at fixed points."""

import math

import pytest
import torch

from hf_cram.budget import (
    BudgetClock,
    BudgetLRScheduler,
    Interval,
    build_lr_schedule,
    format_duration,
    parse_duration,
    ramped_batch_size,
)

POINTS = (0.0, 0.25, 0.5, 0.6, 0.75, 1.0)
HALF_COSINE = [(1 + math.cos(math.pi * x)) / 2 for x in POINTS]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("24h", 86400), ("90m", 5400), ("600s", 600), ("1h30m", 5400), ("2d", 172800), ("0.5h", 1800), (45, 45),
     ("600", 600), (" 10 M ", 600), ("1.5", 1.5)],
)  # fmt: skip
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "10 minutes", "-5", "0", "0s", "h", "10x", "nan", "inf", "10m5"])
def test_wrong_durations_are_refused(text):
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


def test_durations_for_a_person():
    assert [format_duration(s) for s in (0, 65, 3600, 90061)] == ["0:00:00", "0:01:05", "1:00:00", "25:01:01"]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        # The paper: 25 % at the start, linear to 100 % at 75 % of the time, linear to 0 at the end.
        ("triangle2", {}, [0.25, 0.5, 0.75, 0.85, 1.0, 0.0]),
        ("triangle2", {"start_factor": 0.0, "peak_at": 0.5}, [0.0, 0.5, 1.0, 0.8, 0.5, 0.0]),
        ("linear", {}, [1.0, 0.75, 0.5, 0.4, 0.25, 0.0]),
        ("linear", {"warmup": 0.5, "final_factor": 0.2}, [0.0, 0.5, 1.0, 0.84, 0.6, 0.2]),
        ("cosine", {}, HALF_COSINE),
        ("cosine", {"warmup": 0.5}, [0.0, 0.5, 1.0, (1 + math.cos(math.pi * 0.2)) / 2, 0.5, 0.0]),
        ("flat_then_linear", {}, [1.0, 1.0, 0.5 / 0.6, 0.4 / 0.6, 0.25 / 0.6, 0.0]),
        ("flat_then_linear", {"warmup": 0.5, "decay_from": 0.75}, [0.0, 0.5, 1.0, 1.0, 1.0, 0.0]),
        (
            "one_cycle",
            {"start_factor": 0.0, "peak_at": 0.5},
            [0.0, 0.5, 1.0, (1 + math.cos(math.pi * 0.2)) / 2, 0.5, 0],
        ),
        ("constant", {}, [1.0] * 6),
        ("constant", {"warmup": 0.5}, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate_curves(name, shape, expected):
    """The scheduler under an injected clock, at 0, 25, 50, 60, 75 and 100 % of a budget of 200 s."""
    now = [1000.0]
    clock = BudgetClock(200.0, time_function=lambda: now[0])
    clock.start()
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 2.0}], lr=2.0)
    scheduler = BudgetLRScheduler(optimizer, build_lr_schedule(name, shape))
    rates = []
    for point in POINTS:
        now[0] = 1000.0 + 200.0 * point
        scheduler.follow_budget(clock.elapsed_seconds / 200.0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([2.0 * factor for factor in expected], abs=1e-9)


def test_scheduler_state_is_plain_and_restores_the_rate():
    def build():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        return optimizer, BudgetLRScheduler(optimizer, build_lr_schedule("linear"))

    _, scheduler = build()
    scheduler.follow_budget(0.3)
    state = scheduler.state_dict()
    optimizer, restored = build()
    restored.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.7)
    assert restored.get_last_lr() == [pytest.approx(0.7)]
    assert all(isinstance(value, int | float | list) for value in state.values())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("triangel2", {}, "did you mean 'triangle2'"),
        ("linear", {"warm_up": 0.1}, "no parameter 'warm_up'; did you mean 'warmup'"),
        ("linear", {"warmup": 10}, "from 0 to 1"),
        ("cosine", {"warmup": "a"}, "from 0 to 1"),
        ("flat_then_linear", {"warmup": 0.5}, "warmup <= decay_from"),
        ("one_cycle", {"peak_at": 0}, "room to rise and fall"),
        ("cosine", {"warmup": 1}, "room to rise and fall"),
    ],
)
def test_wrong_schedules_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        build_lr_schedule(name, shape)


def test_batch_ramp_is_the_papers():
    """From one micro-batch, linearly, to the full batch at 60 % of the budget; always whole micro-batches."""
    sizes = [ramped_batch_size(point, 96, 8160, 0.6) for point in POINTS]
    assert sizes == [96, 96 * 36, 96 * 71, 8160, 8160, 8160]
    assert ramped_batch_size(0.0, 64, 64, 0.6) == 64
    assert [ramped_batch_size(point, 8, 64, 0.0) for point in POINTS] == [64] * 6


def test_clock_counts_all_sessions_and_stops():
    now = [50.0]
    clock = BudgetClock(100.0, time_function=lambda: now[0])
    assert clock.elapsed_seconds == 0
    clock.start(already_elapsed_seconds=30.0)
    now[0] = 60.0
    assert clock.elapsed_seconds == 40.0
    clock.stop()
    now[0] = 99.0
    assert clock.elapsed_seconds == 40.0


def test_intervals_answer_once_for_each_point():
    by_time, by_share = Interval(30), Interval("10%")
    assert [by_time.due(s, 0) for s in (0, 29, 30, 31, 95, 96, 120)] == [False, False, True, False, True, False, True]
    assert [by_share.due(0, f) for f in (0.0, 0.1, 0.15, 0.2, 0.95, 1.0)] == [False, True, False, True, True, True]
    resumed = Interval("10%")
    resumed.skip_to(0, 0.55)
    assert not resumed.due(0, 0.59)
    assert resumed.due(0, 0.6)
    for text in ("0%", "often", "-5s"):
        with pytest.raises(ValueError, match="not an interval"):
            Interval(text)
