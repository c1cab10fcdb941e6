#!/usr/bin/env python3
"""The whole course from one command; needs only Python 3.11 or newer.

    python3 course.py                    open JupyterLab on the course
    python3 course.py train [options]    pre-train a small DeepSeek-V3 on this machine, about two minutes
    python3 course.py test [options]     run everything that proves the project
    python3 course.py site [options]     make the static site of the chapters as they are stored

Each sets up .venv from requirements.txt first, once; the site has an environment of its own, .venv-site. Options go to
`python -m minids train`, to pytest, or to Jupyter Book.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - first, because Python 3.6 to 3.10 can parse the rest but not run it
    print(f"course.py: Python {sys.version.split()[0]} is too old: 3.11 or newer is needed", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
SITE_ENVIRONMENT = ROOT / ".venv-site"  # Jupyter Book and JupyterLab do not agree on the versions of what both need


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def works(environment: Path) -> bool:
    """Whether an environment's Python starts and has its packages: not once the Python that made it was replaced."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.call([python_of(environment), "-I", "-c", "import pip"], **quiet) == 0
    except OSError:
        return False


def set_up(environment: Path | None = None, requirements: str = "requirements.txt") -> None:
    """Bring an environment, by default .venv, up to its requirements; does nothing when it already is."""
    environment = environment or ENVIRONMENT
    wanted = hashlib.sha256((ROOT / requirements).read_bytes()).hexdigest()
    stamp = environment / "requirements.sha256"
    usable = works(environment)
    if usable and stamp.exists() and stamp.read_bytes() == wanted.encode():
        return
    if os.pathsep in str(environment):
        sys.exit(f"course.py: {ROOT}: no virtual environment can be in a path with {os.pathsep!r}: rename the folder")
    print(f"Setting up {environment.name} from {requirements}: once, a few minutes ...", flush=True)
    if subprocess.call([sys.executable, "-m", "venv", *([] if usable else ["--clear"]), environment]) != 0:
        sys.exit(f"course.py: Python could not make {environment.name} (Debian and Ubuntu: apt install python3-venv)")
    pip = [python_of(environment), "-m", "pip"]
    if subprocess.call([*pip, "install", "--quiet", "--disable-pip-version-check", "-r", requirements], cwd=ROOT) != 0:
        sys.exit(f"course.py: pip could not install {requirements}; its message stands above")
    settings = environment / "share/jupyter/lab/settings"  # JupyterLab asks about its news at the first start otherwise
    settings.mkdir(parents=True, exist_ok=True)
    notification = {"fetchNews": "false", "checkForUpdates": False}
    overrides = {"@jupyterlab/apputils-extension:notification": notification}
    (settings / "overrides.json").write_text(json.dumps(overrides))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = environment / ("Lib/site-packages" if os.name == "nt" else f"lib/{version}/site-packages")
    packages.mkdir(parents=True, exist_ok=True)
    (packages / "minids.pth").write_text(os.path.relpath(ROOT, packages) + "\n")  # scripts in benchmarks/ import minids
    stamp.write_text(wanted)


def command_of(task: str) -> list[str]:
    """The module that does the task, with its fixed arguments."""
    if task == "train":
        return ["minids", "train"]
    if task == "test":
        return ["pytest", "--nbval", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    if task == "site":
        return ["docs.site.build"]
    chapters = sorted((ROOT / "chapters").glob("*.ipynb"))
    page = f"/lab/tree/{chapters[0].relative_to(ROOT).as_posix()}" if chapters else "/lab"
    # Not `jupyter lab FILE`: that would make chapters/ the root of the file browser and hide exercises/.
    return ["jupyterlab", f"--ServerApp.root_dir={ROOT}", f"--LabApp.default_url={page}"]


def main(task: str = "lab", *options: str) -> int:
    if task in ("-h", "--help"):
        print(__doc__)
        return 0
    if task not in ("lab", "train", "test", "site"):
        print(f"course.py: unknown task {task!r}: it can be train, test or site, or nothing at all", file=sys.stderr)
        return 2
    environment = SITE_ENVIRONMENT if task == "site" else ENVIRONMENT
    set_up(environment, "requirements-site.txt" if task == "site" else "requirements.txt")
    from minids.threads import openmp_settings  # needs no package

    if task == "lab":  # JupyterLab shows the drawings of chapters only where their outputs are signed by this machine
        chapters = sorted((ROOT / "chapters").glob("*.ipynb"))
        subprocess.call([python_of(environment), "-m", "nbformat.sign", *chapters], stdout=subprocess.DEVNULL)
    command = [python_of(environment), "-m", *command_of(task), *options]
    process = subprocess.Popen(command, cwd=ROOT, env=openmp_settings(os.environ) | os.environ)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the child's to handle: it saves before it stops
    return process.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
