"""The clock, and what follows it: learning rate, batch size, and when to log, evaluate and save."""

import inspect
import math
import re
import time
from collections.abc import Callable
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .data.errors import did_you_mean

SECONDS_PER_UNIT = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
DURATION_PATTERN = re.compile(r"(?:\d+(?:\.\d+)?[dhms])+")


def parse_duration(text: str | float) -> float:
    """Seconds of a duration: `"24h"`, `"90m"`, `"1h30m"`, `"600s"`, or a plain number of seconds."""
    cleaned = str(text).strip().lower().replace(" ", "")
    try:
        seconds = float(cleaned)
    except ValueError:
        if not DURATION_PATTERN.fullmatch(cleaned):
            raise ValueError(f"{text!r} is not a duration: write '24h', '90m', '1h30m', '600s' or seconds") from None
        parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", cleaned)
        seconds = sum(float(number) * SECONDS_PER_UNIT[unit] for number, unit in parts)
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{text!r} is not a duration above zero")
    return seconds


def format_duration(seconds: float) -> str:
    """Seconds as `0:02:05` for a person; hours may exceed 24."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class BudgetClock:
    """
    Wall-clock seconds since the start of training, over all sessions of a run.

    Args:
        time_budget_seconds: the budget; `None` leaves the run to its step limit.
        time_function: seconds from any origin; tests inject their own.
    """

    def __init__(self, time_budget_seconds: float | None, time_function: Callable[[], float] = time.monotonic):
        self.time_budget_seconds = time_budget_seconds
        self.time_function = time_function
        self._origin: float | None = None
        self._stopped_at: float | None = None

    def start(self, already_elapsed_seconds: float = 0.0) -> None:
        """Start counting, from what earlier sessions of the run have used."""
        self._origin = self.time_function() - already_elapsed_seconds
        self._stopped_at = None

    def stop(self) -> None:
        """Stop counting; `elapsed_seconds` keeps its value."""
        self._stopped_at = self.elapsed_seconds

    @property
    def elapsed_seconds(self) -> float:
        if self._stopped_at is not None:
            return self._stopped_at
        return 0.0 if self._origin is None else self.time_function() - self._origin


class BudgetFollower(Protocol):
    """Anything that changes with the used fraction of the budget."""

    def follow_budget(self, fraction: float) -> dict[str, float]:
        """Adapt to `fraction` (0 to 1) of the budget; returns values to log."""
        ...


def _interpolate(fraction: float, *knots: tuple[float, float]) -> float:
    """Piecewise linear through (fraction, value) knots, constant outside them."""
    if fraction <= knots[0][0]:
        return knots[0][1]
    for (left, low), (right, high) in zip(knots, knots[1:], strict=False):
        if fraction <= right:
            return high if right == left else low + (high - low) * (fraction - left) / (right - left)
    return knots[-1][1]


def triangle2(fraction: float, start_factor: float = 0.25, peak_at: float = 0.75, final_factor: float = 0.0) -> float:
    """The paper's budget-triangle2: from `start_factor` up to 1 at `peak_at`, then down (section 4.3)."""
    return _interpolate(fraction, (0.0, start_factor), (peak_at, 1.0), (1.0, final_factor))


def linear(fraction: float, warmup: float = 0.0, final_factor: float = 0.0) -> float:
    """Up over the fraction `warmup`, then linearly down."""
    return _interpolate(fraction, (0.0, 1.0 if warmup == 0 else 0.0), (warmup, 1.0), (1.0, final_factor))


def cosine(fraction: float, warmup: float = 0.0, final_factor: float = 0.0) -> float:
    """Up over the fraction `warmup`, then down along half a cosine."""
    if fraction < warmup:
        return fraction / warmup
    progress = (min(fraction, 1.0) - warmup) / (1.0 - warmup)
    return final_factor + (1.0 - final_factor) * (1.0 + math.cos(math.pi * progress)) / 2.0


def flat_then_linear(
    fraction: float, warmup: float = 0.0, decay_from: float = 0.4, final_factor: float = 0.0
) -> float:
    """Up over `warmup`, flat until `decay_from`, then linearly down."""
    start = 1.0 if warmup == 0 else 0.0
    return _interpolate(fraction, (0.0, start), (warmup, 1.0), (decay_from, 1.0), (1.0, final_factor))


def one_cycle(fraction: float, start_factor: float = 0.04, peak_at: float = 0.3, final_factor: float = 0.0) -> float:
    """Up along half a cosine until `peak_at`, then down along another (Smith and Topin 2017)."""
    if fraction < peak_at:
        return 1.0 - (1.0 - start_factor) * (1.0 + math.cos(math.pi * fraction / peak_at)) / 2.0
    progress = (min(fraction, 1.0) - peak_at) / (1.0 - peak_at)
    return final_factor + (1.0 - final_factor) * (1.0 + math.cos(math.pi * progress)) / 2.0


