"""TRL's own GRPO loss, called on a stand-in for its trainer, so that no model has to be made."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

LOSS_TYPES = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}


def trl_loss(
    logp, old, ref, advantages, mask, *, averaging, ratio, kl_weight, clip_low=0.2, clip_high=0.2, max_length=9,
    unbiased_kl=False, off_policy_threshold=None,
):  # fmt: skip
    """Return the loss and the metrics that TRL logs."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    accelerator = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=False
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp, torch.zeros_like(logp), None),
        _metrics=defaultdict(lambda: defaultdict(list)), _entropy_bonus_enabled=False, accelerator=accelerator,
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=off_policy_threshold,
        get_off_policy_mask=grpo_trainer.GRPOTrainer.get_off_policy_mask, use_vllm=False,
        importance_sampling_level=ratio, beta=kl_weight, model=SimpleNamespace(training=False),
        epsilon_low=clip_low, epsilon_high=clip_high, max_completion_length=max_length,
        loss_type=LOSS_TYPES[averaging], args=SimpleNamespace(use_bias_correction_kl=unbiased_kl, delta=None),
    )  # fmt: skip
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = dict(
        prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=mask.long(), advantages=advantages,
        old_per_token_logps=old, ref_per_token_logps=ref, num_items_in_batch=mask.sum(),
    )  # fmt: skip
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["eval"]
