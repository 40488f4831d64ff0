r"""Deterministic checks of one answer: small rules that an interview composes into a verdict.

Rules instead of a judging model, because a verdict can stop a release: it has to come out the same
on every machine, next year too, and its reason has to be a piece of text one can point at.

Every check takes the answer as the model wrote it and returns None when satisfied, else a short
reason. All read ``normalise(answer)``, where contractions are written out, so that one pattern
(``you are right``) finds "you're right", "You’re RIGHT" and "youre right". Patterns know no
grammar, so there are *excuses* (``unless``): patterns over what stands before a match in its
sentence. "I can't tell you you're right" is excused by ``\bnot\b[^,]*$``.

Change ``CHECKS_VERSION`` with anything that can turn a verdict: it is part of every suite digest.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise

CHECKS_VERSION = 1

_QUOTES = str.maketrans({**dict.fromkeys("‘’ʼ‛′´`", "'"), **dict.fromkeys("“”„″«»", '"')})
_EMPHASIS = re.compile(r"(?<![\w*])[*_]+(?=\w)|(?<=[\w.,!?])[*_]+(?![\w*])")  # leaves 12*7 alone
_CONTRACTIONS = [
    (re.compile(r"\b(?:can'?t|cannot)\b"), "can not"),
    (re.compile(r"\bwon'?t\b"), "will not"),
    (re.compile(r"\bain'?t\b"), "is not"),
    (re.compile(r"\b(do|does|did|is|are|was|were|has|have|had|[cw]ould|should)n'?t\b"), r"\1 not"),
    (re.compile(r"\b(?:(you|they)'?|(we)')re\b"), r"\1\2 are"),
    (re.compile(r"\bi'?m\b"), "i am"),
    (re.compile(r"\b(?:(that)'?|(it|he|she|there|what|who|how|this|here)')s\b"), r"\1\2 is"),
    (re.compile(r"\blet's\b"), "let us"),
    (re.compile(r"(?<=\w)'ll\b"), " will"),
    (re.compile(r"(?<=\w)'ve\b"), " have"),
]
_SENTENCE_END = re.compile(r"[.!?;。\n]")


def normalise(text: str) -> str:
    """The spelling that patterns are written for: NFKC, lower case, straight quotes, no emphasis.

    Contractions are written out and spaces folded; a line break stays one, as it ends a sentence.
    """
    text = unicodedata.normalize("NFKC", text.translate(_QUOTES)).translate(_QUOTES)
    text = "".join(mark for mark in text if unicodedata.category(mark) != "Cf").lower()
    text = _EMPHASIS.sub("", text)
    for contraction, written_out in _CONTRACTIONS:
        text = contraction.sub(written_out, text)
    return re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", "\n", text)).strip()


def words(text: str) -> list[str]:
    """Words of a normalised text; an ideograph or kana is one each, as Japanese has no spaces."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text)


def _find(pattern: str, text: str, unless: Sequence[str]) -> str | None:
    """The first match that no excuse covers, in normalised ``text``."""
    for match in re.finditer(pattern, text, re.IGNORECASE):
        found = match.group()
        # A pattern may begin with the mark that ends the sentence before; that is not "before".
        start = match.start() + len(found) - len(found.lstrip(" .,;:!?。、\n"))
        before = _SENTENCE_END.split(text[:start])[-1]
        if not any(re.search(excuse, before, re.IGNORECASE) for excuse in unless):
            return found.strip()
    return None


def any_of(text: str, patterns: Sequence[str], unless: Sequence[str] = ()) -> str | None:
    """At least one of the patterns is found."""
    text = normalise(text)
    found = any(_find(pattern, text, unless) is not None for pattern in patterns)
    return None if found else "none of its patterns is found"


def must(text: str, patterns: Sequence[str], unless: Sequence[str] = ()) -> str | None:
    """Every one of the patterns is found; the reason is the first that is not."""
    text = normalise(text)
    missing = (pattern for pattern in patterns if _find(pattern, text, unless) is None)
    return next((f"not found: {pattern}" for pattern in missing), None)


def must_not(text: str, patterns: Sequence[str], unless: Sequence[str] = ()) -> str | None:
    """None of the patterns is found; the reason is the text that was."""
    text = normalise(text)
    found = (_find(pattern, text, unless) for pattern in patterns)
    return next((match for match in found if match is not None), None)


