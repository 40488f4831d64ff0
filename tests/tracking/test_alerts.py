"""Alerts: what is derived from records, recorded once and sent to real HTTP servers."""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tessera.errors import DamagedError, InputError
from tessera.runs import BUDGET, DIVERGED, FAILED, FINISHED, PREEMPTED, Run
from tessera.storage import Root
from tessera.tracking import alert_records, webhooks
from tessera.tracking.alert_records import read_alerts, record, recorded_alerts, retry_round
from tessera.tracking.alerts import Alert, alerts_of, offer_alert
from tessera.tracking.history import read_history
from tessera.tracking.index import read_indexed
from tessera.tracking.memory import remembered
from tessera.tracking.queries import summarise_history, summarise_run
from tessera.tracking.watch import Watcher
from tessera.tracking.webhooks import Webhook, payload, send

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench
    from tests.tracking.receiver import Receiver

receiving = importlib.import_module("receiver").receiving
SECRET = importlib.import_module("receiver").SECRET
ALERT = Alert(
    "smoke-1a2b", "died", "1-0a0b", 1.7e9, "attempt 1 died <at> step 3 & left.", 3, "1-0a"
)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once; what they wait for the other side is short."""
    monkeypatch.setattr(webhooks, "_WAIT", lambda _: 0.0)
    monkeypatch.setattr(webhooks, "_ONE_TRY_S", 0.3)


def derived(bench: Bench, run: Run) -> tuple[Alert, ...]:
    """From the whole journal and from what is remembered of it: both are the same."""
    now = bench.clock()
    whole = alerts_of(read_history(run, now=now), summarise_run(bench.root, run, now=now), now)
    with remembered(bench.root) as memory:
        found = read_indexed(bench.root, memory, now=now)
    (history,) = (history for history in found.whole if history.run.id == run.id)
    assert alerts_of(history, summarise_history(history, found.bills, now=now), now) == whole
    return whole


def skip(writer: Any, *steps: int) -> None:
    for step in steps:
        writer.journal.event(
            "stability/skipped", step, loss=9.5, grad_norm="NaN", first_sample=1, end_sample=2
        )


# -- what is derived -------------------------------------------------------------------------------


def test_a_killed_attempt_died_once(bench: Bench) -> None:
    run = bench.create()
    writer = bench.launch(run)
    writer.steps(1, 12)
    writer.kill()
    assert derived(bench, run) == (), "it may still be alive"
    bench.clock.now += 91
    (died,) = derived(bench, run)
    assert (died.kind, died.step, died.attempt) == ("died", 12, writer.attempt.id)
    assert died.key.startswith(f"{writer.attempt.id}-")
    assert died.at == pytest.approx(bench.clock() - 91)
    assert "attempt 1 (vast/i-1) died at step 12" in died.text
    assert died.text.endswith("no other attempt has begun.")
    second = bench.launch(run)
    second.steps(1, 2)
    bench.clock.now += 30
    (again,) = derived(bench, run)
    assert again.id == died.id
    assert again.text.endswith("a later attempt went on.")
    second.kill()


def test_an_attempt_that_was_silent_and_lived_on_can_die_once_more(bench: Bench) -> None:
    run = bench.create()
    writer = bench.launch(run)
    writer.steps(1, 5)
    writer.journal.flush()
    bench.clock.now += 200
    (silent,) = derived(bench, run)
    bench.clock.now += 300
    assert [alert.id for alert in derived(bench, run)] == [silent.id]
    writer.steps(6, 9)
    writer.kill()
    bench.clock.now += 200
    (dead,) = derived(bench, run)
    assert dead.kind == silent.kind == "died"
    assert dead.id != silent.id


@pytest.mark.parametrize("outcome", [PREEMPTED, "SUPERSEDED", "ROLLED_BACK"])
def test_an_attempt_that_said_goodbye_is_no_alert(bench: Bench, outcome: str) -> None:
    run = bench.create()
    writer = bench.launch(run)
    writer.steps(1, 3)
    writer.end(outcome, 3, exit_code=75)
    bench.clock.now += 1000
    assert derived(bench, run) == ()


def test_spikes_near_each_other_are_one(bench: Bench) -> None:
    run = bench.create(steps=500)
    writer = bench.launch(run)
    writer.steps(1, 1)
    skip(writer, *range(301, 311), 330, 341)
    writer.journal.event("run/rolled_back", 341, to_step=300, reason="3 spikes.", excluded=[])
    writer.end("ROLLED_BACK", 341)
    found = derived(bench, run)
    assert {a.key for a in found} == {"301", "330", "341", f"{writer.attempt.id}-back"}
    first = next(a for a in found if a.key == "301")
    assert first.text == (
        "10 steps from step 301 on were not applied: loss 9.5, gradient norm NaN at the first."
    )
    back = next(a for a in found if a.key.endswith("back"))
    assert back.text == "went back from step 341 to step 300: 3 spikes."
    again = bench.launch(run)  # does the same steps again, and skips the same
    skip(again, *range(301, 311))
    again.journal.flush()
    assert {a.id for a in derived(bench, run)} == {a.id for a in found}
    again.kill()


def test_a_run_that_never_stops_skipping_is_told_again(bench: Bench) -> None:
    run = bench.create(steps=500)
    writer = bench.launch(run)
    skip(writer, *range(1, 251, 5))
    writer.journal.flush()
    assert [a.key for a in derived(bench, run)] == ["1", "101", "201"]
    writer.kill()


def budgeted(run: Run, usd: float) -> Run:
    """The same run with a budget; its record in the root as well."""
    changed = replace(run.record, experiment={**run.record.experiment, "budget_usd": usd})
    run.root.publish_json(run.path("run.json"), asdict(changed))
    return Run(run.root, changed)


def test_four_fifths_of_the_budget(bench: Bench) -> None:
    run = budgeted(bench.create(), 0.1)
    writer = bench.launch(run)  # a tenth of a cent a second
    writer.steps(1, 79)
    writer.journal.flush()
    assert derived(bench, run) == ()
    writer.steps(80, 81)
    writer.journal.flush()
    (alert,) = derived(bench, run)
    assert (alert.kind, alert.key, alert.step) == ("budget", "80-0.1", 81)
    assert alert.text == "$0.08 of its budget of $0.1 are spent (81%)."
    bench.clock.now += 5
    assert derived(bench, run)[0].id == alert.id
    assert derived(bench, budgeted(run, 0.2)) == ()
    run = budgeted(run, 0.1)
    writer.end(BUDGET, 81)
    assert [a.kind for a in derived(bench, run)] == ["finished"]


def test_endings_say_loss_and_dollars(bench: Bench) -> None:
    (alert,) = derived(bench, bench.finished())
    assert alert.text == "finished at step 20, last evaluation 2.5000, $0.02."
    assert alert.short == "finished at step 20"
    run = bench.create("other")
    for outcome in (DIVERGED, FAILED):
        writer = bench.launch(run, usd_per_hour=None)
        writer.steps(1, 3)
        writer.journal.close()
        from tessera.runs import Ending

        ending = Ending(outcome, 3, bench.clock(), 3, "The loss was NaN.", writer.journal.written)
        run.end_attempt(writer.attempt, ending)
    texts = [a.text for a in derived(bench, run)]
    assert texts == [
        "diverged at step 3, no evaluation, price unknown (The loss was NaN).",
        "failed at step 3, no evaluation, price unknown (The loss was NaN).",
    ]


def test_a_run_that_two_attempts_finished_is_finished_once(bench: Bench) -> None:
    run = bench.create()
    for _ in range(2):
        writer = bench.launch(run)
        writer.steps(1, 2)
        writer.end(FINISHED, 2)
    assert len(derived(bench, run)) == 1


def test_an_offer_is_one_a_day() -> None:
    day = 86_400.0
    ids = [offer_alert("smoke", "1-ab", at, "cheaper.").id for at in (0.0, day - 1, day)]
    assert ids == ["smoke/offer-1-ab-1970-01-01"] * 2 + ["smoke/offer-1-ab-1970-01-02"]


def watched(monkeypatch: pytest.MonkeyPatch, method: str) -> list[str]:
    """The paths with which that method of roots is called from now on."""
    paths: list[str] = []
    real = getattr(Root, method)

    def call(self: Root, path: str) -> Any:
        paths.append(path)
        return real(self, path)

    monkeypatch.setattr(Root, method, call)
    return paths


# -- the records -----------------------------------------------------------------------------------


def test_a_record_is_created_once_and_listed_by_its_name(bench: Bench) -> None:
    assert recorded_alerts(bench.root) == {}
    assert record(bench.root, ALERT, 1.7e9)
    assert not record(bench.root, replace(ALERT, text="told otherwise"), 1.7e9)
    other = replace(ALERT, kind="budget", key="80-0.1")
    assert record(bench.root, other, 1.7e9)
    bench.root.publish(f"alerts/{ALERT.run_id}/died-1-0a0b.12ab.sent.json", b"{}")
    bench.root.publish(f"alerts/{ALERT.run_id}/died-1-0a0b.12ab.try-3.json", b"{}")
    bench.root.publish("alerts/strangers/readme.txt", b"")
    found = recorded_alerts(bench.root)
    assert list(found) == [ALERT.run_id]
    assert [(f.kind, f.key) for f in found[ALERT.run_id]] == [
        ("budget", "80-0.1"), ("died", "1-0a0b"),
    ]  # fmt: skip
    died = found[ALERT.run_id][1]
    assert [*died.sent, *died.tries] == ["12ab", "12ab.try-3"]
    (read,) = read_alerts(bench.root, [died])
    assert {f: getattr(read, f) for f in ALERT.__dataclass_fields__} == asdict(ALERT)
    assert recorded_alerts(bench.root, "none") == {}


def test_listing_reads_no_record(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    record(bench.root, ALERT, 1.7e9)
    listings = watched(monkeypatch, "files")
    monkeypatch.setattr(Root, "read_bytes", lambda *_: pytest.fail("a record was read"))
    assert recorded_alerts(bench.root)
    assert listings == ["alerts"]


def test_a_damaged_record_is_named(bench: Bench) -> None:
    bench.root.publish("alerts/smoke/died-1-ab.json", b'{"run_id": "smoke"}')
    (found,) = recorded_alerts(bench.root)["smoke"]
    with pytest.raises(DamagedError, match=r"^alerts/smoke/died-1-ab.json in .* is not an alert"):
        read_alerts(bench.root, [found])
    record(bench.root, replace(ALERT, run_id="smoke"), 1.7e9)
    sentences: list[str] = []
    assert len(read_alerts(bench.root, recorded_alerts(bench.root)["smoke"], sentences)) == 1
    assert len(sentences) == 1


def test_a_store_that_ignores_the_condition(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two create the same record at once and both are told yes: it is of whom the token says."""
    create = Root.create_json

    def both(self: Root, path: str, value: Any) -> bool:
        create(self, path, value)
        self.publish_json(path, {**value, "token": "the other's"})
        return True

    monkeypatch.setattr(Root, "create_json", both)
    assert not record(bench.root, ALERT, 1.7e9)


