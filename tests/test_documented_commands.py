"""Each command that the README or another document names is understood by the program that it names."""

import ast
import importlib.util
import re
import shlex

import pytest
import tyro
from documents import COMMANDS, CONTRIBUTING, README, ROOT, read, without_code

from minids.cli import main

CLASSROOM, SETUP = ROOT / "docs/CLASSROOM.md", ROOT / "docs/SETUP.md"


def commands(markdown):
    """Lines of code blocks, and code in sentences, that start Python: `python -m X ...`, `python3 course.py X ...`."""
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    lines = [*blocks.splitlines(), *re.findall(r"`([^`\n]+)`", without_code(markdown))]
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"python3? (-m )?\w", line)]


NAMED = sorted(
    {tuple(command) for path in (README, CONTRIBUTING, COMMANDS, CLASSROOM, SETUP) for command in commands(read(path))}
)


class Parsed(Exception):
    """The options of a command were understood; raised in place of carrying it out."""


def parse_only(*arguments, cli=tyro.cli, **settings):
    cli(*arguments, **settings)
    raise Parsed


@pytest.mark.parametrize("command", NAMED, ids=" ".join)
def test_a_command_that_is_named_can_be_run(command, monkeypatch):
    program, *options = command
    if command[:2] == ("-m", "minids"):
        monkeypatch.setattr(tyro, "cli", parse_only)
        with pytest.raises(Parsed):  # ValueError for an unknown command, option or value
            main.run(list(command[2:]))
    elif program == "-m":
        assert importlib.util.find_spec(options[0]) is not None
    elif program == "course.py":
        told = ast.get_docstring(ast.parse((ROOT / program).read_text(encoding="utf-8")))
        assert re.search(rf"^ +python3 {' '.join(command[:2])}( \[options\])?  ", told, re.MULTILINE)
    else:
        assert (ROOT / program).is_file()


@pytest.mark.parametrize(
    "line, named",
    [
        ("none", "none"),
        ("train --no-such-option", "--no-such-option"),
        ("train --steps many", "many"),
        ("export runs/tiny", "DIRECTORY"),
    ],
)
def test_a_command_that_cannot_be_parsed_is_noticed(line, named, monkeypatch):
    monkeypatch.setattr(tyro, "cli", parse_only)
    with pytest.raises(ValueError, match=named):
        main.run(line.split())


def test_commands_are_found_where_they_stand():
    text = "```\npython -m a b \\\n  --c  # d\nls\n```\nsay `python3 course.py e`, `python`\n"
    assert commands(text) == [["-m", "a", "b", "--c"], ["course.py", "e"]]
    assert len(NAMED) >= 15
