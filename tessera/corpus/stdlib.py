"""The documentation strings of Python's standard library: real prose that every machine has.

They are read from the source files of the running interpreter with ``ast``, never by importing the
modules. Another Python version has other strings, so a corpus made of them has another fingerprint.
"""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tessera.errors import InputError

# Left out before parsing: what is not the library's prose (tests, installed packages, bundled
# wheels, build configuration) and what costs much parsing for little text (generated code tables).
_SKIPPED = frozenset(
    {
        "__pycache__",
        "_bundled",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
TOPICS = "pydoc_data/topics.py"
"""The language reference's topics, as ``help('assert')`` prints them; texts, not docstrings."""

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def library_folder() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def library_files(folder: Path) -> list[Path]:
    """The source files to read below ``folder``, sorted by relative path; topics last.

    Raises ``InputError`` if there is none (a Python without sources).
    """
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [n for n in folders if n not in _SKIPPED and not n.startswith("config-")]
        found += [Path(parent) / name for name in names if name.endswith(".py")]
    found.sort(key=lambda path: path.relative_to(folder).as_posix())
    if not found:
        raise InputError(
            f"No source file of Python's standard library is in {folder}; a source of format "
            "docstrings needs a Python installed with its .py files."
        )
    topics = folder / TOPICS
    return [*found, topics] if topics.is_file() else found


def file_texts(path: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """``(id, text)`` of every documentation string in one file, in the order of the source.

    A file that this interpreter cannot parse (bad syntax kept as an example) gives nothing.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    name = path.relative_to(folder).as_posix()
    if name == TOPICS:
        yield from _topics(tree)
    else:
        yield from _docstrings(tree, name)


def _docstrings(node: _Documented, name: str) -> Iterator[tuple[str, str]]:
    if text := ast.get_docstring(node):
        yield name, text
    # Definitions may stand below `if` and `try`, but not inside expressions: walking the statements
    # alone visits a small part of the tree.
    pending: list[ast.stmt] = list(reversed(node.body))
    while pending:
        statement = pending.pop()
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(statement, f"{name}:{statement.name}")
            continue
        inner: list[ast.stmt] = []
        for block in ("body", "handlers", "orelse", "finalbody"):
            for child in getattr(statement, block, []):
                inner += child.body if isinstance(child, ast.ExceptHandler) else [child]
        pending += reversed(inner)


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(statement.value)
            for topic in sorted(topics):
                yield f"{TOPICS}:{topic}", topics[topic]
