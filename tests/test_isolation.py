"""Nothing passes from client to client, and a round that fails leaves nothing behind."""

import random
from functools import partial

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from federations import Classifier, flat, loader, samples, trainer, val_loader
from lightning_fedhaw import (
    FedAvgCallback,
    FedDynCallback,
    FedHAWCallback,
    IIDPartitioner,
    PublishedFedHAWCallback,
    ScaffoldCallback,
)
from lightning_fedhaw.data import CohortSampler, FixedSequenceSampler, find_labels
from lightning_fedhaw.extending import Channel, ClientObjective, ParameterLayout
from lightning_fedhaw.server import averaged_buffers


class Order(CohortSampler):
    def __init__(self, clients):
        self.clients = clients

    def sample(self, round_idx, *, num_clients, sizes, seed):
        return self.clients


def both_orders(module, **kwargs):
    results = []
    for clients in ([0, 1, 2, 3], [3, 2, 1, 0]):
        one = module()
        trainer(rounds=2, sampler=Order(clients), **kwargs).fit(one, loader())
        results.append(flat(one))
    return results


# ---------------------------------------------------------------------- buffers


class Reassigns(Classifier):
    """Counts steps in a buffer that is replaced instead of changed; holds an attention mask."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    def training_step(self, batch, batch_idx):
        self.count = self.count + 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("policy", ["average", "keep", "local", "recalibrate"])
def test_reassigned_and_infinite_buffers(policy):
    module = Reassigns()
    trainer(rounds=2, num_clients=1, buffers=policy, client_eval=False).fit(
        module, DataLoader(samples(32), batch_size=8)
    )
    assert module.count.tolist() == ([0.0] * 3 if policy == "keep" else [8.0] * 3)
    assert torch.equal(module.mask, Reassigns().mask)


def test_averaging_an_infinity_that_nobody_changes_is_no_nan():
    own = {"mask": torch.tensor([0.0, float("-inf")]), "z": torch.tensor([1 + 1j])}
    rows = [{"mask": own["mask"].clone(), "z": torch.tensor([3 + 1j])}, {**own}]
    merged = averaged_buffers(own, rows, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert torch.equal(merged["mask"], own["mask"])
    assert merged["z"].tolist() == [2 + 1j]


def test_a_buffer_that_changes_its_shape_is_named():
    class Grows(Reassigns):
        def training_step(self, batch, batch_idx):
            self.count = torch.zeros(batch_idx + 4)
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match=r"Buffer `count` of the shape \[3\] is of the shape"):
        trainer().fit(Grows(), loader())


# ---------------------------------------------------------------------- modules


def test_a_frozen_parameter_that_is_trained_all_the_same_is_refused():
    class Teacher(Classifier):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(6, 8).requires_grad_(False)

        def on_train_batch_end(self, *_):
            with torch.no_grad():
                self.teacher.weight.lerp_(self.net[0].weight, 0.1)

    with pytest.raises(RuntimeError, match=r"Client 0 changed the frozen parameter `teacher\.weight`"):
        trainer().fit(Teacher(), loader())


def test_training_flags_do_not_pass_from_client_to_client():
    class Switches(Classifier):
        def __init__(self):
            super().__init__(norm=True)

        def on_train_batch_end(self, *_):
            self.net[1].eval()

    a, b = both_orders(Switches)
    assert torch.equal(a, b)


def test_the_order_a_sampler_names_clients_in_does_not_matter():
    for rule in (FedAvgCallback, FedHAWCallback):
        a, b = both_orders(Classifier, rule=rule())
        assert torch.equal(a, b)


def test_zero_dimensional_parameters_travel():
    class Scaled(Classifier):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.scale * self.net(batch[0]), batch[1])

    module = Scaled()
    trainer().fit(module, loader())
    assert module.scale.shape == ()
    assert module.scale.item() != 1.0


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules_are_refused_by_name():
    with pytest.raises(ValueError, match="Parameter `weight` of a lazy module has no shape yet"):
        ParameterLayout.of(nn.LazyLinear(3))


def test_optimizers_over_other_peoples_parameters_are_refused():
    stray = nn.Parameter(torch.zeros(3))

    class Stray(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD([*self.parameters(), stray], lr=0.1)

    with pytest.raises(ValueError, match="parameters that are not the module's own"):
        trainer().fit(Stray(), loader())


def test_rates_that_are_tensors_start_anew_with_every_client():
    def run(rate):
        seen = []

        class Decays(Classifier):
            def on_train_batch_end(self, *_):
                group = self.optimizers().param_groups[0]
                seen.append(float(group["lr"]))
                group["lr"] *= 0.5

        module = Decays(lambda p: torch.optim.SGD(p, lr=rate))
        trainer(rounds=1, num_clients=3).fit(module, loader(48))
        return seen, flat(module)

    tensors, numbers = run(torch.tensor(0.1)), run(0.1)
    assert tensors[0] == pytest.approx(numbers[0])
    assert torch.allclose(tensors[1], numbers[1], atol=1e-6)


def test_no_gradients_are_left():
    module = Classifier(lambda p: torch.optim.Adam(p, lr=0.01))
    trainer().fit(module, loader())
    assert all(p.grad is None for p in module.parameters())


def test_an_error_in_local_training_says_whose_it_is():
    class Breaks(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="boom") as caught:
        trainer().fit(Breaks(), loader())
    if hasattr(caught.value, "add_note"):
        assert caught.value.__notes__ == ["In local training: client 0, round 0, a batch of 8."]


def test_an_error_while_an_optimizer_is_toggled_is_not_masked():
    class Toggles(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, _ = self.optimizers()
            self.toggle_optimizer(first)
            self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
            first.step()
            raise RuntimeError("boom")

        def configure_optimizers(self):
            return tuple(torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, -1))

    module = Toggles()
    with pytest.raises(RuntimeError, match="boom"):
        trainer().fit(module, loader())
    assert torch.equal(flat(module), flat(Toggles()))
    assert all(p.requires_grad for p in module.parameters())


# ---------------------------------------------------------------------- interrupted rounds


class Remembers(ClientObjective):
    def init_client(self, start):
        return {name: torch.zeros_like(value) for name, value in start.items()}

    def penalty(self, parameters, start, state):
        return sum((p * state[name]).sum() for name, p in parameters.items())

    def end_client(self, state, start, end, num_steps):
        return {name: state[name] + end[name] - start[name] for name in state}


class Feedback(Channel):
    """Sends half, and adds what was held back next time."""

    def __init__(self):
        super().__init__()
        self.held = {}

    def transmit(self, message, *, round_idx, client, seed):
        whole = message + self.held.get(client, 0)
        self.held = {**self.held, client: whole / 2}
        return whole / 2

    def reset(self):
        self.held = {}

    def state_dict(self):
        return {"held": self.held}

    def load_state_dict(self, state_dict):
        self.held = dict(state_dict["held"])


PLAYED = []
"""The steps of all clients in round 1; not in the module, whose attributes are a client's own."""


