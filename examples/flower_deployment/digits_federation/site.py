"""A site: a Flower client app that trains the model on the site's own data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from digits_federation.federation import DigitClassifier, loader_of, make_trainer
from lightning_fedhaw.deploy import ClientSide
from lightning_fedhaw.deploy.flower import client_app


def make_site(node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> ClientSide:
    """Make the client side of the node whose configuration says which site it is."""
    return ClientSide(
        partial(make_trainer, str(run_config["rule"]), int(run_config["rounds"])),
        DigitClassifier,
        partial(loader_of, int(node_config["site"])),
        # What the site keeps from round to round survives the end of its SuperNode here.
        memory_folder=f"{node_config['memory']}/{run_config['rule']}",
    )


app = client_app(make_site)
