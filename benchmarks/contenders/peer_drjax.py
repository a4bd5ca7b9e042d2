"""DrJAX: all clients of a round in one compiled program, shorter ones padded with batches of weight zero.

Where only JAX is installed, the same program in its own words: DrJAX's map over clients is ``jax.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from workloads import Clock, Job, run_contender

try:
    import drjax
except ImportError:
    drjax = None

WIDTHS = {"linear": (60, 10), "mlp": (784, 128, 128, 10)}
Parameters = list[tuple[Any, Any]]


def unflatten(vector: np.ndarray, widths: tuple[int, ...]) -> Parameters:
    """Weights [out, in] and biases [out], in torch's order."""
    layers, at = [], 0
    for before, after in pairwise(widths):
        weight, bias = np.split(vector[at : at + (before + 1) * after], [before * after])
        layers.append((jnp.asarray(weight.reshape(after, before)), jnp.asarray(bias)))
        at += (before + 1) * after
    return layers


def losses(parameters: Parameters, x: Any, y: Any) -> Any:
    """Cross entropy of every sample."""
    for weight, bias in parameters[:-1]:
        x = jax.nn.relu(x @ weight.T + bias)
    weight, bias = parameters[-1]
    return -jnp.take_along_axis(jax.nn.log_softmax(x @ weight.T + bias), y[:, None], 1)[:, 0]


def visits(job: Job, cohort: list[int], steps: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Samples of every step and their weights, [clients, steps, batch]: each epoch in a new order."""
    work, rows = job.workload, job.rows
    shape = (len(cohort), work.epochs, steps * work.batch)
    keys = rng.random(shape)
    owned = np.zeros((len(cohort), shape[2]), dtype=np.int64)
    for i, client in enumerate(cohort):
        keys[i, :, len(rows[client]) :] = 2.0
        owned[i, : len(rows[client])] = rows[client]
    order = keys.argsort(-1)
    samples = np.take_along_axis(owned[:, None], order, -1)
    real = np.take_along_axis(keys, order, -1) < 2
    batches = (len(cohort), work.epochs * steps, work.batch)
    return samples.reshape(batches), real.reshape(batches).astype(np.float32)


def play(job: Job) -> tuple[Clock, Callable[[], float]]:
    work = job.workload
    x, y = jnp.asarray(job.arrays["x"]), jnp.asarray(job.arrays["y"])
    parameters = unflatten(job.arrays["start"], WIDTHS[work.model])
    steps = -(-max(map(len, job.rows)) // work.batch)
    rng = np.random.default_rng(0)

    def play_round(parameters: Parameters, x: Any, y: Any, samples: Any, real: Any, sizes: Any) -> Parameters:
        def step(local: Parameters, batch: tuple[Any, Any]) -> tuple[Parameters, None]:
            chosen, weight = batch

            def loss(local: Parameters) -> Any:
                return (losses(local, x[chosen], y[chosen]) * weight).sum() / jnp.maximum(weight.sum(), 1)

            return jax.tree.map(lambda p, g: p - work.lr * g, local, jax.grad(loss)(local)), None

        def client(local: Parameters, samples: Any, real: Any) -> Parameters:
            return jax.lax.scan(step, local, (samples, real))[0]

        if drjax is None:
            models = jax.vmap(client, (None, 0, 0))(parameters, samples, real)
            return jax.tree.map(lambda model: jnp.tensordot(sizes / sizes.sum(), model, 1), models)
        models = drjax.map_fn(client, (drjax.broadcast(parameters), samples, real))
        return jax.tree.map(lambda model: drjax.reduce_weighted_mean(model, sizes), models)

    if drjax is not None:
        play_round = drjax.program(placements={"clients": work.cohort})(play_round)
    play_round = jax.jit(play_round)
    clock = Clock(skip=job.skip, seconds=job.seconds)
    clock.tick()
    for cohort in job.cohorts:
        sizes = np.array([len(job.rows[client]) for client in cohort], dtype=np.float32)
        parameters = play_round(parameters, x, y, *visits(job, cohort, steps, rng), sizes)
        jax.block_until_ready(parameters)
        is_last = clock.is_over
        clock.tick()
        if is_last:
            break
    return clock, lambda: float(losses(parameters, x, y).mean())


if __name__ == "__main__":
    run_contender(play, "drjax", "jax")
