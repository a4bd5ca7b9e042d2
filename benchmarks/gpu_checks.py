"""Check that training on a GPU is correct: one table row for each check, with the result and what is allowed.

    python benchmarks/gpu_checks.py --device cuda --out FOLDER
    python benchmarks/gpu_checks.py --device cpu --out outputs         (as a test; skips what needs a GPU)

Checks are organized in groups. A group is a process with its own time limit, so a group that hangs, crashes or breaks
the GPU's context does not affect the others. Groups that may do so run last. A check that raises an error is reported
as failed. Checks for which no time is left are reported as not run. The exit code is 0 if every check passed or does
not apply to the device.

A distance is that between the displacements of two runs from the same initial model, relative to the length of one of
them. A run that did not train would have distance 1.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import sheet
import torch
from speed import HERE, machine
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from workloads import Job, prepare

import lightning_fedhaw as fed
from lightning_fedhaw.extending import AggregationRule

sys.path.insert(0, str(HERE / "contenders"))
import engines_agree

CLIENTS = 12
FLOAT64, FLOAT32, TF32 = 1e-9, 2e-3, 1e-2
"""Allowed distances by the precision of products and sums; devices and engines sum in different orders."""
SHORT = {"16-mixed": 1e-2, "bf16-mixed": 5e-2, "bf16-true": 0.1}
"""Allowed distances from float32, ten times those on the CPU: 11 and 8 bits; bf16-true also rounds the parameters."""
KEPT_ADAM = 2e-2
"""Allowed distance between implementations of AdamW, which amplifies differences of small gradients."""
LEFTOVER = 1.0
"""Megabytes that may remain allocated on the GPU after ``fit``."""
SGD = partial(torch.optim.SGD, lr=0.1)
PROXY_RULES: dict[str, dict[str, Any]] = {
    "FedLAWCallback": {"server_epochs": 2},
    "FedDFCallback": {"server_epochs": 2},
    "FedBECallback": {"server_epochs": 2},
    "ServerFineTuningCallback": {"server_epochs": 1},
}
"""Rules that learn on the server's data, with settings for a short run."""

UPPER: dict[str, Any] = {"upper": "net.0", "upper_loss": None, "upper_lr": 0.1}
BILEVEL_RULES: dict[str, dict[str, Any]] = {
    "AggITDCallback": {"lower_rounds": 3, **UPPER},
    "FedNestCallback": {"terms": 1, **UPPER},
    "SimFBOCallback": UPPER,
}
"""Rules that learn on the clients' held-out samples; the checkpoint is in the middle of an outer step."""


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        result: The result in words or numbers.
        allowed: The correct result, or the allowed distance.
        is_right: Whether the check passed; ``None`` if it does not apply.
    """

    result: str
    allowed: str
    is_right: bool | None

    @property
    def verdict(self) -> str:
        if self.is_right is None:
            return "n/a"
        return "pass" if self.is_right else "**FAIL**"


Check = Callable[[], Finding]


def near(run: Tensor, other: Tensor, allowed: float) -> Finding:
    """Check that the distance of two displacements ``[P]`` is allowed."""
    distance = ((run.double() - other.double()).norm() / other.double().norm()).item()
    return Finding(f"{distance:.1e}", f"{allowed:g}", distance <= allowed)


def for_gpus(check: Check, is_on_gpu: bool) -> Check:
    """Replace a check that needs a GPU by one that does not apply, on a CPU."""
    return check if is_on_gpu else lambda: Finding("needs a GPU", "", None)


# ---------------------------------------------------------------------- a federation


class Module(pl.LightningModule):
    """An ordinary module.

    Args:
        net: A network for images ``[batch, 784]``.
        optimizer: Creates the optimizer from the parameters.
    """

    def __init__(self, net: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def upper_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def cnn(dropout: float = 0.0, norm: bool = False) -> nn.Module:
    """Return a small convolutional network, for which ``engine="auto"`` chooses the vectorized engine on any device."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 16, 5)]
    if norm:
        layers.append(nn.BatchNorm2d(16))
    layers += [nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Dropout(dropout), nn.Linear(576, 10)]
    return nn.Sequential(*layers)


