"""The sealed network: nothing but this machine, and yet SkyPilot believes that the internet is up.

The controller of managed jobs recovers nothing while neither https://8.8.8.8 nor https://1.1.1.1
answers (``_TEST_IP_LIST`` in sky/backends/backend_utils.py). Here both are addresses of the
loopback device, with a certificate of an authority that only the lab trusts.

Each instance is a network namespace of its own, joined to the lab by a cable (a veth pair); the
lab's end is always ``GATEWAY``. There is no default route: any other address fails at once.
"""

from __future__ import annotations

import http.server
import ssl
import subprocess
import threading
from pathlib import Path

GATEWAY = "10.77.0.1"
PROBED = ("8.8.8.8", "1.1.1.1")
_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


def address(id: int) -> str:  # noqa: A002 - an instance's number is called `id` at vast.ai
    """Of one instance; ids begin at 9001."""
    return f"10.77.{1 + id % 9000 // 250}.{1 + id % 9000 % 250}"


def seal(folder: Path) -> Path:
    """Furnish this process's own new network namespace; a bundle of the authorities to trust."""
    run("ip", "link", "set", "lo", "up")
    for each in (GATEWAY, *PROBED):
        run("ip", "address", "add", f"{each}/32", "dev", "lo")
    _certify(folder)
    for each in PROBED:
        _answer_tls(each, folder)
    bundle = folder / "bundle.pem"
    known = _BUNDLE.read_text() if _BUNDLE.exists() else ""
    bundle.write_text(known + (folder / "authority.pem").read_text())
    return bundle


def connect(name: str, pid: int, ip: str) -> None:
    """A cable from here to the network namespace of process ``pid``, whose end is called eth0."""
    run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    run("ip", "address", "add", GATEWAY, "peer", ip, "dev", name)
    run("ip", "link", "set", name, "up")


def run(*command: str) -> None:
    """Run a short command that must not fail."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _certify(folder: Path) -> None:
    """A new authority and a certificate for the probed addresses."""
    key, names = str(folder / "probe.key"), ",".join(f"IP:{each}" for each in PROBED)
    new_key = ("-newkey", "rsa:2048", "-nodes")
    authority = ("-keyout", str(folder / "authority.key"), "-out", str(folder / "authority.pem"))
    run("openssl", "req", "-x509", *new_key, "-days", "2", "-subj", "/CN=tessera-lab", *authority)
    request = str(folder / "probe.csr")
    run("openssl", "req", *new_key, "-subj", "/CN=probe", "-keyout", key, "-out", request)
    (folder / "probe.ext").write_text(f"subjectAltName={names}\n")
    signing = ("-CA", str(folder / "authority.pem"), "-CAkey", str(folder / "authority.key"))
    made = ("-extfile", str(folder / "probe.ext"), "-out", str(folder / "probe.pem"))
    run("openssl", "x509", "-req", "-in", request, *signing, "-CAcreateserial", "-days", "2", *made)


class _Here(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def _answer_tls(ip: str, folder: Path) -> None:
    server = http.server.ThreadingHTTPServer((ip, 443), _Here)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "probe.pem", folder / "probe.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
