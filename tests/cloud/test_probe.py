"""Roots and servers that refuse: each is told in one sentence, by what they answered."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tessera.cloud.probe import probe_mlflow, probe_root, store_clock_ahead_s, variables
from tessera.errors import InputError, RetryElsewhereError
from tessera.storage import Root
from tessera.storage.digests import CHUNK
from tests.cloud.pretend_s3 import pretend_s3


def test_a_folder_is_used_and_left_clean(tmp_path: Path) -> None:
    found = probe_root(str(tmp_path / "root"), size=1 << 20)
    assert found.write_bytes_per_s > 0
    assert found.read_bytes_per_s > 0
    assert found.clock_ahead_s is None
    assert [path for path in (tmp_path / "root").rglob("*") if path.is_file()] == []


def test_speed_is_that_of_parts_sent_at_once() -> None:
    with pretend_s3(put_s=2) as environ, variables(environ):
        found = probe_root("s3://bucket/prefix", size=4 * CHUNK)
        assert Root("s3://bucket/prefix").files("probes") == []
    assert 2 < found.size / found.write_bytes_per_s < 8  # one after the other: 8 s at least


def test_a_machine_without_room_for_the_probe_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RetryElsewhereError, match=r"0 MB \(No space left on device\)"):
        probe_root(str(tmp_path), size=1000)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("AccessDenied", "the keys may not write there: give them s3:PutObject"),
        ("InvalidAccessKeyId", "does not know this access key id"),
        ("SignatureDoesNotMatch", "does not belong to the access key id"),
        ("AuthorizationHeaderMalformed", "in another region"),
    ],
)
def test_what_the_store_answers_is_told(code: str, said: str) -> None:
    with pretend_s3(code) as environ, variables(environ):
        with pytest.raises(InputError, match=said) as error:
            probe_root("s3://bucket/prefix", size=1000)
        assert "secret-key" not in str(error.value)
        assert "key-id" not in str(error.value)


def test_keys_that_may_write_and_not_list_lack_a_permission() -> None:
    # The answers to the write carry no ETag, so it is read back: that is what is refused here.
    refused = pytest.raises(InputError, match="the keys")
    with pretend_s3("AccessDenied", "GET") as environ, variables(environ), refused:
        probe_root("s3://bucket/prefix", size=1000)


@pytest.mark.parametrize(("ahead", "words"), [(1200, "20 s behind"), (-1200, "20 s ahead of")])
def test_a_clock_that_the_store_would_refuse_is_another_machine_s_matter(
    ahead: float, words: str
) -> None:
    with pretend_s3(ahead_s=ahead) as environ, variables(environ):
        measured = store_clock_ahead_s("s3://bucket/prefix")
        assert measured == pytest.approx(ahead, abs=3)
        with pytest.raises(RetryElsewhereError, match=r"The clock of this machine is 1,[12]") as e:
            probe_root("s3://bucket/prefix")
    assert words.split(" s ")[1] in str(e.value)
    assert e.value.exit_code == 75


def test_a_store_that_refuses_the_clock_itself_is_believed() -> None:
    refused = pytest.raises(RetryElsewhereError, match="clock of this machine differs from")
    with pretend_s3("RequestTimeTooSkewed") as environ, variables(environ), refused:
        probe_root("s3://bucket/prefix")


def test_clocks_that_agree_do(tmp_path: Path) -> None:
    with pretend_s3() as environ, variables(environ):
        assert abs(store_clock_ahead_s("s3://bucket/x") or 0.0) <= 1
    assert store_clock_ahead_s(str(tmp_path)) is None


def serve_text(status: int, body: str) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def __getattr__(self, name: str) -> object:
            if name.startswith("do_"):
                return self.answer
            raise AttributeError(name)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, "", "refuses this user"),
        (403, "", "refuses this user"),
        (404, "nothing here", "not as MLflow does"),
        (200, "<html>a page</html>", "not as MLflow does"),
    ],
)
def test_what_is_no_mlflow_or_refuses_is_told(status: int, body: str, said: str) -> None:
    server = serve_text(status, body)
    try:
        with pytest.raises(InputError, match=said) as error:
            probe_mlflow(f"http://127.0.0.1:{server.server_address[1]}", "me", "pass-word")
        assert "pass-word" not in str(error.value)
    finally:
        server.shutdown()
        server.server_close()


def test_mlflow_that_answers_and_mlflow_that_does_not() -> None:
    server = serve_text(200, "{}")
    address = f"http://127.0.0.1:{server.server_address[1]}"
    assert probe_mlflow(address) == "{}"
    server.shutdown()
    server.server_close()
    with pytest.raises(RetryElsewhereError, match="does not answer"):
        probe_mlflow(address)
    with pytest.raises(InputError, match="holds a user or a password") as error:
        probe_mlflow("https://me:pass-word@host")
    assert "pass-word" not in str(error.value)
    assert probe_mlflow("sqlite:///mlflow.db") == ""
