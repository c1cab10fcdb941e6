"""Every pitfall of the model has a check and a planted mistake in one of the files test_pitfalls_*.py."""

from importlib import import_module
from pathlib import Path

from pitfalls import mistakes

FILES = sorted(Path(__file__).parent.glob("test_pitfalls_*.py"))
PITFALLS = [row for path in FILES for row in import_module(path.stem).PITFALLS]
MISTAKES = mistakes(PITFALLS)


def test_every_pitfall_of_the_model_has_a_check_and_a_mistake():
    assert {number for number, *_ in PITFALLS} == set(range(1, 19))  # 19 and 20: tests/inference
    assert all(plants for *_, plants in PITFALLS)
    for number, check, _ in PITFALLS:
        assert check.__name__.startswith(f"check_{number:02}_")
    assert len({plant for *_, plant in MISTAKES}) == len(MISTAKES) == len({(n, name) for n, name, *_ in MISTAKES})
