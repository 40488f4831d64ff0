"""Renting and giving back, through SkyPilot's Python API; giving back is verified at the provider.

``Renter`` is all that a launch asks of SkyPilot. SkyPilot does not tear down what failed while it
was being set up, and a machine of which it lost the record bills all the same: so ``give_back``
asks vast.ai itself, by the label that SkyPilot gives its machines, and ends what is left.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tessera.cloud.skypilot import first_line, require_skypilot
from tessera.cloud.vast import VastClient, VastInstance, find_key
from tessera.errors import RetryElsewhereError, TesseraError

CONSOLE = "https://cloud.vast.ai/instances/"
SUCCEEDED, CANCELLED = 0, 103  # sky.exceptions.JobExitCode
_LOOKS = 4
_JOB_NAME = 25  # sky.jobs.constants.JOBS_CLUSTER_NAME_PREFIX_LENGTH
_BETWEEN_S = 2.0


class Renter(Protocol):
    """What a launch asks of SkyPilot; ``name`` is a cluster's, or with ``managed`` a job's."""

    def exists(self, name: str, managed: bool) -> str | None:
        """The status of what goes by that name and may bill; None if there is nothing."""

    def start(self, task: Any, name: str, managed: bool) -> int | None:
        """Rent, set up and submit, showing SkyPilot's own lines; the job's number."""

    def follow(self, name: str, job: int | None, managed: bool) -> int:
        """Show the job's log to its end; SkyPilot's code for how it ended."""

    def end(self, name: str, managed: bool) -> None:
        """Take the cluster down, or cancel the job; nothing there is no error."""


class SkyPilot:
    """The real one."""

    def __init__(self) -> None:
        self._sky = require_skypilot()
        self._request: Any = None

    def exists(self, name: str, managed: bool) -> str | None:
        """See ``Renter``; a jobs controller that is not up has no jobs."""
        sky = self._sky
        if managed:
            with contextlib.suppress(sky.exceptions.ClusterNotUpError):
                request = sky.jobs.queue_v2(refresh=False, skip_finished=True, name_match=name)
                found = sky.get(request)
                jobs = found[0] if isinstance(found, tuple) else found
                return next((str(j["status"]) for j in jobs if j["job_name"] == name), None)
            return None
        rows = sky.get(sky.status([name]))
        return str(getattr(rows[0]["status"], "value", rows[0]["status"])) if rows else None

    def start(self, task: Any, name: str, managed: bool) -> int | None:
        """See ``Renter``."""
        sky = self._sky
        if managed:
            self._request = sky.jobs.launch(task, name=name)
            jobs, _ = sky.stream_and_get(self._request)
            return jobs[0] if jobs else None
        self._request = sky.launch(task, cluster_name=name)
        job, _ = sky.stream_and_get(self._request)
        self._request = None
        return job if job is None else int(job)

    def follow(self, name: str, job: int | None, managed: bool) -> int:
        """See ``Renter``."""
        sky = self._sky
        if managed:
            return int(sky.jobs.tail_logs(job_id=job, name=None if job else name, follow=True))
        return int(sky.tail_logs(name, job, follow=True))

    def end(self, name: str, managed: bool) -> None:
        """See ``Renter``. A launch that is still under way is called off first."""
        sky = self._sky
        if self._request is not None:
            with contextlib.suppress(Exception):  # it may be over; what it left is looked for below
                sky.get(sky.api_cancel(self._request, silent=True))
            self._request = None
        if managed:
            with contextlib.suppress(sky.exceptions.ClusterNotUpError):
                sky.stream_and_get(sky.jobs.cancel(name=name))
            return
        with contextlib.suppress(sky.exceptions.ClusterDoesNotExist):
            sky.stream_and_get(sky.down(name))


@dataclass(frozen=True)
class GivenBack:
    """How giving back ended: what may still bill, in sentences; none: nothing does."""

    left: tuple[str, ...]

    def require(self) -> None:
        """``RetryElsewhereError`` that names what may still bill."""
        if self.left:
            raise RetryElsewhereError(" ".join(self.left))


def give_back(
    renter: Renter,
    name: str,
    managed: bool,
    *,
    on_vast: bool,
    client: Callable[[], VastClient] = VastClient,
    between_s: float = _BETWEEN_S,
) -> GivenBack:
    """End the cluster or job, and make sure of it at the provider; raises nothing.

    ``on_vast``: whether a machine of vast.ai may be behind it, which is then looked for by label.
    """
    left = []
    stop = stop_command(name, managed)
    try:
        renter.end(name, managed)
    except Exception as error:
        left.append(
            f"SkyPilot could not take {name} down ({first_line(error)}); run `{stop}` until it can."
        )
    if not on_vast and not find_key():
        return GivenBack(tuple(left))
    if on_vast and not find_key():
        left.append(
            f"There is no vast.ai key here to make sure that {name} is gone; look at {CONSOLE}."
        )
        return GivenBack(tuple(left))
    try:
        with client() as vast:
            remaining = _end_on_vast(vast, name, managed, between_s)
    except TesseraError as error:
        left.append(
            f"Whether vast.ai still bills for {name} is not known ({str(error).rstrip('.')}); look "
            f"at {CONSOLE}."
        )
        return GivenBack(tuple(left))
    if remaining:
        left.extend(_still_billing(instance) for instance in remaining)
        return GivenBack(tuple(left))
    # Gone at the provider: what SkyPilot could not do does not cost anything any more.
    return GivenBack(() if on_vast else tuple(left))


def _end_on_vast(
    vast: VastClient, name: str, managed: bool, between_s: float
) -> Sequence[VastInstance]:
    """What vast.ai still has of that name after several looks, each of which ends what it sees."""
    remaining: list[VastInstance] = []
    for look in range(_LOOKS):
        if look:
            time.sleep(between_s)
        remaining = [i for i in vast.instances() if is_labelled(i.label, name, managed)]
        if not remaining:
            return ()
        for instance in remaining:
            vast.destroy(instance.id)
    return [i for i in vast.instances() if is_labelled(i.label, name, managed)]


def is_labelled(label: str, name: str, managed: bool) -> bool:
    """Whether SkyPilot gave that label to a machine of cluster or managed job ``name``.

    A cluster's is ``<name>-<user>-head``. A managed job's is ``<name>-<job>-<user>-head``; a name
    longer than 25 is cut to 22 and gets two characters of its hash.
    """
    plain = re.escape(re.sub(r"[._]", "-", name).lower())
    if managed and len(name) > _JOB_NAME:
        plain = re.escape(re.sub(r"[._]", "-", name).lower()[: _JOB_NAME - 3].rstrip("-"))
        plain += "-[0-9a-z]{2}"
    job = r"-\d+" if managed else ""
    return re.fullmatch(rf"{plain}{job}-[0-9a-f]{{4,8}}-(head|worker)", label) is not None


def _still_billing(instance: VastInstance) -> str:
    price = instance.usd_per_hour
    cost = "" if price is None else f" and bills ${price:.2f}/h"
    return (
        f"vast.ai's instance {instance.id} ({instance.label}) is still there{cost}; end it at "
        f"{CONSOLE}."
    )


def stop_command(name: str, managed: bool) -> str:
    """What a person types to end it."""
    return f"tessera launch --stop {name}" + (" --managed" if managed else "")
