from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tessera.corpus.shards import ShardFile, open_shard, pack_ids, write_shard
from tessera.errors import InputError

STEADY = settings(max_examples=60, derandomize=True, deadline=None)
DIGEST = "ab" * 32


def write(path: Path, documents: list[list[int]], vocab_size: int = 65_536) -> ShardFile:
    return write_shard(
        path, documents, end_of_text_id=0, vocab_size=vocab_size, tokenizer_sha256=DIGEST
    )


@STEADY
@given(documents=st.lists(st.lists(st.integers(1, 65_535), max_size=20), max_size=8))
def test_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]
) -> None:
    path = tmp_path_factory.mktemp("shard") / "s.safetensors"
    written = write(path, documents)
    shard = open_shard(path)
    assert (written.tokens, written.documents) == (len(shard.tokens), len(documents))
    assert written.bytes == path.stat().st_size
    assert shard.tokens.dtype == np.uint16
    assert shard.document_starts.dtype == np.int64
    assert shard.tokenizer_sha256 == DIGEST
    ends = [*shard.document_starts[1:].tolist(), len(shard.tokens)][: len(documents)]
    for document, start, end in zip(documents, shard.document_starts, ends, strict=True):
        assert shard.tokens[start:end].tolist() == [*document, 0]


def test_equal_documents_make_equal_bytes(tmp_path: Path) -> None:
    digests = {write(tmp_path / f"{n}", [[1, 2], [3]]).sha256 for n in range(20)}
    assert len(digests) == 1


def test_the_file_is_ordinary_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    write(path, [[1, 2], [3]])
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "tessera-shard-1", "tokenizer_sha256": DIGEST}
        assert file.get_tensor("tokens").tolist() == [1, 2, 0, 3, 0]
        assert file.get_tensor("document_starts").tolist() == [0, 3]


def test_views_are_mapped_and_read_only(tmp_path: Path) -> None:
    write(tmp_path / "s", [[5] * 1000])
    shard = open_shard(tmp_path / "s")
    assert not shard.tokens.flags.owndata
    assert not shard.tokens.flags.writeable


@pytest.mark.parametrize(("ids", "vocab"), [([-1], 10), ([10], 10), ([70_000], 65_536)])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, ids: list[int], vocab: int) -> None:
    with pytest.raises(InputError, match=rf"Token id {ids[0]} does not fit"):
        write(tmp_path / "s", [ids], vocab)
    with pytest.raises(InputError):
        pack_ids(np.array(ids), vocab_size=vocab)


def test_a_torn_shard_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    write(path, [[1, 2, 3]] * 50)
    whole = path.read_bytes()
    for length in {0, 4, 8, 60, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"s\.safetensors"):
            open_shard(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="added to"):
        open_shard(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"tessera-shard-1", b"tessera-shard-2"),
        (b'"U16"', b'"I16"'),
        (b'"shape":[4]', b'"shape":[5]'),
        (b"document_starts", b"document_stirts"),
        (b'{"__metadata__"', b'[{"__metadata__'),
    ],
)
def test_another_header_is_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "s"
    write(path, [[1, 2, 3]])
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(InputError, match="not a tessera-shard-1 file"):
        open_shard(path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        open_shard(tmp_path / "none")
