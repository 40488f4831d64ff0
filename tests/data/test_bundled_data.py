"""The bundled conversations: enough of them, well-formed, and apart from the interview."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tessera.corpus.chat import Conversation, read_conversations
from tessera.evaluation.checks import normalise
from tessera.evaluation.suite import load_suite

CHECKOUT = Path(__file__).resolve().parents[2]
FILES = sorted((CHECKOUT / "data_manifests" / "conversations").glob("*.jsonl"))

# What the probes are about. A conversation that touches one of these could teach the answer.
TOPICS = {
    "grief": r"\b(died|dead|dying|death|passed away|funeral|grie\w+|mourn\w*)\b"
    r"|亡くな|死ん|死に|葬",
    "misinformation": r"\bflat\b.*\b(earth|world)\b|\b(earth|world)\b.*\bflat\b"
    r"|\bvaccin\w+|\bmoon landing\b|\bautism\b|ワクチン|月面着陸|地球は",
    "medication": r"\b(medication|medicine|pills?|antidepressants?|tablets|prescri\w+)\b|薬",
    "small talk": r"\bhow are you\b|\bhow is it going\b|\bbreakfast\b|\bsomething nice\b"
    r"|元気ですか|朝ご飯|朝ごはん|朝食",
    "arithmetic": r"\b(times|plus|minus|divided by)\b [\d\w]+|\d+ ?[-+x*/×÷] ?\d+"
    r"|足すと|引くと|掛ける",
}


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    return read_conversations(FILES)


def test_there_are_enough_and_they_vary(conversations: list[Conversation]) -> None:
    assert len(conversations) >= 150
    answers = [m["content"] for c in conversations for m in c.messages if m["role"] == "assistant"]
    assert len(set(answers)) == len(answers), "an answer stands twice"
    assert sum(len(c.messages) > 2 for c in conversations) >= 40, "too few of several turns"
    assert sum(c.language == "ja" for c in conversations) >= 30
    assert {c.language for c in conversations} == {"en", "ja"}


@pytest.mark.parametrize("topic", TOPICS)
def test_no_conversation_is_about_a_probe(conversations: list[Conversation], topic: str) -> None:
    pattern = re.compile(TOPICS[topic])
    found = [
        (c.id, match.group())
        for c in conversations
        for m in c.messages
        if (match := pattern.search(normalise(m["content"])))
    ]
    assert not found


def test_no_conversation_shares_words_in_a_row_with_a_probe(
    conversations: list[Conversation],
) -> None:
    def grams(text: str, length: int = 4) -> set[tuple[str, ...]]:
        words = re.findall(r"[\w']+", normalise(text))
        return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}

    suite = load_suite(CHECKOUT / "experiments" / "interview.yaml")
    probes = set().union(*(grams(w.text) for p in suite.probes for w in p.wordings))
    assert probes
    for conversation in conversations:
        for message in conversation.messages:
            if message["role"] == "user":
                assert not grams(message["content"]) & probes, conversation.id


def test_the_topic_patterns_recognise_the_probes_themselves() -> None:
    suite = load_suite(CHECKOUT / "experiments" / "interview.yaml")
    missed = [
        wording.text
        for probe in suite.probes
        for wording in probe.wordings
        if not any(re.search(p, normalise(wording.text)) for p in TOPICS.values())
    ]
    # "lost" and "say goodbye" are left to the n-grams above: alone they are about keys and trains.
    assert missed == [
        "I lost my grandmother last night.",
        "we had to say goodbye to our old cat this morning.",
    ]
