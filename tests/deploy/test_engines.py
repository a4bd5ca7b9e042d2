"""What the adapters do without their engines."""

import re
from importlib.metadata import PackageNotFoundError

import pytest

from deployments import NAMES, client_side, server_side
from lightning_fedhaw import FedAvgCallback
from lightning_fedhaw.deploy import Message, engines
from lightning_fedhaw.deploy.nvflare import CollabSites


class Proxy:
    """A client of an NVFlare job, as the server sees it."""

    def __init__(self, name, site):
        self.name = name
        self.site = site

    def __call__(self, timeout):
        return self

    def answer(self, task, arrays, text):
        if task == "train" and self.name == "c":
            raise ConnectionError("no route to c")
        reply, _ = self.site.answer(task, Message(arrays, text))
        return {"arrays": dict(reply.arrays), "text": reply.text, "error": reply.error}


def test_the_clients_of_an_nvflare_job_are_sites():
    make = lambda: [FedAvgCallback()]  # noqa: E731
    # The name in the certificate counts, and not the one that a site gives itself.
    proxies = [Proxy(name, client_side(make, part=part, name="a", rounds=1)) for part, name in enumerate(NAMES)]
    side = server_side(make, CollabSites(proxies), rounds=1)
    with pytest.warns(UserWarning, match=r"Site 'c' \(client 2\) is left out: it failed: NVFlare says: no route to c"):
        side.fit()
    assert side.roster.identities == NAMES
    assert side.trainer.callback_metrics["clients_received"] == 2


@pytest.mark.parametrize("engine", ["flwr", "nvflare"])
def test_an_engine_that_is_missing_or_of_another_version_is_named(engine, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(engines, "version", missing)
    tried = engines.TRIED[engine]
    remedy = re.escape(f'Install it by `pip install "{engine}=={tried}.*"`.')
    with pytest.raises(ImportError, match=rf"`{engine}` is not installed\. {remedy}"):
        engines.engine_module(f"{engine}.app")
    monkeypatch.setattr(engines, "version", lambda name: "9.1")
    with pytest.raises(
        ImportError, match=rf"`{engine}` 9.1 is installed, and the adapter was tried with {tried}. {remedy}"
    ):
        engines.engine_module(f"{engine}.app")
