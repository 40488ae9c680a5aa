"""Links of pages to files outside of docs/ lead to the repository, where ``repo_url`` names one; else they are text.

Links of notebooks, which no plugin follows, lead to pages.
"""

import os
import re
from pathlib import Path
from typing import Any

_FROM_NOTEBOOK = re.compile(r'href="\.\./([\w-]+)\.md')
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")  # text, path, section


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    docs = Path(config["docs_dir"])
    here = (docs / page.file.src_uri).parent

    def outside(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(here / link[2]))
        if target.is_relative_to(docs) or not target.exists():
            return link[0]
        repository = (config["repo_url"] or "").rstrip("/")
        path = target.relative_to(docs.parent).as_posix()
        return f"[{link[1]}]({repository}/blob/main/{path}{link[3] or ''})" if repository else link[1]

    return _LINK.sub(outside, markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page that was made."""
    return _FROM_NOTEBOOK.sub(r'href="../../\1/', html) if page.file.src_uri.endswith(".ipynb") else html
