"""The third door: the command line."""

import inspect
import os
import re
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

import lightning_fedhaw
from cli_task import Network, Samples
from federations import QUIET, flat
from lightning_fedhaw import (
    AWGNChannel,
    DirichletPartitioner,
    ErasureChannel,
    FedAvgCallback,
    FederatedTrainer,
    FedHAWCallback,
    FedProx,
    __version__,
    arguments,
)
from lightning_fedhaw.__main__ import main
from lightning_fedhaw.cli import FederatedCLI
from lightning_fedhaw.extending import AggregationRule

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`")
TASK = ["--model=cli_task.Network", "--data=cli_task.Samples"]
SHORT = [
    *TASK,
    "--trainer.accelerator=cpu",
    "--trainer.rounds=3",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
CSV = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=."]
QUIETLY = ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]
RULES = [
    name
    for name in lightning_fedhaw.__all__
    if inspect.isclass(kind := getattr(lightning_fedhaw, name)) and issubclass(kind, AggregationRule)
]
REQUIRED = {name: ["--rule.upper=net.0"] for name in ("AggITDCallback", "FedNestCallback", "SimFBOCallback")}
"""Arguments without which a rule cannot be made."""
SAVED = "lightning_logs/version_0"


def run(*args, **kwargs):
    return FederatedCLI(args=list(args), **kwargs)


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fedhaw"])


@pytest.fixture(scope="module")
def parser():
    """One parser for all that only read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fedhaw"])
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        cli = run(*TASK, "--trainer.rounds=1", "--trainer.logger=false", run=False)
        patch.delenv("PL_GLOBAL_SEED")
        return cli.parser


FULL = [
    "--seed_everything=7",
    "--model.dropout=0.2",
    "--rule=FedHAWCallback",
    "--rule.lr_step=2e-1",
    "--federation.num_clients=6",
    "--federation.partitioner=DirichletPartitioner",
    "--federation.partitioner.alpha=0.5",
    "--federation.clients_per_round=0.5",
    "--federation.storage_dtype=float64",
    "--channel+=ErasureChannel",
    "--channel.probability=0.3",
    "--channel+=AWGNChannel",
    "--channel.snr_db=20",
    "--objective=FedProx",
    "--objective.mu=0.1",
]


def test_the_command_line_is_the_first_door():
    """The groups reach the trainer, and the run has the bits of the same run in Python."""
    cli = run("fit", *SHORT, *QUIETLY, *FULL)
    assert isinstance(cli.trainer, FederatedTrainer)
    pl.seed_everything(7)
    module = Network(dropout=0.2)
    rule = FedHAWCallback(lr_step=0.2)
    trainer = FederatedTrainer(
        rounds=3,
        num_clients=6,
        partitioner=DirichletPartitioner(0.5),
        clients_per_round=0.5,
        storage_dtype=torch.float64,
        callbacks=[rule, ErasureChannel(0.3), AWGNChannel(20), FedProx(0.1)],
        **QUIET,
    )
    trainer.fit(module, datamodule=Samples())
    assert torch.equal(flat(cli.model), flat(module))
    for name, value in trainer.federation_summary.items():
        assert name in ("seconds", "run") or cli.trainer.federation_summary[name] == value, name


def test_the_saved_configuration_repeats_the_run_and_serves_the_other_commands():
    first = run("fit", *SHORT, *CSV, *FULL)
    assert not torch.equal(flat(first.model), flat(Network()))
    saved = yaml.safe_load(Path(SAVED, "config.yaml").read_text())
    assert saved["federation"]["storage_dtype"] == "float64"
    assert saved["rule"]["init_args"]["lr_step"] == 0.2
    assert "num_clients" not in {**saved["trainer"], **saved["rule"]["init_args"]}
    os.environ.pop("PL_GLOBAL_SEED")
    again = run("fit", f"--config={SAVED}/config.yaml")
    assert torch.equal(flat(first.model), flat(again.model))

    checkpoint = f"--ckpt_path={SAVED}/checkpoints/epoch=2-step=3.ckpt"
    settings = [f"--config={SAVED}/config.yaml", checkpoint, "--trainer.logger=false"]
    checked = run("validate", *settings)
    assert checked.trainer.callback_metrics["val_loss"] == first.trainer.callback_metrics["val_loss"]
    assert not os.path.exists("config.yaml")
    assert "test_loss" in run("test", *TASK, checkpoint, *QUIETLY, "--trainer.accelerator=cpu").trainer.callback_metrics
    predict = run(
        "predict", *TASK, checkpoint, *QUIETLY, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"
    )
    assert torch.equal(flat(predict.model), flat(first.model))


def test_a_run_goes_on_from_its_checkpoint():
    whole = run("fit", *SHORT, *QUIETLY, *FULL, "--trainer.rounds=4")
    run("fit", *SHORT, *CSV, *FULL, "--trainer.rounds=2")
    rest = run("fit", *SHORT, *CSV, *FULL, "--trainer.rounds=4", f"--ckpt_path={SAVED}/checkpoints/epoch=1-step=2.ckpt")
    assert torch.equal(flat(rest.model), flat(whole.model))


@pytest.mark.parametrize("schedule", [[], ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"]])
def test_an_optimizer_of_the_command_line_is_as_fresh_as_the_modules_own(schedule):
    class Own(Network):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)] if schedule else []

    with pytest.warns(UserWarning, match="configure_optimizers` will be overridden"):
        cli = run(
            "fit",
            *SHORT,
            *QUIETLY,
            "--rule=FedAvgCallback",
            "--optimizer=Adam",
            "--optimizer.lr=0.01",
            *schedule,
            "--seed_everything=0",
        )
    module = Own()
    FederatedTrainer(rounds=3, callbacks=[FedAvgCallback()], seed=0, **QUIET).fit(module, datamodule=Samples())
    assert torch.equal(flat(cli.model), flat(module))