def constant(fraction: float, warmup: float = 0.0) -> float:
    """Up over the fraction `warmup`, then flat."""
    return _interpolate(fraction, (0.0, 1.0 if warmup == 0 else 0.0), (warmup, 1.0))


LR_SCHEDULES: dict[str, Callable[..., float]] = {
    schedule.__name__: schedule for schedule in (triangle2, linear, cosine, flat_then_linear, one_cycle, constant)
}


def build_lr_schedule(name: str, shape: dict[str, Any] | None = None) -> Callable[[float], float]:
    """
    The function from the used fraction of the budget (0 to 1) to the factor on the peak learning rate.

    Raises `ValueError` for an unknown name or shape parameter, naming the nearest valid one, and for a shape outside
    [0, 1] or out of order.
    """
    shape = shape or {}
    if name not in LR_SCHEDULES:
        raise ValueError(f"unknown lr_schedule {name!r}{did_you_mean(name, LR_SCHEDULES)}")
    schedule = LR_SCHEDULES[name]
    valid = list(inspect.signature(schedule).parameters)[1:]
    for key, value in shape.items():
        if key not in valid:
            raise ValueError(f"lr_schedule {name!r} has no parameter {key!r}{did_you_mean(key, valid)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"lr_schedule parameter {key!r} must be a number from 0 to 1, got {value!r}")
    if name == "flat_then_linear" and shape.get("warmup", 0.0) > shape.get("decay_from", 0.4):
        raise ValueError("lr_schedule 'flat_then_linear' needs warmup <= decay_from")
    if (name == "cosine" and shape.get("warmup") == 1) or (name == "one_cycle" and shape.get("peak_at") in (0, 1)):
        raise ValueError(f"lr_schedule {name!r} needs room to rise and fall: warmup or peak_at must lie inside (0, 1)")
    return lambda fraction: schedule(fraction, **shape)


class BudgetLRScheduler(LRScheduler):
    """
    Learning rate as a function of the used fraction of the budget instead of the step.

    [`follow_budget`] sets the rates of the next step; `step`, which the Trainer calls after each optimiser step, only
    keeps the count. Nothing but plain numbers is saved with it, and no peak: a resumed run's is its own.
    """

    def __init__(self, optimizer: Optimizer, lr_factor: Callable[[float], float]):
        self.lr_factor = lr_factor
        self.fraction = 0.0
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [base_lr * self.lr_factor(self.fraction) for base_lr in self.base_lrs]

    def follow_budget(self, fraction: float) -> dict[str, float]:
        self.fraction = fraction
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        return {}  # the Trainer logs the learning rate itself

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch, "fraction": self.fraction}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self.follow_budget(state_dict["fraction"])


def ramped_batch_size(fraction: float, smallest: int, largest: int, ramp_until: float) -> int:
    """
    Rows of an optimiser step: linear from `smallest` at 0 to `largest` at `ramp_until` of the budget, in multiples of
    `smallest` (paper, section 4.3: from one micro-batch, by accumulation, up to the full batch at 60 %).
    """
    if fraction >= ramp_until:
        return largest
    return smallest * round(1 + (largest / smallest - 1) * fraction / ramp_until)


class Interval:
    """
    Every so many seconds of the clock (`"30m"`, or a number of them) or every share of the budget (`"5%"`).

    [`due`] answers once for each point that was passed since it was last asked.
    """

    def __init__(self, text: str | float):
        cleaned = str(text).strip()
        self.is_share = cleaned.endswith("%")
        try:
            self.period = float(cleaned[:-1]) / 100 if self.is_share else parse_duration(cleaned)
        except ValueError:
            raise ValueError(f"{text!r} is not an interval: write '5%' of the budget, '30m' or '60s'") from None
        if not self.period > 0:
            raise ValueError(f"{text!r} is not an interval above zero")
        self._passed = 0

    def due(self, elapsed_seconds: float, fraction: float) -> bool:
        passed = self._count(elapsed_seconds, fraction)
        is_due = passed > self._passed
        self._passed = passed
        return is_due

    def skip_to(self, elapsed_seconds: float, fraction: float) -> None:
        """Points up to here were dealt with by an earlier session."""
        self._passed = self._count(elapsed_seconds, fraction)

    def _count(self, elapsed_seconds: float, fraction: float) -> int:
        return int((fraction if self.is_share else elapsed_seconds) / self.period + 1e-9)
