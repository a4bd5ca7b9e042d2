"""Runs one after another, or in several processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path

from lightning_fedhaw.comparing.plan import Plan
from lightning_fedhaw.comparing.running import PlanKind, Record

_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


Run = Callable[[PlanKind, Path], Record]
"""A function of a module that carries out a plan, with the folder of all results."""


@dataclass(frozen=True)
class Failure:
    """A run that raised an error.

    Attributes:
        plan: The run.
        error: The error in one line.
        details: Its traceback.
    """

    plan: Plan
    error: str
    details: str


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def execute(
    plans: Sequence[PlanKind], output: Path, jobs: int, run: Run[PlanKind]
) -> Iterator[tuple[PlanKind, Record | Failure]]:
    """Carry out runs, and return each as soon as it is finished.

    Args:
        plans: The runs.
        output: The folder of the comparison.
        jobs: The number of processes; with 1, runs are carried out in this one.
        run: Carries out one.

    Raises:
        ValueError: If a run cannot be sent to another process.
        RuntimeError: If a process died.
    """
    if jobs == 1 or len(plans) < 2:
        for plan in plans:
            yield plan, _attempt(plan, output, run)
        return
    # Beforehand: the pool would say only that something cannot be pickled, and not which run it is.
    for plan in plans:
        _check_portable(plan)
    with _one_thread_for_children():
        pool = ProcessPoolExecutor(
            min(jobs, len(plans)), mp_context=_context(), initializer=_begin, initargs=(sys.path,)
        )
        try:
            plan_of: dict[Future[Record | Failure], PlanKind] = {}
            for plan in plans:
                plan_of[pool.submit(_attempt, plan, output, run)] = plan
            for future in as_completed(plan_of):
                yield plan_of[future], future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "A process died, for lack of memory perhaps: finished runs are kept, and the same call continues from"
                " there; fewer `jobs` need less. A script that gives `jobs` calls `compare` under"
                " `if __name__ == '__main__':`."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _context() -> BaseContext:
    """Return how processes begin.

    Not as copies of this process, in which the threads of torch would be missing. Where the system can, they are copies
    of a fresh one that has imported everything once.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_fedhaw.comparing.running"])
    return context


def _attempt(plan: PlanKind, output: Path, run: Run[PlanKind]) -> Record | Failure:
    try:
        return run(plan, output)
    except Exception as error:
        # Rules, modules and data of the user's may fail in any way; the other runs continue, and the error is reported.
        text = " ".join(str(error).split())
        return Failure(plan, f"{type(error).__name__}: {text}", traceback.format_exc())


def _check_portable(plan: Plan) -> None:
    try:
        pickle.dumps(plan)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"`jobs` above 1 must be able to send {plan.title} to another process ({error}). Give rules and cells as"
            " expressions, or as functions and classes of a module instead of lambdas, or `jobs=1`."
        ) from error


def _begin(path: list[str]) -> None:
    """Begin a process: modules are found where the first one finds them."""
    sys.path[:] = path


@contextmanager
def _one_thread_for_children() -> Iterator[None]:
    """Let processes begin with one thread each; libraries read this when they are imported."""
    earlier_values = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in earlier_values.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