def test_a_rule_among_the_defaults_of_the_trainer_is_a_rule():
    cli = FederatedCLI(
        Network,
        Samples,
        args=["fit", "--trainer.rounds=1"],
        trainer_defaults={"callbacks": [FedAvgCallback()], **QUIET},
    )
    assert cli.trainer.federation_summary["rule"] == "FedAvgCallback"


def test_a_class_of_ones_own():
    """As with Lightning's: a fixed model and data module, defaults, and `run=False`."""
    cli = FederatedCLI(
        Network,
        Samples,
        args=[
            "--rule=FedAvgCallback",
            "--model.hidden=4",
            "--federation.num_clients=5",
            "--federation.engine=sequential",
        ],
        trainer_defaults={"max_epochs": 2, **QUIET},
        run=False,
    )
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.federation_summary["rounds"] == 2
    assert cli.trainer.fit_loop.federation.data.num_clients == 5


@pytest.mark.parametrize("name", RULES)
def test_every_rule_survives_a_configuration_file(parser, name):
    """With its defaults, by its short name, and without the settings that the federation has."""
    config = parser.parse_args([*TASK, f"--rule={name}", *REQUIRED.get(name, [])])
    written = parser.dump(config, skip_none=False)
    assert "Unable to serialize" not in written
    again = parser.parse_string(written)
    assert parser.dump(again, skip_none=False) == written
    arguments = yaml.safe_load(written)["rule"].get("init_args", {})
    own = inspect.signature(getattr(lightning_fedhaw, name)).parameters
    assert set(own) - {"federation", "options", "settings"} <= set(arguments)
    assert "num_clients" not in arguments
    rule = parser.instantiate_classes(again)["rule"]
    assert type(rule) is getattr(lightning_fedhaw, name)
    assert rule.options == lightning_fedhaw.FederationOptions()


class Shares(Network):
    """Its union has float first, as any union has where another package has made it so."""

    def __init__(self, share: float | int | None = None):
        super().__init__()
        self.share = share


@pytest.mark.parametrize(("text", "kind"), [("1", int), ("1.0", float), ("0.5", float)])
def test_whole_numbers_stay_whole(text, kind):
    cli = run(f"--model={__name__}.Shares", f"--model.share={text}", "--data=cli_task.Samples", *QUIETLY, run=False)
    assert type(cli.model.share) is kind


def test_each_setting_of_the_federation_has_one_place(parser):
    config = parser.parse_args([*TASK, "--rule=FedAdpCallback", "--rule.gompertz=3", "--federation.alpha=0.1"])
    assert (config.rule.init_args.gompertz, config.federation.alpha) == (3.0, 0.1)
    options = set(lightning_fedhaw.FederationOptions.__dataclass_fields__)
    assert set(config.federation.keys()) == options
    assert not options & set(config.trainer.keys())
    assert {"rounds", "max_epochs", "precision", "callbacks", "checkpoint_every_n_rounds"} <= set(config.trainer.keys())


