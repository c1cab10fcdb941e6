"""Base of the optimizers written out here: each parameter is updated by itself."""

import torch
from torch import Tensor, nn


class PerParameter(torch.optim.Optimizer):
    """An optimizer whose subclass says how one parameter changes, in `update`."""

    def update(self, p: nn.Parameter, grad: Tensor, state: dict, group: dict) -> None:
        """Change `p` in place by its gradient; `state` is kept with checkpoints and is empty at first."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # torch's also accepts a closure
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)
