"""The command ``fedhaw compare``."""

import pytest

from lightning_fedhaw.__main__ import main
from lightning_fedhaw.plotting import main as plot

OWN = ["--model", "comparison_task.Network", "--data", "cli_task.Samples", "--num-clients", "4"]


def compare(tmp_path, *arguments):
    return main(["compare", *arguments, "--jobs", "1", "--output", str(tmp_path / "out")])


def test_a_researchers_task(tmp_path, capsys):
    """A module, data and a rule by class path, two settings, a table and pictures, and the curves drawn again."""
    own = "mine=comparison_task.Half(share=0.5)"
    settings = ["--alpha", "1", "10", "--model.hidden", "3", "--rounds", "2", "--seeds", "0"]
    assert compare(tmp_path, *OWN, "--rules", "FedAvg", own, *settings) == 0
    printed = capsys.readouterr().out
    assert "[4/4] Network, num_clients=4, alpha=10, model.hidden=3, mine, seed 0: val_acc" in printed
    assert "ahead of FedAvg in points, mean and standard error over seeds" in printed
    assert r"\toprule" in (tmp_path / "out" / "table.tex").read_text()
    assert len(list((tmp_path / "out").glob("curves_*.pdf"))) == 2
    runs = sorted((tmp_path / "out" / "runs" / "Network").iterdir())
    pictures = plot([*map(str, sorted(runs[0].iterdir())), "--output", str(tmp_path / "again")])
    assert (tmp_path / "again" / "val_acc.png") in pictures
    pictures = ["--format", "svg", "--theme", "dark"]
    assert compare(tmp_path, *OWN, "--rules", "FedAvg", own, *settings, *pictures) == 0
    printed = capsys.readouterr().out
    assert "[1/" not in printed, "nothing is repeated"
    drawn = sorted((tmp_path / "out").glob("curves_*.svg"))
    assert [str(path) in printed for path in drawn] == [True, True]
    assert ".pdf" not in printed
    assert "#1e2129" in drawn[0].read_text(), "the page of the dark theme"


def test_a_failed_run_is_reported(tmp_path, capsys):
    assert compare(tmp_path, *OWN, "--rules", "comparison_task.Broken", "--rounds", "1", "--seeds", "0") == 1
    printed = capsys.readouterr().err
    assert "failed: Network, num_clients=4, comparison_task.Broken, seed 0: ZeroDivisionError: no step" in printed
    assert "in step" in (tmp_path / "out" / "failures.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rules", "FedAvgg"], "There is no `FedAvgg`, in `FedAvgg`. Did you mean `FedAvg`?"),
        (["digit", "--rules", "FedAvg"], "There is no cell `digit`. Did you mean `digits`?"),
        (["--rules", "FedAvg", "--alpa", "1"], "There is no option `--alpa`. Did you mean `--alpha`?"),
        (["--rules", "FedAvg", "--lr", "1"], "the learning rate is an argument of the model, `--model.lr`"),
        (["--rules", "FedAvg", "--model", "cli_task.Network"], "`--model` and `--data` come together"),
        (["--rules", "FedAvg", "--alpha", "much"], "`alpha` must be"),
        (["--rules", "mine.Rule"], "There is no module `mine`"),
        ([], "--rules"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        compare(tmp_path, *arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_the_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    printed = capsys.readouterr().out
    for word in ("--local-epochs", "--errors", "--channel", "--model.NAME", "--baselines", "mislabeled_digits"):
        assert word in printed
