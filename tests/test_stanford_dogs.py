"""The Stanford Dogs example: its demonstration, what it refuses, and going on after an interruption."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = ("clients.png", "weights.png", "confusion.png")
SMALL = ["--demo", "--model", "test_vit", "--image-size", "32", "--local-epochs", "1"]


@pytest.fixture(scope="module")
def example():
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import stanford_dogs_vit

        yield stanford_dogs_vit
    logger.setLevel(level)


@pytest.fixture(scope="module")
def demonstration(example, tmp_path_factory):
    """What the demonstration prints, and its folder, whose drawn dogs serve all tests."""
    output = tmp_path_factory.mktemp("demonstration")
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        example.main(["--demo", "--rounds", "2", "--output", str(output)])
    return printed.getvalue(), output


@pytest.fixture
def small(demonstration):
    """The arguments of a small run in a folder, which has its dogs already."""

    def arguments(folder):
        Path(folder).mkdir(exist_ok=True)
        if not (Path(folder) / "data").exists():
            (Path(folder) / "data").symlink_to(demonstration[1] / "data")
        return [*SMALL, "--output", folder]

    return arguments


def test_the_demonstration(demonstration):
    printed, output = demonstration
    assert printed.count("This is a demonstration: the ViT is tiny and its weights are random, the dogs are drawn") == 2
    for word in ("dalmatian", "worst decile", "accuracy on the test list", "most often confused"):
        assert word in printed
    assert "2/2" in printed
    for name in PICTURES:
        assert (output / name).stat().st_size > 10_000
    assert len(list((output / "features").rglob("*.pt"))) == 2
    assert len(list((output / "data" / "Images").rglob("*.jpg"))) == 12 * 55


def test_a_run_that_was_cut_off_goes_on(example, small):
    """Two rounds and two more end where four do, with the same features."""
    models = []
    for output, legs in (("whole", [["4"]]), ("halves", [["2"], ["4", "--resume"]])):
        for leg in legs:
            trainer = example.main([*small(output), "--logger", "csv", "--rounds", *leg])
        assert trainer.global_step == 4
        models.append(torch.cat([p.detach().flatten() for p in trainer.lightning_module.head.parameters()]))
    assert torch.equal(*models)
    assert len(list(Path("halves").rglob("metrics.csv"))) == 2


@pytest.mark.parametrize("finetune", ["none", "1"])
def test_a_fast_dev_run_shortens_the_federation_too(example, finetune, small, capsys):
    trainer = example.main([*small("short"), "--fast-dev-run", "--finetune", finetune, "--num-workers", "0"])
    assert trainer.global_step == 2
    assert trainer.federation_summary["clients_per_round"] == 2
    assert not list(Path().rglob("*.ckpt"))
    trained = {name.split(".")[0] for name, p in trainer.lightning_module.named_parameters() if p.requires_grad}
    assert trained == ({"head"} if finetune == "none" else {"head", "backbone"})
    assert "most often confused" in capsys.readouterr().out


def test_what_to_put_where(example, tmp_path):
    with pytest.raises(SystemExit) as ended:
        example.main(["--data-root", str(tmp_path / "dogs")])
    assert (
        f"Put `images.tar` and `lists.tar` from http://vision.stanford.edu/aditya86/ImageNetDogs into {tmp_path}"
        in (text := str(ended.value))
    )
    assert "--data-root names the folder of the data, --download fetches them, --demo needs none" in text
    assert not list(tmp_path.rglob("*.tar"))


def test_nothing_to_go_on_from(example):
    with pytest.raises(SystemExit, match="There is no checkpoint below new to resume from. Run without --resume first"):
        example.main(["--demo", "--resume", "--output", "new"])


def test_an_unknown_depth(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--demo", "--finetune", "some"])
    assert "--finetune must be none, head, all or a number of blocks, got 'some'" in capsys.readouterr().err
