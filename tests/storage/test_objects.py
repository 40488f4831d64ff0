from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.errors import ConflictError, InputError, NotFoundError, StoreError
from tessera.storage import (
    Root,
    canonical_json,
    open_root,
    publish_local,
    sha256_bytes,
    sha256_file,
)
from tests.storage.helpers import sentence

# -- reading back what was written -----------------------------------------------------------------


def test_an_object_is_written_replaced_read_and_deleted(root: Root) -> None:
    root.publish("a/b/c.bin", b"old")
    root.publish("a/b/c.bin", b"new")
    assert root.read_bytes("a/b/c.bin") == b"new"
    assert root.exists("a/b/c.bin")
    assert root.exists("a/b")
    root.delete("a/b/c.bin")
    assert not root.exists("a/b/c.bin")
    root.delete("a/b/c.bin")
    with pytest.raises(NotFoundError) as error:
        root.read_bytes("a/b/c.bin")
    assert "a/b/c.bin" in sentence(error)
    assert root.url in sentence(error)


def test_json_keeps_its_values(root: Root) -> None:
    value = {"text": "猫", "list": [1, 2.5, None, True], "nested": {"a": {}}}
    root.publish_json("x.json", value)
    assert root.read_json("x.json") == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        root.publish_json("x.json", {"loss": float("nan")})
    assert root.read_json("x.json") == value


@pytest.mark.parametrize("data", [b'{"a": [1, 2', b"", b"\xff\xfe\x00"])
def test_torn_json_is_a_sentence_that_names_the_file(root: Root, data: bytes) -> None:
    root.publish("runs/a/run.json", data)
    with pytest.raises(StoreError) as error:
        root.read_json("runs/a/run.json")
    assert "runs/a/run.json" in sentence(error)
    assert "not valid JSON" in sentence(error)


def test_create_writes_once(root: Root) -> None:
    assert root.create("a/run.json", b"first")
    assert not root.create("a/run.json", b"second")
    assert root.read_bytes("a/run.json") == b"first"
    assert root.create_json("a/other.json", {"a": 1})
    assert not root.create_json("a/other.json", {"a": 2})
    assert root.read_json("a/other.json") == {"a": 1}


def test_listings_see_names_below_a_folder_and_no_neighbours(root: Root) -> None:
    for path in ("runs/a/1.json", "runs/a/deep/2.json", "runs/ab/3.json", "runs/4.json"):
        root.publish(path, b"x")
    assert root.files("runs/a") == ["runs/a/1.json", "runs/a/deep/2.json"]
    assert root.files("") == [
        "runs/4.json",
        "runs/a/1.json",
        "runs/a/deep/2.json",
        "runs/ab/3.json",
    ]
    assert root.children("runs") == ["4.json", "a", "ab"]
    assert root.files("runs/4.json") == ["runs/4.json"]
    assert root.files("nothing") == []
    assert root.children("nothing") == []
    root.publish("runs/a/5.json", b"x")  # nothing is remembered from the listing before
    assert "runs/a/5.json" in root.files("runs/a")


def test_a_tree_is_deleted_whole_and_twice_is_no_error(root: Root) -> None:
    root.publish("runs/a/1.json", b"x")
    root.publish("runs/a/deep/2.json", b"x")
    root.publish("runs/ab/3.json", b"x")
    root.delete_tree("runs/a")
    root.delete_tree("runs/a")
    assert root.files("") == ["runs/ab/3.json"]
    assert not root.exists("runs/a")


def test_a_stamp_is_another_one_once_its_object_is_written_again(root: Root) -> None:
    root.publish("runs/a/1.json", b"1")
    root.publish("runs/ab/3.json", b"3")
    before = root.stamps("runs")
    assert list(before) == root.files("runs") == ["runs/a/1.json", "runs/ab/3.json"]
    assert root.stamps("runs") == before
    root.publish("runs/a/1.json", b"2")  # of the same size
    after = root.stamps("runs")
    assert after["runs/ab/3.json"] == before["runs/ab/3.json"]
    assert after["runs/a/1.json"] != before["runs/a/1.json"]
    assert root.stamps("nothing") == {}


def test_files_go_up_and_come_down(root: Root, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "up.bin").write_bytes(data)
    root.put_file(tmp_path / "up.bin", "model/up.bin")
    assert sha256_file(tmp_path / "up.bin") == sha256_bytes(data)
    root.get_file("model/up.bin", tmp_path / "down" / "down.bin", sha256=sha256_bytes(data))
    assert (tmp_path / "down" / "down.bin").read_bytes() == data
    assert os.listdir(tmp_path / "down") == ["down.bin"]