def test_policies_for_buffers_are_one_or_by_name(parser, tmp_path):
    def parsed(*args):
        return parser.parse_args([*TASK, "--rule=FedAvgCallback", *args]).federation.buffers

    assert parsed("--federation.buffers=keep") == "keep"
    assert parsed('--federation.buffers={"net.*": "local", "*": "keep"}') == {"net.*": "local", "*": "keep"}
    Path("buffers.yaml").write_text('federation:\n  buffers:\n    "net.*": local\n')
    assert parsed("--config=buffers.yaml") == {"net.*": "local"}


@pytest.mark.parametrize("link", ["[*{0}, *{0}, *{0}, *{0}]", "{{<<: [*{0}, *{0}, *{0}, *{0}]}}", "[*{0}, *{1}]"])
def test_anchors_that_repeat_each_other_without_end_are_refused(parser, link, capsys):
    lines = ["a0: &a0 {x: 1}"]
    for number in range(1, 20):
        lines.append(f"a{number}: &a{number} " + link.format(f"a{number - 1}", f"a{number}"))
    Path("bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(SystemExit):
        parser.parse_args(["--config=bomb.yaml"])
    assert "its anchors repeat each other to more than 1,000,000 values" in capsys.readouterr().err


def deep(levels):
    return "".join("  " * level + "a:\n" for level in range(levels))


def chained(levels):
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} {{x: *a{level - 1}}}")
    return "\n".join(lines)


