"""The price of this machine, followed while it trains: a thread that asks now and then.

It never holds the loop up and never raises into it. A price that moved (somebody else's bid) goes
into the running cost at once and into the journal as ``cost/usd_per_hour``, with the time at which
it was seen. An outage of the provider is an event, once.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tessera.errors import InputError, TesseraError
from tessera.ledger.prices import PROVIDER, AskPrice, Quote
from tessera.runs import Attempt
from tessera.tracking.journal import Journal
from tessera.tracking.told import HOUR, LATE
from tessera.training.cost import RunningCost

EVERY_VARIABLE = "TESSERA_PRICE_EVERY_S"
EVERY_S = 300.0
FIRST_S = 30.0
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

    def look(self) -> None:
        """Ask once, and record what is new."""
        try:
            quote = self._ask()
        except TesseraError as error:
            if not self._silent:
                self._journal.event(SILENT, self._step(), reason=str(error))
            self._silent = True
            return
        self._silent = False
        if not self._known:
            self._take_late(quote)
        elif quote.usd_per_hour != self._cost.usd_per_hour:
            before = self._cost.usd_per_hour
            self._note(quote)
            self._say(f"this machine now costs ${quote.usd_per_hour:.4g}/h, before ${before:.4g}/h")

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
        self._cost.note_price(quote.usd_per_hour, time.time())
        self._journal.metric(HOUR, quote.usd_per_hour, self._step())


@contextmanager
def follow_price(watch: PriceWatch | None, every: float | None = None) -> Iterator[None]:
    """While this lasts ``watch`` looks every so many seconds (None: ``every_s``); None: nobody.

    The first time after 30 s at most: the provider may not have answered at the start, or that may
    be long ago.
    """
    if watch is None:
        yield
        return
    over = threading.Event()
    wait = every_s() if every is None else every

    def keep_looking() -> None:
        pause = min(wait, FIRST_S)
        while not over.wait(pause):
            pause = wait
            try:
                watch.look()
            except Exception:  # the training is worth more than its price tag
                continue

    threading.Thread(target=keep_looking, name="price-watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()
