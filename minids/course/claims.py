"""What became of chapter 00's claims: which the course computes, measures on small models, or only quotes."""

from pathlib import Path

COMPUTED, MEASURED, QUOTED = "computed", "measured", "quoted"
HOW = {  # the beginning of a claim in docs/CLAIMS.md: how it is supported here, and in which chapters
    "V3: 2048 H800, less than two months": (COMPUTED, "00, 13"),
    "Its 5.58 million exclude": (QUOTED, "00"),
    '"6 million" is pre-training alone': (COMPUTED, "00"),
    "R1's reinforcement learning cost": (COMPUTED, "00"),
    "Llama-3.1-405B took 16,000 H100": (COMPUTED, "00"),
    "V3 cost less than a tenth of GPT-4o": (QUOTED, "00"),
    "DeepSeek has about 50,000 Hopper GPUs": (QUOTED, "00"),
    "37 of 671 billion parameters": (COMPUTED, "00, 03"),
    "Every layer has 256 routed experts": (COMPUTED, "03"),
    "Balanced without auxiliary loss": (MEASURED, "03"),
    "Latent attention saves about 90 %": (COMPUTED, "00, 02"),
    "Its latents capture hidden meanings": (MEASURED, "02"),
    "Multi-token prediction predicts several": (MEASURED, "04"),
    "FP8 with FP16 and FP32": (QUOTED, "06"),
    "DualPipe switches to other data": (COMPUTED, "07"),
    "It gets round CUDA by writing PTX": (QUOTED, "08"),
    "R1-Zero is V3-Base with RL only": (QUOTED, "09, 10"),
    "R1's RL was for format and helpfulness": (MEASURED, "09"),
    "Distillation means training on logits": (MEASURED, "10"),
    "It is distilled from ChatGPT": (QUOTED, "none"),
}


def claims_table(path: Path) -> tuple[str, list[str]]:
    """Return a Markdown table of the claims of `HOW` with their verdicts in `path`, and how each is supported.

    Raises `ValueError` where a claim is not in the file exactly once.
    """
    rows = [line.strip("| \n").split(" | ") for line in path.read_text(encoding="utf-8").splitlines() if "|" in line]
    table = ["| claim (shortened) | verdict | here | chapters |", "|---|---|---|---|"]
    for beginning, (how, where) in HOW.items():
        found = [row for row in rows if row[0].startswith(beginning)]
        if len(found) != 1:
            raise ValueError(f"{path.name} has {len(found)} claims that begin with {beginning!r}: must be one")
        table.append(f"| {beginning} ... | {found[0][2]} | **{how}** | {where} |")
    return "\n".join(table), [how for how, _ in HOW.values()]
