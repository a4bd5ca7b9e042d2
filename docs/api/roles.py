"""Docstrings name objects and open code blocks as Sphinx does; here names become links, where there is a target."""

import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")
PAGES = "".join(page.read_text() for page in Path(__file__).parent.glob("*.md"))
SHOWN = {path.rpartition(".")[2]: path for path in re.findall(r"^::: ([\w.]+)$", PAGES, flags=re.MULTILINE)}


def linked(match: re.Match[str]) -> str:
    name = match[1].rpartition(".")[2]
    return f"[`{name}`][{SHOWN[name]}]" if name in SHOWN else f"`{match[1]}`"


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(linked, obj.docstring.value).replace("::\n", ":\n")
