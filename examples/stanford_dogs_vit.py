"""FedHAW on Stanford Dogs with a ViT: ten clients, a Dirichlet(0.1) split by breeds, the FedHAW paper's settings.

    python examples/stanford_dogs_vit.py --demo                       no download: drawn dogs and a tiny ViT
    python examples/stanford_dogs_vit.py --data-root dogs --download  Stanford Dogs and ViT-B/16 as timm has it
    python examples/stanford_dogs_vit.py --data-root dogs --finetune 2 --precision bf16-mixed --devices 2
    python examples/stanford_dogs_vit.py --data-root dogs --resume    continue from the last checkpoint below --output

As in the paper the ViT is frozen and an MLP 768-256-256-120 is trained on its features, which are computed once and
stored in `--output`. `--finetune` trains on images instead: `head` the MLP alone, a number the last so many blocks too,
`all` everything. Validation, after every round, is on the official test list. Prints the clients' label histograms, a
bar that counts rounds, the run summary and the breeds that are confused most often; draws the clients, the confusion
matrix, and accuracy, scale and weights over rounds.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from demo_dogs import write_demo_dogs
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchmetrics.classification import MulticlassConfusionMatrix

import lightning_fedhaw as fed
from lightning_fedhaw.adapter.checkpoint import RoundCheckpoint
from lightning_fedhaw.data import StanfordDogs, cache_features
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.plotting import RunHistory, draw_comparison

RULES: dict[str, Callable[[], AggregationRule]] = {
    "fedhaw-paper": lambda: fed.PublishedFedHAWCallback(lr_gamma=1e-7, lr_lambda=1e-5),
    "fedhaw": fed.FedHAWCallback,
    "fedavg": fed.FedAvgCallback,
    "fedadam": fed.FedAdamCallback,
    "fedhyper": lambda: fed.FedHyperCallback("G", normalize_by="norms", hyper_lr=0.1),
    "fedlws": fed.FedLWSCallback,
}
LOGGERS: dict[str, Callable[[Path], Logger | bool]] = {
    "none": lambda folder: False,
    "csv": lambda folder: CSVLogger(folder, name="csv"),
    "tensorboard": lambda folder: TensorBoardLogger(folder, name="tensorboard"),
    "wandb": lambda folder: WandbLogger(project="stanford-dogs-vit", save_dir=folder),
}
DEMO = {
    "model": "vit_tiny_patch16_224",
    "image_size": 64,
    "pretrained": False,
    "alpha": 0.3,
    "rounds": 20,
    "local_epochs": 5,
    "batch_size": 32,
    "lr": 1e-3,
    "rule": "fedhaw",
    "num_workers": 0,
    "accelerator": "cpu",
    "output": Path("outputs/stanford_dogs_demo"),
}
DEMO_TEXT = """
This is a demonstration: the ViT is tiny and its weights are random, the dogs are drawn, and the rule and its
settings are not the paper's. It shows that all parts work together, and says nothing about accuracy on Stanford Dogs.
"""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `--demo` changes defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="drawn dogs and a tiny random ViT, without a download")
    parser.add_argument("--fast-dev-run", action="store_true", help="few images, two rounds of two clients, one batch")
    parser.add_argument("--data-root", type=Path, default=Path("data/stanford_dogs"))
    parser.add_argument("--download", action="store_true", help="fetch the official archives, 800 MB, if missing")
    parser.add_argument("--model", default="vit_base_patch16_224", help="any model of timm")
    parser.add_argument("--image-size", type=int, help="default: the model's own")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, help="timm's weights; the default")
    parser.add_argument("--checkpoint-path", type=Path, help="a file of weights instead of timm's")
    parser.add_argument("--finetune", default="none", help="none (train on cached features), head, blocks, or all")
    parser.add_argument("--head-widths", type=int, nargs="*", default=[256, 256])
    parser.add_argument("--rule", choices=RULES, default="fedhaw-paper")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--clients-per-round", type=float, default=1.0, help="share of the clients")
    parser.add_argument("--alpha", type=float, default=0.1, help="Dirichlet concentration: small is unequal")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--local-epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-5, help="of the clients' Adam")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="1", type=lambda text: int(text) if text.lstrip("-").isdigit() else text)
    parser.add_argument("--num-workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--logger", choices=LOGGERS, default="none")
    parser.add_argument("--checkpoint-every", type=int, default=10, metavar="ROUNDS")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint below --output")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/stanford_dogs"))
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if args.finetune not in ("none", "head", "all") and not args.finetune.isdigit():
        parser.error(f"--finetune must be none, head, all or a number of blocks, got {args.finetune!r}")
    if args.demo:
        args.data_root = args.output / "data"
    return args


def build(args: argparse.Namespace) -> tuple[fed.TimmClassifier, fed.FederatedDataModule, list[str]]:
    """Create the model and the clients' data, and list the breeds."""
    if args.demo:
        write_demo_dogs(args.data_root)
    train = StanfordDogs(args.data_root, "train", download=args.download)
    test = StanfordDogs(args.data_root, "test")
    pretrained = args.pretrained
    if pretrained is None:
        pretrained = args.checkpoint_path is None
    uses_features = args.finetune == "none"
    trainable: str | int = args.finetune
    if uses_features:
        trainable = "head"
    elif args.finetune.isdigit():
        trainable = int(args.finetune)
    model_kwargs = {}
    if args.image_size is not None:
        model_kwargs["img_size"] = args.image_size
    torch.manual_seed(args.seed)
    model = fed.TimmClassifier(
        args.model,
        num_classes=len(train.classes),
        pretrained=pretrained,
        checkpoint_path=args.checkpoint_path,
        trainable=trainable,
        head_widths=args.head_widths,
        lr=args.lr,  # AdamW without weight decay, TimmClassifier's default, is Adam
        model_kwargs=model_kwargs,
    )
    train.transform = model.transform(train=not uses_features)
    test.transform = model.transform(train=False)
    train_data: Dataset[Any] = train
    test_data: Dataset[Any] = test
    if args.fast_dev_run:
        train_data = first_of_each_class(train, 20)
        test_data = first_of_each_class(test, 2)
    num_workers = args.num_workers
    if uses_features:
        train_data = features(model, train_data, args)
        test_data = features(model, test_data, args)
        # Features are in memory, where processes that read them would only cost time.
        num_workers = 0
    data = fed.FederatedDataModule(
        train_data,
        num_clients=args.clients,
        partitioner=fed.DirichletPartitioner(args.alpha),
        batch_size=args.batch_size,
        val=test_data,
        num_workers=num_workers,
        seed=args.seed,
    )
    return model, data, train.classes


