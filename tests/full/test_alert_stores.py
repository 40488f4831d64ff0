"""Two watchers on real S3 servers: one that honours conditional writes, and one that does not."""

from __future__ import annotations

import importlib
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from tessera.storage import Root
from tessera.tracking.alert_records import record, recorded_alerts, send_new
from tessera.tracking.alerts import Alert
from tessera.tracking.webhooks import Webhook
from tests.services.stores import serve

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))
receiving = importlib.import_module("receiver").receiving
ALERTS = 6
NOW = 1_700_000_000.0


@pytest.mark.parametrize("kind", ["moto", "rclone"])
def test_two_watchers_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: by the condition where it is honoured, else by who is still there a second later."""
    with serve(kind, tmp_path / kind) as store, receiving() as receiver:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        found = [
            Alert("smoke-1a2b", "died", f"{number}-ab", NOW, "attempt died.", 3, f"{number}-ab")
            for number in range(1, ALERTS + 1)
        ]
        barrier = threading.Barrier(2)

        def watch() -> None:
            root = Root(store.url("watched"))
            hook = Webhook(1, receiver.url)
            for alert in found:
                barrier.wait()
                mine = record(root, alert, NOW)
                send_new(root, [mine] if mine else [], [hook], NOW)

        threads = [threading.Thread(target=watch) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sent = Counter(body["id"] for body in receiver.bodies)
        listed = recorded_alerts(Root(store.url("watched")))["smoke-1a2b"]
    print(f"\n  {kind}: {sum(sent.values())} messages for {ALERTS} alerts")
    assert sent.keys() >= {alert.id for alert in found}
    assert all(len(one.sent) == 1 for one in listed)
    if kind == "moto":
        assert set(sent.values()) == {1}
