"""The sweep files: W&B accepts them, its agent's command lines are understood, and one of them runs."""

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_fedhaw
from lightning_fedhaw import objectives
from lightning_fedhaw.cli import FederatedCLI
from lightning_fedhaw.extending import AggregationRule, ClientObjective

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
        print("rank", trainer.global_rank, "lr", module.lr, "val_acc", float(trainer.callback_metrics["val_acc"]))
"""


def test_the_shortest_runs_as_the_agent_would_start_it(tmp_path):
    """On two processes, offline: one W&B run, with the same values on every process."""
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
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "abcd1234",
        "WANDB_RUN_ID": "run12345",
        "WANDB_SWEEP_PARAM_PATH": str(tmp_path / "values.yaml"),
        "PYTHONPATH": os.pathsep.join([str(SWEEPS), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "lightning_fedhaw", "fit", *arguments, *short],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    told = [part.split(" lr ")[1] for part in done.stdout.splitlines() if part.startswith("rank ")]
    assert len(told) == 2
    assert told[0] == told[1]
    assert told[0].startswith("0.1 ")
    assert [path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*")] == ["run12345"]
    saved = yaml.safe_load((tmp_path / "fedhaw-digits" / "run12345" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["lr"] == 0.1
    assert saved["rule"]["class_path"] == "lightning_fedhaw.FedAvgCallback"


def test_the_package_starts_no_wandb_run():
    package = Path(lightning_fedhaw.__file__).parent
    assert not any("wandb.init" in path.read_text() for path in package.rglob("*.py"))