@pytest.mark.parametrize("text", [deep(200), chained(200)])
def test_values_within_values_are_limited(parser, text, capsys):
    Path("deep.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parser.parse_args(["--config=deep.yaml"])
    assert "it is nested too deeply: it has more than 100 values within each other" in capsys.readouterr().err


def test_a_value_that_yaml_cannot_read_is_one_sentence(parser, capsys):
    # Python limits the digits of numbers.
    Path("value.yaml").write_text(f"trainer:\n  rounds: {'9' * 5000}\n")
    with pytest.raises(SystemExit):
        parser.parse_args(["--config=value.yaml"])
    assert "it holds a value that cannot be read" in capsys.readouterr().err


def test_a_checkpoint_instead_of_a_configuration_is_one_sentence(capsys):
    torch.save({"weights": torch.arange(250.0)}, "last.ckpt")
    with pytest.raises(SystemExit):
        run("fit", "--config=last.ckpt")
    assert "A configuration must be a text in UTF-8" in capsys.readouterr().err


def test_ordinary_anchors_are_read(parser):
    Path("anchors.yaml").write_text("federation:\n  local_parameters: &names [a.*, b]\n  buffers: keep\n")
    config = parser.parse_args([*TASK, "--rule=FedAvgCallback", "--config=anchors.yaml"])
    assert config.federation.local_parameters == ["a.*", "b"]


@pytest.mark.parametrize(("given", "kept"), [("net.3.*", "net.3.*"), ("*.bias", "*.bias"), ("[a.*,b]", ["a.*", "b"])])
def test_local_parameters_are_one_pattern_or_a_list(parser, given, kept):
    config = parser.parse_args([*TASK, f"--federation.local_parameters={given}"])
    assert config.federation.local_parameters == kept


def test_channels_and_objectives_are_one_or_several(parser):
    one = parser.parse_args([*TASK, "--channel=ErasureChannel", "--channel.probability=0.1"])
    several = parser.parse_args(
        [*TASK, "--channel+=ErasureChannel", "--channel.probability=0.1", "--channel+=AWGNChannel"]
    )
    assert one.channel.init_args.probability == several.channel[0].init_args.probability == 0.1
    assert several.channel[1].class_path == "lightning_fedhaw.AWGNChannel"


NUMBERS = [("5", 5, int), ("1", 1, int), ("1.0", 1.0, float), ("0.5", 0.5, float)]


@pytest.mark.parametrize(("text", "value", "kind"), NUMBERS)
def test_a_number_of_clients_stays_whole_and_a_share_stays_a_share(parser, text, value, kind, tmp_path):
    """1 is one client, and 1.0 is all of them: by flags (so by W&B's, too), by YAML, and for a sampler."""
    file = tmp_path / "federation.yaml"
    file.write_text(f"federation:\n  clients_per_round: {text}\n")
    sampler = ["--federation.sampler=UniformSampler", f"--federation.sampler.clients_per_round={text}"]
    by_flag = parser.parse_args([*TASK, f"--federation.clients_per_round={text}"]).federation.clients_per_round
    by_file = parser.parse_args([*TASK, f"--config={file}"]).federation.clients_per_round
    of_sampler = parser.parse_args([*TASK, *sampler]).federation.sampler.init_args.clients_per_round
    for number in (by_flag, by_file, of_sampler):
        assert number == value
        assert type(number) is kind


@pytest.mark.parametrize(("text", "value", "kind"), NUMBERS)
def test_a_number_of_clients_stays_whole_in_lightnings_own_command_line(text, value, kind):
    cli = LightningCLI(
        BoringModel,
        BoringDataModule,
        run=False,
        args=[
            *("--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.accelerator=cpu"),
            "--seed_everything=0",
            "--trainer.callbacks+=lightning_fedhaw.FedAvgCallback",
            f"--trainer.callbacks.clients_per_round={text}",
        ],
    )
    (rule,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, AggregationRule)]
    assert rule.options.clients_per_round == value
    assert type(rule.options.clients_per_round) is kind


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["--rule=AggregationRule"],
            "`AggregationRule` is a base class. Give a class that derives from it: Ag",
        ),
        (["--rule=Best"], "There are AggITDCallback, .*TrimmedMeanCallback"),
        (["--channel+=ErasureChannl"], "Did you mean `ErasureChannel`?"),
        (["--channel=AWGN"], "there is no class `AWGN`.*Did you mean `AWGNChannel`?"),
        (["--federation.partitioner=Dirichlet"], "Did you mean `DirichletPartitioner`?"),
        (["--optimizer=SGD", "--lr_scheduler=StepLRR"], "no class `StepLRR`; give a name or an import path.$"),
        (["--rule=AggITDCallback"], "upper"),
        (["--rule=AggITDCallback", "--rule.upper=a", "--rule.uper_lr=1"], "Did you mean `upper_lr`?"),
        (["--rule=FedHAWCallback", "--rule.lr_gamm=1"], "'lr_gamm' is not accepted. Did you mean `lr_gamma`?"),
        (["--rule=FedHAWCallback", "--rule.jacobian=exact"], "It is an argument of `PublishedFedHAWCallback`"),
        (["--rule=PublishedFedHAWCallback", "--rule.lr_step=1"], "It is an argument of `FedHAWCallback`"),
        (["--rule=FedHAWCallback", "--rule.num_clients=3"], "It is `--federation.num_clients`"),
        (["--trainer.alpha=0.1"], "It is `--federation.alpha`"),
        (
            ["--trainer.logger=CSVLoger"],
            "`--trainer.logger`: there is no class `CSVLoger`; give a name or an import path.$",
        ),
        (["--trainer.roundz=3"], "Did you mean `rounds`"),
        (["--federation.num_clients=many"], "`--federation.num_clients`: Expected a <class 'int'>, got many"),
        (["--rule=FedAdpCallback", "--rule.gompertz=-3"], "`gompertz` must be a finite number of at least 0, got -3.0"),
        (["--rule=FedAvgCallback", "--trainer.max_epochs=5"], "`rounds`=3 and `max_epochs`=5 mean the same"),
    ],
)
def test_errors_are_one_sentence(args, said, capsys):
    with pytest.raises(SystemExit) as left:
        run("fit", *SHORT, *QUIETLY, *args, parser_kwargs={"prog": "fedhaw"})
    assert left.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("fedhaw: error: ")
    assert re.search(said, message), message


def test_errors_of_the_users_code_keep_their_traceback():
    with pytest.raises(ValueError, match="negative dimension"):
        run("fit", *SHORT, *QUIETLY, "--rule=FedAvgCallback", "--model.hidden=-1")


ROOT = Path(__file__).parents[1]
USERS = "from cli_task import Network as MyModel, Samples as MyData"


