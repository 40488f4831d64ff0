"""``tessera corpus``: build a corpus from a recipe, check one, list what is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tessera.cli.common import epilog, json_option, place_named, print_json, root_option

if TYPE_CHECKING:
    from tessera.corpus.manifest import Manifest
    from tessera.storage import Root


@click.group(
    epilog=epilog(
        "tessera corpus build data_manifests/sample.yaml",
        "tessera corpus verify sample",
    )
)
def corpus() -> None:
    """Turn text with a licence into token shards with a digest."""


@corpus.command(
    epilog=epilog(
        "tessera corpus build data_manifests/sample.yaml",
        "tessera corpus build data_manifests/sample.yaml --root s3://bucket/tessera --publish",
    )
)
@click.argument("recipe", type=click.Path(path_type=Path))
@root_option
@click.option("--publish", is_flag=True, help="Also write <name>.manifest.json beside the recipe.")
@click.option(
    "--unless-built", is_flag=True,
    help="Leave it at a corpus of that name that is there, even if other inputs made it.",
)  # fmt: skip
@json_option
@click.option("--quiet", is_flag=True, help="No progress.")
def build(
    recipe: Path, root: str, publish: bool, unless_built: bool, as_json: bool, quiet: bool
) -> None:
    """Build the corpus of RECIPE in the root; the same inputs are built once.

    Sources are read, normalised, deduplicated and split, a tokenizer is trained (or reused), and
    the tokens are published with a manifest. If it is interrupted, start it again.
    """
    from contextlib import nullcontext

    from tessera.cli._corpus_view import progress_view, show_manifest
    from tessera.corpus.build import build as build_corpus
    from tessera.corpus.manifest import find_builds
    from tessera.corpus.recipe import load_recipe
    from tessera.errors import InputError
    from tessera.storage import open_root

    if unless_built and publish:
        raise InputError("--publish copies the manifest of these inputs; leave out --unless-built.")
    if unless_built and (there := find_builds(open_root(root), load_recipe(recipe).name)):
        if as_json:
            manifest = there[-1].model_dump(mode="json")
            print_json({"reused": True, "manifest_path": there[-1].path, "manifest": manifest})
        else:
            click.echo(f"{there[-1].name} is there: {there[-1].path}")
        return
    view = nullcontext(None) if quiet else progress_view()
    with view as progress:
        result = build_corpus(
            recipe,
            open_root(root),
            publish_dir=recipe.absolute().parent if publish else None,
            progress=progress,
        )
    if as_json:
        print_json(
            {
                "reused": result.reused,
                "manifest_path": result.manifest_path,
                "manifest": result.manifest.model_dump(mode="json"),
            }
        )
        return
    show_manifest(result.manifest)
    done = "already built from the same inputs" if result.reused else "built"
    click.echo(f"{result.manifest.name} is {done}: {result.manifest_path}")
    if publish:
        click.echo(f"Published {recipe.parent / result.manifest.name}.manifest.json; commit it.")


@corpus.command(
    epilog=epilog(
        "tessera corpus verify sample",
        "tessera corpus verify data_manifests/sample.manifest.json --root s3://bucket/tessera",
    )
)
@click.argument("manifest")
@root_option
@json_option
def verify(manifest: str, root: str, as_json: bool) -> None:
    """Measure again everything that MANIFEST states, and name what differs.

    MANIFEST is a path in the root, a local file (a published copy), or the name of a corpus (with
    @ and the first digits of a fingerprint if there are several). Exit code 2 if anything is wrong.
    """
    from tessera.corpus.verify import verify_manifest
    from tessera.errors import InputError
    from tessera.storage import open_root

    store = open_root(root)
    found = _find_manifest(store, manifest)
    problems = verify_manifest(store, found)
    if as_json:
        print_json({"manifest": found.path, "problems": problems})
    elif problems:
        for problem in problems:
            click.echo(problem)
    else:
        shards = sum(len(split.shards) for split in found.splits.values())
        tokens = sum(split.tokens for split in found.splits.values())
        click.echo(
            f"{found.path} is sound: the tokenizer and {shards} shards with {tokens:,} tokens are "
            "what it says."
        )
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise InputError(f"{found.path} has {count}; the first: {problems[0]}")


@corpus.command(name="list", epilog=epilog("tessera corpus list", "tessera corpus list --json"))
@root_option
@json_option
def list_corpora(root: str, as_json: bool) -> None:
    """List every finished build in the root."""
    from tessera.cli._corpus_view import show_builds
    from tessera.corpus.manifest import FOLDER, find_builds
    from tessera.storage import open_root

    store = open_root(root)
    builds = [build for name in store.children(FOLDER) for build in find_builds(store, name)]
    if as_json:
        print_json([_summary(build) for build in builds])
    elif builds:
        show_builds(builds)
    else:
        click.echo(
            f"No corpus is built in {place_named(store)}; begin with `tessera corpus build "
            "data_manifests/sample.yaml`."
        )


def _find_manifest(root: Root, argument: str) -> Manifest:
    """The manifest that the argument means: in the root, in a local file, or by corpus name."""
    from tessera.corpus.manifest import load_manifest, read_local_manifest, resolve

    if not argument.endswith(".json"):
        name, _, prefix = argument.partition("@")
        return resolve(root, name, prefix or None)
    if Path(argument).is_file():
        return read_local_manifest(Path(argument))
    return load_manifest(root, argument)


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "built_at": manifest.built_at,
        "manifest_path": manifest.path,
        "vocab_size": manifest.tokenizer.vocab_size,
        "tokens": {name: split.tokens for name, split in manifest.splits.items()},
    }
