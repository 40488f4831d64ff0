"""Refused machines, counted in the root: ``refusals/<job>/<n>-<token>.json``.

A managed job is started again whenever it leaves with 75, as often as that happens; SkyPilot does
not count those recoveries. So each refusal is a record in the root, and the one that reaches
``TESSERA_MAX_REFUSALS`` (3) of one launch leaves with 2, which is final. Where the refusal cannot
be recorded it is final at once: nobody would count the next one either. A person who launches again
starts at one; a refused host is remembered all the same, and named when it comes back.

A machine that passes its preflight forgives the refusals before it (``forgive``), by their numbers,
as clocks of refused machines cannot be trusted: bad hosts spread over days do not add up. The mark
is written before training begins, so no kill takes it away. Each node forgives its own alone.

No torch here: a refused machine installs what storage needs and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

from pydantic import ConfigDict, TypeAdapter, with_config

from tessera.cloud.machine import LOCAL, Machine
from tessera.errors import (
    DamagedError,
    InputError,
    NotFoundError,
    RetryElsewhereError,
    TesseraError,
)
from tessera.storage import Root

FOLDER = "refusals"

MAX_VARIABLE = "TESSERA_MAX_REFUSALS"
DEFAULT_MAX = 3


class RefusedError(RetryElsewhereError):
    """This machine must not be used; another one may do (75)."""


class RefusedTooOftenError(TesseraError):
    """One machine too many was refused; only a person can say what to ask for instead (2)."""

    exit_code = InputError.exit_code


@with_config(ConfigDict(extra="ignore"))
@dataclass(frozen=True)
class Refusal:
    """One refused machine. Times in seconds since the epoch; prices in US dollars an hour.

    ``launch`` tells launches of one job apart; it stays the same when a managed job recovers.
    ``machine`` is the provider's id of the physical host and ``gpus`` are the GPUs' own ids, which
    no container hides; both may be missing.
    """

    number: int
    token: str
    at: float
    launch: str
    node: int
    provider: str
    instance: str
    machine: str
    host: str
    gpus: tuple[str, ...]
    wanted: str
    found: str
    reason: str
    billed_from: float | None
    usd_per_hour: float | None
    price_source: str

    @property
    def id(self) -> str:
        """``<n>-<token>``."""
        return f"{self.number}-{self.token}"

    @property
    def place(self) -> str:
        """The host in a sentence: what the provider calls it, else its own name."""
        return f"{self.provider} machine {self.machine}" if self.machine else f"host {self.host}"

    def is_on(self, machine: Machine, gpus: Sequence[str]) -> bool:
        """Whether it was this physical host. A container's host name says nothing."""
        if self.machine and machine.machine:
            return (self.provider, self.machine) == (machine.provider, machine.machine)
        return bool(set(self.gpus) & set(gpus))


_FORM = TypeAdapter(Refusal)


def job_of(environ: Mapping[str, str] = os.environ) -> str:
    """The folder of a job: its run id, else the managed job's own id, else its experiment."""
    name = environ.get("TESSERA_RUN_ID") or ""
    if not name and environ.get("SKYPILOT_MANAGED_JOB_ID"):
        name = environ.get("SKYPILOT_TASK_ID") or ""
    name = name or PurePosixPath(environ.get("TESSERA_EXPERIMENT") or "").stem or "other"
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".") or "other"


def limit(environ: Mapping[str, str] = os.environ) -> int:
    """``TESSERA_MAX_REFUSALS``, by default 3; ``InputError`` unless it is a number above 0."""
    text = environ.get(MAX_VARIABLE) or str(DEFAULT_MAX)
    if not text.isdecimal() or int(text) < 1:
        raise InputError(
            f"{MAX_VARIABLE} is {text!r}; expected how many machines may be refused, at least 1."
        )
    return int(text)


def scan_refusals(root: Root, job: str | None = None) -> list[Refusal]:
    """The refusals of ``job``, or of all, oldest first; records of others' making are left out."""
    found = {}
    for path in root.files(f"{FOLDER}/{job}" if job else FOLDER):
        with suppress(NotFoundError):
            found[path] = root.read_bytes(path)
    return parse_refusals(found)


def parse_refusals(contents: Mapping[str, bytes]) -> list[Refusal]:
    """``scan_refusals`` of what was read already, by path in the root."""
    found = []
    for path, data in contents.items():
        if path.endswith(".json"):
            with suppress(ValueError):  # a ValidationError is one too
                found.append(_FORM.validate_python(json.loads(data)))
    return sorted(found, key=lambda refusal: (refusal.at, refusal.id))


