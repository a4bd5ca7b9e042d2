"""Client-level differential privacy: what is clipped, what is added, what is spent, what is refused."""

import sys
from math import log

import pytest
import torch

from federations import Classifier, flat, loader, train, trainer
from lightning_fedhaw import (
    AWGNChannel,
    DifferentialPrivacyChannel,
    ErasureChannel,
    FedAvgCallback,
    FederatedCallback,
    FedOptCallback,
    FedProx,
    OverTheAirChannel,
    ScaffoldCallback,
    SparsificationChannel,
)
from lightning_fedhaw.channel.privacy import clipped, epsilon
from lightning_fedhaw.objectives import FedDynObjective, ScaffoldObjective


def uniform():
    return FedAvgCallback("uniform")


def fit(*channels, rule=None, module=None, **kwargs):
    options = {"rounds": 1, "client_eval": False, **kwargs}
    return train(module or Classifier(hidden=300), rule=rule or uniform(), callbacks=channels, **options)


def test_clipping_bounds_the_norm_and_keeps_the_direction():
    v = torch.tensor([3.0, -4.0])
    assert clipped(v, 5.0) is v
    assert clipped(v, 1.0).tolist() == pytest.approx([0.6, -0.8])
    assert torch.equal(clipped(torch.zeros(3), 1.0), torch.zeros(3))


class Norms(FederatedCallback):
    def __init__(self):
        super().__init__()
        self.all = []

    def on_client_end(self, trainer, pl_module, update):
        self.all.append(float(update.displacement.norm()))


def test_every_update_is_clipped():
    before, after = Norms(), Norms()
    fit(before)
    fit(DifferentialPrivacyChannel(0.3, 0.0, delta=None), after)
    assert min(before.all) > 0.3
    assert after.all == pytest.approx([0.3] * 4, rel=1e-6)


def test_the_noise_of_the_average_is_the_multiplier_times_the_clip_over_the_number_drawn():
    clean, noisy = (flat(fit(DifferentialPrivacyChannel(0.3, z, delta=None))[1]) for z in (0.0, 2.0))
    noise, expected = noisy - clean, 2.0 * 0.3 / 4
    assert abs(noise.var() / expected**2 - 1) < 4.5 * (2 / len(noise)) ** 0.5
    assert abs(noise.mean()) < 4.5 * expected / len(noise) ** 0.5


@pytest.mark.parametrize("fallback", ["discard", "zero_update"])
def test_the_sum_is_divided_by_the_number_drawn_whoever_arrives(fallback):
    """Who is lost must not make the others' updates longer."""
    lost = ErasureChannel([0, 0, 0, 1.0], fallback=fallback)
    ends = [flat(fit(*channels)[1]) for channels in ([lost, DifferentialPrivacyChannel(0.3, 0.0, delta=None)], [])]
    start = flat(Classifier(hidden=300))

    class Three:
        def sample(self, round_idx, *, num_clients, sizes, seed):
            return [0, 1, 2]

    three = flat(fit(DifferentialPrivacyChannel(0.3, 0.0, delta=None), sampler=Three())[1])
    assert torch.allclose(ends[0] - start, (three - start) * 3 / 4, atol=1e-6)


def test_rules_on_top_of_the_average_are_free():
    end = flat(fit(DifferentialPrivacyChannel(0.3, 1.0, delta=None), rule=FedOptCallback(rule=uniform()), rounds=3)[1])
    assert torch.isfinite(end).all()


def test_with_over_the_air_sums():
    end = flat(fit(DifferentialPrivacyChannel(0.3, 1.0, delta=None), OverTheAirChannel(20.0), rounds=3)[1])
    assert torch.isfinite(end).all()


# ---------------------------------------------------------------------- accounting


def test_epsilon_of_one_gaussian_release():
    """Everybody, one round: Renyi divergence a / (2 s^2) with s = z / 2, as Canonne, Kamath and Steinke convert it."""
    pytest.importorskip("dp_accounting")
    z, delta = 20.0, 1e-5
    orders = [1 + i / 100 for i in range(1, 9000)]
    by_order = [2 * a / z**2 + log(1 - 1 / a) - log(delta * a) / (a - 1) for a in orders]
    found = epsilon(z, delta, 1, num_clients=100, drawn_uniformly=None)
    assert found == pytest.approx(min(by_order), rel=0.02)


def test_epsilon_grows_with_rounds_and_falls_with_noise_and_sampling():
    pytest.importorskip("dp_accounting")

    def spent(z=2.0, rounds=50, drawn=10):
        return epsilon(z, 1e-5, rounds, num_clients=100, drawn_uniformly=drawn)

    assert spent(rounds=0) == 0
    assert spent(z=0.0) == float("inf")
    assert spent(rounds=50) < spent(rounds=100)
    assert spent(z=4.0) < spent(z=2.0)
    assert spent(drawn=10) < spent(drawn=50) < spent(drawn=100) == spent(drawn=None)


