"""Diagnostics watch a run and change nothing, on every path that a run can take."""

from math import isnan

import lightning.pytorch as pl
import pytest
import torch

from federations import QUIET, Classifier, loader, train, trainer, val_loader
from lightning_fedhaw import AvailabilityChannel, FedAvgCallback, FederatedCallback, FederatedStrategy, FedLAWCallback
from lightning_fedhaw.diagnostics import (
    Coherence,
    Drift,
    LabelCoherence,
    ParameterHistogram,
    Shrinking,
    cohort_coherence,
    cosines,
)
from lightning_fedhaw.plotting import RunHistory, read_run
from observed import OBSERVERS, everything_of, proxied


def prefixed(*names):
    return ["diagnostics/" + name for name in names]


def made():
    """One observer of each kind."""
    return [make() for make in OBSERVERS.values()]


def assert_same_series(first, second):
    assert {name.split("/")[1] for name in first.names if name.startswith("diagnostics/")} == {*OBSERVERS}
    assert first.names == second.names
    for name in first.names:
        assert first.curve(name) == pytest.approx(second.curve(name), nan_ok=True, rel=0, abs=0), name
    assert first.tables.keys() == second.tables.keys()
    for name, tables in first.tables.items():
        assert tables.keys() == second.tables[name].keys()
        for round_idx, table in tables.items():
            assert torch.equal(table.nan_to_num(), second.tables[name][round_idx].nan_to_num()), name


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_a_run_with_observers_is_the_run_without_them(engine):
    plain = everything_of([], engine=engine)
    observed = everything_of(made(), engine=engine)
    assert plain.keys() == observed.keys()
    for name in plain:
        assert torch.equal(plain[name], observed[name]), name


def test_both_entry_points_measure_the_same():
    ours, stock = RunHistory(), RunHistory()
    trainer(2, FedAvgCallback(), [*made(), ours], storage="device").fit(Classifier(), proxied())
    rule = FedAvgCallback(num_clients=4, alpha=10.0, storage="device")
    runner = pl.Trainer(max_epochs=2, callbacks=[rule, *made(), stock], **QUIET)
    runner.fit(Classifier(), proxied())
    assert_same_series(ours, stock)


def test_a_resumed_run_measures_the_same():
    straight, resumed = RunHistory(), RunHistory()
    trainer(2, None, [*made(), straight], storage="device").fit(Classifier(), proxied())
    first = trainer(1, None, made(), storage="device")
    first.fit(Classifier(), proxied())
    first.save_checkpoint("first.ckpt")
    second = trainer(2, None, [*made(), resumed], storage="device")
    second.fit(Classifier(), proxied(), ckpt_path="first.ckpt")
    assert_same_series(straight, resumed)


class Fails(FederatedCallback):
    """Fails at the end of a round, when all of it was measured."""

    def on_round_end(self, trainer, pl_module, report):
        if report.round == 1:
            raise KeyboardInterrupt


def test_a_round_that_is_undone_has_measured_nothing():
    run = RunHistory()
    runner = trainer(3, None, [Coherence(), Fails(), run], storage="device")
    with pytest.raises(SystemExit):
        runner.fit(Classifier(), loader())
    assert run.tables["diagnostics/cosines"].keys() == {0}
    assert len(run.curve("diagnostics/coherence")) == 1


class Saves(FederatedCallback):
    """Saves within a round, when it was measured but is not over."""

    def on_round_end(self, trainer, pl_module, report):
        trainer.save_checkpoint(f"{report.round}.ckpt")


def test_a_checkpoint_within_a_round_has_the_tables_before_it():
    train(rounds=2, callbacks=[Coherence(), Saves()], storage="device")
    assert read_run("1.ckpt").tables["diagnostics/cosines"].keys() == {0}
    assert read_run("0.ckpt").tables == {}


def test_the_interval_leaves_the_other_rounds_empty():
    run = RunHistory()
    train(rounds=5, val=val_loader(), callbacks=[Coherence(every_n_rounds=2), run], storage="device")
    curve = run.curve("diagnostics/coherence")
    assert [isnan(value) for value in curve] == [True, False, True, False, True]
    assert run.tables["diagnostics/cosines"].keys() == {1, 3}


class Keep(FederatedCallback):
    """Keeps what the clients sent."""

    def __init__(self):
        super().__init__()
        self.rounds = []

    def on_aggregation(self, trainer, pl_module, aggregated):
        start = aggregated.cohort.start.clone()
        updates = aggregated.cohort.vectors.displacements.gather()
        self.rounds.append((start, updates, aggregated.weights, aggregated.server.parameters().clone()))


