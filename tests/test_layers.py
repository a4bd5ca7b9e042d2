"""Modules in rows: imports run downwards, files import each other in no circle, and only adapter/ opens Lightning."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_fedhaw

PACKAGE = "lightning_fedhaw"
ROOT = Path(lightning_fedhaw.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Bottom up. A module (a file or a folder) may import rows below its own. Within a row and within a folder imports run
# one way. The table in docs/architecture.md is this one.
ROWS = {
    1: {
        "argument_names",
        "arguments",
        "per_client",
        "notes",
        "streams",
        "isolation",
        "ranks",
        "keys",
        "files",
        "figures",
        "user_functions",
        "starter",
    },
    2: {"options", "vectors", "cohort", "objectives", "models", "probe", "inquiry"},
    3: {"autodiff", "data", "rule"},
    4: {"module_calls", "server", "channel", "clients"},
    5: {"federation"},
    6: {"observer", "report"},
    7: {"adapter"},
    8: {"trainer", "aggregation"},
    9: {"diagnostics", "bilevel", "deploy"},
    10: {"__init__", "alias_pytorch_lightning", "extending", "plotting"},
    11: {"cli_messages", "cli_yaml", "comparing"},
    12: {"cli", "sweeping"},
    13: {"__main__"},
}
ROW_OF = {module: number for number, modules in ROWS.items() for module in modules}


def module_of(path: Path) -> str:
    """The file or folder of the table that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def file_of(name: str) -> Path | None:
    """The file of a dotted name in this package; none for what is in a file."""
    path = ROOT.joinpath(*name.split(".")[1:])
    if (path / "__init__.py").is_file():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else None


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything that is imported, wherever in the file and for whatever purpose."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(path: Path) -> set[Path]:
    """The files of this package that a file imports."""
    files = set()
    for name in imported_names(TREES[path]):
        if name.split(".")[0] == PACKAGE:
            files.add(file_of(name) or file_of(name.rpartition(".")[0]))
    assert None not in files, f"{path} imports what is not there"
    return files


TREES = {path: ast.parse(path.read_text()) for path in FILES}
GRAPH = {path: imports(path) for path in FILES}


def circle(graph) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [str(each) for each in error.args[1]]
    return []


def test_every_module_has_a_row_and_every_row_is_of_modules_that_are_there():
    assert {module_of(path) for path in FILES} == set(ROW_OF)


def test_the_table_in_the_documentation_is_the_one_that_is_enforced():
    text = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE)
    assert {int(number): set(re.findall(r"`(\w+)`", modules)) for number, modules in rows} == ROWS


def test_imports_run_downwards():
    for path, others in GRAPH.items():
        module = module_of(path)
        for other in {module_of(other) for other in others} - {module}:
            assert ROW_OF[other] <= ROW_OF[module], f"{path.relative_to(ROOT)} imports {other}, which is above it"


def test_no_files_import_each_other_in_a_circle():
    assert len(GRAPH) > 80
    assert sum(map(len, GRAPH.values())) > 300
    assert circle(GRAPH) == []


def test_no_modules_import_each_other_in_a_circle():
    modules = {module: set() for module in ROW_OF}
    for path, others in GRAPH.items():
        modules[module_of(path)] |= {module_of(other) for other in others} - {module_of(path)}
    assert circle(modules) == []


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert circle({"a": {"a"}})


SHARED_BY_RULES = {
    "__init__",
    "base",
    "factories",
    "fedopt",
    "guard",
    "hypergradient",
    "learned",
    "proxy",
    "server_steps",
    "servertraining",
    "shared_rate",
}


def test_rules_do_not_import_each_other():
    rules = {path for path in (ROOT / "aggregation").glob("*.py") if path.stem not in SHARED_BY_RULES}
    for path in rules:
        assert not GRAPH[path] & rules, path


# ---------------------------------------------------------------------- who opens Lightning

LOOPS = {"fit_loop", "epoch_loop", "val_loop", "validate_loop", "test_loop", "predict_loop"}
LIGHTNINGS = {"trainer", "loop", "host", "connector", "strategy", "cli", *LOOPS}
"""Names under which code holds objects of Lightning's."""