# -- sending ---------------------------------------------------------------------------------------


def test_the_message_is_what_chat_servers_take(receiver: Receiver) -> None:
    assert send(Webhook(1, receiver.url), ALERT) is None
    (body,) = receiver.bodies
    assert body == payload(ALERT)
    assert body["content"] == "Tessera: smoke-1a2b: attempt 1 died <at> step 3 & left."
    assert body["text"] == "Tessera: smoke-1a2b: attempt 1 died &lt;at&gt; step 3 &amp; left."
    assert body["allowed_mentions"] == {"parse": []}
    assert (body["kind"], body["run_id"], body["step"]) == ("died", "smoke-1a2b", 3)
    assert receiver.paths == [f"/services/{SECRET}"]
    # Names that Slack, Mattermost or Discord would read as orders of their own.
    taken = {"type", "channel", "username", "props", "attachments", "blocks", "flags", "embeds"}
    assert not taken & body.keys()


def test_a_long_text_is_cut(receiver: Receiver) -> None:
    assert send(Webhook(1, receiver.url), replace(ALERT, text="<" * 9000)) is None
    assert len(receiver.bodies[0]["content"]) == 1_900


@pytest.mark.usefixtures("hasty")
def test_a_passing_failure_is_tried_again_at_once() -> None:
    with receiving(500, 429, 204) as receiver:
        assert send(Webhook(1, receiver.url), ALERT) is None
        assert (len(receiver.paths), len(receiver.bodies)) == (3, 1)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("status", "tries", "said"),
    [
        (500, 4, "it answered 500"),
        (404, 1, "it answered 404"),
        (302, 1, "it answered 302"),
        (0, 4, "it did not answer within 0 s"),
    ],
)
def test_what_fails_is_a_clause_without_the_url(status: int, tries: int, said: str) -> None:
    with receiving(status) as receiver:
        assert send(Webhook(1, receiver.url), ALERT) == said
        assert len(receiver.paths) == tries
        assert receiver.bodies == []


