"""``tessera configure`` against a store that checks signatures: options, variables, answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tessera.cli.main import tessera
from tessera.cloud.credentials import read_settings
from tessera.errors import InputError, RetryElsewhereError
from tests.services.stores import Store, serve


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """rclone: it verifies signatures."""
    with serve("rclone", tmp_path_factory.mktemp("rclone")) as store:
        yield store


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TESSERA_ENV_FILE")
    return tmp_path / ".tessera" / "env"


def run(*arguments: str, answers: str | None = None) -> tuple[int, str]:
    """Exit code and all that is shown; an InputError is 2 and its sentence."""
    result = CliRunner().invoke(
        tessera, ["configure", *arguments], input=answers, standalone_mode=False
    )
    if isinstance(result.exception, InputError):
        return 2, f"{result.output}{result.exception}"
    if result.exception is not None:
        raise result.exception
    return int(result.return_value or 0), result.output


def test_variables_are_tried_and_written_and_never_shown(
    bucket: Store, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in bucket.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TESSERA_ROOT", bucket.url("configure"))
    code, shown = run("--from-env", "--usd-per-hour", "1.91")
    assert code == 0, shown
    assert "ok   root:" in shown
    assert "MB/s" in shown
    assert "no key here" in shown
    assert bucket.secret_key not in shown
    assert bucket.access_key not in shown
    written = read_settings(home)
    assert written["AWS_SECRET_ACCESS_KEY"] == bucket.secret_key
    assert written["TESSERA_USD_PER_HOUR"] == "1.91"
    assert run("--usd-per-hour", "2.5", "--json", "--no-check")[0] == 0
    assert read_settings(home) == {**written, "TESSERA_USD_PER_HOUR": "2.5"}
    assert run("--usd-per-hour", "-")[0] == 0
    assert "TESSERA_USD_PER_HOUR" not in read_settings(home)
    # Its own values are tried again, not those of this shell.
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret-of-mine")
    code, shown = run("--check", "--json")
    assert code == 0
    document = json.loads(shown)
    assert document["checks"][0]["ok"] is True
    assert not document["written"]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--secret-access-key", "not-the-secret-key", "does not belong to the access key id"),
        ("--access-key-id", "not-the-access-key-id", "does not know this access key id"),
        ("--root", "s3://no-such-bucket/x", "there is no such bucket"),
        ("--endpoint", "http://127.0.0.1:9", "is the endpoint right"),
        ("--mlflow-uri", "http://127.0.0.1:9", "does not answer"),
        ("--root", "folder", "a rented machine needs one that it can reach"),
        ("--mlflow-uri", "junk", "expected a URL that begins with https:// or http://"),
        ("--endpoint", "127.0.0.1:18900", "expected a URL that begins with https:// or http://"),
        ("--usd-per-hour", "many", "expected US dollars an hour"),
        ("--usd-per-hour", "0", "no rented machine costs nothing"),
        ("--root", "https://b.s3.amazonaws.com/x/y", "a bucket's web address; write s3://b/x/y"),
        ("--root", "https://s3.eu-west-1.amazonaws.com/my.b/x", "write s3://my.b/x"),
        ("--root", "https://my.b.s3-eu-west-1.amazonaws.com", "write s3://my.b."),
        ("--usd-per-gb-up", "-1", "expected US dollars for 10^9 bytes"),
        ("--access-key-id", "-", "without access-key-id"),
        (
            "--mlflow-uri",
            "postgresql://ada:hunter2@db/x",
            "MLFLOW_TRACKING_URI is 'postgresql://ada:***@db/x'; expected a URL",
        ),
        (
            "--alert-webhook",
            "hooks.chat/not-the-secret",
            "Webhook 1 of TESSERA_ALERT_WEBHOOK is no",
        ),
    ],
)
def test_what_cannot_be_used_is_named_and_not_written(
    bucket: Store, home: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str, said: str
) -> None:
    for name, text in bucket.environment().items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("TESSERA_ROOT", bucket.url("configure"))
    code, shown = run("--from-env", option, value)
    assert code == 2
    assert said in shown
    assert bucket.secret_key not in shown
    assert "not-the-" not in shown
    assert not home.exists()


def test_questions_are_answered_once_and_kept(bucket: Store, home: Path) -> None:
    environment = bucket.environment()
    answers = [
        bucket.url("asked"), environment["AWS_ENDPOINT_URL"], "us-east-1", bucket.access_key,
        bucket.secret_key, "", "1.5", "", "",
    ]  # fmt: skip
    code, shown = run(answers="\n".join(answers) + "\n")
    assert code == 0, shown
    assert bucket.secret_key not in shown
    first = read_settings(home)
    assert first["TESSERA_ROOT"] == bucket.url("asked")
    code, shown = run(answers="\n" * 6 + "-\n\n\n")
    assert code == 0, shown
    assert bucket.secret_key not in shown
    assert "[kept]" in shown
    assert read_settings(home) == {k: v for k, v in first.items() if k != "TESSERA_USD_PER_HOUR"}


def test_what_fails_is_asked_again_and_the_rest_is_kept(
    bucket: Store, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong secret, then the right one; the prices and the bucket are typed once."""
    monkeypatch.setattr("tessera.cli.configure._at_terminal", lambda: True)
    endpoint = bucket.environment()["AWS_ENDPOINT_URL"]
    url = bucket.url("again")
    answers = [
        url, endpoint, "", bucket.access_key, "not-the-secret-key", "", "1.5", "", "",
        "", "y", "", "", "", "", bucket.secret_key,
    ]  # fmt: skip
    code, shown = run(answers="\n".join(answers) + "\n")
    assert code == 0, shown
    assert "FAIL root:" in shown
    assert "not-the-secret-key" not in shown
    written = read_settings(home)
    assert (written["TESSERA_ROOT"], written["TESSERA_USD_PER_HOUR"]) == (url, "1.5")
    assert written["AWS_SECRET_ACCESS_KEY"] == bucket.secret_key