def test_a_data_module_in_another_has_hyperparameters_of_its_own():
    inner = ["--data.train=cli_task.SavedSamples", "--data.train.batch_size=6"]
    cli = run("fit", *SHORT, *QUIETLY, "--data=FederatedDataModule", *inner, "--rule=FedAvgCallback")
    assert dict(cli.datamodule.inner.hparams) == {"count": 120, "batch_size": 6}
    alone = run("fit", *SHORT, *QUIETLY, "--data=cli_task.SavedSamples", "--rule=FedAvgCallback")
    assert alone.datamodule.hparams["_class_path"] == "cli_task.SavedSamples"


def test_without_a_logger_the_users_configuration_stays_as_it_is():
    theirs = "# mine\nrule: FedAvgCallback\n"
    Path("config.yaml").write_text(theirs)
    run("fit", "--config=config.yaml", *SHORT, *QUIETLY)
    assert os.listdir() == ["config.yaml"]
    run("fit", "--config=config.yaml", *SHORT, "--trainer.logger=false", "--federation.num_clients=4")
    assert Path("config.yaml").read_text() == theirs
    assert yaml.safe_load(Path("checkpoints/config.yaml").read_text())["federation"]["num_clients"] == 4


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md", "docs/sweeps.md", "examples/sweeps/README.md"])
def test_what_the_guide_says_is_understood(parser, page, tmp_path, monkeypatch):
    """Every command and every configuration of these pages is read by the parser."""
    (tmp_path / "mine.py").write_text(USERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "sweeps"))
    Path("config.yaml").write_text(yaml.dump({"model": "mine.MyModel", "data": "mine.MyData"}))
    Path("base.yaml").write_text((ROOT / "examples" / "sweeps" / "base.yaml").read_text())
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if " fit " in f" {line}" and "fedhaw" in line]
    for line in lines:
        arguments = line.partition("fedhaw fit ")[2].partition(" #")[0].partition(" >")[0].split()
        parser.parse_args([part for part in arguments if part != "--print_config"])
    configurations = [yaml.safe_load(each) for each in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)]
    for configuration in configurations:
        if "parameters" in configuration:
            flags = {
                name: choice.get("value", choice.get("min")) for name, choice in configuration["parameters"].items()
            }
            parser.parse_args([*TASK, *(f"--{name}={value}" for name, value in flags.items() if value is not None)])
        else:
            parser.parse_object({"model": "mine.MyModel", **configuration})
    assert lines or configurations


def test_a_split_that_leaves_clients_too_small_is_one_sentence(capsys):
    """It is found when ``fit`` has the data in hand; the user never heard of `min_size`."""
    with pytest.raises(SystemExit):
        run("fit", *SHORT, *QUIETLY, "--rule=FedAvgCallback", "--federation.num_clients=20", "--federation.alpha=0.01")
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1] == (
        "fedhaw: error: A Dirichlet split with `alpha`=0.01 leaves clients with too few samples: in 1000 tries no draw"
        " gave each of 20 clients at least 3 (`min_size`) of the 120 samples; in the last one a client got 0. What"
        " helps: fewer clients (`num_clients`), a larger `alpha`, smaller clients"
        " (`partitioner=DirichletPartitioner(0.01, min_size=1)`), or moved samples"
        ' (`partitioner=DirichletPartitioner(0.01, on_infeasible="move")`).'
    )


class Surprises(FedAvgCallback):
    """A rule of a user's own that fails in this package's code, in the middle of a run."""

    def step(self, cohort, state, server):
        return arguments.number("momentum", "high")


def test_from_the_first_round_on_an_error_keeps_its_traceback():
    with pytest.raises(ValueError, match="`momentum` must be"):
        run("fit", *SHORT, *QUIETLY, "--rule=test_cli.Surprises")


def test_the_command_says_its_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fedhaw {__version__}\n"


