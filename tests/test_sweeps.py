"""The sweep files: W&B accepts them, its agent's command lines are understood, and one of them runs."""

import inspect
import json
import math
import os
import re
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml

import lightning_fedhaw
import programs
from cli_task import Network, Samples
from federations import QUIET
from lightning_fedhaw import FederatedTrainer, objectives
from lightning_fedhaw.__main__ import main
from lightning_fedhaw.cli import FederatedCLI
from lightning_fedhaw.extending import AggregationRule, ClientObjective
from lightning_fedhaw.sweeping import sweep
from lightning_fedhaw.sweeping.parameters import draws

SWEEPS = Path(__file__).parents[1] / "examples" / "sweeps"
FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(SWEEPS.glob("*.yaml")) if path.stem != "base"}
each = pytest.mark.parametrize("name", FILES)


def choices(parameter):
    """All values of a list, or the ends and a value between."""
    if "value" in parameter:
        return [parameter["value"]]
    if "values" in parameter:
        return parameter["values"]
    low, high = parameter["min"], parameter["max"]
    if parameter["distribution"] == "int_uniform":
        return [low, (low + high) // 2, high]
    return [low, math.sqrt(low * high), high]


def combinations(parameters):
    """Every value of every parameter, in as few combinations as have them all."""
    values = {name: choices(parameter) for name, parameter in parameters.items()}
    longest = max(map(len, values.values()))
    return [{name: options[i % len(options)] for name, options in values.items()} for i in range(longest)]


def command_line(config, values):
    """What `wandb agent` starts for these values."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils", reason="the agent's command lines need wandb")
    filled = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    filled |= {"env": ["/usr/bin/env"], "program": [config["program"]]}
    line = []
    for part in utils.create_sweep_command(list(config["command"])):
        line += filled[part[2:-1]] if part.startswith("${") else [part]
    return line


@pytest.fixture(scope="module")
def parser():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fedhaw"])
        patch.syspath_prepend(str(SWEEPS))
        patch.setenv("PL_GLOBAL_SEED", "0")
        quiet = ["--trainer.logger=false"]
        yield FederatedCLI(args=["--config", str(SWEEPS / "base.yaml"), *quiet], run=False).parser


def test_every_rule_and_objective_has_a_file():
    swept = {
        value
        for config in FILES.values()
        for key in ("rule", "objective")
        for value in choices(config["parameters"].get(key, {"values": []}))
    }
    exported = {
        name
        for module in (lightning_fedhaw, objectives)
        for name in module.__all__
        if inspect.isclass(kind := getattr(module, name))
        and issubclass(kind, AggregationRule | ClientObjective)
        and kind is not ClientObjective
    }
    assert swept == exported - {"ScaffoldObjective"}, "ScaffoldCallback brings its objective along"
    assert {config["method"] for config in FILES.values()} == {"grid", "random", "bayes"}


@each
def test_wandb_accepts_the_file(name):
    """By the client's own checks, and by the schema of wandb's package of search algorithms where that is installed."""
    sweeps = pytest.importorskip("wandb.apis.public.sweeps", reason="wandb is not installed")
    config = FILES[name]
    filled = sweeps._validate_config_and_fill_distribution(config)
    assert filled["parameters"] == config["parameters"], "distributions are written out"
    assert config["command"] == ["${env}", "fedhaw", "fit", "--config", "base.yaml", "${args}"]
    assert config["metric"] == {"name": "val_acc", "goal": "maximize"}
    assert ("run_cap" in config) == (config["method"] != "grid"), "only a grid ends by itself"


@pytest.mark.filterwarnings("ignore:Valid config keys have changed in V2")
@each
def test_the_schema_of_wandb_accepts_the_file(name):
    sweeps = pytest.importorskip("sweeps", reason="wandb's schema comes with `pip install wandb[sweeps]`")
    config = json.loads(json.dumps(FILES[name]))
    config.pop("run_cap", None)  # W&B's server knows it, the published schema is older
    assert sweeps.schema_violations_from_proposed_config(config) == []
    config["method"] = "guess"
    assert sweeps.schema_violations_from_proposed_config(config)


@each
def test_numbers_are_numbers(name):
    for key, parameter in FILES[name]["parameters"].items():
        for value in choices(parameter):
            if isinstance(value, str):
                assert not value[0].isdigit(), f"{key}: {value} is text in YAML"
        if parameter.get("distribution") == "log_uniform_values":
            assert 0 < parameter["min"] < parameter["max"]


@each
def test_the_command_lines_are_understood(parser, name, monkeypatch):
    """Each is read, the first also in alphabetical order, and every value arrives where it belongs."""
    config = FILES[name]
    monkeypatch.chdir(SWEEPS)
    for number, values in enumerate(combinations(config["parameters"])):
        env, program, subcommand, *arguments = command_line(config, values)
        assert (env, program, subcommand, arguments[:2]) == ("/usr/bin/env", "fedhaw", "fit", ["--config", "base.yaml"])
        assert len(arguments) == 2 + len(values)
        orders = [arguments]
        if number == 0:
            orders.append(arguments[:2] + sorted(arguments[2:], key=lambda part: part.split("=")[0]))
        for order in orders:
            read = parser.parse_args(order)
            for key, value in values.items():
                group, _, rest = key.partition(".")
                got = read[group]
                if rest.startswith("optimizer"):
                    continue
                if not rest:
                    got = got if key == "seed_everything" else got.class_path.rpartition(".")[2]
                else:
                    got = got.get("init_args", got)[rest]
                assert got == (float(value) if isinstance(got, float) else value), key
                assert isinstance(got, bool) == isinstance(value, bool)


RANK = """
import lightning.pytorch as pl
class Tell(pl.Callback):
    def on_fit_end(self, trainer, module):
        weights = float(sum(p.double().sum() for p in module.parameters()))
        val_acc = float(trainer.callback_metrics["val_acc"])
        print("rank", trainer.global_rank, "lr", module.lr, "val_acc", val_acc, "weights", weights)
"""


def test_the_shortest_runs_as_the_agent_would_start_it(tmp_path):
    """On two processes, offline: one W&B run, with the same values and the same result on every process.

    The callback is of a module in the working directory.
    """
    pytest.importorskip("wandb", reason="wandb is not installed")
    config_util = pytest.importorskip("wandb.sdk.lib.config_util")
    values = {**combinations(FILES["fedavg"]["parameters"])[0], "model.lr": 0.1}
    line = command_line(FILES["fedavg"], values)
    short = ["--trainer.rounds=2", "--trainer.devices=2", "--trainer.callbacks+=tell.Tell"]
    arguments = [str(SWEEPS / "base.yaml") if part == "base.yaml" else part for part in line[3:]]
    (tmp_path / "tell.py").write_text(RANK)
    config_util.save_config_file_from_dict(
        str(tmp_path / "values.yaml"), {name: {"value": value} for name, value in values.items()}
    )
    env = {
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "abcd1234",
        "WANDB_RUN_ID": "run12345",
        "WANDB_SWEEP_PARAM_PATH": str(tmp_path / "values.yaml"),
        "PYTHONPATH": os.pathsep.join([str(SWEEPS), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
    }
    code, printed = programs.run_module("lightning_fedhaw", "fit", *arguments, *short, env=env)
    assert code == 0, printed
    told = [part.split(" lr ")[1] for part in printed.splitlines() if part.startswith("rank ")]
    assert len(told) == 2
    assert told[0] == told[1]
    assert told[0].startswith("0.1 ")
    assert [path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*")] == ["run12345"]
    # Only one of the processes saves the configuration.
    (configuration,) = tmp_path.rglob("fedhaw-digits/**/config.yaml")
    assert configuration == tmp_path / "fedhaw-digits" / "run12345" / "config.yaml"
    saved = yaml.safe_load(configuration.read_text())
    assert saved["model"]["init_args"]["lr"] == 0.1
    assert saved["rule"]["class_path"] == "lightning_fedhaw.FedAvgCallback"


def test_the_package_starts_no_wandb_run():
    package = Path(lightning_fedhaw.__file__).parent
    assert not any("wandb.init" in path.read_text() for path in package.rglob("*.py"))


# ---------------------------------------------------------------------- on this machine


SWEEP = """
command: [fedhaw, fit, --config=base.yaml, "${args}"]
method: METHOD
metric: {name: val_acc, goal: maximize}
parameters:
  rule: {values: [FedAvgCallback, FedHAWCallback]}
  model.hidden: PARAMETER
"""
BASE = """
model: cli_task.Network
data: cli_task.Samples
federation: {num_clients: 4, alpha: 1.0, client_eval: false}
trainer: {rounds: 1, accelerator: cpu, logger: WandbLogger}
"""


def write_sweep(method, parameter):
    Path("base.yaml").write_text(BASE)
    Path("mine.yaml").write_text(SWEEP.replace("METHOD", method).replace("PARAMETER", parameter))


def test_a_grid_on_this_machine_is_compared_and_not_repeated(capsys):
    write_sweep("grid", "{values: [3]}")
    assert main(["sweep", "mine.yaml", "--jobs=1", "--trainer.rounds=2", "--seeds", "5"]) == 0
    printed = capsys.readouterr().out
    assert "[2/2] mine, FedHAW, model.hidden=3, seed 5: val_acc" in printed
    assert re.search(r"FedAvg, model.hidden=3 +\d", printed)
    assert "fedhaw fit --config=base.yaml --rule=Fed" in printed
    folder = Path("sweeps/mine/runs/mine/FedHAW_model.hidden=3/seed_5")
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["rounds"] == 2
    pl.seed_everything(5)
    module = Network(hidden=3)
    data = {"num_clients": 4, "alpha": 1.0}
    trainer = FederatedTrainer(rounds=2, callbacks=[lightning_fedhaw.FedHAWCallback()], **data, **QUIET)
    trainer.fit(module, datamodule=Samples())
    results = sweep("mine.yaml", seeds=[5], further=["--trainer.rounds=2"], progress=print)
    assert results.records[1]["curve"][-1] == float(trainer.callback_metrics["val_acc"])
    assert "[1/" not in capsys.readouterr().out, "nothing is repeated"


@pytest.mark.parametrize(
    ("method", "parameter", "arguments", "said"),
    [
        ("grid", "{min: 1, max: 3}", [], "`model.hidden` has a range, and `method: grid` needs `values`"),
        ("random", "{min: 1, max: 3}", [], "`method: random` draws without end, and 'mine.yaml' has no `run_cap`"),
        ("random", "{min: 1e-3, max: 3.0}", [], "`model.hidden` must have a `value`, `values`, or `min` and `max`"),
        ("guess", "{value: 3}", [], "`method` must be one of 'grid', 'random', 'bayes', got 'guess'"),
        ("grid", "{value: many}", [], "`--hidden`: Expected a <class 'int'>. Got value: many"),
        ("grid", "{value: 3}", ["--trainer.roundz=1"], "Did you mean `rounds`?"),
    ],
)
def test_mistakes_in_a_sweep_are_one_sentence(method, parameter, arguments, said, capsys):
    write_sweep(method, parameter)
    with pytest.raises(SystemExit):
        main(["sweep", "mine.yaml", *arguments])
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message


def test_draws_are_of_their_distributions_and_stay_the_same_when_more_are_asked_for():
    parameters = {
        "integer": {"min": 2, "max": 4},
        "rate": {"distribution": "log_uniform_values", "min": 1e-3, "max": 1.0},
        "power": {"distribution": "log_uniform", "min": -2.0, "max": 0.0},
        "step": {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.25},
        "name": {"values": ["a", "b"], "probabilities": [0.0, 1.0]},
        "normal": {"distribution": "normal", "mu": 3.0, "sigma": 0.0},
    }
    drawn = draws(parameters, 200, seed=1)
    assert drawn[:5] == draws(parameters, 5, seed=1)
    assert drawn[:5] != draws(parameters, 5, seed=2)
    assert {values["integer"] for values in drawn} == {2, 3, 4}
    assert {values["step"] for values in drawn} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert all((values["name"], values["normal"]) == ("b", 3.0) for values in drawn)
    assert all(math.exp(-2) <= values["power"] <= 1 for values in drawn)
    # Half of the draws of a log-uniform rate lie below the geometric mean of its bounds.
    below = sum(values["rate"] < math.sqrt(1e-3) for values in drawn)
    assert 80 <= below <= 120
