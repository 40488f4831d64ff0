"""A pretend vast.ai: its REST API on a loopback port, with offers, instances, prices and a bill.

    with PretendVast() as vast:
        subprocess.run([...], env={**os.environ, "VAST_URL": vast.url, "VAST_API_KEY": "any"})
        assert not vast.instances

Endpoints and fields are those that vast's own SDK (vastai 1.9.1) and SkyPilot 0.14.1 read. Without
``machines`` an instance is a row that runs at once: enough for a client's tests. tests/lab gives it
machines that can be logged into. As at vast.ai a price has two parts, the GPU's (``dph_base``) and
the disk's (``storage_total_cost``); a stopped instance goes on paying for its disk.
"""

# ruff: noqa: A001, A002 - an instance's number is called `id` at vast.ai

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit

Row = dict[str, Any]
Answer = tuple[int, Any]

HOURS_A_MONTH = 730.0  # what turns storage_cost, dollars for a GB and month, into an hourly price
PAGE = 25
FAULTS = ("500", "429", "403", "nonsense", "silence", "lost")
_SETTINGS = {"order", "type", "limit", "allocated_storage", "disable_bundling", "external"}
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "neq": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "gte": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "lte": lambda a, b: a <= b,
    "in": lambda a, b: a in b,
    "notin": lambda a, b: a not in b,
}


def offer(
    id: int, gpu_name: str, dph_base: float, min_bid: float, geolocation: str, **other: Any
) -> Row:
    """One offer with one GPU, as POST /api/v0/bundles/ answers it; ``other`` replaces fields.

    Prices in dollars an hour, traffic in dollars a GB, storage in dollars a GB and month, memory
    in MB. ``dph_total`` is for the disk that a search assumes unless told: 5 GB.
    """
    row = {
        "id": id, "ask_contract_id": id, "bundle_id": id,
        "machine_id": 20000 + id, "host_id": 50000 + id, "geolocation": geolocation,
        "gpu_name": gpu_name, "num_gpus": 1, "gpu_frac": 1.0, "gpu_ram": 81559,
        "gpu_total_ram": 81559, "gpu_max_power": 700.0, "compute_cap": 900,
        "cuda_max_good": 13.0, "driver_version": "580.95.05",
        "cpu_cores": 32, "cpu_cores_effective": 32.0, "cpu_ram": 131072,
        "disk_space": 1200.0, "disk_bw": 4100.0, "inet_up": 2400.0, "inet_down": 3100.0,
        "inet_up_cost": 0.004, "inet_down_cost": 0.003, "storage_cost": 0.15,
        "dph_base": dph_base, "min_bid": min_bid, "is_bid": False,
        "reliability": 0.9962, "reliability2": 0.9962, "verified": True,
        "verification": "verified", "hosting_type": 1, "datacenter": True, "external": False,
        "rentable": True, "rented": False, "static_ip": True, "direct_port_count": 100,
        "score": 300.0, "dlperf": 240.0, "duration": 30 * 86400.0,
        **other,
    }  # fmt: skip
    return _priced(row, disk=5.0)


def _priced(row: Row, disk: float) -> Row:
    """``row`` with the totals that follow from its parts for a disk of so many GB."""
    storage = row["storage_cost"] * disk / HOURS_A_MONTH
    total = row["dph_base"] + storage
    parts = {"gpuCostPerHour": row["dph_base"], "diskHour": storage, "totalHour": total}
    return {**row, "storage_total_cost": storage, "dph_total": total, "search": parts}