def test_the_closing_table_says_what_was_spent_by_the_sampling_in_use(capsys, tmp_path):
    pytest.importorskip("dp_accounting")
    make = lambda: DifferentialPrivacyChannel(0.3, 3.0, delta=1e-3)  # noqa: E731
    runner, _ = fit(make(), rounds=4, num_clients=10, clients_per_round=3)
    expected = epsilon(3.0, 1e-3, 4, num_clients=10, drawn_uniformly=3)
    assert runner.federation_summary["epsilon"] == expected
    assert runner.federation_summary["delta"] == 1e-3
    assert f"epsilon {expected:.3g} at delta 0.001" in capsys.readouterr().out

    class Turns:
        """Client 0 comes in every round, the others in one of two."""

        def sample(self, round_idx, *, num_clients, sizes, seed):
            return [0, 1] if round_idx % 2 else [0, 2]

    runner, _ = fit(make(), rounds=4, sampler=Turns())
    assert runner.federation_summary["epsilon"] == epsilon(3.0, 1e-3, 4, num_clients=4, drawn_uniformly=None)
    # What was spent before a stop counts.
    runner, _ = fit(make(), rounds=2, num_clients=10, clients_per_round=3)
    runner.save_checkpoint("two.ckpt")
    again = trainer(
        rule=uniform(), callbacks=[make()], rounds=4, num_clients=10, clients_per_round=3, client_eval=False
    )
    again.fit(Classifier(hidden=300), loader(), ckpt_path="two.ckpt")
    assert again.federation_summary["epsilon"] == expected


def test_without_the_extra_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ModuleNotFoundError, match="`pip install dp-accounting`"):
        fit(DifferentialPrivacyChannel(1.0, 1.0))
    fit(DifferentialPrivacyChannel(1.0, 1.0, delta=None))


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ([], {"optimizer_state": "kept"}),
        ([FedDynObjective()], {}),
        ([SparsificationChannel(0.5)], {}),
        ([ErasureChannel(0.2, link="downlink", fallback="reuse_model")], {}),
        ([FedProx(), SparsificationChannel(0.5, error_feedback=False)], None),
    ],
    ids=["optimizers", "FedDyn", "error feedback", "old broadcasts", "nothing"],
)
def test_draws_amplify_only_where_clients_remember_nothing(more, options):
    """What a client remembers tells in which rounds it was."""
    pytest.importorskip("dp_accounting")
    channel = DifferentialPrivacyChannel(0.3, 3.0, delta=1e-3)
    runner, _ = fit(*more, channel, rounds=4, num_clients=10, clients_per_round=3, **(options or {}))
    most = max(channel.state_dict()["parts"].values())
    by_draws = epsilon(3.0, 1e-3, 4, num_clients=10, drawn_uniformly=3)
    by_parts = epsilon(3.0, 1e-3, most, num_clients=10, drawn_uniformly=None)
    assert runner.federation_summary["epsilon"] == (by_draws if options is None else by_parts)
    assert by_draws < by_parts


def test_rounds_that_are_not_alike_are_not_counted_together(tmp_path):
    pytest.importorskip("dp_accounting")
    options = {"rule": uniform(), "rounds": 2, "client_eval": False, "clients_per_round": 2}
    first = trainer(callbacks=[DifferentialPrivacyChannel(0.3, 1.0)], **options)
    first.fit(Classifier(), loader())
    first.save_checkpoint(tmp_path / "two.ckpt")
    options["rounds"] = 3
    with pytest.raises(ValueError, match="the resumed run changes noise_multiplier from 1.0 to 9.0, clients drawn"):
        trainer(callbacks=[DifferentialPrivacyChannel(0.3, 9.0)], **options).fit(
            Classifier(), loader(), ckpt_path=tmp_path / "two.ckpt"
        )
    trainer(callbacks=[DifferentialPrivacyChannel(0.1, 1.0)], **options).fit(
        Classifier(), loader(), ckpt_path=tmp_path / "two.ckpt"
    )


# ---------------------------------------------------------------------- what breaks the guarantee


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        (uniform, [ScaffoldObjective()]),
        (uniform, [ScaffoldObjective("I")]),
        (ScaffoldCallback, []),
        (lambda: FedOptCallback(rule=ScaffoldCallback()), []),
    ],
)
def test_objectives_that_share_what_clients_know(rule, more):
    with pytest.raises(
        ValueError, match="protects only the updates, and clients would send ScaffoldObjective in addition"
    ):
        fit(DifferentialPrivacyChannel(1.0, 1.0, delta=None), *more, rule=rule())


def test_weights_that_depend_on_data():
    with pytest.raises(ValueError, match="the same weight for every client, and FedAvgCallback weights clients by"):
        fit(DifferentialPrivacyChannel(1.0, 1.0, delta=None), rule=FedAvgCallback())


def test_weights_that_turn_out_to_depend_on_data():
    class Odd(FedAvgCallback):
        def unnormalized_weight(self, update):
            return 2.0 if len(update.logged) and update.client == 1 else 1.0

    with pytest.raises(ValueError, match="the same weight for every client, and Odd weights clients by"):
        fit(DifferentialPrivacyChannel(1.0, 1.0, delta=None), rule=Odd("uniform"))


def test_buffers_that_travel():
    with pytest.raises(ValueError, match='protects only the updates, .* would send buffers .* Set `buffers="keep"`'):
        fit(DifferentialPrivacyChannel(1.0, 1.0, delta=None), module=Classifier(norm=True))
    fit(DifferentialPrivacyChannel(1.0, 1.0, delta=None), module=Classifier(norm=True), buffers="keep")


def test_channels_that_change_what_was_clipped():
    with pytest.raises(
        ValueError, match="`AWGNChannel` comes after `DifferentialPrivacyChannel` and could make updates longer"
    ):
        fit(DifferentialPrivacyChannel(1.0, 1.0, delta=None), AWGNChannel(3.0))
    fit(AWGNChannel(3.0), DifferentialPrivacyChannel(1.0, 1.0, delta=None), ErasureChannel(0.1))
