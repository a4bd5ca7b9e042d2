"""Image classifiers on any backbone that timm has: frozen, adapted or fine-tuned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_fedhaw import arguments
from lightning_fedhaw.models import lora, weights
from lightning_fedhaw.models.messages import listed

Optimizer = Literal["adamw", "sgd"]


class TimmClassifier(pl.LightningModule):
    """A timm backbone without its own head, and a head for ``num_classes``.

    What does not train is frozen: it has no gradient, does not travel, and stays in evaluation mode, so that BatchNorm
    statistics stand still and dropout is off in it. The head always trains. With a backbone that is frozen altogether
    (``trainable="head"``, no adapters) a batch may hold features ``[batch, num_features]`` instead of images: they
    go straight to the head, and training on features that were computed once is the same training.

    A checkpoint of Lightning's holds all weights, frozen ones too, so :meth:`load_from_checkpoint` needs neither the
    network nor the file that the backbone came from.

    Args:
        model_name: A name of ``timm.list_models()``, with or without a tag (``"vit_base_patch16_224.augreg_in21k"``).
        num_classes: Outputs of the head.
        pretrained: Whether the backbone starts from timm's weights, which are downloaded.
        checkpoint_path: A file to start the backbone from instead: a state dict of the timm model, with or without its
            head (``.pth``, ``.safetensors``), a Lightning checkpoint of this class, or for some models ``.npz``.
        trainable: What trains beside the head: ``"all"``; ``"head"`` for nothing else; a number for the last so many
            blocks (a transformer's or a residual network's, with the norm that follows); or patterns (globs) of the
            backbone's parameter names, such as ``["blocks.11.*", "*norm*"]``.
        head_widths: Widths of hidden layers in the head, each followed by a ReLU; without any it is linear.
        head_dropout: Dropout before each layer of the head.
        lora_rank: Rank of low-rank adapters on the backbone's attention; 0 for none. Their base is frozen.
        lora_alpha: The adapters' scale times their rank; the rank by default, which is a scale of 1.
        lora_targets: Patterns of the names of the linear layers that are adapted.
        optimizer: ``"adamw"`` or ``"sgd"``.
        lr: Learning rate of the head.
        backbone_lr: Learning rate of the backbone; that of the head by default.
        layer_decay: The factor by which the rate falls from each layer to the one below, the head being the first.
        weight_decay: For all but biases, norms and what timm's model exempts.
        momentum: Of ``"sgd"``.
        label_smoothing: Of the cross entropy.
        model_kwargs: Further arguments of the timm model, such as ``{"img_size": 32, "drop_path_rate": 0.1}``.

    Raises:
        ValueError: If there is no such model or tag, no pretrained weights, a checkpoint that does not fit, patterns or
            a depth that match nothing, or adapters without a layer to adapt.
        ConnectionError: If pretrained weights cannot be downloaded.

    Attributes:
        backbone: The timm model.
        head: The head.
        num_features: Width of the features.
        is_frozen: Whether nothing in the backbone trains, so that an image's features are always the same.

    Example:
        >>> module = TimmClassifier("test_vit", 10, trainable="head", model_kwargs={"img_size": 32})
        >>> module(torch.zeros(2, 3, 32, 32)).shape, module.features(torch.zeros(2, 3, 32, 32)).shape
        (torch.Size([2, 10]), torch.Size([2, 64]))
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        *,
        pretrained: bool = False,
        checkpoint_path: str | Path | None = None,
        trainable: Literal["all", "head"] | int | str | Sequence[str] = "all",
        head_widths: Sequence[int] = (),
        head_dropout: float = 0.0,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] = ("*attn.qkv", "*attn.proj"),
        optimizer: Optimizer = "adamw",
        lr: float = 1e-3,
        backbone_lr: float | None = None,
        layer_decay: float | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        label_smoothing: float = 0.0,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # What is saved as hyperparameters is what the local names hold when they are saved: plain values.
        model_name = arguments.text("model_name", model_name)
        num_classes = arguments.integer("num_classes", num_classes, minimum=2)
        pretrained = arguments.flag("pretrained", pretrained)
        checkpoint_path = None if checkpoint_path is None else str(checkpoint_path)
        trainable = _checked_trainable(trainable)
        head_widths = _checked_widths(head_widths)
        head_dropout = arguments.probability("head_dropout", head_dropout)
        lora_rank = arguments.integer("lora_rank", lora_rank, minimum=0)
        lora_alpha = arguments.optional(
            arguments.number, "lora_alpha", lora_alpha, above=0, hint="None is the rank, which is a scale of 1."
        )
        lora_targets = _checked_patterns("lora_targets", lora_targets)
        optimizer = arguments.choice("optimizer", optimizer, Optimizer)
        lr = arguments.number("lr", lr, minimum=0)
        backbone_lr = arguments.optional(arguments.number, "backbone_lr", backbone_lr, minimum=0)
        layer_decay = arguments.optional(arguments.number, "layer_decay", layer_decay, above=0, maximum=1)
        weight_decay = arguments.number("weight_decay", weight_decay, minimum=0)
        momentum = arguments.probability("momentum", momentum)
        label_smoothing = arguments.probability("label_smoothing", label_smoothing)
        model_kwargs = _checked_kwargs(model_kwargs)
        self.save_hyperparameters()
        if pretrained and checkpoint_path is not None:
            raise ValueError("`pretrained=True` and `checkpoint_path` both say where weights come from: give one.")
        if lora_rank and trainable == "all":
            raise ValueError(
                f'`lora_rank`={lora_rank} adapts weights that are frozen, and with `trainable="all"` none are. Set'
                ' `trainable="head"`, a number of blocks, or patterns such as "*norm*".'
            )
        self.backbone = weights.create(model_name, pretrained, model_kwargs)
        self.num_features = _num_features(self.backbone)
        if checkpoint_path is not None:
            weights.load(self.backbone, checkpoint_path, model_name)
        chosen = self._chosen(trainable)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in chosen)
        if lora_rank:
            alpha = lora_rank if lora_alpha is None else lora_alpha
            lora.adapt(self.backbone, lora_rank, alpha, lora_targets, model_name)
        self.head = _head([self.num_features, *head_widths, num_classes], head_dropout)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.train()

    # ------------------------------------------------------------------ what it computes

    def features(self, images: Tensor) -> Tensor:
        """Compute what the head sees.

        Args:
            images: ``[batch, channels, height, width]``.

        Returns:
            Pooled features ``[batch, num_features]``.
        """
        backbone = cast(Any, self.backbone)
        return cast(Tensor, backbone.forward_head(backbone.forward_features(images), pre_logits=True))

    def classify(self, features: Tensor) -> Tensor:
        """Compute logits ``[batch, num_classes]`` of features ``[batch, num_features]``."""
        return cast(Tensor, self.head(features))

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute logits ``[batch, num_classes]`` of images, or, with a frozen backbone, of features."""
        if inputs.ndim > 2:
            inputs = self.features(inputs)
        elif not self.is_frozen:
            raise ValueError(
                f"A batch of the shape {list(inputs.shape)} holds features, and features of a backbone that trains do"
                ' not stay the same. Give images, or set `trainable="head"`.'
            )
        return self.classify(inputs)

    def transform(self, train: bool, **arguments: Any) -> Callable[[Any], Tensor]:
        """Make the transform from a PIL image to the backbone's input, by timm's data configuration of the model.

        Args:
            train: Whether it augments: random crops and flips.
            **arguments: Further arguments of ``timm.data.create_transform``, such as ``color_jitter=0.0``.
        """
        import timm.data

        data: Any = timm.data
        size = {name: value for name, value in self.hparams["model_kwargs"].items() if name == "img_size"}
        config = data.resolve_model_data_config(self.backbone, size)
        transform: Callable[[Any], Tensor] = data.create_transform(**{**config, "is_training": train, **arguments})
        return transform

    def feature_key(self) -> str:
        """Name what :meth:`features` computes: a hash of the model's name, its arguments and its weights.

        Raises:
            ValueError: If the backbone trains, so that features do not stay the same.
        """
        if not self.is_frozen:
            raise ValueError('Features of a backbone that trains do not stay the same: set `trainable="head"`.')
        made_of = [self.hparams["model_name"].split(".")[0], self.hparams["model_kwargs"]]
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode())
        for name, tensor in self.backbone.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def merge(self) -> TimmClassifier:
        """Fold the adapters into the weights that they adapt, for use without them.

        Returns:
            The module itself, whose backbone is now a plain one.
        """
        lora.merge(self.backbone)
        self.hparams["lora_rank"] = 0
        return self.train(self.training)

    # ------------------------------------------------------------------ how it trains

    def train(self, mode: bool = True) -> TimmClassifier:
        """Put what trains into training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        self.is_frozen = _freeze_mode(self.backbone)
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the cross entropy of a batch ``(images or features, labels)``, and log it as ``train_loss``."""
        loss = self._loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_acc``."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_acc``."""
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute probabilities ``[batch, num_classes]`` of a batch with or without labels."""
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        return cast(Tensor, self(inputs)).softmax(-1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, label_smoothing=self.hparams["label_smoothing"])

    def _evaluate(self, batch: Any, name: str, accuracy: MulticlassAccuracy) -> None:
        inputs, labels = batch
        logits = self(inputs)
        accuracy(logits, labels)
        self.log(f"{name}_loss", self._loss(logits, labels), prog_bar=True)
        self.log(f"{name}_acc", accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer, with parameter groups for the head, the backbone and its layers."""
        arguments = self.hparams
        lr = arguments["lr"]
        backbone_lr = lr if arguments["backbone_lr"] is None else arguments["backbone_lr"]
        layer_decay = arguments["layer_decay"]
        depth_of = {} if layer_decay is None else self._depths("layer_decay")
        exempt = [f"backbone.{name}" for name in getattr(self.backbone, "no_weight_decay", set)()]
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            rate = lr if name.startswith("head.") else backbone_lr
            if layer_decay is not None:
                # The head is not among the backbone's layers: it is the first, and its rate is not decayed.
                rate *= layer_decay ** depth_of.get(name.removeprefix("backbone."), 0)
            decays = parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in exempt)
            weight_decay = arguments["weight_decay"] if decays else 0.0
            groups.setdefault((rate, weight_decay), []).append(parameter)
        parameter_groups = []
        for (rate, weight_decay), parameters in groups.items():
            parameter_groups.append({"params": parameters, "lr": rate, "weight_decay": weight_decay})
        if arguments["optimizer"] == "sgd":
            return torch.optim.SGD(parameter_groups, lr=lr, momentum=arguments["momentum"])
        return torch.optim.AdamW(parameter_groups, lr=lr)

    def _chosen(self, trainable: str | int | Sequence[str]) -> set[str]:
        """Choose the names of the backbone's parameters that train."""
        names = [name for name, _ in self.backbone.named_parameters()]
        if trainable == "all":
            return set(names)
        if trainable == "head":
            return set()
        if isinstance(trainable, int):
            return self._last_blocks(trainable)
        chosen: set[str] = set()
        for pattern in [trainable] if isinstance(trainable, str) else trainable:
            matching = {name for name in names if fnmatch(name, pattern)}
            if not matching:
                raise ValueError(
                    '`trainable` must be "all", "head", a number of blocks, or patterns of parameter names, and no'
                    f" parameter of {self.hparams['model_name']!r} matches {pattern!r}; they are called like"
                    f" {listed(names[-3:], 'and')}."
                )
            chosen |= matching
        return chosen

    def _last_blocks(self, count: int) -> set[str]:
        """Return the names of the backbone's parameters in its last blocks."""
        depth_of = self._depths("trainable")
        # The deepest is the stem, which is not a block.
        blocks = max(depth_of.values()) - 1
        if not 1 <= count <= blocks:
            raise ValueError(
                f'`trainable` must be "all", "head", patterns, or a number of blocks from 1 to {blocks} for'
                f" {self.hparams['model_name']!r}, got {count}."
            )
        return {name for name, depth in depth_of.items() if depth <= count}

    def _depths(self, argument: str) -> dict[str, int]:
        """Count how far below the head each of the backbone's parameters is, in timm's blocks; the last block is 1."""
        from timm.models import group_parameters

        if not hasattr(self.backbone, "group_matcher"):
            raise ValueError(
                f"`{argument}`: timm does not say what the blocks of {self.hparams['model_name']!r} are. Leave it out,"
                " or say what trains by patterns of parameter names."
            )
        blocks = cast(Any, self.backbone).group_matcher(coarse=False)
        if isinstance(blocks, dict):
            # What has no place, as a norm after pooling, goes with the last block.
            blocks = {**blocks, "rest": [(".", (99999,))]}
        number_of = group_parameters(self.backbone, blocks, reverse=True)
        last = max(number_of.values())
        return {name: last + 1 - number for name, number in number_of.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the arguments in a checkpoint name no other source of weights: it holds all of them."""
        arguments = checkpoint.get("hyper_parameters")
        if arguments is not None:
            checkpoint["hyper_parameters"] = {**arguments, "pretrained": False, "checkpoint_path": None}


def _num_features(backbone: nn.Module) -> int:
    """Return the width of the features: of some models, what their head makes of them before its last layer."""
    model: Any = backbone
    width: int = getattr(model, "head_hidden_size", None) or model.num_features
    return width


def _head(widths: Sequence[int], dropout: float) -> nn.Sequential:
    """Make linear layers of these widths, with a ReLU between two of them and dropout before each."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        if layers:
            layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(fan_in, fan_out))
    return nn.Sequential(*layers)


