from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tessera.corpus import stdlib
from tessera.corpus.recipe import SourceRecipe
from tessera.corpus.sources import Document, Source
from tessera.errors import InputError

MakeSource = Callable[..., dict[str, Any]]


@pytest.fixture
def open_source(tmp_path: Path, make_source: MakeSource) -> Callable[..., Source]:
    def open_it(name: str = "s", **changes: Any) -> Source:
        return Source(SourceRecipe.model_validate(make_source(name, **changes)), tmp_path)

    return open_it


OpenSource = Callable[..., Source]


def texts(source: Source) -> list[str]:
    return [document.text for document in source.documents()]


def test_text_files_are_one_document_each_in_the_order_of_names(
    tmp_path: Path, open_source: OpenSource
) -> None:
    (tmp_path / "b.txt").write_text("two", "utf-8")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    source = open_source(format="text", path="*.txt")
    assert list(source.documents()) == [
        Document("a.txt", "one\r\n", "s"),
        Document("b.txt", "two", "s"),
    ]


def test_json_lines_with_gaps_and_compression(tmp_path: Path, open_source: OpenSource) -> None:
    lines = '{"id": 7, "text": "a"}\n\n{"text": "日本"}\n{"id": "x", "text": ""}'
    (tmp_path / "s.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    source = open_source(path="s.jsonl.gz")
    read: list[int] = []
    assert [(d.id, d.text) for d in source.documents(read.append)] == [
        ("7", "a"),
        ("3", "日本"),
        ("x", ""),
    ]
    assert sum(read) == source.size  # bytes as stored, so that a progress bar ends at its end


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"txt": "a"}', "'text'"),
        ('{"text": 3}', "'text'"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, open_source: OpenSource, line: str, reason: str
) -> None:
    (tmp_path / "s.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n', "utf-8")
    with pytest.raises(InputError, match=f"s.jsonl, line 2: .*{reason}"):
        texts(open_source())


def test_parquet_reads_the_named_columns_of_every_row_group(
    tmp_path: Path, open_source: OpenSource
) -> None:
    rows = 1000
    table = pa.table(
        {
            "key": [f"k{n}" for n in range(rows)],
            "body": pa.array([None if n == 5 else f"text {n}" for n in range(rows)]),
            "other": [0.5] * rows,
        }
    )
    pq.write_table(table, tmp_path / "s.parquet", row_group_size=300)
    source = open_source(format="parquet", path="*.parquet", text_field="body", id_field="key")
    read: list[int] = []
    documents = list(source.documents(read.append))
    assert [d.id for d in documents] == [f"k{n}" for n in range(rows)]
    assert documents[5].text == ""
    assert documents[999].text == "text 999"
    assert sum(read) == source.size


def test_parquet_problems_are_sentences(tmp_path: Path, open_source: OpenSource) -> None:
    path = tmp_path / "s.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(InputError, match="holds int64, expected strings"):
        texts(open_source(format="parquet", path=path.name))
    with pytest.raises(InputError, match=r"no column 'words' .* its columns are text"):
        texts(open_source(format="parquet", path=path.name, text_field="words"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"s\.parquet is damaged or of another format"):
        texts(open_source(format="parquet", path=path.name))


def test_what_cannot_be_read_is_named(tmp_path: Path, open_source: OpenSource) -> None:
    with pytest.raises(InputError, match=r"path of source s matches no file: .*none\.jsonl"):
        open_source(path="none.jsonl")
    with pytest.raises(InputError, match="cannot be opened"):
        open_source(path="nonsense://bucket/x.jsonl")
    (tmp_path / "s.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"s\.txt is not UTF-8"):
        texts(open_source(format="text", path="s.txt"))
    (tmp_path / "s.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:-9])
    with pytest.raises(InputError, match="not a whole compressed file"):
        texts(open_source(path="s.jsonl.gz"))
    (tmp_path / "t.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(InputError, match="not a whole compressed file"):
        texts(open_source(path="t.jsonl.gz"))


def test_a_folder_with_glob_characters_is_taken_literally(
    tmp_path: Path, make_source: MakeSource
) -> None:
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    (folder / "s.jsonl").write_text('{"text": "a"}', "utf-8")
    recipe = SourceRecipe.model_validate(make_source("s"))
    assert texts(Source(recipe, folder)) == ["a"]


def test_digests_follow_the_content_not_the_place(tmp_path: Path, open_source: OpenSource) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "same"}', "utf-8")
    first = open_source("a").digest()
    assert open_source("b").digest() == first
    (tmp_path / "b.jsonl").write_text('{"text": "other"}', "utf-8")
    assert open_source("b").digest() != first


def test_sources_of_another_store(open_source: OpenSource) -> None:
    store = fsspec.filesystem("memory")
    store.pipe_file("/corpus-test/s.jsonl", json.dumps({"text": "remote"}).encode())
    source = open_source(path="memory://corpus-test/*.jsonl")
    assert texts(source) == ["remote"]
    first = source.digest()
    store.pipe_file("/corpus-test/s.jsonl", json.dumps({"text": "changed!"}).encode())
    assert open_source(path="memory://corpus-test/*.jsonl").digest() != first


def test_a_hub_that_does_not_answer_is_one_sentence(tmp_path: Path, write_recipe: Any) -> None:
    source = {"name": "s", "format": "parquet", "language": "en", "licence": "CC0-1.0"}
    recipe = write_recipe(sources=[source | {"path": "hf://datasets/someone/texts/*.parquet"}])
    # The library reads its endpoint when it is imported, hence a process of its own.
    done = subprocess.run(
        [sys.executable, "-m", "tessera", "corpus", "build", str(recipe), "--root", str(tmp_path)],
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("\n") == 1
    assert "hf://datasets/someone/texts/*.parquet cannot be reached" in done.stderr


def test_docstrings_are_found_where_python_finds_them(tmp_path: Path) -> None:
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""Not this."""', "utf-8")
    (tmp_path / "broken.py").write_text('"""Not this either."""\ndef (', "utf-8")
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'b': 'B', 'a': 'A'}", "utf-8")
    (tmp_path / "m.py").write_text(
        '"""Module."""\n'
        "if True:\n"
        "    class A:\n"
        '        """Class.\n\n        Indented.\n        """\n'
        '        def f(self):\n            """Method."""\n            def g():\n'
        '                """Inner."""\n'
        "try:\n    pass\nexcept ValueError:\n"
        '    async def h():\n        """Handler."""\n'
        "x = 'not a docstring'\n",
        "utf-8",
    )
    files = stdlib.library_files(tmp_path)
    found = [pair for path in files for pair in stdlib.file_texts(path, tmp_path)]
    assert found == [
        ("m.py", "Module."),
        ("m.py:A", "Class.\n\nIndented."),
        ("m.py:A:f", "Method."),
        ("m.py:A:f:g", "Inner."),
        ("m.py:h", "Handler."),
        ("pydoc_data/topics.py:a", "A"),
        ("pydoc_data/topics.py:b", "B"),
    ]


def test_the_standard_library_has_prose(open_source: OpenSource) -> None:
    source = open_source(format="docstrings", path=None)
    assert len(source.files) > 100
    assert not [name for name in source.files if "/test/" in name or "site-packages" in name]
    assert source.digest() == open_source(format="docstrings", path=None).digest()


def test_a_python_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No source file of Python's standard library"):
        stdlib.library_files(tmp_path)