OFFERS = (
    offer(101, "H100 SXM", 1.87, 1.07, "Texas, US", inet_up_cost=0.01, inet_down_cost=0.006),
    offer(102, "H100 SXM", 2.13, 1.34, "Norway, NO", score=250.0),
    offer(103, "H100 SXM", 1.55, 0.91, "Quebec, CA", hosting_type=0, datacenter=False, score=200.0),
    offer(104, "H100 PCIE", 1.49, 0.80, "Utah, US", gpu_max_power=350.0, score=190.0),
    offer(
        105, "RTX 5090", 0.44, 0.20, "California, US", gpu_ram=32607, gpu_total_ram=32607,
        compute_cap=1200, gpu_max_power=575.0, hosting_type=0, datacenter=False, score=180.0,
    ),
)  # fmt: skip
"""What is for rent unless a test says otherwise, the best score first, as vast.ai sorts."""


class MachineBackend(Protocol):
    """What makes instances of rows: tests/lab has one, with namespaces and a real sshd."""

    def start(self, instance: Mapping[str, Any]) -> Row:
        """Begin to start it; the fields of the row that tell how it is reached."""

    def ready(self, id: int) -> bool:
        """Whether one can log in."""

    def stop(self, id: int) -> None:
        """It is gone when this returns; an id that does not run is no error."""


class Rows:
    """Machines that are rows and nothing else: what runs them takes no time."""

    def start(self, instance: Mapping[str, Any]) -> Row:
        """An address of the documentation's range, so that nobody is reached by mistake."""
        port = 10000 + int(instance["id"]) % 10000
        return {"ssh_host": "192.0.2.1", "ssh_port": port, "public_ipaddr": "192.0.2.1"}

    def ready(self, id: int) -> bool:
        """At once."""
        return True

    def stop(self, id: int) -> None:
        """Nothing to stop."""


@dataclass
class Account:
    """What one instance has cost: a rate in dollars an hour from each time on (seconds)."""

    id: int
    label: str
    start: float
    end: float | None = None
    rates: list[tuple[float, float]] = field(default_factory=list)
    traffic_usd: float = 0.0

    def usd(self, now: float) -> float:
        """Exact, up to ``now`` or its end."""
        until = self.end if self.end is not None else now
        ends = [at for at, _ in self.rates[1:]] + [until]
        spans = zip(self.rates, ends, strict=True)
        return sum(rate * (end - at) / 3600 for (at, rate), end in spans) + self.traffic_usd

    def line(self, now: float) -> Row:
        """Its line of ``bill``."""
        prices = [{"from": at, "usd_per_hour": rate} for at, rate in self.rates]
        return {
            "id": self.id, "label": self.label, "start": self.start, "end": self.end,
            "prices": prices, "traffic_usd": self.traffic_usd, "usd": self.usd(now),
        }  # fmt: skip


@dataclass
class _Fault:
    kind: str
    left: int
    path: str | None


