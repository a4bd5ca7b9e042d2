"""What a client objective may see of a local step: the batch, outputs of submodules, and outputs of other models.

The outputs of the model that trains are recorded by forward hooks while ``training_step`` runs, so nothing is computed
twice and layers that draw or keep statistics are called once. For another model the outermost call that led to an
output is repeated, with the same inputs and the other model's parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_fedhaw.isolation import substituted_tensors

Model = Mapping[str, Tensor]
"""Parameters or buffers by name."""

FORWARD = "forward"
"""The name of the module's own call, ``self(...)``; every other name is that of a submodule."""


class _Call(NamedTuple):
    """One call of a submodule."""

    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any


class StepWatch:
    """Records the calls of some submodules while ``training_step`` runs, and repeats them for other models.

    Args:
        module: The user's module.
        names: The names of the submodules, or ``"forward"``.
        context: Gives the context of a training step in the trainer's precision.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Iterable[str],
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.module = module
        self.context = context
        self.batch: Any = None
        self.output: Any = None
        # The modules that contain a named one too, because one of their calls may be the outermost.
        paths: set[str] = set()
        for name in names:
            paths.update(_prefixes(name))
        self._submodules = {path: module.get_submodule(path) for path in sorted(paths)}
        self._calls: dict[str, list[_Call]] = {}

    @contextmanager
    def watching(self, batch: object) -> Iterator[None]:
        """Record calls inside the context, which is that of one ``training_step`` of a batch."""
        self.batch = batch
        self.output = None
        self._calls = {}
        handles = []
        for path, submodule in self._submodules.items():
            handles.append(submodule.register_forward_hook(self._recorder(path), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def clear(self) -> None:
        """Forget the last step, whose tensors would be kept alive."""
        self.batch = None
        self.output = None
        self._calls = {}

    def _recorder(self, path: str) -> Callable[..., None]:
        def record(submodule: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: object) -> None:
            self._calls.setdefault(path, []).append(_Call(inputs, keywords, output))

        return record

    def result(self, name: str) -> Tensor:
        """Return the output of a submodule in the step, differentiable with respect to the parameters.

        Args:
            name: The submodule's name, or ``"forward"``.

        Raises:
            ValueError: If the step did not call it once, or its output is not a tensor.
        """
        return _tensor(name, self._only_call(name).output)

    def result_at(self, name: str, parameters: Model, buffers: Model) -> Tensor:
        """Return the output of a submodule for the same batch in another model, in evaluation mode, without gradient.

        The module is left unchanged, and nothing is logged.

        Args:
            name: The submodule's name, or ``"forward"``.
            parameters: The other model's trainable parameters, by name.
            buffers: The other model's buffers and local parameters, by name; the module's own buffers for those that
                are missing.

        Raises:
            ValueError: If the call cannot be repeated because its inputs depend on the model that trains.
        """
        self._only_call(name)
        entry, call = self._outermost_call(name)
        state: dict[str, Tensor] = {}
        present = dict(self.module.named_parameters())
        for parameter_name, value in parameters.items():
            state[parameter_name] = value.detach().to(present[parameter_name].dtype)
        for buffer_name, value in buffers.items():
            # A copy: a forward pass may change a buffer in place.
            state[buffer_name] = value.detach().clone()
        outputs: list[object] = []
        with torch.no_grad(), self.context(), _unchanged(self.module), substituted_tensors(self.module, state):
            hook = self._submodules[_path(name)].register_forward_hook(lambda *call: outputs.append(call[2]))
            try:
                self._submodules[entry](*call.inputs, **call.keywords)
            finally:
                hook.remove()
        return _tensor(name, outputs[-1])

    def _only_call(self, name: str) -> _Call:
        """Return the one call of a submodule in the step.

        Raises:
            ValueError: If it was called never or several times.
        """
        calls = self._calls.get(_path(name), [])
        if len(calls) == 1:
            return calls[0]
        if calls:
            raise ValueError(
                f"a client objective reads the output of {_in_words(name)}, which `training_step` called {len(calls)}"
                " times, so it is not clear which is meant. Name a submodule that is called once."
            )
        raise ValueError(
            f"a client objective reads the output of {_in_words(name)}, which `training_step` did not call. Call it as"
            f" {_as_code(name)}, or name a submodule that is called."
        )

    def _outermost_call(self, name: str) -> tuple[str, _Call]:
        """Return the outermost recorded call that led to a submodule's output, and the path of what was called.

        Raises:
            ValueError: If its inputs depend on trained parameters, or it is not clear which call it is.
        """
        for path in _prefixes(name):
            calls = self._calls.get(path, [])
            if not calls:
                continue
            if len(calls) > 1:
                raise ValueError(
                    f"a client objective computes the output of {_in_words(name)} in another model, and"
                    f" `training_step` called {_in_words(path)} {len(calls)} times, so it is not clear for which"
                    " inputs. Call it once in a step."
                )
            inputs = tree_leaves((calls[0].inputs, calls[0].keywords))
            if any(isinstance(value, Tensor) and value.grad_fn is not None for value in inputs):
                raise ValueError(
                    f"a client objective computes the output of {_in_words(name)} in another model, and the inputs of"
                    f" {_in_words(path)} depend on trained parameters outside of it. Let `training_step` call a module"
                    " that contains all layers from the batch on, such as `self(...)` with a `forward` of them."
                )
            return path, calls[0]
        raise AssertionError("the submodule itself was called")


class StepView(NamedTuple):
    """What a client objective sees of one local step; see :meth:`ClientObjective.loss`.

    Attributes:
        batch: What ``training_step`` was given.
        output: What ``training_step`` returned.
        parameters: The local model's trainable parameters, by name.
        start: The model from which the client started the round, by name.
        start_buffers: The buffers from which the client started the round, and its local parameters, by name.
        watch: The record of the step's calls.
    """

    batch: Any
    output: Any
    parameters: Model
    start: Model
    start_buffers: Model
    watch: StepWatch

    def result(self, name: str) -> Tensor:
        """Return the output of a submodule in this step, differentiable; see :meth:`StepWatch.result`."""
        return self.watch.result(name)

    def result_at(self, name: str, parameters: Model, buffers: Model) -> Tensor:
        """Return the output of a submodule in another model, without gradient; see :meth:`StepWatch.result_at`."""
        return self.watch.result_at(name, parameters, buffers)

    def result_at_start(self, name: str) -> Tensor:
        """Return the output of a submodule in the model from which the client started, without gradient."""
        return self.watch.result_at(name, self.start, self.start_buffers)


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, ignore its calls of ``log``, and restore all of its attributes afterwards."""
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for submodule in module.modules():
        attributes = vars(submodule)
        saved.append((attributes, dict(attributes)))
        attributes["training"] = False
    # In the instance's own dictionary, where it hides the method of the class.
    vars(module)["log"] = _ignore
    try:
        yield
    finally:
        for attributes, original in saved:
            for name in attributes.keys() - original.keys():
                del attributes[name]
            attributes.update(original)


def _ignore(*arguments: object, **keywords: object) -> None:
    """Log nothing."""


def _path(name: str) -> str:
    """Return the path of a named submodule; the module itself has an empty one."""
    return "" if name == FORWARD else name


def _prefixes(name: str) -> Sequence[str]:
    """Return the paths of a submodule and of all modules that contain it, the outermost first."""
    path = _path(name)
    if not path:
        return [""]
    prefixes = [""]
    for layer in path.split("."):
        prefixes.append(f"{prefixes[-1]}.{layer}".removeprefix("."))
    return prefixes


def _in_words(name: str) -> str:
    return f"the submodule `{name}`" if _path(name) else "the module's `forward`"


def _as_code(name: str) -> str:
    return f"`self.{name}(...)`" if _path(name) else "`self(...)`"


def _tensor(name: str, output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"a client objective reads the output of {_in_words(name)}, which must be a tensor, got"
            f" {type(output).__name__}. Name a submodule that returns one."
        )
    return output