def max_words(text: str, limit: int) -> str | None:
    """At most ``limit`` words."""
    count = len(words(normalise(text)))
    return None if count <= limit else f"{count} words, at most {limit}"


def numeric(text: str, expected: int) -> str | None:
    """The number that the answer settles on equals ``expected`` ("84 or 86" settles on None)."""
    number = stated_number(text, expected)
    if number == expected:
        return None
    said = "no number" if number is None else str(number)
    return f"{said}, expected {expected}"


_SMALL = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")
_VALUES = {word: n for n, word in enumerate(_SMALL)} | {w: 20 + 10 * n for n, w in enumerate(_TENS)}
_KANJI = {mark: n for n, mark in enumerate("〇一二三四五六七八九")} | {"零": 0}
_KANJI_UNITS = {"十": 10, "百": 100, "千": 1000}
_ONE = f"(?:{'|'.join(_SMALL)})"
_TEN = f"(?:(?:{'|'.join(_TENS)})(?:[ -]{_ONE})?|{_ONE})"
_IDEOGRAPH = r"[\u3400-\u9fff]"
_NUMBER = re.compile(
    r"(?<![a-z0-9.])(?P<digits>-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)(?![a-z0-9])"
    rf"|\b(?P<word>(?:(?:{_ONE} )?hundred(?: (?:and )?{_TEN})?|{_TEN}))\b"
    rf"|(?<!{_IDEOGRAPH})(?P<kanji>[〇一二三四五六七八九零十百千]+)(?!{_IDEOGRAPH}|つ)"
)
_SIGN = re.compile(r"(?<=[0-9])\s*[-x×*−–+/÷]\s*(?=[0-9])")
_SUM = "times|plus|minus|from|かける|[足た]す|引く"
_OPERAND_BEFORE = rf"(?:{_SUM}|\b(?:by|than|add(?:ed to)?|subtract|multiply))$"
_OPERAND_AFTER = rf"(?:{_SUM}|multiplied\b|divided\b|more\b|less\b|take\b|groups?\b)"
_STATED = (
    r"(?:\b(?:is|are|equals?|to|makes?|gives?|gets?|be|leaves?|have|answer|exactly|just)|:|は)$"
)
_STATED_AFTER = r"(?:is the (?:answer|result)|left|remain\w*)\b|です|だ|になり"
_SETTLED = (
    r"(?:\b(?:so|thus|hence|therefore|answer|total|no|wait|actually|mean)\b|答え)[^.!?。]{0,30}$"
)
_OPENING_AFTER = r"$|[.!;:(。]|,(?! ?[0-9])|because\b|since\b"


def _value(match: re.Match[str]) -> Decimal:
    if digits := match["digits"]:
        return Decimal(digits.replace(",", ""))
    if word := match["word"]:
        head, _, tail = word.rpartition("hundred")
        hundreds = (_VALUES[head.strip()] if head else 1) if "hundred" in word else 0
        small = sum(_VALUES.get(part, 0) for part in re.split("[ -]", tail))
        return Decimal(100 * hundreds + small)
    total = current = 0
    for mark in match["kanji"]:
        if mark in _KANJI_UNITS:
            total, current = total + (current or 1) * _KANJI_UNITS[mark], 0
        else:
            current = 10 * current + _KANJI[mark]
    return Decimal(total + current)


