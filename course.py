#!/usr/bin/env python3
"""The whole course from one command; needs only Python 3.11 or newer.

    python3 course.py                    open JupyterLab on the course
    python3 course.py train [options]    pre-train a small DeepSeek-V3 on this machine, about two minutes
    python3 course.py test [options]     run everything that proves the project

Each sets up .venv from requirements.txt first, once. Options go to `python -m minids train` or to pytest.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def set_up() -> None:
    """Bring .venv up to requirements.txt; does nothing when it already is."""
    wanted = hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()
    stamp = ENVIRONMENT / "requirements.sha256"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print("Setting up .venv from requirements.txt: once, a few minutes ...", flush=True)
    if subprocess.call([sys.executable, "-m", "venv", ENVIRONMENT]) != 0:
        sys.exit("course.py: Python could not make .venv (on Debian and Ubuntu: apt install python3-venv)")
    command = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", "requirements.txt"]
    if subprocess.call(command, cwd=ROOT) != 0:
        sys.exit("course.py: pip could not install requirements.txt; its message stands above")
    settings = ENVIRONMENT / "share/jupyter/lab/settings"  # JupyterLab asks about its news at the first start otherwise
    settings.mkdir(parents=True, exist_ok=True)
    notification = {"fetchNews": "false", "checkForUpdates": False}
    overrides = {"@jupyterlab/apputils-extension:notification": notification}
    (settings / "overrides.json").write_text(json.dumps(overrides))
    stamp.write_text(wanted)


def command_of(task: str) -> list[str]:
    """The module that does the task, with its fixed arguments."""
    if task == "train":
        return ["minids", "train"]
    if task == "test":
        return ["pytest", "--nbval", "-n", "2", "--dist", "loadfile"]
    chapters = sorted((ROOT / "chapters").glob("*.ipynb"))
    page = f"/lab/tree/{chapters[0].relative_to(ROOT).as_posix()}" if chapters else "/lab"
    # Not `jupyter lab FILE`: that would make chapters/ the root of the file browser and hide exercises/.
    return ["jupyterlab", f"--ServerApp.root_dir={ROOT}", f"--LabApp.default_url={page}"]


def main(task: str = "lab", *options: str) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - this is where an older Python learns of it
        print(f"course.py: Python {sys.version.split()[0]} is too old: 3.11 or newer is needed", file=sys.stderr)
        return 2
    if task in ("-h", "--help"):
        print(__doc__)
        return 0
    if task not in ("lab", "train", "test"):
        print(f"course.py: unknown task {task!r}: it can be train or test, or nothing at all", file=sys.stderr)
        return 2
    set_up()
    process = subprocess.Popen([PYTHON, "-m", *command_of(task), *options], cwd=ROOT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the child's to handle: it saves before it stops
    return process.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
