"""The argument RUN, completed by the shell from what this machine remembers or a folder holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, overload

import click
from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])


class RunName(click.ParamType):
    """A run id, its beginning, or the name of an experiment that has one run."""

    name = "run"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Ids that begin so; no network is asked, since the shell waits for this."""
        try:
            names = _known(ctx.params.get("root") or os.environ.get("TESSERA_ROOT") or ".tessera")
        except Exception:  # a completion that fails must not break the command line
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _known(root: str) -> list[str]:
    from tessera.storage import open_root
    from tessera.tracking.memory import remembered

    store = open_root(root)
    if store.is_local:
        return store.children("runs")
    with remembered(store) as memory:
        return sorted(memory.runs())


@overload
def run_argument(function: F) -> F: ...
@overload
def run_argument(**options: Any) -> Callable[[F], F]: ...
def run_argument(function: F | None = None, **options: Any) -> Any:
    """The decorator of the argument ``run``, with or without options."""
    decorate = click.argument("run", type=RunName(), **options)
    return decorate if function is None else decorate(function)
