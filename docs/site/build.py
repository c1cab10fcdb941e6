"""The static site: Jupyter Book over the notebooks as they are stored; `python3 course.py site` runs it.

It works on a copy, because Jupyter Book reads all that lies below its source, virtual environments included.
"""

import shutil
import sys
from pathlib import Path

from jupyter_book.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "site"
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "site", "solutions", "tests", "__pycache__", "*.egg-info")

shutil.rmtree(SITE, ignore_errors=True)
shutil.copytree(ROOT, SITE / "source", ignore=LEFT_OUT)
settings = ["--config", str(ROOT / "docs/site/_config.yml"), "--toc", str(ROOT / "docs/site/_toc.yml")]
main(["build", str(SITE / "source"), "--path-output", str(SITE), *settings, *sys.argv[1:]])