def mlp() -> nn.Module:
    """Return a small MLP."""
    return nn.Sequential(nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))


@dataclass
class Run:
    """A finished run.

    Attributes:
        displacement: The change of the parameters, ``[P]``, in host memory.
        trainer: The trainer.
        module: The module.
    """

    displacement: Tensor
    trainer: fed.FederatedTrainer
    module: Module

    @property
    def engine(self) -> str:
        return type(self.trainer.fit_loop.federation.engine).__name__.removesuffix("Engine").lower()


class Lab:
    """Small federations on a device: 12 clients, random images, a few rounds.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        folder: The folder for checkpoints.
    """

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.is_on_gpu = device.startswith("cuda")

    def samples(self, count: int = 480) -> TensorDataset:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 784, generator=generator)
        return TensorDataset(images, torch.randint(10, (count,), generator=generator))

    def fit(
        self,
        net: Callable[[], nn.Module] = cnn,
        rule: AggregationRule | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] = SGD,
        *,
        samples: int = 480,
        batch_size: int = 20,
        proxy: int | None = None,
        ckpt_path: Path | None = None,
        callbacks: tuple[pl.Callback, ...] = (),
        **settings: Any,
    ) -> Run:
        """Train a federation; ``settings`` are arguments of ``FederatedTrainer``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = Module(net(), optimizer)
        start = nn.utils.parameters_to_vector(module.net.parameters()).detach().clone()
        arguments: dict[str, Any] = {
            "rounds": 2,
            "num_clients": CLIENTS,
            "partitioner": fed.IIDPartitioner(),
            "seed": 0,
            "accelerator": "gpu" if self.is_on_gpu else "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": bool(callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "client_eval": False,
            **settings,
        }
        trainer = fed.FederatedTrainer(callbacks=[rule or fed.FedAvgCallback(), *callbacks], **arguments)
        data = fed.FederatedDataModule(self.samples(samples), batch_size=batch_size, proxy=proxy, seed=0)
        with redirect_stdout(StringIO()):  # hides the run summary
            trainer.fit(module, data, ckpt_path=ckpt_path)
        end = nn.utils.parameters_to_vector(module.net.parameters()).detach().cpu()
        return Run(end.float() - start, trainer, module)

    def displacement(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.fit(*args, **kwargs).displacement


# ---------------------------------------------------------------------- groups of checks


@contextmanager
def cudnn_tf32(is_allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = is_allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def engines(lab: Lab) -> Iterator[tuple[str, Check]]:
    """Check which engine ``auto`` chooses, and that both engines agree, with and without reduced-precision products."""
    short: dict[str, Callable[[], Any]] = {
        "cuDNN TF32 off": partial(cudnn_tf32, False),
        "cuDNN TF32 on": partial(cudnn_tf32, True),
        "matmul precision high": partial(matmul_precision, "high"),
    }

    def chosen(context: Callable[[], Any], net: Callable[[], nn.Module]) -> Finding:
        with context():
            engine = lab.fit(net, engine="auto").engine
        return Finding(engine, "vectorized", engine == "vectorized")

    def agree(context: Callable[[], Any], net: Callable[[], nn.Module], allowed: float) -> Finding:
        with context():
            vectorized = lab.displacement(net, engine="vectorized")
            return near(vectorized, lab.displacement(net, engine="sequential"), allowed)

    for name, context in short.items():
        # A CPU has no reduced-precision products.
        is_useful = lab.is_on_gpu or name == "cuDNN TF32 off"
        allowed = FLOAT32 if name == "cuDNN TF32 off" else TF32
        yield f"CNN, float32, {name}: engine of auto", for_gpus(partial(chosen, context, cnn), is_useful)
        compared = partial(agree, context, cnn, allowed)
        yield f"CNN, float32, {name}: vectorized from sequential", for_gpus(compared, is_useful)
    exact = partial(cudnn_tf32, False)
    dropout = partial(cnn, dropout=0.5)
    # On a GPU the two engines draw different masks, so two correct runs differ about as much as two seeds.
    masks = 1.5 if lab.is_on_gpu else FLOAT32
    yield "CNN with dropout: engine of auto", partial(chosen, exact, dropout)
    yield "CNN with dropout: vectorized from sequential", partial(agree, exact, dropout, masks)
    yield "CNN with BatchNorm: vectorized from sequential", partial(agree, exact, partial(cnn, norm=True), FLOAT32)


def precisions(lab: Lab) -> Iterator[tuple[str, Check]]:
    """Compare 16-bit precisions with float32, in both engines."""

    def agree(engine: str, precision: str) -> Finding:
        short = lab.displacement(engine=engine, precision=precision)
        return near(short, lab.displacement(engine="sequential"), SHORT[precision])

    for precision in SHORT:
        for engine in ("sequential", "vectorized"):
            if precision == "16-mixed" and engine == "vectorized":
                continue  # the vectorized engine does not support loss scaling
            check = partial(agree, engine, precision)
            needs_gpu = precision == "16-mixed"
            yield f"{precision}, {engine}: from float32", for_gpus(check, lab.is_on_gpu or not needs_gpu)


def rules(lab: Lab) -> Iterator[tuple[str, Check]]:
    """Compare every rule, resumed from a checkpoint after the second of four rounds, with the uninterrupted run."""

    def resumed(name: str) -> Finding:
        settings: dict[str, Any] = {}
        if name in PROXY_RULES:
            settings["proxy"] = 60
        if name in BILEVEL_RULES:
            settings["client_val_fraction"] = 0.2
        make = partial(getattr(fed, name), **PROXY_RULES.get(name, {}), **BILEVEL_RULES.get(name, {}))
        folder = lab.folder / name
        keep = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        straight = lab.displacement(mlp, make(), rounds=4, callbacks=(keep,), **settings)
        path = folder / "epoch=1.ckpt"
        again = lab.displacement(mlp, make(), rounds=4, ckpt_path=path, **settings)
        # A CPU repeats the same operations in the same order; a GPU may sum in another order.
        return near(again, straight, 1e-4 if lab.is_on_gpu else 0.0)

    for name in sorted(fed.__all__):
        thing = getattr(fed, name)
        if isinstance(thing, type) and issubclass(thing, AggregationRule) and thing is not AggregationRule:
            yield f"{name}: resumed from straight", partial(resumed, name)


def workloads(lab: Lab) -> Iterator[tuple[str, Check]]:
    """Compare W1 to W4 in float64, with every engine and location of the data, with the CPU."""
    changes: dict[str, dict[str, Any]] = {
        "W1": {"rounds": 1},
        "W2": {"rounds": 1, "sizes": [30] * 4, "cohort": 2, "lr": 0.01},
        "W3": {"rounds": 1, "epochs": 2},
        "W4": {"rounds": 1, "sizes": [4, 2], "lr": 0.001},
    }
    expected: dict[str, Tensor] = {}

    def job(work: str) -> Job:
        path = lab.folder / f"{work}.npz"
        made = Job(work, str(path), quick=True, precision="64-true", changes=changes[work])
        if not path.exists():
            prepare(made.workload, path)
        return made

    def reference(work: str) -> Tensor:
        if work not in expected:
            expected[work] = engines_agree.trained(replace(job(work), options={"engine": "sequential"}))
        return expected[work]

    def agree(work: str, options: dict[str, Any]) -> Finding:
        on_device = replace(job(work), options=options, device=lab.device)
        return near(engines_agree.trained(on_device), reference(work), FLOAT64)

    for work in ("W3", "W1", "W2", "W4"):
        for engine in ("sequential", "vectorized"):
            for place in ("model", "cpu"):
                check = partial(agree, work, {"engine": engine, "data_device": place})
                says_something = lab.is_on_gpu or (engine, place) == ("vectorized", "model")
                title = f"{work}, float64, {engine}, data_device={place}: from the CPU"
                yield title, for_gpus(check, says_something)
        if work in ("W2", "W4"):
            check = partial(agree, work, {"engine": "sequential", "channels_last": True})
            yield f"{work}, float64, sequential, channels-last: from the CPU", check


def compiled(lab: Lab) -> Iterator[tuple[str, Check]]:
    """Check the compiled step of the vectorized engine."""

    def agree() -> Finding:
        run = lab.fit(mlp, rounds=3, engine="vectorized", compile_clients=True)  # compiles from the second round on
        if not run.trainer.fit_loop.federation.engine.compile_clients:
            return Finding("was not compiled", "compiled", False)
        return near(run.displacement, lab.displacement(mlp, rounds=3, engine="sequential"), FLOAT32)

    yield "MLP, float32, compiled: from sequential", agree


def memory(lab: Lab) -> Iterator[tuple[str, Check]]:
    """Check that a run frees GPU memory, and that client states are in host memory."""

    def leftover() -> Finding:
        lab.fit(samples=120)  # cuBLAS and cuDNN never free their workspaces
        gc.collect()
        before = torch.cuda.memory_allocated()
        run = lab.fit(rule=fed.FedHAWCallback(), samples=4800)  # 15 MB
        held = (torch.cuda.memory_allocated() - before) / 1e6
        gc.collect()
        collected = (torch.cuda.memory_allocated() - before) / 1e6
        del run
        gc.collect()
        dropped = (torch.cuda.memory_allocated() - before) / 1e6
        result = f"{held:.1f} MB; after a gc {collected:.1f} MB; without trainer and module {dropped:.1f} MB"
        return Finding(result, f"{LEFTOVER:g} MB", max(held, collected, dropped) <= LEFTOVER)

    def homes() -> Finding:
        momentum = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        run = lab.fit(partial(cnn, norm=True), optimizer=momentum, buffers="local", optimizer_state="kept")
        federation = run.trainer.fit_loop.federation
        client_states = (federation.buffers.local.of_clients, federation.engine.optimizer_states)
        devices = {value.device.type for value in tensors(client_states)}
        return Finding(", ".join(sorted(devices)), "cpu", devices == {"cpu"})

    def placement() -> Finding:
        if importlib.util.find_spec("pytest") is None:
            return Finding("pytest is not installed", "", None)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "gpu"]
        command.append(str(HERE.parent / "tests" / "clients" / "test_placement.py"))
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=HERE.parent)
        said = done.stdout.strip().splitlines() or [f"ended with code {done.returncode}"]
        is_right = done.returncode == 0 and "passed" in said[-1] and "skipped" not in said[-1]
        return Finding(sheet.shortened(said[-1]), "passed", is_right)

    yield "MB left on the GPU after fit", for_gpus(leftover, lab.is_on_gpu)
    yield "local buffers and kept optimizer states wait on", homes
    yield "tests of the suite that need a GPU", for_gpus(placement, lab.is_on_gpu)


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested containers that have a dimension; scalars such as a step count need little memory."""
    if isinstance(tree, Tensor):
        if tree.ndim:
            yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors(value)


