"""A hook of MkDocs: pages from the repository's root, and links that work on the site as they do in the files.

The documents are also read as files of the repository, so their links are paths in it. README.md, CONTRIBUTING.md and
CHANGELOG.md become pages of the site. A link to a file that isn't part of the site leads to `repo_url`; as long as that
isn't known, only the link's text remains. If the repository is on GitHub, a link to a notebook is followed by one that
opens it on Colab.
"""

import posixpath
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor

ROOT = Path(__file__).resolve().parents[2]
ROOT_PAGES = {path.name.lower(): path for path in ROOT.glob("*.md")}
BEFORE_MKDOCS = 5  # priority; MkDocs resolves links at 0
ATTRIBUTES = {"a": "href", "img": "src"}
GITHUB = "https://github.com/"
COLAB = "https://colab.research.google.com/github/"


def add_colab_badges(root: Element) -> None:
    """Adds a badge that opens it on Colab to each link to a notebook on GitHub."""
    for parent in list(root.iter()):
        for place, element in reversed(list(enumerate(parent, 1))):
            address = element.get("href", "")
            if address.startswith(GITHUB) and address.endswith(".ipynb"):
                badge = Element("a", {"href": COLAB + address.removeprefix(GITHUB), "class": "colab"})
                badge.text = "Open in Colab"
                badge.tail, element.tail = element.tail, " "
                parent.insert(place, badge)


class RepositoryLinks(Treeprocessor, Extension):
    """Turns links between files of the repository into links between pages."""

    def __init__(self) -> None:
        Extension.__init__(self)
        self.page, self.files, self.repository = "", None, ""  # set for every page

    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(self, "repository-links", BEFORE_MKDOCS)

    def run(self, root: Element) -> None:
        for element in root.iter():
            attribute = ATTRIBUTES.get(element.tag, "")
            link = element.get(attribute, "")
            if link and "://" not in link and not link.startswith(("#", "mailto:")):
                name, hash_sign, anchor = link.partition("#")
                target = self.on_site(name)
                if target is not None:
                    element.set(attribute, f"{target}{hash_sign}{anchor}")
                else:
                    element.tag = "span"
                    del element.attrib[attribute]
        add_colab_badges(root)

    def on_site(self, name: str) -> str | None:
        """Where a link of the current page to a file leads; None for nowhere. MkDocs reports links to missing files."""
        folder = "" if self.page in ROOT_PAGES else "docs"
        path = posixpath.normpath(posixpath.join(folder, name))
        if not (ROOT / path).exists():
            return name
        if path.lower() in ROOT_PAGES:
            return path.lower()
        inside = path.removeprefix("docs/")
        if inside != path and self.files.get_file_from_path(inside) is not None:
            return inside
        return f"{self.repository}/blob/main/{path}" if self.repository else None


links = RepositoryLinks()


def on_config(config: Any) -> None:
    config.markdown_extensions.append(links)
    links.repository = config.repo_url.rstrip("/") if config.repo_url else ""


def on_files(files: Any, config: Any) -> None:
    from mkdocs.structure.files import File  # here, because the tests of this project do without MkDocs

    for name, path in ROOT_PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> None:
    links.page, links.files = page.file.src_uri, files
