"""What the reference shows: links in docstrings, the values of default arguments, and no internals."""

import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")
PAGES = "".join(page.read_text() for page in Path(__file__).parent.glob("*.md"))
SHOWN = {path.rpartition(".")[2]: path for path in re.findall(r"^::: ([\w.]+)$", PAGES, flags=re.MULTILINE)}

# Methods that Lightning calls, and those with which the package's own parts call each other.
INTERNAL = re.compile(
    r"on_\w+|setup\w*|teardown|\w*state_dict|parse_arguments|add_arguments_to_parser|instantiate_trainer"
    r"|\w+_dataloader|prepare_data|(training|validation|test|predict)_step|configure_\w+|state_key|register_\w+"
    r"|init_\w+_tqdm|barrier|broadcast|save_checkpoint|add_(round|validation)|merged|resolved_seed|evaluation_sets"
    r"|train_eval_dataset|tell|failing_together|agree|total|without_lost|unaccounted|count_\w+"
)
# Their hooks are what a reader fills in.
HOOKS = ("FederatedCallback", "Channel")


def linked(match: re.Match[str]) -> str:
    """Return the Markdown link of a name that a docstring marks as Sphinx does, where there is a target."""
    name = match[1].rpartition(".")[2]
    return f"[`{name}`][{SHOWN[name]}]" if name in SHOWN else f"`{match[1]}`"


class Roles(griffe.Extension):
    """Docstrings name objects and open code blocks as Sphinx does; here names become links."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(linked, obj.docstring.value).replace("::\n", ":\n")


class Reference(griffe.Extension):
    """Show what a reader may call, with the defaults that apply."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        for module in walk(pkg):
            for obj in list(module.members.values()):
                if obj.is_alias:
                    continue
                if obj.is_function:
                    show_defaults(obj)
                elif obj.is_class:
                    for name, member in obj.members.items():
                        if member.is_function and not member.is_alias:
                            show_defaults(member)
                        if not member.is_alias and is_internal(obj, name):
                            # What has no docstring is not shown.
                            member.docstring = None


def walk(module: griffe.Module) -> list[griffe.Module]:
    """Return a module and all below it."""
    modules = [module]
    for child in module.modules.values():
        if not child.is_alias:
            modules += walk(child)
    return modules


def is_internal(cls: griffe.Class, name: str) -> bool:
    """Return whether a method is for Lightning, or fills in what a base class of this package documents."""
    if cls.name in HOOKS and name.startswith("on_"):
        return False
    if name != "__init__" and INTERNAL.fullmatch(name):
        return True
    return any(name in base.members for base in bases(cls))


def bases(cls: griffe.Class) -> list[griffe.Class]:
    """Return the base classes that are in this package, in any depth."""
    found = []
    for base in cls.resolved_bases:
        kind = base.final_target if base.is_alias else base
        found.append(kind)
        found += bases(kind)
    return found


def show_defaults(function: griffe.Function) -> None:
    """Replace the name of a constant by its value, where it is the default of an argument."""
    for parameter in function.parameters:
        name = str(parameter.default)
        if not re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name):
            continue
        constant = function.module.members.get(name)
        if constant is not None and constant.is_alias:
            constant = constant.final_target
        value = getattr(constant, "value", None)
        if value is not None:
            parameter.default = value
