"""From the machine's facts to the record of an attempt."""

from __future__ import annotations

from dataclasses import replace

from tessera.cloud.machine import Machine
from tessera.ledger.prices import AskPrice, Quote
from tessera.runs import Attempt


def place_of(machine: Machine) -> Attempt:
    """An attempt on this machine, still without a number, a token or a checkpoint.

    Every source tells the price of one machine; the attempt's is that of all its machines.
    """
    price = machine.price.usd_per_hour
    return Attempt(
        number=0,
        token="",
        started_at=machine.process_started_at,
        provider=machine.provider,
        instance=machine.instance,
        host=machine.host,
        device=machine.device,
        devices=machine.devices,
        usd_per_hour=None if price is None else price * machine.nodes,
        price_source=machine.price.source,
        billed_from=machine.billed_from,
        billed_from_source=machine.billed_from_source,
        setup_started_at=machine.setup_started_at,
        usd_per_gb_up=machine.traffic.usd_per_gb,
        usd_per_gb_down=machine.traffic_down.usd_per_gb,
        machine=machine.machine,
        price_note=machine.price.note,
        price_followed=machine.ask_price is not None,
        nodes=machine.nodes,
    )


def ask_for_all(machine: Machine) -> AskPrice | None:
    """Asks what an hour of all machines costs now; None where there is nobody to ask."""
    ask = machine.ask_price
    if ask is None or machine.nodes == 1:
        return ask

    def asked() -> Quote:
        quote = ask()
        return replace(quote, usd_per_hour=quote.usd_per_hour * machine.nodes)

    return asked
