"""The Flower adapter, with Flower's own messages and no processes."""

import pytest
import torch

from deployments import NAMES, client_side, deploy, make_trainer
from federations import Classifier
from lightning_fedhaw import FedAvgCallback, ScaffoldCallback
from lightning_fedhaw.deploy.flower import client_app, flower_strategy

flwr_app = pytest.importorskip("flwr.app")
serverapp = pytest.importorskip("flwr.serverapp")
task_identity = pytest.importorskip("flwr.supercore.task_identity")


class Node:
    def __init__(self, node_id, name=""):
        self.node_id = node_id
        self.name = name


class OneProcess:
    """A grid whose nodes answer at once, each with a state of its own."""

    def __init__(self, app, nodes):
        self.app = app
        self.nodes = nodes
        self.states = {node.node_id: flwr_app.RecordDict() for node in nodes}
        self.replies = {}

    def get_nodes(self):
        return self.nodes

    def push_messages(self, messages):
        for message in messages:
            node_id = message.metadata.dst_node_id
            metadata = message.metadata
            metadata._message_id = f"{node_id} {len(self.replies)}"
            context = flwr_app.Context(0, node_id, {"part": node_id % 10}, self.states[node_id], {})
            reply = self.app(message, context)
            self.replies[metadata.message_id] = reply
            yield metadata.message_id

    def pull_messages(self, message_ids):
        return [self.replies[message_id] for message_id in message_ids]


@pytest.mark.parametrize("named", [True, False])
def test_a_strategy_of_any_rule_equals_the_simulator(named, monkeypatch):
    for name in ("_run_id", "_task_id", "_node_id"):
        # Flower's own process of a server app says who it is.
        monkeypatch.setattr(task_identity.TaskIdentity, name, 1)
    make = lambda: [ScaffoldCallback()]  # noqa: E731
    app = client_app(
        lambda config, run_config: client_side(make, part=config["part"], name=None if named else NAMES[config["part"]])
    )
    nodes = [Node(90 - 9 * part, NAMES[part] if named else "") for part in range(3)]
    grid = OneProcess(app, nodes)
    model = Classifier()
    strategy = flower_strategy(make_trainer(make, seed=5), model, num_sites=3)
    assert isinstance(strategy, serverapp.strategy.Strategy)
    result = strategy.start(grid)
    expected = deploy(make)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(result.arrays.to_torch_state_dict()[name], value)
    assert result.train_metrics_clientapp[2]["clients_received"] == 3
    assert strategy.side.roster.identities == NAMES


def test_what_the_trainer_says_is_refused_as_an_argument():
    strategy = flower_strategy(make_trainer(lambda: [FedAvgCallback()]), Classifier(), num_sites=3)
    with pytest.raises(ValueError, match="`num_rounds` is the trainer's"):
        strategy.start(OneProcess(None, []), num_rounds=3)
    with pytest.raises(NotImplementedError, match=r"Call `strategy.start\(grid\)`"):
        strategy.configure_train(1, None, None, None)
