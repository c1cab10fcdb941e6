"""The loop of reinforcement learning in R1-Zero, and PPO beside GRPO."""

import torch

from minids import cost
from minids.config import ModelConfig
from minids.course.diagrams import Diagram
from minids.reasoning.grpo import group_advantages


def rl_loop(rewards: tuple[float, ...] = (0, 1, 0, 0)) -> Diagram:
    """Draw one step of GRPO; the advantages are those of a group with these rewards (V3 eq. 26 to 28)."""
    advantages = group_advantages(torch.tensor([rewards], dtype=torch.float64))[0].tolist()
    d = Diagram(17.2, 8.2, "One RL step: what beats its own group becomes more probable")
    # groups of 16 and a reference replaced every 400 steps: FACTS.md section 8.1
    d.frame(4.3, 2.6, 13.1, 7.9, f"one group: {len(rewards)} answers to the same question (R1-Zero: 16)")
    d.box("policy", 2.0, 4.9, "policy $\\pi$", "trained", "weight", 2.4, 1.0)
    d.box("question", 2.0, 7.2, "question", "", "tensor", 2.4, 0.7)
    heights = [6.65 - 1.05 * i for i in range(len(rewards))]
    for i, (y, reward, advantage) in enumerate(zip(heights, rewards, advantages, strict=True), start=1):
        d.box(f"o{i}", 5.9, y, f"answer {i}", "", "tensor", 2.2, 0.7)
        d.box(f"r{i}", 8.8, y, f"{reward:g}", "", "tensor", 1.3, 0.7)
        d.box(f"A{i}", 11.7, y, f"{advantage:+.1f}", "", "cache" if advantage > 0 else "tensor", 1.5, 0.7)
        d.arrow(f"o{i}", f"r{i}")
        d.arrow(f"r{i}", f"A{i}")
    for x, words in ((5.9, "1  sample"), (8.8, "2  score by rule"), (11.7, "3  $A = (r -$ mean$)\\,/\\,$std")):
        d.note(x, 7.3, words, align="center")
    d.box("loss", 15.2, 4.9, "4  loss", "clipped ratio × A", "operation", 3.2, 1.0)
    d.box("reference", 15.2, 7.2, "reference policy", "replaced every 400 steps", "idle", 3.2, 0.9)
    d.box("step", 8.7, 1.1, "5  gradient, optimizer step", "", "operation", 5.2, 0.8)
    d.arrow("question", "policy")
    d.path([(3.2, 4.9), (4.3, 4.9)])
    d.path([(13.1, 4.9), (13.6, 4.9)])
    d.arrow("reference", "loss", "+ β KL penalty", dashed=True)
    d.path([(15.2, 4.4), (15.2, 1.1), (11.3, 1.1)])
    d.path([(6.1, 1.1), (2.0, 1.1), (2.0, 4.4)])
    d.note(2.2, 2.1, "more like answer " + str(advantages.index(max(advantages)) + 1), strong=True)
    return d


def ppo_and_grpo(config: ModelConfig | None = None) -> Diagram:
    """Draw PPO and GRPO side by side (DeepSeekMath, figure 4); a critic has the policy's size.

    The critic reads the question: a baseline must not depend on the answer that it judges.
    """
    size = cost.num_parameters(config or ModelConfig.preset("v3"))
    d = Diagram(17.2, 8.4, "GRPO drops PPO's critic: the baseline is the mean of the group")
    for left, name in ((0.2, "PPO"), (8.8, "GRPO")):
        d.frame(left, 0.2, left + 8.2, 8.1, name)
    d.box("ppo policy", 2.3, 1.0, "policy", "trained", "weight", 2.6, 0.9)
    d.box("ppo question", 6.2, 1.0, "question", "", "tensor", 2.4, 0.7)
    d.box("ppo answer", 2.3, 2.9, "one answer", "", "tensor", 2.6, 0.7)
    d.box("ppo reward", 2.3, 4.9, "reward", "", "operation", 2.4, 0.9)
    d.box("critic", 6.2, 4.9, "critic", f"trained, {size / 1e9:.0f}B", "cache", 3.2, 0.9)
    d.box("ppo A", 4.3, 7.1, "advantage", "reward − critic's value", "tensor", 4.8, 0.9)
    d.arrow("ppo policy", "ppo answer")
    d.arrow("ppo answer", "ppo reward")
    d.path([(5.0, 1.0), (3.6, 1.0)])
    d.arrow("ppo question", "critic")
    d.arrow("ppo reward", "ppo A", "r", at=2.3)
    d.arrow("critic", "ppo A", "predicted reward", at=6.2)
    d.box("policy", 11.3, 1.0, "policy", "trained", "weight", 2.6, 0.9)
    d.box("question", 15.2, 1.0, "question", "", "tensor", 2.4, 0.7)
    d.path([(14.0, 1.0), (12.6, 1.0)])
    places = [10.3, 11.9, 13.9, 15.5]
    for x, number in zip(places, ("1", "2", "3", "G"), strict=True):
        d.box(f"o{number}", x, 2.9, f"answer {number}", "", "tensor", 1.5, 0.7)
        d.box(f"r{number}", x, 4.5, f"$r_{number}$", "", "tensor", 1.0, 0.7)
        d.arrow("policy", f"o{number}", bend=1.9)
        d.arrow(f"o{number}", f"r{number}")
        d.path([(x, 4.85), (x, 5.4)])
    d.note(14.7, 4.5, "...", align="center")
    d.box("mean", 12.9, 5.8, "mean of the group", "no network", "operation", 6.8, 0.8)
    d.box("A", 12.9, 7.3, "advantages", "$r_i$ − mean, / std", "tensor", 4.4, 0.8)
    d.arrow("mean", "A")
    return d
