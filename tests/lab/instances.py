"""Instances that can be logged into: namespaces of this machine with a real sshd."""

# ruff: noqa: A001, A002 - an instance's number is called `id` at vast.ai

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab.bake import Image
from tests.lab.network import GATEWAY, address, connect

HERE = Path(__file__).parent
_NAMES = {
    "H100 SXM": "NVIDIA H100 80GB HBM3",
    "H100 PCIE": "NVIDIA H100 PCIe",
    "RTX 5090": "NVIDIA GeForce RTX 5090",
}
"""What nvidia-smi calls a GPU, by vast.ai's name of it."""
_CLOCKS = {"sm": "1980", "graphics": "1980", "mem": "2619", "memory": "2619", "video": "1545"}


@dataclass
class Namespaces:
    """Machines for ``PretendVast``; ``variables`` is what every login in one finds set."""

    image: Image
    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    _running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, instance: Mapping[str, Any]) -> dict[str, Any]:
        """Its namespaces exist when this returns; the sshd answers a moment later."""
        id = int(instance["id"])
        folder, ip = self.folder / str(id), address(id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "onstart.sh").write_text(f"{instance['onstart'] or 'true'}\n")
        (folder / "nvidia-smi").write_text(_nvidia_smi(instance))
        (folder / "sshd_config").write_text(self._sshd_config(ip))
        command = ["unshare", "--mount", "--pid", "--net", "--uts", "--fork", "--kill-child"]
        command += ["bash", str(HERE / "instance.sh"), str(folder), str(self.image.folder)]
        with (folder / "console.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, f"vast-{id}", ip, GATEWAY],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._running[id] = process
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != b"up\n":
            said = (folder / "console.log").read_text()
            raise RuntimeError(f"instance {id} did not start: {said}")
        connect(f"vast{id}", process.pid, ip)
        process.stdin.write(b"\n")
        process.stdin.close()
        return {
            "ssh_host": ip, "ssh_port": 22, "public_ipaddr": ip, "local_ipaddrs": ip,
            "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "22"}]},
        }  # fmt: skip

    def ready(self, id: int) -> bool:
        """Whether its sshd greets."""
        try:
            with socket.create_connection((address(id), 22), 0.5) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def stop(self, id: int) -> None:
        """Power off: --kill-child takes its first process along, and that one all others."""
        process = self._running.pop(id, None)
        if process is not None:
            process.kill()
            process.wait()

    def console(self, id: int) -> str:
        """What it printed while it started."""
        path = self.folder / str(id) / "console.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def clear(self) -> None:
        """Forget earlier instances' files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sshd_config(self, ip: str) -> str:
        variables = " ".join(f'"{name}={value}"' for name, value in self.variables.items())
        lines = [
            f"ListenAddress {ip}:22", "HostKey /run/host_key", "PidFile /run/sshd.pid",
            "PasswordAuthentication no", "UsePAM no", "StrictModes no", "MaxSessions 200",
            "MaxStartups 200", "Subsystem sftp internal-sftp",
        ]  # fmt: skip
        if variables:
            lines.append(f"SetEnv {variables}")
        return "\n".join(lines) + "\n"


def _nvidia_smi(instance: Mapping[str, Any]) -> str:
    """The program, with the offer's GPU written into it."""
    host, power = instance["machine_id"], f"{instance['gpu_max_power']:.2f}"
    gpu = {
        "name": _NAMES[instance["gpu_name"]], "gpu_name": _NAMES[instance["gpu_name"]],
        "index": "0", "count": "1", "uuid": f"GPU-00000000-0000-0000-0000-{host:012d}",
        "serial": f"{host:013d}", "pci.bus_id": "00000000:01:00.0", "pstate": "P0",
        "driver_version": str(instance["driver_version"]), "temperature.gpu": "31",
        "compute_cap": f"{instance['compute_cap'] / 100:.1f}", "ecc.mode.current": "Enabled",
        "memory.total": str(instance["gpu_ram"]), "memory.used": "0",
        "memory.free": str(instance["gpu_ram"]), "utilization.gpu": "0", "power.draw": "70.00",
        "persistence_mode": "Enabled", "clocks_throttle_reasons.active": "0x0000000000000000",
    }  # fmt: skip
    for limit in ("limit", "max_limit", "default_limit", "enforced.power.limit"):
        gpu[limit if "." in limit else f"power.{limit}"] = power
    for clock, value in _CLOCKS.items():
        gpu[f"clocks.{clock}"] = gpu[f"clocks.max.{clock}"] = value
        gpu[f"clocks.current.{clock}"] = value
    text = (HERE / "nvidia_smi.py").read_text()
    return re.sub(r"^GPU: .*$", f"GPU = {gpu!r}", text, count=1, flags=re.MULTILINE)
