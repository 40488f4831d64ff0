"""A journal for the ranks that keep none: rank 0 records for all of them."""

from __future__ import annotations

from typing import Any

from tessera.tracking.journal import Journal
from tessera.tracking.records import Kind


class MuteJournal(Journal):
    """Takes every record and keeps none."""

    def __init__(self) -> None:
        self.attempt = ""
        self.last_error = None

    @property
    def written(self) -> int:
        """Nothing."""
        return 0

    def _append(self, kind: Kind, key: str, value: Any, step: int) -> None:
        pass

    def _upload(self, *, final: bool = False) -> None:
        pass

    def close(self, *, quiet: bool = False) -> None:
        """Nothing to close."""
