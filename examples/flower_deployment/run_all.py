"""Run the digits federation on Flower on this machine, with TLS and registered keys, and compare it with the simulator.

    python examples/flower_deployment/run_all.py --folder /tmp/flower-deployment

Starts a SuperLink and three SuperNodes, runs one federation after another, waits, compares the model with that of
the simulator, and stops what it has started. `--kill site` kills a SuperNode in round 2 and starts it again; `--kill
server` kills the server app after round 2 and submits it again. Flower starts a process for every message, so a round
takes a minute or more on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

HERE = Path(__file__).parent.resolve()
sys.path.insert(0, str(HERE))

from digits_federation.federation import NUM_SITES, DigitClassifier, make_trainer, samples_of  # noqa: E402

from lightning_fedhaw import FederatedDataModule  # noqa: E402
from lightning_fedhaw.deploy import rounds_done  # noqa: E402

BIN = Path(sys.executable).parent


class Deployment:
    """A SuperLink and three SuperNodes on this machine.

    Args:
        folder: The folder of certificates, keys, logs and checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }
        make_certificates(folder)
        (folder / "flwr").mkdir(exist_ok=True)
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )

    def start(self) -> None:
        """Start everything, and register the keys of the sites."""
        self.spawn(
            "superlink",
            "flower-superlink",
            *("--port", str(self.port), "--database", str(self.folder / "superlink.db")),
            *("--ssl-ca-certfile", str(self.folder / "ca.crt"), "--ssl-certfile", str(self.folder / "server.pem")),
            *("--ssl-keyfile", str(self.folder / "server.key")),
            "--enable-supernode-auth",
            # Nothing is downloaded: the packages are those of this environment.
            "--disable-runtime-dependency-installation",
        )
        wait("the SuperLink", lambda: is_open(self.port), 120)
        for site in range(NUM_SITES):
            self.flwr("supernode", "register", str(self.folder / f"site-{site}.pub"), "--name", f"site-{site}")
            self.start_site(site)

    def start_site(self, site: int) -> None:
        """Start the SuperNode of a site."""
        memory = self.folder / f"memory-{site}"
        self.spawn(
            f"site-{site}",
            "flower-supernode",
            *("--superlink", f"127.0.0.1:{self.port}", "--root-certificates", str(self.folder / "ca.crt")),
            *("--auth-supernode-private-key", str(self.folder / f"site-{site}")),
            *("--port", str(free_port()), "--node-config", f'site={site} memory="{memory}"'),
        )

    def spawn(self, name: str, program: str, *arguments: str) -> None:
        """Start a process in a group of its own, so that it can be stopped with its children."""
        log = (self.folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            [str(BIN / program), *arguments], env=self.environment, stdout=log, stderr=log, start_new_session=True
        )

    def kill(self, name: str) -> None:
        """Kill a process and its children at once."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def kill_server_app(self) -> None:
        """Kill the process of the server app, which is a child of the SuperLink."""
        for child in psutil.Process(self.processes["superlink"].pid).children(recursive=True):
            if any("flwr-serverapp" in argument for argument in child.cmdline()):
                child.kill()

    def stop(self) -> None:
        """Stop what was started, the SuperNodes first."""
        for name in sorted(self.processes):
            process = self.processes[name]
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        self.processes.clear()

    def flwr(self, *arguments: str) -> Any:
        """Call Flower's command, and return what it prints as JSON."""
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments, "--format", "json"],
            env=self.environment,
            cwd=HERE,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"`flwr {' '.join(arguments)}` failed: {done.stdout}{done.stderr}")
        return json.loads(done.stdout[done.stdout.index("{") :])

    def submit(self, rule: str, rounds: int) -> str:
        """Submit a run, and return its number."""
        config = f'rule="{rule}" rounds={rounds} folder="{self.folder / "server"}"'
        return str(self.flwr("run", ".", "here", "--run-config", config)["run-id"])

    def status(self, run: str) -> str:
        """Return the status of a run; nothing while the SuperLink is too busy to say."""
        for entry in self.flwr("list", "here", "--run-id", run).get("runs", []):
            return str(entry["status"])
        return "unknown"

    def server_folder(self, rule: str) -> Path:
        """Return the folder of the server's checkpoints."""
        return self.folder / "server" / rule

    def await_end(self, run: str) -> None:
        """Wait until a run is over, and fail if it has failed."""
        wait(f"run {run}", lambda: self.status(run).startswith("finished"), 3600, every=15.0)
        status = self.status(run)
        if status != "finished:completed":
            raise RuntimeError(f"Run {run} is {status}: see {self.folder / 'superlink.log'}")


