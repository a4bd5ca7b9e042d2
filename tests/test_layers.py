"""Imports run downwards only."""

import ast
from pathlib import Path

import lightning_fedhaw

ROOT = Path(lightning_fedhaw.__file__).parent

# A file or folder may import rows below its own. Inside a folder, files share what the folder is made of.
ROWS = [
    {"arguments"},
    {"streams", "isolation", "ranks", "keys", "options"},
    {"vectors"},
    {"cohort", "objectives", "observer"},
    {"data", "channel", "aggregation"},
    {"server", "clients", "report"},
    {"federation"},
    {"adapter"},
    {"trainer"},
    {"models"},
    {"cli", "plotting"},
    {"__main__"},
]
EXCEPTIONS = {("aggregation", "adapter")}  # AggregationRule.setup opens the second door, and imports it lazily.


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = (
                [node.module] if node.module != "lightning_fedhaw" else [f"{node.module}.{a.name}" for a in node.names]
            )
        found |= {name.split(".")[1] for name in names if name.startswith("lightning_fedhaw.")}
    return found


def test_every_room_has_a_row_and_imports_run_downwards():
    row = {name: i for i, rooms in enumerate(ROWS) for name in rooms}
    for path in ROOT.rglob("*.py"):
        own = room(path)
        if own == "__init__":
            continue
        for other in imported_rooms(path) - {own}:
            if (own, other) in EXCEPTIONS:
                continue
            assert row[other] < row[own], f"{path.relative_to(ROOT)} imports {other}, which is not below it"


SHARED_BY_RULES = {"__init__", "base", "proxy", "servertraining"}


def test_rules_do_not_import_each_other():
    for path in (ROOT / "aggregation").glob("*.py"):
        if path.stem in SHARED_BY_RULES:
            continue
        text = path.read_text()
        others = {p.stem for p in (ROOT / "aggregation").glob("*.py")} - SHARED_BY_RULES - {path.stem}
        assert not any(f"aggregation.{other}" in text for other in others)


def test_only_the_adapters_touch_lightnings_protected_names():
    for path in ROOT.rglob("*.py"):
        if room(path) == "adapter":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning."):
                assert not any(alias.name.startswith("_") for alias in node.names), path


OPTIONAL = {"torchvision", "timm", "wandb", "matplotlib", "dp_accounting"}


def test_optional_packages_are_imported_where_they_are_used():
    for path in ROOT.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in OPTIONAL for n in names), path
