"""Run untrusted programs in isolation; a judge outside evaluates their answers."""

from minids.sandbox.judge import Verdict, run

__all__ = ["Verdict", "run"]
