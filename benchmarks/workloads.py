"""Define the workloads that every contender runs: data, model and rounds, and the format of the reports.

A contender is a script that receives one :class:`Job` as JSON and prints one JSON line. All contenders use the same
samples, split, cohorts and initial model, from a file that :func:`prepare` writes. Torch is imported inside functions,
because not every contender has it installed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Inputs [samples, ...], labels [samples], and the client of each sample [samples]."""

MNIST_SIZES = (1491, 8571, 8767, 6241, 4893, 3800, 6424, 8330, 3285, 8198)
"""Samples of the ten clients in the FedHAW authors' Dirichlet(0.1) split of MNIST."""


@dataclass(frozen=True)
class Workload:
    """A federation and its local training.

    Attributes:
        title: A description for tables.
        model: Key of :data:`MODELS`.
        sizes: Samples of each client.
        cohort: Clients in a round.
        rounds: Timed rounds, after one that is not timed.
        random_sizes: Whether the sizes are drawn between the first two entries of ``sizes``.
        shape: Shape of one input.
        classes: Number of classes.
    """

    title: str
    model: str
    sizes: tuple[int, ...]
    cohort: int
    batch: int
    epochs: int
    lr: float
    rounds: int
    random_sizes: bool = False
    shape: tuple[int, ...] = (784,)
    classes: int = 10