class PretendVast:
    """A running server; a context manager."""

    def __init__(
        self,
        *,
        offers: Sequence[Row] = OFFERS,
        machines: MachineBackend | None = None,
        port: int = 0,
        host: str = "127.0.0.1",
    ) -> None:
        self.offers = [dict(row) for row in offers]
        self.machines: MachineBackend = machines or Rows()
        self.instances: dict[int, Row] = {}
        self.requests: list[Row] = []
        self.key: str | None = None
        """The only key that is accepted; None: any."""
        self._accounts: dict[int, Account] = {}
        self._faults: list[_Fault] = []
        self._ssh_keys: list[Row] = []
        self._next = 9001
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._server = _Server((host, port), _handler(self))
        self.url = f"http://{host}:{self._server.server_address[1]}"

    def __enter__(self) -> PretendVast:
        """Serve from now on."""
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop serving and every instance."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        for id in list(self.instances):
            self.machines.stop(id)

    def fault(self, kind: str, *, times: int = 1, path: str | None = None) -> None:
        """The next ``times`` answers, to paths that contain ``path``, go wrong in this way.

        nonsense: 200 and no JSON; silence: no answer ever; lost: it is done, and answered by a 502.
        """
        if kind not in FAULTS:
            raise ValueError(f"no fault {kind!r}; there are {', '.join(FAULTS)}")
        with self._lock:
            self._faults.append(_Fault(kind, times, path))

    def preempt(self, id: int) -> None:
        """Outbid: it stops, and only its disk costs money until somebody destroys it."""
        with self._lock:
            self._stop(self.instances[id])

    def vanish(self, id: int) -> None:
        """The host is lost, and the row with it."""
        with self._lock:
            self._end(id)

    def set_price(self, id: int, usd_per_hour: float) -> None:
        """Another ``dph_total`` from now on: a bid that moved."""
        with self._lock:
            row = self.instances[id]
            row["dph_total"] = usd_per_hour
            row["dph_base"] = usd_per_hour - row["storage_total_cost"]
            self._bill_at(row)

    def use_traffic(self, id: int, *, up_gb: float = 0.0, down_gb: float = 0.0) -> None:
        """Bill so many GB to the instance, at its own prices."""
        with self._lock:
            row = self.instances[id]
            usd = up_gb * row["inet_up_cost"] + down_gb * row["inet_down_cost"]
            self._accounts[id].traffic_usd += usd

    def bill(self) -> list[Row]:
        """A line an instance, ended ones too: id, label, start, end, prices, traffic_usd, usd."""
        with self._lock:
            now = time.time()
            return [account.line(now) for account in self._accounts.values()]

    # What the requests do.

    def answer(self, method: str, url: str, body: Row, key: str | None) -> Answer | None:
        """Status and content for one request; None: no answer at all."""
        parts = urlsplit(url)
        with self._lock:
            fault = self._fault(parts.path)
            if fault == "lost":
                self._route(method, parts.path, dict(parse_qsl(parts.query)), body)
            if fault is not None:
                found: Answer | None = _faulty(fault)
            elif self._refused(parts.path, key):
                found = 401, _error("auth_error", "Invalid user key")
            else:
                found = self._route(method, parts.path, dict(parse_qsl(parts.query)), body)
            self.requests.append({
                "time": time.time(), "method": method, "path": parts.path, "query": parts.query,
                "body": body, "key": key, "code": found and found[0], "fault": fault,
            })  # fmt: skip
        if found is None:
            self._closing.wait()
        return found

    def _refused(self, path: str, key: str | None) -> bool:
        open_to_all = path.startswith(("/api/v0/bundles", "/api/v0/gpu_names"))
        return not open_to_all and (not key or self.key not in (None, key))

    def _fault(self, path: str) -> str | None:
        for fault in self._faults:
            if fault.left > 0 and (fault.path is None or fault.path in path):
                fault.left -= 1
                return fault.kind
        return None

    def _route(self, method: str, path: str, query: dict[str, str], body: Row) -> Answer:
        # vast.ai takes a path with and without the slash at its end.
        route = (method, re.sub(r"/\d+/", "/ID/", path.rstrip("/") + "/"))
        numbers = re.findall(r"/(\d+)(?=/|$)", path)
        id = int(numbers[0]) if numbers else 0
        match route:
            case ("POST", "/api/v0/bundles/"):
                return 200, {"offers": self._search(body)}
            case ("PUT", "/api/v0/search/asks/"):
                return 200, {"offers": self._search(body.get("q", {}))}
            case ("PUT", "/api/v0/asks/ID/"):
                return self._rent(id, body)
            case ("GET", "/api/v0/instances/"):
                return 200, {"instances": [self._view(row) for row in self.instances.values()]}
            case ("GET", "/api/v1/instances/"):
                return 200, self._page(query)
            case ("GET", "/api/v0/instances/ID/"):
                row = self.instances.get(id)
                return 200, {"instances": self._view(row) if row else None}
            case ("PUT" | "DELETE", "/api/v0/instances/ID/" | "/api/v0/instances/bid_price/ID/"):
                return self._change(method, id, body)
            case ("GET", "/api/v0/users/current/invoices/" | "/api/v0/users/me/invoices/"):
                return 200, self._invoices(query)
            case ("GET", "/api/v1/invoices/" | "/api/v0/invoices/"):
                return 200, {"results": [], "count": 0, "total": 0, "next_token": None}
            case ("GET", "/api/v0/charges/"):
                return 200, self._charges(query)
            case ("GET", "/api/v0/users/current/"):
                return 200, {"id": 4711, "username": "pretend", "credit": 25.0, "balance": 0.0}
            case ("GET", "/api/v0/gpu_names/unique/"):
                return 200, {"gpu_names": sorted({row["gpu_name"] for row in self.offers})}
            case ("GET", "/api/v0/ssh/"):
                return 200, self._ssh_keys
            case ("POST", "/api/v0/ssh/"):
                key = {"id": len(self._ssh_keys) + 1, "public_key": body.get("ssh_key")}
                self._ssh_keys.append(key)
                return 200, {"success": True, "key": key}
        return 404, _error("not_found", f"no such endpoint: {method} {path}")

    def _search(self, query: Row) -> list[Row]:
        disk = float(query.get("allocated_storage") or 5.0)
        found = [_priced(row, disk) for row in self.offers if _matches(row, query)]
        if query.get("type") == "bid":
            found = [_priced({**r, "dph_base": r["min_bid"], "is_bid": True}, disk) for r in found]
        for name, direction in reversed(query.get("order") or [["score", "desc"]]):
            found.sort(key=lambda row: row[name], reverse=direction == "desc")
        return found[: query.get("limit")]

    def _rent(self, ask: int, body: Row) -> Answer:
        chosen = next((row for row in self.offers if row["id"] == ask), None)
        if chosen is None or not chosen["rentable"]:
            return 404, _error("no_such_ask", f"Instance type by id {ask} is not available.")
        bid = body.get("price")
        if bid is not None and bid < chosen["min_bid"]:
            return 400, _error("bid_too_low", f"the lowest bid is {chosen['min_bid']}")
        id, disk = self._next, float(body.get("disk") or 10.0)
        self._next += 1
        base = chosen["dph_base"] if bid is None else bid
        row = _priced({**chosen, "dph_base": base, "is_bid": bid is not None}, disk)
        row |= {
            "id": id, "label": body.get("label"), "image_uuid": body.get("image"),
            "disk_space": disk, "onstart": body.get("onstart"), "start_date": time.time(),
            "extra_env": [list(pair) for pair in (body.get("env") or {}).items()], "ports": {},
            "local_ipaddrs": "127.0.0.1", "status_msg": "", "rented": True, "end_date": None,
        }  # fmt: skip
        self.instances[id] = row
        self._accounts[id] = Account(id, row["label"] or "", row["start_date"])
        self._start(row)
        return 200, {"success": True, "new_contract": id}

    def _change(self, method: str, id: int, body: Row) -> Answer:
        row = self.instances.get(id)
        if row is None:
            return 404, _error("no_such_instance", f"Instance {id} not found.")
        if method == "DELETE":
            self._end(id)
        elif body.get("state") == "stopped":
            self._stop(row)
        elif body.get("state") == "running" and row["intended_status"] != "running":
            self._start(row)
        if "label" in body:
            row["label"] = self._accounts[id].label = body["label"]
        if (price := body.get("price")) is not None:
            self.set_price(id, price + row["storage_total_cost"])
        return 200, {"success": True}

    def _start(self, row: Row) -> None:
        row |= {"actual_status": "loading", "cur_state": "running", "intended_status": "running"}
        row |= self.machines.start(row)
        self._bill_at(row)

    def _stop(self, row: Row) -> None:
        self.machines.stop(row["id"])
        row |= {"actual_status": "exited", "cur_state": "stopped", "intended_status": "stopped"}
        self._bill_at(row)

    def _end(self, id: int) -> None:
        self.machines.stop(id)
        self.instances.pop(id)
        self._accounts[id].end = time.time()

    def _bill_at(self, row: Row) -> None:
        """From now on, what the row says: a stopped one pays for its disk alone."""
        running = row["intended_status"] == "running"
        rate = row["dph_total"] if running else row["storage_total_cost"]
        account = self._accounts[row["id"]]
        account.rates.append((time.time() if account.rates else account.start, rate))

    def _view(self, row: Row) -> Row:
        if row["actual_status"] == "loading" and self.machines.ready(row["id"]):
            row["actual_status"] = "running"
        return row

    def _page(self, query: dict[str, str]) -> Row:
        limit, after = int(query.get("limit", PAGE)), int(query.get("after_token") or 0)
        ids = sorted(id for id in self.instances if id > after)
        rows = [self._view(self.instances[id]) for id in ids[:limit]]
        token = str(ids[limit - 1]) if len(ids) > limit else None
        return {
            "success": True, "instances": rows, "next_token": token,
            "total_instances": len(self.instances),
        }  # fmt: skip

    def _invoices(self, query: dict[str, str]) -> Row:
        since, until = float(query.get("sdate", 0)), float(query.get("edate", time.time()))
        now = time.time()
        rows = [
            {
                "type": "charge", "instance_id": one.id, "timestamp": one.end or now,
                "description": f"Instance {one.id} {one.label}", "amount": f"{one.usd(now):.6f}",
                "quantity": f"{((one.end or now) - one.start) / 3600:.6f}",
                "rate": f"{one.rates[-1][1]:.6f}",
            }
            for one in self._accounts.values()
            if int(one.start) <= until and (one.end or now) >= since
        ]  # fmt: skip
        return {"invoices": rows, "current": {"charges": 0.0, "service_fee": 0.0, "total": 0.0}}

    def _charges(self, query: dict[str, str]) -> Row:
        """GET /api/v0/charges/: each instance once, with what it has cost until now."""
        day = json.loads(query.get("select_filters", "{}")).get("day", {})
        now = time.time()
        rows = [
            {
                "type": "instance", "source": f"instance-{one.id}", "start": one.start,
                "end": one.end or now, "amount": one.usd(now), "description": one.label,
                "metadata": {"instance_id": one.id, "label": one.label}, "items": [],
            }
            for one in self._accounts.values()
            if int(one.start) <= day.get("lte", now) and (one.end or now) >= day.get("gte", 0)
        ]  # fmt: skip
        limit, after = int(query.get("limit", 20)), int(query.get("after_token") or 0)
        page = rows[after : after + limit]
        token = str(after + limit) if after + limit < len(rows) else None
        return {"results": page, "count": len(page), "total": len(rows), "next_token": token}


