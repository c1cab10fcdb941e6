"""Run pytest natively and as on other processors; used before every commit of a notebook.

    python tests/processors.py chapters/04_mtp.ipynb              everywhere
    python tests/processors.py --only avx2,sse tests/parallel     on some

A processor decides in which order sums are taken, and so the last bit of nearly every number; in training the
difference grows, and in a mixture of experts a token then goes to another expert. Older instruction sets can be asked
for on this machine, and noise in the last bit of every gradient stands for any other order. Prints pytest's closing
line for each; exit status 1 if one failed.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROCESSORS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "sse": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "noise 1": {"MINIDS_GRADIENT_NOISE": "1"},
    "noise 2": {"MINIDS_GRADIENT_NOISE": "2"},
}


def main(*arguments: str) -> int:
    if arguments[:1] == ("--only",):
        names, arguments = arguments[1].split(","), arguments[2:]
        if unknown := set(names) - PROCESSORS.keys():
            print(f"processors.py: {unknown.pop()!r} is none of {', '.join(PROCESSORS)}", file=sys.stderr)
            return 2
    else:
        names = list(PROCESSORS)
    command = [sys.executable, "-m", "pytest", "--nbval", "-n", "2", "--dist", "loadfile", *arguments]
    failed = 0
    for name in names:
        run = subprocess.run(
            command, cwd=ROOT, env=os.environ | PROCESSORS[name], text=True, stdout=subprocess.PIPE
        )  # stderr passes through
        *report, closing = run.stdout.strip().splitlines()
        if run.returncode != 0:
            print(*report, sep="\n")
            failed = 1
        print(f"{name:8} {closing.strip('= ')}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
