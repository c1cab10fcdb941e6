"""Dispatch a command line to the module of its command; report a user's mistake in one line."""

import importlib
import os
import sys

COMMANDS = {
    "train": "pre-train a model on text, on one device or many",
    "sample": "generate text with a trained model",
    "rl": "train a model with rule-based rewards, as R1-Zero",
    "r1": "train R1 stage by stage, and distil it",
    "import": "convert a Hugging Face DeepSeek-V2 or V3 folder to a run",
    "export": "convert a run's model to a Hugging Face folder",
    "cost": "print parameters, FLOPs, memory and rental cost of a config",
    "schedule": "check, simulate and draw a pipeline schedule",
    "bench": "measure this package against transformers",
    "grade": "run and grade the exercise notebooks of a class",
}
MODULES = {"import": "convert", "export": "convert"}

COURSE = "pip install 'minids[course]'"
NEEDED = dict.fromkeys(("matplotlib", "IPython", "nbformat", "jupyter_client", "ipywidgets"), COURSE)
NEEDED |= dict.fromkeys(("pyarrow", "datasets"), "pip install 'minids[data]'")

HELP = "\n".join(
    [
        "usage: minids COMMAND [OPTIONS]",
        "",
        "Train, sample, convert and analyse small DeepSeek-V3/R1 models.",
        "",
        *(f"  {name:10}{purpose}" for name, purpose in COMMANDS.items()),
        "",
        "minids COMMAND --help lists the options of a command; minids --version prints the version.",
    ]
)


def run(arguments: list[str]) -> None:
    """Run a command line. Raises `ValueError` for an unknown command, and whatever the command raises."""
    if not arguments:
        raise ValueError(f"no command: expected one of {', '.join(COMMANDS)}; see --help")
    command, *options = arguments
    if command in ("-h", "--help"):
        print(HELP)
    elif command == "--version":
        print(importlib.import_module("minids").__version__)
    elif command in COMMANDS:
        module = importlib.import_module(f"minids.cli.{MODULES.get(command, command)}")
        module.run(command, options)
    else:
        raise ValueError(f"unknown command {command!r}: expected one of {', '.join(COMMANDS)}; see --help")


def main() -> int:
    """Run this process's command line and return its exit status; a user's mistake prints one line and returns 2."""
    try:
        run(sys.argv[1:])
    except KeyboardInterrupt:
        print("minids: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        remedy = NEEDED.get(error.name, f"pip install {error.name}")
        print(f"minids: {error.name} is not installed: {remedy}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ArithmeticError) as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OSError):  # all ranks raise the same ValueError
            print(f"minids: {error}", file=sys.stderr)
        return 2
    return 0
