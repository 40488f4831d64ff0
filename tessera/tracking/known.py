"""Which MLflow run is whose: found by our own run id, deleted ones too, and one of each.

``create_run`` may be carried out although its answer is lost, and two syncs may run at once, so a
run may be there twice. The one that got furthest stays (of equals the smaller id, so that everybody
chooses the same); the others are marked as replaced and deleted. A run that is deleted without that
mark was archived by somebody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tessera.tracking.server import Server
from tessera.tracking.view import REPLACED, RUN_ID, SYNCED

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

RESTORED = "tessera.restored."
"""Beginning of the experiment's tags that name runs which a sync restores for a moment.

Nothing can be written to a deleted run, a tag that says why it was restored neither.
"""


def known_runs(server: Server, run_id: str | None = None) -> dict[str, list[MlflowRun]]:
    """The MLflow runs of the experiment by our run id (or of this one), the one that counts first.

    Replaced ones are left out. Call it inside ``sentences``.
    """
    from mlflow.entities import ViewType

    wanted = "" if run_id is None else f"tags.`{RUN_ID}` = '{run_id}'"
    found: dict[str, list[MlflowRun]] = {}
    token = None
    while True:
        page = server.client.search_runs(
            [server.experiment_id], wanted, ViewType.ALL, max_results=1000, page_token=token
        )
        for run in page:
            name = run.data.tags.get(RUN_ID)
            if name and not (is_deleted(run) and REPLACED in run.data.tags):
                found.setdefault(name, []).append(run)
        token = page.token
        if not token:
            break
    return {name: sorted(runs, key=_furthest_first) for name, runs in found.items()}


def _furthest_first(run: MlflowRun) -> tuple[bool, bool, bool, str]:
    tags = run.data.tags
    return REPLACED in tags, is_deleted(run), SYNCED not in tags, run.info.run_id


def is_deleted(run: MlflowRun) -> bool:
    """Whether MLflow hides it."""
    return bool(run.info.lifecycle_stage == "deleted")


def replace_run(server: Server, run: MlflowRun) -> None:
    """Delete a run that another one stands for, so that nobody takes it for archived."""
    if is_deleted(run):
        return
    if REPLACED not in run.data.tags:
        server.client.set_tag(run.info.run_id, REPLACED, "yes")
    server.client.delete_run(run.info.run_id)


def restored_runs(server: Server) -> set[str]:
    """MLflow ids of runs that a sync restored, and perhaps died before it deleted them again."""
    experiment = server.client.get_experiment(server.experiment_id)
    return {key.removeprefix(RESTORED) for key in experiment.tags if key.startswith(RESTORED)}


def note_restored(server: Server, mlflow_run_id: str, restored: bool) -> None:
    """Say that a sync is about to restore or delete the run, or that it is done with that."""
    from mlflow.exceptions import MlflowException

    key = f"{RESTORED}{mlflow_run_id}"
    if restored:
        server.client.set_experiment_tag(server.experiment_id, key, "yes")
        return
    try:
        server.client.delete_experiment_tag(server.experiment_id, key)
    except MlflowException as error:  # another sync was faster
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
