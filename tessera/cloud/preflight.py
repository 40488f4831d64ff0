"""Is this machine worth its price? Looked at before a run, on the machine, in minutes.

Cheap questions come first, and the bench, which costs a minute of the GPU, only where they leave
hope. An answer that another machine would not change (a key, a bucket, the experiment) ends with 2;
what speaks against this machine ends with 75 and counts as a refusal (``tessera.cloud.refusals``).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tenacity import Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

from tessera.cloud.cards import card_named
from tessera.cloud.disk import GIB, already_here, checkpoint_bytes, disk_needed
from tessera.cloud.nvidia import Gpu, list_gpus, summary
from tessera.cloud.probe import AS_SAVED, ClockError, RootProbe, clock_named, probe_root
from tessera.cloud.speeds import shipped, speed_of
from tessera.errors import InputError, RetryElsewhereError, TesseraError
from tessera.experiment import Experiment, Pretrain
from tessera.storage import cache_folder

MACHINE, INPUT = RetryElsewhereError.exit_code, InputError.exit_code
_TORCH_PATIENCE_S = 180.0
_BENCH_PATIENCE_S = 900.0
_ASK_TORCH = """
import json, torch
found = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda,
    "devices": torch.cuda.device_count() if found else 0,
}))
"""


@dataclass(frozen=True)
class Limits:
    """From where on the answer is no.

    Shares of 1: ``speed`` of the speed that was measured for this card, ``projected_speed`` of one
    that is only projected, ``power`` of the card's default power limit (and its clocks), ``saving``
    of the time between two checkpoints that sending one to the root may take before that is said.
    ``upload``: bytes a second below which, measured twice, such a root is no place for them.
    ``skew_s``: seconds between the clocks of this machine and of the store. ``patience_s``: seconds
    that a root may take to answer at all.
    """

    speed: float = 0.8
    projected_speed: float = 0.5
    power: float = 0.9
    saving: float = 0.5
    upload: float = 1e6
    skew_s: float = 60.0
    patience_s: float = 300.0


@dataclass(frozen=True)
class Wanted:
    """What was asked for: part of the GPU's name (empty: any) and how many (0: no GPU)."""

    gpu: str
    gpus: int
    on_cpu: bool
    """``TESSERA_DEVICE=cpu``: the GPU is looked at all the same, and not computed with."""

    @property
    def text(self) -> str:
        """In a sentence."""
        return f"{self.gpus} x {self.gpu or 'any GPU'}" if self.gpus else "no GPU"

    @property
    def uses_gpu(self) -> bool:
        """Whether a GPU will train."""
        return self.gpus > 0 and not self.on_cpu


Verdict = Literal["go", "note", "no-go"]


@dataclass(frozen=True)
class Check:
    """One question, its answer and what follows; ``code`` is 0, 2 or 75."""

    name: str
    verdict: Verdict
    found: str
    reason: str = ""
    code: int = 0


@dataclass
class Findings:
    """Every answer so far, and the figures behind them."""

    checks: list[Check] = field(default_factory=list)
    gpus: list[Gpu] = field(default_factory=list)
    probe: RootProbe | None = None
    tokens_per_s: float | None = None

    def go(self, name: str, found: str, note: str = "") -> None:
        """An answer that is fine, perhaps with a remark."""
        self.checks.append(Check(name, "note" if note else "go", found, note))

    def no(self, name: str, found: str, reason: str, code: int = MACHINE) -> None:
        """An answer that ends it."""
        self.checks.append(Check(name, "no-go", found, reason, code))

    @property
    def against(self) -> list[Check]:
        """What speaks against it."""
        return [check for check in self.checks if check.verdict == "no-go"]

    @property
    def exit_code(self) -> int:
        """0 go; 2 before 75: what another machine would not change."""
        codes = [check.code for check in self.against]
        return INPUT if INPUT in codes else max(codes, default=0)


def wanted_from(environ: Mapping[str, str], *, on_cpu: bool) -> Wanted:
    """``TESSERA_GPU`` and ``TESSERA_GPUS``; ``InputError`` for a count that is none.

    A name alone asks for one GPU, a count alone for so many of any kind, neither for none.
    """
    name, text = environ.get("TESSERA_GPU") or "", environ.get("TESSERA_GPUS") or ""
    if not text:
        return Wanted(name, 1 if name else 0, on_cpu)
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"TESSERA_GPUS is {text!r}; expected how many GPUs, at least 1.")
    return Wanted(name, int(text), on_cpu)


def look(
    experiment: Experiment | None,
    bench_arguments: Sequence[str],
    root_url: str | None,
    wanted: Wanted,
    limits: Limits,
    *,
    bench: bool,
    said: Callable[[str], None],
) -> Findings:
    """Every check in turn; ``said`` hears what is being looked at.

    ``bench_arguments`` are the experiment and its overrides as ``tessera bench`` takes them;
    without a ``root_url`` no root is tried.
    """
    findings = Findings()
    said("the GPUs")
    look_at_gpus(findings, wanted, limits)
    look_at_disk(findings, experiment)
    if root_url is not None:
        said("the root")
        look_at_root(findings, root_url, limits)
    if wanted.uses_gpu and not findings.against:
        said("torch and its driver")
        look_at_torch(findings, wanted)
    if not bench:
        findings.go("speed", "not measured")
    elif not findings.against:
        said("the speed of a step")
        look_at_speed(findings, experiment, bench_arguments, wanted, limits)
        look_at_saving(findings, experiment, root_url, limits)
    return findings


