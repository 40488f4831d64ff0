"""From a plan to a running job: what is handed over, the record of it, and what still bills.

A launch leaves ``launches/<id>.json`` in the root before anything is rented, and
``launches/<id>.end.json`` when it is known how it ended: a machine of which SkyPilot lost the
record is found by that. What did not start is given back at once (``tessera.cloud.give_back``).
"""

from __future__ import annotations

import contextlib
import getpass
import re
import secrets
import shlex
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tessera.cloud.cards import Card
from tessera.cloud.credentials import env_file, read_settings
from tessera.cloud.give_back import AFTER_FAILURE, GivenBack, Sleep, give_back, stop_command
from tessera.cloud.interrupts import heard_interrupt
from tessera.cloud.offers import Offer
from tessera.cloud.plan import Line
from tessera.cloud.rent import CANCELLED, NOT_FINISHED, SUCCEEDED, Followed, Renter
from tessera.cloud.skypilot import TaskFile, first_line
from tessera.errors import ConflictError, InputError, NotFoundError, RetryElsewhereError, StoreError
from tessera.experiment import Experiment
from tessera.runs import identity_hash, open_run
from tessera.storage import Root

INTERRUPTED = 130
Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """One launch: what runs, on which offer, with which limits."""

    experiment: str
    overrides: tuple[str, ...]
    run_id: str
    name: str
    file: TaskFile
    line: Line
    alternatives: tuple[Offer, ...]
    card: Card | None
    budget_usd: float | None
    managed: bool
    root_url: str

    @property
    def offer(self) -> Offer:
        """What is rented first."""
        return self.line.offer

    @property
    def rented(self) -> tuple[Offer, ...]:
        """What SkyPilot may rent for it, in this order.

        A plain launch stays with the provider and card that the person agreed to; a managed job
        goes on wherever there is a machine.
        """
        same = _kind(self.offer)
        everywhere = (self.offer, *self.alternatives)
        kept = [offer for offer in everywhere if self.managed or _kind(offer) == same]
        found = {(o.provider, o.instance_type): o for o in reversed(kept) if o.instance_type}
        return tuple(reversed(found.values()))

    @property
    def catalog_usd_per_hour(self) -> float | None:
        """The dearest that it may rent, by the catalog: so a budget is never taken for larger."""
        kinds = {(offer.provider, offer.instance_type) for offer in self.rented}
        may_rent = [
            offer.usd_per_hour if offer.catalog_usd_per_hour is None else offer.catalog_usd_per_hour
            for offer in (self.offer, *self.alternatives)
            if (offer.provider, offer.instance_type) in kinds
        ]
        return max(may_rent, default=None)

    def envs(self) -> dict[str, str]:
        """What the job's environment gets."""
        return job_envs(
            self.experiment,
            self.overrides,
            self.run_id,
            self.catalog_usd_per_hour,
            self.budget_usd,
            self.card,
        )

    def task(self) -> Any:
        """The ``sky.Task`` that is launched; ``InputError`` for what SkyPilot refuses."""
        entries = [{**_plain(self.file.entries()[0]), **rented_as(offer)} for offer in self.rented]
        resources = entries[0] if len(entries) == 1 else {"ordered": entries}
        return self.file.task(resources, self.envs(), name=self.name)

    def command(self) -> str:
        """The plain SkyPilot command that rents the chosen offer."""
        return sky_command(self.file, self.offer, self.envs(), name=self.name, managed=self.managed)


def job_envs(
    experiment: str,
    overrides: Sequence[str],
    run_id: str,
    catalog_usd_per_hour: float | None,
    budget_usd: float | None,
    card: Card | None,
) -> dict[str, str]:
    """The variables that a job is launched with; keys travel in the credentials file alone.

    ``catalog_usd_per_hour`` counts where no provider tells what this machine costs. ``card`` is
    another GPU than the task file's, if a person asked for one.
    """
    catalog = catalog_usd_per_hour
    found = {
        "TESSERA_EXPERIMENT": experiment,
        "TESSERA_SET": shlex.join(overrides),
        "TESSERA_RUN_ID": run_id,
        "TESSERA_CATALOG_USD_PER_HOUR": "" if catalog is None else f"{catalog:g}",
        "TESSERA_BUDGET_USD": "" if budget_usd is None else f"{budget_usd:g}",
        "TESSERA_GPU": card.reported if card else "",
    }
    return {name: value for name, value in found.items() if value}


def _kind(offer: Offer) -> tuple[str, Card | None, int]:
    return offer.provider, offer.card, offer.gpus


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    chosen = ("infra", "cloud", "region", "zone", "accelerators", "instance_type")
    return {key: value for key, value in entry.items() if key not in chosen}


def rented_as(offer: Offer) -> dict[str, Any]:
    """The fields of SkyPilot's resources that mean this offer's instance type."""
    fields = {"infra": offer.provider.lower(), "instance_type": offer.instance_type}
    return {**fields, "accelerators": offer.accelerators} if offer.accelerators else fields


