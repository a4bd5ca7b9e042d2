"""Image classifiers on any backbone that timm has: frozen, adapted or fine-tuned."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torchmetrics.classification import MulticlassAccuracy

from lightning_fedhaw import arguments

Optimizer = Literal["adamw", "sgd"]


class TimmClassifier(pl.LightningModule):
    """A timm backbone without its own head, and a head for ``num_classes``.

    What does not train is frozen: it has no gradient, does not travel, and stays in evaluation mode, so that BatchNorm
    statistics stand still and dropout is off in it. The head always trains. With a backbone that is frozen altogether
    (``trainable="head"``, no adapters) a batch may hold features ``[batch, num_features]`` in the place of images: they
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
        self.backbone = _create(model_name, pretrained, model_kwargs)
        made: Any = self.backbone
        self.num_features: int = getattr(made, "head_hidden_size", None) or made.num_features
        if checkpoint_path is not None:
            _load(self.backbone, checkpoint_path, model_name)
        chosen = self._chosen(trainable)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in chosen)
        if lora_rank:
            _adapt(self.backbone, lora_rank, lora_rank if lora_alpha is None else lora_alpha, lora_targets, model_name)
        widths = [self.num_features, *head_widths, num_classes]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.ReLU()] if layers else []
            layers += [nn.Dropout(head_dropout)] if head_dropout else []
            layers.append(nn.Linear(fan_in, fan_out))
        self.head = nn.Sequential(*layers)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.train()

    # ------------------------------------------------------------------ what it computes

    def features(self, images: Tensor) -> Tensor:
        """What the head sees.

        Args:
            images: ``[batch, channels, height, width]``.

        Returns:
            Pooled features ``[batch, num_features]``.
        """
        backbone = cast(Any, self.backbone)
        return cast(Tensor, backbone.forward_head(backbone.forward_features(images), pre_logits=True))

    def classify(self, features: Tensor) -> Tensor:
        """Logits ``[batch, num_classes]`` of features ``[batch, num_features]``."""
        return cast(Tensor, self.head(features))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[batch, num_classes]`` of images, or of features ``[batch, num_features]`` of a frozen backbone."""
        if inputs.ndim > 2:
            inputs = self.features(inputs)
        elif not self.is_frozen:
            raise ValueError(
                f"A batch of the shape {list(inputs.shape)} holds features, and features of a backbone that trains do"
                ' not stay the same. Give images, or set `trainable="head"`.'
            )
        return self.classify(inputs)

    def transform(self, train: bool, **arguments: Any) -> Callable[[Any], Tensor]:
        """The transform from a PIL image to the backbone's input, by timm's data configuration of the model.

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
        """A name for what :meth:`features` computes: a hash of the model's name, its arguments and its weights.

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
        for name, layer in list(self.backbone.named_modules()):
            if isinstance(layer, LoRALinear):
                _put(self.backbone, name, layer.merged())
        self.hparams["lora_rank"] = 0
        return self.train(self.training)

    # ------------------------------------------------------------------ how it trains

    def train(self, mode: bool = True) -> TimmClassifier:
        """Training mode for what trains; what is frozen stays in evaluation mode."""
        super().train(mode)
        self.is_frozen = _still(self.backbone)
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy of a batch ``(images or features, labels)``."""
        loss = self._loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``val_loss`` and ``val_acc``."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``test_loss`` and ``test_acc``."""
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities ``[batch, num_classes]``, of a batch with or without labels."""
        return cast(Tensor, self(batch[0] if isinstance(batch, (tuple, list)) else batch)).softmax(-1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, label_smoothing=self.hparams["label_smoothing"])

    def _evaluate(self, batch: Any, name: str, accuracy: MulticlassAccuracy) -> None:
        inputs, labels = batch
        logits = self(inputs)
        accuracy(logits, labels)
        self.log(f"{name}_loss", self._loss(logits, labels), prog_bar=True)
        self.log(f"{name}_acc", accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser, with groups for the head, the backbone and its layers."""
        own = self.hparams
        rate = own["lr"] if own["backbone_lr"] is None else own["backbone_lr"]
        depth_of = None if own["layer_decay"] is None else self._depths("layer_decay")
        exempt = [f"backbone.{name}" for name in getattr(self.backbone, "no_weight_decay", set)()]
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            lr = own["lr"] if name.startswith("head.") else rate
            if depth_of is not None:
                lr *= own["layer_decay"] ** depth_of.get(name.removeprefix("backbone."), 0)
            decays = parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in exempt)
            groups.setdefault((lr, own["weight_decay"] if decays else 0.0), []).append(parameter)
        given = [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]
        if own["optimizer"] == "sgd":
            return torch.optim.SGD(given, lr=own["lr"], momentum=own["momentum"])
        return torch.optim.AdamW(given, lr=own["lr"])

    def _chosen(self, trainable: str | int | Sequence[str]) -> set[str]:
        """The names of the backbone's parameters that train."""
        names = [name for name, _ in self.backbone.named_parameters()]
        model_name = self.hparams["model_name"]
        if trainable in ("all", "head"):
            return set(names) if trainable == "all" else set()
        if isinstance(trainable, int):
            depth_of = self._depths("trainable")
            blocks = max(depth_of.values()) - 1  # the deepest is the stem
            if not 1 <= trainable <= blocks:
                raise ValueError(
                    f'`trainable` must be "all", "head", patterns, or a number of blocks from 1 to {blocks} for'
                    f" {model_name!r}, got {trainable}."
                )
            return {name for name, depth in depth_of.items() if depth <= trainable}
        chosen: set[str] = set()
        for pattern in [trainable] if isinstance(trainable, str) else trainable:
            matching = {name for name in names if fnmatch(name, pattern)}
            if not matching:
                raise ValueError(
                    '`trainable` must be "all", "head", a number of blocks, or patterns of parameter names, and no'
                    f" parameter of {model_name!r} matches {pattern!r}; they are called like"
                    f" {_listed(names[-3:], 'and')}."
                )
            chosen |= matching
        return chosen

    def _depths(self, argument: str) -> dict[str, int]:
        """How far below the head each of the backbone's parameters is, in timm's blocks; the last block is 1."""
        from timm.models import group_parameters

        if not hasattr(self.backbone, "group_matcher"):
            raise ValueError(
                f"`{argument}`: timm does not say what the blocks of {self.hparams['model_name']!r} are. Leave it out,"
                " or say what trains by patterns of parameter names."
            )
        blocks = cast(Any, self.backbone).group_matcher(coarse=False)
        if isinstance(blocks, dict):  # What has no place, as a norm after pooling, goes with the last block.
            blocks = {**blocks, "rest": [(".", (99999,))]}
        number_of = group_parameters(self.backbone, blocks, reverse=True)
        return {name: max(number_of.values()) + 1 - number for name, number in number_of.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint holds all weights, so the arguments in it name no other source of weights."""
        arguments = checkpoint.get("hyper_parameters")
        if arguments is not None:
            checkpoint["hyper_parameters"] = {**arguments, "pretrained": False, "checkpoint_path": None}


class LoRALinear(nn.Linear):
    """A linear layer whose weights stay, beside a trainable change of low rank.

    ``y = W x + b + (alpha / rank) B A x`` with ``A [rank, in]`` drawn as a linear layer's weights are and ``B [out,
    rank]`` zero, so that at first nothing changes (E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language
    Models", arXiv 2106.09685, equation 3). The layer's own parameters keep their names.

    Args:
        base: The layer; its parameters are shared, and frozen.
        rank: Rank of the change.
        alpha: Scale of the change, times the rank.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return super().forward(input) + self.scale * linear(linear(input, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that computes the same."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.weight + self.scale * self.lora_b @ self.lora_a, requires_grad=False)
        plain.bias = self.bias
        return plain


def _still(module: nn.Module) -> bool:
    """Put what is frozen into evaluation mode; true if it is all that the module has."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return True
    for child in module.children():
        _still(child)
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


def _create(model_name: str, pretrained: bool, model_kwargs: Mapping[str, Any]) -> nn.Module:
    """A model of timm's without its head."""
    import timm

    remote = model_name.startswith("hf-hub:")
    if ":" not in model_name:
        architecture, _, tag = model_name.partition(".")
        if not timm.is_model(architecture):
            near = get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.0)
            raise ValueError(
                f"`model_name`: timm {timm.__version__} has no model {architecture!r}. Did you mean"
                f" {_listed(near, 'or')}?"
            )
        tags = timm.list_models(f"{architecture}.*", include_tags=True)
        if pretrained and not timm.models.is_model_pretrained(architecture):
            raise ValueError(
                f"timm has no pretrained weights of {architecture!r}. Set `pretrained=False`, or give a file of your"
                " own as `checkpoint_path`."
            )
        if tag and model_name not in tags:
            raise ValueError(
                f"`model_name`: timm has no weights {tag!r} of {architecture!r}; it has {_listed(tags, 'and')}."
            )
        remote = pretrained
    try:
        return timm.create_model(model_name, pretrained=pretrained, num_classes=0, **model_kwargs)
    except Exception as error:
        if not remote or isinstance(error, (TypeError, RuntimeError)):
            raise
        raise ConnectionError(
            f"The pretrained weights of {model_name!r} could not be downloaded ({type(error).__name__}). Without a"
            " network, fetch the file elsewhere and give it as `checkpoint_path`, or start from random weights with"
            " `pretrained=False`."
        ) from error


def _load(backbone: nn.Module, path: str, model_name: str) -> None:
    """Give a backbone the weights of a file, whose own head is left out."""
    from timm.models import load_checkpoint, load_state_dict

    if not Path(path).is_file():
        raise ValueError(f"`checkpoint_path`: there is no file {path!r}.")
    if path.endswith((".npz", ".npy")):
        load_checkpoint(backbone, path)
        return
    try:
        found = load_state_dict(path, weights_only=True)
    except Exception as error:  # what is raised depends on the byte at which the reader stumbles
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"`checkpoint_path`={path!r} could not be read as a state dict of tensors: {why.rstrip('.')}. Save or fetch"
            " it again, whole."
        ) from error
    if any(name.endswith(".lora_a") for name in found):
        raise ValueError(
            f"`checkpoint_path`={path!r} has adapters beside the weights. Fold them in first:"
            f" `TimmClassifier.load_from_checkpoint({path!r}).merge()`, and save its `backbone.state_dict()`."
        )
    if any(name.startswith("backbone.") for name in found):
        found = {n.removeprefix("backbone."): v for n, v in found.items() if n.startswith("backbone.")}
    heads = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    heads = [heads] if isinstance(heads, str) else heads
    found = {n: v for n, v in found.items() if n.rpartition(".")[0] not in heads}
    if _misfit(backbone, found):
        # timm's own conversion: older names, position embeddings of other image sizes.
        convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
        found = convert(found, backbone) if convert is not None else found
    if misfit := _misfit(backbone, found):
        raise ValueError(
            f"`checkpoint_path`={path!r} does not fit {model_name!r}: {misfit}. Give a checkpoint of this model, or the"
            " arguments that it was made with as `model_kwargs`."
        )
    backbone.load_state_dict(found)


def _misfit(backbone: nn.Module, found: Mapping[str, Any]) -> str:
    """Which names of a state dict are not those of a model; an empty string if all fit."""
    own = backbone.state_dict()
    wrong = {
        "missing": [name for name in own if name not in found],
        "unexpected": [name for name in found if name not in own],
        "of another shape": [
            f"{n} {list(getattr(found[n], 'shape', '?'))} instead of {list(own[n].shape)}"
            for n in own
            if n in found and getattr(found[n], "shape", None) != own[n].shape
        ],
    }
    return "; ".join(f"{what}: {_listed(names, 'and')}" for what, names in wrong.items() if names)


def _adapt(backbone: nn.Module, rank: int, alpha: float, targets: Sequence[str], model_name: str) -> None:
    """Put adapters on the linear layers whose names match."""
    layers = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatch(name, target) for target in targets)
    }
    if not layers:
        linears = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
        has = f"its linear layers are called like {_listed(linears[-3:], 'and')}" if linears else "it has none"
        raise ValueError(
            f"`lora_rank`={rank}: no linear layer of {model_name!r} matches `lora_targets`={list(targets)}; {has}."
            " Take a transformer, or name other layers."
        )
    for name, layer in layers.items():
        owner = backbone.get_submodule(name.rpartition(".")[0])
        if name.endswith("qkv") and getattr(owner, "q_bias", None) is not None:
            raise ValueError(
                f"`lora_rank`={rank}: {model_name!r} uses the weights of {name!r} without calling the layer, so an"
                ' adapter would have no effect. Name other layers, such as `lora_targets=["*attn.proj"]`.'
            )
        _put(backbone, name, LoRALinear(layer, rank, alpha))


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(owner), leaf, module)


def _listed(names: Iterable[str], last: Literal["and", "or"]) -> str:
    """The first few names in a sentence."""
    names = list(names)
    shown = [repr(name) for name in names[:5]]
    if len(names) > 5:
        return f"{', '.join(shown)} {last} {len(names) - 5} more"
    return f" {last} ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
