"""`torch.compile` of the layers for training: the small operations between matrix products become a few kernels.

Notable choices: each layer is compiled by itself, so that layers with the same code share one compiled function; the
names of the parameters, checkpoints and the training step stay as they are; evaluation runs without.
"""

import warnings

import torch

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
