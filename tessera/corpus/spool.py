"""The local spool of a build: cleaned documents on disk, one file a split, and what was dropped.

Texts are read from their sources once and then used twice, to learn the vocabulary and to be
encoded; a spool keeps memory independent of the size of the corpus. In memory stay only the digest
of every kept document (to find duplicates) and eight bytes of accounting for each.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tessera.corpus.clean import SPLITS, Split, normalise, split_of, text_digest
from tessera.corpus.mixture import in_order
from tessera.corpus.recipe import Recipe
from tessera.corpus.sources import Consumed, Source
from tessera.errors import InputError

# source index, length of the text in bytes, number of the document among all kept
_RECORD = struct.Struct("<IQQ")


class Record(NamedTuple):
    """One kept document: the index of its source, its number among all kept, its UTF-8 text."""

    source: int
    number: int
    text: bytes


@dataclass
class SourceCounts:
    """What happened to one source before tokenisation: documents, and bytes of UTF-8 text."""

    read_documents: int = 0
    read_bytes: int = 0
    clean_documents: int = 0
    clean_bytes: int = 0
    duplicate_documents: int = 0
    duplicate_bytes: int = 0


class Spool:
    """Written once by ``fill``, then read as often as needed."""

    def __init__(self, folder: Path, sources: int) -> None:
        """``folder`` must exist; ``sources`` is how many there are."""
        self._paths: dict[Split, Path] = {split: folder / f"{split}.spool" for split in SPLITS}
        self.counts = [SourceCounts() for _ in range(sources)]
        self.documents: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self.text_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        # Of every dropped duplicate: its source, and the number of the document that it repeats. A
        # duplicate has exactly as many tokens as the original, so it need not be encoded to count.
        self.duplicate_source = array("Q")
        self.duplicate_of = array("Q")

    @property
    def kept(self) -> int:
        """Documents kept, in all splits."""
        return sum(self.documents.values())

    def fill(self, recipe: Recipe, sources: Sequence[Source], consumed: Consumed) -> None:
        """Read, clean, deduplicate and split every document of ``sources``.

        Raises ``InputError`` if nothing is left to train on, or to evaluate on although the recipe
        asks for it.
        """
        first: dict[bytes, int] = {}
        holdout = recipe.holdout
        files = {split: path.open("wb") for split, path in self._paths.items()}
        try:
            for index, document, size in in_order(sources, recipe.interleave, consumed):
                counts = self.counts[index]
                counts.read_documents += 1
                counts.read_bytes += size
                text = normalise(document.text, recipe.normalise).encode()
                if not text:
                    continue
                counts.clean_documents += 1
                counts.clean_bytes += len(text)
                number = self.kept
                if recipe.dedup.exact:
                    original = first.setdefault(text_digest(text), number)
                    if original != number:
                        counts.duplicate_documents += 1
                        counts.duplicate_bytes += len(text)
                        self.duplicate_source.append(index)
                        self.duplicate_of.append(original)
                        continue
                split = split_of(text, salt=holdout.salt, fraction=holdout.fraction)
                files[split].write(_RECORD.pack(index, len(text), number) + text)
                self.documents[split] += 1
                self.text_bytes[split] += len(text)
        finally:
            for file in files.values():
                file.close()
        self._check(recipe)

    def records(self, split: Split) -> Iterator[Record]:
        """The documents of one split, in the order in which they were read."""
        with self._paths[split].open("rb") as file:
            while head := file.read(_RECORD.size):
                source, length, number = _RECORD.unpack(head)
                yield Record(source, number, file.read(length))

    def sample(self, split: Split, limit: int, consumed: Consumed) -> Iterator[str]:
        """Texts of about ``limit`` bytes in all, taken evenly over the whole split.

        Each document is in or out by a hash of its own text, so one more source changes who is
        sampled only through the share that fits. Everything is taken if it fits.
        """
        share = limit / max(self.text_bytes[split], 1)
        for record in self.records(split):
            consumed(len(record.text))
            if share < 1:
                key = hashlib.blake2b(record.text, digest_size=8, person=b"sample").digest()
                if int.from_bytes(key, "big") >= share * 2**64:
                    continue
            yield record.text.decode()

    def _check(self, recipe: Recipe) -> None:
        if not self.documents["train"]:
            raise InputError(
                f"Corpus {recipe.name!r} has no document to train on "
                f"({sum(c.read_documents for c in self.counts)} read); check the sources' text "
                "fields and holdout.fraction."
            )
        if recipe.holdout.fraction and not self.documents["eval"]:
            raise InputError(
                f"None of the {self.kept} documents of corpus {recipe.name!r} fell into the "
                f"evaluation split; raise holdout.fraction (now {recipe.holdout.fraction}) or add "
                "documents."
            )
