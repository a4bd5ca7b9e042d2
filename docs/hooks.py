"""What the site does beyond Markdown: dark variants of pictures. MkDocs calls these functions."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

IMAGE = re.compile(r'<img alt="([^"]*)" src="([^"]*)\.png"\s*/?>')


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