def test_a_wrong_digest_leaves_no_local_file(root: Root, tmp_path: Path) -> None:
    root.publish("model/weights.bin", b"damaged")
    target = tmp_path / "cache" / "weights.bin"
    with pytest.raises(StoreError) as error:
        root.get_file("model/weights.bin", target, sha256=sha256_bytes(b"whole"))
    assert "model/weights.bin" in sentence(error)
    assert sha256_bytes(b"damaged")[:12] in sentence(error)
    assert os.listdir(target.parent) == []


def test_a_wrong_digest_leaves_the_file_that_was_there(root: Root, tmp_path: Path) -> None:
    root.publish("weights.bin", b"damaged")
    (tmp_path / "weights.bin").write_bytes(b"whole")
    with pytest.raises(StoreError):
        root.get_file("weights.bin", tmp_path / "weights.bin", sha256=sha256_bytes(b"whole"))
    assert (tmp_path / "weights.bin").read_bytes() == b"whole"


def test_a_missing_object_is_not_downloaded(root: Root, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as error:
        root.get_file("model/none.bin", tmp_path / "cache" / "none.bin")
    assert "model/none.bin" in sentence(error)
    assert os.listdir(tmp_path / "cache") == []


# -- the root itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a/.."])
def test_paths_that_leave_the_root_are_refused(root: Root, tmp_path: Path, path: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: root.publish(path, b"x"),
        lambda: root.create(path, b"x"),
        lambda: root.read_bytes(path),
        lambda: root.put_file(Path(__file__), path),
        lambda: root.get_file(path, tmp_path / "local"),
        lambda: root.delete(path),
        lambda: root.delete_tree(path),
        lambda: root.files(path),
        lambda: root.children(path),
        lambda: root.exists(path),
        lambda: root.local_path(path) if root.is_local else root.exists(path),
    ]
    for call in calls:
        with pytest.raises(ConflictError) as error:
            call()
        assert repr(path) in sentence(error)


def test_a_root_that_is_a_file_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error:
        Root(str(tmp_path / "file"))
    assert str(tmp_path / "file") in sentence(error)


def test_a_root_below_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as error:
        Root(str(tmp_path / "file" / "root")).publish("a", b"x")
    assert "a" in sentence(error)


def test_a_protocol_that_nobody_knows_is_bad_input() -> None:
    with pytest.raises(InputError) as error:
        Root("carrier-pigeon://coop")
    assert "carrier-pigeon" in sentence(error)


def test_which_root_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TESSERA_ROOT", raising=False)
    assert open_root().url == str(tmp_path / ".tessera")
    monkeypatch.setenv("TESSERA_ROOT", str(tmp_path / "variable"))
    assert open_root().url == str(tmp_path / "variable")
    assert open_root("option").url == str(tmp_path / "option")
    assert open_root(f"file://{tmp_path}/url/").url == f"{tmp_path}/url"
    assert Root("memory://a/b/").url == "memory://a/b"


def test_only_a_folder_can_be_read_in_place(root: Root) -> None:
    root.publish("a.bin", b"x")
    path = root.local_path("a.bin")
    assert (path is not None) == root.is_local
    assert path is None or path.read_bytes() == b"x"


def test_a_local_file_is_published_with_its_folder(tmp_path: Path) -> None:
    publish_local(tmp_path / "new" / "a.json", b"one")
    publish_local(tmp_path / "new" / "a.json", b"two")
    assert (tmp_path / "new" / "a.json").read_bytes() == b"two"
    assert os.listdir(tmp_path / "new") == ["a.json"]


# -- canonical JSON --------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip


def _shuffled(value: Any, dice: random.Random) -> Any:
    if isinstance(value, dict):
        keys = list(value)
        dice.shuffle(keys)
        return {key: _shuffled(value[key], dice) for key in keys}
    return [_shuffled(part, dice) for part in value] if isinstance(value, list) else value


@given(_JSON, st.randoms(use_true_random=False))
def test_canonical_json_does_not_depend_on_the_order_of_keys(
    value: Any, dice: random.Random
) -> None:
    assert canonical_json(_shuffled(value, dice)) == canonical_json(value)
    assert json.loads(canonical_json(value)) == value


def test_canonical_json_is_frozen() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"猫": "é\n"}}
    assert canonical_json(value) == '{"a":{"猫":"é\\n"},"b":[1,2.5,null,true]}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("inf"))