WITHOUT_WANDB = """
import sys
sys.modules["wandb"] = None
import torch
from pathlib import Path
from gpu_checks import Lab, quiet
quiet()
print("moved by", Lab(sys.argv[1], Path(".")).displacement().norm().item())
"""


def processes(lab: Lab) -> Iterator[tuple[str, Check]]:
    """Check a process group with a single process, and a process without wandb."""
    backend = "nccl" if lab.is_on_gpu else "gloo"

    def one_process(rule: Callable[[], AggregationRule]) -> Finding:
        alone = lab.displacement(rule=rule(), engine="sequential")
        strategy = fed.FederatedStrategy(process_group_backend=backend)
        try:
            grouped = lab.displacement(rule=rule(), engine="sequential", strategy=strategy)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return near(grouped, alone, FLOAT32)

    def without_wandb() -> Finding:
        command = [sys.executable, "-c", WITHOUT_WANDB, lab.device]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=sheet.environment())
        said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        return Finding(sheet.shortened(said[-1]), "trains", done.returncode == 0)

    yield "import and fit without wandb", without_wandb
    yield f"one process with {backend}, FedAvg: from no process group", partial(one_process, fed.FedAvgCallback)
    yield f"one process with {backend}, FedHAW: from no process group", partial(one_process, fed.FedHAWCallback)


