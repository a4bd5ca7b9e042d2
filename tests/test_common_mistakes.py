"""Common mistakes on the command line, each with the exact sentence that it gets, and no traceback."""

import sys
from pathlib import Path

import pytest

from lightning_fedhaw.__main__ import main

MODEL = "--model=cli_task.Network"
DATA = "--data=cli_task.Samples"
RULE = "--rule=FedAvgCallback"
ROUNDS = "--trainer.rounds=1"
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
TASK = [MODEL, DATA, RULE, ROUNDS, *QUIET]

MISTAKES = {
    "a typo in the name of a rule": (
        [MODEL, DATA, ROUNDS, "--rule=FedAvgCalback"],
        "`--rule`: there is no class `FedAvgCalback`; give a name or an import path. Did you mean `FedAvgCallback`?",
    ),
    "a typo in an argument of the federation": (
        [*TASK, "--federation.num_client=4"],
        "unrecognized arguments: --federation.num_client=4. Did you mean `num_clients`?",
    ),
    "a typo in an argument of the model": (
        [*TASK, "--model.hiden=4"],
        "`--model`: Problem with given class_path 'cli_task.Network': Option 'hiden' is not accepted. Did you mean"
        " `hidden`?",
    ),
    "an argument in another group": (
        [*TASK, "--lr=0.1"],
        "unrecognized arguments: --lr=0.1. The learning rate of the clients is an argument of the model: `--model.lr`.",
    ),
    "a path that is not there": (
        ["--config=missing.yaml"],
        "`--config`: File does not exist: '{folder}/missing.yaml'",
    ),
    "a module that is not there": (
        ["--model=mine.Net", DATA, RULE, ROUNDS],
        "`--model`: Problem with given class_path 'mine.Net': No module named 'mine'. Modules are looked for in the"
        " working directory and among installed packages.",
    ),
    "a class path that names no class": (
        ["--model=cli_task.Netwrk", DATA, RULE, ROUNDS],
        "`--model`: Problem with given class_path 'cli_task.Netwrk': module 'cli_task' has no attribute 'Netwrk'."
        " Did you mean `Network`?",
    ),
    "no model": (
        [DATA, RULE, ROUNDS],
        "`fit` needs a model, got none. Add `--model=mine.MyModel`, the import path of a LightningModule.",
    ),
    "no data": (
        [MODEL, RULE, ROUNDS, *QUIET],
        "`fit` needs data, got none. Add `--data=mine.MyData`, the import path of a LightningDataModule, or define"
        " `train_dataloader` in the module.",
    ),
    "no rule": (
        [MODEL, DATA, ROUNDS, *QUIET],
        "`fit` needs an aggregation rule, got none. Add `--rule=FedHAWCallback`, or `rule: FedHAWCallback` to the"
        " configuration.",
    ),
    "a rule given twice": (
        [*TASK, "--rule=FedHAWCallback"],
        "`--rule` is given 2 times (FedAvgCallback, FedHAWCallback). A federation has one: keep one.",
    ),
    "no number of rounds": (
        [MODEL, DATA, RULE, *QUIET],
        "`rounds` must say how many communication rounds to run (-1: until something stops it), got none.",
    ),
    "a dtype that is none": (
        [*TASK, "--federation.storage_dtype=float23"],
        "`--federation.storage_dtype`: Not of type dtype: `float23` is no dtype of torch, such as float16, bfloat16,"
        " float32, float64",
    ),
    "a word that is not among the choices": (
        [*TASK, "--federation.engine=fast"],
        "`--federation.engine`: must be one of 'auto', 'sequential', 'vectorized', got fast",
    ),
    "a number out of its range": (
        [*TASK, "--federation.alpha=-1"],
        "`alpha` must be a finite number above 0, got -1.0. 0.1 is strong label skew, 100 nearly IID.",
    ),
    "a checkpoint that is not there": (
        [*TASK, "--ckpt_path=nope.ckpt"],
        "Checkpoint file not found: nope.ckpt",
    ),
    "a device that is not there": (
        [*TASK, "--trainer.devices=0"],
        "`Trainer(devices='0')` value is not a valid input using cpu accelerator.",
    ),
    "a configuration of a program with a fixed model": (
        ["--config=fixed.yaml"],
        "The configuration has arguments of `model` without its class, as that of a program with a fixed class"
        " (`LightningCLI(MyModel, ...)`). Name the class before it: `--model=mine.MyClass --config=...`.",
    ),
    "an extra that is not installed": (
        [
            *TASK,
            "--rule.weighting=uniform",
            "--channel=DifferentialPrivacyChannel",
            "--channel.clip=1.0",
            "--channel.noise_multiplier=1.0",
        ],
        "Privacy accounting needs dp-accounting, which is not installed: `pip install dp-accounting`."
        " `DifferentialPrivacyChannel(delta=None)` works without it.",
    ),
}


@pytest.fixture(autouse=True)
def _files(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fedhaw"])
    # An import of what is none fails, as without the extra.
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    Path("fixed.yaml").write_text("model: {hidden: 4}\ndata: {count: 60}\nrule: FedAvgCallback\n")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_its_sentence(mistake, capsys):
    arguments, said = MISTAKES[mistake]
    with pytest.raises(SystemExit) as end:
        main(["fit", *arguments])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.strip().splitlines()[-1] == f"fedhaw: error: {said.format(folder=Path.cwd())}"


@pytest.mark.parametrize("arguments", [["fit", *TASK, "--federation.alpha=-1"], ["plot", "nowhere"]])
def test_debug_shows_the_error_itself(arguments):
    with pytest.raises((ValueError, FileNotFoundError), match=r"alpha|nowhere"):
        main([*arguments, "--debug"])
