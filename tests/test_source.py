from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tessera.source import code_commit


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package committed to a repository of its own."""
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "Ada")
        monkeypatch.setenv(f"{name}_EMAIL", "ada@example.org")
    folder = tmp_path / "repository" / "package"
    (folder / "room").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "room" / "module.py").write_text("a = 1\n")
    (folder.parent / "notes.txt").write_text("kept outside of the package\n")
    git(folder, "init", "-q", "..")
    git(folder, "add", "..")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_a_clean_checkout_is_its_commit(package: Path) -> None:
    assert code_commit(package) == git(package, "rev-parse", "HEAD")


def test_what_is_not_code_of_the_package_does_not_make_it_dirty(package: Path) -> None:
    (package.parent / "notes.txt").write_text("changed\n")
    (package.parent / "other.py").write_text("")
    (package / "room" / "module.cpython-311.pyc").write_bytes(b"")
    assert code_commit(package) == git(package, "rev-parse", "HEAD")


@pytest.mark.parametrize("name", ["module.py", "untracked.py"])
def test_changed_and_untracked_code_is_dirty(package: Path, name: str) -> None:
    (package / "room" / name).write_text("a = 2\n")
    assert code_commit(package) == git(package, "rev-parse", "HEAD") + "-dirty"


def test_a_copy_installed_in_somebody_elses_repository_has_no_commit(package: Path) -> None:
    copy = package.parent / "site-packages" / "tessera"
    copy.mkdir(parents=True)
    (copy / "__init__.py").write_text("")
    assert code_commit(copy) is None


def test_no_repository_and_no_git_are_no_commit(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_commit(package) is None