def test_the_series_are_the_formulas_of_what_was_sent():
    run, keep = RunHistory(), Keep()
    observers = [Coherence(), Shrinking(), Drift(), LabelCoherence(), keep, run]
    train(rounds=2, rule=FedLAWCallback(server_epochs=2, lr=0.1), data=proxied(), callbacks=observers, alpha=1.0)
    for index, (start, updates, weights, new) in enumerate(keep.rounds):
        row = run.metrics[index]
        updates = updates.double()
        pairs = cosines(updates @ updates.T)
        assert row["diagnostics/coherence"] == pytest.approx(cohort_coherence(pairs, weights), abs=1e-5)
        assert torch.allclose(run.tables["diagnostics/cosines"][index], pairs.float(), atol=1e-5)
        scale = row["scale"]
        mean = (weights @ updates).norm().item()
        assert row["diagnostics/shrinking/mean_update_norm"] == pytest.approx(mean, rel=1e-5)
        assert row["diagnostics/shrinking/model_norm"] == pytest.approx(new.norm().item(), rel=1e-5)
        assert row["diagnostics/shrinking/update_norm"] == pytest.approx((new - start).norm().item(), rel=1e-4)
        if scale < 1:
            expected = scale * mean / ((1 - scale) * start.norm().item())
            assert row["diagnostics/shrinking/ratio"] == pytest.approx(expected, rel=1e-3)
        else:
            assert isnan(row["diagnostics/shrinking/ratio"])
        assert row["diagnostics/drift/mean"] == pytest.approx(updates.norm(dim=1).mean().item(), rel=1e-5)
        # The first layer has 6 * 8 weights and 8 biases.
        share = updates[:, :56].square().sum() / updates.square().sum()
        assert row["diagnostics/drift/share/net.0"] == pytest.approx(share.item(), rel=1e-4)
        assert row["diagnostics/drift/share/net.3"] == pytest.approx(1 - share.item(), rel=1e-4)
        assert row["diagnostics/label_coherence/cosine"] <= 1


def test_drift_from_the_new_model_and_of_merged_layers():
    run, keep = RunHistory(), Keep()
    train(rounds=1, callbacks=[Drift(reference="new", depth=1), keep, run], storage="device")
    start, updates, _, new = keep.rounds[0]
    distances = (start + updates - new).double().norm(dim=1)
    assert run.metrics[0]["diagnostics/drift/mean"] == pytest.approx(distances.mean().item(), rel=1e-4)
    assert run.metrics[0]["diagnostics/drift/share/net"] == pytest.approx(1)


def test_shrinking_reads_a_running_sum():
    kept, summed = RunHistory(), RunHistory()
    train(rounds=2, callbacks=[Shrinking(), kept], storage="device")
    train(rounds=2, callbacks=[Shrinking(), summed])
    for name in prefixed("shrinking/mean_update_norm", "shrinking/model_norm"):
        assert kept.curve(name) == pytest.approx(summed.curve(name), rel=1e-5)


def test_parameters_are_those_of_the_new_model():
    run = RunHistory()
    _, module = train(rounds=2, callbacks=[ParameterHistogram(2, bins=4), run])
    values = torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).double()
    assert isnan(run.curve("diagnostics/parameters/mean")[0])
    assert run.curve("diagnostics/parameters/mean")[1] == pytest.approx(values.mean().item(), rel=1e-5)
    assert run.curve("diagnostics/parameters/std")[1] == pytest.approx(values.std(correction=0).item(), rel=1e-5)
    largest = values.abs().max().item()
    assert run.curve("diagnostics/parameters/largest")[1] == pytest.approx(largest)
    assert run.tables["diagnostics/parameters/ends"][1].tolist() == pytest.approx([-largest, largest])
    positive = (values > 0).double().mean().item()
    assert run.tables["diagnostics/parameters/shares"][1][2:].sum().item() == pytest.approx(positive)


@pytest.mark.parametrize("kind", [Coherence, Drift])
def test_a_sum_has_no_single_updates(kind):
    sentence = f'`{kind.__name__}` needs the update of each client, and `FedAvgCallback` adds .* `storage="device"`'
    with pytest.raises(ValueError, match=sentence):
        train(callbacks=[kind()])


def test_labels_that_are_not_known():
    x = torch.randn(40, 6)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.randn(40)), batch_size=8)
    with pytest.raises(ValueError, match="`LabelCoherence` compares the labels of clients, and the data shows none"):
        train(data=data, alpha=None, callbacks=[LabelCoherence()])


def test_one_client_a_round_has_nobody_to_agree_with():
    with pytest.raises(ValueError, match="`Coherence` compares .* one takes part: raise `clients_per_round`"):
        train(callbacks=[Coherence()], storage="device", clients_per_round=1)
    assert isnan(cohort_coherence(torch.ones(1, 1), torch.ones(1)))


def test_two_of_a_kind():
    with pytest.raises(ValueError, match="`callbacks` has 2 of `Coherence`"):
        train(callbacks=[Coherence(), Coherence(printed=True)], storage="device")


class SameName(FederatedCallback):
    def on_aggregation(self, trainer, pl_module, aggregated):
        aggregated.log("coherence", 1.0)


def test_two_observers_with_one_name():
    with pytest.raises(ValueError, match="Two observers measure 'diagnostics/coherence'"):
        train(callbacks=[Coherence(), SameName()], storage="device")


@pytest.mark.filterwarnings("ignore:No client update was received")
def test_a_round_without_updates_has_no_numbers():
    run = RunHistory()
    channel = AvailabilityChannel([[0.0] * 4, [1.0] * 4])
    train(rounds=2, callbacks=[Coherence(), channel, run], storage="device")
    assert [isnan(value) for value in run.curve("diagnostics/coherence")] == [True, False]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_measure_what_one_measures():
    runs = []
    for processes in (1, 2):
        run = RunHistory()
        options = {"storage": "device", "reduction": "ordered"}
        if processes > 1:
            options |= {"strategy": FederatedStrategy(start_method="fork"), "devices": processes}
        trainer(1, None, [*made(), run], **options).fit(Classifier(), proxied())
        runs.append(run)
    one, two = runs
    assert one.names == two.names
    for name in one.names:
        assert one.curve(name) == pytest.approx(two.curve(name), nan_ok=True, rel=1e-5, abs=1e-7), name
