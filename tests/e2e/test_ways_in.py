"""The ways in without an installation, as far as they can be tried: Colab's cell, and the addresses of the site."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from minids.course.notebooks import ROOT, read

RUN = """
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read("chapter.ipynb", 4)
NotebookClient(notebook, timeout=600, coalesce_streams=True).execute()  # else a text may come in two outputs
print(notebook.cells[-1].outputs[-1].text)
"""
SETUP = (ROOT / "docs/SETUP.md").read_text(encoding="utf-8")


def colab_cell():
    """The cell of docs/SETUP.md that clones the repository."""
    (cell,) = [block for block in re.findall(r"^```\n(.*?)^```", SETUP, re.MULTILINE | re.DOTALL) if "!git" in block]
    return cell


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_colabs_cell_is_enough_for_chapter_00(tmp_path):
    """In a fresh folder, with no index of packages: what it installs has to be there."""
    chapter = read(ROOT / "chapters/00_claims.ipynb")
    chapter.cells.insert(0, nbformat.v4.new_code_cell(colab_cell().replace("ADDRESS", str(ROOT))))
    chapter.cells.append(nbformat.v4.new_code_cell("import minids.course\nprint(minids.course.__file__)"))
    nbformat.write(chapter, tmp_path / "chapter.ipynb")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # pip of this environment
    environment = os.environ | {"PATH": path, "PIP_NO_INDEX": "1", "PYTHONPATH": "", "PYTHONSTARTUP": ""}
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve().is_relative_to(tmp_path / "minids")


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs/site/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_links_to_a_repository_only_where_one_is_named(site):
    assert "github.com" not in site.configuration(None)
    named = site.configuration("someone/minids")
    assert "url: https://github.com/someone/minids\n" in named and "binderhub_url" in named and "colab_url" in named


@pytest.mark.parametrize("repository", ["minids", "https://github.com/a/b", "a/b c", ""])
def test_a_repository_that_is_none_is_refused(site, repository):
    with pytest.raises(ValueError, match="must be OWNER/NAME"):
        site.configuration(repository)
