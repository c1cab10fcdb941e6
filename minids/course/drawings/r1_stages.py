"""R1's stages with their data, and its distillation into small models (FACTS.md sections 8.1 to 8.4)."""

from minids.course.diagrams import Diagram

AIME = {"R1-Zero": 77.9, "Dev1": 59.0, "Dev2": 74.0, "Dev3": 78.1, "R1": 79.8}  # pass@1, arXiv version 2, Table 3
STUDENTS = {  # AIME pass@1 (R1 version 1, Tables 5 and 6)
    "Qwen-1.5B": 28.9, "Qwen-7B": 55.5, "Llama-8B": 50.4, "Qwen-14B": 69.7, "Qwen-32B": 72.6, "Llama-70B": 70.0,
}  # fmt: skip
ZERO_32B = 47.0  # RL on Qwen2.5-32B, the same table


def r1_stages() -> Diagram:
    """Draw the models of R1's pipeline with AIME 2024 pass@1; dashed arrows carry data, solid ones train a model."""
    d = Diagram(17.2, 8.3, "R1: two rounds of SFT and RL, and the second round starts from the base again")
    d.box("base", 1.6, 4.6, "V3-Base", "671B", "weight", 2.4, 1.0)
    d.box("zero", 5.2, 7.2, "R1-Zero", f"AIME {AIME['R1-Zero']}", "weight", 2.5, 1.0)
    for name, words, x in (
        ("Dev1", "cold start (Dev1)", 5.5),
        ("Dev2", "reasoning RL (Dev2)", 9.5),
        ("R1", "R1", 15.8),
    ):
        d.box(name, x, 4.6, words, f"AIME {AIME[name]}", "weight", 2.4 if name == "R1" else 3.0, 1.0)
    d.box("Dev3", 11.9, 1.5, "rejection SFT (Dev3)", f"AIME {AIME['Dev3']}", "weight", 3.1, 1.0)
    d.path([(1.6, 5.1), (1.6, 7.2), (3.95, 7.2)])
    d.note(1.8, 6.5, "RL only,\n10,400 steps")
    d.arrow("base", "Dev1", "SFT")
    d.note(3.4, 3.65, "thousands of\nlong CoTs", align="center")
    d.arrow("Dev1", "Dev2", "RL")
    d.note(7.5, 3.65, "rewards: answer,\nform, language", align="center")
    d.box("data", 12.9, 4.6, "800K answers", "600K + 200K", "cache", 2.5, 1.0)
    d.arrow("Dev2", "data", dashed=True)
    d.note(9.3, 5.65, "rejection sampling: 600K reasoning\nanswers kept, 200K others added", strong=True)
    d.path([(12.9, 4.1), (12.9, 2.0)], dashed=True)
    d.path([(1.6, 4.1), (1.6, 1.5), (10.35, 1.5)])
    d.note(1.8, 1.85, "SFT of a fresh base, 2 to 3 epochs")
    d.path([(13.45, 1.5), (15.8, 1.5), (15.8, 4.1)])
    d.note(13.6, 0.9, "RL, 1,700 steps:\nall kinds of prompts")
    d.note(0.4, 0.4, "AIME 2024, pass@1 (%). Solid: trains a model. Dashed: carries data.")
    return d


def distillation() -> Diagram:
    """Draw the distillation of R1 into six small models, beside RL on the 32B one."""
    student = STUDENTS["Qwen-32B"]
    d = Diagram(17.2, 6.6, f"R1's answers teach a 32B model more than RL on it does: {student} against {ZERO_32B}")
    d.box("R1", 1.9, 4.4, "R1", f"AIME {AIME['R1']}", "weight", 2.6, 1.0)
    d.box("data", 6.0, 4.4, "800K answers", "text, no logits", "cache", 3.0, 1.0)
    d.arrow("R1", "data", dashed=True)
    d.note(3.85, 5.2, "writes", align="center")
    d.frame(9.4, 2.5, 17.0, 6.3, "SFT only: AIME 2024, pass@1 (%)")
    for i, (name, score) in enumerate(STUDENTS.items()):
        x, y = 10.7 + 2.5 * (i % 3), 5.0 - 1.5 * (i // 3)
        d.box(name, x, y, name, f"{score}", "here" if name == "Qwen-32B" else "weight", 2.2, 1.0)
    d.path([(7.5, 4.4), (9.4, 4.4)], dashed=True)
    d.box("base", 1.9, 1.2, "Qwen2.5-32B", "base", "weight", 2.6, 1.0)
    d.box("32B", 13.2, 1.2, "Qwen-32B, by RL", f"{ZERO_32B}", "here", 3.4, 1.0)
    d.arrow("base", "32B", "RL as for R1-Zero, more than 10,000 steps")
    return d
