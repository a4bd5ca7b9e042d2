"""What the progress bar says of a round."""

import pytest
from lightning.pytorch import Callback

from federations import Classifier, loader, trainer
from lightning_fedhaw import RoundProgressBar


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "sequential"}, ["client 1 of 3", "client 2 of 3", "client 3 of 3"]),
        ({"engine": "vectorized"}, ["clients 1-3 at once of 3"]),
    ],
)
def test_the_bar_says_who_trains_at_the_moment(options, said, monkeypatch):
    """And with a chunk that holds two clients, which two."""
    monkeypatch.setattr("lightning_fedhaw.adapter.progress._REFRESH_SECONDS", -1.0)
    seen = []

    class Bar(RoundProgressBar):
        def init_train_tqdm(self):
            bar = super().init_train_tqdm()
            describe = bar.set_description

            def set_description(text, refresh=True):
                seen.append(text)
                describe(text, refresh)

            bar.set_description = set_description
            return bar

    class Halved(Callback):
        def on_round_start(self, trainer, pl_module, round_idx, clients):
            if round_idx == 1 and options["engine"] == "vectorized":
                trainer.fit_loop.federation.engine.chunk = 2

    runner = trainer(rounds=2, num_clients=3, enable_progress_bar=True, callbacks=[Halved(), Bar()], **options)
    runner.fit(Classifier(), loader())
    later = said if len(said) == 3 else ["clients 1-2 at once of 3", "client 3 of 3"]
    expected = [*said, "Rounds", *later, "Rounds"]
    assert seen[1:] == [text if text == "Rounds" else f"Rounds ({text})" for text in expected]
