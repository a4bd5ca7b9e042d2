"""What is added to an error reaches the user on every Python."""

import traceback

import pytest

from federations import Classifier, loader, trainer
from lightning_fedhaw.notes import add_note


class Old(RuntimeError):
    """An error as before Python 3.11."""

    add_note = property()


def shown(error):
    return "".join(traceback.format_exception_only(error))


@pytest.mark.parametrize("kind", [Old, RuntimeError])
def test_the_note_follows_the_message(kind):
    error = kind("boom", 3)
    add_note(error, "In round 2.")
    assert "boom" in shown(error)
    assert "In round 2." in shown(error)


def test_an_error_without_a_message_gets_one():
    error = Old()
    add_note(error, "In round 2.")
    assert str(error) == "In round 2."


def test_what_is_no_message_stays():
    error = Old(3)
    add_note(error, "In round 2.")
    assert error.args == (3,)


def test_an_error_in_local_training_says_where_without_notes():
    class Breaks(Classifier):
        def training_step(self, batch, batch_idx):
            raise Old("boom")

    with pytest.raises(Old) as caught:
        trainer().fit(Breaks(), loader())
    assert str(caught.value) == "boom\nIn local training: client 0, round 0, a batch of 8."
