"""The one place that tries again, and how long it may.

The libraries below are told not to retry. Three limits follow from one setting, the seconds of
silence after which a connection counts as stalled (``TESSERA_STORE_TIMEOUT_S``, default 30):

* a request may take one of them, and 4 more for each ``CHUNK`` of bytes that it moves (8 MiB in
  150 s): a connection that drips is stalled too;
* what one call of ``Root`` loses to failed tries and to waiting may sum to 20 of them (600 s), for
  transfers longer by what the bytes take at 4 MiB/s, so that a long one can be done again;
* and each request is tried ``attempts`` times.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from tessera.errors import InputError
from tessera.storage.digests import CHUNK
from tessera.storage.faults import is_passing, sentence

TIMEOUT_VARIABLE = "TESSERA_STORE_TIMEOUT_S"
WORKERS = 8
"""Requests at once when one object is moved in parts."""
_SLOW = 4 << 20  # bytes per second

T = TypeVar("T")
A = TypeVar("A")


def timeout_from_environment() -> float:
    """Seconds of silence that are borne: ``TESSERA_STORE_TIMEOUT_S``, else 30."""
    text = os.environ.get(TIMEOUT_VARIABLE, "30")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 3600:
        raise InputError(
            f"{TIMEOUT_VARIABLE} is {text!r}; give the seconds of silence after which a store "
            "counts as stalled, above 0 and at most 3600, such as 30."
        )
    return seconds


@dataclass(frozen=True)
class Limits:
    """How patient a root is.

    ``attempts`` of one request; ``longest_wait_s`` between two (exponential backoff with full
    jitter); ``timeout_s`` of silence.
    """

    attempts: int
    longest_wait_s: float
    timeout_s: float

    def request_s(self, size: int) -> float:
        """The longest that one request may take that moves ``size`` bytes.

        The libraries hear silence only while they wait for an answer, so this is also what ends an
        upload that stalls.
        """
        return self.timeout_s * (1 + 4 * size / CHUNK)

    @property
    def lost_s(self) -> float:
        """The longest that one call may lose to failed tries and to waiting."""
        return 20 * self.timeout_s


class Budget:
    """The seconds that one call of a root may still lose, over all of its requests."""

    def __init__(self, seconds: float) -> None:
        self._left, self._lock = seconds, threading.Lock()
        self.stopped = False
        """Whether requests under way must not be tried again, since another one failed."""

    @property
    def left(self) -> float:
        """Seconds."""
        return -math.inf if self.stopped else self._left

    def spend(self, seconds: float) -> None:
        """Take ``seconds`` off."""
        with self._lock:
            self._left -= seconds


class Caller:
    """Runs the requests of one root: retries them, and turns what is left over into a sentence."""

    def __init__(self, url: str, limits: Limits) -> None:
        self.url, self.limits = url, limits

    def budget(self, size: int = 0) -> Budget:
        """What a call that moves ``size`` bytes may lose."""
        return Budget(self.limits.lost_s + size / _SLOW)

    def call(
        self,
        path: str,
        action: Callable[[], T],
        *,
        budget: Budget | None = None,
        attempts: int | None = None,
        share: int = 1,
        written_to: str | None = None,
    ) -> T:
        """``action()``, tried again while its faults may pass.

        ``path`` is the object that errors name, ``written_to`` where bytes go if not to the root.
        Requests of one call pass its ``budget``; ``share`` is how many of them lose time at once.
        """
        allowance = budget or self.budget()
        most = min(attempts or self.limits.attempts, self.limits.attempts)

        def enough(state: RetryCallState) -> bool:
            lost = (state.seconds_since_start or 0.0) + state.upcoming_sleep
            return state.attempt_number >= most or lost > allowance.left

        began = time.monotonic()
        try:
            for attempt in Retrying(
                stop=enough,
                wait=wait_random_exponential(multiplier=0.5, max=self.limits.longest_wait_s),
                retry=retry_if_exception(is_passing),
                reraise=True,
            ):
                with attempt:
                    lost = time.monotonic() - began
                    result = action()
                    allowance.spend(lost / share)
                    return result
        except Exception as error:
            told = sentence(error, path, self.url, written_to)
            if told is None or told is error:
                raise
            raise told from error
        raise AssertionError("unreachable: a retry loop ends by returning or raising")


def at_once(work: Callable[[A], T], items: Iterable[A], budget: Budget) -> Iterator[T]:
    """Results of ``work`` on every item, in order, ``WORKERS`` at a time in threads.

    The first failure stops the others: what has begun is waited for, but not tried again. Ctrl-C
    does not wait.
    """
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="tessera-storage")
    try:
        yield from pool.map(work, items)
    except BaseException as error:
        budget.stopped = True
        # A request still under way might write into the next try's file, so wait for it.
        pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
        budget.stopped = not isinstance(error, Exception)
        raise
    pool.shutdown()