class Crashes(Classifier):
    """Breaks once, in the middle of round 1, after clients have come back."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 1 and len(PLAYED) < 9:
            PLAYED.append(batch_idx)
            if len(PLAYED) == 9:
                raise RuntimeError("pulled the plug")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"optimizer_state": "kept"},
        {"buffers": "local"},
        {"callbacks": Remembers},
        {"rule": partial(ScaffoldCallback, "I")},
        {"rule": FedDynCallback},
        {"callbacks": Feedback},
        {"rule": FedHAWCallback},
    ],
    ids=["fresh", "kept", "local buffers", "objective", "SCAFFOLD", "FedDyn", "channel", "FedHAW"],
)
def test_a_round_that_is_interrupted_can_be_played_again(arguments):
    def run(kind):
        built = {k: v() if callable(v) else v for k, v in arguments.items()}
        if "callbacks" in built:
            built["callbacks"] = [built["callbacks"]]
        module = kind(lambda p: torch.optim.Adam(p, lr=0.01), norm=True)
        return trainer(rounds=3, **built), module

    straight, module = run(Classifier)
    straight.fit(module, loader())
    PLAYED.clear()
    crashing, other = run(Crashes)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        crashing.fit(other, loader())
    crashing.save_checkpoint("crashed.ckpt")
    crashing.fit(other, loader())
    assert torch.equal(flat(module), flat(other)), "the same trainer goes on"
    again, third = run(Classifier)
    again.fit(third, loader(), ckpt_path="crashed.ckpt")
    assert torch.equal(flat(module), flat(third)), "so does a new one"


def test_a_client_that_failed_once_comes_back_with_the_state_it_had():
    class Marks(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            bad = self.trainer.global_step == 1 and (batch[0][:, None] == samples(40).tensors[0][:20]).all(-1).any()
            return loss * float("nan") if bad else loss

    from lightning_fedhaw import IndexPartitioner

    runner = trainer(
        rounds=5,
        num_clients=2,
        alpha=None,
        partitioner=IndexPartitioner([range(0, 20), range(20, 40)]),
        optimizer_state="kept",
        callbacks=[Remembers()],
    )
    module = Marks(lambda p: torch.optim.Adam(p, lr=0.01))
    with pytest.warns(UserWarning, match="Client 0 returned non-finite parameters in round 1"):
        runner.fit(module, DataLoader(samples(40), batch_size=8))
    assert runner.federation_summary["nonfinite_updates"] == 1


def test_a_checkpoint_in_the_middle_of_a_client_holds_the_global_model():
    start = Classifier()

    class Saves(Classifier):
        def on_train_batch_end(self, *_):
            self.trainer.save_checkpoint("middle.ckpt")

    trainer(rounds=1).fit(Saves(), loader())
    saved = torch.load("middle.ckpt", weights_only=True)["state_dict"]
    for name, parameter in start.named_parameters():
        assert torch.equal(saved[name], parameter), name


# ---------------------------------------------------------------------- the closing evaluation


def test_the_closing_evaluation_leaves_nothing_behind():
    class Collects(Classifier):
        def __init__(self):
            super().__init__()
            self.outputs = []
            self.own = torchmetrics.Accuracy(task="multiclass", num_classes=3)
            self.register_buffer("seen", torch.zeros(()))

        def validation_step(self, batch, batch_idx):
            self.outputs.append(batch_idx)
            self.own.update(self.net(batch[0]), batch[1])
            self.seen += 1

        def on_validation_epoch_end(self):
            self.outputs.clear()
            self.log("val_acc", self.own.compute())
            self.own.reset()

    module = Collects()
    runner = trainer()
    runner.fit(module, loader())
    assert module.outputs == []
    assert int(module.own.tp.sum() + module.own.fn.sum()) == 0
    assert float(module.seen) == 0
    (result,) = runner.validate(module, val_loader(), verbose=False)
    truth = (module.net(samples(60, seed=1).tensors[0]).argmax(1) == samples(60, seed=1).tensors[1]).float().mean()
    assert result["val_acc"] == pytest.approx(float(truth))


def test_a_closing_evaluation_that_fails_does_not_lose_the_run(capsys):
    class Penalized(Classifier):
        validation_step = None

        def training_step(self, batch, batch_idx):
            x = batch[0].requires_grad_()
            (grad,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            return cross_entropy(self.net(x), batch[1]) + grad.square().sum()

    runner = trainer()
    with pytest.warns(UserWarning, match="could not be evaluated on their own data"):
        runner.fit(Penalized(), loader())
    assert runner.federation_summary["rounds"] == 3
    assert "local training" in capsys.readouterr().out


# ---------------------------------------------------------------------- randomness


class Draws(Dataset):
    """Fetched sample by sample, with a draw from every global generator."""

    def __len__(self):
        return 60

    def __getitem__(self, i):
        random.random(), np.random.rand(), torch.rand(())
        x, y = samples(60)[i]
        return x, int(y)


def test_looking_for_labels_moves_no_global_generator():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    assert find_labels(Draws()) is not None
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def test_batches_are_the_same_sliced_or_fetched_over_several_passes():
    models = []
    for data in (samples(60), Draws()):
        module = Classifier()
        trainer(rounds=2, local_epochs=3, alpha=None, partitioner=IIDPartitioner()).fit(
            module, DataLoader(data, batch_size=8, shuffle=True)
        )
        models.append(flat(module))
    assert torch.equal(*models)


# ---------------------------------------------------------------------- samplers, channels, storage


@pytest.mark.parametrize("clients", [[-1, 0], [0, 0, 1], [0, 7]])
def test_a_sampler_must_name_distinct_clients_that_exist(clients):
    with pytest.raises(ValueError, match=r"`sampler` \(Order\) must name distinct clients of 0 to 3"):
        trainer(sampler=Order(clients)).fit(Classifier(), loader())


def test_a_mistake_in_a_late_cohort_is_found_before_the_first_round():
    class Started(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            raise AssertionError("training began")

    for cohorts in ([[0], [1], [9]], [[0], [1]]):
        with pytest.raises(ValueError, match=r"cohorts|sampler|client"):
            trainer(rounds=3, sampler=FixedSequenceSampler(cohorts)).fit(Started(), loader())


def test_samplers_may_give_numpy_integers():
    trainer(rounds=1, sampler=Order(np.array([2, 0]))).fit(Classifier(), loader())


def test_what_a_channel_returns_is_checked():
    class Short(Channel):
        def transmit(self, message, *, round_idx, client, seed):
            return message[:1]

    class Listed(Channel):
        def outage(self, round_idx, clients, seed):
            return [False] * (len(clients) - self.missing)

        missing = 0

    with pytest.raises(ValueError, match=r"`Short.transmit` must return a message of the shape \[83\], got \[1\]"):
        trainer(callbacks=[Short()]).fit(Classifier(), loader())
    trainer(callbacks=[Listed()]).fit(Classifier(), loader())
    Listed.missing = 1
    with pytest.raises(ValueError, match=r"`Listed.outage` must say for each of 4 clients"):
        trainer(callbacks=[Listed()]).fit(Classifier(), loader())


@pytest.mark.filterwarnings("ignore:The update of client . in round 0 does not fit")
def test_an_update_that_does_not_fit_into_the_storage_is_named():
    module = Classifier(lambda p: torch.optim.SGD(p, lr=1e6))
    with pytest.raises(FloatingPointError, match=r"does not fit into `storage_dtype`=torch\.float16"):
        trainer(storage="device", storage_dtype=torch.float16).fit(module, loader())


def test_a_hyper_step_that_would_extinguish_the_model_is_refused():
    rule = PublishedFedHAWCallback(lr_gamma=1e9)
    with pytest.warns(UserWarning, match="step of round 1 would make .* refused"):
        trainer(rule=rule, rounds=2).fit(Classifier(), loader())
    assert rule.scale == 1.0


def test_the_seed_is_part_of_a_federation():
    def run(seed, ckpt_path=None):
        from lightning_fedhaw import FederatedDataModule

        runner = trainer(rounds=2, num_clients=None, alpha=None, seed=seed)
        runner.fit(Classifier(), FederatedDataModule([samples(20), samples(30, seed=1)]), ckpt_path=ckpt_path)
        return runner

    run(1).save_checkpoint("one.ckpt")
    with pytest.raises(ValueError, match="`seed`"):
        runner = trainer(rounds=4, num_clients=None, alpha=None, seed=2)
        from lightning_fedhaw import FederatedDataModule

        runner.fit(Classifier(), FederatedDataModule([samples(20), samples(30, seed=1)]), ckpt_path="one.ckpt")


def test_a_second_low_precision_fit_starts_from_the_weights_in_the_module():
    module = Classifier()
    runner = trainer(rounds=1, precision="bf16-true")
    runner.fit(module, loader())
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(0.5)
    runner.fit_loop.max_epochs = 2
    runner.fit(module, loader())
    assert (flat(module) - 0.5).abs().max() < 0.3


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_an_iterator_in_the_place_of_batches_is_refused():
    class Iterates(Classifier):
        def training_step(self, dataloader_iter):
            return None

    with pytest.raises(
        ValueError, match=r"`training_step\(self, dataloader_iter\)` is not supported in federated training"
    ):
        trainer().fit(Iterates(), loader())


def test_the_summary_is_there_from_the_start():
    assert trainer().federation_summary == {}


def test_the_hyper_optimizer_follows_the_clients_unless_it_was_given():
    def chosen(rule, optimizer):
        trainer(rounds=1, rule=rule).fit(Classifier(optimizer), loader())
        return rule.hyper_optimizer

    def adam(p):
        return torch.optim.AdamW(p, lr=0.01)

    by_steps = partial(PublishedFedHAWCallback, normalize_by="lr*steps")
    assert chosen(by_steps(), None) is torch.optim.SGD
    assert chosen(by_steps(), adam) is torch.optim.Adam
    assert chosen(by_steps(hyper_optimizer=torch.optim.SGD), adam) is torch.optim.SGD
    assert chosen(PublishedFedHAWCallback(), adam) is torch.optim.SGD
    assert chosen(FedHAWCallback(), adam) is torch.optim.SGD


def test_a_diverged_run_names_the_scale():
    rule = FedHAWCallback(lr_gamma=1e-3)
    rule.state = {"gamma": torch.tensor(30.0), "lambda_": torch.zeros(4)}
    assert "scale stands at 1.07e+13" in rule.divergence_hint()
    rule.state["gamma"] = torch.tensor(0.1)
    assert rule.divergence_hint() == ""


def test_what_a_rule_returns_is_checked():
    class Forgets(FedAvgCallback):
        def step(self, cohort, state, server):
            return super().step(cohort, state, server).parameters

    with pytest.raises(
        TypeError, match=r"`Forgets.step` must return a `RuleOutput\(parameters, state, weights\)`, got Tensor"
    ):
        trainer(rule=Forgets()).fit(Classifier(), loader())


def test_misspelt_arguments_name_the_nearest():
    with pytest.raises(
        TypeError, match="`FedHAWCallback` got an unexpected keyword argument 'num_client'; did you mean"
    ):
        FedHAWCallback(num_client=3)
    with pytest.raises(TypeError, match="'client_per_round'; did you mean `clients_per_round`"):
        trainer(client_per_round=3)
    with pytest.raises(TypeError, match=r"got the class FedAvgCallback. Write `FedAvgCallback\(\)`"):
        trainer(rule=FedAvgCallback)
    with pytest.raises(ValueError, match="`scale_bounds` must be two positive numbers"):
        FedHAWCallback(scale_bounds=0.5)
    with pytest.raises(TypeError, match="`partitioner` must be"):
        trainer(alpha=None, partitioner=IIDPartitioner)


def test_a_round_without_a_step_is_said():
    class Nothing(Classifier):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.warns(UserWarning, match="No client made an optimizer step in round 0"):
        trainer(rounds=1).fit(Nothing(), loader())


def test_after_a_fit_the_data_module_tells_the_split_that_was_trained_on():
    from lightning_fedhaw import FederatedDataModule

    data = FederatedDataModule(samples(), num_clients=4)
    before = data.partition().fingerprint()
    trainer(seed=7, alpha=None).fit(Classifier(), data)
    assert data.partition().fingerprint() == data.partition(seed=7).fingerprint() != before


def test_rules_see_the_proxy_data():
    from lightning_fedhaw import FederatedDataModule

    class Looks(FedAvgCallback):
        def step(self, cohort, state, server):
            self.seen = len(server.proxy_dataset)
            return super().step(cohort, state, server)

    rule = Looks()
    trainer(rounds=1, rule=rule, alpha=None).fit(
        Classifier(), FederatedDataModule(samples(300), num_clients=4, proxy=30)
    )
    assert rule.seen == 30


def test_an_observer_that_fails_after_the_aggregation_undoes_the_round():
    from lightning_fedhaw import FederatedCallback

    class Fails(FederatedCallback):
        def on_round_end(self, trainer, pl_module, report):
            if report.round == 1 and not getattr(self, "failed", False):
                self.failed = True
                raise RuntimeError("boom")

    rule, module, straight = FedHAWCallback(), Classifier(), Classifier()
    runner = trainer(rule=rule, callbacks=[Fails()])
    with pytest.raises(RuntimeError, match="boom"):
        runner.fit(module, loader())
    runner.fit(module, loader())
    trainer(rule=FedHAWCallback()).fit(straight, loader())
    assert torch.equal(flat(module), flat(straight))


def test_a_failed_round_puts_schedules_of_manual_optimization_back():
    # Not in the module, whose attributes are a client's own.
    calls = []

    def make(breaks):
        class Steps(Classifier):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx):
                calls.append(breaks)
                if breaks and calls.count(True) == 25:
                    raise RuntimeError("pulled the plug")
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
                optimizer.step()
                self.lr_schedulers().step()

            def configure_optimizers(self):
                optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
                return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

        return Steps()

    straight, crashing = make(False), make(True)
    trainer().fit(straight, loader())
    runner = trainer()
    with pytest.raises(RuntimeError, match="pulled the plug"):
        runner.fit(crashing, loader())
    (config,) = runner.lr_scheduler_configs
    began, rate = config.scheduler.last_epoch, runner.optimizers[0].param_groups[0]["lr"]
    assert runner.global_step == 1, "it broke in the second round"
    assert rate == pytest.approx(0.2 * 0.9**began)
    runner.save_checkpoint("crashed.ckpt")
    again = make(False)
    trainer().fit(again, loader(), ckpt_path="crashed.ckpt")
    assert torch.equal(flat(straight), flat(again))


def test_a_batch_of_one_that_batch_norm_cannot_take_says_what_to_do():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
        trainer(num_clients=1).fit(Classifier(norm=True), DataLoader(samples(9), batch_size=8, shuffle=True))
    if hasattr(caught.value, "add_note"):
        assert (
            "client 0, round 0, a batch of 1. Leave such batches out by the loader's `drop_last=True`"
            in caught.value.__notes__[0]
        )
