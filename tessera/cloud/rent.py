"""Renting and ending, through SkyPilot's Python API; whose a machine is, by its label.

``Renter`` is all that a launch asks of SkyPilot; ``tessera.cloud.give_back`` makes sure that what
was rented is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import sys
from typing import Any, NamedTuple, Protocol, TextIO

from tessera.cloud.offers import KEY_COMMAND
from tessera.cloud.skypilot import require_skypilot
from tessera.errors import InputError

SUCCEEDED, NOT_FINISHED, CANCELLED = 0, 101, 103  # sky.exceptions.JobExitCode
_JOB_NAME = 25  # sky.jobs.constants.JOBS_CLUSTER_NAME_PREFIX_LENGTH
_CANCELLING = "CANCELLING"
_CODES = re.compile(r"^ERROR: Job \d+ failed with return code list: \[(\d+(?:, \d+)*)\]")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Followed(NamedTuple):
    """How a job ended: SkyPilot's code, and the job's own if its log tells it."""

    code: int
    exit_code: int | None = None


class ShownLog(io.TextIOBase):
    """Passes a job's log on, and remembers the exit code that SkyPilot's last line about it names.

    Nothing else tells it: SkyPilot's own code for a job that failed is 100, whatever it left with.
    """

    def __init__(self, target: TextIO) -> None:
        self._target, self._line = target, ""
        self.exit_code: int | None = None

    def write(self, text: str) -> int:
        """Show it at once."""
        self._target.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if found := _CODES.search(_COLOURS.sub("", line)):
                codes = [int(code) for code in found[1].split(",")]
                # Of several machines those whose peer failed are killed with 137.
                self.exit_code = next((c for c in codes if c not in (0, 137)), codes[0])
        return len(text)

    def flush(self) -> None:
        """As the terminal does."""
        self._target.flush()


class Renter(Protocol):
    """What a launch asks of SkyPilot; ``name`` is a cluster's, or with ``managed`` a job's."""

    def exists(self, name: str, managed: bool) -> str | None:
        """The status of what goes by that name and may bill; None if there is nothing.

        Raises where that cannot be told: no answer is not taken for nothing.
        """

    def start(self, task: Any, name: str, managed: bool) -> int | None:
        """Rent, set up and submit, showing SkyPilot's own lines; the job's number.

        ``InputError`` says that SkyPilot refused before anything was rented.
        """

    def follow(self, name: str, job: int | None, managed: bool) -> Followed:
        """Show the job's log to its end, and say how it ended."""

    def end(self, name: str, managed: bool) -> None:
        """Take the cluster down, or cancel every job of that name; nothing there is no error."""


class SkyPilot:
    """The real one."""

    def __init__(self) -> None:
        self._sky = require_skypilot()
        self._request: Any = None

    def exists(self, name: str, managed: bool) -> str | None:
        """See ``Renter``."""
        if managed:
            return ", ".join(sorted(set(self._jobs(name).values()))) or None
        rows = self._sky.get(self._sky.status([name]))
        return _text(rows[0]["status"]) if rows else None

    def _jobs(self, name: str) -> dict[int, str]:
        """Number and status of the managed jobs of that name that are not over.

        A controller that never was or is stopped has none. One that cannot be reached may have
        some: then SkyPilot's error is raised.
        """
        sky = self._sky
        try:
            request = sky.jobs.queue_v2(refresh=False, skip_finished=True, name_match=name)
            found = sky.get(request)
        except sky.exceptions.ClusterNotUpError as error:
            if error.cluster_status is None or _text(error.cluster_status) == "STOPPED":
                return {}
            raise
        rows = found[0] if isinstance(found, tuple) else found
        return {int(j["job_id"]): _text(j["status"]) for j in rows if j["job_name"] == name}

    def start(self, task: Any, name: str, managed: bool) -> int | None:
        """See ``Renter``."""
        try:
            return self._start(task, name, managed)
        except self._sky.exceptions.NoCloudAccessError as error:
            raise InputError(
                "SkyPilot has no provider enabled, so nothing was rented: "
                f"`{KEY_COMMAND} && sky check vast`."
            ) from error

    def _start(self, task: Any, name: str, managed: bool) -> int | None:
        sky = self._sky
        if managed:
            self._request = sky.jobs.launch(task, name=name)
            jobs, _ = sky.stream_and_get(self._request)
            return jobs[0] if jobs else None
        self._request = sky.launch(task, cluster_name=name)
        job, _ = sky.stream_and_get(self._request)
        self._request = None
        return job if job is None else int(job)

    def follow(self, name: str, job: int | None, managed: bool) -> Followed:
        """See ``Renter``."""
        sky, log = self._sky, ShownLog(sys.stdout)
        if managed:
            by_name = None if job else name
            code = sky.jobs.tail_logs(job_id=job, name=by_name, follow=True, output_stream=log)
        else:
            code = sky.tail_logs(name, job, follow=True, output_stream=log)
        return Followed(int(code), log.exit_code)

    def end(self, name: str, managed: bool) -> None:
        """See ``Renter``. A launch that is still under way is called off first."""
        sky = self._sky
        if self._request is not None:
            with contextlib.suppress(Exception):  # it may be over; what it left is looked for below
                sky.get(sky.api_cancel(self._request, silent=True))
            self._request = None
        if managed:
            # By number: of several jobs of one name SkyPilot cancels none, and says so in passing.
            jobs = [job for job, status in self._jobs(name).items() if status != _CANCELLING]
            if jobs:
                sky.stream_and_get(sky.jobs.cancel(job_ids=jobs))
            return
        with contextlib.suppress(sky.exceptions.ClusterDoesNotExist):
            sky.stream_and_get(sky.down(name))


def is_labelled(label: str, name: str, managed: bool) -> bool:
    """Whether SkyPilot gave that label to a machine of cluster or managed job ``name``.

    A cluster's is ``<name>-<user>-head``. A managed job's is ``<name>-<job>-<user>-head``; a name
    longer than 25 is cut to 22 and gets the first two characters of its MD5 in base 36.
    """
    plain = re.sub(r"[._]", "-", name).lower()
    if managed and len(plain) > _JOB_NAME:
        plain = f"{plain[: _JOB_NAME - 3].rstrip('-')}-{_base36_md5(name)[:2]}"
    job = r"-\d+" if managed else ""
    found = re.fullmatch(rf"{re.escape(plain)}{job}-[0-9a-f]{{4,8}}-(head|worker)", label)
    return found is not None


def _base36_md5(text: str) -> str:
    number = int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16)
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits


def _text(status: Any) -> str:
    """SkyPilot's enumerations and plain texts alike."""
    return str(getattr(status, "value", status))
