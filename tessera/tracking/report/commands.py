"""The commands that make the run again, and its experiment as the file that they need."""

from __future__ import annotations

import shlex

import yaml

from tessera.tracking.report.content import Report


def experiment_yaml(report: Report) -> str:
    """The resolved experiment, every default written out; ``tessera train`` takes it as it is."""
    return yaml.safe_dump(
        dict(report.experiment), sort_keys=False, allow_unicode=True, default_flow_style=False
    )


def experiment_file(report: Report) -> str:
    """The name under which the commands expect the experiment."""
    return f"{report.summary.run_id}.yaml"


def reproduce(report: Report) -> list[str]:
    """Shell commands, in order."""
    commit, root = report.commit, shlex.quote(report.root_url)
    lines = ["# in a checkout of Tessera"]
    if commit:
        lines.append(f"git checkout {shlex.quote(commit.removesuffix('-dirty'))}")
    lines.append("pip install -c constraints.txt -e .")
    corpus = report.extras.corpus
    if corpus is not None:
        recipe = shlex.quote(f"data_manifests/{corpus.name}.yaml")
        lines.append(f"tessera corpus build {recipe} --root {root}")
    lines += report.extras.base_commands
    settings = {}
    if corpus is not None:
        settings["data.fingerprint"] = report.fingerprint[:16]
    if report.base is not None:
        settings["base"] = report.base.get("run_id", "")
    options = "".join(f" --set {shlex.quote(f'{key}={value}')}" for key, value in settings.items())
    lines.append(f"tessera train {shlex.quote(experiment_file(report))} --root {root}{options}")
    return lines


def remarks(report: Report) -> list[str]:
    """What a person should know before running them."""
    found = ["In this page's root the run is there already: give another --root, or --new."]
    if report.commit is None:
        found.append("The commit was not recorded: the code did not run from a checkout.")
    elif report.commit.endswith("-dirty"):
        found.append("The checkout had changes that were not committed; they are not recorded.")
    if report.extras.corpus is not None:
        found.append(
            f"The corpus must come out with the fingerprint {report.fingerprint}; another one is "
            "refused."
        )
    if report.experiment.get("budget_usd") is not None and report.summary.step is not None:
        found.append(
            f"A budget decides where the run ends: this one came to step {report.summary.step:,}, "
            "another price or speed leads elsewhere."
        )
    for path in report.extras.conversations:
        found.append(f"Conversations: {path}.")
    return found
