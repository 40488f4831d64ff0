"""What the provider says about the very machine that this process runs on: price, host, since when.

Only vast.ai has an API for that on the host itself (SkyPilot puts the account's key there). The
start of a run never waits for it: the first question has ``PATIENCE_S`` in all, whatever hangs.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tessera.cloud.vast import URL_VARIABLE, VastClient, VastInstance, find_key
from tessera.errors import InputError, ProviderError, TesseraError
from tessera.ledger.prices import Quote

PATIENCE_S = 10.0
CLOCKS_AGREE_S = 30.0
"""Clocks that differ by less are taken to be the same: answers tell whole seconds, and travel."""

T = TypeVar("T")


@dataclass(frozen=True)
class Rental:
    """This instance as its provider has it; ``billed_from`` by this machine's own clock."""

    instance: str
    machine: str
    quote: Quote
    billed_from: float | None


class VastHost:
    """This machine, a vast.ai instance: asks for its price as often as one likes."""

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        """``name``: ``C.<id>``, or the SkyPilot cluster that the machine belongs to."""
        self._name = name
        self._key, self._url = find_key(environ), environ.get(URL_VARIABLE)

    def rental(self, *, tries: int = 3, patience_s: float = PATIENCE_S - 1) -> Rental:
        """Ask now. Raises ``TesseraError``, one sentence, where there is no usable answer."""
        if not self._key:
            raise InputError(
                "There is no vast.ai key on this machine (~/.config/vastai/vast_api_key), so its "
                "price cannot be asked for; set TESSERA_USD_PER_HOUR."
            )
        with VastClient(
            self._key, self._url, tries=tries, timeout_s=patience_s / 2, patience_s=patience_s
        ) as client:
            found = client.instance_of(self._name)
            ahead_s = client.clock_ahead_s
        if found is None:
            raise ProviderError(
                f"vast.ai has no instance {self._name} on the account of this machine's key; set "
                "TESSERA_USD_PER_HOUR."
            )
        rental = _rental_of(found, ahead_s)
        self._name = rental.instance  # from now on one small question
        return rental

    def quote(self) -> Quote:
        """What it costs now; for a thread that nobody waits for."""
        return self.rental(tries=4, patience_s=60.0).quote


def _rental_of(found: VastInstance, ahead_s: float) -> Rental:
    price = found.dph_total  # whatever its status says: what asks here is alive, so it is billed
    if price is None:
        raise ProviderError(
            f"vast.ai tells no usable price for instance {found.id}; set TESSERA_USD_PER_HOUR."
        )
    skew = ahead_s if abs(ahead_s) > CLOCKS_AGREE_S else 0.0
    return Rental(
        instance=f"C.{found.id}",
        machine="" if found.machine_id is None else str(found.machine_id),
        quote=Quote(price, found.inet_up_cost, found.inet_down_cost, found.is_bid is False),
        billed_from=None if found.start_date is None else found.start_date - skew,
    )


def within(seconds: float, ask: Callable[[], T]) -> T:
    """``ask()``, but not waited for longer than that: even a name server can hang for minutes.

    Raises what it raises, and ``ProviderError`` when the time is over.
    """
    answers: list[T] = []
    errors: list[TesseraError] = []

    def work() -> None:
        try:
            answers.append(ask())
        except TesseraError as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="ask-provider", daemon=True)
    thread.start()
    thread.join(seconds)
    if answers:
        return answers[0]
    raise (
        errors[0]
        if errors
        else ProviderError(
            f"The provider did not answer within {seconds:.0f} s; set TESSERA_USD_PER_HOUR."
        )
    )


def first_environ(path: Path = Path("/proc/1/environ")) -> dict[str, str]:
    """The variables of the container's first process: an ssh session does not get them."""
    try:
        pairs = path.read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def vast_container(environ: Mapping[str, str], cloud: str) -> str | None:
    """``C.<id>`` of the vast.ai container with these variables; None if they name none."""
    if label := environ.get("VAST_CONTAINERLABEL"):
        return label
    number = environ.get("CONTAINER_ID", "")
    of_vast = cloud == "vast" or any(name.startswith("VAST_") for name in environ)
    return f"C.{number}" if of_vast and re.fullmatch(r"\d+", number) else None
