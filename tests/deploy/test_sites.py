"""Sites that come and go, fail and send anything; servers that are started again."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from deployments import (
    DATA,
    NAMES,
    Plain,
    Scripted,
    client_side,
    deploy,
    differences,
    in_memory,
    leaves,
    make_trainer,
    same,
    server_side,
    simulate,
)
from federations import momentum, samples
from lightning_fedhaw import ErasureChannel, FedAvgCallback, FedHAWCallback, FedLAWCallback, FedProx, ScaffoldCallback
from lightning_fedhaw.deploy import ClientSide, InMemorySites, ServerSide, rounds_done
from lightning_fedhaw.extending import Channel

B = "node 8"
"""The address of site b, which is client 1."""


class Lost(Channel):
    """Loses the update of client 1 in round 1."""

    key = "Lost"

    def __init__(self):
        super().__init__(fallback="discard")

    def outage(self, round_idx, clients, seed):
        return torch.tensor([round_idx == 1 and client == 1 for client in clients])


def all_leaves(side):
    (rule,) = [callback for callback in side.trainer.callbacks if hasattr(callback, "step")]
    return dict(leaves([side.model.state_dict(), rule.state_dict()]))


def assert_same_end(first, second):
    here = all_leaves(first)
    there = all_leaves(second)
    assert here.keys() == there.keys()
    assert [path for path, value in here.items() if not same(value, there[path])] == []


# ---------------------------------------------------------------------- absent sites


@pytest.mark.parametrize("rule", [partial(FedHAWCallback, lr_lambda=1.0), ScaffoldCallback])
def test_a_site_whose_update_is_lost_is_as_if_it_had_not_taken_part(rule):
    """It has trained, and forgets what it has kept of that: the server tells it which of its updates was received."""
    options = {"rounds": 3}
    model = Plain
    if rule is not ScaffoldCallback:
        options["optimizer_state"] = "kept"
        model = partial(Plain, momentum)
    sites = Scripted(
        in_memory(lambda: [rule()], model, **options),
        lambda task, round_idx, address, reply: None if (task, round_idx, address) == ("train", 1, B) else reply,
    )
    with pytest.warns(UserWarning, match=r"Site 'b' \(client 1\) did not answer within"):
        side = deploy(lambda: [rule()], model, sites, **options)
    trainer, module = simulate(lambda: [rule(), Lost()], model, **options)
    assert differences(side, trainer, module) == []
    assert side.trainer.federation_summary["lost_messages"] == 1


def test_the_learned_weight_of_an_absent_site_does_not_move():
    logits = []

    def script(task, round_idx, address, reply):
        logits.append(rule.state["lambda_"])
        return None if task == "train" and round_idx > 0 and address == B else reply

    rule = FedHAWCallback(lr_lambda=1.0)
    sites = Scripted(in_memory(lambda: [FedHAWCallback(lr_lambda=1.0)], rounds=3), lambda *event: event[-1])
    side = server_side(lambda: [rule], sites, rounds=3)
    sites.change = script
    rule.state = {"lambda_": torch.zeros(3)}
    with pytest.warns(UserWarning, match="Site 'b'"):
        side.fit()
    after_two, at_end = logits[-3], rule.state["lambda_"]
    assert at_end[1] == after_two[1]
    assert at_end[0] != after_two[0]


def test_a_site_that_is_gone_and_comes_back_has_its_number(tmp_path):
    """At another address, with the memory that it kept in its folder."""
    options = {"rounds": 3, "optimizer_state": "kept"}
    model = partial(Plain, momentum)
    sites = in_memory(lambda: [FedAvgCallback()], model, **options)
    back = client_side(lambda: [FedAvgCallback()], model, 1, memory_folder=tmp_path, **options)
    sites.clients[B] = back

    class Restarted(Scripted):
        def present(self):
            round_of = self.rounds["train"] + 1
            if round_of == 1:
                self.inner.clients.pop(B, None)
            if round_of == 2:
                self.inner.clients["node 77"] = back
            return super().present()

    with pytest.warns(UserWarning, match=r"Site 'b' \(client 1\) was not there when it was asked to train"):
        side = deploy(lambda: [FedAvgCallback()], model, Restarted(sites, lambda *event: event[-1]), **options)
    assert side.roster.identities == NAMES
    assert differences(side, *simulate(lambda: [FedAvgCallback(), Lost()], model, **options)) == []


def test_a_round_that_a_later_one_has_overtaken_changes_nothing(tmp_path):
    class Recording(Scripted):
        def ask(self, task, messages, timeout):
            self.message = messages[B]
            return super().ask(task, messages, timeout)

    make = lambda: [ScaffoldCallback()]  # noqa: E731
    sites = Recording(in_memory(make, rounds=1), lambda *event: event[-1])
    late = client_side(make, part=1, rounds=1, memory_folder=tmp_path)
    sites.inner.clients[B] = late
    deploy(make, sites=sites, rounds=1)
    kept = torch.load(tmp_path / "memory.pt", weights_only=True)
    assert list(kept["rounds"]) == [0]
    torch.save({**kept, "rounds": {5: kept["rounds"][0]}}, tmp_path / "memory.pt")
    reply, memory = late.answer("train", sites.message)
    assert (reply.error, memory) == ("a later round has begun meanwhile", None)
    assert list(torch.load(tmp_path / "memory.pt", weights_only=True)["rounds"]) == [5]


def test_a_site_that_has_lost_what_it_kept_does_not_go_on_with_other_values():
    class Forgetful(Scripted):
        def ask(self, task, messages, timeout):
            self.inner.memories.pop(B, None)
            return super().ask(task, messages, timeout)

    sites = Forgetful(in_memory(lambda: [ScaffoldCallback()]), lambda *event: event[-1])
    with pytest.warns(UserWarning, match=r"Site 'b' .* lost what it kept after round 0 .* `memory_folder=`"):
        deploy(lambda: [ScaffoldCallback()], sites=sites)


# ---------------------------------------------------------------------- servers that are started again


@pytest.mark.parametrize("rule", [partial(FedHAWCallback, lr_lambda=1.0), ScaffoldCallback])
def test_a_server_that_was_killed_goes_on_with_the_bits_of_the_uninterrupted_run(rule, tmp_path):
    """It dies in round 2, after sites have trained and kept what they have learned."""

    def die(task, round_idx, address, reply):
        if (task, round_idx, address) == ("train", 2, B):
            raise KeyError("killed")
        return reply

    options = {"rounds": 3, "enable_checkpointing": True}
    model = Plain
    if rule is not ScaffoldCallback:
        options["optimizer_state"] = "kept"
        model = partial(Plain, momentum)
    make = lambda: [rule()]  # noqa: E731
    sites = in_memory(make, model, **options)
    with pytest.raises(KeyError, match="killed"):
        deploy(make, model, Scripted(sites, die), folder=tmp_path, **options)
    again = deploy(make, model, sites, folder=tmp_path, **options)
    assert differences(again, *simulate(make, model, **options)) == []
    assert rounds_done(tmp_path) == 3


def test_a_server_in_a_thread_of_its_own_saves_every_round(tmp_path):
    """As an engine may start it."""
    assert rounds_done(tmp_path) == 0
    with ThreadPoolExecutor(1) as pool:
        pool.submit(deploy, lambda: [FedAvgCallback()], folder=tmp_path, rounds=1).result()
    assert rounds_done(tmp_path) == 1


def test_a_checkpoint_of_other_sites_is_refused(tmp_path):
    options = {"enable_checkpointing": True}
    make = lambda: [FedAvgCallback()]  # noqa: E731
    deploy(make, folder=tmp_path, **options)
    sites = in_memory(make)
    with pytest.raises(
        ValueError, match=r"is of the 3 sites \['a', 'b', 'c'\], and `num_sites` is 4. Set `num_sites=3`"
    ):
        deploy(make, sites=sites, folder=tmp_path, num_sites=4, rounds=3, **options)
    for number, site in enumerate(sites.clients.values()):
        site.name = f"other {number}"
    with pytest.raises(
        ValueError, match=r"is of the sites \['a', 'b', 'c'\], and none of them is here, but \['other 0'"
    ):
        deploy(make, sites=sites, folder=tmp_path, rounds=3, **options)
    sites = in_memory(make)
    sites.clients[B]._make_data = lambda: DataLoader(Subset(DATA, range(4)), batch_size=4, shuffle=True)
    with (
        pytest.warns(UserWarning, match="Site 'b' has 4 training examples, and had 12 when it joined"),
        pytest.warns(UserWarning, match="Site 'b' .* was not there"),
    ):
        deploy(make, sites=sites, folder=tmp_path, rounds=3, **options)


# ---------------------------------------------------------------------- what sites send


def spoiled(message, change):
    """A message of which one array is changed."""
    arrays = dict(message.arrays)
    arrays["parameters/net.0.weight"] = change(arrays["parameters/net.0.weight"])
    return replace(message, arrays=arrays)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda reply: spoiled(reply, lambda array: array * np.nan),
            "Client 1 returned non-finite parameters in round 1",
        ),
        (
            lambda reply: spoiled(reply, lambda array: array[:2]),
            r"The reply of site 'b' \(client 1\) in round 1 was left out: its `net.0.weight` is \[2, 6\], and the",
        ),
        (lambda reply: spoiled(reply, lambda array: array.astype(int)), r"Site 'b' .* its message cannot be read"),
        (lambda reply: replace(reply, text="{}"), "site 'b' .* was left out: lacks"),
        (lambda reply: replace(reply, text="no"), "Site 'b' .* its message cannot be read"),
        (
            lambda reply: replace(reply, text=json.dumps({**json.loads(reply.text), "num_steps": -1})),
            "its `num_steps` is -1",
        ),
        (
            lambda reply: replace(reply, text=json.dumps({**json.loads(reply.text), "num_examples": 9999})),
            "it has 9999 training examples, and had 12 when it joined",
        ),
    ],
)
def test_a_site_that_sends_something_else_is_named_and_left_out(change, sentence):
    sites = Scripted(
        in_memory(lambda: [FedAvgCallback()]),
        lambda task, round_idx, address, reply: (
            change(reply) if (task, round_idx, address) == ("train", 1, B) else reply
        ),
    )
    with pytest.warns(UserWarning, match=sentence):
        side = deploy(lambda: [FedAvgCallback()], sites=sites)
    trainer, module = simulate(lambda: [FedAvgCallback(), Lost()])
    different = differences(side, trainer, module)
    assert [name for name in different if "bytes" not in name] == []


def test_bytes_are_those_of_the_messages():
    model = partial(Plain, norm=True)
    sites = Scripted(in_memory(lambda: [ScaffoldCallback()], model, rounds=1), lambda *event: event[-1])
    side = deploy(lambda: [ScaffoldCallback()], model, sites, rounds=1)
    summary = side.trainer.federation_summary
    assert sites.bytes["up"] == summary["bytes_up"]
    # In the first round there is no mean of control variates to send yet, and so one model less.
    model_bytes = 4 * sum(parameter.numel() for parameter in side.model.parameters())
    assert sites.bytes["down"] == summary["bytes_down"] - 3 * model_bytes


# ---------------------------------------------------------------------- who is there


def test_a_server_waits_for_its_sites_and_says_how_many_are_missing(caplog):
    with pytest.raises(TimeoutError, match=r"1 of 3 sites were missing after 0 s\. Start them, wait longer"):
        deploy(lambda: [FedAvgCallback()], sites=in_memory(lambda: [FedAvgCallback()], parts=(0, 2)))


DISAGREEING = {
    "another identity": (
        lambda: client_side(lambda: [FedAvgCallback()], part=1, name="a"),
        "Two sites have the identity 'a'",
    ),
    "another model": (
        lambda: client_side(lambda: [FedAvgCallback()], partial(Plain, hidden=5), 1),
        r"Site 'b' has another model: its `net.0.weight` is \[5, 6\], and the server's is \[8, 6\]",
    ),
    "another split": (
        lambda: client_side(lambda: [FedAvgCallback()], part=1, local_parameters="net.3.*"),
        r"Site 'b' splits the parameters in another way: its local ones are \['net.3.bias', 'net.3.weight'\]",
    ),
    "another rule": (
        lambda: client_side(lambda: [FedHAWCallback()], part=1),
        "Site 'b' has FedHAWCallback as its rule",
    ),
    "another objective": (
        lambda: client_side(lambda: [FedAvgCallback(), FedProx(0.1)], part=1),
        r"Site 'b' has \['FedProx\(mu=0.1\)'\] as its objectives, and the server \[\]",
    ),
    "other work": (
        lambda: client_side(lambda: [FedAvgCallback()], part=1, local_epochs=3),
        r"Site 'b' has `local_epochs`=3, and the server None\. Make both trainers with the same arguments",
    ),
    "code that fails": (
        lambda: client_side(lambda: [FedAvgCallback()], part=1, data=lambda: {}["samples"]),
        "Site 'node 8' is left out: it failed: KeyError: 'samples'",
    ),
}


@pytest.mark.parametrize("case", DISAGREEING)
def test_a_site_that_does_not_fit_is_named_and_left_out(case):
    make, sentence = DISAGREEING[case]
    sites = in_memory(lambda: [FedAvgCallback()])
    sites.clients[B] = make()
    with (
        pytest.warns(UserWarning, match=sentence),
        pytest.raises(TimeoutError, match="1 of 3 sites were missing"),
    ):
        deploy(lambda: [FedAvgCallback()], sites=sites)


def test_a_site_that_joins_later_gets_a_weight_to_learn_or_is_refused():
    rule = FedHAWCallback(lr_lambda=1.0, hyper_optimizer=torch.optim.Adam)

    class Growing(Scripted):
        def present(self):
            present = super().present()
            if self.rounds["train"] < 1:
                del present["node 7"]
            return present

    make = lambda: [FedHAWCallback(lr_lambda=1.0, hyper_optimizer=torch.optim.Adam)]  # noqa: E731
    sites = Growing(in_memory(make, rounds=3), lambda *event: event[-1])
    side = deploy(lambda: [rule], sites=sites, num_sites=2, rounds=3)
    assert side.roster.identities == NAMES
    assert rule.state["lambda_"].shape == (3,)
    assert torch.exp(rule.state["lambda_"]).isfinite().all()
    assert side.trainer.callback_metrics["clients_received"] == 3

    sites = Growing(in_memory(lambda: [FedAvgCallback()], rounds=3), lambda *event: event[-1])
    with pytest.warns(
        UserWarning, match=r"Site 'c' cannot join: `FedAvgCallback` admits no client after the first round"
    ):
        side = deploy(lambda: [FedAvgCallback()], sites=sites, num_sites=2, rounds=3)
    assert side.roster.identities == ["a", "b"]


def test_a_new_logit_is_that_of_the_examples():
    rule = FedHAWCallback(lr_lambda=1.0)
    state = rule.init(torch.zeros(2), torch.tensor([10, 30]))
    state["lambda_optimizer"] = {"step": torch.tensor(3.0), "exp_avg": torch.tensor([1.0, 2.0])}
    admitted = rule.admit(state, torch.tensor([10, 30, 20]))
    assert torch.allclose(torch.softmax(admitted["lambda_"], 0), torch.tensor([10, 30, 20]).double() / 60)
    assert admitted["lambda_optimizer"]["exp_avg"].tolist() == [1.0, 2.0, 0.0]
    assert admitted["lambda_optimizer"]["step"] == 3
    assert len(state["lambda_"]) == 2


# ---------------------------------------------------------------------- what is refused


def test_what_a_deployment_does_not_carry_is_refused_by_name():
    with pytest.raises(ValueError, match="`ErasureChannel` simulates a channel, and a deployment has real ones"):
        server_side(lambda: [FedAvgCallback(), ErasureChannel(0.1)], InMemorySites({}))
    with pytest.raises(ValueError, match="`FedLAWCallback` works with data of the server's own, and there is none"):
        deploy(lambda: [FedLAWCallback()], rounds=1)
    with pytest.raises(ValueError, match="`num_sites` must say how many sites take part, got none"):
        ServerSide(make_trainer(lambda: [FedAvgCallback()]), Plain(), InMemorySites({}))
    with pytest.raises(TypeError, match="`make_model` must be a function that can be called"):
        ClientSide(make_trainer, "Plain", samples)


def test_a_failure_at_all_sites_ends_the_run():
    class Failing(Plain):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError("nobody divides here")

    with (
        pytest.warns(UserWarning, match="is left out: it failed"),
        pytest.raises(
            RuntimeError, match="All sites failed when they were asked to train. Site 'a' .* nobody divides here"
        ),
    ):
        deploy(lambda: [FedAvgCallback()], Failing)
