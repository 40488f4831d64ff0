"""Conversations for instruction tuning, and the one template that turns them into tokens.

A file is JSON Lines, one conversation a line:

    {"id": "en-001", "language": "en",
     "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello."}]}

Rendered, with special tokens placed by id so that no message can forge one:

    <|user|>hi<|endofturn|><|assistant|>hello.<|endofturn|>

The loss counts the assistant's words and the ``<|endofturn|>`` after them (the model must learn to
stop), and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from tessera.corpus.clean import in_holdout, replace_surrogates
from tessera.corpus.tokenizer import Tokenizer
from tessera.errors import InputError
from tessera.storage import canonical_json, sha256_bytes, sha256_file

ROLES = ("user", "assistant")


class Message(TypedDict):
    """One turn: ``role`` is ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A whole exchange: it begins with the user and ends with the assistant."""

    id: str
    language: str
    messages: tuple[Message, ...]


def read_conversations(files: Sequence[Path]) -> list[Conversation]:
    """Every conversation of the files, in order.

    Raises ``InputError`` naming file, line and reason for the first line that is not a
    conversation, and for an id that was used before, in whichever file.
    """
    conversations: list[Conversation] = []
    seen: dict[str, str] = {}
    for path in files:
        try:
            lines = path.read_text("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); expected a UTF-8 file of one conversation a "
                "line."
            ) from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            conversation = _parse(line, place)
            if conversation.id in seen:
                raise InputError(
                    f"{place}: the id {conversation.id!r} was used before ({seen[conversation.id]})"
                    "; give every conversation its own."
                )
            seen[conversation.id] = place
            conversations.append(conversation)
    if not conversations:
        names = ", ".join(map(str, files)) or "no file"
        raise InputError(f"There is no conversation in {names}; expected one a line.")
    return conversations


def messages_problem(messages: Any, *, complete: bool = True) -> str | None:
    """What is wrong with a list of messages, as the end of a sentence, or None.

    ``complete`` asks that the assistant has the last word; otherwise the user must have it, as when
    an answer is to be generated.
    """
    if not isinstance(messages, list | tuple) or not messages:
        return "messages must be a list with at least one message"
    for index, message in enumerate(messages):
        expected = ROLES[index % 2]
        if not isinstance(message, dict) or message.get("role") != expected:
            found = message.get("role") if isinstance(message, dict) else message
            return f"message {index + 1} must have the role {expected!r}, not {found!r}"
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            return f"message {index + 1} ({expected}) must have a content that is not empty"
    last = ROLES[1] if complete else ROLES[0]
    if messages[-1]["role"] != last:
        return f"the last message must be the {last}'s"
    return None


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """``(ids, mask)`` of one conversation, both of the same length.

    ``mask`` is 1 exactly on the assistant's text and the ``<|endofturn|>`` after it. With
    ``add_generation_prompt`` the messages must end with the user's, and ``<|assistant|>`` is
    appended (mask 0). Raises ``InputError`` for messages that do not alternate.
    """
    if problem := messages_problem(list(messages), complete=not add_generation_prompt):
        raise InputError(f"These messages cannot be rendered: {problem}.")
    ids: list[int] = []
    mask: list[int] = []
    for message in messages:
        learned = int(message["role"] == "assistant")
        body = [*tokenizer.encode(message["content"]), tokenizer.end_of_turn_id]
        ids += [tokenizer.assistant_id if learned else tokenizer.user_id, *body]
        mask += [0, *[learned] * len(body)]
    if add_generation_prompt:
        ids.append(tokenizer.assistant_id)
        mask.append(0)
    return ids, mask


def split_holdout(
    conversations: Sequence[Conversation], fraction: float, salt: str
) -> tuple[list[Conversation], list[Conversation]]:
    """``(train, held out)``: chosen by salt and messages alone, so each stays on its side."""
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for conversation in conversations:
        key = canonical_json(
            [[m["role"], replace_surrogates(m["content"])] for m in conversation.messages]
        )
        sides[in_holdout(key, salt=salt, fraction=fraction)].append(conversation)
    return sides


def conversations_digest(files: Sequence[Path]) -> str:
    """Hex digest of the files' contents, in the order given; names do not matter."""
    try:
        return sha256_bytes(canonical_json([sha256_file(path) for path in files]))
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}).") from error


def _parse(line: str, place: str) -> Conversation:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place}: not valid JSON ({error}); correct or remove the line."
        ) from error
    if not isinstance(record, dict):
        raise InputError(f"{place}: expected an object with id, language and messages.")
    for key in ("id", "language"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise InputError(f"{place}: {key} must be a string that is not empty; add it.")
    if problem := messages_problem(record.get("messages")):
        raise InputError(f"{place}: {problem}; correct the line.")
    messages = tuple(Message(role=m["role"], content=m["content"]) for m in record["messages"])
    return Conversation(record["id"], record["language"], messages)