def last_name(node: ast.AST) -> str:
    """``c`` of ``a.b.c``."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def attributes(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int]]:
    """Every object and the name that is looked up on it, also by ``getattr`` and its like, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.value, node.attr, node.lineno
        elif isinstance(node, ast.Call) and last_name(node.func) in ("getattr", "hasattr", "setattr"):
            thing, name, *_ = node.args
            if isinstance(name, ast.Constant):
                yield thing, name.value, node.lineno


def looks_inside(tree: ast.AST) -> list[str]:
    """What in a file looks at the inside of a trainer, a loop, a strategy or a connector."""
    seen = []
    for thing, name, line in attributes(tree):
        is_protected = name.startswith("_") and not name.startswith("__") and last_name(thing) in LIGHTNINGS
        is_loop = name in LOOPS
        is_of_strategy = isinstance(thing, ast.Attribute) and thing.attr == "strategy"
        if is_protected or is_loop or is_of_strategy:
            seen.append(f"line {line}: .{last_name(thing)}.{name}")
    return seen


@pytest.mark.parametrize(
    "code",
    [
        "trainer._logger_connector",
        "self.trainer.fit_loop.options",
        "hasattr(trainer.fit_loop, 'federation')",
        "getattr(trainer, '_results', None)",
        "host.strategy.precision_plugin",
        "self.fit_loop = loop",
        "cli._get(config, 'data')",
    ],
)
def test_what_looks_inside_is_seen(code):
    assert looks_inside(ast.parse(code))


@pytest.mark.parametrize("code", ["trainer.callbacks", "self._state", "trainer.__class__", "write(self.strategy)"])
def test_what_does_not_is_left_alone(code):
    assert not looks_inside(ast.parse(code))


OUTSIDE = [path for path in FILES if module_of(path) != "adapter"]


def test_only_the_adapter_looks_inside_of_lightning():
    for path in OUTSIDE:
        tree = TREES[path]
        assert looks_inside(tree) == [], path
        for name in imported_names(tree):
            is_protected = any(part.startswith("_") for part in name.split("."))
            assert not (name.startswith("lightning.") and is_protected), f"{path} imports {name}"
    inside = [path for path in FILES if path not in OUTSIDE]
    assert any(looks_inside(TREES[path]) for path in inside)


KNOW_NO_TRAINER = ("vectors", "rule", "clients", "federation", "report")


def trainers_named(tree: ast.AST) -> list[str]:
    """Where a file imports or names the trainer's class, a loop or a strategy.

    It may ask ``isinstance``, and a callback's hook, which is given the trainer, may say so in its signature.
    """
    parts = {"Trainer", "trainer", "loops", "strategies"}
    seen = [name for name in imported_names(tree) if name.startswith("lightning.") and parts & set(name.split("."))]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and last_name(node.func) == "isinstance"]
    hooks = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("on_")]
    signatures = [argument for hook in hooks for argument in hook.args.args]
    allowed = {id(node) for part in (*calls, *signatures) for node in ast.walk(part)}
    return seen + [
        f"line {node.lineno}: Trainer"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "Trainer" and id(node) not in allowed
    ]


@pytest.mark.parametrize(
    "code",
    [
        "from lightning.pytorch import Trainer",
        "from lightning.pytorch.loops import FitLoop",
        "import lightning.pytorch.trainer.states",
        "pl.Trainer(max_epochs=1)",
        "def play(trainer: pl.Trainer): ...",
        "def on_train_start(trainer): pl.Trainer()",
    ],
)
def test_what_names_a_trainer_is_seen(code):
    assert trainers_named(ast.parse(code))
    assert not trainers_named(ast.parse("isinstance(value, (dict, pl.Trainer))"))
    assert not trainers_named(ast.parse("def on_train_start(trainer: pl.Trainer): ..."))


def test_the_round_and_what_lies_below_know_no_trainer_and_no_loop():
    for path in FILES:
        if module_of(path) in KNOW_NO_TRAINER:
            assert trainers_named(TREES[path]) == [], path


OPTIONAL = {"torchvision", "timm", "wandb", "matplotlib", "dp_accounting"}


def test_optional_packages_are_imported_where_they_are_used():
    for path in FILES:
        for node in TREES[path].body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in OPTIONAL for n in names), path