def sky_command(
    file: TaskFile, offer: Offer, envs: Mapping[str, str], *, name: str, managed: bool
) -> str:
    """``sky launch`` (``sky jobs launch``) of this offer, as a person would type it."""
    words = ["sky", "jobs", "launch", "-n"] if managed else ["sky", "launch", "-c"]
    words += [name, str(file.path)]
    for field, value in rented_as(offer).items():
        words += [f"--{field.replace('accelerators', 'gpus').replace('_', '-')}", value]
    for variable, value in envs.items():
        words += ["--env", f"{variable}={value}"]
    if file.bid_given:
        words += ["--config", f"vast.create_instance_kwargs.bid_price={file.bid:g}"]
    return shlex.join(words)


def run_id_of(experiment: Experiment, fingerprint: str | None, *, gpu: bool) -> str:
    """The run's id as training will compute it; without a corpus yet, one of the same form.

    It is handed over, so the same command continues the same run either way.
    """
    precision = experiment.precision
    if precision == "auto":
        precision = "bf16" if gpu else "float32"
    identity = experiment.model_copy(update={"precision": precision}).identity
    return f"{experiment.name}-{identity_hash(identity, fingerprint or '')}"


def cluster_name(run_id: str) -> str:
    """The run's id in the letters that every provider takes."""
    plain = re.sub(r"[^a-z0-9-]+", "-", run_id.lower()).strip("-")
    return plain if plain[:1].isalpha() else f"t-{plain}"


def require_settings() -> dict[str, str]:
    """What ``tessera configure`` wrote; ``InputError`` with that command if it never ran."""
    found = read_settings(env_file())
    if not found.get("TESSERA_ROOT"):
        raise InputError(
            f"{env_file()} does not exist or names no root, and the rented machine needs its root "
            "and keys; run `tessera configure` once."
        )
    return found


# -- launching -------------------------------------------------------------------------------------


def check(order: Order, root: Root, renter: Renter) -> None:
    """What can be refused before anything is rented: ``InputError``, ``ConflictError``."""
    if order.line.hindrance is not None:
        raise InputError(order.line.hindrance)
    try:
        ending = open_run(root, order.run_id).finished()
    except NotFoundError:
        ending = None
    if ending is not None:
        raise ConflictError(
            f"Run {order.run_id} is finished; name another with --run-id to train it again."
        )
    status = _ask(lambda: renter.exists(order.name, order.managed))
    if status is not None:
        what = "managed job" if order.managed else "cluster"
        raise ConflictError(
            f"A {what} {order.name} is there already ({status}) and may bill; follow it with "
            f"`{log_command(order.name, order.managed)}`, or end it with "
            f"`{stop_command(order.name)}`."
        )


def launch(
    order: Order,
    root: Root,
    renter: Renter,
    say: Say,
    *,
    detach: bool = False,
    sleep: Sleep = time.sleep,
) -> int:
    """Rent, start and follow; the exit code of the job. Raises ``RetryElsewhereError``.

    What could not be started, and what Ctrl-C stops while it starts, is given back before this
    returns; what still bills after that is named.
    """
    task = order.task()
    record = _Record(root, order)
    try:
        with heard_interrupt() as require_silence:
            job = renter.start(task, order.name, order.managed)
            require_silence()
    except InputError as error:
        record.end("refused", first_line(error), None)
        raise
    except (KeyboardInterrupt, Exception) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        say(
            f"{'Stopped' if interrupted else 'Not started'}: giving {order.name} back ... Should "
            f"this be broken off, `{stop_command(order.name)}` does it."
        )
        back = _give_back(renter, order, AFTER_FAILURE, sleep)
        reason = "interrupted" if interrupted else first_line(error)
        record.end("interrupted" if interrupted else "not started", reason, back)
        gone = "nothing of it is left that bills." if not back.left else " ".join(back.left)
        if interrupted or back.interrupted:
            say(f"Stopped before it ran; {gone}")
            return INTERRUPTED
        raise RetryElsewhereError(f"{order.name} did not start ({reason}); {gone}") from error
    say(costs(order))
    if detach:
        return 0
    try:
        followed = renter.follow(order.name, job, order.managed)
    except KeyboardInterrupt:
        say(f"Not following any more. {costs(order)}")
        return INTERRUPTED
    except Exception as error:
        raise RetryElsewhereError(
            f"The log of {order.name} broke off ({first_line(error)}), the job did not. "
            f"{costs(order)}"
        ) from error
    if followed.code == NOT_FINISHED:
        raise RetryElsewhereError(
            f"The log of {order.name} broke off, the job did not. {costs(order)}"
        )
    return _ended(order, root, renter, record, followed, say, sleep)


