"""Draw the pictures of the README: `python -m minids.course.drawings` writes docs/map.svg and docs/pictures/."""

from pathlib import Path

from minids.course.drawings import DRAWINGS
from minids.course.drawings.v3_map import v3_map

DOCS = Path(__file__).resolve().parents[3] / "docs"
PICTURES = {
    "00": "bill",
    "01": "MHA, GQA, MQA",
    "02": "MLA, expanded",
    "03": "MoE layer",
    "04": "MTP chain",
    "05": "training step",
    "06": "FP8 flow",
    "07": "DualPipe",
    "08": "dispatch",
    "09": "RL loop",
    "10": "R1 stages",
    "11": "sparse attention",
    "12": "hyper-connections",
    "13": "device mesh",
}
"""The drawing that stands for a chapter."""


def main() -> None:
    """Write each picture as SVG."""
    (DOCS / "pictures").mkdir(exist_ok=True)
    (DOCS / "map.svg").write_text(v3_map().svg(), encoding="utf-8")
    for chapter, name in PICTURES.items():
        (DOCS / "pictures" / f"{chapter}.svg").write_text(DRAWINGS[name]().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