def out_of_memory(lab: Lab) -> Iterator[tuple[str, Check]]:
    """Check the recovery on a GPU with too little memory."""

    def fit(**settings: Any) -> tuple[Run, int]:
        """Train with all clients at once or one at a time, and return the run and its peak memory."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run = lab.fit(samples=4800, batch_size=200, **settings)
        return run, torch.cuda.max_memory_reserved()

    def recovered() -> Finding:
        expected, least = fit(engine="sequential")
        _, most = fit(engine="vectorized", chunk_memory=2**40)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((least + most) / 2 / total)
        try:
            run, _ = fit(engine="vectorized", chunk_memory=2**40)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        found = near(run.displacement, expected.displacement, FLOAT32)
        chunk = min(run.trainer.fit_loop.federation.engine.chunk, CLIENTS)
        result = f"{found.result}, {chunk} of {CLIENTS} clients at a time"
        return Finding(result, f"{found.allowed}, fewer", bool(found.is_right) and chunk < CLIENTS)

    yield "recovers from out of memory: from sequential", for_gpus(recovered, lab.is_on_gpu)


def optimizers(lab: Lab) -> Iterator[tuple[str, Check]]:
    """Check optimizers whose state each client keeps; a tensor on the wrong device may break the GPU's context."""
    plain = partial(torch.optim.AdamW, lr=1e-3)

    def agree(engine: str, **settings: Any) -> Finding:
        common: dict[str, Any] = {"optimizer_state": "kept", "rounds": 3}
        expected = lab.displacement(optimizer=plain, engine="sequential", **common)
        found = lab.displacement(optimizer=partial(plain, **settings), engine=engine, **common)
        return near(found, expected, KEPT_ADAM)

    for engine in ("sequential", "vectorized"):
        yield f"AdamW, kept, {engine}: from sequential", partial(agree, engine)
        yield f"fused AdamW, kept, {engine}: from AdamW", partial(agree, engine, fused=True)
        capturable = partial(agree, engine, capturable=True)
        yield f"capturable AdamW, kept, {engine}: from AdamW", for_gpus(capturable, lab.is_on_gpu)


