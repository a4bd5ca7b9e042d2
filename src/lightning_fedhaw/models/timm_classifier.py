"""Image classifiers on any backbone that timm has: frozen, adapted or fine-tuned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import filter as filter_names
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_fedhaw import argument_names, arguments
from lightning_fedhaw.models import lora, weights
from lightning_fedhaw.models.messages import listed

Optimizer = Literal["adamw", "sgd"]
Batch = Any
"""Inputs and labels, as a data loader gives them: a tuple or a list of tensors."""

# timm's number for parameters that follow the last block and are counted as a part of it.
_AFTER_ALL_BLOCKS = (99999,)


class _Backbone(Protocol):
    """What every timm model, or for the last two most of them, have, which no class of timm's declares."""

    num_features: int

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute unpooled features of images ``[batch, channels, height, width]``."""

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        """Pool features and, with ``pre_logits``, stop before the last layer."""

    def no_weight_decay(self) -> set[str]:
        """Return patterns of parameter names."""

    def group_matcher(self, coarse: bool) -> object:
        """Return patterns of parameter names that divide the model into blocks, in one of timm's forms."""


class TimmClassifier(argument_names.NamedArguments, pl.LightningModule):
    """A timm backbone without its own head, and a head for ``num_classes``.

    Parameters that do not train are frozen: they have no gradient, are not sent, and their layers stay in evaluation
    mode, in which BatchNorm statistics are constant and dropout is off. The head always trains. With a backbone that is
    frozen altogether (``trainable="head"``, no adapters) a batch may hold features ``[batch, num_features]`` instead of
    images: they go straight to the head, and training on features that were computed once is the same training.

    A checkpoint of Lightning's holds all weights, frozen ones too, so :meth:`load_from_checkpoint` needs neither the
    network nor the file that the backbone came from.

    Args:
        model_name: A name of ``timm.list_models()``, with or without a tag (``"vit_base_patch16_224.augreg_in21k"``).
        num_classes: Outputs of the head.
        pretrained: Whether the backbone starts from timm's weights, which are downloaded.
        checkpoint_path: A file to start the backbone from instead: a state dict of the timm model, with or without its
            head (``.pth``, ``.safetensors``), a Lightning checkpoint of this class, or for some models ``.npz``.
        trainable: The part of the backbone that trains in addition to the head: ``"all"``; ``"head"`` for none; a
            number for the last so many blocks (a transformer's or a residual network's, with the norm that follows); or
            patterns (globs) of the backbone's parameter names, such as ``["blocks.11.*", "*norm*"]``.
        head_widths: Widths of hidden layers in the head, each followed by a ReLU; without any it is linear.
        head_dropout: Dropout before each layer of the head.
        lora_rank: Rank of low-rank adapters on the backbone's attention; 0 for none. Their base is frozen.
        lora_alpha: The adapters' scale times their rank; the rank by default, which is a scale of 1.
        lora_targets: Patterns of the names of the linear layers that are adapted.
        optimizer: ``"adamw"`` or ``"sgd"``.
        lr: Learning rate of the head.
        backbone_lr: Learning rate of the backbone; that of the head by default.
        layer_decay: The factor by which the rate falls from each layer to the one below, the head being the first.
        weight_decay: Weight decay of all parameters but biases, norms and those that timm's model exempts.
        momentum: Momentum of ``"sgd"``.
        label_smoothing: Label smoothing of the cross entropy.
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
        # Under the arguments' own names, because `save_hyperparameters` saves what these hold: plain values.
        model_name = arguments.text("model_name", model_name)
        num_classes = arguments.integer("num_classes", num_classes, minimum=2)
        pretrained = arguments.flag("pretrained", pretrained)
        if checkpoint_path is not None:
            checkpoint_path = str(checkpoint_path)
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
        _check_combination(pretrained, checkpoint_path, lora_rank, trainable)
        self.backbone = weights.create(model_name, pretrained, model_kwargs)
        self.num_features = _num_features(self.backbone)
        if checkpoint_path is not None:
            weights.load(self.backbone, checkpoint_path, model_name)
        trainable_names = self._trainable_names(trainable)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in trainable_names)
        # After the names are selected, because adapters change them.
        if lora_rank:
            if lora_alpha is None:
                lora_alpha = lora_rank
            lora.adapt(self.backbone, lora_rank, lora_alpha, lora_targets, model_name)
        self.head = _head([self.num_features, *head_widths, num_classes], head_dropout)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.train()

    # ------------------------------------------------------------------ what it computes

    def features(self, images: Tensor) -> Tensor:
        """Compute the inputs of the head.

        Args:
            images: ``[batch, channels, height, width]``.

        Returns:
            Pooled features ``[batch, num_features]``.
        """
        backbone = cast(_Backbone, self.backbone)
        return backbone.forward_head(backbone.forward_features(images), pre_logits=True)

    def classify(self, features: Tensor) -> Tensor:
        """Compute logits ``[batch, num_classes]`` of features ``[batch, num_features]``."""
        logits: Tensor = self.head(features)
        return logits

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
        """Create the transform from a PIL image to the backbone's input, by timm's data configuration of the model.

        Args:
            train: Whether it augments: random crops and flips.
            **arguments: Further arguments of ``timm.data.create_transform``, such as ``color_jitter=0.0``.
        """
        import timm.data

        # The module's functions have no types, and are not exported in the sense of type checkers.
        data: Any = timm.data
        # timm takes the model's default size unless the argument is passed on.
        size = {}
        if "img_size" in self.hparams["model_kwargs"]:
            size["img_size"] = self.hparams["model_kwargs"]["img_size"]
        settings = dict(data.resolve_model_data_config(self.backbone, size))
        settings["is_training"] = train
        settings.update(arguments)
        transform: Callable[[Any], Tensor] = data.create_transform(**settings)
        return transform

    def feature_key(self) -> str:
        """Return a name of the function that :meth:`features` computes.

        Returns:
            A hash of the model's name, its arguments and its weights.

        Raises:
            ValueError: If the backbone trains, so that features do not stay the same.
        """
        if not self.is_frozen:
            raise ValueError('Features of a backbone that trains do not stay the same: set `trainable="head"`.')
        # Without the tag, which only names weights: these are hashed themselves.
        architecture = self.hparams["model_name"].split(".")[0]
        description = json.dumps([architecture, self.hparams["model_kwargs"]], sort_keys=True, default=str)
        digest = hashlib.sha256(description.encode())
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
        """Put layers that train into training mode; frozen ones stay in evaluation mode."""
        super().train(mode)
        self.is_frozen = _freeze_mode(self.backbone)
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the cross entropy of a batch ``(images or features, labels)``, and log it as ``train_loss``."""
        loss = self._loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_acc``."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_acc``."""
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute probabilities ``[batch, num_classes]`` of a batch with or without labels."""
        inputs = batch
        if isinstance(batch, (tuple, list)):
            inputs = batch[0]
        logits: Tensor = self(inputs)
        return logits.softmax(-1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, label_smoothing=self.hparams["label_smoothing"])

    def _evaluate(self, batch: Batch, name: str, accuracy: MulticlassAccuracy) -> None:
        inputs, labels = batch
        logits = self(inputs)
        accuracy(logits, labels)
        self.log(f"{name}_loss", self._loss(logits, labels), prog_bar=True)
        self.log(f"{name}_acc", accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create the optimizer, with parameter groups for the head, the backbone and its layers."""
        settings = self.hparams
        lr = settings["lr"]
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        rates = self._learning_rates()
        exempt_patterns = self._patterns_without_weight_decay()
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            weight_decay = settings["weight_decay"]
            # Biases and norms have one dimension.
            if parameter.ndim <= 1 or any(fnmatch(name, pattern) for pattern in exempt_patterns):
                weight_decay = 0.0
            groups.setdefault((rates[name], weight_decay), []).append(parameter)
        parameter_groups = []
        for (rate, weight_decay), parameters in groups.items():
            parameter_groups.append({"params": parameters, "lr": rate, "weight_decay": weight_decay})
        if settings["optimizer"] == "sgd":
            return torch.optim.SGD(parameter_groups, lr=lr, momentum=settings["momentum"])
        return torch.optim.AdamW(parameter_groups, lr=lr)

    def _learning_rates(self) -> dict[str, float]:
        """Return the learning rate of every parameter, by name."""
        lr = self.hparams["lr"]
        backbone_lr = self.hparams["backbone_lr"]
        if backbone_lr is None:
            backbone_lr = lr
        layer_decay = self.hparams["layer_decay"]
        depths = {}
        if layer_decay is not None:
            depths = self._depths("layer_decay")
        rates = {}
        for name, _ in self.named_parameters():
            rate = backbone_lr
            if name.startswith("head."):
                rate = lr
            if layer_decay is not None:
                # The head is not among the backbone's layers: it is the first, and its rate is not decayed.
                rate *= layer_decay ** depths.get(name.removeprefix("backbone."), 0)
            rates[name] = rate
        return rates

    def _patterns_without_weight_decay(self) -> list[str]:
        """Return patterns of the names that timm's model exempts from weight decay, such as position embeddings."""
        if not hasattr(self.backbone, "no_weight_decay"):
            return []
        return [f"backbone.{name}" for name in cast(_Backbone, self.backbone).no_weight_decay()]

    def _trainable_names(self, trainable: str | int | Sequence[str]) -> set[str]:
        """Select the names of the backbone's parameters that train."""
        names = [name for name, _ in self.backbone.named_parameters()]
        if trainable == "all":
            return set(names)
        if trainable == "head":
            return set()
        if isinstance(trainable, int):
            return self._last_blocks(trainable)
        patterns = trainable
        if isinstance(trainable, str):
            patterns = [trainable]
        selected: set[str] = set()
        for pattern in patterns:
            matching = filter_names(names, pattern)
            if not matching:
                raise ValueError(
                    '`trainable` must be "all", "head", a number of blocks, or patterns of parameter names, and no'
                    f" parameter of {self.hparams['model_name']!r} matches {pattern!r}; they are called like"
                    f" {listed(names[-3:], 'and')}."
                )
            selected.update(matching)
        return selected

    def _last_blocks(self, count: int) -> set[str]:
        """Return the names of the backbone's parameters in its last blocks."""
        depths = self._depths("trainable")
        # The deepest is the stem, which is not a block.
        blocks = max(depths.values()) - 1
        if not 1 <= count <= blocks:
            raise ValueError(
                f'`trainable` must be "all", "head", patterns, or a number of blocks from 1 to {blocks} for'
                f" {self.hparams['model_name']!r}, got {count}."
            )
        return {name for name, depth in depths.items() if depth <= count}

    def _depths(self, argument: str) -> dict[str, int]:
        """Count how far below the head each of the backbone's parameters is, in timm's blocks; the last block is 1.

        Args:
            argument: The argument that needs the blocks, for the error.

        Raises:
            ValueError: If timm does not divide the model into blocks.
        """
        from timm.models import group_parameters

        if not hasattr(self.backbone, "group_matcher"):
            raise ValueError(
                f"`{argument}`: timm does not say what the blocks of {self.hparams['model_name']!r} are. Leave it out,"
                " or say what trains by patterns of parameter names."
            )
        blocks = cast(_Backbone, self.backbone).group_matcher(coarse=False)
        if isinstance(blocks, dict):
            # A parameter that matches no block, such as one of a norm after pooling, belongs to the last block.
            blocks = {**blocks, "rest": [(".", _AFTER_ALL_BLOCKS)]}
        numbers = group_parameters(self.backbone, blocks, reverse=True)
        # timm numbers the stem first; here the block next to the head is 1.
        number_of_head = max(numbers.values()) + 1
        return {name: number_of_head - number for name, number in numbers.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove other sources of weights from the arguments in a checkpoint: it holds all weights itself."""
        settings = checkpoint.get("hyper_parameters")
        if settings is not None:
            # A copy, because these may be the module's own.
            settings = dict(settings)
            settings["pretrained"] = False
            settings["checkpoint_path"] = None
            checkpoint["hyper_parameters"] = settings


def _num_features(backbone: nn.Module) -> int:
    """Return the width of the features, which is another one where a model's head has a hidden layer."""
    hidden_size: int | None = getattr(backbone, "head_hidden_size", None)
    return hidden_size or cast(_Backbone, backbone).num_features


def _head(widths: Sequence[int], dropout: float) -> nn.Sequential:
    """Create linear layers of these widths, with a ReLU between two of them and dropout before each."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        if layers:
            layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(fan_in, fan_out))
    return nn.Sequential(*layers)


def _freeze_mode(module: nn.Module) -> bool:
    """Put frozen layers into evaluation mode; return whether all of the module's parameters are frozen."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return True
    for child in module.children():
        _freeze_mode(child)
    return False


def _checked_trainable(trainable: object) -> str | int | list[str]:
    """Check the argument ``trainable``: a word or a pattern, a number of blocks, or several patterns."""
    number = arguments.plain_number(trainable)
    if isinstance(number, int):
        return number
    if isinstance(trainable, str):
        return str(trainable)
    patterns = _patterns(trainable)
    if patterns:
        return patterns
    raise arguments.invalid("trainable", '"all", "head", a number of blocks, or patterns of parameter names', trainable)


def _checked_patterns(name: str, value: object) -> list[str]:
    patterns = _patterns(value)
    if patterns is None:
        raise arguments.invalid(name, "a list of patterns of layer names", value, 'One goes in brackets: ["*.qkv"].')
    return patterns


def _patterns(patterns: object) -> list[str] | None:
    """Return patterns as a list of plain strings; ``None`` if they are something else."""
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


def _check_combination(
    pretrained: bool, checkpoint_path: str | Path | None, lora_rank: int, trainable: str | int | Sequence[str]
) -> None:
    """Refuse arguments that contradict each other.

    Raises:
        ValueError: Naming both arguments and the remedy.
    """
    if pretrained and checkpoint_path is not None:
        raise ValueError("`pretrained=True` and `checkpoint_path` both say where weights come from: give one.")
    if lora_rank and trainable == "all":
        raise ValueError(
            f'`lora_rank`={lora_rank} adapts weights that are frozen, and with `trainable="all"` none are. Set'
            ' `trainable="head"`, a number of blocks, or patterns such as "*norm*".'
        )
