"""Signals, closed and narrow terminals, and errors that nobody foresaw: one line, and work is saved."""

import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_command_line import SMALL

from minids.cli import main as cli
from minids.cli.main import main
from minids.training.pretrain import Trainer

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
SIGNALS = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
TRAIN = ["train", *SMALL, "--tokenizer", "bytes", "--steps", "6"]
# Runs the command line with a signal sent where torch is first imported.
WHILE_IMPORTING = """
import os, runpy, sys
number = int(sys.argv.pop(1))
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(Finder)
            os.kill(os.getpid(), number)
assert "torch" not in sys.modules
sys.meta_path.insert(0, Finder)
runpy.run_module("minids", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(autouse=True)
def signal_handlers():
    """Every command leaves the signal handlers as they were."""
    before = [signal.getsignal(getattr(signal, name)) for name in SIGNALS]
    yield
    after = [signal.getsignal(getattr(signal, name)) for name in SIGNALS]
    for name, handler in zip(SIGNALS, before, strict=True):
        signal.signal(getattr(signal, name), handler)
    assert after == before


def send_in_step(monkeypatch, number, step, times=1):
    """Let the process send itself a signal before a training step."""
    original = Trainer.train_step

    def train_step(self):
        if self.step == step - 1:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


# Signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("name", SIGNALS)
def test_signal_while_importing_is_one_line(name):
    number = getattr(signal, name)
    command = [sys.executable, "-c", WHILE_IMPORTING, str(int(number)), "sample", "nowhere", "--prompt", "a"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.stderr == ("minids: interrupted\n" if name == "SIGINT" else f"minids: interrupted by {name}\n")
    assert finished.returncode in (128 + number, -number)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("name", SIGNALS)
def test_signal_while_reading_text_says_so_and_leaves_nothing(folder, minids, monkeypatch, name):
    number = getattr(signal, name)

    def read_documents(*arguments, **options):
        os.kill(os.getpid(), number)
        return []

    monkeypatch.setattr("minids.training.pretraining_run.read_documents", read_documents)
    status, _, error = minids(*TRAIN)
    assert status == 128 + number and error.startswith("minids: interrupted") and error.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("name", SIGNALS)
def test_signal_in_training_saves_a_checkpoint_and_prints_a_command_that_resumes(folder, minids, monkeypatch, name):
    with monkeypatch.context() as patch:
        send_in_step(patch, getattr(signal, name), step=3)
        status, out, error = minids(*TRAIN, "--name", "it's mine")
    assert status == 0, error
    assert "Stopped after step 3 of 6; everything is saved" in out
    assert [path.name for path in Path("runs/it's mine/checkpoints").iterdir()] == ["step-00000003"]
    python, flag, package, *arguments = shlex.split(out.splitlines()[-1])
    assert (python, flag, package) == ("python", "-m", "minids")
    status, out, error = minids(*arguments, "--device", "cpu")
    assert status == 0 and "bits per byte" in out, error
    sample = next(line for line in out.splitlines() if "python -m minids sample" in line)
    assert minids(*shlex.split(sample)[3:], "--max-new-tokens", "2")[0] == 0


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_second_signal_in_training_interrupts_at_once(folder, minids, monkeypatch):
    send_in_step(monkeypatch, signal.SIGTERM, step=3, times=2)
    status, _, error = minids(*TRAIN)
    assert status == 143 and error.splitlines()[-1] == "minids: interrupted by SIGTERM"
    assert not list(Path("runs/nano/checkpoints").glob("*"))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX signals")
def test_run_under_nohup_outlives_its_terminal(folder, minids, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send_in_step(monkeypatch, signal.SIGHUP, step=3)
        status, out, error = minids(*TRAIN)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert status == 0 and "Stored in runs/nano" in out, error


# Output --------------------------------------------------------------------------------------------------------------


def test_closed_pipe_ends_in_silence():
    command = [sys.executable, "-m", "minids", "schedule", "one_f_one_b", "--ranks", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=BUFFERED)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=120) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_full_disk_under_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "minids", "cost", "v3"]
        finished = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, env=BUFFERED)
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1 and "No space left on device" in finished.stderr


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_stream_is_no_error(folder, closed):
    command = f"{shlex.quote(sys.executable)} -m minids %s {closed}"
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    for arguments, status in (("schedule gpipe --ranks 2 --micro-batches 2", 0), ("schedule gpipe --ranks 0", 2)):
        finished = subprocess.run(
            command % arguments, shell=True, cwd=folder, capture_output=True, text=True, timeout=120, env=environment
        )
        assert finished.returncode == status and finished.stderr.count("\n") <= 1, finished.stderr
        assert bool(finished.stdout) == (status == 0 and ">&-" not in closed.replace("2>&-", ""))


@pytest.mark.parametrize("columns", ["1", "5", "0"])
def test_help_on_a_narrow_terminal_has_readable_lines(minids, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    status, out, _ = minids("schedule", "--help")
    assert status == 0 and "Number of devices" in out


def test_error_is_reported_where_a_cluster_has_set_rank(minids, monkeypatch):
    """Job managers set RANK, too; only torchrun's further processes are silent."""
    monkeypatch.setenv("RANK", "1")
    assert "ranks=0: must be at least 1" in minids("schedule", "--ranks", "0")[2]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert minids("schedule", "--ranks", "0") == (2, "", "")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_that_is_not_utf8_ends_no_command(folder, monkeypatch, encoding):
    """A young model's text is full of U+FFFD, and a student's name may have any letters."""
    Path("students/学生").mkdir(parents=True)
    Path("students/学生/01_baseline.ipynb").write_text("{")
    grade = [] if os.name == "nt" else [["grade", "students", "--csv", "points.csv", "--workers", "1"]]
    for arguments in (
        [*TRAIN, "--name", "größer 学"],
        ["sample", "--prompt", "größer 学", "--max-new-tokens", "20"],
        *grade,
    ):
        output, errors = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            monkeypatch.setattr(sys, "argv", ["minids", *arguments])
            assert main() == 0, errors.buffer.getvalue()
        assert b"?" in output.buffer.getvalue()
    if grade:
        assert "学生" in Path("points.csv").read_text(encoding="utf-8-sig")


