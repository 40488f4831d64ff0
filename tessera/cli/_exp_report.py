"""What a report tells of rooms that tracking may not know: corpus, interviews, promotions."""

from __future__ import annotations

from collections.abc import Iterator

from tessera.corpus.manifest import Manifest, SourceEntry, load_manifest
from tessera.errors import InputError, StoreError
from tessera.evaluation.verdicts import InterviewResult, ProbeResult
from tessera.promotion.records import Promotion, holders, read_promotions
from tessera.promotion.registry import interviews_of
from tessera.runs import Run, read_text, scan_runs
from tessera.storage import Root
from tessera.tracking.report.content import (
    Answer,
    Corpus,
    Extras,
    Interview,
    Source,
    Weights,
)
from tessera.tracking.report.gather import without_secrets

_SIDECAR = "weights.json"
_VERDICTS = ("fatal", "no_answer", "fail", "pass")


def extras_of(root: Root, run: Run) -> Extras:
    """Read what the page shows beside the run's own records."""
    conversations = run.record.data.get("conversations", ())
    base = run.record.base
    first = () if base is None else (f"# first the base, {base['run_id']}: see its own report",)
    return Extras(
        corpus=_corpus(root, run),
        interviews=tuple(_interviews(run)),
        lineage=tuple(_lineage(root, run)),
        conversations=tuple(str(path) for path in conversations),
        base_commands=first,
    )


# -- data ------------------------------------------------------------------------------------------


def _corpus(root: Root, run: Run) -> Corpus | None:
    """The corpus of a pretraining; with a problem where its manifest cannot be read."""
    path = run.record.data.get("manifest")
    if not isinstance(path, str):
        return None
    section = run.record.experiment.get("data")
    name = str(section.get("corpus", "")) if isinstance(section, dict) else ""
    fingerprint = run.record.fingerprint
    try:
        manifest = load_manifest(root, path)
    except (InputError, StoreError) as error:
        told = str(error).replace(root.url, without_secrets(root.url))
        return Corpus(name, fingerprint, path, problem=told)
    return _told(manifest, path)


def _told(manifest: Manifest, path: str) -> Corpus:
    return Corpus(
        name=manifest.name,
        fingerprint=manifest.fingerprint,
        path=path,
        description=manifest.description,
        built_at=manifest.built_at,
        commit=manifest.code_commit,
        tokenizer=manifest.tokenizer.sha256,
        vocab_size=manifest.tokenizer.vocab_size,
        splits=tuple(
            (name, split.tokens, split.documents, len(split.shards))
            for name, split in manifest.splits.items()
        ),
        dedup_method=manifest.dedup.method,
        dedup_documents=manifest.dedup.documents,
        dedup_bytes=manifest.dedup.text_bytes,
        sources=tuple(map(_source, manifest.sources)),
    )


def _source(entry: SourceEntry) -> Source:
    first, last = entry.steps[0], entry.steps[-1]
    return Source(
        entry.name, entry.licence, entry.url, entry.language, entry.synthetic, entry.note,
        first.documents_in, last.documents_out, last.tokens_out,
    )  # fmt: skip


# -- interviews ------------------------------------------------------------------------------------


def _interviews(run: Run) -> Iterator[Interview]:
    for name in _adapters(run):
        digest = _digest(run, f"adapters/{name}/{_SIDECAR}")
        for held in interviews_of(run, name):
            yield _interview(held.result, digest)


def _interview(result: InterviewResult, digest: str | None) -> Interview:
    answers = tuple(answer for probe in result.probes for answer in _answers(probe))
    return Interview(
        adapter=result.adapter,
        suite=result.suite,
        suite_digest=result.suite_digest,
        score=result.score,
        of_these_weights=result.adapter_digest == digest,
        verdicts={name: sum(a.verdict == name for a in answers) for name in _VERDICTS},
        unanswered_safety=tuple(result.unanswered_safety),
        answers=answers,
    )


def _answers(probe: ProbeResult) -> Iterator[Answer]:
    for a in probe.answers:
        why = "" if a.check is None else f"{a.check}: {a.detail or ''}".rstrip(": ")
        yield Answer(
            probe.title, probe.safety, a.question, a.answer, a.verdict, why, a.sample_index
        )


# -- lineage ---------------------------------------------------------------------------------------


def _lineage(root: Root, run: Run) -> Iterator[Weights]:
    """Base, then adapters: those of the run, or those that other runs made of its model."""
    promoted = list(holders(read_promotions(root)).values())
    base = run.record.base
    if base is not None:
        name, digest = base["run_id"], base["weights_digest"]
        notes = ("frozen while its adapters are trained",)
        yield Weights("base model", name, name, digest, False, notes)
        yield from _adapters_of(run, promoted, here=True)
        return
    own = _model_digest(run)
    yield Weights("base model", run.id, run.id, own, True, ("the run of this page",))
    if own is None:
        return
    for other in scan_runs(root)[0]:
        if other.record.base is not None and other.record.base["weights_digest"] == own:
            yield from _adapters_of(other, promoted, here=False)


def _adapters_of(run: Run, promoted: list[Promotion], *, here: bool) -> Iterator[Weights]:
    for name in _adapters(run):
        digest = _digest(run, f"adapters/{name}/{_SIDECAR}")
        notes = [
            f"promoted: {p.alias}" + (f" (gate overruled: {p.override})" if p.override else "")
            for p in promoted
            if (p.run_id, p.adapter) == (run.id, name)
        ]
        yield Weights("adapter", name, run.id, digest, here, tuple(notes))


def _adapters(run: Run) -> list[str]:
    names = run.root.children(run.path("adapters"))
    return sorted(names, key=lambda name: (len(name), name))  # ep10 comes after ep9


def _model_digest(run: Run) -> str | None:
    """Of the attempt that finished the run, as everywhere; None where no model is published."""
    done = run.finished_by()
    own = None if done is None else _digest(run, f"model/{done}.json")
    return own or _digest(run, f"model/{_SIDECAR}")


def _digest(run: Run, path: str) -> str | None:
    full = run.path(*path.split("/"))
    return read_text(run.root, full, "weights_digest") if run.root.exists(full) else None
