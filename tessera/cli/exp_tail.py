"""``tessera-exp tail``: one run as it goes, from its journal."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from tessera.cli.common import Seconds, epilog, plain, root_option
from tessera.cli.run_names import run_argument

if TYPE_CHECKING:
    from tessera.cli._exp_tail_view import Item, Items, State
    from tessera.runs import Run
    from tessera.tracking.alert_records import Recorded
    from tessera.tracking.tail import RunTail

_ALERTS_EVERY_S = 30.0
_DAY_S = 24 * 3600.0
_ALERTS_AT_START = 3


@click.command(
    epilog=epilog(
        "tessera-exp tail smoke",
        "tessera-exp tail smoke-1a2b3c4d --lines 100 --no-follow",
        "tessera-exp tail smoke --json | jq 'select(.what == \"point\") | .loss'",
    )
)
@run_argument
@click.option(
    "--lines", "-n", type=click.IntRange(min=1), default=20, show_default=True, metavar="N",
    help="Lines of what has happened already.",
)  # fmt: skip
@click.option("--no-follow", is_flag=True, help="Print these and leave.")
@click.option(
    "--every", type=Seconds(0.5), default=5.0, show_default=True, metavar="SECONDS",
    help="Between two looks at the root.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
@root_option
def tail(run: str, lines: int, no_follow: bool, every: float, as_json: bool, root: str) -> int:
    """Losses, speed, dollars, events and alerts of RUN as they come; ends when the run does.

    RUN is a run id, its beginning, or the name of an experiment that has one run. What the run does
    reaches the root every 30 s. Ctrl-C ends the looking and stops nothing. Times are UTC.

    Exit codes: 0 the run ended, or Ctrl-C; 2 bad input or a damaged journal; 75 the root does not
    answer at the start.
    """
    from tessera.runs import find_run
    from tessera.storage import open_root

    store = open_root(root)
    show = Show(find_run(store, run), as_json)
    try:
        state = show.begin(lines, follow=not no_follow)
        while not (no_follow or state.over):
            time.sleep(every)
            state = show.go_on()
    except KeyboardInterrupt:
        click.echo("Stopped looking; the run itself is not touched.", err=True)
    return 0


@dataclass
class Show:
    """What was printed of one run so far."""

    run: Run
    as_json: bool
    _tail: RunTail = field(init=False)
    _items: Items = field(init=False)
    _state: State | None = None
    _alerts: set[str] = field(default_factory=set)
    _alerts_at: float = 0.0
    _trouble: str = ""

    def begin(self, lines: int, *, follow: bool) -> State:
        """Print how the run stands and its last lines; raises ``StoreError``."""
        from tessera.cli._exp_tail_view import Items, state_of
        from tessera.tracking.queries import total_steps
        from tessera.tracking.tail import RunTail

        self._tail = RunTail(self.run, lines)
        record = self.run.record
        self._items = Items(total_steps(record.experiment, record.data))
        news, now = self._tail.look(), time.time()
        state = state_of(self._tail, now)
        found = self._items.of(news, last=state.over or not follow)
        if not state.over:
            self._print([state.item(now)])
        self._print(self._new_alerts(now)[-_ALERTS_AT_START:])
        self._print(found[-lines:])
        return self._close(state, now, said=not state.over)

    def go_on(self) -> State:
        """One more look; a store that does not answer is said once and asked again."""
        from tessera.cli._exp_tail_view import state_of
        from tessera.errors import DamagedError, StoreError

        now = time.time()
        try:
            news = self._tail.look()
            alerts = self._new_alerts(now) if now - self._alerts_at >= _ALERTS_EVERY_S else []
        except DamagedError:
            raise
        except StoreError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                click.echo(f"Error: {error} Looking again.", err=True)
            return self._state_so_far()
        self._trouble = ""
        state = state_of(self._tail, now)
        self._print(self._items.of(news, last=state.name != "running"))
        self._print(alerts)
        before = self._state_so_far()
        changed = (before.name, before.attempt) != (state.name, state.attempt)
        if changed and not state.over:
            self._print([state.item(now)])
        return self._close(state, now, said=not state.over)

    def _close(self, state: State, now: float, *, said: bool) -> State:
        self._state = state
        if not said:
            self._print([state.item(now)])
        return state

    def _state_so_far(self) -> State:
        assert self._state is not None, "begin comes first"
        return self._state

    def _new_alerts(self, now: float) -> list[Item]:
        """Recorded alerts of the last day that were not printed yet, oldest first."""
        from tessera.cli._exp_tail_view import alert_item
        from tessera.tracking.alert_records import read_alerts, recorded_alerts

        self._alerts_at = now
        root = self.run.root
        found: Iterable[Recorded] = recorded_alerts(root, self.run.id).get(self.run.id, ())
        fresh = [one for one in found if one.id not in self._alerts]
        self._alerts.update(one.id for one in fresh)
        read = [alert for alert in read_alerts(root, fresh, []) if now - alert.at <= _DAY_S]
        return [alert_item(alert) for alert in reversed(read)]

    def _print(self, items: Iterable[Item]) -> None:
        for item in items:
            click.echo(_line(item) if self.as_json else _text(item))


def _text(item: Item) -> str:
    from tessera.cli._exp_tail_view import as_text

    return as_text(item)


def _line(item: Item) -> str:
    import json

    return json.dumps(plain(item), ensure_ascii=False)
