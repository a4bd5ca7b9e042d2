"""A few trials of each kind, with fixed seeds, and the campaign itself: what it calls a failure is one."""

import json
import os
import signal
import time
from pathlib import Path
from random import Random

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_fedhaw import FedAvgCallback
from reliability import campaign, endings, long_runs, plans
from reliability.endings import Outcome
from reliability.forked import Forked, members_of
from reliability.records import first_difference

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the campaign forks and reads /proc"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]

# Of each kind the numbers of some trials that take little time; the rest is the full campaign's.
TRIALS = {
    "kills": [1, 6],
    "slurm": [1],
    "resumes": [0, 1],
    "configurations": list(range(8)),
    "flips": [0],
    "cuts": [1],
    "liars": [11, 23, 35, 47, 59],
}


def fork(job, folder):
    return Forked(job, folder, is_session=True)


@pytest.mark.parametrize("kind", TRIALS)
def test_some_trials_of_each_kind(kind, tmp_path):
    todo = [(kind, number) for number in TRIALS[kind]]
    failures = [result for result in campaign.results(todo, 1, 1, tmp_path) if not result.passed]
    assert not failures


@pytest.mark.parametrize("kind", ["lossy", "memory"])
def test_long_runs_in_short(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(long_runs, "ROUNDS", 12)
    monkeypatch.setattr(long_runs, "EARLY", 6)
    # So few rounds say nothing of memory: this shows that both moments are measured.
    monkeypatch.setattr(long_runs, "GROWTH", 1.0)
    (result,) = campaign.results([(kind, 1)], 1, 1, tmp_path)
    assert result.passed, result.detail


# ---------------------------------------------------------------------------------------------------------------------
# What is a failure
# ---------------------------------------------------------------------------------------------------------------------


def end_of(function):
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - whatever it is, it is to be classified
        function()
    return endings.of_error(caught.value)


def test_a_sentence_of_the_package_is_an_end():
    assert end_of(lambda: FedAvgCallback(num_clients=-1)) == Outcome(
        True,
        "a sentence of the package",
        "ValueError: `num_clients` must be a whole number of at least 1, got -1.",
    )


def test_a_sentence_of_lightning_is_an_end():
    def refuse():
        raise MisconfigurationException("No.")

    assert end_of(refuse).passed


def test_an_error_from_inside_torch_is_none():
    outcome = end_of(lambda: torch.nn.Linear(2, 1)(torch.ones(3)))
    assert not outcome.passed
    assert outcome.label == "an error from inside torch"


def test_what_the_package_did_not_say_itself_is_none(monkeypatch):
    package = Path(endings.__file__).parent
    monkeypatch.setattr(endings, "PACKAGE", package)
    raised = next(iter(endings.raises(str(package / "campaign.py"))))
    place = str(package / "campaign.py")
    assert endings.classified("ValueError", {"ValueError"}, "No.", place, raised[0]).passed
    assert not endings.classified("ValueError", {"ValueError"}, "No.", place, 1).passed
    assert not endings.classified("KeyError", {"KeyError"}, "'No.'", place, raised[0]).passed
    assert not endings.classified("ValueError", {"ValueError"}, " ", place, raised[0]).passed


def test_an_error_of_another_process_is_classified_by_its_own_frames():
    line = endings.raises(str(endings.PACKAGE / "arguments.py"))[0][0]
    text = f"""-- Process 1 terminated with the following error:
Traceback (most recent call last):
  File "/x/site-packages/torch/multiprocessing/spawn.py", line 87, in _wrap
    fn(i, *args)
  File "{endings.PACKAGE / "arguments.py"}", line {line}, in number
    raise invalid()
ValueError: `lr` must be a number: above 0.
"""
    assert endings.of_text(text) == Outcome(
        True, "a sentence of the package", "ValueError: `lr` must be a number: above 0."
    )
    assert endings.of_text(text.replace(str(endings.PACKAGE), "/x/site-packages/torch")).label == (
        "an error from inside torch"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_process_returns_its_value_its_error_or_the_signal_that_killed_it(tmp_path):
    assert fork(lambda me: [1, "two"], tmp_path).wait(10).value == [1, "two"]
    failed = fork(lambda me: 1 / 0, tmp_path).wait(10)
    assert (failed.error, failed.code, failed.value) == ("ZeroDivisionError: division by zero", 1, None)
    killed = fork(lambda me: os.kill(os.getpid(), signal.SIGKILL), tmp_path).wait(10)
    assert (killed.code, killed.timed_out) == (-signal.SIGKILL, False)


def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    def job(me):
        Forked(lambda child: time.sleep(60), tmp_path / "child")
        me.tell()
        time.sleep(60)

    process = fork(job, tmp_path)
    assert process.listen(10)
    assert len(members_of(process.pid)) == 2
    assert process.wait(0.01).timed_out
    deadline = time.monotonic() + 5
    while members_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not members_of(process.pid)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison, plans, journal
# ---------------------------------------------------------------------------------------------------------------------


def test_the_first_difference_is_found_at_any_depth():
    def record(value):
        return {"a": [1, {"b": torch.tensor([1.0, value])}], "seconds": time.monotonic()}

    assert first_difference(record(torch.nan), record(torch.nan)) == ""
    assert first_difference(record(1.0), record(1.5)) == "/a/1/b: up to 0.5 apart"
    # Zeros of both signs are equal numbers and different bits.
    assert first_difference(record(0.0), record(-0.0)) == "/a/1/b: up to 0 apart"
    assert first_difference({"a": 1}, {"a": 1, "c": 2}) == "/c: only in the second"
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == "/a: 1 and 2 entries"


def test_a_seed_gives_the_same_federation():
    drawn = [str(plans.drawn(Random("1/resumes/3"))) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != str(plans.drawn(Random("1/resumes/4")))


def passing(number, random, folder):
    return Outcome(True, f"drew {random.randrange(1000)}")


def failing(number, random, folder):
    return Outcome(False, "wrong", "by two")


def test_a_campaign_goes_on_where_it_was_stopped_and_a_failure_can_be_repeated(tmp_path, monkeypatch, capsys):
    kinds = {
        "good": campaign.Kind("all is well", 3, 10, passing),
        "bad": campaign.Kind("nothing is", 1, 10, failing),
    }
    monkeypatch.setattr(campaign, "KINDS", kinds)
    path = tmp_path / "report.jsonl"
    out = tmp_path / "report.md"
    assert campaign.run(campaign.in_turn({"good": 2}), campaign.Journal(path, 7), 7, 2, out)
    # Killed while it wrote a line.
    path.write_text(path.read_text() + '{"kind": "good", "nu')
    everything = campaign.in_turn({"good": 3, "bad": 1})
    assert not campaign.run(everything, campaign.Journal(path, 7), 7, 2, out)
    shown = capsys.readouterr().out
    assert "2 of 4 trials, seed 7" in shown
    assert "python -m tests.reliability --only bad --trial 0 --seed 7" in shown
    results = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    numbers = sorted((result["kind"], result["number"]) for result in results)
    assert numbers == [("bad", 0), ("good", 0), ("good", 1), ("good", 2)]
    assert "| good | all is well | 3 of 3 |" in out.read_text()
    assert "| bad | nothing is | 0 of 1 |" in out.read_text()
    drawn = next(result["label"] for result in results if (result["kind"], result["number"]) == ("good", 1))
    assert drawn == f"drew {Random('7/good/1').randrange(1000)}"
    with pytest.raises(SystemExit, match="of another seed"):
        campaign.Journal(path, 8)
