"""What a tracking database holds, read behind MLflow's back, so that two can be compared whole."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Seen:
    """What a tracking database holds, by our run id, in an order that does not matter."""

    points: dict[str, list[tuple[str, int, str, int]]]
    params: dict[str, dict[str, str]]
    tags: dict[str, dict[str, str]]
    runs: dict[str, tuple[str, int, int | None, str | None]]
    versions: dict[int, dict[str, str]]
    aliases: dict[str, int]

    def values(self, run_id: str, key: str) -> list[tuple[int, str]]:
        """(step, value) of one metric, by step."""
        return [(step, value) for name, step, value, _ in self.points[run_id] if name == key]


def look(path: Path) -> Seen:
    """Read a tracking database behind MLflow's back: fast, and nothing is hidden."""
    with sqlite3.connect(path) as db:
        ask: Callable[[str], list[Any]] = lambda sql: db.execute(sql).fetchall()  # noqa: E731
        names = dict(
            ask(
                "select t.run_uuid, t.value from tags t join runs r on r.run_uuid = t.run_uuid "
                "where t.key = 'tessera.run_id' and r.lifecycle_stage = 'active'"
            )
        )
        seen = Seen({}, {}, {}, {}, {}, {})
        for uuid, name in names.items():
            assert name not in seen.points, f"{name} is there twice"
            where = f"where run_uuid = '{uuid}'"
            seen.points[name] = sorted(
                (key, step, "NaN" if nan else repr(value), time)
                for key, step, value, time, nan in ask(
                    f"select key, step, value, timestamp, is_nan from metrics {where}"
                )
            )
            seen.params[name] = dict(ask(f"select key, value from params {where}"))
            tags = dict(ask(f"select key, value from tags {where}"))
            parent = names.get(tags.pop("mlflow.parentRunId", ""))
            seen.tags[name] = tags
            (status, start, end), *_ = ask(f"select status, start_time, end_time from runs {where}")
            seen.runs[name] = (status, start, end, parent)
        for version, key, value in ask("select version, key, value from model_version_tags"):
            seen.versions.setdefault(version, {})[key] = value
        seen.aliases.update(ask("select alias, version from registered_model_aliases"))
    return seen
