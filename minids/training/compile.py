"""`torch.compile` of the layers for training: the small operations between matrix products become a few kernels.

Notable choices: each layer is compiled by itself, so that layers with the same code share one compiled function; the
names of the parameters, checkpoints and the training step stay as they are; evaluation runs without; the first step
is compared with a plain one, because PyTorch's cache may hold code of another processor, which gives NaN.
"""

import math
import os
import warnings
from collections.abc import Callable

import torch
from torch.nn.utils import get_total_norm

from minids.model.transformer import MiniDS


def compile_layers(model: MiniDS, precision: str = "fp32") -> None:
    """Have the first training step compile the layers of `model`, which takes about a minute.

    Raises `ValueError` for FP8 on a CPU, whose emulation does not compile, and where no C++ compiler works.
    """
    if precision == "fp8":
        raise ValueError("compile: not possible with precision='fp8'; use fp32 or bf16")
    try:
        torch.compile(torch.neg)(torch.zeros(1))
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0][:150]
        raise ValueError(f"compile: the C++ compiler failed ({reason}); install g++ or set CXX") from None
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex operators")
    for layer in (*model.layers, *(module.block for module in model.mtp)):
        layer.compile(dynamic=False)


def check_compiled(model: MiniDS, backward: Callable[[], float]) -> None:
    """Compare the compiled layers with plain ones: the loss that `backward` returns, and the norm of its gradients.

    Raises `ValueError` where they differ by more than 1 %.
    """
    found = []
    for stance in ("force_eager", "default"):
        with torch.compiler.set_stance(stance):
            loss = backward()
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        found.append((loss, norm))
        model.zero_grad()
    if not all(math.isclose(plain, compiled, rel_tol=0.01) for plain, compiled in zip(*found, strict=True)):
        (plain, _), (compiled, _) = found
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torchinductor_* in the temporary folder")
        raise ValueError(
            f"compile: wrong results (loss {compiled:.4g}, not {plain:.4g}); delete PyTorch's cache, {cache}"
        )
