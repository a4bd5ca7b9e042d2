"""A sweep on this machine: its runs are planned, checked, carried out and compared."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_fedhaw import arguments
from lightning_fedhaw.comparing.journal import Journal
from lightning_fedhaw.comparing.running import seeded, without_advice
from lightning_fedhaw.comparing.study import Comparison, run_missing
from lightning_fedhaw.federation.client_statistics import is_better_when_higher
from lightning_fedhaw.isolation import isolated_randomness
from lightning_fedhaw.sweeping.parameters import Values, all_combinations, draws
from lightning_fedhaw.sweeping.running import ArgumentReader, SweepRun, refusing, run
from lightning_fedhaw.sweeping.sweep_file import SweepFile, read_sweep

_SEED = "seed_everything"

# Values of the federation that are tuned, like those of the rule. All others say which problem is solved.
_TUNED = ("local_epochs", "local_steps", "optimizer_state", "client_lr_scale")

_PROBLEM = ("data", "channel", "federation")
"""Groups whose values tell tables apart: methods are compared on one and the same federation."""

_CONFIG = ("--config", "-c")


def sweep(
    file: str | Path,
    *,
    runs: int | None = None,
    seeds: Sequence[int] | None = None,
    draw_seed: int = 0,
    further: Sequence[str] = (),
    output: str | Path | None = None,
    jobs: int = 1,
    metric: str | None = None,
    target: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Run a W&B sweep file on this machine, without an account, and compare its runs.

    Each run is one command ``fedhaw fit`` with the values of the sweep. A file with ``method: grid`` gives all
    combinations; one with ``random`` gives random draws, and so does ``bayes``, whose search needs W&B's server.
    Finished runs are in ``output/runs.jsonl`` and are not repeated. Modules and configurations are looked for in the
    working directory, then next to the file.

    Args:
        file: The sweep file.
        runs: The number of draws, or the first so many combinations of a grid. Default: ``run_cap`` of the file, else
            the whole grid.
        seeds: Run every combination once with each of these seeds. Default: the seeds of the file, or of its base
            configuration.
        draw_seed: The seed of random draws. With one seed, the first draws are the same whatever their number.
        further: Arguments of ``fedhaw fit`` for all runs, such as ``["--trainer.rounds=5"]``.
        output: The folder of all results. Default: ``sweeps/NAME``.
        jobs: Processes that run at the same time; every run uses one thread.
        metric: The metric that is compared. Default: that of the file, else an accuracy that is logged, else a loss.
        target: A value of the metric; the table gets the rounds that a method needs to reach it.
        progress: Called with one line after each run.

    Returns:
        The results, as those of :func:`lightning_fedhaw.comparing.compare`.

    Raises:
        ValueError: If the file is no sweep, or one of its runs would be refused.
        RuntimeError: If a process died.
    """
    description = read_sweep(file)
    if runs is None:
        runs = description.run_cap
    arguments.optional(arguments.integer, "runs", runs, minimum=1)
    arguments.integer("draw_seed", draw_seed, minimum=0)
    arguments.integer("jobs", jobs, minimum=1)
    arguments.optional(arguments.number, "target", target)
    if seeds is not None:
        seeds = arguments.integers("seeds", seeds, minimum=0, allowed="a list of integers of at least 0")
    if progress is not None:
        for note in notes(description):
            progress(note)
    folder = Path("sweeps", description.name)
    if output is not None:
        folder = Path(output)
    with _importable(description.path.parent):
        plans = _plans(description, _combinations(description, runs, draw_seed, seeds), further, metric)
        journal = Journal(folder)
        failures = run_missing(plans, journal, folder, jobs, progress, run)
    records = []
    for plan in plans:
        record = journal.get(plan.key)
        if record is not None:
            records.append(record)
    comparison = Comparison(folder, records, failures, plans[0].method, target)
    comparison.write()
    return comparison


def notes(description: SweepFile) -> list[str]:
    """Say what of a sweep file has another effect on this machine than on W&B's server."""
    said = []
    if description.method == "bayes":
        said.append("`method: bayes` needs W&B's server; here the values are drawn at random.")
    for name in description.unused:
        said.append(f"`{name}` has no effect here: every run is finished.")
    return said


def _combinations(
    description: SweepFile, runs: int | None, draw_seed: int, seeds: Sequence[int] | None
) -> list[Values]:
    """Return the values of all runs.

    Raises:
        ValueError: If nothing says how many draws there are.
    """
    if description.method == "grid":
        combinations = all_combinations(description.parameters)[:runs]
    elif runs is None:
        raise ValueError(
            f"`method: {description.method}` draws without end, and {str(description.path)!r} has no `run_cap`. Say how"
            " many: `--runs=20`."
        )
    else:
        combinations = draws(description.parameters, runs, draw_seed)
    if seeds is None:
        return combinations
    repeated: dict[str, Values] = {}
    for values in combinations:
        for seed in seeds:
            seeded_values = {**values, _SEED: seed}
            # Combinations that differ in the file's seeds alone are one now.
            repeated[json.dumps(seeded_values, default=str)] = seeded_values
    return list(repeated.values())


