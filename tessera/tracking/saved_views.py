"""Saved views of MLflow's page: loss against dollars, and a table of what every run came to.

Out of the box MLflow shows runs without a figure and charts against steps alone. It keeps a view
that somebody saved in a tag of the experiment, ``mlflow.sharedViewState.<key>``, and opens it with
``?viewStateShareKey=<key>``. The form of that tag is not documented, so views are written only for
versions of MLflow in whose page they were looked at (``tests/full/test_mlflow_ui.py``); with
another one they are left out and a sentence says so. Nothing else depends on them.
"""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass, field
from typing import Any

from tessera.tracking.interviews import INTERVIEW
from tessera.tracking.server import Server

CHECKED_VERSIONS = ("3.17",)
"""Releases of MLflow (major.minor) whose page was looked at."""
SO_FAR = "cost/usd_so_far"
"""US dollars of a run when it was evaluated; the trainer journals it with each evaluation."""
CHARTS, TABLE = "tesseraLossVsDollars", "tesseraRuns"
_PREFIX = "mlflow.sharedViewState."
_KIND = ("mlflow.experimentKind", "custom_model_development")
_WORKFLOW = "workflowType=machine_learning"  # else the page is one for chat agents
_CREATED = 1_760_000_000_000
"""Milliseconds; always the same, so that an unchanged view is the same tag."""

_OTHER_SECTIONS = (
    "best", "checkpoint", "cost", "eval", "final", "forecast", "progress", "train",
    "Model metrics", "System metrics",
)  # fmt: skip


@dataclass(frozen=True)
class SavedView:
    """A view under its key; ``state`` is what MLflow's page restores, ``chart`` its tab."""

    key: str
    name: str
    chart: bool
    state: dict[str, Any] = field(repr=False)

    @property
    def tag(self) -> str:
        """The experiment's tag that holds it."""
        return _PREFIX + self.key

    @property
    def value(self) -> str:
        """The tag's text."""
        packed = zlib.compress(json.dumps(self.state, sort_keys=True).encode(), 9)
        return json.dumps(
            {
                "name": self.name,
                "createdAt": _CREATED,
                "updatedAt": _CREATED,
                "state": "deflate;" + base64.b64encode(packed).decode(),
            }
        )


def page_version(server: Server) -> str:
    """The release of MLflow whose page people see: the server's, where there is one."""
    import mlflow
    from mlflow.utils import credentials, rest_utils

    if not server.uri.startswith("http"):
        return str(mlflow.__version__)
    untyped: Any = (rest_utils.http_request, credentials.get_default_host_creds)
    request, way = untyped
    answer = request(way(server.uri), "/version", "GET")
    found = answer.text.strip()
    return found if answer.ok and len(found) < 30 else "of an unknown version"


def left_out(version: str) -> str | None:
    """Why this release of MLflow gets no views, in a sentence; None: it gets them."""
    if ".".join(version.split(".")[:2]) in CHECKED_VERSIONS:
        return None
    return (
        f"MLflow {version} gets no saved views: they were checked with "
        f"{', '.join(CHECKED_VERSIONS)} only. In its page choose the columns final/cost_usd, "
        f"final/loss and final/usd_per_mtok under Columns, and {SO_FAR} as the X axis of a chart."
    )


def provision(server: Server) -> str | None:
    """Write the views that the experiment has not or has otherwise; call inside ``sentences``.

    Returns the sentence of ``left_out`` if this MLflow gets none.
    """
    reason = left_out(page_version(server))
    if reason is not None:
        return reason
    has = server.client.get_experiment(server.experiment_id).tags
    wanted = {view.tag: view.value for view in views()}
    if _KIND[0] not in has:  # otherwise the page asks each newcomer what kind of experiment this is
        wanted[_KIND[0]] = _KIND[1]
    fresh = {key: value for key, value in wanted.items() if has.get(key) != value}
    for key, value in fresh.items():
        server.client.set_experiment_tag(server.experiment_id, key, value)
    return None


def views() -> tuple[SavedView, ...]:
    """All views, the one that ``tessera-exp ui`` opens first."""
    return (
        SavedView(CHARTS, "Loss vs dollars", True, _state(_charts())),
        SavedView(TABLE, "Runs: dollars, loss, $/Mtok, interview", False, _state({})),
    )


def page(base: str, experiment_id: str, view: SavedView | None = None) -> str:
    """The URL of the experiment's runs on the server ``base``, opened with ``view``."""
    url = f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs"
    if view is None:
        return f"{url}?{_WORKFLOW}"
    mode = "CHART" if view.chart else "TABLE"
    return f"{url}?viewStateShareKey={view.key}&compareRunsMode={mode}&{_WORKFLOW}"


def _state(charts: dict[str, Any]) -> dict[str, Any]:
    """The fields of MLflow's page state; those that are left out keep its defaults."""
    return {
        "searchFilter": "", "startTime": "ALL", "lifecycleFilter": "Active", "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "orderByKey": _column("metrics", "final/cost_usd"), "orderByAsc": True,
        "selectedColumns": _COLUMNS, "columnWidths": _WIDTHS, "columnOrder": [*_FIRST, *_COLUMNS],
        "runsHiddenMode": "FIRST_20_RUNS", "viewMaximized": True, "runListHidden": False,
        "groupBy": None, "hideEmptyCharts": True, "autoRefreshEnabled": True,
        **charts,
    }  # fmt: skip


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"


_COLUMNS = [
    _column("metrics", "final/cost_usd"),
    _column("metrics", "final/loss"),
    _column("metrics", "final/usd_per_mtok"),
    _column("tags", INTERVIEW),
    _column("tags", "tessera.kind"),
    _column("tags", "tessera.gpu"),
    _column("tags", "tessera.status"),
]
_FIRST = ["1", _column("attributes", "Run Name"), "runDateAndNestInfo", "duration"]
_WIDTHS = {_column("metrics", "final/usd_per_mtok"): 150, _column("tags", INTERVIEW): 270}


def _charts() -> dict[str, Any]:
    main = {
        "uuid": "tessera-dollars", "name": "Loss vs dollars", "display": True, "columns": 2,
        "cardHeight": 400,
    }  # fmt: skip
    rest = [{"uuid": f"tessera-{name}", "name": name, "display": False} for name in _OTHER_SECTIONS]
    sections = [{"isReordered": True, "deleted": False, **each} for each in (main, *rest)]
    return {
        "compareRunSections": sections,
        "isAccordionReordered": True,  # else sections are sorted by name, ours among them
        "compareRunCharts": [
            _chart(
                "LINE", "curves", metricKey="eval/loss", selectedMetricKeys=["eval/loss"],
                xAxisKey="metric", selectedXAxisMetricKey=SO_FAR, useGlobalXaxisKey=False,
                xAxisScaleType="linear", scaleType="linear", lineSmoothness=0, displayPoints=True,
                range={},
            ),
            _chart(
                "SCATTER", "ends", xaxis={"key": "final/cost_usd", "type": "METRIC"},
                yaxis={"key": "final/loss", "type": "METRIC"}, runsCountToCompare=100,
            ),
            _chart("BAR", "rates", metricKey="final/usd_per_mtok", runsCountToCompare=100),
        ],
    }  # fmt: skip


def _chart(kind: str, name: str, **rest: Any) -> dict[str, Any]:
    return {
        "type": kind, "uuid": f"tessera-{name}", "metricSectionId": "tessera-dollars",
        "deleted": False, "isGenerated": False, **rest,
    }  # fmt: skip
