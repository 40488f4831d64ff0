from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tessera.corpus.tokenizer import SPECIAL_TOKENS, Tokenizer
from tessera.errors import InputError

STEADY = settings(max_examples=200, derandomize=True, deadline=None)
PIECES = st.one_of(
    st.text(max_size=40),
    st.text(st.characters(max_codepoint=0x20), max_size=8),
    st.text(st.characters(min_codepoint=0x3000, max_codepoint=0x9FFF), max_size=20),
    st.text(st.characters(min_codepoint=0x1F300, max_codepoint=0x1FAFF), max_size=8),
    st.sampled_from(
        [*SPECIAL_TOKENS, "\ufeff", "\u200d", "\u0301", "\ufdd0", "\U0010ffff", "\r\n"]
    ),
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)


@STEADY
@given(TEXTS)
@example("👩‍🚀 e\u0301 Ａ　日本語\x00\x7f\x80\ufffd")
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert not set(ids) & set(tokenizer.special_ids())
    assert int(tokenizer.byte_lengths()[ids].sum()) == len(text.encode())


@STEADY
@given(st.lists(TEXTS, max_size=4))
def test_a_batch_is_its_parts(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_text_cannot_forge_a_special_token(tokenizer: Tokenizer, token: str) -> None:
    for text in (token, f"a{token}b", f"\n{token}\n", token * 3, f" {token}"):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_ids())
        assert tokenizer.decode(ids) == text
        # Also after the file was written and read again.
        assert Tokenizer.from_bytes(tokenizer.to_bytes()).encode(text) == ids


def test_training_on_special_spellings_does_not_make_them_special() -> None:
    texts = ["<|user|> <|endoftext|> <|assistant|>" * 50, "words of another kind " * 50]
    trained = Tokenizer.train(texts, vocab_size=270)
    assert not set(trained.encode("<|user|><|endoftext|>")) & {0, 1, 2, 3}


def test_special_ids_come_first(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_ids() == (0, 1, 2, 3)
    assert tokenizer.end_of_text_id == 0
    assert tokenizer.decode([1, *tokenizer.encode("hi"), 3]) == "hi"
    assert tokenizer.decode([1, *tokenizer.encode("hi"), 3], skip_special=False) == (
        "<|user|>hi<|endofturn|>"
    )
    lengths = tokenizer.byte_lengths()
    assert lengths.dtype == np.int64
    assert lengths.shape == (tokenizer.vocab_size,) == (330,)
    assert lengths[:4].tolist() == [0, 0, 0, 0]
    assert lengths[4:].min() == 1


def test_half_characters_count_as_replacement(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83d")) == "a\ufffd"
    assert tokenizer.encode_batch(["\ud83d\ude00"]) == [tokenizer.encode("😀")]


TRAIN = """
import sys
from tessera.corpus.tokenizer import Tokenizer
texts = [f"word{n % 7} other{n % 5} 日本語{n % 3}、漢字。" for n in range(400)]
sys.stdout.write(Tokenizer.train(iter(texts), vocab_size=280).sha256)
"""


def test_training_is_the_same_in_every_process() -> None:
    runs = {
        subprocess.run(
            [sys.executable, "-c", TRAIN],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env={"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel},
        ).stdout
        for seed, parallel in (("0", "true"), ("1", "false"), ("2", "true"))
    }
    assert len(runs) == 1


def test_bytes_are_kept_as_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    spaced = json.dumps(json.loads(tokenizer.to_bytes()), indent=1).encode()
    path.write_bytes(spaced)
    read = Tokenizer.from_file(path)
    assert read.to_bytes() == spaced
    assert read.sha256 != tokenizer.sha256
    assert read.encode("a 日本") == tokenizer.encode("a 日本")


def test_too_little_text_says_what_is_possible() -> None:
    with pytest.raises(InputError, match=r"yields a vocabulary of 26\d entries, and 5000 were"):
        Tokenizer.train(["abc abc abc"], vocab_size=5000)


def changed(tokenizer: Tokenizer, **changes: object) -> bytes:
    return json.dumps({**json.loads(tokenizer.to_bytes()), **changes}).encode()


def test_a_tokenizer_that_cannot_be_used_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "none.json")
    for data in (b"", b"{}", b"\xff", b"[1]", tokenizer.to_bytes()[:-50]):
        with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
            Tokenizer.from_bytes(data)
    with pytest.raises(InputError, match=r"no special token <\|endoftext\|>"):
        Tokenizer.from_bytes(changed(tokenizer, added_tokens=[]))
    with pytest.raises(InputError, match="does not give every text back"):
        Tokenizer.from_bytes(changed(tokenizer, normalizer={"type": "NFKC"}))
    prefixed = {**json.loads(tokenizer.to_bytes())["pre_tokenizer"], "add_prefix_space": True}
    with pytest.raises(InputError, match="does not give every text back"):
        Tokenizer.from_bytes(changed(tokenizer, pre_tokenizer=prefixed))


def test_truncation_written_into_a_file_is_ignored(tokenizer: Tokenizer) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    read = Tokenizer.from_bytes(changed(tokenizer, truncation=truncation))
    assert read.encode("x" * 50) == tokenizer.encode("x" * 50)


def test_it_describes_itself(tokenizer: Tokenizer) -> None:
    described = tokenizer.describe()
    assert described["vocab_size"] == 330
    assert described["merges"] == 330 - 256 - 4
    assert described["special_tokens"]["<|endofturn|>"] == 3
