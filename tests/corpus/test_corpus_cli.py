from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tessera.cli.common import run_command
from tessera.cli.main import tessera
from tessera.corpus.manifest import find_builds
from tessera.storage import Root

Write = Callable[..., Path]
REPOSITORY = Path(__file__).parents[2]


def run(*arguments: str) -> int:
    return run_command(tessera, ("corpus", *arguments))


def test_build_shows_what_was_built(
    write_recipe: Write, root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe()
    assert run("build", str(recipe), "--root", root.url, "--publish") == 0
    out, err = capsys.readouterr()
    for word in ("documents", "bytes/token", "unigram nats", "train", "eval", "CC0-1.0"):
        assert word in out
    assert "small is built: corpora/small/" in out
    assert "\x1b" not in out + err  # no colours outside a terminal
    assert (recipe.parent / "small.manifest.json").is_file()

    assert run("build", str(recipe), "--root", root.url, "--json", "--quiet") == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["reused"] is True
    assert answer["manifest"]["name"] == "small"
    assert err == ""


def test_a_corpus_that_is_there_is_left_as_it_is_if_told_so(
    write_recipe: Write, root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe()
    build = ("build", str(recipe), "--root", root.url, "--quiet")
    assert run(*build, "--unless-built") == 0
    (first,) = find_builds(root, "small")
    with next(recipe.parent.glob("*.jsonl")).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "Something that was not there before."}) + "\n")
    assert run(*build, "--unless-built") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"small is there: {first.path}"
    assert run(*build, "--unless-built", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["reused"], answer["manifest_path"]) == (True, first.path)
    assert find_builds(root, "small") == [first]
    assert run(*build, "--unless-built", "--publish") == 2
    assert run(*build) == 0
    assert len(find_builds(root, "small")) == 2, "other inputs are another corpus"


def test_list(write_recipe: Write, root: Root, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--root", root.url) == 0
    assert "No corpus is built" in capsys.readouterr().out
    run("build", str(write_recipe()), "--root", root.url, "--quiet")
    capsys.readouterr()
    assert run("list", "--root", root.url) == 0
    assert find_builds(root, "small")[0].fingerprint[:12] in capsys.readouterr().out
    assert run("list", "--root", root.url, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "small"
    assert set(row["tokens"]) == {"train", "eval"}


def test_verify_takes_a_name_a_path_or_a_copy(
    write_recipe: Write, root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe()
    run("build", str(recipe), "--root", root.url, "--quiet", "--publish")
    manifest = find_builds(root, "small")[0]
    copy = str(recipe.parent / "small.manifest.json")
    for argument in ("small", f"small@{manifest.fingerprint[:6]}", manifest.path, copy):
        capsys.readouterr()
        assert run("verify", argument, "--root", root.url) == 0
        assert "is sound" in capsys.readouterr().out


def test_verify_prints_every_problem_and_fails(
    write_recipe: Write, root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    run("build", str(write_recipe()), "--root", root.url, "--quiet")
    manifest = find_builds(root, "small")[0]
    for split in manifest.splits.values():
        root.delete(split.shards[0].path)
    capsys.readouterr()
    assert run("verify", "small", "--root", root.url) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "has 2 problems; the first: " in err
    assert run("verify", "small", "--root", root.url, "--json") == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("build", "none.yaml"), "none.yaml cannot be read"),
        (("verify", "none"), "is not built in"),
        (("verify", "corpora/x/manifest.json"), "is not in"),
    ],
)
def test_errors_are_one_sentence(
    root: Root, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert (
        run(*arguments, "--root", root.url, *([] if arguments[0] != "build" else ["--quiet"])) > 1
    )
    err = capsys.readouterr().err
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_the_root_comes_from_the_environment(
    write_recipe: Write,
    root: Root,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TESSERA_ROOT", root.url)
    assert run("build", str(write_recipe()), "--quiet") == 0
    assert find_builds(root, "small")


@pytest.mark.parametrize("command", ["build", "verify", "list"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"tessera corpus {command}" in capsys.readouterr().out


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, tessera.corpus, tessera.cli.corpus\n"
        "print([m for m in ('numpy', 'tokenizers', 'pydantic', 'pyarrow', 'rich', 'fsspec')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