WORKLOADS = {
    "W0": Workload(
        "two clients with one sample each, linear 4-2: overhead",
        *("tiny", (1, 1), 2, 1, 1, 0.1, 200),
        shape=(4,),
        classes=2,
    ),
    "W1": Workload("MNIST MLP 784-128-128-10, 10 clients, batch 64", "mlp", MNIST_SIZES, 10, 64, 1, 0.001, 5),
    "W2": Workload("FedAvg CNN, 1000 clients x 60, cohort 100, batch 20", "cnn", (60,) * 1000, 100, 20, 1, 0.1, 3),
    "W3": Workload(
        "logistic regression 60-10 on Synthetic(1,1), 1000 clients of 50 to 90, cohort 100, batch 10, E=5",
        *("linear", (50, 90) * 500, 100, 10, 5, 0.01, 10),
        random_sizes=True,
        shape=(60,),
    ),
    "W4": Workload(
        "ResNet-18, CIFAR stem, 10 clients x 100 random 3x32x32, batch 50",
        *("resnet", (100,) * 10, 10, 50, 1, 0.01, 1),
        shape=(3, 32, 32),
    ),
    "W6": Workload(
        "logistic regression 60-10, 10,000 clients x 10, cohort 1000, batch 10: memory",
        *("linear", (10,) * 10_000, 1000, 10, 1, 0.01, 5),
        shape=(60,),
    ),
    # The workloads for which other simulators publish their speed, here with random data of the same shape. Their
    # repositories specify models, clients, cohorts, batches, epochs and learning rates. These are assumptions: every
    # client has the average number of samples (FLUTE's clients differ); BlazeFL's clients train on all of their 500
    # images (there a fifth is held out, which is less work); and all of BlazeFL's clients take part in every round.
    "pfl": Workload(
        "pfl-research's CIFAR-10: CNN with dropout, 1,000 clients x 50, cohort 50, batch 10",
        *("cifar_cnn", (50,) * 1000, 50, 10, 1, 0.1, 20),
        shape=(3, 32, 32),
    ),
    "flute_lr": Workload(
        "FLUTE's MNIST: logistic regression, 1,000 clients x 62, cohort 10, batch 10",
        *("sigmoid", (62,) * 1000, 10, 10, 1, 0.03, 20),
    ),
    "flute_cnn": Workload(
        "FLUTE's federated EMNIST: CNN with dropout, 3,400 clients x 198, cohort 10, batch 20",
        *("emnist_cnn", (198,) * 3400, 10, 20, 1, 0.1, 20),
        shape=(1, 28, 28),
        classes=62,
    ),
    "blazefl_cnn": Workload(
        "BlazeFL's CIFAR-10: CNN of the PyTorch tutorial, 100 clients x 500, all of them, batch 50, E=5",
        *("tutorial_cnn", (500,) * 100, 100, 50, 5, 0.1, 20),
        shape=(3, 32, 32),
    ),
    "blazefl_resnet": Workload(
        "BlazeFL's CIFAR-10: torchvision's ResNet-18, 100 clients x 500, all of them, batch 50, E=5",
        *("torchvision_resnet", (500,) * 100, 100, 50, 5, 0.1, 20),
        shape=(3, 32, 32),
    ),
}
QUICK = {
    "W0": {"rounds": 20},
    "W1": {"sizes": tuple(size // 20 for size in MNIST_SIZES), "rounds": 3},
    "W2": {"sizes": (60,) * 40, "cohort": 4, "rounds": 2},
    "W3": {"sizes": (50, 90) * 50, "cohort": 20, "rounds": 4},
    "W4": {"sizes": (4,) * 2, "cohort": 2, "batch": 2},
    "W6": {"sizes": (10,) * 1000, "cohort": 100, "rounds": 3},
    "pfl": {"sizes": (20,) * 20, "cohort": 10, "rounds": 2},
    "flute_lr": {"sizes": (20,) * 50, "rounds": 4},
    "flute_cnn": {"sizes": (20,) * 10, "cohort": 3, "batch": 10, "rounds": 2},
    "blazefl_cnn": {"sizes": (20,) * 10, "cohort": 10, "batch": 10, "epochs": 2, "rounds": 2},
    "blazefl_resnet": {"sizes": (4,) * 2, "cohort": 2, "batch": 2, "epochs": 1, "rounds": 1},
}


def workload(name: str, quick: bool = False, **changes: Any) -> Workload:
    """Return a workload by name; ``quick`` returns a small one of the same kind."""
    return replace(WORKLOADS[name], **{**(QUICK[name] if quick else {}), **changes})


# ---------------------------------------------------------------------- data


def images(work: Workload, rng: np.random.Generator, mnist: str | None) -> Arrays:
    """Return MNIST scaled to [-1, 1], or learnable random images of the same size."""
    if mnist is None:
        sizes = np.array(work.sizes)
        prototypes = rng.standard_normal((10, *work.shape), dtype=np.float32)
        y = rng.integers(10, size=sizes.sum())
        x = rng.standard_normal((len(y), *work.shape), dtype=np.float32)
        x += prototypes[y]
        return x, y, np.repeat(np.arange(len(sizes)), sizes)
    with np.load(mnist) as file:
        x, y, client = file["train_x"], file["train_y"], file["client_alpha01"]
    if len(work.sizes) == len(MNIST_SIZES):
        chosen = np.concatenate([np.flatnonzero(client == k)[:size] for k, size in enumerate(work.sizes)])
    else:
        chosen = rng.permutation(len(y))[: sum(work.sizes)]
    client = np.repeat(np.arange(len(work.sizes)), work.sizes)
    return x[chosen].reshape(-1, *work.shape).astype(np.float32) / 127.5 - 1, y[chosen].astype(np.int64), client


def synthetic(work: Workload, rng: np.random.Generator, mnist: str | None) -> Arrays:
    """Return Synthetic(1, 1) of Li et al. 2020 (FedProx): clients have different inputs and different true models."""
    features = work.shape[0]
    scales = np.arange(1, features + 1) ** -0.6
    xs = []
    ys = []
    clients = []
    sizes = rng.integers(work.sizes[0], work.sizes[1] + 1, len(work.sizes)) if work.random_sizes else work.sizes
    for k, size in enumerate(sizes):
        u, center = rng.standard_normal(2)
        x = rng.normal(rng.normal(center, 1, features), scales, (size, features))
        scores = x @ rng.normal(u, 1, (features, 10)) + rng.normal(u, 1, 10)
        xs.append(x.astype(np.float32))
        ys.append(scores.argmax(1))
        clients.append(np.full(size, k))
    return np.concatenate(xs), np.concatenate(ys), np.concatenate(clients)


def noise(work: Workload, rng: np.random.Generator, mnist: str | None) -> Arrays:
    """Return random inputs with random labels."""
    x = rng.standard_normal((sum(work.sizes), *work.shape), dtype=np.float32)
    return x, rng.integers(work.classes, size=len(x)), np.repeat(np.arange(len(work.sizes)), work.sizes)


DATA: dict[str, Callable[..., Arrays]] = {"mlp": images, "cnn": images, "linear": synthetic}
"""The data by model; all other models use :func:`noise`."""


def make_arrays(work: Workload, mnist: str | None = None) -> dict[str, np.ndarray]:
    """Create the data, cohorts and initial model that all contenders of a workload share. Needs torch."""
    import torch

    rng = np.random.default_rng(0)
    x, y, client = DATA.get(work.model, noise)(work, rng, mnist)
    num_clients = len(work.sizes)
    cohorts = [np.sort(rng.permutation(num_clients)[: work.cohort]) for _ in range(work.rounds + 1)]
    torch.manual_seed(0)
    start = torch.nn.utils.parameters_to_vector(network(work.model).parameters()).detach().numpy()
    return {"x": x, "y": y.astype(np.int64), "client": client, "cohorts": np.array(cohorts), "start": start}


def prepare(work: Workload, path: Path, mnist: str | None = None) -> None:
    """Write the shared arrays of a workload for contenders in other processes."""
    np.savez(path, **make_arrays(work, mnist))


# ---------------------------------------------------------------------- models (torch)


def network(name: str) -> Any:
    """Return a model by name; the loss of all models is the cross entropy."""
    from torch import nn

    if name == "tiny":
        return nn.Linear(4, 2)
    if name == "linear":
        return nn.Linear(60, 10)
    if name == "mlp":
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    if name == "cnn":
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10),
        )  # fmt: skip
    if name == "resnet":
        return _resnet18()
    if name == "sigmoid":  # FLUTE and FedML pass the scores through a sigmoid before the cross entropy
        return nn.Sequential(nn.Linear(784, 10), nn.Sigmoid())
    if name == "cifar_cnn":
        return _dropout_cnn(channels=3, side=32, classes=10)
    if name == "emnist_cnn":
        return _dropout_cnn(channels=1, side=28, classes=62)
    if name == "tutorial_cnn":
        return nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        )  # fmt: skip
    if name == "torchvision_resnet":  # its stem halves 32x32 images twice, so it needs much less work than "resnet"
        from torchvision.models import resnet18

        return resnet18(num_classes=10)
    raise ValueError(f"no model is called {name!r}")