def _plans(
    description: SweepFile, combinations: Sequence[Values], further: Sequence[str], metric: str | None
) -> list[SweepRun]:
    """Plan all runs, after the arguments of each have been read.

    Raises:
        ValueError: If some are refused, or two runs have all values in common.
    """
    before = _with_found_files(description.before, description.path.parent)
    after = [*_with_found_files(description.after, description.path.parent), *further]
    checksums = _checksums([*before, *after])
    plans: dict[str, SweepRun] = {}
    lines = []
    for values in combinations:
        lines.append([*before, *(f"--{name}={_text(value)}" for name, value in values.items()), *after])
    with without_advice(), isolated_randomness(torch.device("cpu")), seeded(0):
        # One parser for all: it takes longer than all its readings.
        reader = refusing(ArgumentReader, lines[0])
        for values, line in zip(combinations, lines, strict=True):
            config = refusing(reader.parser.parse_args, line)
            plan = SweepRun(
                sweep=description.name,
                arguments=tuple(line),
                method=_method(values, config, description),
                settings=_settings(values, description),
                seed=_seed(config),
                rounds=_rounds(config),
                metric=metric or description.metric,
                configurations=checksums,
            )
            plans[plan.key] = plan
    return list(plans.values())


def _method(values: Values, config: Any, description: SweepFile) -> str:
    """Return the rule and the objectives with their values, and the other values that are tuned."""
    names = {"rule": "no rule", "objective": ""}
    for group in names:
        path = getattr(config[group], "class_path", None) or values.get(group)
        if isinstance(path, str):
            names[group] = path.rpartition(".")[2].removesuffix("Callback")
    calls = []
    for group, name in names.items():
        group_arguments = []
        for key, value in values.items():
            if key.startswith(f"{group}."):
                group_arguments.append(f"{key.removeprefix(f'{group}.')}={value}")
        if name:
            calls.append(f"{name}({', '.join(group_arguments)})".removesuffix("()"))
    words = [" + ".join(calls)]
    for key, value in values.items():
        group, _, setting = key.partition(".")
        is_of_the_problem = group in _PROBLEM and setting not in _TUNED
        if group not in (*names, _SEED) and not is_of_the_problem and _varies(key, description):
            words.append(f"{setting if group == 'federation' else key}={value}")
    return ", ".join(words)


def _settings(values: Values, description: SweepFile) -> tuple[tuple[str, object], ...]:
    """Return the values that say which problem is solved, without those that never vary."""
    settings = []
    for key, value in values.items():
        group, _, setting = key.partition(".")
        if group in _PROBLEM and setting not in _TUNED and _varies(key, description):
            settings.append((key, value if isinstance(value, (bool, int, float)) else str(value)))
    return tuple(settings)


def _varies(key: str, description: SweepFile) -> bool:
    """Return whether a value is not the same in all runs."""
    return "value" not in description.parameters.get(key, {})


def _seed(config: Any) -> int:
    seed = config.federation.get("seed")
    if seed is None:
        seed = config.get(_SEED)
    # `seed_everything: true` draws a seed, and a run whose seed nobody knows could not be told from the next one.
    if isinstance(seed, bool):
        raise ValueError("`seed_everything` must be a number in a sweep, so that a run can be repeated.")
    return int(seed)


def _rounds(config: Any) -> int:
    rounds = config.trainer.get("rounds")
    if rounds is None:
        rounds = config.trainer.get("max_epochs")
    if rounds is None or rounds < 1:
        raise ValueError(
            "A sweep compares runs after the same number of rounds, and nothing says how many. Give `trainer.rounds`"
            " in the configuration, or `--trainer.rounds=30`."
        )
    return int(rounds)


def _text(value: object) -> str:
    """Write a value as it stands on a command line."""
    if isinstance(value, (list, dict)) or value is None:
        return json.dumps(value)
    return str(value)


class _NamedFile(NamedTuple):
    """A configuration file that is named among some arguments.

    Attributes:
        position: The position of the argument that holds its path.
        prefix: What comes before the path in it: ``"--config="``, or nothing.
        path: The path.
    """

    position: int
    prefix: str
    path: str


def _configurations(words: Sequence[str]) -> list[_NamedFile]:
    """Find the configuration files among some arguments: ``--config FILE`` and ``--config=FILE``."""
    files = []
    for position, word in enumerate(words):
        option, equals, value = word.partition("=")
        if equals and option in _CONFIG:
            files.append(_NamedFile(position, f"{option}=", value))
        elif position > 0 and words[position - 1] in _CONFIG:
            files.append(_NamedFile(position, "", word))
    return files


def _with_found_files(words: Sequence[str], folder: Path) -> list[str]:
    """Return arguments in which a configuration that lies next to the sweep file is named by its path."""
    found = list(words)
    for position, prefix, path in _configurations(words):
        if not Path(path).is_file() and folder.joinpath(path).is_file():
            found[position] = f"{prefix}{folder / path}"
    return found


def _checksums(words: Sequence[str]) -> tuple[int, ...]:
    """Return a checksum of each configuration file that some arguments name."""
    checksums = []
    for _, _, path in _configurations(words):
        if Path(path).is_file():
            checksums.append(zlib.crc32(Path(path).read_bytes()))
    return tuple(checksums)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the modules of a folder be imported, after those of the working directory."""
    earlier_path = list(sys.path)
    for path in (str(Path.cwd()), str(folder.resolve())):
        if path not in sys.path:
            sys.path.append(path)
    try:
        yield
    finally:
        sys.path[:] = earlier_path


def best_run(comparison: Comparison, goal: str | None) -> Mapping[str, Any] | None:
    """Return the record of the best run by its last value; None if no run is finished.

    Args:
        comparison: The results.
        goal: ``"maximize"`` or ``"minimize"``; None for what the name of the metric says.
    """
    best: Any = None
    for record in comparison.records:
        is_maximized = goal == "maximize"
        if goal is None:
            is_maximized = is_better_when_higher(record["metric"])
        sign = 1 if is_maximized else -1
        # NaN, of a run that diverged early, is not above anything.
        value = sign * record["curve"][-1]
        if best is None or value > sign * best["curve"][-1]:
            best = record
    return best  # type: ignore[no-any-return]
