"""Functions that are given as arguments: an error within names the argument."""

import pytest

from federations import Classifier, loader, samples, trainer
from lightning_fedhaw.data import HoldOut, find_labels


def fit(**options):
    trainer(rounds=1, **options).fit(Classifier(), loader(32))


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("client_lr_scale", lambda function: fit(client_lr_scale=function)),
        ("local_parameters", lambda function: fit(local_parameters=function)),
        ("labels", lambda function: find_labels(samples(8), function)),
        ("groups", lambda function: fit(client_val=HoldOut(fraction=0.2, groups=function))),
    ],
)
def test_what_a_function_raises_is_in_the_sentence(argument, call):
    def broken(value):
        return {}["missing"]

    message = rf"`{argument}` is a function, and the call `.*broken\(.*\)` raised KeyError: 'missing'"
    with pytest.raises(ValueError, match=message) as caught:
        call(broken)
    assert isinstance(caught.value.__cause__, KeyError)
