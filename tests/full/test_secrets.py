"""No secret in what a run leaves: objects of the root, local files, MLflow, what was said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.chaos.objects import BucketObjects
from tests.cloud.test_preflight import RENTED
from tests.services.stores import serve
from tests.services.trainers import CHECKOUT, base_environment
from tests.training.conftest import BASE, write_corpus

MLFLOW_PASSWORD = "a-password-of-mlflow"
VAST_KEY = "a-key-of-vast-ai"
WEBHOOK_PATH = "a-path-that-is-a-secret"
EXP = "from tessera.cli.exp import main; main()"


def test_keys_are_nowhere(tmp_path: Path) -> None:
    with serve("moto", tmp_path / "moto") as store:
        home, left = tmp_path / "home", tmp_path / "left"
        left.mkdir()
        home.mkdir()
        (left / "experiment.yaml").write_text(yaml.safe_dump(BASE), "utf-8")
        environment = base_environment() | store.environment() | RENTED | {
            "HOME": str(home), "TESSERA_ENV_FILE": str(home / ".tessera" / "env"),
            "TESSERA_ROOT": store.url("secrets"),
            "TESSERA_CACHE": str(left / "cache"), "MLFLOW_TRACKING_USERNAME": "me",
            "MLFLOW_TRACKING_PASSWORD": MLFLOW_PASSWORD, "VAST_API_KEY": VAST_KEY,
            "VAST_URL": "http://127.0.0.1:9", "VAST_CONTAINERLABEL": "C.1",
            "TESSERA_ALERT_WEBHOOK": f"http://127.0.0.1:9/services/{WEBHOOK_PATH}",
            "PYTHONPATH": str(CHECKOUT),
        }  # fmt: skip
        # Of this machine, so nothing that configure would take for a rented one.
        tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{left / 'mlflow.db'}"}
        said = b""
        commands = [
            ["-m", "tessera", "configure", "--from-env"],
            ["-m", "tessera", "corpus", "build", str(write_corpus(left))],
            ["-m", "tessera", "preflight", str(left / "experiment.yaml")],
            ["-m", "tessera", "train", str(left / "experiment.yaml")],
            ["-c", EXP, "sync"],
            ["-c", EXP, "list", "--json"],
            # What fails says more than what works.
            ["-m", "tessera", "train", str(left / "experiment.yaml"), "--root", "s3://none/x"],
            ["-c", EXP, "alerts"],  # nobody listens there
        ]
        for number, command in enumerate(commands):
            done = subprocess.run(
                [sys.executable, *command], env=environment | (tracking if number else {}),
                cwd=left, capture_output=True, timeout=120, check=False,
            )  # fmt: skip
            assert (done.returncode == 0) == (number < 6), (command, done.stderr)
            said += done.stdout + done.stderr
        assert (home / ".tessera" / "env").exists()
        objects = BucketObjects(store, "secrets")
        keys = objects.keys("")
        everything = {f"root: {key}": objects.read(key) for key in keys} | {"said": said}
    for folder, _, names in os.walk(left):
        everything |= {f"{folder}/{name}": Path(folder, name).read_bytes() for name in names}
    for kind in (
        "journal",
        "run.json",
        "attempts",
        "COMPLETE",
        "preflights",
        "mlflow.db",
        "alerts",
    ):
        assert any(kind in name for name in everything), kind
    for secret in (store.secret_key, store.access_key, MLFLOW_PASSWORD, VAST_KEY, WEBHOOK_PATH):
        found = [name for name, data in everything.items() if secret.encode() in data]
        assert not found, secret