def _matches(row: Row, query: Row) -> bool:
    """Whether an offer is in a search; a filter that vast.ai does not know either finds nothing."""
    for name, conditions in query.items():
        if name in _SETTINGS and not isinstance(conditions, dict):
            continue
        value = row["geolocation"][-2:] if name == "geolocation" else row.get(name)
        for compare, wanted in conditions.items():
            if isinstance(value, float | int) and isinstance(wanted, str):
                wanted = float(wanted)
            if value is None or not _COMPARE[compare](value, wanted):
                return False
    return True


def _error(error: str, message: str) -> Row:
    return {"success": False, "error": error, "msg": message}


def _faulty(kind: str) -> Answer | None:
    if kind == "silence":
        return None
    if kind == "nonsense":
        return 200, "<html>Service temporarily unavailable</html>"
    return 502 if kind == "lost" else int(kind), _error(
        f"pretended_{kind}", "a fault that a test asked for"
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed or lost patience is no error of the server's."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _handler(vast: PretendVast) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            key = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
            key = key or dict(parse_qsl(urlsplit(self.path).query)).get("api_key", "")
            found = vast.answer(self.command, self.path, json.loads(text or b"{}"), key or None)
            if found is None:
                self.close_connection = True
                return
            code, content = found
            body = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(code)
            kind = "text/html" if isinstance(content, str) else "application/json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    return Handler
