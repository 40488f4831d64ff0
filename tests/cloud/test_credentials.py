"""The file that ``tessera configure`` writes: its form, who may read it, when it counts."""

import stat
import subprocess
from pathlib import Path

import pytest

from tessera.cloud.credentials import (
    MARKER,
    apply_defaults,
    read_settings,
    root_written,
    write_settings,
)
from tessera.errors import InputError

AWKWARD = "a'b\"c $(touch pwned) `x` \\ #é"
VALUES = {
    "TESSERA_ROOT": "s3://bucket/prefix",
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": AWKWARD,
    "TESSERA_USD_PER_HOUR": "1.5",
}


def test_only_its_owner_reads_it_and_the_shell_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / ".tessera" / "env"
    (tmp_path / ".tessera").mkdir(mode=0o755)
    write_settings(path, VALUES)
    assert read_settings(path) == VALUES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert sorted(item.name for item in path.parent.iterdir()) == ["env", MARKER]
    shell = subprocess.run(
        ["sh", "-c", f'. {path}; printf %s "$AWS_SECRET_ACCESS_KEY"'],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert shell.stdout == AWKWARD
    assert not (tmp_path / "pwned").exists()


def test_a_line_break_and_a_damaged_file_are_refused_without_showing_a_value(
    tmp_path: Path,
) -> None:
    path = tmp_path / "env"
    with pytest.raises(InputError, match="AWS_SECRET_ACCESS_KEY holds a line break") as error:
        write_settings(path, {"AWS_SECRET_ACCESS_KEY": "half\nother"})
    assert "half" not in str(error.value)
    assert not path.exists()
    path.write_text("TESSERA_ROOT='s3://b'\nAWS_SECRET_ACCESS_KEY='open\n")
    with pytest.raises(InputError, match="damaged in line 2") as error:
        read_settings(path)
    assert "open" not in str(error.value).replace(str(path), "")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_settings(path)
    assert read_settings(tmp_path / "absent") == {}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_settings(tmp_path / "file" / "env", VALUES)


@pytest.fixture
def written(tmp_path: Path) -> dict[str, str]:
    write_settings(tmp_path / "env", {**VALUES, "MLFLOW_TRACKING_URI": "http://mlflow"})
    return {"TESSERA_ENV_FILE": str(tmp_path / "env")}


def test_what_stays_here_is_in_no_file_that_a_task_copies(tmp_path: Path) -> None:
    path, hook = tmp_path / "env", "https://hooks.example/secret"
    values = {**VALUES, "TESSERA_ALERT_WEBHOOK": hook}
    write_settings(path, values)
    assert read_settings(path) == values
    assert hook not in path.read_text()
    beside = tmp_path / "env-here"
    assert hook in beside.read_text()
    assert beside.stat().st_mode & 0o777 == 0o600
    write_settings(path, VALUES)
    assert not beside.exists()


@pytest.mark.parametrize("arguments", [[], ["list"], ["--root"]])
def test_it_is_the_default_of_what_is_not_set(
    written: dict[str, str], arguments: list[str]
) -> None:
    environ = {**written, "AWS_ACCESS_KEY_ID": "mine", "MLFLOW_TRACKING_URI": ""}
    apply_defaults(arguments, environ)
    assert environ["TESSERA_ROOT"] == "s3://bucket/prefix"
    assert environ["AWS_ACCESS_KEY_ID"] == "mine"
    assert environ["AWS_SECRET_ACCESS_KEY"] == AWKWARD
    assert environ["MLFLOW_TRACKING_URI"] == "http://mlflow"
    assert "TESSERA_USD_PER_HOUR" not in environ  # the price of rented machines


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        (["list", "--root", "folder"], {}),
        (["list", "--root=s3://other"], {}),
        (["list"], {"TESSERA_ROOT": ".tessera"}),
        (["train"], {"SKYPILOT_TASK_ID": "sky-1"}),
    ],
)
def test_another_root_takes_nothing_of_it(
    written: dict[str, str], arguments: list[str], environ: dict[str, str]
) -> None:
    before = {**written, **environ}
    after = dict(before)
    apply_defaults(arguments, after)
    assert after == before


def test_the_same_root_in_an_option_takes_its_keys_unless_a_profile_is_named(
    written: dict[str, str],
) -> None:
    environ = {**written, "AWS_PROFILE": "work"}
    apply_defaults(["list", "--root", "s3://bucket/prefix/"], environ)
    assert "AWS_SECRET_ACCESS_KEY" not in environ
    assert environ["MLFLOW_TRACKING_URI"] == "http://mlflow"


def test_a_root_that_the_file_names_is_said_to_be_its(tmp_path: Path) -> None:
    """So that nobody wonders where runs went after `tessera configure`."""
    path = tmp_path / "env"
    path.write_text("TESSERA_ROOT='s3://bucket/x/'\n")
    environ = {"TESSERA_ENV_FILE": str(path)}
    assert root_written("s3://bucket/x", environ) == f" (the root in {path})"
    assert root_written("s3://bucket/y", environ) == ""
    path.write_text("'half")
    assert root_written("s3://bucket/x", environ) == ""
    assert root_written("s3://bucket/x", {"TESSERA_ENV_FILE": str(tmp_path / "none")}) == ""
