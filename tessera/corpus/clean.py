"""What is done to a text before it counts: normalise, drop exact duplicates, choose its split.

All three are pure functions of the text (and the recipe), so a document is treated the same
whatever else is in the corpus. In particular the evaluation split is *frozen*: adding, removing or
reordering sources never moves a text from one split to the other.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Literal

from tessera.corpus.recipe import NormaliseRecipe

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")

_LINE_ENDS = re.compile(r"\r\n?")
# C0 and C1 controls and DEL, without tab and newline: they are traces of file formats, not text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def replace_surrogates(text: str) -> str:
    """``text`` as valid Unicode: surrogate pairs joined, lone halves replaced by U+FFFD.

    JSON can spell half a character (``"\\ud83d"``); UTF-8, and so a tokenizer, cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def normalise(text: str, how: NormaliseRecipe) -> str:
    """The text that is trained on.

    Always: valid Unicode, and line ends as ``\\n``. By recipe: ``unicode`` (NFC joins a letter and
    its accent; NFKC also folds full-width forms; ``none``), ``strip_control`` (control characters
    other than tab and newline are removed). A text of white space only becomes empty, which drops
    it; leading and trailing space is otherwise kept, because Japanese paragraphs begin with one.
    """
    text = _LINE_ENDS.sub("\n", replace_surrogates(text))
    if how.strip_control:
        text = _CONTROL.sub("", text)
    if how.unicode != "none" and not unicodedata.is_normalized(how.unicode, text):
        text = unicodedata.normalize(how.unicode, text)
    return "" if text.isspace() else text


def text_digest(text: bytes) -> bytes:
    """32 bytes by which two normalised texts (UTF-8) are the same or not."""
    return hashlib.sha256(text).digest()


def in_holdout(key: bytes, *, salt: str, fraction: float) -> bool:
    """Whether the document whose content is ``key`` belongs to the held-out share.

    sha256(salt, 0, key) as a number in [0, 1) is compared to ``fraction``: no state, the same text
    always lands on the same side, and a larger fraction only ever adds to the held-out side.
    """
    digest = hashlib.sha256(salt.encode() + b"\0" + key).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def split_of(text: bytes, *, salt: str, fraction: float) -> Split:
    """The split of one normalised text (UTF-8)."""
    return "eval" if in_holdout(text, salt=salt, fraction=fraction) else "train"
