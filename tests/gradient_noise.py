"""A processor that rounds in its own way, imitated: every gradient moves by one unit in the last place, up or down.

What a training prints or asserts has to survive it, as it has to survive another processor. With the environment
variable MINIDS_GRADIENT_NOISE, a seed, every kernel that the tests start trains like this.
"""

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


def install(seed: int) -> torch.utils.hooks.RemovableHandle:
    """Disturb the gradients before every step of every optimizer of this process, until the handle is removed."""
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def disturb(optimizer: torch.optim.Optimizer, arguments: tuple, options: dict) -> None:
        for group in optimizer.param_groups:
            for gradient in (p.grad for p in group["params"] if p.grad is not None):
                up = torch.rand(gradient.shape, generator=generator) < 0.5
                towards = torch.where(up, torch.inf, -torch.inf).to(gradient)
                gradient.copy_(gradient.nextafter(towards))

    return register_optimizer_step_pre_hook(disturb)
