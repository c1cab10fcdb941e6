"""Settings of reinforcement learning."""

from dataclasses import dataclass

from minids.config import Fraction, check_fields, require
from minids.reasoning.grpo import Averaging
from minids.reasoning.off_policy import Ratio


@dataclass(frozen=True)
class RLRecipe:
    """Settings of a GRPO run. The defaults train the base model of `r1_zero.py` in one or two minutes.

    `averaging`, `ratio`, `scale_by_std`, the clips, `kl_weight`, `unbiased_kl` and `off_policy_threshold` are
    parameters of `grpo_loss`; `grpo.VARIANTS` has their values in each published variant. By default a batch of answers
    has one update, so that every importance ratio is 1 and no clip acts. Raises `ValueError` for settings that cannot
    be, and for those that cannot act.
    """

    steps: int = 60
    """Steps of the run; each samples answers and updates the model `mini_batches` * `inner_epochs` times."""
    prompts: int = 16
    """Problems per step; more reduce the noise of the gradient."""
    group_size: int = 16
    """Answers sampled per problem, which are compared with each other; at least 2."""
    learning_rate: float = 3e-4
    """Learning rate after warm-up; lower it if training becomes unstable."""
    warmup_steps: int = 5
    """Steps of linear warm-up to the learning rate."""
    clip_norm: float = 1.0
    """Maximum of the global gradient norm; larger gradients are scaled down to it."""
    temperature: float = 1.0
    """Sampling temperature; higher values explore more."""
    max_new_tokens: int = 72
    """Maximum length of an answer, in tokens; raise it if answers are cut off."""
    top_p: Fraction = 1.0
    """Nucleus of sampling; below 1, training keeps the tokens among which each was drawn (V3.2). Evaluation has 1."""
    keep_routing: bool = False
    """Train every answer with the experts that were chosen while it was sampled (V3.2)."""
    mini_batches: int = 1
    """Parts of a batch of answers, in whole groups; each has its own update (R1-Zero: 16). The first has ratio 1."""
    inner_epochs: int = 1
    """Passes over the mini-batches of a batch; one more is off-policy like a further mini-batch (R1-Zero: 1)."""
    averaging: Averaging = "token"
    """Weights of the tokens in the loss: mean per sequence (GRPO), mean over all tokens (DAPO), constant (Dr. GRPO)."""
    ratio: Ratio = "token"
    """Importance ratio: of each token (GRPO), their mean in a sequence (GSPO), or their product (R1 eq. 1)."""
    scale_by_std: bool = True
    """Divide advantages by the standard deviation of the group's rewards; off in Dr. GRPO."""
    clip_low: float = 0.2
    """The importance ratio is clipped below 1 - clip_low; no clip acts in the first update on a batch."""
    clip_high: float = 0.2
    """The importance ratio is clipped above 1 + clip_high; a higher value permits more exploration (DAPO: 0.28)."""
    kl_weight: float = 0.0
    """Weight of the KL penalty to the reference policy; 0 trains without a reference model."""
    unbiased_kl: bool = False
    """Multiply the KL penalty by the importance ratio, for an unbiased gradient (V3.2)."""
    off_policy_threshold: float | None = None
    """Leave out answers of negative advantage with a mean of log(old / new) above this (V3.2; unpublished: try 0.1)."""
    refresh_reference_every: int = 400
    """Steps after which the reference policy is replaced by the current one (FACTS.md section 8.1)."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal by new groups, up to three times (DAPO)."""
    balance_speed: float = 0.0
    """Change of a router bias per step toward balanced load; 0 freezes the biases."""
    micro_batch_size: int = 64
    """Answers per forward and backward pass; lower it if memory runs out."""
    max_cache_bytes: int = 2**28
    """Maximum size of the KV cache in sampling, in bytes; larger batches are split."""
    seed: int = 0
    """Seed of the problems and of the sampled answers."""
    evaluate_every: int = 20
    """Steps between evaluations on held-out problems."""
    evaluation_problems: int = 240
    """Held-out problems per evaluation, at least 2; more give a less noisy value."""
    evaluation_samples: int = 4
    """Answers per held-out problem: the k of pass@k."""
    checkpoint_every: int = 20
    """Steps between checkpoints, of which the newest two are kept."""

    def __post_init__(self):
        check_fields(self, may_be_zero=("warmup_steps", "clip_low", "clip_high", "kl_weight", "balance_speed", "seed"))
        require(self.group_size >= 2, "group_size", self.group_size, "must be at least 2")
        require(self.evaluation_problems >= 2, "evaluation_problems", self.evaluation_problems, "must be at least 2")
        rule = f"must divide prompts={self.prompts}, because a mini-batch holds whole groups"
        require(self.prompts % self.mini_batches == 0, "mini_batches", self.mini_batches, rule)
        require(not self.unbiased_kl or self.kl_weight > 0, "unbiased_kl", True, "needs kl_weight above 0")
        if self.updates == 1:  # every importance ratio is 1
            rule = "acts from the second update on a batch of answers; set mini_batches above 1 (GSPO: 4, R1-Zero: 16)"
            require(self.ratio != "sequence", "ratio", self.ratio, rule)
            require(self.off_policy_threshold is None, "off_policy_threshold", self.off_policy_threshold, rule)

    @property
    def updates(self) -> int:
        """Updates of the model per batch of answers."""
        return self.mini_batches * self.inner_epochs