def _dropout_cnn(channels: int, side: int, classes: int) -> Any:
    """Return the CNN of "Adaptive Federated Optimization" for EMNIST, which pfl-research also uses for CIFAR-10."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(channels, 32, 3), nn.ReLU(),
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(64 * ((side - 4) // 2) ** 2, 128), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(128, classes),
    )  # fmt: skip


def _resnet18() -> Any:
    """Return a ResNet-18 for 3x32x32 inputs: a 3x3 stem with stride 1 and without pooling."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
                nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
            )  # fmt: skip
            self.skip = (
                nn.Identity()
                if (before, stride) == (after, 1)
                else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
            )

        def forward(self, x: Any) -> Any:
            return (self.body(x) + self.skip(x)).relu()

    widths = ((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2))
    blocks = [Block(*width) for width in (*widths, (512, 512, 1))]
    stem = (nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def train_loss(model: Any, x: Any, y: Any) -> float:
    """Return the mean cross entropy over all training data, in training mode.

    BatchNorm then uses the statistics of each batch, so the loss depends on the parameters only.
    """
    import torch
    from torch.nn.functional import cross_entropy

    model.train()
    with torch.no_grad():
        parts = zip(x.split(1000), y.split(1000), strict=True)
        return sum(cross_entropy(model(a), b, reduction="sum").item() for a, b in parts) / len(x)


# ---------------------------------------------------------------------- jobs and reports


@dataclass(frozen=True)
class Job:
    """One run of one contender.

    Attributes:
        work: Name of the workload.
        data: The file of :func:`prepare`. Empty: this process creates the data itself.
        quick: Whether the small version of the workload is used.
        device: The device of torch contenders, such as ``"cpu"`` or ``"cuda"``.
        precision: The argument ``precision`` of the trainer.
        options: Options of the contender.
        changes: Attributes of the workload that are changed.
        skip: Rounds before the timed ones.
        seconds: Time limit for the timed rounds, after which no further round starts; one round is always timed.
    """

    work: str
    data: str
    quick: bool = False
    device: str = "cpu"
    precision: str = "32-true"
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    skip: int = 1
    seconds: float | None = None

    @cached_property
    def workload(self) -> Workload:
        return workload(self.work, self.quick, **self.changes)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        if not self.data:
            return cached_arrays(self.work, self.quick, json.dumps(self.changes))
        return read(self.data, Path(self.data).stat().st_mtime_ns)

    def clock(self) -> Clock:
        return Clock(self.device, skip=self.skip, seconds=self.seconds)

    @property
    def rounds(self) -> int:
        """All rounds, including the first one, which is not timed."""
        return self.workload.rounds + 1

    @property
    def cohorts(self) -> list[list[int]]:
        return self.arrays["cohorts"].tolist()

    @cached_property
    def rows(self) -> list[np.ndarray]:
        """The indices of the samples of each client."""
        client = self.arrays["client"]
        order = np.argsort(client, kind="stable")
        return np.split(order, np.cumsum(np.bincount(client))[:-1])

    def samples(self) -> tuple[Any, Any]:
        """Return inputs and labels as torch tensors in host memory."""
        import torch

        return torch.from_numpy(self.arrays["x"]), torch.from_numpy(self.arrays["y"])

    def network(self) -> Any:
        """Return the torch model with the common initial parameters."""
        import torch

        model = network(self.workload.model)
        start = torch.from_numpy(self.arrays["start"].copy())
        torch.nn.utils.vector_to_parameters(start, model.parameters())
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model


@lru_cache(maxsize=1)
def read(path: str, written: int) -> dict[str, np.ndarray]:
    """Read a file of :func:`prepare`, once for all jobs of a process that share it."""
    with np.load(path) as file:
        return dict(file)


@lru_cache(maxsize=1)
def cached_arrays(name: str, quick: bool, changes: str) -> dict[str, np.ndarray]:
    """Create the arrays without a file, which would have gigabytes for some workloads."""
    return make_arrays(workload(name, quick, **json.loads(changes)))


@lru_cache
def job_of(text: str) -> Job:
    """Return the job of a JSON text. Equal texts give the same object, so a worker process reads its data once."""
    return Job(**json.loads(text))


class Clock:
    """Measure the seconds between ticks; on a GPU a tick waits for the preceding work.

    Args:
        device: The device of the work.
        every: Which intervals are used: 2 omits every second one.
        skip: Rounds before the timed ones.
        seconds: Time limit for the timed rounds together. Default: none.
    """

    def __init__(self, device: str = "cpu", every: int = 1, skip: int = 1, seconds: float | None = None) -> None:
        self.device, self.every, self.skip, self.limit = device, every, skip, seconds
        self.ticks: list[float] = []
        self.tree_mb = 0.0

    def tick(self, *_: object) -> None:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())

    @property
    def is_over(self) -> bool:
        """Whether the time limit is reached, so that the current round is the last one."""
        if self.limit is None or len(self.ticks) <= self.skip:
            return False
        return time.perf_counter() - self.ticks[self.skip] > self.limit

    def stop(self) -> None:
        """Tick for the last time, and measure the memory of this process and its children before they end."""
        self.tick()
        self.tree_mb = sum(memory("VmHWM", pid) for pid in family(os.getpid()))

    @property
    def seconds(self) -> list[float]:
        return np.diff(self.ticks)[:: self.every].tolist()