def test_the_command_lists_plot_and_compare(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main([])
    assert "{fit,validate,test,predict,plot" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert re.search(r"plot +Draw pictures", printed)
    assert re.search(r"compare +Compare rules", printed)
    (tmp_path / "empty.yaml").write_text("{}")
    with pytest.raises(SystemExit):
        main([f"--config={tmp_path}/empty.yaml", "plot"])
    assert "`plot` comes first" in capsys.readouterr().err


@pytest.mark.parametrize("kind", REQUIRED)
def test_a_bilevel_rule_has_all_its_arguments(parser, kind, tmp_path):
    flags = [
        f"--rule={kind}",
        '--rule.upper=["net.0", "net.*.bias"]',
        "--rule.upper_optimizer=torch.optim.Adam",
        "--rule.upper_optimizer.weight_decay=0.1",
        "--rule.upper_lr=3e-2",
        "--rule.lower_lr=0.5",
        "--rule.clip=10",
        "--rule.weighting=examples",
        "--rule.upper_loss=null",
    ]
    by_flags = parser.parse_args([*TASK, *flags])
    path = tmp_path / "rule.yaml"
    path.write_text(parser.dump(by_flags, skip_none=False))
    rule = parser.instantiate_classes(parser.parse_path(path))["rule"]
    assert rule.upper.patterns == ("net.0", "net.*.bias")
    optimizer = rule.upper_optimizer([torch.zeros(1)], lr=rule.upper_lr)
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["weight_decay"] == 0.1
    assert "upper_optimizer=Adam," in rule.describe()
    assert (rule.upper_lr, rule.lower_lr, rule.clip) == (0.03, 0.5, 10.0)
    assert (rule.weighting, rule.upper_loss, rule.upper_steps) == ("examples", None, 1)


@pytest.mark.parametrize("kind", ["FedAvgMCallback", "FedOptCallback"])
def test_what_a_rule_learns_and_whom_it_asks(parser, kind):
    given = [
        f"--rule={kind}",
        '--rule.learn=["lr"]',
        "--rule.probe=lightning_fedhaw.Probe",
        "--rule.probe.source=validation",
        "--rule.hyper_optimizer=torch.optim.Adam",
        '--rule.bounds={"lr": [0.1, 2.0]}',
        '--rule.links={"lr": "exp"}',
    ]
    written = parser.dump(parser.parse_args([*TASK, *given]), skip_none=False)
    rule = parser.instantiate_classes(parser.parse_string(written))["rule"]
    assert rule.learn == ("lr",)
    assert rule.probe.source == "validation"
    assert "hyper_optimizer=Adam, lr by exp" in rule.resume_key
    assert rule.learned.bounds == {"lr": (0.1, 2.0)}


def test_an_optimizer_of_the_command_line_is_described_by_its_class(parser):
    given = parser.parse_args([*TASK, "--rule=FedOptCallback", "--rule.optimizer=torch.optim.Adam"])
    rule = parser.instantiate_classes(given)["rule"]
    assert "optimizer=Adam(" in rule.describe()
    assert "jsonargparse" not in rule.describe()
    assert "call_without" not in rule.describe()


def test_a_new_project_runs_and_is_not_overwritten(capsys, monkeypatch):
    assert main(["init", "mine"]) == 0
    printed = capsys.readouterr().out
    assert "fedhaw fit --config config.yaml" in printed
    with pytest.raises(SystemExit):
        main(["init", "mine"])
    assert "is there already, and would be overwritten" in capsys.readouterr().err
    monkeypatch.chdir("mine")
    monkeypatch.syspath_prepend(os.getcwd())
    short = ["--trainer.rounds=1", "--trainer.accelerator=cpu", "--data.count=300"]
    assert main(["fit", "--config=config.yaml", *short]) == 0
    printed = capsys.readouterr().out
    assert "val_acc" in printed
    assert "fedhaw plot lightning_logs/version_0" in printed
    assert main(["sweep", "sweep.yaml", "--runs=1", "--jobs=1", *short]) == 0
    assert "rules, federation.alpha=0.1: val_acc in %" in capsys.readouterr().out


def test_a_configuration_of_a_program_with_fixed_classes_runs_after_their_names():
    cli = LightningCLI(Network, Samples, args=["--trainer.max_epochs=1", "--seed_everything=0", *QUIETLY], run=False)
    Path("own.yaml").write_text(cli.parser.dump(cli.config, skip_none=False))
    ours = run("fit", *TASK, "--config=own.yaml", "--rule=FedAvgCallback", "--trainer.accelerator=cpu")
    assert ours.trainer.federation_summary["rounds"] == 1


def test_the_help_offers_what_a_user_may_choose(parser):
    shown = parser.format_help()
    for name in ("FedHAWCallback", "ErasureChannel", "FedProx", "RoundTable"):
        assert f"lightning_fedhaw.{name}" in shown
    assert not re.search(r"lightning_fedhaw\.(channel\.|adapter\.|objectives\.ClientObjective)", shown)