def test_an_answer_that_trickles_in_is_given_up() -> None:
    with receiving(-1) as receiver:
        assert send(Webhook(1, receiver.url), ALERT, patience_s=0.7) == "it did not answer in time"


@pytest.mark.usefixtures("hasty")
def test_a_hanging_webhook_takes_no_longer_than_patience() -> None:
    with receiving(0) as receiver:
        assert str(send(Webhook(1, receiver.url), ALERT, patience_s=0.5)).startswith("it did not")
        assert len(receiver.paths) <= 3


@pytest.mark.usefixtures("hasty")
def test_nobody_at_home_and_a_url_that_httpx_refuses() -> None:
    with receiving() as receiver:
        url = receiver.url
    assert send(Webhook(1, url), ALERT) == "it cannot be reached (ConnectError)"
    broken = send(Webhook(1, "http://127.0.0.1:99999999/" + SECRET), ALERT)
    assert broken is not None
    assert SECRET not in broken


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    found = webhooks.webhooks({"TESSERA_ALERT_WEBHOOK": " https://a/1  http://b/2 https://a/1\n"})
    assert [(w.number, w.url) for w in found] == [(1, "https://a/1"), (2, "http://b/2")]
    assert webhooks.webhooks({}) == ()
    for wrong in (
        "hooks.slack.com/" + SECRET,
        "ftp://x/" + SECRET,
        "https://",
    ):
        with pytest.raises(InputError, match=r"^Webhook 2 of TESSERA_ALERT_WEBHOOK") as error:
            webhooks.webhooks({"TESSERA_ALERT_WEBHOOK": "https://a/1 " + wrong})
        assert SECRET not in str(error.value)