Play = Callable[[Job], "tuple[Clock, Callable[[], float]] | None"]
"""Runs a job and returns its clock and a function for the final loss, or ``None`` if another process reports."""


def run_contender(play: Play, *packages: str) -> None:
    """Run the job of the command line, and print its report as the last line of the output."""
    before = memory("VmRSS")
    job = job_of(sys.argv[1])
    result = play(job)
    if result is None:
        return
    clock, loss = result
    report = {
        "seconds": clock.seconds,
        "import_mb": before,
        "peak_mb": memory("VmHWM"),
        "tree_mb": clock.tree_mb or memory("VmHWM"),
        "versions": {name: installed(name) for name in ("numpy", "torch", *packages) if installed(name)},
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    if torch := sys.modules.get("torch"):
        report["threads"] = torch.get_num_threads()
        if job.device.startswith("cuda"):
            report["gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6
            report["gpu"] = torch.cuda.get_device_name()
    print(json.dumps({**report, "loss": loss()}), flush=True)


def installed(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def memory(field_: str, pid: int | str = "self") -> float:
    """Return an entry of a process's memory status in MB, or 0 if there is none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field_)), 0.0)


def family(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(after_name[1]), []).append(int(entry.parent.name))
    waiting = [pid]
    while waiting:
        process = waiting.pop()
        yield process
        waiting += parents.get(process, [])
