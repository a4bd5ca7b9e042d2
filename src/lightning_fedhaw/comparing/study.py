"""Methods compared on the same federations, over seeds and settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from lightning_fedhaw import arguments
from lightning_fedhaw.comparing import execution
from lightning_fedhaw.comparing.cells import OPTIONS, Cell, merged_options
from lightning_fedhaw.comparing.execution import Failure, Run
from lightning_fedhaw.comparing.journal import Journal
from lightning_fedhaw.comparing.plan import (
    BASELINES,
    Recipe,
    RunPlan,
    build_callbacks,
    build_cell,
    build_method,
    build_setting,
    check_settings,
    file_name,
    plan_runs,
    recipes,
)
from lightning_fedhaw.comparing.running import PlanKind, Record, run
from lightning_fedhaw.comparing.statistics import Group, groups_of
from lightning_fedhaw.comparing.tables import FORMATS, differences_table, results_json, results_table, runs_csv
from lightning_fedhaw.isolation import isolated_randomness
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.report.history import RunHistory
from lightning_fedhaw.report.plotting import draw_bands

Created = TypeVar("Created")

PICTURE_FORMATS = ("png", "pdf")
"""The formats of pictures if nothing else is asked for: for pages, and for papers."""

_SUFFIXES = {"text": "txt", "markdown": "md", "latex": "tex"}


class Comparison:
    """The finished runs of a comparison, with their tables and pictures.

    Attributes:
        output: The folder of the comparison.
        records: The finished runs, in the order of the plan.
        failures: The runs that raised an error.
        groups: The runs by cell and settings.
        reference: The method that the others are compared with.
        target: The value of the metric whose first round is looked for.

    Args:
        output: The folder of the comparison.
        records: The finished runs.
        failures: The runs that raised an error.
        reference: The method that the others are compared with.
        target: The value of the metric whose first round is looked for.
    """

    def __init__(
        self,
        output: Path,
        records: Sequence[Record],
        failures: Sequence[Failure],
        reference: str,
        target: float | None,
    ) -> None:
        self.output = output
        self.records = list(records)
        self.failures = list(failures)
        self.reference = reference
        self.target = target
        self.groups: list[Group] = groups_of(self.records)

    def table(self, style: str = "text") -> str:
        """Return the numbers of every method: mean ± sample standard deviation over seeds.

        Args:
            style: ``"text"``, ``"markdown"`` or ``"latex"``.
        """
        return results_table(self.groups, arguments.choice("style", style, FORMATS), self.target)

    def differences(self, style: str = "text") -> str:
        """Return how far each method is ahead of the reference, paired by seed: mean ± standard error.

        Args:
            style: ``"text"``, ``"markdown"`` or ``"latex"``.
        """
        return differences_table(self.groups, self.reference, arguments.choice("style", style, FORMATS))

    def histories(self, group: Group) -> dict[str, list[RunHistory]]:
        """Return the curves of a group's runs, by method, for the functions of ``lightning_fedhaw.plotting``."""
        histories: dict[str, list[RunHistory]] = {}
        for method, records in group.records.items():
            histories[method] = []
            for record in records.values():
                # Of the record and not of the log, which another run of the same label may have replaced.
                history = RunHistory()
                history.metrics = [{group.metric: value} for value in record["curve"]]
                histories[method].append(history)
        return histories

    def draw(self, formats: Sequence[str] = PICTURE_FORMATS) -> list[Path]:
        """Draw the curves of each group with bands over seeds.

        Args:
            formats: The formats, by suffix.

        Returns:
            The paths of the pictures.

        Raises:
            ModuleNotFoundError: If matplotlib is missing.
        """
        paths = []
        for group in self.groups:
            histories = self.histories(group)
            name = file_name(group.title)
            for suffix in formats:
                path = self.output / f"curves_{name}.{suffix}"
                draw_bands(histories, [group.metric], path)
                paths.append(path)
        return paths

    def write(self) -> list[Path]:
        """Write the tables in all formats, and the numbers as CSV and JSON.

        Returns:
            The paths of the files.
        """
        contents = {
            "results.csv": runs_csv(self.records, self.target),
            "results.json": results_json(self.groups, self.reference, self.target),
        }
        for style, suffix in _SUFFIXES.items():
            contents[f"table.{suffix}"] = self.table(style)
            contents[f"differences.{suffix}"] = self.differences(style)
        paths = []
        for name, content in contents.items():
            path = self.output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            paths.append(path)
        return paths


