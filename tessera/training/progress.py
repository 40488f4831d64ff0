"""The progress line: step, loss, speed, MFU, dollars so far, time and dollars at the end.

On a terminal a live bar; elsewhere (a log, CI) a plain line at most every few seconds, because a
bar redrawn into a file helps nobody.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from tessera.ledger.budget import Plan
from tessera.ledger.dollars import dollars as known_dollars
from tessera.ledger.forecast import Forecast

PLAIN_EVERY_S = 5.0


@dataclass(frozen=True)
class Standing:
    """What the line shows; dollars are None where no price is known.

    ``steps`` and ``seconds_left`` are None while a budget's end is not planned yet;
    ``usd_interval`` holds the dollars at the end in four of five runs.
    """

    step: int
    steps: int | None
    loss: float
    tokens_per_s: float
    mfu: float
    usd: float | None
    seconds_left: float | None
    usd_at_end: float | None
    usd_interval: tuple[float, float] | None = None


def standing(
    step: int,
    plan: Plan,
    loss: float,
    tokens_per_s: float,
    mfu: float,
    usd: float | None,
    ahead: Forecast | None,
) -> Standing:
    """What there is to show; ``ahead`` is None while the end is not known."""
    steps = plan.end_step if plan.known else None
    if ahead is None:
        return Standing(step, steps, loss, tokens_per_s, mfu, usd, None, None)
    low, high = ahead.usd_low, ahead.usd_high
    interval = None if low is None or high is None else (low, high)
    return Standing(
        step, steps, loss, tokens_per_s, mfu, usd, ahead.seconds_left, ahead.usd_at_end, interval
    )


def duration(seconds: float) -> str:
    """``45s``, ``3m20s``, ``5h12m``, ``6d01h``: two units are enough to plan by."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, secs = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{secs:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02d}m"
    return f"{hours // 24}d{hours % 24:02d}h"


def dollars(usd: float | None) -> str:
    """Dollars with as many digits as the sum deserves."""
    return "$?" if usd is None else known_dollars(usd)


class ProgressLine:
    """A context manager that shows ``Standing``s on stderr."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._title, self._last = title, -PLAIN_EVERY_S
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=8),
                TextColumn("{task.fields[at]} {task.fields[text]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=None, at="", text="starting")

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        try:
            self._console.print(
                f"{self._title}: {text}", highlight=False, markup=False, soft_wrap=True
            )
        except (OSError, SystemExit):  # nobody reads any more (rich leaves then), or a full disk
            self._console.quiet = True

    def show(self, at: Standing) -> None:
        """Refresh the line."""
        at_step = f"{at.step}/{'?' if at.steps is None else at.steps}"
        left = "?" if at.seconds_left is None else duration(at.seconds_left)
        text = (
            f"loss {at.loss:.3f}  {at.tokens_per_s:,.0f} tok/s  "
            f"{dollars(at.usd)}, {at_the_end(at)}, {left} left  "
            f"MFU {at.mfu:.1%}"  # last: what a narrow terminal cuts off
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=at.step, total=at.steps, at=at_step, text=text)
            return
        now = time.monotonic()
        if now - self._last >= PLAIN_EVERY_S or at.step == at.steps:
            self._last = now
            self.say(f"step {at_step}  {text}")


def at_the_end(at: Standing) -> str:
    """Such as ``$315 at the end (80 %: 305-327)``."""
    if at.usd_interval is None or at.usd_at_end is None or at.step == at.steps:
        return f"{dollars(at.usd_at_end)} at the end"
    low, high = at.usd_interval
    if low >= 100:  # cents say nothing any more
        return f"${at.usd_at_end:,.0f} at the end (80 %: {low:,.0f}-{high:,.0f})"
    return f"{dollars(at.usd_at_end)} at the end (80 %: {dollars(low)[1:]}-{dollars(high)[1:]})"
