"""What the site does beyond Markdown, called by MkDocs: dark variants of pictures, and the tutorial as a page.

``python docs/hooks.py`` executes the tutorial and stores its outputs; it needs nbclient and ipykernel.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

NOTEBOOK = Path(__file__).with_name("tutorial.ipynb")
# Lines of the log that are stored: the start-up block with its indented lines, and the engine.
KEPT = ("Federation", "Engine", " ")
IMAGE = re.compile(r'<img alt="([^"]*)" src="([^"]*)\.png"\s*/?>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the tutorial as a page, with its pictures as files."""
    markdown, pictures = page_of(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    files.append(File.generated(config, "tutorial.md", content=markdown))
    for name, content in pictures.items():
        files.append(File.generated(config, f"images/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to the notebook, which are right in a checkout, lead to its page; rank pages for search."""
    if page.file.src_uri.startswith("api/"):
        # Search shows the guide before the reference.
        page.meta.setdefault("search", {"boost": 0.3})
    if page.file.src_uri == "tutorial.md":
        return markdown
    return markdown.replace("(tutorial.ipynb)", "(tutorial.md)")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the dark variant of a picture on dark pages where there is one, `NAME_dark.png` next to `NAME.png`."""
    images = Path(config.docs_dir) / "images"

    def both(match: re.Match[str]) -> str:
        text, path = match.groups()
        if not (images / f"{Path(path).name}_dark.png").exists():
            return match[0]
        light = f'<img alt="{text}" class="light-only" src="{path}.png">'
        # Read aloud once.
        dark = f'<img alt="" class="dark-only" src="{path}_dark.png">'
        return light + dark

    return IMAGE.sub(both, html)


def page_of(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by the name of their file."""
    parts = []
    pictures = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in data:
                name = f"tutorial_{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Output of the cell above](images/{name})")
    parts.append("[Download this notebook](tutorial.ipynb)")
    return "\n\n".join(parts) + "\n", pictures


def execute() -> None:
    """Execute the tutorial, and store its outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # Of the steps of a progress bar the last is stored.
    NotebookClient(notebook, timeout=120, coalesce_streams=True).execute()
    for cell in notebook.cells:
        # Times of execution would change with every run.
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(without_notes, cell.outputs) if output.get("text", "full")]
    nbformat.write(notebook, NOTEBOOK)


def without_notes(output: Any) -> Any:
    """Return an output without Lightning's notes and the paths of this machine; the package's own lines stay."""
    if output.get("name") == "stderr":
        lines = [line for line in output.text.splitlines(keepends=True) if line.startswith(KEPT)]
        output.text = "".join(lines)
    elif "text" in output:
        output.text = output.text.strip("\n") + "\n"
    return output


if __name__ == "__main__":
    execute()
