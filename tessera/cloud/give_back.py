"""Giving back what was rented, verified at SkyPilot and at the provider.

SkyPilot does not tear down what failed while it was being set up, a machine of which it lost the
record bills all the same, and what was being rented at the moment of a Ctrl-C may appear later. So
SkyPilot is asked again after it ended something, and vast.ai itself is asked by the label that
SkyPilot gives its machines, until there was nothing several times in a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from tessera.cloud.offers import KEY_COMMAND, VAST
from tessera.cloud.rent import Renter, is_labelled
from tessera.cloud.skypilot import first_line
from tessera.cloud.vast import VastClient, VastInstance, find_key
from tessera.errors import InputError, RetryElsewhereError, TesseraError

CONSOLE = "https://cloud.vast.ai/instances/"
BETWEEN_S = 5.0
AFTER_FAILURE = 4
"""Empty looks in a row after a start that failed or was interrupted: it may still be renting."""
_AFTER_STOP = 2
_BUSY = 5
_BUSY_JOB = 36  # cancelling a job takes its machine down first: minutes

Sleep = Callable[[float], None]


@dataclass(frozen=True)
class GivenBack:
    """How giving back ended.

    ``left``: what may still bill, in sentences; none: nothing does. ``ended``: what was there.
    ``interrupted``: Ctrl-C broke it off.
    """

    left: tuple[str, ...]
    ended: tuple[str, ...] = ()
    interrupted: bool = False

    def require(self) -> None:
        """``RetryElsewhereError`` that names what may still bill."""
        if self.left:
            raise RetryElsewhereError(" ".join(self.left))


def give_back(
    renter: Renter,
    name: str,
    managed: bool,
    *,
    providers: Sequence[str],
    quiet: int = 1,
    sleep: Sleep = time.sleep,
) -> GivenBack:
    """End the cluster or job that was launched, and make sure of it; raises nothing.

    ``providers``: where its machine may be. ``quiet``: how often in a row there has to be nothing.
    """
    with closing(_Ending(renter, name, (managed,), VAST in providers)) as ending:
        try:
            ending.end(managed)
            ending.watch(quiet, sleep)
        except KeyboardInterrupt:
            return ending.broken_off()
    # Gone at vast.ai means gone: only of a job would the controller rent again, and only what
    # can be elsewhere is unknown.
    sure = not managed and set(providers) == {VAST} and not ending.at_vast
    return ending.result(() if sure else ending.at_skypilot)


def stop(renter: Renter, name: str, *, sleep: Sleep = time.sleep) -> GivenBack:
    """End whatever goes by that name, cluster and managed jobs, and make sure of it.

    ``InputError`` if there is nothing of that name anywhere. Without a key of vast.ai's that is not
    known, whatever SkyPilot says: a machine of which it lost the record bills all the same.
    """
    with closing(_Ending(renter, name, (False, True), True)) as ending:
        try:
            ending.watch(_AFTER_STOP, sleep)
        except KeyboardInterrupt:
            return ending.broken_off()
    found = ending.result(ending.at_skypilot)
    if not found.ended and not found.left:
        raise InputError(
            f"There is no such cluster or job as {name}, so nothing was ended; `sky status` and "
            "`sky jobs queue` list what there is."
        )
    return found


def stop_command(name: str) -> str:
    """What a person types to end it."""
    return f"tessera launch --stop {name}"


class _Ending:
    """One name that is being ended: what was there, what is, and what could not be told."""

    def __init__(
        self, renter: Renter, name: str, kinds: tuple[bool, ...], must_ask_vast: bool
    ) -> None:
        self._renter, self._name, self._kinds = renter, name, kinds
        self._asked = list(kinds)
        self._ended: dict[str, None] = {}
        self._there: list[str] = []
        self.at_skypilot: list[str] = []
        self.at_vast: list[str] = []
        self._ask_vast = bool(find_key())
        self._vast: VastClient | None = None
        if must_ask_vast and not self._ask_vast:
            self.at_vast.append(
                f"Whether vast.ai still bills for {name} is not known (there is no vast.ai key "
                f"here to make sure, `{KEY_COMMAND}`); look at {CONSOLE}."
            )

    def watch(self, quiet: int, sleep: Sleep) -> None:
        """Look and end, until ``quiet`` looks in a row found nothing, or too many something."""
        empty = busy = 0
        while True:
            self._there = []
            patience = self._look()
            empty, busy = (0, busy + 1) if self._there else (empty + 1, busy)
            if empty >= quiet or busy >= patience:
                return
            sleep(BETWEEN_S)

    def _look(self) -> int:
        """End what is there; how many such looks are worth it."""
        patience = _BUSY
        for managed in tuple(self._asked):
            status = self._status(managed)
            if status is not None:
                what = _what(self._name, managed)
                patience = _BUSY_JOB if managed else patience
                self._ended[what] = None
                self._there.append(
                    f"SkyPilot still has {what} ({status}); run `{stop_command(self._name)}` "
                    "until it has not."
                )
                self.end(managed)
        self._end_on_vast()
        return patience

    def _status(self, managed: bool) -> str | None:
        try:
            return self._renter.exists(self._name, managed)
        except Exception as error:
            self._asked.remove(managed)
            self.at_skypilot.append(
                f"SkyPilot does not tell whether there is {_what(self._name, managed)} "
                f"({first_line(error)}); run `{stop_command(self._name)}` until it does."
            )
            return None

    def end(self, managed: bool) -> None:
        """Have SkyPilot end it; where it cannot, it is not asked again."""
        try:
            self._renter.end(self._name, managed)
        except Exception as error:
            self._asked.remove(managed)
            again = ", and its controller replaces a machine that is ended" if managed else ""
            self.at_skypilot.append(
                f"SkyPilot could not {'cancel' if managed else 'take down'} "
                f"{_what(self._name, managed)} ({first_line(error)}){again}; run "
                f"`{stop_command(self._name)}` until it can."
            )

    def _end_on_vast(self) -> None:
        if not self._ask_vast:
            return
        try:
            self._vast = self._vast or VastClient()
            for instance in self._vast.instances():
                if any(is_labelled(instance.label, self._name, kind) for kind in self._kinds):
                    self._ended[f"vast.ai's instance {instance.id}"] = None
                    self._there.append(_still_billing(instance))
                    self._vast.destroy(instance.id)
        except TesseraError as error:
            self._ask_vast = False
            self.at_vast.append(
                f"Whether vast.ai still bills for {self._name} is not known "
                f"({str(error).rstrip('.')}); look at {CONSOLE}."
            )

    def close(self) -> None:
        """Let go of the connection to vast.ai."""
        if self._vast is not None:
            self._vast.close()

    def result(self, at_skypilot: Sequence[str]) -> GivenBack:
        """What is left, with these of SkyPilot's failures."""
        return GivenBack((*at_skypilot, *self._there, *self.at_vast), tuple(self._ended))

    def broken_off(self) -> GivenBack:
        """After Ctrl-C: nothing is known to be gone."""
        told = (
            f"Giving {self._name} back was broken off, so it may still bill; end it with "
            f"`{stop_command(self._name)}`, and look at {CONSOLE}."
        )
        left = (told, *self.at_skypilot, *self._there, *self.at_vast)
        return GivenBack(left, tuple(self._ended), interrupted=True)


def _what(name: str, managed: bool) -> str:
    return f"the managed job {name}" if managed else f"the cluster {name}"


def _still_billing(instance: VastInstance) -> str:
    price = instance.usd_per_hour
    cost = "" if price is None else f" and bills ${price:.2f}/h"
    return (
        f"vast.ai's instance {instance.id} ({instance.label}) is still there{cost}; end it at "
        f"{CONSOLE}."
    )
