"""R1's stages with their data, and its distillation into small models (FACTS.md sections 8.1 to 8.4)."""

from minids.course.diagrams import Diagram

AIME = {"R1-Zero": 77.9, "Dev1": 59.0, "Dev2": 74.0, "Dev3": 78.1, "R1": 79.8}  # pass@1, arXiv version 2, Table 3
STUDENTS = {  # AIME pass@1 (R1 version 1, Tables 5 and 6)
    "Qwen-1.5B": 28.9, "Qwen-7B": 55.5, "Llama-8B": 50.4, "Qwen-14B": 69.7, "Qwen-32B": 72.6, "Llama-70B": 70.0,
}  # fmt: skip
ZERO_32B = 47.0  # RL on Qwen2.5-32B, the same table


def r1_stages() -> Diagram:
    """Draw the models of R1's pipeline with AIME 2024 pass@1; dashed arrows carry data, solid ones train a model."""
    d = Diagram(17.2, 9.4, "R1: two rounds of SFT and RL, and the second round starts from the base again")
    d.box("base", 1.6, 5.3, "V3-Base", "671B", "weight", 2.4, 1.0)
    d.box("zero", 6.0, 8.3, "R1-Zero", f"AIME {AIME['R1-Zero']}", "weight", 3.0, 1.0)
    for name, words, x in (
        ("Dev1", "cold start (Dev1)", 6.0),
        ("Dev2", "reasoning RL (Dev2)", 10.6),
        ("R1", "R1", 15.8),
    ):
        d.box(name, x, 5.3, words, f"AIME {AIME[name]}", "weight", 2.4 if name == "R1" else 3.0, 1.0)
    d.box("Dev3", 10.6, 1.3, "rejection SFT (Dev3)", f"AIME {AIME['Dev3']}", "weight", 3.1, 1.0)
    d.path([(1.6, 5.8), (1.6, 8.3), (4.5, 8.3)])
    d.note(1.8, 7.1, "RL, 10,400 steps of 512 answers;\nreward: answer + format, by rule")
    d.arrow("base", "Dev1", "SFT")
    d.note(3.7, 4.3, "thousands of long\nworked solutions", align="center")
    d.arrow("Dev1", "Dev2", "RL")
    d.note(8.3, 4.3, "rewards by rule, and\nfor the language", align="center")
    d.box("data", 10.6, 3.2, "804,745 answers", "5,355 tokens each", "cache", 3.3, 1.0)
    d.arrow("Dev2", "data", dashed=True)
    accepted = "about 600K accepted\nreasoning answers, and\nabout 200K others"
    d.note(12.5, 3.2, accepted, strong=True)
    d.arrow("data", "Dev3", dashed=True)
    d.path([(1.6, 4.8), (1.6, 1.3), (9.05, 1.3)])
    d.note(1.8, 1.65, "SFT of the base itself, 2 to 3 epochs")
    d.path([(12.15, 1.3), (15.8, 1.3), (15.8, 4.8)])
    d.note(12.3, 0.65, "RL, 1,700 steps: all kinds of prompts;\nreward models in the last 400 only")
    d.note(0.4, 0.4, "AIME 2024, pass@1 (%). Solid: trains a model. Dashed: carries data.")
    return d


def distillation() -> Diagram:
    """Draw the distillation of the 800K answers into six small models, beside RL on the 32B one."""
    student = STUDENTS["Qwen-32B"]
    d = Diagram(17.2, 6.6, f"R1's data teach a 32B model more than RL on it does: {student} against {ZERO_32B}")
    d.box("data", 1.9, 4.4, "804,745 answers", "text, no logits", "cache", 3.2, 1.0)
    d.box("R1", 7.2, 5.6, "R1", f"AIME {AIME['R1']}", "weight", 2.6, 1.0)
    d.path([(3.5, 4.65), (4.1, 4.65), (4.1, 5.6), (5.9, 5.6)], dashed=True)
    d.note(4.3, 4.85, "SFT of V3-Base (671B), then RL")
    d.frame(9.4, 2.5, 17.0, 6.3, "SFT only: AIME 2024, pass@1 (%)")
    for i, (name, score) in enumerate(STUDENTS.items()):
        x, y = 10.7 + 2.5 * (i % 3), 5.0 - 1.5 * (i // 3)
        d.box(name, x, y, name, f"{score}", "here" if name == "Qwen-32B" else "weight", 2.2, 1.0)
    d.path([(3.5, 4.1), (9.4, 4.1)], dashed=True)
    d.note(4.3, 3.8, "the same data, smaller open models")
    d.box("base", 1.9, 1.2, "Qwen2.5-32B", "base", "weight", 2.6, 1.0)
    d.box("32B", 13.2, 1.2, "Qwen-32B, by RL", f"{ZERO_32B}", "here", 3.4, 1.0)
    d.arrow("base", "32B", "RL as for R1-Zero, more than 10,000 steps")
    return d