def make_certificates(folder: Path) -> None:
    """Make a certificate authority, the server's certificate for this machine, and a key for each site."""
    folder.mkdir(parents=True, exist_ok=True)
    authority_key = ec.generate_private_key(ec.SECP384R1())
    authority = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Example authority")])
    constraints = x509.BasicConstraints(ca=True, path_length=None)
    certificate = signed(authority, authority, authority_key.public_key(), authority_key, constraints)
    (folder / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    server_key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    names = x509.SubjectAlternativeName(addresses)
    certificate = signed(name, authority, server_key.public_key(), authority_key, names)
    (folder / "server.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    write_key(folder / "server.key", server_key, serialization.PrivateFormat.PKCS8)
    for site in range(NUM_SITES):
        key = ec.generate_private_key(ec.SECP384R1())
        write_key(folder / f"site-{site}", key, serialization.PrivateFormat.OpenSSH)
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        (folder / f"site-{site}.pub").write_bytes(public + b"\n")


def signed(name: x509.Name, issuer: x509.Name, public_key: Any, issuer_key: Any, extension: Any) -> x509.Certificate:
    """Sign a certificate that is valid for a day."""
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(public_key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(
        now + datetime.timedelta(days=1)
    )
    key_identifier = x509.SubjectKeyIdentifier.from_public_key(public_key)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    builder = builder.add_extension(extension, critical=False).add_extension(key_identifier, critical=False)
    return builder.add_extension(authority, critical=False).sign(issuer_key, hashes.SHA384())


def write_key(path: Path, key: Any, form: serialization.PrivateFormat) -> None:
    """Write a private key that only its owner can read."""
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def is_open(port: int) -> bool:
    """Return whether somebody listens on a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait(what: str, is_there: Callable[[], bool], timeout: float, every: float = 1.0) -> None:
    """Wait until something is there."""
    deadline = time.monotonic() + timeout
    while not is_there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {timeout:.0f} s")
        time.sleep(every)


def simulated(rule: str, rounds: int) -> dict[str, torch.Tensor]:
    """Run the same federation in the simulator, and return its model."""
    model = DigitClassifier()
    data = FederatedDataModule([samples_of(site) for site in range(NUM_SITES)], batch_size=16)
    make_trainer(rule, rounds).fit(model, data)
    return model.state_dict()


def compare(deployment: Deployment, rule: str, rounds: int) -> float:
    """Return the largest difference between the deployed model and the simulated one."""
    path = deployment.server_folder(rule) / "last.ckpt"
    deployed = torch.load(path, weights_only=True)["state_dict"]
    expected = simulated(rule, rounds)
    return max(float((deployed[name] - value).abs().max()) for name, value in expected.items())


def wait_for_rounds(deployment: Deployment, rule: str, rounds: int) -> None:
    """Wait until the checkpoint of a round is written."""
    wait(f"round {rounds}", lambda: rounds_done(deployment.server_folder(rule)) >= rounds, 3600)


def kill_site(deployment: Deployment, rule: str) -> None:
    """Kill a SuperNode in round 2, and start it again with its key after that round."""
    wait_for_rounds(deployment, rule, 1)
    deployment.kill("site-1")
    print("site-1 was killed in round 2: the model is that of a federation in which it was absent")
    wait_for_rounds(deployment, rule, 2)
    deployment.start_site(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder for certificates, logs, checkpoints")
    parser.add_argument("--rules", nargs="+", default=["FedHAW", "FedAvg", "SCAFFOLD"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kill", choices=["site", "server"], help="what is killed in the last of the runs")
    args = parser.parse_args()
    deployment = Deployment(args.folder.resolve())
    try:
        deployment.start()
        for rule in args.rules:
            begin = time.monotonic()
            run = deployment.submit(rule, args.rounds)
            if args.kill == "site" and rule == args.rules[-1]:
                kill_site(deployment, rule)
            elif args.kill == "server" and rule == args.rules[-1]:
                wait_for_rounds(deployment, rule, 2)
                deployment.kill_server_app()
                run = deployment.submit(rule, args.rounds)
            deployment.await_end(run)
            seconds = time.monotonic() - begin
            difference = compare(deployment, rule, args.rounds)
            print(f"{rule}: {args.rounds} rounds in {seconds:.0f} s, difference to the simulator {difference:.3g}")
    finally:
        deployment.stop()


if __name__ == "__main__":
    main()