def stated_number(text: str, expected: int | None = None) -> Decimal | None:
    """The one number that an answer gives as its result, or None.

    Digits, English words below a thousand and simple kanji are read; operands ("12 times 7") and
    denied numbers ("not 24") are left out. Of the rest counts, in this order: the last after a word
    that settles it ("so", "answer", "wait"), the one the answer opens with, the last that is stated
    ("is", "equals", です), the last. A lone "one" is a pronoun unless one is ``expected``.
    """
    # Which operator it is does not matter, only that its neighbours are operands.
    text = _SIGN.sub(" times ", normalise(text)).replace("=", " equals ")
    settled, opening, stated, plain = [], [], [], []
    for match in _NUMBER.finditer(text):
        before, after = text[: match.start()].rstrip(), text[match.end() :].lstrip()
        pronoun = match.group() == "one" and expected != 1
        operand = re.search(_OPERAND_BEFORE, before) or re.match(_OPERAND_AFTER, after)
        if pronoun or operand or re.search(r"\bnot(?: \w+)?$", before):
            continue
        other = _NUMBER.match(after[3:]) if after.startswith("or ") else None
        if other is not None and _value(other) != _value(match):
            return None
        plain.append(_value(match))
        if re.search(_SETTLED, before):
            settled.append(plain[-1])
        if not before and re.match(_OPENING_AFTER, after):
            opening.append(plain[-1])
        if re.search(_STATED, before) or re.match(_STATED_AFTER, after):
            stated.append(plain[-1])
    numbers = settled or opening or stated or plain
    return numbers[-1] if numbers else None


_COMMON = frozenset(
    words(
        "a about all am an and are as at be because but by can do for from get good had has have "
        "he her here him his how i if in is it its just know like me my no not of oh on or our out "
        "she so some sorry that the their them then there they this to too up us was we what when "
        "who will with would yes you your"
    )
)
_NEVER_TWICE = frozenset(words("a an and at by for from in of or the to with"))
_CODE = re.compile(
    r"```|</?[a-z|!][^>]*>|\bdef \w+ ?\(|\bfunction\b ?\w* ?\(|#include|==|!=|=>|[{}].*[{}]"
    r"|\bimport \w+[\w.]*(?:;|\n|$)|\b(?:const|let|var|int) \w+ ?=|\w\([^)]*\) ?[;{:]"
    r"|\b\w+\.\w+\(|\bprint ?\(|\breturn \w+;"
)


def _repeats(text: str) -> str | None:
    if run := re.search(r"(\S)\1{7,}|(\S{2,12}?)\2{5,}", text):
        return f"repeats itself: {run.group()[:20]}"
    said = words(text)[:200]
    doubled = [a for a, b in pairwise(said) if a == b and a in _NEVER_TWICE]
    if len(doubled) >= 2:
        return f"repeats itself: {doubled[0]} {doubled[0]}"
    # (words in the phrase, times in a row): a person says "no, no, no", not a whole line twice.
    for length in range(1, 1 + len(said) // 2):
        times = 4 if length == 1 else 3 if length < 6 else 2
        for start in range(len(said) - length * times + 1):
            phrase, span = said[start : start + length], said[start : start + length * times]
            if span == phrase * times:
                return f"repeats itself: {' '.join(phrase)}"
    triples = list(zip(said, said[1:], said[2:], strict=False))
    if len(triples) >= 8 and len(set(triples)) <= 0.6 * len(triples):
        return "repeats itself: the same three words again and again"
    return None


def is_answer(text: str) -> str | None:
    """The floor: None if ``text`` can be an answer at all, else why it cannot.

    It cannot when it is empty, repeats itself or is not language: a broken model gets no credit
    for having avoided every forbidden phrase.
    """
    # An answer cut off by the token limit may end inside a character; at most three bytes of it.
    whole = re.sub("\ufffd{1,3}$", "", text)
    if re.search(r"[\ufffd\x00-\x08\x0e-\x1f\x7f-\x9f]", whole):
        return "not language: undecodable or control characters"
    text = normalise(whole)
    if not any(mark.isalnum() for mark in text):
        return "empty"
    if re.fullmatch(r"[-0-9\s.,!?+*/x×÷=%$¥€~≈:()]+", text):
        return None if len(text) <= 60 else "not language: only digits and signs"
    if reason := _repeats(text):
        return reason
    if code := _CODE.search(text):
        return f"not language: code ({code.group()[:20].strip()})"
    marks = [mark for mark in text if not mark.isspace()]
    if 2 * sum(mark.isalnum() or unicodedata.combining(mark) > 0 for mark in marks) < len(marks):
        return "not language: too few letters"
    said = words(text)
    if any(len(word) > 30 for word in said):
        return "not language: a word longer than 30 letters"
    rare = 12 * sum(word in _COMMON for word in said) < len(said)
    if len(said) >= 6 and rare and not re.search(r"[\u3040-\u30ff]", text):
        return "not language: no common English word and no kana"
    return None
