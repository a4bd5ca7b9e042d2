"""The server: a trainer with a rule, as a Flower strategy."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from digits_federation.federation import NUM_SITES, DigitClassifier, make_trainer
from lightning_fedhaw.deploy.flower import flower_strategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds, or what a server that was killed has left of them."""
    rule = str(context.run_config["rule"])
    trainer = make_trainer(rule, int(context.run_config["rounds"]))
    strategy = flower_strategy(
        trainer,
        DigitClassifier(),
        num_sites=NUM_SITES,
        # A checkpoint after every round. The folder is outside of the app, which Flower unpacks anew for every run.
        folder=Path(str(context.run_config["folder"])) / rule,
        wait_timeout=1200.0,
        round_timeout=1200.0,
    )
    strategy.start(grid)