def _ended(
    order: Order,
    root: Root,
    renter: Renter,
    record: _Record,
    followed: Followed,
    say: Say,
    sleep: Sleep,
) -> int:
    """After the log's end: a job that is done needs its machine no more."""
    if followed.code == SUCCEEDED:
        back = _give_back(renter, order, 1, sleep)
        record.end("done", "", back)
        if back.interrupted:
            say(f"Done. {' '.join(back.left)}")
            return INTERRUPTED
        back.require()
        say(f"Done, and {order.name} is gone: nothing of it bills any more.")
        return 0
    cancelled, exit_code = followed.code == CANCELLED, followed.exit_code
    if exit_code is None:
        exit_code = _exit_code(root, order.run_id, record.started_at)
    record.end("cancelled" if cancelled else "failed", f"exit code {exit_code}", None)
    if not order.managed:
        say(
            f"The job ended with {exit_code}. Its machine takes itself down when it has been idle "
            f"for some minutes, and bills until then; `{stop_command(order.name)}` ends it "
            "now."
        )
    return INTERRUPTED if cancelled else exit_code


def costs(order: Order) -> str:
    """What goes on costing money, and how to stop it."""
    rate = order.offer.billed_usd_per_hour
    most = order.file.needs(None).max_usd_per_hour
    limit = f" (at most ${most * order.offer.nodes:,.2f}/h)" if most is not None else ""
    name, managed = order.name, order.managed
    return (
        f"{name} costs about ${rate:,.2f}/h{limit} until it ends. Follow it: "
        f"`{log_command(name, managed)}`. Stop it: `{stop_command(name)}` or "
        f"`{end_command(name, managed)}`."
    )


def log_command(name: str, managed: bool) -> str:
    """SkyPilot's command for the job's log."""
    return f"sky jobs logs -n {name}" if managed else f"sky logs {name}"


def end_command(name: str, managed: bool) -> str:
    """SkyPilot's command that ends it."""
    return f"sky jobs cancel -n {name}" if managed else f"sky down {name}"


def _give_back(renter: Renter, order: Order, quiet: int, sleep: Sleep) -> GivenBack:
    providers = [offer.provider for offer in order.rented]
    return give_back(
        renter, order.name, order.managed, providers=providers, quiet=quiet, sleep=sleep
    )


def _exit_code(root: Root, run_id: str, since: float) -> int:
    """The trainer's code as the run's last attempt recorded it; else 75: it never got so far."""
    try:
        endings = open_run(root, run_id).endings().values()
    except NotFoundError:
        return RetryElsewhereError.exit_code
    recent = [ending for ending in endings if ending.ended_at >= since]
    last = max(recent, key=lambda ending: ending.ended_at, default=None)
    return RetryElsewhereError.exit_code if last is None else last.exit_code


def _ask(question: Callable[[], str | None]) -> str | None:
    """SkyPilot's answer; its own errors become a sentence, since nothing was rented yet."""
    try:
        return question()
    except Exception as error:
        raise RetryElsewhereError(
            f"SkyPilot does not answer ({first_line(error)}), so nothing was rented; try "
            "`sky api start`."
        ) from error


class _Record:
    """``launches/<id>.json``, and ``<id>.end.json`` later."""

    def __init__(self, root: Root, order: Order) -> None:
        self.started_at = time.time()
        day = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self.started_at))
        self._root, self.id = root, f"{day}-{secrets.token_hex(4)}"
        root.create_json(f"launches/{self.id}.json", {
            "id": self.id,
            "at": self.started_at,
            "by": f"{getpass.getuser()}@{socket.gethostname()}",
            "run_id": order.run_id,
            "experiment": order.experiment,
            "set": list(order.overrides),
            "name": order.name,
            "managed": order.managed,
            "offer": _offer_record(order.offer),
            "may_rent": [[o.provider, o.instance_type] for o in order.rented],
            "catalog_usd_per_hour": order.catalog_usd_per_hour,
            "expected_usd": order.line.total_usd,
            "budget_usd": order.budget_usd,
            "command": order.command(),
        })  # fmt: skip

    def end(self, outcome: str, reason: str, back: GivenBack | None) -> None:
        """How it ended; a root that cannot be reached any more must not hide what is said next."""
        left: Sequence[str] = () if back is None else back.left
        with contextlib.suppress(StoreError):
            self._root.publish_json(
                f"launches/{self.id}.end.json",
                {"outcome": outcome, "reason": reason, "at": time.time(), "may_bill": list(left)},
            )


def may_bill(root: Root, provider: str) -> list[str]:
    """Names of this root's launches that may still bill at a provider, as their records have it.

    Those that said so at their end, and those of which nobody recorded an end. Raises
    ``StoreError``.
    """
    files = set(root.files("launches"))
    found: dict[str, None] = {}
    for path in sorted(path for path in files if not path.endswith(".end.json")):
        end = path.removesuffix(".json") + ".end.json"
        if end in files and not root.read_json(end).get("may_bill"):
            continue
        launched = root.read_json(path)
        if any(place[0] == provider for place in launched.get("may_rent", ())):
            found[str(launched.get("name"))] = None
    return list(found)


def _offer_record(offer: Offer) -> dict[str, Any]:
    found = asdict(offer)
    found["card"] = offer.card.name if offer.card else None
    return found
