"""The wheel, installed with its declared dependencies only: what it contains, and that its commands run.

The bare environment is a venv without pip. It contains the wheel, and links to the distributions that the wheel's
`Requires-Dist` lines name and to their dependencies. A module that none of them provides cannot be imported there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import HeaderParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
COURSE_ONLY = ("IPython", "PIL", "ipywidgets", "jupyter_client", "matplotlib", "nbclient", "nbformat")
TRAINING = "--preset nano --data text.txt --tokenizer bytes --steps 3 --batch-size 2 --seq-len 32 --warmup-steps 1"
TRAINING += " --evaluate-every 3 --evaluation-batches 1 --device cpu"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the bare environment is made of symbolic links")


def clean(**more):
    """Return this process's environment without the variables that could lead to the source tree."""
    unwanted = {"PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "VIRTUAL_ENV"}
    return {k: v for k, v in os.environ.items() if k not in unwanted} | {"OMP_NUM_THREADS": "1"} | more


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def run(command, cwd, **more):
    finished = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean(**more), capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("minids", "numpy", "torch"):
            raise ImportError(f"building the wheel imported {name}")
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel without a network, from a copy of the source tree; the build must not import minids or torch."""
    folder = tmp_path_factory.mktemp("wheel")
    source, refusing = folder / "source", folder / "refusing"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "conftest.py", "course.py"):
        shutil.copy(ROOT / name, source)
    for name in ("minids", "tests", "benchmarks", "examples"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*", "results"))
    refusing.mkdir()
    (refusing / "sitecustomize.py").write_text(REFUSE)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, "."]
    run(pip, source, PYTHONPATH=str(refusing))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def needed(lines, extra=""):
    """Return the requirements among Requires-Dist lines that apply to this machine."""
    requirements = map(Requirement, lines or ())
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]


def with_dependencies(requirements):
    """Return the installed distributions that requirements name, with their dependencies."""
    found, waiting = {}, [(r.name, extra) for r in requirements for extra in ("", *r.extras)]
    while waiting:
        name, extra = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower(), extra
        if key not in found:
            found[key] = distribution(name)
            waiting += [(r.name, more) for r in needed(found[key].requires, extra) for more in ("", *r.extras)]
    return list(found.values())


@pytest.fixture(scope="module")
def bare(tmp_path_factory, wheel, metadata):
    """Make a venv with the wheel, its dependencies and nothing else; return its folder."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    run([*pip, "install", "--no-deps", "--no-index", wheel], folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for dist in with_dependencies(needed(metadata.get_all("Requires-Dist"))):
        assert dist.files, f"{dist.name} has no list of its files"
        for top in {file.parts[0] for file in dist.files} - {"..", "__pycache__"}:
            if not top.endswith(".pth") and not (packages / top).exists():
                (packages / top).symlink_to(dist.locate_file(top))
    return folder


@pytest.fixture(scope="module")
def minids(bare, tmp_path_factory):
    """Run the installed console script in a folder outside the source tree; return its standard output."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 400)

    def call(*arguments):
        return run([bare / "bin" / "minids", *arguments], folder)

    call.folder = folder
    return call


def test_wheel_metadata_names_dependencies_extras_and_script(wheel, metadata):
    names = {requirement.name for requirement in needed(metadata.get_all("Requires-Dist"))}
    assert names == {"torch", "numpy", "einops", "jaxtyping", "safetensors", "tokenizers", "tqdm", "tyro"}
    assert set(metadata.get_all("Provides-Extra")) == {"course", "data", "tensorboard", "dev"}
    assert metadata["License-Expression"] == "MIT" and metadata["Requires-Python"] == ">=3.11"
    assert "OWNER" not in " ".join(metadata.get_all("Project-URL") or [])
    version = re.search(r'^__version__ = "(.+)"$', text_of("minids/__init__.py"), re.MULTILINE)[1]
    assert metadata["Version"] == version
    assert f"\n## [{version}] - " in text_of("CHANGELOG.md")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        assert "minids = minids.cli.main:main" in archive.read(name).decode().splitlines()


def test_wheel_holds_the_whole_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"minids"}
    assert "minids/py.typed" in names
    source = wheel.parent / "source"
    sources = {path.relative_to(source).as_posix() for path in (source / "minids").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


IMPORT_ALL = """
import importlib, json, pkgutil
import minids
course = ("minids.course", "minids.cli.grade", "minids.cli.handout", "minids.cli.progress")
skipped = (*course, "minids.fp8.triton")  # Triton: CUDA builds of torch only
modules = [m.name for m in pkgutil.walk_packages(minids.__path__, "minids.") if not m.name.startswith(skipped)]
files = [importlib.import_module(name).__file__ for name in modules if name != "minids.__main__"]
absent = [name for name in {names} if importlib.util.find_spec(name) is None]
print(json.dumps([[minids.__file__, *files], absent]))
"""


def test_bare_environment_imports_every_module_but_the_course(bare, tmp_path):
    command = [bare / "bin" / "python", "-c", IMPORT_ALL.format(names=COURSE_ONLY)]
    files, absent = json.loads(run(command, tmp_path))
    assert len(files) > 50 and all(Path(file).is_relative_to(bare) for file in files)
    assert absent == list(COURSE_ONLY)


def test_help_and_version_print_the_commands_and_the_version(minids, metadata):
    out = minids("--help")
    assert "usage: minids COMMAND" in out
    assert all(f"\n  {command} " in out for command in "train sample rl r1 cost schedule import export bench".split())
    assert minids("--version").strip() == metadata["Version"]


def test_cost_prints_the_published_counts_of_v3(minids):
    figures = json.loads(minids("cost", "v3", "--json"))["v3"]
    assert {671026419200, 36624596992} <= set(figures.values())


def test_train_sample_export_and_import_need_no_matplotlib(minids):
    out = minids("train", *TRAINING.split())
    assert len(re.findall(r"^no loss\.png: \w+ is missing .*minids\[course\].*$", out, re.MULTILINE)) == 1
    made = {path.name for path in (minids.folder / "runs" / "nano").iterdir()}
    assert made == {"checkpoints", "metrics.jsonl", "run.json", "tokenizer.json"}
    out = minids("sample", "--prompt", "one", "--max-new-tokens", "5", "--device", "cpu")
    assert out.startswith("one") and len(out) > len("one\n")
    assert "DeepseekV3ForCausalLM" in minids("export", "runs/nano", "my-model")
    assert "runs/back" in minids("import", "my-model", "back")


def test_schedule_is_drawn_as_text(minids):
    out = minids("schedule", "dualpipe", "--ranks", "4", "--micro-batches", "8")
    assert re.search(r"^dualpipe .* [\d.]+$", out, re.MULTILINE)
    actions = json.loads(minids("schedule", "dualpipe", "--ranks", "4", "--micro-batches", "8", "--json"))["actions"]
    assert len(actions) == 4


def test_pins_of_the_course_satisfy_the_lower_bounds(metadata):
    lines = [line.partition("#")[0].strip() for line in text_of("requirements.txt").splitlines()]
    assert lines[-1] == "-e ."
    pins = {pin.name: pin for pin in needed(filter(None, lines[:-1]))}
    asked = metadata.get_all("Requires-Dist")
    bounds = {r.name: r for extra in ("", *metadata.get_all("Provides-Extra")) for r in needed(asked, extra)}
    for name, pin in pins.items():
        (exact,) = pin.specifier
        assert exact.operator == "==" and bounds[name].specifier.contains(exact.version), f"{pin} is not {bounds[name]}"
    assert set(bounds) - set(pins) == {"minids", "pre-commit"}  # itself, and what no test needs


def test_missing_dependency_is_noticed_by_the_closure():
    with pytest.raises(PackageNotFoundError):
        with_dependencies([Requirement("minids-has-no-such-dependency")])