def look_at_gpus(findings: Findings, wanted: Wanted, limits: Limits) -> None:
    """Model, number, power limit and clocks against what was asked."""
    findings.gpus, reason = list_gpus()
    gpus, found = findings.gpus, summary(findings.gpus)
    if not wanted.gpus:
        findings.go("GPU", found)
        return
    if not gpus:
        findings.no("GPU", "none", f"{wanted.text} was asked for and {reason}")
        return
    if len(gpus) != wanted.gpus or any(wanted.gpu not in gpu.name for gpu in gpus):
        findings.no("GPU", found, f"{wanted.text} was asked for")
        return
    findings.go("GPU", found)
    _look_at_shares(
        findings, "power limit", "W", limits.power,
        [(gpu.power_limit_w, gpu.default_power_limit_w) for gpu in gpus],
    )  # fmt: skip
    clocks = [(gpu.set_clock_mhz, gpu.default_clock_mhz) for gpu in gpus]
    if any(pair != (None, None) for pair in clocks):
        _look_at_shares(findings, "clocks", "MHz", limits.power, clocks)
    elif gpus[0].max_clock_mhz:
        findings.go("clocks", f"at most {gpus[0].max_clock_mhz:,.0f} MHz")


def _look_at_shares(
    findings: Findings,
    name: str,
    unit: str,
    least: float,
    pairs: Sequence[tuple[float | None, float | None]],
) -> None:
    """What is set against the maker's default, the worst GPU of all."""
    known = [(now / usual, now, usual) for now, usual in pairs if now and usual]
    if not known:
        findings.go(name, "not told")
        return
    share, now, usual = min(known)
    found = f"{now:,.0f} of {usual:,.0f} {unit}"
    if share < least:
        findings.no(name, found, f"its owner turned it down to {share:.0%}, below {least:.0%}")
    else:
        findings.go(name, found)


def look_at_disk(findings: Findings, experiment: Experiment | None) -> None:
    """Room where shards and checkpoints will lie."""
    folder = cache_folder()
    need, standing = disk_needed(experiment), folder
    held = already_here(experiment, folder)
    while not standing.exists() and standing != standing.parent:
        standing = standing.parent
    free = shutil.disk_usage(standing).free
    here = f" and {held / GIB:,.1f} of this run's here" if held else ""
    found = f"{free / GIB:,.1f} GiB free{here}, {need / GIB:,.1f} needed"
    if free + held >= need:
        findings.go("disk", found)
    else:
        findings.no(
            "disk", found, f"{folder} is too small; give disk_size more, or TESSERA_CACHE another"
        )


def look_at_root(findings: Findings, url: str, limits: Limits) -> None:
    """Permissions and speed of the root by using it, and the clocks."""
    if "://" not in url and not Path(url).is_dir():
        findings.no("root", url, "there is no such folder; correct --root or TESSERA_ROOT", INPUT)
        return
    waiting = Retrying(
        retry=retry_if_exception(_may_answer_later),
        wait=wait_random_exponential(multiplier=1, max=20),
        stop=stop_before_delay(limits.patience_s),
        reraise=True,
    )
    try:
        found = waiting(probe_root, url, size=AS_SAVED)
    except TesseraError as error:
        code = MACHINE if error.exit_code == MACHINE else INPUT
        name = "clock" if isinstance(error, ClockError) else "root"
        findings.no(name, url, str(error).rstrip("."), code)
        return
    findings.probe = found
    findings.go(
        "root",
        f"written at {found.write_bytes_per_s / 1e6:,.1f} MB/s, read at "
        f"{found.read_bytes_per_s / 1e6:,.1f} MB/s, {found.latency_s * 1e3:,.0f} ms a listing",
    )
    ahead = found.clock_ahead_s
    if ahead is None:
        return
    told = f"{clock_named(ahead)} the store's" if ahead else "as the store's"
    if abs(ahead) > limits.skew_s:
        findings.no("clock", told, f"more than {limits.skew_s:.0f} s: its bill would be wrong")
    else:
        findings.go("clock", told)


def _may_answer_later(error: BaseException) -> bool:
    return getattr(error, "exit_code", None) == MACHINE and not isinstance(error, ClockError)


def look_at_torch(findings: Findings, wanted: Wanted) -> None:
    """Whether torch finds those GPUs, with this driver."""
    done = _run([sys.executable, "-c", _ASK_TORCH], _TORCH_PATIENCE_S)
    driver = findings.gpus[0].driver if findings.gpus else "unknown"
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        findings.no("torch", f"driver {driver}", f"torch cannot be loaded ({_last(done.stderr)})")
        return
    found = f"torch {told['torch']}, CUDA {told['cuda'] or 'none'}, driver {driver}"
    if not told["cuda"]:
        findings.no("torch", found, "this build of torch has no CUDA; install that of PyPI", INPUT)
    elif told["devices"] != wanted.gpus:
        findings.no(
            "torch", found,
            f"torch finds {told['devices']} of {wanted.gpus} GPUs; is the driver too old for it?",
        )  # fmt: skip
    else:
        findings.go("torch", found)