Group = Callable[[Lab], Iterator[tuple[str, Check]]]
GROUPS: dict[str, tuple[Group, float]] = {
    "engines": (engines, 60),
    "memory": (memory, 60),
    "rules": (rules, 120),
    "workloads": (workloads, 120),
    "precisions": (precisions, 60),
    "processes": (processes, 90),
    "compiled": (compiled, 120),
    "out_of_memory": (out_of_memory, 60),
    "optimizers": (optimizers, 60),
}
"""Groups by name, with their time limits in seconds; those that may break the GPU's context come last."""


# ---------------------------------------------------------------------- running


def quiet() -> None:
    """Hide log messages and warnings."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def run_group(names: list[str], device: str) -> None:
    """Run the checks of groups in this process, and report each finding."""
    quiet()
    torch.backends.cudnn.allow_tf32 = False  # the checks of TF32 turn it on
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(device, Path(folder))
        for name in names:
            for title, check in GROUPS[name][0](lab):
                begin = time.perf_counter()
                try:
                    found = check()
                except Exception as error:
                    found = Finding(sheet.shortened(f"{type(error).__name__}: {error}"), "", False)
                seconds = time.perf_counter() - begin
                row = [title, found.result, found.allowed, found.verdict, f"{seconds:.1f}"]
                sheet.tell({"row": row})


class Table:
    """The rows of all groups in a fixed order; written whenever a row is added.

    Args:
        titles: The titles of the checks, by group.
        head: A description of the machine.
        folders: Folders for the table.
    """

    def __init__(self, titles: dict[str, list[str]], head: str, folders: list[Path]) -> None:
        self.rows: dict[str, list[str]] = {}
        self.order: list[str] = []
        for group in titles.values():
            for title in group:
                self.order.append(title)
                self.rows[title] = [title, "", "", "not run", ""]
        self.head, self.folders = head, folders

    def add(self, row: list[str]) -> None:
        self.rows[row[0]] = row
        print(" | ".join(row), flush=True)
        self.write()

    def close(self, titles: list[str], ending: str) -> None:
        """Record how a group ended as the result of its first check without a finding."""
        for title in titles:
            if self.rows[title][3] == "not run":
                verdict = "**not finished**" if ending.startswith("not finished") else "**FAIL**"
                self.add([title, ending, "", verdict, ""])
                return

    @property
    def verdicts(self) -> list[str]:
        return [self.rows[title][3] for title in self.order]

    def write(self) -> None:
        counts = ", ".join(f"{self.verdicts.count(v)} {v.strip('*')}" for v in sorted(set(self.verdicts)))
        rows = [self.rows[title] for title in self.order]
        body = sheet.table(["check", "result", "allowed", "verdict", "seconds"], rows)
        sheet.write(f"# Checks on a GPU\n\n{self.head}\n\n{counts}.\n\n{body}", "gpu_checks.md", self.folders)


def steps(names: list[str], device: str) -> list[list[str]]:
    """Divide groups among processes: one each on a GPU; two in all on a CPU, where imports would dominate the time."""
    if device.startswith("cuda"):
        return [[name] for name in names]
    return [names[0::2], names[1::2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--out", type=Path, nargs="+", default=[Path("outputs")], help="folders for gpu_checks.md")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--seconds", type=float, default=235, help="time limit for everything")
    parser.add_argument("--since", type=float, help="start of this time, in seconds since 1970; default now")
    parser.add_argument("--jobs", type=int, help="groups at a time; default 3 on a GPU, else 1")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # a step: the groups in this process
    args = parser.parse_args()
    if args.here:
        run_group(args.groups, args.device)
        return
    deadline = sheet.Deadline(args.seconds, args.since)
    is_on_gpu = args.device.startswith("cuda")
    lab = Lab(args.device, Path())
    titles = {name: [title for title, _ in GROUPS[name][0](lab)] for name in args.groups}
    table = Table(titles, sheet.heading(machine(), args.device, is_quick=not is_on_gpu), args.out)
    table.write()

    def play(names: list[str]) -> None:
        limit = min(sum(GROUPS[name][1] for name in names), deadline.left)
        if limit < 5:
            return
        command = [sys.executable, str(Path(__file__)), "--here", "--device", args.device, "--groups", *names]
        log = args.out[0] / "logs" / f"checks_{names[0]}.log"
        ending = sheet.run(command, limit, log, lambda record: table.add(record["row"]))
        if ending:
            table.close([title for name in names for title in titles[name]], ending)

    with ThreadPoolExecutor(args.jobs or (3 if is_on_gpu else 1)) as pool:
        for future in [pool.submit(play, names) for names in steps(args.groups, args.device) if names]:
            future.result()
    table.write()
    wrong = [v for v in table.verdicts if v not in ("pass", "n/a")]
    print(f"{len(wrong)} of {len(table.verdicts)} checks failed or were not run.")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