def forgive(root: Root, environ: Mapping[str, str] = os.environ) -> int:
    """Count no refusal of this job and node so far; how many there are. Raises ``TesseraError``."""
    job, node = job_of(environ), _node(environ)
    earlier = [refusal for refusal in scan_refusals(root, job) if refusal.node == node]
    if earlier:
        upto = max(refusal.number for refusal in earlier)
        root.publish_json(_cleared(job, node), {"upto": upto, "at": time.time()})
    return len(earlier)


def _cleared(job: str, node: int) -> str:
    return f"{FOLDER}/{job}/cleared-{node}.json"


def _forgiven(root: Root, job: str, node: int) -> int:
    """The number of the last refusal that does not count; 0 without a mark that can be read."""
    try:
        upto = root.read_json(_cleared(job, node))["upto"]
    except (NotFoundError, DamagedError, KeyError, TypeError):
        return 0
    return upto if isinstance(upto, int) else 0


def refused_before(root: Root, machine: Machine, gpus: Sequence[str]) -> list[Refusal]:
    """Earlier refusals of this physical host, whichever job it was, oldest first."""
    return [refusal for refusal in scan_refusals(root) if refusal.is_on(machine, gpus)]


def refuse(
    root: Root,
    machine: Machine,
    *,
    wanted: str,
    found: str,
    reason: str,
    gpus: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> TesseraError:
    """Record that this machine is refused, and return what to raise: 75, or 2 at the limit.

    ``reason`` is a clause; ``found`` and ``wanted`` name machines. Raises nothing itself.
    """
    place = machine.machine or machine.host
    said = f"{reason} (wanted {wanted}, found {found}, on {machine.provider} {place})"
    try:
        _require_shared(root, machine)
        most = limit(environ)
        job = job_of(environ)
        earlier = scan_refusals(root, job)
        refusal = _make(machine, environ, earlier, wanted, found, reason, gpus)
        root.publish_json(f"{FOLDER}/{job}/{refusal.id}.json", asdict(refusal))
        nodes = {r.node for r in earlier} | {refusal.node}
        upto = {node: _forgiven(root, job, node) for node in nodes}
        since = [r for r in [*earlier, refusal] if r is refusal or r.number > upto[r.node]]
    except TesseraError as error:
        return _uncounted(said, error)
    launched = [r for r in since if r.launch == refusal.launch]
    count = _count(launched)
    again = [r for r in earlier if r.is_on(machine, gpus)]
    known = f" This host was refused before ({again[-1].reason})." if again else ""
    if count < most:
        return RefusedError(
            f"This machine is refused: {said}; refusal {count} of {most}, another machine may "
            f"help.{known}"
        )
    told = "; ".join(f"{r.found} on {r.place}, {r.reason}" for r in launched)
    return RefusedTooOftenError(
        f"{count} machines were refused for {job}, so this is final ({told}): ask for another GPU "
        f"or provider, or accept what is offered (TESSERA_GPU), then launch again.{known}"
    )


def _require_shared(root: Root, machine: Machine) -> None:
    """Raise ``InputError`` if the next rented machine will not see what is written here."""
    if machine.provider != LOCAL and root.is_absent():
        raise InputError(
            f"the root {root.url} is a folder of this rented machine alone; set TESSERA_ROOT to a "
            "bucket, or to a folder that is mounted everywhere"
        )


def _make(
    machine: Machine,
    environ: Mapping[str, str],
    earlier: Sequence[Refusal],
    wanted: str,
    found: str,
    reason: str,
    gpus: Sequence[str],
) -> Refusal:
    return Refusal(
        number=max((refusal.number for refusal in earlier), default=0) + 1,
        token=secrets.token_hex(4),
        at=time.time(),
        launch=environ.get("SKYPILOT_TASK_ID") or "",
        node=_node(environ),
        provider=machine.provider,
        instance=machine.instance,
        machine=machine.machine,
        host=machine.host or socket.gethostname(),
        gpus=tuple(gpus),
        wanted=wanted,
        found=found,
        reason=reason,
        billed_from=machine.billed_from,
        usd_per_hour=machine.price.usd_per_hour,
        price_source=machine.price.source,
    )


def _node(environ: Mapping[str, str]) -> int:
    node = environ.get("SKYPILOT_NODE_RANK") or "0"
    return int(node) if node.isdecimal() else 0


def _count(refusals: Sequence[Refusal]) -> int:
    """Launches that ended in a refusal; of several machines of one launch more may refuse."""
    nodes: dict[int, int] = {}
    for refusal in refusals:
        nodes[refusal.node] = nodes.get(refusal.node, 0) + 1
    return max(nodes.values())


def _uncounted(said: str, error: TesseraError) -> TesseraError:
    """A refusal that is not in the root: final, whatever the store's own code would be."""
    return RefusedTooOftenError(
        f"This machine is refused: {said}; it could not be counted in the root, so this is final "
        f"lest wrong machines be rented for ever ({str(error).rstrip('.')}): put that right and "
        "launch again."
    )