def look_at_speed(
    findings: Findings,
    experiment: Experiment | None,
    arguments: Sequence[str],
    wanted: Wanted,
    limits: Limits,
) -> None:
    """``tessera bench --quick``, against what was measured for this card."""
    if experiment is not None and not isinstance(experiment, Pretrain):
        findings.go("speed", "not measured (a fine-tuning)")
        return
    command = [sys.executable, "-m", "tessera", "bench", *arguments, "--quick", "--json"]
    done = _run(command, _BENCH_PATIENCE_S)
    try:
        one = tokens_per_s_of(json.loads(done.stdout))
    except (ValueError, KeyError, TypeError):
        reason, code = why_not_measured(done.stdout, _last(done.stderr), done.returncode)
        findings.no("speed", "none", f"no step could be measured ({reason})", code)
        return
    findings.tokens_per_s = one * max(1, wanted.gpus)
    each = f", {wanted.gpus} GPUs if they scale" if wanted.gpus > 1 else ""
    found = f"{findings.tokens_per_s:,.0f} tokens/s{each}"
    card = card_named(findings.gpus[0].name) if wanted.uses_gpu and findings.gpus else None
    usual = speed_of(experiment, card, 1, shipped()) if experiment and card else None
    if usual is None or usual.tokens_per_s is None or card is None:
        findings.go("speed", found)
        return
    least = limits.speed if usual.how == "measured" else limits.projected_speed
    share = one / usual.tokens_per_s
    told = f"{share:.0%} of the {usual.tokens_per_s:,.0f} {usual.how} for {card.name}"
    if share < least:
        findings.no("speed", found, f"{told}, below {least:.0%}")
    else:
        findings.go("speed", f"{found}, {told}")


def why_not_measured(document: str, said: str, exit_code: int) -> tuple[str, int]:
    """Why ``tessera bench`` measured nothing, and whose matter that is: 2 or 75.

    It leaves with 2 for whatever a step died of; an error that names its type (``AcceleratorError:
    ...``), and a GPU that is busy, are the machine's.
    """
    try:
        reason = str(json.loads(document)["rows"][0]["reason"] or said)
    except (ValueError, KeyError, TypeError, IndexError):
        return said, INPUT if exit_code == INPUT else MACHINE
    machine_s = re.match(r"\w+(Error|Exception)\b", reason) or "something else keeps" in reason
    return reason, MACHINE if machine_s or exit_code != INPUT else INPUT


def tokens_per_s_of(document: Mapping[str, Any]) -> float:
    """The best row of what ``tessera bench --json`` prints."""
    (row,) = (row for row in document["rows"] if row["name"] == document["best"])
    return float(row["tokens_per_s"])


def look_at_saving(
    findings: Findings, experiment: Experiment | None, url: str | None, limits: Limits
) -> None:
    """Whether checkpoints reach the root as fast as training makes them.

    A slow bucket goes along to the next machine, so by itself it refuses none.
    """
    probe, speed = findings.probe, findings.tokens_per_s
    if probe is None or speed is None or url is None or not isinstance(experiment, Pretrain):
        return
    rate = probe.write_bytes_per_s
    between = experiment.checkpoint.every_steps * experiment.batch.tokens_per_step / speed
    size = checkpoint_bytes(experiment)
    late = size / rate > limits.saving * between
    if late and rate < limits.upload:
        with suppress(TesseraError):  # it answered before: one measurement stays
            rate = max(rate, probe_root(url, size=AS_SAVED).write_bytes_per_s)
            late = size / rate > limits.saving * between
    found = f"{size / rate:,.0f} s to send, every {between:,.0f} s"
    if not late:
        findings.go("checkpoints", found)
    elif rate < limits.upload:
        findings.no(
            "checkpoints", found,
            f"measured twice, the root takes {rate / 1e6:,.2g} MB/s, below {limits.upload / 1e6:g}",
        )  # fmt: skip
    else:
        findings.go(
            "checkpoints", found,
            f"more than {limits.saving:.0%} of the time is sending; a preemption loses less with "
            "a store that is nearer",
        )  # fmt: skip


def _run(command: Sequence[str], patience_s: float) -> subprocess.CompletedProcess[str]:
    """A process of its own: one that crashes, hangs or is killed for want of memory tells that."""
    # Random tokens will do; the corpus would be downloaded only for this.
    environ = {name: value for name, value in os.environ.items() if name != "TESSERA_ROOT"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, env=environ, timeout=patience_s, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer in {patience_s:.0f} s")


def _last(text: str) -> str:
    """The last line of what a process said, which is its reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ").rstrip(".")[:300] if lines else "it says nothing"
