"""Which engine trains a federation: the one asked for, or the one that was measured to be faster."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_fedhaw.clients.engine import Engine
from lightning_fedhaw.clients.vectorized.engine import VectorizedEngine
from lightning_fedhaw.clients.vectorized.trial import NoFunctionError, free_memory, probe
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


def slower(engine: Engine, cohort: int, processes: int = 1) -> str | None:
    """Why one client after another is faster, by the rule of ``docs/speed.md``; ``None`` if it is not."""
    parameters, batch = engine.layout.numel, engine.data.settings.batch_size
    is_cpu = engine.host.device.type == "cpu"
    most = MAX_PARAMETERS if is_cpu else MAX_PARAMETERS_GPU
    if cohort < MIN_CLIENTS:
        where = "" if processes == 1 else f" on each of {processes} processes"
        return f"it would train {_clients(cohort)} at a time{where}, and {MIN_CLIENTS} are worth it"
    if parameters > most:
        return f"{parameters:,} parameters are more than {most:,}"
    # One that is frozen has one weight for all clients, and a batched call makes a larger batch for it.
    convolutions = [m for m in engine.host.module.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    has_convolutions = any(trainable(convolution) for convolution in convolutions)
    if is_cpu and has_convolutions and parameters * batch > MAX_CONVOLVED:
        return (
            f"it has convolutions, and parameters times batch size are {parameters * batch:,}: over {MAX_CONVOLVED:,}"
        )
    return None


def choose(
    sequential: Engine,
    asked: EngineName,
    *,
    cohort: int,
    chunk_memory: int | None,
    compile_clients: bool,
    processes: int = 1,
) -> tuple[Engine, str]:
    """The engine of a run, and one line that says which and why.

    Args:
        sequential: The sequential engine.
        asked: The argument ``engine``.
        cohort: Clients that one process trains in a round.
        chunk_memory: Bytes in use at a time; a quarter of what is free by default.
        compile_clients: Whether the batched step is compiled.
        processes: How many train.

    Raises:
        ValueError: If the vectorized engine was asked for and cannot be had.
    """
    no_effect = "; `compile_clients=True` has no effect on it" if compile_clients else ""
    if asked == "sequential":
        return sequential, f"Engine: sequential, as asked{no_effect}."
    why = slower(sequential, cohort, processes) if asked == "auto" else None
    if why is not None:
        return sequential, f"Engine: sequential, because {why}{no_effect}."
    host = sequential.host
    given: tuple[Any, ...] = (host, sequential.layout, sequential.data, sequential.plan, sequential.objectives)
    try:
        facts = probe(*given)
    except NoFunctionError as error:
        if asked == "vectorized":
            raise ValueError(
                f'`engine="vectorized"` needs a step that is a function, and {error}. Use `engine="sequential"`,'
                ' or `engine="auto"`, which chooses by itself.'
            ) from error
        return sequential, f"Engine: sequential, because {error}{no_effect}."
    if asked == "auto" and facts.frozen > MAX_FROZEN:
        return sequential, (
            f"Engine: sequential, because a step computes with {facts.frozen:,} frozen parameters, and that is more"
            f" than {MAX_FROZEN:,}{no_effect}."
        )
    memory = chunk_memory or free_memory(host.device) // 4
    fit = memory // facts.bytes_per_client
    # Only where the bound is given: what happens to be free must not decide which numbers a seed gives.
    if asked == "auto" and chunk_memory is not None and fit < MIN_CLIENTS:
        return sequential, (
            f"Engine: sequential, because {_clients(fit)} at a time fit into `chunk_memory`={memory}, and {MIN_CLIENTS}"
            f" are worth it{no_effect}."
        )
    engine = VectorizedEngine(
        *given,
        facts=facts,
        chunk_memory=memory,
        compile_clients=compile_clients and not (facts.uses_index or facts.draws_dropout or facts.draws_other),
        fallback=sequential if asked == "auto" else None,
    )
    engine.kept, engine.gradient = sequential.kept, sequential.gradient
    told = f"Engine: vectorized, {min(engine.chunk, cohort)} of {_clients(cohort)} at a time"
    if processes > 1:
        told += f" on each of {processes} processes"
    if asked == "vectorized":
        told += ", as asked"
    if not fit:
        told += f"; one takes about {facts.bytes_per_client:,} bytes, more than `chunk_memory`={memory:,}"
    if compile_clients and not engine.compile_clients:
        told += "; not compiled, because the step reads `batch_idx` or draws random numbers"
    if facts.draws_other:
        told += "; random numbers other than dropout differ from those of the sequential engine"
    if not facts.is_compared:
        told += (
            "; not compared with one client alone, because the step draws from a distribution that depends on the model"
        )
    return engine, f"{told}."


def _clients(count: int) -> str:
    return f"{count} client" + "s" * (count != 1)