def _freeze_mode(module: nn.Module) -> bool:
    """Put what is frozen into evaluation mode; true if it is all that the module has."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return True
    for child in module.children():
        _freeze_mode(child)
    return False


def _checked_trainable(trainable: object) -> str | int | list[str]:
    """Check what says what trains: a word or pattern, a number of blocks, or several patterns."""
    number = arguments.plain_number(trainable)
    if isinstance(number, int):
        return number
    if isinstance(trainable, str):
        return str(trainable)
    patterns = _patterns(trainable)
    if patterns:
        return patterns
    raise arguments.invalid("trainable", '"all", "head", a number of blocks, or patterns of parameter names', trainable)


def _checked_patterns(name: str, patterns: object) -> list[str]:
    found = _patterns(patterns)
    if found is None:
        raise arguments.invalid(name, "a list of patterns of layer names", patterns, 'One goes in brackets: ["*.qkv"].')
    return found


def _patterns(patterns: object) -> list[str] | None:
    """A list of plain strings; ``None`` if it is none."""
    if not isinstance(patterns, Sequence) or isinstance(patterns, str):
        return None
    if not all(isinstance(pattern, str) for pattern in patterns):
        return None
    return [str(pattern) for pattern in patterns]


def _checked_widths(widths: object) -> list[int]:
    if not isinstance(widths, Iterable) or isinstance(widths, str):
        raise arguments.invalid("head_widths", "a list of whole numbers", widths, "One goes in brackets: [256].")
    return [arguments.integer("head_widths", width, minimum=1) for width in widths]


def _checked_kwargs(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    if model_kwargs is None:
        return {}
    if not isinstance(model_kwargs, Mapping):
        raise arguments.invalid("model_kwargs", "a dictionary of arguments of the timm model", model_kwargs)
    return dict(model_kwargs)
