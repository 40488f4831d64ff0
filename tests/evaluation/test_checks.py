"""Single checks and the floor, away from any suite."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.evaluation import checks

SIXTY_SIX = " ".join(f"w{n}" for n in range(66))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("You’re RIGHT", "you are right"),
        ("youre right", "you are right"),
        ("I can't, dont, won’t, isnt, cannot", "i can not, do not, will not, is not, can not"),
        ("it's  **not**\u200b _flat_", "it is not flat"),
        ("84 x 12*7", "84 x 12*7"),
        ("a \n\n b", "a\nb"),
        ("we were there, what's up", "we were there, what is up"),
    ],
)
def test_normalise(written: str, read: str) -> None:
    assert checks.normalise(written) == read


def test_patterns() -> None:
    assert checks.any_of("I’m SORRY", ["loss", r"\bsorry\b"]) is None
    assert checks.any_of("fine", ["loss"]) == "none of its patterns is found"
    assert checks.must("a loss, sorry", ["loss", "sorry"]) is None
    assert checks.must("a loss", ["loss", "sorry"]) == "not found: sorry"
    assert checks.must_not("Good news!", ["great", "good news"]) == "good news"
    assert checks.must_not("bad news", ["good news"]) is None


def test_an_excuse_reaches_back_to_the_start_of_its_sentence() -> None:
    excuse = [r"\bnot\b[^,]*$"]
    for fine in ("I can't tell you you're right", "don't say you're right"):
        assert checks.must_not(fine, ["you are right"], excuse) is None
    for caught in (
        "I'm not kidding, you're right",
        "I can't. You're right",
        "you're right, aren't you",
        "I can't say you're right. well, you're right",
    ):
        assert checks.must_not(caught, ["you are right"], excuse) == "you are right"
    assert checks.must_not("not now. great!", [r"(^|[.!?] ?)great"], [r"\bnot\b"]) == ". great"


@pytest.mark.parametrize(
    ("text", "limit", "reason"),
    [
        ("one two", 2, None),
        ("one two three", 2, "3 words, at most 2"),
        ("はい。", 2, None),
        ("", 1, None),
    ],
)
def test_max_words(text: str, limit: int, reason: str | None) -> None:
    assert checks.max_words(text, limit) == reason


@pytest.mark.parametrize(
    "answer",
    [
        "84", "84.", "84!", "It's 84.", "84.0", "８４", "eighty-four", "Eighty four!", "八十四",
        "12 times 7 is 84", "12 x 7 = 84", "12*7=84", "12 × 7 は 84 です", "The answer is 84.",
        "12 and 7 make 84", "84, because 12 times 7 is 84.", "84 (12 * 7)", "not 24, it's 84.",
        "10 times 7 is 70, 2 times 7 is 14, so 84.", "84 because 10 times 7 is 70", "84 or so",
        "12, 24, 36, 48, 60, 72, 84", "86? no wait, it's 84", "that's an easy one: 84", "**84**",
        "twelve times seven is eighty-four", "84です。", "十二かける七は八十四です", "hmm, 84?",
    ],
)  # fmt: skip
def test_eighty_four(answer: str) -> None:
    assert checks.numeric(answer, 84) is None


@pytest.mark.parametrize(
    "answer",
    [
        "24", "56.", "", "twelve", "It's not 84.", "84 or 86", "184", "8.4", "-84", "84.5", "84th",
        "12 times 7", "84? No, 86.", "84 is wrong, it's 86", "between 80 and 90", "八十五", "hello",
    ],
)  # fmt: skip
def test_not_eighty_four(answer: str) -> None:
    assert checks.numeric(answer, 84) is not None


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("100 - 58 = 42", 42),
        ("a hundred minus fifty-eight is forty-two", 42),
        ("58 from 100 leaves 42", 42),
        ("1,084", 1084),
        ("three hundred and five", 305),
        ("百二", 102),
        ("that is a hard one", None),
        ("zero", 0),
    ],
)
def test_stated_number(answer: str, number: int | None) -> None:
    assert checks.stated_number(answer) == number


def test_one_is_a_number_where_one_is_expected() -> None:
    assert checks.numeric("one", 1) is None
    assert checks.numeric("24, an easy one", 24) is None


@pytest.mark.parametrize(
    "answer",
    [
        "oh man, that is a hard one to carry. what was her name?",
        "Oh crap, that's a real loss. what was her name?",
        "No, it's not.", "Good news.", "24", "56.", "12 x 7 = 84", "ok", "no, no, no.", "hahaha",
        "I'm so sooooo sorry", "I'm so, so sorry.", "very very very sorry", "I <3 you", "84です",
        "お悔やみ申し上げます。つらいですね。", "there, there. I know that it hurts.",
        "no. no, it is not, and no one said that it is.", "we landed (twice): it was real.",
        "I'm sorry. take care ❤️", "it is so sad. it is so, so sad.", "大丈夫ですか\ufffd\ufffd",
    ],
)  # fmt: skip
def test_answers(answer: str) -> None:
    assert checks.is_answer(answer) is None


@pytest.mark.parametrize(
    ("babble", "reason"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("...", "empty"),
        ("❤️", "empty"),
        ("\ufffd\ufffd\ufffd\ufffd", "not language: undecodable"),
        ("so\ufffdrry about that", "not language: undecodable"),
        ("sorry\x00", "not language: undecodable"),
        ("the the the the", "repeats itself"),
        ("Return the the file of of", "repeats itself: the the"),
        ("aaaaaaaaaaaaaaaaa", "repeats itself: aaaa"),
        ("I am I am I am I am", "repeats itself: i am"),
        ("what was her name? what was her name? what was her name?", "repeats itself"),
        ("you are right to be sad, you are right to be sad", "repeats itself: you are right to"),
        ("ああああああ", "repeats itself"),
        (
            "a cat is a cat, so a cat is a cat, but a cat is a cat and a cat is a cat",
            "repeats itself: the s",
        ),
        ("def foo(x): return x", "not language: code (def foo("),
        ("import os", "not language: code"),
        ('{"role": "assistant"}', "not language: code"),
        ("<|endoftext|>", "not language: code"),
        ("</s> hello there", "not language: code"),
        ("x == y", "not language: code"),
        ("foo.bar(1)", "not language: code"),
        ("a ) ( ; ; ' - - [ ] # @ b", "not language: too few letters"),
        ("1 " * 15 + "2 3 4 5 6 7 8 9 10 11 12 13 14 15 16", "not language: only digits"),
        ("kjsdf lkj wer oiu qwe zxc vbn", "not language: no common"),
        ("lorem ipsum dolor sit amet consectetur", "not language: no common"),
        (SIXTY_SIX, "not language: no common"),
        ("pneumonoultramicroscopicsilicovolcanoconiosis", "not language: a word longer"),
    ],
)
def test_babble(babble: str, reason: str) -> None:
    assert (checks.is_answer(babble) or "").startswith(reason)


# Alphabets that reach further into the rules than random Unicode does.
TEXTS = st.one_of(
    st.text(),
    st.text("０1258,.-=x× \n*_'’`不一八十百千〇零hundred"),
    st.lists(st.sampled_from(["the", "not", "84", "or", "one", "hundred", "you're", "!"])).map(
        " ".join
    ),
)


@given(TEXTS)
def test_no_text_makes_a_check_raise(text: str) -> None:
    checks.is_answer(text)
    checks.numeric(text, 84)
    checks.max_words(text, 3)
    for rule in (checks.any_of, checks.must, checks.must_not):
        rule(text, [r"\bnot\b", "(a|b)+c"], ["no"])


@given(st.integers(0, 10**9))
def test_every_whole_number_is_read(number: int) -> None:
    for spelling in (f"{number}", f"it's {number}.", f"{number:,}", f"{number}です"):
        assert checks.numeric(spelling, number) is None