def first_of_each_class(dataset: StanfordDogs, count: int) -> Subset[Any]:
    """Reduce a data set to the first images of each class."""
    targets = torch.tensor(dataset.targets)
    indices: list[int] = []
    for label in targets.unique():
        indices += (targets == label).nonzero()[:count, 0].tolist()
    return Subset(dataset, indices)


def features(model: fed.TimmClassifier, dataset: Dataset[Any], args: argparse.Namespace) -> Dataset[Any]:
    """Compute the features of the frozen backbone once, on a GPU if there is one."""
    if args.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        model.to("cuda")
    cached = cache_features(
        model.features,
        dataset,
        args.output / "features",
        key=model.feature_key(),
        num_workers=args.num_workers,
    )
    model.cpu()
    return cached


def last_checkpoint(folder: Path) -> Path:
    """Return the newest checkpoint below a folder."""
    checkpoints = sorted((folder / "checkpoints").glob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise FileNotFoundError(
            f"There is no checkpoint below {folder} to resume from. Run without --resume first, or name the --output of"
            " the run to resume."
        )
    return checkpoints[-1]


@torch.no_grad()
def confusion(model: fed.TimmClassifier, loader: Any, device: torch.device, num_classes: int) -> Tensor:
    """Count the test images ``[classes, classes]`` of each breed (rows) that are classified as each (columns)."""
    # Without synchronization, because the first process alone evaluates all images.
    matrix = MulticlassConfusionMatrix(num_classes, sync_on_compute=False).to(device)
    model.to(device).eval()
    for inputs, labels in loader:
        matrix.update(model(inputs.to(device)), labels.to(device))
    return matrix.compute().cpu()


def draw_confusion(counts: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draw the shares of each breed's images that are classified as each breed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = 4.5 + 0.09 * len(classes)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    size = 5
    if len(classes) <= 20:
        size = 10
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size)
    axes.set_yticks(range(len(classes)), classes, fontsize=size)
    accuracy = (counts.trace() / counts.sum()).item()
    axes.set(xlabel="classified as", ylabel="breed")
    axes.set_title(f"{accuracy:.1%} of the test images are classified correctly")
    figure.colorbar(image, ax=axes, label="share of the breed's images", shrink=0.8)
    figure.savefig(path, dpi=150)


def most_confused(counts: Tensor, classes: Sequence[str], most: int = 5) -> list[str]:
    """List the breeds that are confused most often, one line for each pair."""
    errors = counts - counts.diag().diag()
    largest = errors.flatten().topk(min(most, errors.numel()))
    lines = []
    for count, index in zip(largest.values.tolist(), largest.indices.tolist(), strict=True):
        if count > 0:
            breed, other = divmod(index, len(classes))
            lines.append(f"{count:4} x {classes[breed]} classified as {classes[other]}")
    return lines


def main(argv: Sequence[str] | None = None) -> fed.FederatedTrainer:
    args = arguments(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers",
        ".*LeafSpec.* is deprecated",
        "Checkpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=message)
    if args.demo:
        print(DEMO_TEXT)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        checkpoint = None
        if args.resume:
            checkpoint = last_checkpoint(args.output)
        model, data, classes = build(args)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(
            f"{error}\n(--data-root names the folder of the data, --download fetches them, --demo needs none.)"
        ) from error

    history = RunHistory()
    trainer = fed.FederatedTrainer(
        rounds=args.rounds,
        clients_per_round=args.clients_per_round,
        local_epochs=args.local_epochs,
        seed=args.seed,
        callbacks=[
            RULES[args.rule](),
            history,
            RoundCheckpoint(args.checkpoint_every, args.output / "checkpoints"),
        ],
        precision=args.precision,
        accelerator=args.accelerator,
        devices=args.devices,
        fast_dev_run=args.fast_dev_run,
        logger=LOGGERS[args.logger](args.output),
        default_root_dir=args.output,
        enable_model_summary=False,
    )
    if trainer.is_global_zero:
        print(data.preview(args.output / "clients.png", classes))
    trainer.fit(model, data, ckpt_path=checkpoint)
    if trainer.is_global_zero:
        report(trainer, model, data, classes, history, args)
        if args.demo:
            print(DEMO_TEXT)
    return trainer


def report(
    trainer: fed.FederatedTrainer,
    model: fed.TimmClassifier,
    data: fed.FederatedDataModule,
    classes: Sequence[str],
    history: RunHistory,
    args: argparse.Namespace,
) -> None:
    """Print accuracy and confusions of a finished run, and draw its pictures."""
    # Rounds without validation have no accuracy.
    accuracy = [value for value in history.curve("val_acc") if not math.isnan(value)]
    if accuracy:
        last = accuracy[-10:]
        mean = sum(last) / len(last)
        print(
            f"\naccuracy on the test list: {accuracy[-1]:.1%} at the end, {mean:.1%} in the mean of the last"
            f" {len(last)} rounds, {max(accuracy):.1%} at best; guessing gives {1 / len(classes):.1%}"
        )
        draw_comparison({args.rule: history}, args.rule, data.partition().sizes.tolist(), args.output / "weights.png")
    counts = confusion(model, data.val_dataloader(), trainer.strategy.root_device, len(classes))
    print("\n".join(["most often confused:", *most_confused(counts, classes)]))
    draw_confusion(counts, classes, args.output / "confusion.png")
    print("pictures:", *(args.output / f"{name}.png" for name in ("clients", "weights", "confusion")))


if __name__ == "__main__":
    main()