def compare(
    rules: str | Sequence[object] | Mapping[str, object],
    cells: str | Cell | Sequence[object] | Mapping[str, object] = "digits",
    *,
    seeds: Sequence[int] = (0, 1, 2),
    rounds: int = 40,
    settings: Mapping[str, Sequence[object]] | None = None,
    baselines: Sequence[str] = (),
    output: str | Path = "comparison",
    jobs: int = 1,
    metric: str | None = None,
    target: float | None = None,
    reference: str | None = None,
    accelerator: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Run methods on the same federations and compare them.

    With one seed, every method has the same clients, cohorts, batches and initial model. A run uses one thread, so that
    its numbers do not depend on ``jobs``. Finished runs are in ``output/runs.jsonl``, a line each, and are not
    repeated; so a comparison that was cut off, or that gets another rule or seed, continues where it is. What decides
    is what the call says (cell, rule, settings, seed, rounds) and not the code behind it.

    Args:
        rules: The methods: expressions such as ``"FedAvg"``, ``"FedAvgM(lr=0.5)"``, ``"mine.MyRule(step=2)"``,
            ``"FedAvg + FedProx(mu=0.01)"``, with a label if need be (``"tuned=FedAdam(lr=0.03)"``); or functions
            without arguments that return a rule, or a list with one rule; or a mapping from labels to either.
        cells: The federations: expressions such as ``"digits"``, ``"digits(hidden=[64])"``, ``"split.npz"``,
            ``"torchvision(name='MNIST')"``, the import path of a function that returns a :class:`Cell`, or cells.
        seeds: The seeds.
        rounds: Rounds of each run.
        settings: Lists of values that are combined: any option of the federation (``alpha``, ``local_epochs``, ...),
            ``errors`` (each client fails at a rate drawn up to this one), ``channel`` and ``objective`` (expressions),
            and arguments of the cell's model and data (``model.lr``, ``data.batch_size``).
        baselines: ``"centralized"``: all data in one place. ``"alone"``: each client by itself, the mean over clients.
        output: The folder of all results.
        jobs: Processes that run at the same time.
        metric: The metric that is compared. Default: that of the cell, else an accuracy that is logged, else a loss.
        target: A value of the metric; the table gets the rounds that a method needs to reach it.
        reference: The method that the others are compared with. Default: the first.
        accelerator: As of the trainer.
        progress: Called with one line after each run. Without it, a warning tells of runs that failed.

    Returns:
        The results; tables and numbers are written to ``output`` too, pictures by :meth:`Comparison.draw`.

    Raises:
        ValueError: If an argument is not allowed.
        RuntimeError: If a process died.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     results = compare(("FedAvg", "FedHAW"), "synthetic(clients=4)", seeds=(0,), rounds=2, output=folder)
        >>> len(results.records)
        2
    """
    plans = _checked_plans(rules, cells, seeds, rounds, settings or {}, baselines, accelerator, metric)
    arguments.integer("jobs", jobs, minimum=1)
    arguments.optional(arguments.number, "target", target)
    # Each once, in the order of the call, whose first one is the reference.
    methods = list(dict.fromkeys(plan.method.label for plan in plans))
    if reference is not None and reference not in methods:
        raise arguments.invalid("reference", f"one of the methods ({', '.join(methods)})", reference)
    folder = Path(output)
    journal = Journal(folder)
    failures = run_missing(plans, journal, folder, jobs, progress, run)
    if failures and progress is None:
        warnings.warn(
            f"{len(failures)} of {len(plans)} runs failed and are missing in the tables, the first with"
            f" {failures[0].error} The attribute `failures` has them all.",
            stacklevel=2,
        )
    records = []
    for plan in plans:
        record = journal.get(plan.key)
        if record is not None:
            records.append(record)
    comparison = Comparison(folder, records, failures, reference or methods[0], target)
    comparison.write()
    return comparison


def run_missing(
    plans: Sequence[PlanKind],
    journal: Journal,
    folder: Path,
    jobs: int,
    progress: Callable[[str], None] | None,
    run: Run[PlanKind],
) -> list[Failure]:
    """Carry out the runs that have no record, and return those that raised an error.

    Args:
        plans: All runs.
        journal: The records of finished ones; receives the new ones.
        folder: The folder of all results.
        jobs: The number of processes.
        progress: Called with one line after each run.
        run: Carries out one run.
    """
    missing = [plan for plan in plans if journal.get(plan.key) is None]
    failures: list[Failure] = []
    for number, (plan, result) in enumerate(execution.execute(missing, folder, jobs, run), 1):
        if isinstance(result, Failure):
            failures.append(result)
            line = result.error
        else:
            journal.add(result)
            line = f"{result['metric']} {result['curve'][-1]:.4g} in {result['seconds']:.1f} s"
        if progress is not None:
            progress(f"[{number}/{len(missing)}] {plan.title}: {line}")
    return failures


def _checked_plans(
    rules: object,
    cells: object,
    seeds: Sequence[int],
    rounds: int,
    settings: Mapping[str, Sequence[object]],
    baselines: Sequence[str],
    accelerator: str,
    metric: str | None,
) -> list[RunPlan]:
    """Return all runs, after everything that they need has been created once."""
    checked_seeds = arguments.integers("seeds", seeds, minimum=0, allowed="a list of integers of at least 0")
    arguments.integer("rounds", rounds, minimum=1)
    check_settings(settings)
    for baseline in baselines:
        arguments.choice("baselines", baseline, BASELINES)
    methods = recipes("rules", rules)
    federations = recipes("cells", cells)
    for baseline in baselines:
        if any(method.label == baseline for method in methods):
            raise ValueError(f"`rules` must not call a method `{baseline}`, as the baseline. Give it another label.")
    plans = plan_runs(
        federations,
        methods,
        settings,
        checked_seeds,
        rounds=rounds,
        baselines=baselines,
        accelerator=accelerator,
        metric=metric,
    )
    # Rules may draw when they are created, which must not change the caller's random states.
    with isolated_randomness(torch.device("cpu")):
        for method in methods:
            _create("rule", method, build_method)
        for federation in federations:
            _check_cell(_create("cell", federation, build_cell), settings)
    return plans


def _create(kind: str, recipe: Recipe, build: Callable[[Recipe], Created]) -> Created:
    """Create something once, so that a mistake is found before the first run."""
    try:
        return build(recipe)
    except (TypeError, ValueError) as error:
        message = str(error)
        if f"`{recipe.label}`" in message:
            raise
        raise ValueError(f"The {kind} `{recipe.label}` cannot be created: {message}") from error


def _check_cell(cell: Cell, settings: Mapping[str, Sequence[object]]) -> None:
    """Check every value of every setting on a cell, each by itself."""
    # The constructor refuses what is not allowed; the object is not needed.
    FederationOptions(**cell.options)
    for name, values in settings.items():
        for value in values:
            setting = build_setting(name, value)
            if name == "errors":
                arguments.probability("errors", setting)
            build_callbacks({name: setting})
            if name in OPTIONS:
                FederationOptions(**merged_options(cell.options, {name: setting}))
