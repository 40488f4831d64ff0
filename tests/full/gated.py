"""Starts ``tessera`` commands whose every publication waits for permission.

The process that runs this has imported everything and forks for every order (a JSON line) that it
reads. A child connects to the driver's socket and then asks before and after each thing that it
does to ``runs/`` in the root, in the order in which it does them:

    child   Point(operation, path, "before")        driver   anything: go on
    child   Point(operation, path, "after")         driver   anything: go on
    child   Ended(exit code)

Listings and downloads of checkpoints are such points too, since another attempt may remove one
meanwhile. What
would make the order differ from one try to the next is taken out: a save is over before the next
step, a checkpoint is two files, the heartbeat is an hour away. Tokens of attempts are given, since
the smaller one wins between two attempts of the same number.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from typing import Any


@dataclass(frozen=True)
class Point:
    """Something that an attempt is about to do (``before``) or has just done (``after``)."""

    operation: str
    path: str
    phase: str


@dataclass(frozen=True)
class Ended:
    """The last word of a process that ended by itself."""

    code: int


class Gate:
    """Asks the driver, one thread at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.RLock()

    def around(self, operation: str, path: str, act: Callable[[], Any]) -> Any:
        """``act()`` between two questions; what is not of a run does not ask."""
        if not path.startswith("runs/"):
            return act()
        with self._lock:
            self._ask(Point(operation, path, "before"))
            result = act()
            self._ask(Point(operation, path, "after"))
            return result

    def _ask(self, point: Point) -> None:
        self._connection.send(point)
        self._connection.recv()

    def end(self, code: int) -> None:
        """Say goodbye."""
        self._connection.send(Ended(code))


def install(gate: Gate) -> None:
    """Put the gate around everything that writes to a run, and around downloads."""
    from tessera.runs import Run
    from tessera.storage import Root
    from tessera.storage.s3 import S3Store

    def wrap(kind: type, method: str, place: int, when: Callable[..., bool]) -> None:
        plain = getattr(kind, method)

        @functools.wraps(plain)
        def asking(self: Any, *arguments: Any, **options: Any) -> Any:
            if not when(self, *arguments, **options):
                return plain(self, *arguments, **options)
            act = functools.partial(plain, self, *arguments, **options)
            return gate.around(method.strip("_"), arguments[place], act)

        setattr(kind, method, asking)

    def always(*_: Any, **__: Any) -> bool:
        return True

    def of_a_checkpoint(_: Any, path: str, *__: Any, **___: Any) -> bool:
        return path.endswith("/COMPLETE")

    def on_a_disk(root: Any, *_: Any) -> bool:
        return bool(root.is_local)

    def exclusive(*_: Any, new: bool = False) -> bool:
        return new

    for method in ("publish", "delete", "delete_tree"):
        wrap(Root, method, 0, always)
    wrap(Root, "put_file", 1, always)
    wrap(Root, "get_file", 0, always)
    wrap(Root, "read_json", 0, of_a_checkpoint)
    listed = Run.complete

    def listing(run: Run) -> Any:
        return gate.around("complete", run.path("checkpoints"), lambda: listed(run))

    patch: Callable[[Any, str, Any], None] = setattr
    patch(Run, "complete", listing)
    wrap(Root, "create", 0, on_a_disk)
    # On S3 a look whether the object exists comes first; the race lies behind it.
    wrap(S3Store, "_put", 0, exclusive)


def settle(tokens: str, nudge: float, poisoned: tuple[int, ...]) -> None:
    """Take out what would make two tries of one interleaving differ.

    ``tokens`` is the first digit of this process's tokens. ``nudge`` is added to the weights that
    it publishes, as a GPU's last bits would differ. Steps whose first sample is one of
    ``poisoned`` have a loss that is not a number.
    """
    from tessera import runs
    from tessera.model.peak import Peak
    from tessera.training import attempt
    from tessera.training.checkpoint import files
    from tessera.training.checkpoint.saver import Saver
    from tessera.training.pretrain import PretrainProgram

    count = itertools.count(1)
    ours = types.SimpleNamespace(token_hex=lambda _: f"{tokens}{next(count):07x}")
    patch: Callable[[Any, str, Any], None] = setattr
    patch(runs, "secrets", ours)
    patch(attempt, "peak_flops", lambda device, dtype: Peak(1e12, "the tests"))
    patch(files, "WRITERS", 1)
    save, publish = Saver.save, PretrainProgram.publish

    def save_and_wait(saver: Saver, *arguments: Any) -> bool:
        taken = save(saver, *arguments)
        saver.finish()
        return taken

    def publish_nudged(
        program: Any, run: Any, attempt: Any, done: int, weights: dict[str, Any]
    ) -> Any:
        moved = {name: tensor + nudge for name, tensor in weights.items()}
        return publish(program, run, attempt, done, moved)

    patch(Saver, "save", save_and_wait)
    if nudge:
        patch(PretrainProgram, "publish", publish_nudged)
    if poisoned:
        _poison(frozenset(poisoned))


def _poison(samples: frozenset[int]) -> None:
    """Every attempt that comes to these samples sees a loss that is not a number there."""
    import torch

    from tessera.training.loop import Loop
    from tessera.training.stability import Watch

    step, judge = Loop._step, Watch.judge
    bad = False

    def step_noting(loop: Loop, batch: Any) -> bool:
        nonlocal bad
        bad = loop.skips.first_sample(loop.done) in samples
        return step(loop, batch)

    def judge_poisoned(watch: Watch, number: int, loss: Any, norm: Any) -> Any:
        return judge(watch, number, torch.full_like(loss, torch.nan) if bad else loss, norm)

    patch: Callable[[Any, str, Any], None] = setattr
    patch(Loop, "_step", step_noting)
    patch(Watch, "judge", judge_poisoned)


def run(order: dict[str, Any]) -> int:
    """The child's life."""
    from tessera.cli.common import run_command
    from tessera.cli.exp import exp
    from tessera.cli.main import tessera

    for descriptor, end in ((1, "out"), (2, "err")):
        file = os.open(f"{order['output']}.{end}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    connection = Client(order["address"], family="AF_UNIX")
    connection.send(os.getpid())
    connection.recv()  # the driver holds on to this process before it can end
    gate = Gate(connection)
    if order["gated"]:
        install(gate)
    settle(order["tokens"], order["nudge"], tuple(order["poisoned"]))
    command = tessera if order["command"] == "tessera" else exp
    try:
        code = run_command(command, order["arguments"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    gate.end(code)
    return code


def main() -> None:
    """Read orders until there are no more."""
    import s3fs  # noqa: F401

    import tessera.cli._exp_view
    import tessera.cli.attempts
    import tessera.cli.common
    import tessera.cli.exp
    import tessera.cli.main
    import tessera.cloud.machine
    import tessera.training.session  # noqa: F401 - what takes the seconds

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the driver waits for the children, not we
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(run(order))


if __name__ == "__main__":
    main()
