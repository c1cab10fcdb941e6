"""The static site: Jupyter Book over the notebooks as they are stored; `python3 course.py site` runs it.

    python3 course.py site [--repository OWNER/NAME] [options of jupyter-book build]

With a repository on GitHub, pages link to their sources, to Binder and to Colab. It works on a copy, because Jupyter
Book reads all that lies below its source, virtual environments included, and because the chapters of the site have
links to the glossary (glossary.py).
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import glossary

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "site"
SETTINGS = ROOT / "docs/site"
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "site", "solutions", "tests", "__pycache__", "*.egg-info")
WITH_A_REPOSITORY = """
repository:
  url: https://github.com/{repository}
  branch: main
launch_buttons:
  notebook_interface: jupyterlab
  binderhub_url: https://mybinder.org
  colab_url: https://colab.research.google.com
html:
  use_repository_button: true
"""


def configuration(repository: str | None) -> str:
    """Return the settings of Jupyter Book. Raises `ValueError` if the repository is not named as OWNER/NAME."""
    common = (SETTINGS / "_config.yml").read_text(encoding="utf-8")
    if repository is None:
        return common
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(
            f"repository={repository!r}: must be OWNER/NAME, as in the address https://github.com/OWNER/NAME"
        )
    return common + WITH_A_REPOSITORY.format(repository=repository)


def alternative_text(outputs: list[dict[str, Any]]) -> str | None:
    """Return what a figure among a cell's outputs shows, as its text says, or None if there is no figure."""
    for data in (output.get("data", {}) for output in outputs):
        if any(kind.startswith("image/") for kind in data):
            text = "".join(data.get("text/plain", ""))
            return "Plot of the cell above" if not text or text.startswith("<") else text
    return None


def chapter(notebook: dict[str, Any], link: glossary.Linker) -> None:
    """Link terms in the prose of a notebook and describe its figures, in place."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = link("".join(cell["source"]))
        elif text := alternative_text(cell.get("outputs", [])):
            cell["metadata"]["mystnb"] = {"image": {"alt": text}}


def prepare(source: Path) -> None:
    """Turn a copy of the repository into the source of the site."""
    page = source / "docs/GLOSSARY.md"
    document = page.read_text(encoding="utf-8")
    page.write_text(glossary.directives(document), encoding="utf-8")
    for path in sorted((source / "chapters").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        chapter(notebook, glossary.Linker(glossary.entries(document), path.name))
        path.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")
    (source / "_static").mkdir()
    shutil.copy(SETTINGS / "site.css", source / "_static")


def build(repository: str | None, options: list[str]) -> None:
    """Copy the sources to site/source, and build site/_build/html from them."""
    from jupyter_book.cli.main import main

    settings = configuration(repository)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(ROOT, SITE / "source", ignore=LEFT_OUT)
    prepare(SITE / "source")
    (SITE / "_config.yml").write_text(settings, encoding="utf-8")
    paths = ["--config", str(SITE / "_config.yml"), "--toc", str(SETTINGS / "_toc.yml"), "--path-output", str(SITE)]
    main(["build", str(SITE / "source"), *paths, *options])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="course.py site", add_help=False)
    parser.add_argument("--repository", metavar="OWNER/NAME")
    known, others = parser.parse_known_args()
    try:
        build(known.repository, others)
    except ValueError as error:
        sys.exit(f"course.py site: {error}")