def test_an_endpoint_of_this_machine_is_warned_of(
    bucket: Store, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store of this test is such a one; what is rented elsewhere does not reach it."""
    for name, value in bucket.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TESSERA_ROOT", bucket.url("warned"))
    code, shown = run("--from-env")
    assert code == 0, shown
    assert "AWS_ENDPOINT_URL is http://127.0.0.1" in shown
    assert "a rented one does not reach it" in shown
    for host, warned in (("localhost", 1), ("[::1]", 1), ("mlflow.example.org", 0)):
        uri = f"http://{host}:5000"
        words = ("--mlflow-uri", uri, "--endpoint", "https://s3.example.org", "--no-check")
        document = json.loads(run(*words, "--json")[1])
        assert len(document["warnings"]) == warned, host


def test_variables_without_a_root_name_the_variable(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TESSERA_ROOT", raising=False)
    code, shown = run("--from-env")
    assert code == 2
    assert "export TESSERA_ROOT=s3://bucket/prefix" in shown


def test_a_check_of_what_does_not_answer_is_no_pass(
    bucket: Store, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key is here, vast.ai is not reached: whether it works is not known."""
    for name, value in bucket.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TESSERA_ROOT", bucket.url("unknown"))
    monkeypatch.setattr("tessera.cloud.vast._WAIT", lambda state: 0.0)
    monkeypatch.setenv("VAST_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("VAST_API_KEY", "a-key")
    code, shown = run("--from-env")
    assert code == 0, shown  # what is written can be used
    assert "?    vast.ai: " in shown
    with pytest.raises(RetryElsewhereError, match=r"vast\.ai did not answer, so whether the key"):
        run("--check")


def test_nobody_to_ask_nothing_to_check_and_two_things_at_once(home: Path) -> None:
    alone = subprocess.run(
        [sys.executable, "-m", "tessera", "configure"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert alone.returncode == 2
    assert "There is nobody to ask here" in alone.stderr
    assert "nothing to check; run `tessera configure`" in run("--check")[1]
    assert "give it no other option" in run("--check", "--from-env")[1]
    assert not home.exists()


def test_the_written_root_is_the_default_of_the_commands(
    bucket: Store, home: Path, tmp_path: Path
) -> None:
    home.parent.mkdir(mode=0o700)
    lines = {**bucket.environment(), "TESSERA_ROOT": bucket.url("default")}
    home.write_text("".join(f"{name}='{value}'\n" for name, value in lines.items()))

    def command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tessera", "corpus", "list", *arguments],
            env={
                "HOME": str(tmp_path), "PATH": os.environ["PATH"],
                "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "AWS_CONFIG_FILE": os.devnull,
                **environ,
            },
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert bucket.url("default") in command().stdout
    assert bucket.url("default") not in command("--root", str(tmp_path)).stdout
    assert bucket.url("default") not in command(TESSERA_ROOT=str(tmp_path)).stdout
    home.write_text("AWS_SECRET_ACCESS_KEY='half\n")
    damaged = command()
    assert damaged.returncode == 2
    assert "damaged in line 1" in damaged.stderr
    assert "half" not in damaged.stderr
