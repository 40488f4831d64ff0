"""The price of this machine, followed while it trains: a thread that asks now and then.

It never holds the loop up and never raises into it. A price that moved (somebody else's bid) goes
into the running cost at once and into the journal as ``cost/usd_per_hour``, with the time at which
it was seen. An outage of the provider is an event, once.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tessera.errors import InputError, TesseraError
from tessera.ledger.prices import PROVIDER, AskPrice, Quote
from tessera.runs import Attempt
from tessera.tracking.journal import Journal
from tessera.tracking.told import HOUR, LATE
from tessera.training.clock import now
from tessera.training.cost import RunningCost

EVERY_VARIABLE = "TESSERA_PRICE_EVERY_S"
EVERY_S = 300.0
FIRST_S = 30.0
STRANGE = 3.0
"""A price that is more than so many times another, either way, is believed at the second look."""
CONFIRM_S = 30.0
"""Seconds until that look."""
SILENT = "price/unanswered"
"""The journal event: the provider no longer says what this machine costs."""


def every_s(environ: Mapping[str, str] = os.environ) -> float:
    """Seconds between two questions: ``TESSERA_PRICE_EVERY_S``, else 300."""
    text = environ.get(EVERY_VARIABLE)
    if not text:
        return EVERY_S
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.05 <= value <= 86_400:
        raise InputError(
            f"{EVERY_VARIABLE} is {text!r}; expected seconds between two looks at the price, from "
            "0.05 to 86400."
        )
    return value


class PriceWatch:
    """Asks, compares, records. ``look`` does it once; ``follow_price`` does it in a thread."""

    def __init__(
        self,
        ask: AskPrice,
        attempt: Attempt,
        cost: RunningCost,
        journal: Journal,
        step: Callable[[], int],
        say: Callable[[str], None],
    ) -> None:
        self._ask, self._cost, self._journal = ask, cost, journal
        self._step, self._say = step, say
        self._known = attempt.price_source == PROVIDER
        self._silent = bool(attempt.price_note)  # that is recorded in the attempt already
        self._doubted: float | None = None

    def look(self) -> bool:
        """Ask once, and record what is new; True: a strange price asks for another look soon."""
        try:
            quote = self._ask()
        except TesseraError as error:
            if not self._silent:
                self._journal.event(SILENT, self._step(), reason=str(error))
            self._silent = True
            return False
        self._silent = False
        if self._doubt(quote.usd_per_hour):
            return True
        if not self._known:
            self._take_late(quote)
        elif quote.usd_per_hour != self._cost.usd_per_hour:
            before = self._cost.usd_per_hour
            self._note(quote)
            self._say(f"this machine now costs ${quote.usd_per_hour:.4g}/h, before ${before:.4g}/h")
        return False

    def _doubt(self, usd_per_hour: float) -> bool:
        """Whether this price is strange beside what counts, and nothing like the last one."""
        before, doubted = self._cost.usd_per_hour, self._doubted
        strange = before is not None and _far(before, usd_per_hour)
        confirmed = doubted is not None and not _far(doubted, usd_per_hour)
        self._doubted = usd_per_hour if strange and not confirmed else None
        return self._doubted is not None

    def _take_late(self, quote: Quote) -> None:
        self._known = True
        self._journal.event(
            LATE, self._step(), usd_per_hour=quote.usd_per_hour, fixed=quote.fixed,
            usd_per_gb_up=quote.usd_per_gb_up, usd_per_gb_down=quote.usd_per_gb_down,
        )  # fmt: skip
        self._cost.correct(quote)
        self._note(quote)
        since = "and has all along" if quote.fixed else "from now on"
        self._say(f"the provider answers: this machine costs ${quote.usd_per_hour:.4g}/h, {since}")

    def _note(self, quote: Quote) -> None:
        self._cost.note_price(quote.usd_per_hour, now())
        self._journal.metric(HOUR, quote.usd_per_hour, self._step())


def _far(one: float, other: float) -> bool:
    return max(one, other) > STRANGE * min(one, other)


@contextmanager
def follow_price(
    watch: PriceWatch | None, every: float | None = None, confirm: float | None = None
) -> Iterator[None]:
    """While this lasts ``watch`` looks every so many seconds (None: ``every_s``); None: nobody.

    The first time after 30 s at most: the provider may not have answered at the start, or that may
    be long ago. A strange price is looked at again after ``confirm`` seconds (``CONFIRM_S``).
    """
    if watch is None:
        yield
        return
    over = threading.Event()
    wait = every_s() if every is None else every
    soon = min(wait, CONFIRM_S if confirm is None else confirm)

    def keep_looking() -> None:
        pause = min(wait, FIRST_S)
        while not over.wait(pause):
            pause = wait
            try:
                pause = soon if watch.look() else wait
            except Exception:  # the training is worth more than its price tag
                continue

    threading.Thread(target=keep_looking, name="price-watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()
