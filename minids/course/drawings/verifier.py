"""DeepSeekMath-V2: a verifier scores a proof, and a meta-verifier judges the generator's evaluation of its proof."""

from minids.course.diagrams import Diagram

PROOF_WEIGHTS = 0.76, 0.24  # of the proof's score and of the self-evaluation


def verifier() -> Diagram:
    """Draw the reward of DeepSeekMath-V2's generator (FACTS.md section 10.2): its proof's score and its honesty."""
    of_proof, of_analysis = PROOF_WEIGHTS
    d = Diagram(17.2, 6.6, "The verifier scores the proof, the meta-verifier the generator's own evaluation of it")
    d.box("problem", 1.6, 3.3, "problem", "no known answer", "tensor", 2.4, 1.0)
    d.box("generator", 5.0, 3.3, "generator", "trained", "here", 2.6, 1.0)
    d.box("proof", 8.6, 4.9, "proof Y", "", "tensor", 2.6, 0.9)
    d.box("analysis", 8.6, 1.7, "self-evaluation Z", "with a score s'", "tensor", 3.2, 1.0)
    d.box("verifier", 12.4, 4.9, "verifier", "score 0, 0.5 or 1", "weight", 3.0, 1.0)
    d.box("meta", 12.4, 1.7, "meta-verifier", "are Z's faults real?", "weight", 3.0, 1.0)
    total = f"$R_{{format}}$ ({of_proof} $R_Y$ + {of_analysis} $R_Z$)"
    d.box("reward", 15.3, 3.3, "reward", total, "operation", 3.6, 1.2)
    d.arrow("problem", "generator")
    d.path([(6.3, 3.3), (6.8, 3.3), (6.8, 4.9), (7.3, 4.9)])
    d.path([(6.3, 3.3), (6.8, 3.3), (6.8, 1.7), (7.0, 1.7)])
    d.arrow("proof", "verifier")
    d.arrow("analysis", "meta")
    d.path([(13.9, 4.9), (15.3, 4.9), (15.3, 3.9)])
    d.path([(13.9, 1.7), (15.3, 1.7), (15.3, 2.7)])
    d.note(14.2, 5.25, "$R_Y$ = s")
    d.note(13.0, 0.7, "$R_Z$ = (1 − |s' − s|) · meta score")
    d.path([(12.4, 4.4), (12.4, 2.2)], dashed=True)
    d.note(12.55, 3.3, "s")
    d.note(0.4, 0.7, "s: the verifier's score. s': the score that the generator claims.")
    return d
