"""Links, anchors, files and modules that the documents name exist, and their commands parse."""

import importlib
import importlib.util
import re
import shlex
import types
from pathlib import Path

import click
import markdown
import pytest

from sid.options import options_of

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("assets/*/*.md")]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
    for name in re.findall(r"`((?:sid|edm|training|torch_utils|dnnlib|tests|docs)/[\w/]+\.\w+)", text):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"python -m ((?:sid|edm|training|torch_utils|dnnlib)[\w.]*\w)", text):
        place = ROOT.joinpath(*module.split("."))
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module


OMITTED = {"...", "…", "[options]", "$COMMON"}
NUMBERS = {"--seed=SEED": "--seed=0", "--steps=STEPS": "--steps=1"}


def commands(text: str) -> list[list[str]]:
    """The command lines of this project in code blocks, as words without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    found = (re.match(r"\s*(?:[A-Z_]+=\S+ )*((?:python (?:-m )?[\w.]+|bash run_sid\.sh) .*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


def parse(words: list[str]) -> None:
    """Parses a command line without running it. Errors: click's."""
    program, *arguments = words[2:] if words[1] == "-m" else words[1:]
    if program == "run_sid.sh":
        program, arguments = "sid_train.py", [f"--recipe={arguments[0]}", *arguments[1:]]
    module = program.removesuffix(".py")
    if not (ROOT / module.replace(".", "/")).with_suffix(".py").exists():
        module += ".__main__"
    command = importlib.import_module(module).main
    if isinstance(command, click.Group):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    arguments = [NUMBERS.get(word, word) for word in arguments if word not in OMITTED]
    context = command.make_context(program, arguments)
    if module == "sid_train":
        options_of(context)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_parse(document, tmp_path, monkeypatch):
    for name in ("RUN", "RUN_FOLDER", "generator", "teacher", "training-runs/00000-demo"):  # whose existence is checked
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for words in commands(document.read_text(encoding="utf-8")):
        if "--help" in words or (words[1] == "-m" and not (ROOT / words[2].split(".")[0]).exists()):
            continue  # help ends the parsing; others are pip, venv and the like
        try:
            parse(words)
        except click.ClickException as error:
            pytest.fail(f"{shlex.join(words)}: {error.format_message()}")


def test_every_page_is_in_the_navigation_of_the_site():
    listed = re.findall(r"^ +- [^:\n]+: ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [path.name for path in ROOT.glob("docs/*.md")]
    pages += [path.name.lower() for path in ROOT.glob("*.md")]  # as docs/mkdocs/links.py names them
    assert sorted(listed) == sorted(pages)


NOTEBOOK = "blob/main/examples/quickstart.ipynb"


@pytest.mark.parametrize(
    ("repository", "links"),
    [
        ("", []),
        ("https://example.org/me/it", [f"https://example.org/me/it/{NOTEBOOK}"]),
        (
            "https://github.com/me/it/",
            [f"https://github.com/me/it/{NOTEBOOK}", f"https://colab.research.google.com/github/me/it/{NOTEBOOK}"],
        ),
    ],
)
def test_notebooks_on_github_open_on_colab(repository, links):
    spec = importlib.util.spec_from_file_location("links", ROOT / "docs" / "mkdocs" / "links.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    config = types.SimpleNamespace(markdown_extensions=[], repo_url=repository)
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="index.md"))
    hook.on_config(config)
    hook.on_page_markdown("", page, config, types.SimpleNamespace(get_file_from_path=lambda path: None))
    text = "Open [the notebook](../examples/quickstart.ipynb), or [an example](../examples/one_step.py)."
    html = markdown.markdown(text, extensions=config.markdown_extensions)
    assert re.findall(r'href="([^"]*\.ipynb)"', html) == links
    badge = " Open in Colab" if len(links) == 2 else ""
    assert re.sub("<[^>]*>", "", html) == f"Open the notebook{badge}, or an example."
