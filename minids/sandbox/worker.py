"""The process inside the sandbox: load one program, and evaluate calls to it.

`minids.sandbox.judge` runs `confine.py`, then this file in a process of its own (`python -I -S -c LOADER CODE SETUP`)
and communicates over its standard input, a socket: one line per request, one line per answer. A request is Python
source from the judge (the text of the program, then calls with literal arguments); an answer is JSON. Expected results
are never sent, so a program that takes over this process can only choose its answers.

Only modules that load quickly are imported: `json` alone would double the start-up time.
"""

import os


def serve(channel: int) -> None:
    """Answer `["ok", value]` or `["error", text]`: once for the isolation, once for the program, once per call."""
    os.environ.clear()
    os.write(channel, b'["ok",null]\n')
    namespace = {"__name__": "program"}
    mode = "exec"
    for line in open(channel, "rb", closefd=False):
        try:
            answer = '["ok",' + encode(eval(compile(eval(line), "<string>", mode), namespace)) + "]"
        except BaseException as error:  # a program may also raise SystemExit or KeyboardInterrupt
            answer = '["error",' + encode(f"{type(error).__name__}: {error}"[:200]) + "]"
        left = answer.encode() + b"\n"
        while left:
            left = left[os.write(channel, left) :]
        mode = "eval"


def encode(value: object) -> str:
    """Encode plain data as JSON; a type that JSON lacks becomes an object of one field, named after the type.

    Raises `TypeError` for any other type.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text := float.__repr__(value), text)
    if isinstance(value, str):
        return '{"str":"' + value.encode("utf-8", "surrogatepass").hex() + '"}'
    if isinstance(value, dict):
        return '{"dict":' + encode([list(item) for item in value.items()]) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(encode, value)) + "]"
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return f'{{"{kind.__name__}":' + encode(list(value)) + "}"
    raise TypeError(f"{type(value).__name__} is not plain data")
