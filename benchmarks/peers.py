"""Environments for the libraries we are measured beside, one each, from the package registry.

    python benchmarks/peers.py install pfl flwr drjax blazefl [--into outputs/peers]

Uses uv where it is there, else venv and pip. Each is optional: ``speed.py`` leaves out what is not installed. Torch is
installed in the version this Python has; it is large (several GB in its CUDA build).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from glob import glob
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Peer:
    """A library: what to install, and the minor versions of Python 3 it is known to run on."""

    requirements: tuple[str, ...]
    minors: range
    torch: bool = True


PEERS = {
    "pfl": Peer(("pfl==0.6.0",), range(10, 13)),
    "flwr": Peer(("flwr[simulation]==1.41.0",), range(10, 14)),
    "blazefl": Peer(("blazefl==2.0.3",), range(12, 14)),  # 3.x wants a Python without the global lock
    "drjax": Peer(("drjax==0.2.1", "jax"), range(12, 15), torch=False),
}


def interpreter(minors: range) -> str | None:
    """A Python 3 of one of these minor versions that runs: this one, one on the path, or one of pyenv's."""
    if sys.version_info.minor in minors:
        return sys.executable
    for minor in minors:
        pyenv = glob(str(Path.home() / f".pyenv/versions/3.{minor}.*/bin/python"))
        for python in (shutil.which(f"python3.{minor}"), *pyenv):
            if python and subprocess.run([python, "-c", "import venv"], capture_output=True).returncode == 0:
                return python
    return None


def install(name: str, folder: Path) -> None:
    peer = PEERS[name]
    python, uv, home = interpreter(peer.minors), shutil.which("uv"), folder / name
    known = f"3.{peer.minors[0]} to 3.{peer.minors[-1]}"
    if python is None and uv is None:
        print(f"{name}: skipped, it needs a Python {known} and none was found.")
        return
    wanted = [*peer.requirements, *([f"torch=={version('torch').split('+')[0]}"] if peer.torch else [])]
    if uv:
        subprocess.run([uv, "venv", "--python", python or f"3.{peer.minors[-1]}", home], check=True)
        subprocess.run([uv, "pip", "install", "--python", home / "bin" / "python", *wanted], check=True)
    else:
        subprocess.run([python, "-m", "venv", home], check=True)
        subprocess.run([home / "bin" / "python", "-m", "pip", "install", "--quiet", *wanted], check=True)
    print(f"{name}: {', '.join(wanted)} in {home}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["install"])
    parser.add_argument("peers", nargs="+", choices=list(PEERS))
    parser.add_argument("--into", type=Path, default=Path("outputs/peers"))
    args = parser.parse_args()
    for name in args.peers:
        try:
            install(name, args.into.absolute())
        except subprocess.CalledProcessError as error:
            print(f"{name}: not installed, a command ended with code {error.returncode}.")


if __name__ == "__main__":
    main()
