"""A timm model without its head, and weights for it from timm or from a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from lightning_fedhaw.models.messages import listed

State = Mapping[str, Any]
"""A state dict that was read from a file, whose values need not be tensors."""


def create(model_name: str, pretrained: bool, model_kwargs: Mapping[str, Any]) -> nn.Module:
    """Create a model of timm's without its head.

    Args:
        model_name: A name of ``timm.list_models()``, with or without a tag, or one with a source (``hf-hub:...``).
        pretrained: Whether it starts from timm's weights, which are downloaded.
        model_kwargs: Further arguments of the model.

    Raises:
        ValueError: If there is no such model or tag, or no pretrained weights.
        ConnectionError: If something cannot be downloaded.
    """
    import timm

    is_remote = model_name.startswith("hf-hub:")
    if ":" not in model_name:
        _check_name(model_name, pretrained)
        is_remote = pretrained
    try:
        return timm.create_model(model_name, pretrained=pretrained, num_classes=0, **model_kwargs)
    except Exception as error:
        # A download may fail in any way, by errors of several packages. Where arguments of the model are wrong timm
        # raises one of these two, whose message says which.
        if not is_remote or isinstance(error, (TypeError, RuntimeError)):
            raise
        raise ConnectionError(
            f"The pretrained weights of {model_name!r} could not be downloaded ({type(error).__name__}). Without a"
            " network, fetch the file elsewhere and give it as `checkpoint_path`, or start from random weights with"
            " `pretrained=False`."
        ) from error


def _check_name(model_name: str, pretrained: bool) -> None:
    """Refuse a name that timm does not know, or has no weights for, naming the nearest."""
    import timm

    architecture, _, tag = model_name.partition(".")
    if not timm.is_model(architecture):
        nearest = get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.0)
        raise ValueError(
            f"`model_name`: timm {timm.__version__} has no model {architecture!r}. Did you mean"
            f" {listed(nearest, 'or')}?"
        )
    if pretrained and not timm.models.is_model_pretrained(architecture):
        raise ValueError(
            f"timm has no pretrained weights of {architecture!r}. Set `pretrained=False`, or give a file of your"
            " own as `checkpoint_path`."
        )
    tags = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and model_name not in tags:
        raise ValueError(
            f"`model_name`: timm has no weights {tag!r} of {architecture!r}; it has {listed(tags, 'and')}."
        )


def load(backbone: nn.Module, path: str, model_name: str) -> None:
    """Load the weights of a file into a backbone; those of a head are left out.

    Args:
        backbone: The model; changed in place.
        path: The file: a state dict of the timm model, a Lightning checkpoint, or for some models ``.npz``.
        model_name: The name of the model, for errors.

    Raises:
        ValueError: If there is no such file, or it cannot be read, or does not fit.
    """
    from timm.models import load_checkpoint

    if not Path(path).is_file():
        raise ValueError(f"`checkpoint_path`: there is no file {path!r}.")
    if path.endswith((".npz", ".npy")):
        with _reading(path, "as weights of this model"):
            load_checkpoint(backbone, path)
        return
    state = _without_head(_of_backbone(_read(path)), backbone)
    if _misfit(backbone, state):
        # timm's own conversion: older names, position embeddings of other image sizes.
        convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            state = convert(state, backbone)
    misfit = _misfit(backbone, state)
    if misfit:
        raise ValueError(
            f"`checkpoint_path`={path!r} does not fit {model_name!r}: {misfit}. Give a checkpoint of this model, or the"
            " arguments that it was made with as `model_kwargs`."
        )
    backbone.load_state_dict(state)


def _read(path: str) -> State:
    """Read a state dict that holds no adapters.

    Raises:
        ValueError: If it cannot be read, or holds adapters.
    """
    from timm.models import load_state_dict

    with _reading(path, "as a state dict of tensors"):
        state: State = load_state_dict(path, weights_only=True)
    if any(name.endswith(".lora_a") for name in state):
        raise ValueError(
            f"`checkpoint_path`={path!r} has adapters in addition to the weights. Fold them in first:"
            f" `TimmClassifier.load_from_checkpoint({path!r}).merge()`, and save its `backbone.state_dict()`."
        )
    return state


@contextmanager
def _reading(path: str, kind: str) -> Iterator[None]:
    """Turn any error of a reader into one that names the file.

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        yield
    except Exception as error:
        # Which error numpy, torch or timm raises depends on the byte at which reading fails.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"`checkpoint_path`={path!r} could not be read {kind}: {reason.rstrip('.')}. Save or fetch it again, whole."
        ) from error


def _of_backbone(state: State) -> State:
    """Return the backbone's entries of a checkpoint of the whole module; any other state dict as it is."""
    prefix = "backbone."
    entries = {}
    for name, value in state.items():
        if name.startswith(prefix):
            entries[name.removeprefix(prefix)] = value
    return entries or state


def _without_head(state: State, backbone: nn.Module) -> State:
    """Leave out the parameters of the head, by the names that timm has for it."""
    heads = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    if isinstance(heads, str):
        heads = [heads]
    entries = {}
    for name, value in state.items():
        layer = name.rpartition(".")[0]
        if layer not in heads:
            entries[name] = value
    return entries


def _misfit(backbone: nn.Module, state: State) -> str:
    """List which entries of a state dict do not fit a model; return an empty string if all fit."""
    expected = backbone.state_dict()
    differences: dict[str, list[str]] = {"missing": [], "unexpected": [], "of another shape": []}
    for name, tensor in expected.items():
        if name not in state:
            differences["missing"].append(name)
            continue
        # A damaged file may hold something else under the name.
        shape = getattr(state[name], "shape", "?")
        if shape != tensor.shape:
            differences["of another shape"].append(f"{name} {list(shape)} instead of {list(tensor.shape)}")
    for name in state:
        if name not in expected:
            differences["unexpected"].append(name)
    phrases = []
    for label, names in differences.items():
        if names:
            phrases.append(f"{label}: {listed(names, 'and')}")
    return "; ".join(phrases)
