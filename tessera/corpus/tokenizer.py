"""Byte-level BPE: every text in, the same text out, and special tokens that no text can forge.

Bytes are the alphabet, so English, Japanese, emoji and control characters all round-trip and there
is no unknown token. The four special tokens have the ids 0 to 3. They exist only as ids: ``encode``
treats ``<|user|>`` inside a text as eight ordinary characters, because a document or a visitor must
not be able to end a turn or a document; only our own code places the ids.

The file is Hugging Face's ``tokenizer.json``. Its bytes are kept as they were read, so the digest
of a tokenizer never depends on the library version that happens to load it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as _Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from tessera.corpus.clean import replace_surrogates
from tessera.corpus.recipe import MAX_VOCAB_SIZE
from tessera.errors import InputError
from tessera.storage import sha256_bytes

END_OF_TEXT = "<|endoftext|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END_OF_TURN = "<|endofturn|>"
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT, END_OF_TURN)
"""In the order of their ids, from 0, in every tokenizer trained here."""

# A pair seen once teaches nothing but that one text.
_MIN_FREQUENCY = 2
# What a usable tokenizer must give back unchanged: texts with and without a leading space, line
# ends, what a hidden normalisation would change (e + accent, full-width A), control characters.
_PROBES = ("a b", " a\r\n\te\u0301 \uff21 日本語 🧵\x00\x7f" + "".join(SPECIAL_TOKENS))


class Tokenizer:
    """Text to token ids and back. Immutable; safe to share between threads."""

    def __init__(self, data: bytes, *, origin: str = "the tokenizer") -> None:
        """Read the bytes of a ``tokenizer.json``; ``origin`` names them in errors.

        Raises ``InputError`` unless it is a lossless byte-level BPE with our special tokens.
        """
        try:
            backend = _Backend.from_str(data.decode())
        except Exception as error:  # the library raises bare Exception
            raise InputError(
                f"{origin} is not a tokenizer.json ({' '.join(str(error).split())}); give a file "
                "written by Hugging Face tokenizers."
            ) from error
        backend.no_truncation()
        backend.no_padding()
        # Without this, `<|user|>` in a text would become the special token.
        backend.encode_special_tokens = True
        self._backend = backend
        self._data = data
        self.sha256 = sha256_bytes(data)
        """Hex digest of the file."""
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        """Number of entries; every id is below it."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._check(origin, vocabulary)
        self.end_of_text_id: int = vocabulary[END_OF_TEXT]
        self.user_id: int = vocabulary[USER]
        self.assistant_id: int = vocabulary[ASSISTANT]
        self.end_of_turn_id: int = vocabulary[END_OF_TURN]

    def _check(self, origin: str, vocabulary: dict[str, int]) -> None:
        special = {entry.content for entry in self._added().values() if entry.special}
        for token in SPECIAL_TOKENS:
            if token not in special:
                raise InputError(
                    f"{origin} has no special token {token}; expected {', '.join(SPECIAL_TOKENS)}:"
                    " train one with `tokenizer.train` in a recipe."
                )
        if self.vocab_size > MAX_VOCAB_SIZE or max(vocabulary.values()) >= self.vocab_size:
            raise InputError(
                f"{origin} has {self.vocab_size} entries with ids up to {max(vocabulary.values())};"
                f" expected ids without gaps and at most {MAX_VOCAB_SIZE} entries."
            )
        lossless = all(letter in vocabulary for letter in pre_tokenizers.ByteLevel.alphabet())
        if not lossless or any(self.decode(self.encode(text)) != text for text in _PROBES):
            raise InputError(
                f"{origin} does not give every text back unchanged; expected a byte-level BPE with "
                "all 256 bytes, no normaliser and no prefix space."
            )

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} entries, sha256 {self.sha256[:12]})"

    # -- making ----------------------------------------------------------------------------------

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
        """Learn a vocabulary of exactly ``vocab_size`` entries (4 special, 256 bytes, merges).

        Deterministic: the same texts in any process give the same bytes. Memory grows with the
        number of distinct words; Japanese, written without spaces, has many. Raises ``InputError``
        if the texts yield fewer entries.
        """
        backend = _Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=_MIN_FREQUENCY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(map(replace_surrogates, texts), trainer=trainer)
        reached = backend.get_vocab_size()
        if reached != vocab_size:
            raise InputError(
                f"The text yields a vocabulary of {reached} entries, and {vocab_size} were asked; "
                f"set tokenizer.train.vocab_size to {reached} or less, or add text."
            )
        return cls(backend.to_str().encode())

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Read a local ``tokenizer.json``; ``InputError`` if it cannot be used."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"The tokenizer {path} cannot be read ({error.strerror}); check the path."
            ) from error
        return cls(data, origin=str(path))

    @classmethod
    def from_bytes(cls, data: bytes) -> Tokenizer:
        """Read the bytes of a ``tokenizer.json``; ``InputError`` if they cannot be used."""
        return cls(data)

    def to_bytes(self) -> bytes:
        """The ``tokenizer.json``, byte for byte as it was trained or read."""
        return self._data

    # -- using -----------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; never a special token. Lone surrogates count as U+FFFD."""
        encoding = self._backend.encode(replace_surrogates(text), add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of many texts, on all cores."""
        clean = [replace_surrogates(text) for text in texts]
        # "fast" leaves out the character offsets, which nothing here reads.
        encodings = self._backend.encode_batch_fast(clean, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ``ids``; bytes that are not whole characters become U+FFFD.

        With ``skip_special=False`` special tokens appear by name.
        """
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def special_ids(self) -> tuple[int, int, int, int]:
        """Ids of ``SPECIAL_TOKENS``, in that order."""
        return self.end_of_text_id, self.user_id, self.assistant_id, self.end_of_turn_id

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of UTF-8 text that each id stands for: shape ``(vocab_size,)``, 0 for special ids.

        Summed over the ids of a text this is exactly its size, so a loss in nats a token becomes
        bits a byte without decoding anything.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            lengths[index] = len(token)  # the byte-level alphabet spells each byte as one letter
        for index, entry in self._added().items():
            lengths[index] = 0 if entry.special else len(entry.content.encode())
        return lengths

    def _added(self) -> dict[int, Any]:
        """Tokens matched before the merges, special or not, by id."""
        added: dict[int, Any] = self._backend.get_added_tokens_decoder()
        return added

    def describe(self) -> dict[str, Any]:
        """Kind, size and special tokens, for a record or a model card."""
        model = json.loads(self._data)["model"]
        return {
            "type": f"byte-level {model['type']}",
            "vocab_size": self.vocab_size,
            "merges": len(model["merges"]),
            "special_tokens": dict(zip(SPECIAL_TOKENS, self.special_ids(), strict=True)),
            "sha256": self.sha256,
        }
