"""What the progress bar and the table say of a round."""

import logging
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from io import StringIO

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info

from federations import Classifier, loader, trainer, val_loader
from lightning_fedhaw import ErasureChannel, FedAvgCallback, RoundProgressBar, RoundTable


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


def test_the_table_has_a_line_a_round_with_its_own_values_only(capsys):
    runner = trainer(
        rounds=3,
        num_clients=4,
        seed=1,
        callbacks=[RoundTable(), ErasureChannel(probability=[0.0, 0.0, 0.0, 1.0])],
        check_val_every_n_epoch=2,
        run_summary=False,
    )
    runner.fit(Classifier(), loader(), val_loader())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["round", "clients", "seconds", "train_loss"]
    assert [line[0] for line in lines] == ["round", "1/3", "round", "2/3", "3/3"]
    assert lines[2] == ["round", "clients", "seconds", "train_loss", "val_loss", "val_acc"]
    assert {line[1] for line in lines if line[0] != "round"} == {"3/4"}
    # The third round has no validation: its columns do not repeat the second round's values.
    assert lines[4][4:] == ["-", "-"]
    accuracy = float(runner.callback_metrics["val_acc"])
    assert lines[3][5] == f"{100 * accuracy:.4g}%"
    assert lines[4][3] == f"{float(runner.callback_metrics['train_loss']):.4g}"


def test_the_table_shows_what_it_is_asked_for_when_it_is_asked_to(capsys):
    table = RoundTable(["train_loss"], every_n_rounds=2)
    trainer(rounds=3, callbacks=[table], run_summary=False).fit(Classifier(), loader())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["round", "2/3", "3/3"]
    assert all(len(line) == 4 for line in lines)


class Counting(FedAvgCallback):
    """Reports the number of each second round, as a main number and as another one."""

    prog_bar = ("odd",)

    def step(self, cohort, state, server):
        output = super().step(cohort, state, server)
        if cohort.round % 2:
            output.metrics["odd"] = float(cohort.round)
            output.metrics["of no interest"] = float(cohort.round)
        return output


def test_the_numbers_of_a_rule_are_those_of_the_round(capsys):
    trainer(rounds=4, rule=Counting(), callbacks=[RoundTable()], run_summary=False).fit(
        Classifier(), loader(), val_loader()
    )
    printed = capsys.readouterr().out
    assert "interest" not in printed
    lines = [line.split() for line in printed.splitlines()]
    # The column is new in the second round and stays.
    assert [line[0] for line in lines] == ["round", "1/4", "round", "2/4", "3/4", "4/4"]
    column = lines[2].index("odd")
    assert [line[column] for line in lines[3:]] == ["1", "-", "3"]


class Terminal(StringIO):
    """A screen of 100 columns."""

    def isatty(self):
        return True

    def lines(self):
        """What is left on the screen: a carriage return begins a line again, and blanks clear it."""
        shown = []
        for line in self.getvalue().split("\n"):
            screen = ""
            for part in line.split("\r"):
                screen = part + screen[len(part) :]
            shown.append(screen.rstrip())
        return shown


@contextmanager
def terminal(monkeypatch):
    """A terminal as the output of the process and of Lightning's log; pytest would undo a fixture."""
    screen = Terminal()
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, logging.StreamHandler(screen)])
    # Where `pytorch_lightning` was imported too, messages would go to its logger.
    monkeypatch.setattr("lightning_utilities.core.rank_zero.log", logger)
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    # tqdm asks them for a screen that is no real terminal.
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    yield screen
    assert sys.stdout is screen
    assert sys.stderr is screen
    assert not any(isinstance(entry, logging.Filter) for handler in logger.handlers for entry in handler.filters)


def show_warning(text):
    """Show a warning as in a terminal; pytest would catch it."""
    sys.stderr.write(warnings.formatwarning(text, UserWarning, __file__, 1))


def test_messages_come_above_the_bar_and_leave_no_copy_of_it(monkeypatch):
    class Talking(Callback):
        def on_round_start(self, trainer, pl_module, round_idx, clients):
            if round_idx == 1:
                rank_zero_info("a message")

        def on_client_start(self, trainer, pl_module, client):
            # The bar is there again before each of them.
            for say in (print, pl_module.print, partial(print, file=sys.stderr), show_warning):
                bar.train_progress_bar.refresh()
                say("take care")

    bar = RoundProgressBar()
    runner = trainer(rounds=2, enable_progress_bar=True, callbacks=[Talking(), bar], run_summary=False)
    with terminal(monkeypatch) as screen:
        runner.fit(Classifier(), loader())
    lines = screen.lines()
    assert "a message" in lines
    clients = 2 * 4
    assert lines.count("take care") == 3 * clients
    assert sum(line.endswith("UserWarning: take care") for line in lines if line.startswith(__file__)) == clients
    assert [line[:12] for line in lines if "Rounds" in line] == ["Rounds: 100%"]


def test_a_run_that_fails_ends_its_bar(monkeypatch):
    class Failing(Callback):
        def on_round_end(self, trainer, pl_module, *_):
            raise ZeroDivisionError

    runner = trainer(rounds=2, enable_progress_bar=True, callbacks=[Failing(), RoundProgressBar()])
    with terminal(monkeypatch) as screen, pytest.raises(ZeroDivisionError):
        runner.fit(Classifier(), loader())
    assert screen.lines()[-1] == "", "the error begins on a line of its own"
