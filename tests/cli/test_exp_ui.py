"""``tessera-exp ui`` and ``server`` as far as they need neither a browser nor PostgreSQL."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tessera.cli import exp_ui
from tessera.cli.common import run_command
from tessera.cli.exp import exp
from tessera.errors import InputError, StoreError
from tessera.tracking import cluster, serving
from tessera.tracking.cluster import Cluster
from tessera.tracking.server import sentences
from tessera.tracking.serving import Running, last_words, mlflow_server, stop_group
from tessera.tracking.team_server import _arguments, artifacts_of, hosts_allowed

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench


def told(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one sentence on stderr."""
    code = run_command(exp, list(arguments))
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return code, err


def test_a_port_that_is_taken_is_told_before_anything_is_synced(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.finished()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code, err = told(capfd, "ui", "--root", bench.root.url, "--port", port)
        assert code == 2
        assert err.startswith(f"Error: Port {port} of 127.0.0.1 cannot be used (Address already")
        code, again = told(capfd, "server", "up", "--root", bench.root.url, "--port", port)
        assert (code, again) == (2, err)
    assert not (Path(bench.root.url) / "mlflow.db").exists()


@pytest.mark.parametrize("command", [("ui",), ("server", "up")])
def test_without_mlflow_it_says_what_to_install(
    bench: Bench, capfd: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    bench.finished()
    bench.monkeypatch.setattr(serving, "find_spec", lambda name: None)
    code, err = told(capfd, *command, "--root", bench.root.url)
    assert code == 2
    assert err == "Error: MLflow is not installed; run pip install 'tessera[tracking]'.\n"


def test_a_root_that_is_not_there_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, err = told(capfd, "ui", "--root", str(tmp_path / "typo"))
    assert code == 2
    assert err.startswith(f"Error: No runs are in {tmp_path / 'typo'}, which does not exist yet")


def test_a_server_of_others_is_opened_and_nothing_is_started(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    from tessera.tracking.server import connect

    bench.finished()
    own = connect(bench.root, bench.uri)
    opened: list[str] = []
    bench.monkeypatch.setattr("tessera.tracking.server.connect", lambda root, uri: own)
    bench.monkeypatch.setattr(serving, "mlflow_server", lambda *_, **__: pytest.fail("started"))

    def open_it(url: str) -> bool:
        opened.append(url)
        return True

    bench.monkeypatch.setattr("webbrowser.open", open_it)
    bench.monkeypatch.setenv("DISPLAY", ":0")
    bench.monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:secret@mlflow.example.com")
    assert run_command(exp, ["ui", "--no-sync", "--root", bench.root.url]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out == f"MLflow: {opened[0]}\n"
    start = f"http://mlflow.example.com/#/experiments/{own.experiment_id}/runs?viewState"
    assert out.startswith(f"MLflow: {start}ShareKey=tesseraLossVsDollars&compareRunsMode=CHART")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a display is asked for on Linux")
def test_without_a_display_no_text_browser_takes_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    assert not exp_ui._has_display()


def test_a_server_that_ends_at_once_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(StoreError, match=r"ended before it answered \(.*No such option.*\); see "),
        mlflow_server(["--charm"], host="127.0.0.1", port=serving.choose_port(None), log=log),
    ):
        pytest.fail("it answered")


def test_a_server_that_ends_later_is_an_error_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Traceback\nout of memory\n\n")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(9)"])
    with pytest.raises(StoreError, match=r"by itself with code 9 \(out of memory\); see"):
        Running(process, "http://127.0.0.1:1", log).wait()
    (tmp_path / "empty").touch()
    assert last_words(tmp_path / "empty") == "it said nothing"


def test_a_group_is_stopped_with_a_child_that_does_not_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_STOP_S", 0.5)
    mark = tmp_path / "pid"
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {deaf!r}])\n"
        f"time.sleep(1)\nopen({str(mark)!r}, 'w').write(str(child.pid))\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)
    while not mark.exists() or not mark.read_text():
        time.sleep(0.05)
    child = Path("/proc") / mark.read_text()
    stop_group(process)
    deadline = time.monotonic() + 10
    while child.exists() and "(zombie)" not in (child / "status").read_text():
        assert time.monotonic() < deadline, "its child lives on"
        time.sleep(0.05)


# -- the team server -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["http://x", "*", "a b", "x/y", ""])
def test_a_host_that_would_never_match_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="expected host names or addresses"):
        hosts_allowed([name])


def test_each_host_counts_with_any_port_and_this_machine_stays_allowed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.server.security_utils import is_allowed_host_header, should_block_cors_request

    monkeypatch.setattr(Cluster, "uri", "postgresql+psycopg2://nowhere")
    nowhere = Cluster(Path("/nowhere"), Path("/nowhere"))
    words = _arguments(bench.root, nowhere, ["mlflow.example.com"], 5000)
    given = dict(zip(words[::2], words[1::2], strict=True))
    allowed = given["--allowed-hosts"].split(",")
    for host in ("mlflow.example.com", "mlflow.example.com:443", "localhost:5000", "127.0.0.1"):
        assert is_allowed_host_header(allowed, host), host
    for host in ("example.com", "mlflow.example.com.evil.org", "evil-mlflow.example.com"):
        assert not is_allowed_host_header(allowed, host), host
    origins = given["--cors-allowed-origins"].split(",")
    for origin in ("https://mlflow.example.com", "http://mlflow.example.com:5000"):
        assert not should_block_cors_request(origin, "POST", origins), origin
    assert should_block_cors_request("https://evil.org", "POST", origins)
    assert "--allowed-hosts" not in _arguments(bench.root, nowhere, [], 5000)


def test_models_lie_in_the_root(bench: Bench) -> None:
    from tessera.storage import Root

    assert artifacts_of(bench.root) == f"{bench.root.url}/mlflow-artifacts"
    assert artifacts_of(Root("s3://bucket/tessera")) == "s3://bucket/tessera/mlflow"


def test_without_postgresql_and_root_it_says_what_to_type(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_found", list)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"run `sudo apt-get install postgresql` and start again"):
        Cluster.below(tmp_path)


def test_a_folder_that_postgres_may_not_enter_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(InputError, match=r"may not enter .*; give --folder a place"):
        cluster._require_way(closed / "postgres")


def test_a_backup_of_a_server_that_never_ran_is_a_sentence(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in ("backup", "restore"):
        code, err = told(capfd, "server", command, "--root", bench.root.url)
        assert code == 2
        assert ("has no backup" if command == "restore" else "No tracking server has run") in err


def test_a_host_that_the_server_refuses_is_told_with_the_option() -> None:
    from mlflow.exceptions import MlflowException

    uri = "http://gpu.example.com:5000"
    refused = MlflowException(
        "API request failed with error code 403 != 200. Response body: 'Invalid Host header - "
        "possible DNS rebinding attack detected'"
    )
    named = r"by the name gpu\.example\.com; add it to --allowed-hosts where"
    with pytest.raises(InputError, match=named), sentences(uri):
        raise refused
