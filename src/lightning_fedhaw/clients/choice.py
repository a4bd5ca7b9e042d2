"""Which engine trains a federation: the one asked for, or the one that was measured to be faster.

``choose`` is the rule, in the order in which it asks; ``docs/speed.md`` has the evidence for its numbers. The sentences
in which a run says what was chosen, and why, stand at the end of the file.
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
"""Clients a round from which a batched step is faster."""

MAX_PARAMETERS = 50_000
"""Parameters of a client up to which a batched step is faster on the CPU."""

MAX_CONVOLVED = 200_000
"""Parameters times batch size up to which that is so for convolutions, which are slow when they are batched."""

MAX_PARAMETERS_GPU = 1_000_000
"""The bound on other devices, which is a guess: nothing was measured there."""

MAX_FROZEN = 1_000_000
"""Frozen parameters that a step computes with, up to which the same holds: beyond them their work is what counts."""


def choose(
    sequential: Engine,
    asked: EngineName,
    *,
    cohort: int,
    chunk_memory: int | None,
    compile_clients: bool,
    processes: int = 1,
) -> tuple[Engine, str]:
    """Choose the engine of a run.

    Args:
        sequential: The sequential engine.
        asked: The argument ``engine``.
        cohort: Clients that one process trains in a round.
        chunk_memory: Bytes in use at a time; a quarter of what is free by default.
        compile_clients: Whether the batched step is compiled.
        processes: How many train.

    Returns:
        The engine, and one line that says which it is and why.

    Raises:
        ValueError: If the vectorized engine was asked for and cannot be had.
    """
    if asked == "sequential":
        return sequential, _sequential_line(None, compile_clients)
    if asked == "auto":
        reason = slower(sequential, cohort, processes)
        if reason is not None:
            return sequential, _sequential_line(reason, compile_clients)
    host = sequential.host
    try:
        facts = probe(host, sequential.layout, sequential.data, sequential.plan, sequential.objectives)
    except NotVectorizableError as error:
        if asked == "vectorized":
            raise ValueError(_refusal(error)) from error
        return sequential, _sequential_line(str(error), compile_clients)
    memory = chunk_memory or free_memory(host.device) // 4
    if asked == "auto":
        # Only where the bound is given: what happens to be free must not decide which numbers a seed gives.
        bound = None if chunk_memory is None else memory
        reason = _not_worth_it(facts, bound)
        if reason is not None:
            return sequential, _sequential_line(reason, compile_clients)
    can_be_compiled = not (facts.uses_index or facts.draws_dropout or facts.draws_other)
    engine = VectorizedEngine(
        host,
        sequential.layout,
        sequential.data,
        sequential.plan,
        sequential.objectives,
        facts=facts,
        chunk_memory=memory,
        compile_clients=compile_clients and can_be_compiled,
        fallback=sequential if asked == "auto" else None,
    )
    engine.kept = sequential.kept
    engine.gradient = sequential.gradient
    return engine, _vectorized_line(engine, asked, cohort, processes, memory, compile_clients)


def slower(engine: Engine, cohort: int, processes: int = 1) -> str | None:
    """Say why one client after another is faster, by what can be seen without a trial; ``None`` if it is not.

    Args:
        engine: The sequential engine.
        cohort: Clients that one process trains in a round.
        processes: How many train.
    """
    if cohort < MIN_CLIENTS:
        return _too_few(cohort, processes)
    parameters = engine.layout.numel
    is_cpu = engine.host.device.type == "cpu"
    most = MAX_PARAMETERS if is_cpu else MAX_PARAMETERS_GPU
    if parameters > most:
        return f"{parameters:,} parameters are more than {most:,}"
    convolved = parameters * engine.data.settings.batch_size
    if is_cpu and convolved > MAX_CONVOLVED and _trains_convolutions(engine.host.module):
        return f"it has convolutions, and parameters times batch size are {convolved:,}: over {MAX_CONVOLVED:,}"
    return None


def _trains_convolutions(module: nn.Module) -> bool:
    """Whether a convolution is trained: a frozen one has one weight for all clients, and gets a larger batch."""
    for submodule in module.modules():
        if isinstance(submodule, nn.modules.conv._ConvNd) and trainable(submodule):
            return True
    return False


def _not_worth_it(facts: Facts, memory: int | None) -> str | None:
    """Say why to train one client after another, by what the trial found out; ``None`` if there is no reason."""
    if not facts.is_compared:
        return (
            "its batched step cannot be compared with one client alone: draws depend on the model, or a value is not"
            " finite"
        )
    if facts.frozen > MAX_FROZEN:
        return f"a step computes with {facts.frozen:,} frozen parameters, and that is more than {MAX_FROZEN:,}"
    if memory is None:
        return None
    fit = memory // facts.bytes_per_client
    if fit < MIN_CLIENTS:
        return f"{_clients(fit)} at a time fit into `chunk_memory`={memory}, and {MIN_CLIENTS} are worth it"
    return None


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device; 2 GiB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**31


# ---------------------------------------------------------------------- what a run says


def _sequential_line(reason: str | None, compile_clients: bool) -> str:
    """Say that the sequential engine trains, and why; without a reason it was asked for."""
    line = "Engine: sequential, as asked" if reason is None else f"Engine: sequential, because {reason}"
    if compile_clients:
        line += "; `compile_clients=True` has no effect on it"
    return f"{line}."


def _vectorized_line(
    engine: VectorizedEngine, asked: EngineName, cohort: int, processes: int, memory: int, compile_clients: bool
) -> str:
    """Say that the vectorized engine trains, and what is special about it."""
    facts = engine.facts
    line = f"Engine: vectorized, {min(engine.chunk, cohort)} of {_clients(cohort)} at a time"
    if processes > 1:
        line += f" on each of {processes} processes"
    if asked == "vectorized":
        line += ", as asked"
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
    where = "" if processes == 1 else f" on each of {processes} processes"
    return f"it would train {_clients(cohort)} at a time{where}, and {MIN_CLIENTS} are worth it"


def _clients(count: int) -> str:
    return f"{count} client" if count == 1 else f"{count} clients"
