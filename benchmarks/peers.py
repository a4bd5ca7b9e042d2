"""Install the libraries that the benchmarks compare with, each in its own environment.

    python benchmarks/peers.py install pfl flwr drjax blazefl [--into outputs/peers]

The script uses uv if it is available, and venv and pip otherwise. Every library is optional: ``speed.py`` skips what is
not installed. Torch is installed in the version of this Python; its CUDA build has several GB.
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
    """A library: its requirements, and the minor versions of Python 3 on which it is known to run."""

    requirements: tuple[str, ...]
    minors: range
    torch: bool = True


PEERS = {
    "pfl": Peer(("pfl==0.6.0",), range(10, 13)),
    "flwr": Peer(("flwr[simulation]==1.41.0",), range(10, 14)),
    "blazefl": Peer(("blazefl==2.0.3",), range(12, 14)),  # 3.x needs a Python without the global interpreter lock
    "drjax": Peer(("drjax==0.2.1", "jax"), range(12, 15), torch=False),
}


def interpreter(minors: range) -> str | None:
    """Return a working Python 3 of one of these minor versions: this one, one on the path, or one of pyenv."""
    if sys.version_info.minor in minors:
        return sys.executable
    for minor in minors:
        pyenv = glob(str(Path.home() / f".pyenv/versions/3.{minor}.*/bin/python"))
        for python in (shutil.which(f"python3.{minor}"), *pyenv):
            if python and subprocess.run([python, "-c", "import venv"], capture_output=True).returncode == 0:
                return python
    return None


def install(name: str, folder: Path) -> None:
    """Install a library into ``folder / name``."""
    peer = PEERS[name]
    python = interpreter(peer.minors)
    uv = shutil.which("uv")
    home = folder / name
    known = f"3.{peer.minors[0]} to 3.{peer.minors[-1]}"
    if python is None and uv is None:
        print(f"{name}: skipped, it needs a Python {known} and none was found.")
        return
    wanted = list(peer.requirements)
    if peer.torch:
        wanted.append(f"torch=={version('torch').split('+')[0]}")
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
