"""Four ways to teach a student: who writes the answers, and what the target of each token is."""

from minids.course.diagrams import Diagram

WAYS = (  # name, who writes the answer, what it is judged by, the loss
    ("RL", "student", "reward of the answer", "one number per answer", "policy gradient"),
    ("samples (SFT)", "teacher", "the sampled token", "one token of the vocabulary", "cross-entropy"),
    ("logits", "teacher", "teacher's distribution p", "all tokens of the vocabulary", "KL(p || q), forward"),
    ("on-policy", "student", "teacher's distribution p", "all tokens of the vocabulary", "KL(q || p), reverse"),
)


def distillation_ways() -> Diagram:
    """Draw RL and three kinds of distillation as rows: the writer of the answers, the target, the loss."""
    d = Diagram(17.2, 7.2, "Two questions separate the four ways: who writes the answers, and what is the target?")
    for x, words in ((4.4, "who writes the answer"), (9.3, "what judges it"), (14.6, "loss of the student q")):
        d.note(x, 6.75, words, align="center", strong=True)
    for i, (name, writer, target, size, loss) in enumerate(WAYS):
        y = 5.8 - 1.6 * i
        d.note(0.3, y, name, size=10)
        own = writer == "student"
        d.box(f"writer {i}", 4.4, y, writer, "its own prefixes" if own else "the teacher's prefixes",
              "here" if own else "weight", 3.4, 1.0)  # fmt: skip
        d.box(f"target {i}", 9.3, y, target, size, "cache" if "p" in target.split() else "tensor", 4.4, 1.0)
        d.box(f"loss {i}", 14.6, y, loss, "", "operation", 4.0, 0.9)
        d.arrow(f"writer {i}", f"target {i}")
        d.arrow(f"target {i}", f"loss {i}")
    return d
