"""The annotations of the package agree with each other and with the libraries', according to a static type checker."""

import subprocess
import sys

from documents import ROOT


def test_mypy_finds_no_error():
    mypy = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert mypy.returncode == 0, mypy.stdout + mypy.stderr
