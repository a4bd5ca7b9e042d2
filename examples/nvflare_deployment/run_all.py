"""Run the digits federation on NVFlare on this machine, between provisioned sites, and compare it with the simulator.

    python examples/nvflare_deployment/run_all.py --folder /tmp/nvflare-deployment

Provisions a server and three sites with certificates of their own, starts them, submits one job after another, waits,
compares the model with that of the simulator, and stops what it has started. `--kill site` kills a site in round 2;
`--kill server` kills the server's job after round 2 and submits it again. `--engine simulator` runs the same file in
NVFlare's own simulator, without certificates.
"""

from __future__ import annotations

import argparse
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
from nvflare.recipe import ProdEnv, SimEnv

from lightning_fedhaw.deploy import rounds_done

HERE = Path(__file__).parent.resolve()
ADMIN = "admin@example.org"

PROJECT = """\
api_version: 3
name: digits
description: Three sites train a classifier of digits.
participants:
  - {{name: localhost, type: server, org: example, fed_learn_port: {port}, admin_port: {port}, default_host: localhost}}
  - {{name: site-0, type: client, org: example}}
  - {{name: site-1, type: client, org: example}}
  - {{name: site-2, type: client, org: example}}
  - {{name: admin@example.org, type: admin, org: example, role: project_admin}}
builders:
  - path: nvflare.lighter.impl.workspace.WorkspaceBuilder
  - path: nvflare.lighter.impl.static_file.StaticFileBuilder
    args: {{config_folder: config, scheme: tcp}}
  - path: nvflare.lighter.impl.cert.CertBuilder
  - path: nvflare.lighter.impl.signature.SignatureBuilder
"""


class Deployment:
    """A server and three sites on this machine, each with its startup kit.

    Args:
        folder: The folder of startup kits, logs and checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "project.yml").write_text(PROJECT.format(port=self.port))
        command = [str(Path(sys.executable).parent / "nvflare"), "provision", "-p", "project.yml", "-w", "workspace"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        self.kits = folder / "workspace" / "digits" / "prod_00"

    def start(self) -> None:
        """Start the server and the sites."""
        self.spawn("localhost")
        wait("the server", lambda: is_open(self.port), 600)
        for site in ("site-0", "site-1", "site-2"):
            self.spawn(site)
        for site in ("site-0", "site-1", "site-2"):
            log = self.folder / f"{site}.log"
            wait(site, lambda log=log: "Successfully registered" in log.read_text(), 600)

    def spawn(self, name: str) -> None:
        """Start a participant in a process group of its own, so that it can be stopped with its children."""
        log = (self.folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            ["bash", str(self.kits / name / "startup" / "sub_start.sh"), "--once"],
            stdout=log,
            stderr=log,
            start_new_session=True,
            # The scripts of the kits call `python3`.
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        )

    def kill_server_job(self) -> None:
        """Kill the server's process of a job; the server itself stays."""
        for child in psutil.Process(self.processes["localhost"].pid).children(recursive=True):
            if any(argument.endswith(".runner_process") for argument in child.cmdline()):
                child.kill()

    def kill(self, name: str) -> None:
        """Kill a participant with all its processes at once, as if its machine had failed."""
        process = psutil.Process(self.processes.pop(name).pid)
        for member in [process, *process.children(recursive=True)]:
            member.kill()

    def stop(self) -> None:
        """Stop what was started, the sites first."""
        for name in sorted(self.processes, reverse=True):
            process = self.processes[name]
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        self.processes.clear()


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def is_open(port: int) -> bool:
    """Return whether somebody listens on a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait(what: str, is_there: Callable[[], bool], timeout: float) -> None:
    """Wait until something is there."""
    deadline = time.monotonic() + timeout
    while not is_there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {timeout:.0f} s")
        time.sleep(1.0)


def submit(deployment: Deployment) -> Any:
    """Submit the job, once all sites have joined."""
    import digits_federation

    from lightning_fedhaw.deploy.nvflare import collab_recipe

    recipe = collab_recipe("digits", digits_federation, min_sites=2)
    environment = ProdEnv(startup_kit_location=str(deployment.kits / ADMIN), username=ADMIN, login_timeout=60.0)
    return recipe.execute(environment)


def compare(path: Path, rule: str) -> float:
    """Return the largest difference between the deployed model and that of the simulator."""
    from digits_federation import SITES, DigitClassifier, make_trainer, samples_of

    from lightning_fedhaw import FederatedDataModule

    deployed = torch.load(path, weights_only=True)["state_dict"]
    model = DigitClassifier()
    make_trainer(rule).fit(model, FederatedDataModule([samples_of(site) for site in SITES], batch_size=16))
    return max(float((deployed[name] - value).abs().max()) for name, value in model.state_dict().items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder for startup kits, logs, checkpoints")
    parser.add_argument("--rule", default="FedHAW", choices=["FedHAW", "FedAvg", "SCAFFOLD"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", default="provisioned", choices=["provisioned", "simulator"])
    parser.add_argument("--kill", choices=["site", "server"], help="what is killed")
    args = parser.parse_args()
    folder = args.folder.resolve()
    # Read by `digits_federation.py` here and, because they inherit it, in the processes of server and sites.
    os.environ.update(
        DIGITS_RULE=args.rule, DIGITS_ROUNDS=str(args.rounds), DIGITS_FOLDER=str(folder), OMP_NUM_THREADS="1"
    )
    sys.path.insert(0, str(HERE))
    server_folder = folder / "server" / args.rule
    begin = time.monotonic()
    if args.engine == "simulator":
        import digits_federation

        from lightning_fedhaw.deploy.nvflare import collab_recipe

        recipe = collab_recipe("digits", digits_federation, min_sites=2)
        recipe.execute(SimEnv(clients=list(digits_federation.SITES), workspace_root=str(folder / "workspace")))
    else:
        deployment = Deployment(folder)
        try:
            deployment.start()
            run = submit(deployment)
            if args.kill == "site":
                wait("round 1", lambda: rounds_done(server_folder) >= 1, 600)
                deployment.kill("site-1")
                print("site-1 was killed in round 2: the model is that of a federation in which it was absent")
            elif args.kill == "server":
                wait("round 2", lambda: rounds_done(server_folder) >= 2, 600)
                deployment.kill_server_job()
                run.get_result()
                run = submit(deployment)
            # NVFlare waits for the end of a job at the killed site, which does not come.
            wait("the last round", lambda: rounds_done(server_folder) >= args.rounds, 3600)
            if args.kill != "site":
                run.get_result()
        finally:
            deployment.stop()
    seconds = time.monotonic() - begin
    if rounds_done(server_folder) < args.rounds:
        raise SystemExit(f"Only {rounds_done(server_folder)} rounds are done: see the logs in {folder}")
    difference = compare(server_folder / "last.ckpt", args.rule)
    print(
        f"{args.rule}: {args.rounds} rounds in {seconds:.0f} s, difference to the simulator {difference:.3g}",
        flush=True,
    )


if __name__ == "__main__":
    main()
