"""The choice of the engine of a run: the one that was requested, or the one that was measured to be faster.

``choose`` asks its questions in the order of their costs; ``docs/speed.md`` has the evidence for the numbers below. The
sentences in which a run says what was chosen, and why, stand at the end of the file.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from lightning_fedhaw.clients.engine import Engine
from lightning_fedhaw.clients.vectorized.engine import VectorizedEngine
from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError
from lightning_fedhaw.clients.vectorized.trial import Facts, probe
from lightning_fedhaw.options import EngineName
from lightning_fedhaw.vectors.layout import trainable

MIN_CLIENTS = 10
"""The number of clients at a time from which a batched step is faster."""

MAX_PARAMETERS = 50_000
"""The number of parameters up to which a batched step is faster on the CPU."""

MAX_CONVOLVED = 200_000
"""The product of parameters and batch size up to which that holds for convolutions, which are slow when batched."""

MAX_PARAMETERS_GPU = 1_000_000
"""The number of parameters on other devices. It is a guess: nothing was measured there."""

MAX_FROZEN = 1_000_000
"""The number of frozen parameters in a step up to which the same holds: with more, their work dominates."""

UNKNOWN_FREE_MEMORY = 2**31
"""The bytes that are assumed to be free where the system does not say: 2 GiB."""


def choose(
    sequential: Engine,
    requested: EngineName,
    *,
    cohort: int,
    chunk_memory: int | None,
    compile_clients: bool,
    share_calls: bool = False,
    processes: int = 1,
) -> tuple[Engine, str]:
    """Choose the engine of a run.

    Args:
        sequential: The sequential engine.
        requested: The argument ``engine``.
        cohort: The number of clients that one process trains in a round.
        chunk_memory: Bytes in use at a time; a quarter of the free memory by default.
        compile_clients: Whether the batched step is compiled.
        share_calls: Whether shorter last batches may be part of a call with full ones.
        processes: The number of processes that train.

    Returns:
        The engine, and one line that says which it is and why.

    Raises:
        ValueError: If the vectorized engine was requested and the module does not allow it.
    """
    if sequential.elsewhere is not None:
        return sequential, f"Clients train {sequential.elsewhere}."
    if requested == "sequential":
        return sequential, _sequential_line(None, compile_clients)
    if requested == "auto":
        reason = slower(sequential, cohort, processes)
        if reason is not None:
            return sequential, _sequential_line(reason, compile_clients)
    host = sequential.host
    try:
        facts = probe(
            host,
            sequential.layout,
            sequential.data,
            sequential.plan,
            sequential.objectives,
            shares_calls=share_calls,
        )
    except NotVectorizableError as error:
        if requested == "vectorized":
            raise ValueError(_refusal(error)) from error
        return sequential, _sequential_line(str(error), compile_clients)
    if requested == "auto":
        # Only the argument counts: the memory that happens to be free must not decide which numbers a seed gives.
        reason = _trial_reason(facts, chunk_memory)
        if reason is not None:
            return sequential, _sequential_line(reason, compile_clients)
    memory = chunk_memory or free_memory(host.device) // 4
    engine = _vectorized(sequential, requested, facts, memory, compile_clients)
    return engine, _vectorized_line(engine, requested, cohort, processes, memory, compile_clients)


def _vectorized(
    sequential: Engine, requested: EngineName, facts: Facts, memory: int, compile_clients: bool
) -> VectorizedEngine:
    """Make a vectorized engine that takes over from the sequential one.

    Args:
        sequential: The sequential engine.
        requested: The argument ``engine``.
        facts: What the trial found out.
        memory: Bytes in use at a time.
        compile_clients: Whether the batched step is compiled, if it can be.
    """
    fallback = None
    if requested == "auto":
        fallback = sequential
    engine = VectorizedEngine(
        sequential.host,
        sequential.layout,
        sequential.data,
        sequential.plan,
        sequential.objectives,
        facts=facts,
        chunk_memory=memory,
        # A graph would repeat the index and the random numbers that it was traced with.
        compile_clients=compile_clients and facts.is_fixed,
        fallback=fallback,
    )
    engine.succeed(sequential)
    return engine


def slower(engine: Engine, cohort: int, processes: int = 1) -> str | None:
    """Say why the sequential engine is faster, from what is known without a trial.

    Args:
        engine: The sequential engine.
        cohort: The number of clients that one process trains in a round.
        processes: The number of processes that train.

    Returns:
        The reason; ``None`` if there is none.
    """
    if cohort < MIN_CLIENTS:
        return _too_few(cohort, processes)
    parameters = engine.layout.numel
    is_cpu = engine.host.device.type == "cpu"
    limit = MAX_PARAMETERS if is_cpu else MAX_PARAMETERS_GPU
    if parameters > limit:
        return f"{parameters:,} parameters are more than {limit:,}"
    convolved = parameters * engine.data.settings.batch_size
    if is_cpu and convolved > MAX_CONVOLVED and _has_trainable(engine.host.module, nn.modules.conv._ConvNd):
        return f"it has convolutions, and parameters times batch size are {convolved:,}: over {MAX_CONVOLVED:,}"
    if is_cpu and _has_trainable(engine.host.module, nn.LSTM):
        return "an `nn.LSTM` has a fast kernel of its own on the CPU, which a batched step cannot use"
    return None


def _has_trainable(module: nn.Module, layer: type[nn.Module]) -> bool:
    """Return whether a layer of a type is trained. A frozen one has one weight for all clients and a larger batch."""
    return any(isinstance(submodule, layer) and trainable(submodule) for submodule in module.modules())


def _trial_reason(facts: Facts, chunk_memory: int | None) -> str | None:
    """Say why the sequential engine is better, from what the trial found out.

    Args:
        facts: What the trial found out.
        chunk_memory: The argument ``chunk_memory``.

    Returns:
        The reason; ``None`` if there is none.
    """
    if not facts.is_compared:
        return (
            "its batched step cannot be compared with one client alone: draws depend on the model, or a value is not"
            " finite"
        )
    if facts.frozen > MAX_FROZEN:
        return f"a step computes with {facts.frozen:,} frozen parameters, and that is more than {MAX_FROZEN:,}"
    if chunk_memory is None:
        return None
    clients = chunk_memory // facts.bytes_per_client
    if clients < MIN_CLIENTS:
        return (
            f"{_clients(clients)} at a time fit into `chunk_memory`={chunk_memory}, and a batched step is faster from"
            f" {MIN_CLIENTS} on"
        )
    return None


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, or ``UNKNOWN_FREE_MEMORY``."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        # Systems without `sysconf`, or without these names.
        return UNKNOWN_FREE_MEMORY


# ---------------------------------------------------------------------- the sentences


def _sequential_line(reason: str | None, compile_clients: bool) -> str:
    """Say that the sequential engine trains, and why; without a reason it was requested."""
    line = "Engine: sequential, as requested"
    if reason is not None:
        line = f"Engine: sequential, because {reason}"
    if compile_clients:
        line += "; `compile_clients=True` has no effect on it"
    return f"{line}."


def _vectorized_line(
    engine: VectorizedEngine, requested: EngineName, cohort: int, processes: int, memory: int, compile_clients: bool
) -> str:
    """Say that the vectorized engine trains, and what is special about it."""
    facts = engine.facts
    line = f"Engine: vectorized, {min(engine.chunk, cohort)} of {_clients(cohort)} at a time"
    line += _on_each(processes)
    if requested == "vectorized":
        line += ", as requested"
    if facts.bytes_per_client > memory:
        line += f"; one takes about {facts.bytes_per_client:,} bytes, more than `chunk_memory`={memory:,}"
    if compile_clients and not engine.compile_clients:
        line += "; not compiled, because the step reads `batch_idx` or draws random numbers"
    if facts.draws_other:
        line += "; random numbers other than dropout differ from those of the sequential engine"
    if not facts.is_compared:
        line += "; not compared with one client alone, because draws depend on the model or values are not finite"
    return f"{line}."


def _refusal(error: NotVectorizableError) -> str:
    return (
        '`engine="vectorized"` needs a `training_step` without side effects, an element-wise optimizer and data in'
        f' memory; here {error}. Use `engine="sequential"`, or `engine="auto"`, which chooses by itself.'
    )


def _too_few(cohort: int, processes: int) -> str:
    return (
        f"it would train {_clients(cohort)} at a time{_on_each(processes)}, and a batched step is faster from"
        f" {MIN_CLIENTS} on"
    )


def _on_each(processes: int) -> str:
    if processes == 1:
        return ""
    return f" on each of {processes} processes"


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"
