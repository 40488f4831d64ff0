"""Makes what the lab needs and keeps it in .lab/: Debian packages, wheels, the instances' /root.

All of it is fetched once, with the network of this machine; a second ``make lab`` finds it. It is
made again when the project's dependencies, SkyPilot's version or this file change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.services import debian
from tests.services.proxied import CHECKOUT

LAB = CHECKOUT / ".lab"
WHEELS_AT = "/opt/wheelhouse"
"""Where an instance sees the wheels."""
_DEBIAN = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "rsync": "rsync",
    "ip": "iproute2",
    "sudo": "sudo",
    "curl": "curl",
    "patch": "patch",
    "ps": "procps",
    "openssl": "openssl",
    "cc": "build-essential",
    "git": "git",
}
"""Program -> its Debian package: what the lab runs, and what SkyPilot expects in an instance."""
_CPU_TORCH = "https://download.pytorch.org/whl/cpu"
# SkyPilot's own words of what it installs in an instance (sky/skylet/constants.py).
_RUNTIME = ("setuptools<70", "click<8.3.0", "ray[default]==2.9.3", "pydantic-core==2.41.1")


@dataclass(frozen=True)
class Image:
    """What instances are made of."""

    folder: Path

    @property
    def root(self) -> Path:
        """Their /root: uv, and SkyPilot's runtime as its own machine images carry it."""
        return self.folder / "root"

    @property
    def wheels(self) -> Path:
        """Wheels of all that a task's setup installs."""
        return self.folder / "wheels"

    @property
    def python(self) -> Path:
        """A Python of this machine with the same wheels, for runs that nobody disturbs."""
        return self.folder / "reference" / "bin" / "python"


def bake() -> Image:
    """Install and fetch what is missing. Needs root, and the network where something is missing."""
    _install_packages()
    image = Image(LAB / f"image-{_key()}")
    if image.folder.exists():
        return image
    for old in LAB.glob("image-*"):
        shutil.rmtree(old)
    # The reference's scripts know their own path: it is made in its place, the mark comes last.
    making = Image(LAB / f"{image.folder.name}.making")
    _say("fetching the wheels that a task installs")
    _fetch_wheels(making)
    _say("making the instances' /root with SkyPilot's runtime")
    _make_root(making)
    _say("making the Python of undisturbed runs")
    _make_reference(making)
    making.folder.rename(image.folder)
    return image


def _key() -> str:
    """Another one if anything that goes into the image is another."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    texts = [(CHECKOUT / "constraints.txt").read_text(), Path(__file__).read_text()]
    told = "\n".join([*needed, version("skypilot"), sys.version, *texts])
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _install_packages() -> None:
    missing = debian.missing(_DEBIAN)
    if missing:
        _say(f"installing {' '.join(missing)}")
    # The lab starts an sshd of its own in each instance; this machine needs none.
    if "openssh-server" in debian.install(_DEBIAN) and Path("/run/systemd/system").exists():
        _run("systemctl", "disable", "--quiet", "ssh")


def _fetch_wheels(image: Image) -> None:
    """The project's core and what builds it; torch for CPUs where its index can be reached."""
    image.wheels.mkdir(parents=True)
    options = ["-qq", "--wheel-dir", str(image.wheels), "-c", "constraints.txt", "--prefer-binary"]
    wheel = [sys.executable, "-m", "pip", "wheel", *options]
    torch = ["--no-deps", "--retries", "1", "--extra-index-url", _CPU_TORCH, "torch"]
    _run(*wheel, *torch, cwd=CHECKOUT)
    others = [".", "pip", "setuptools>=77", "wheel", "uv"]
    _run(*wheel, "--find-links", str(image.wheels), *others, cwd=CHECKOUT)
    for own in image.wheels.glob("tessera-*.whl"):  # a task builds it from the code it was sent
        own.unlink()


def _make_root(image: Image) -> None:
    """Under the path that it will have: a virtual environment cannot be moved."""
    settings = image.root / ".config" / "uv"
    settings.mkdir(parents=True)
    (settings / "uv.toml").write_text(f'no-index = true\nfind-links = ["{WHEELS_AT}"]\n')
    bin_folder = image.root / ".local" / "bin"
    bin_folder.mkdir(parents=True)
    shutil.copy(_uv(image), bin_folder / "uv")
    sky = version("skypilot")
    runtime = " ".join(f"'{package}'" for package in (*_RUNTIME, f"skypilot[vast,remote]=={sky}"))
    # Ray 2.9.3 exists for Python 3.11 and older; uv fetches one if this machine has none.
    script = f"""
        mount --bind '{image.root}' /root
        export HOME=/root UV_NO_CONFIG=1
        /root/.local/bin/uv venv -q --no-index --find-links '{image.wheels}' --seed \
            --python 3.11 /root/skypilot-runtime
        /root/skypilot-runtime/bin/python -m pip install -q --no-cache-dir {runtime}
    """
    _run("unshare", "--mount", "bash", "-euc", script, cwd=Path("/"))


def _make_reference(image: Image) -> None:
    uv = str(_uv(image))
    options = ["--no-config", "--no-index", "--find-links", str(image.wheels), "-q"]
    folder = image.python.parents[1]
    _run(uv, "venv", *options, "--python", sys.executable, "--relocatable", str(folder))
    install = [uv, "pip", "install", *options, "--python", str(image.python)]
    _run(*install, "-c", "constraints.txt", ".", cwd=CHECKOUT)


def _uv(image: Image) -> Path:
    """The program, out of its wheel."""
    tools = image.folder / "tools"
    if not tools.exists():
        options = ["--no-index", "--find-links", str(image.wheels), "--target", str(tools)]
        _run(sys.executable, "-m", "pip", "install", "-q", *options, "uv")
    return tools / "bin" / "uv"


def _run(*command: str, cwd: Path | None = None) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    environment.pop("PYTHONPATH", None)  # a pip would take this checkout for an installed package
    subprocess.run(command, cwd=cwd, env=environment, check=True, stdin=subprocess.DEVNULL)


def _say(text: str) -> None:
    print(f"lab: {text}", flush=True)