def test_the_url_is_in_no_log_and_no_repr(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger=name)
    webhook = Webhook(1, receiver.url)
    assert send(webhook, ALERT) is None
    assert caplog.records == []
    assert repr(webhook) == "Webhook(1)"
    assert len(webhook.mark) == 4


# -- watchers --------------------------------------------------------------------------------------


def contents(root: Root) -> bytes:
    return b"".join(p.read_bytes() for p in Path(root.base).rglob("*") if p.is_file())


def test_a_look_records_and_sends_once(bench: Bench, receiver: Receiver) -> None:
    run = bench.finished()
    watcher = Watcher(bench.root, [Webhook(1, receiver.url)])
    look = watcher.look(bench.clock())
    assert [a.kind for a in look.new] == ["finished"]
    assert [s.trouble for s in look.sendings] == [None]
    for other in (watcher, Watcher(bench.root, [Webhook(1, receiver.url)])):
        later = other.look(bench.clock() + 500)
        assert (later.new, later.sendings) == ((), ())
    assert receiver.kinds == ["finished"]
    (found,) = recorded_alerts(bench.root)[run.id]
    assert len(found.sent) == 1
    assert SECRET.encode() not in contents(bench.root)


def test_two_watchers_at_once_send_once(bench: Bench, receiver: Receiver) -> None:
    for name in ("a", "b", "c"):
        bench.finished(name)
    barrier = threading.Barrier(2)
    looks = []

    def watch() -> None:
        watcher = Watcher(bench.root, [Webhook(1, receiver.url)])
        barrier.wait()
        looks.append(watcher.look(bench.clock()))

    threads = [threading.Thread(target=watch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(looks) == 2
    assert sorted(body["run_id"].split("-")[0] for body in receiver.bodies) == ["a", "b", "c"]
    assert sum(len(look.new) for look in looks) == 3


@pytest.mark.usefixtures("hasty")
def test_a_failed_webhook_is_sent_again_by_the_next_watcher(bench: Bench) -> None:
    run = bench.finished()
    with receiving(404) as receiver:
        hook = Webhook(1, receiver.url)
        start = bench.clock()
        first = Watcher(bench.root, [hook]).look(start)
        assert [s.trouble for s in first.sendings] == ["it answered 404"]
        (found,) = recorded_alerts(bench.root)[run.id]
        assert found.sent == frozenset()
        assert Watcher(bench.root, [hook]).look(start + 59).sendings == ()
        second = Watcher(bench.root, [hook]).look(start + 61)
        assert [s.trouble for s in second.sendings] == ["it answered 404"]
        assert Watcher(bench.root, [hook]).look(start + 119).sendings == (), "tried in this round"
        receiver.answers[:] = [200]
        third = Watcher(bench.root, [hook]).look(start + 121)
        assert [s.trouble for s in third.sendings] == [None]
        assert Watcher(bench.root, [hook]).look(start + 5000).sendings == ()
        assert receiver.kinds == ["finished"]


def test_a_watcher_killed_between_record_and_send(
    bench: Bench, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.finished()
    hook = Webhook(1, receiver.url)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(alert_records, "send", killed)
        with pytest.raises(KeyboardInterrupt):
            Watcher(bench.root, [hook]).look(bench.clock())
    assert receiver.bodies == []
    assert Watcher(bench.root, [hook]).look(bench.clock() + 61).new == ()
    assert receiver.kinds == ["finished"]


def test_one_killed_between_send_and_mark_sends_twice(
    bench: Bench, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least once: the docs say so."""
    bench.finished()
    hook = Webhook(1, receiver.url)
    publish = Root.publish_json

    def killed(self: Root, path: str, value: Any) -> None:
        if path.endswith(".sent.json"):
            raise KeyboardInterrupt
        publish(self, path, value)

    with monkeypatch.context() as patch:
        patch.setattr(Root, "publish_json", killed)
        with pytest.raises(KeyboardInterrupt):
            Watcher(bench.root, [hook]).look(bench.clock())
    Watcher(bench.root, [hook]).look(bench.clock() + 61)
    assert receiver.kinds == ["finished", "finished"]


@pytest.mark.usefixtures("hasty")
def test_of_two_webhooks_only_the_one_that_failed_gets_it_again(bench: Bench) -> None:
    bench.finished()
    with receiving(200) as well, receiving(403) as ill:
        hooks = [Webhook(1, well.url), Webhook(2, ill.url)]
        look = Watcher(bench.root, hooks).look(bench.clock())
        assert [(s.webhook, s.trouble) for s in look.sendings] == [
            (1, None), (2, "it answered 403"),
        ]  # fmt: skip
        ill.answers[:] = [200]
        Watcher(bench.root, hooks).look(bench.clock() + 70)
        assert (len(well.bodies), len(ill.bodies)) == (1, 1)


def test_recorded_without_a_webhook_and_sent_by_whoever_has_one(
    bench: Bench, receiver: Receiver
) -> None:
    bench.finished()
    assert Watcher(bench.root).look(bench.clock()).sendings == ()
    Watcher(bench.root, [Webhook(1, receiver.url)]).look(bench.clock() + 61)
    assert receiver.kinds == ["finished"]


def test_what_is_old_is_recorded_and_not_sent(bench: Bench, receiver: Receiver) -> None:
    run = bench.finished()
    late = bench.clock() + 86_401
    look = Watcher(bench.root, [Webhook(1, receiver.url)]).look(late)
    assert [a.run_id for a in look.new] == [run.id]
    Watcher(bench.root, [Webhook(1, receiver.url)]).look(late + 61)
    assert receiver.paths == []


@pytest.mark.parametrize(
    ("age", "number"),
    [(0, None), (59.9, None), (60, 0), (119, 0), (120, 1), (240, 2), (86_400, 10), (86_401, None)],
)
def test_rounds_of_trying_again(age: float, number: int | None) -> None:
    assert retry_round(age) == number


def test_a_run_that_ended_is_not_read_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.finished()
    read = watched(monkeypatch, "read_bytes")
    Watcher(bench.root).look(bench.clock())
    assert [path for path in read if "/journal/" in path]
    read.clear()
    Watcher(bench.root).look(bench.clock())
    assert not [path for path in read if "/journal/" in path]


def test_a_damaged_run_hides_no_other(bench: Bench) -> None:
    bad, good = bench.finished("bad"), bench.finished("good")
    (segment,) = bench.root.files(bad.path("journal"))
    bench.root.publish(segment, b"nonsense\n" + bench.root.read_bytes(segment))
    look = Watcher(bench.root).look(bench.clock())
    assert [a.run_id for a in look.new] == [good.id]
    assert len(look.troubles) == 1
    assert bad.id in look.troubles[0]
    assert Watcher(bench.root, run_id=good.id).look(bench.clock()).troubles == ()


@pytest.mark.usefixtures("hasty")
def test_a_webhook_that_fails_is_left_alone_for_the_rest_of_a_look(bench: Bench) -> None:
    """Ten seconds each would add up."""
    for name in ("a", "b", "c"):
        bench.finished(name)
    with receiving(404) as receiver:
        look = Watcher(bench.root, [Webhook(1, receiver.url)]).look(bench.clock())
        assert (len(look.new), len(look.sendings), len(receiver.paths)) == (3, 1, 1)
        receiver.answers[:] = [200]
        Watcher(bench.root, [Webhook(1, receiver.url)]).look(bench.clock() + 61)
        assert receiver.kinds == ["finished"] * 3


def test_old_alerts_are_not_read_at_every_look(
    bench: Bench, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.finished()
    Watcher(bench.root).look(bench.clock())
    watcher = Watcher(bench.root, [Webhook(1, receiver.url)])
    late = bench.clock() + 86_500
    watcher.look(late)
    read = watched(monkeypatch, "read_bytes")
    watcher.look(late + 60)
    assert not [path for path in read if path.startswith("alerts/")]
    assert receiver.paths == []