# Errors that nobody foresaw ------------------------------------------------------------------------------------------


def raising(error):
    def run(arguments):
        raise error

    return run


def test_interruption_that_an_import_swallowed_is_still_reported(minids, monkeypatch):
    def run(arguments):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        raise ImportError("cannot load module more than once per process")  # numpy, after such an import

    monkeypatch.setattr(cli, "run", run)
    status, _, error = minids("train")
    assert (status, error) == (143, "minids: interrupted by SIGTERM\n")


def test_unforeseen_error_is_one_line_that_says_how_to_see_more(minids, monkeypatch):
    monkeypatch.delenv("MINIDS_TRACEBACK", raising=False)
    monkeypatch.setattr(cli, "run", raising(KeyError("a\nb")))
    status, _, error = minids("train")
    assert status == 1 and error.startswith("minids: KeyError: 'a") and error.count("\n") == 1
    assert "set MINIDS_TRACEBACK=1" in error and "MINIDS_TRACEBACK=1" in cli.HELP
    monkeypatch.setenv("MINIDS_TRACEBACK", "0")
    assert minids("train")[2].count("\n") == 1
    monkeypatch.setenv("MINIDS_TRACEBACK", "1")
    status, _, error = minids("train")
    assert status == 1 and error.startswith("Traceback") and "in run" in error and "\nminids: KeyError" in error


def test_failure_before_the_first_step_leaves_no_run_and_a_later_one_does(folder, minids, monkeypatch):
    original, failing = Trainer.train_step, 1

    def train_step(self):
        if self.step == failing - 1:
            raise MemoryError
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    before = sorted(folder.rglob("*"))
    status, _, error = minids(*TRAIN)
    assert status == 2 and "out of memory: lower --micro-batch-size" in error
    assert sorted(folder.rglob("*")) == before
    failing = 3
    assert minids(*TRAIN)[0] == 2
    assert Path("runs/nano/metrics.jsonl").read_text().count("\n") == 2
    failing = 1000  # the metrics of a run with no checkpoint are computed again
    status, out, error = minids("train", "--resume", "runs/nano", "--device", "cpu")
    assert status == 0 and "bits per byte" in out, error


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), None])
def test_out_of_memory_says_what_to_lower(minids, monkeypatch, error):
    monkeypatch.setattr(cli, "run", raising(error) if error else lambda arguments: torch.empty(2**55))
    for command, remedy in (("train", "lower --micro-batch-size"), ("rl", "--max-cache-bytes"), ("cost", "a machine")):
        status, _, line = minids(command)
        assert status == 2 and line.startswith("minids: out of memory: ") and line.count("\n") == 1
        assert remedy in line
