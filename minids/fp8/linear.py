"""FP8 linear layers and experts as in DeepSeek-V3's training, and conversion of a MiniDS (FACTS.md section 5).

Notable choices:
- all three matrix products of a layer have E4M3 operands: output, input gradient and weight gradient;
- parameters stay the same FP32 tensors: only the layer changes, so optimizers, checkpoints and exports are unaffected,
  and gradients accumulate in FP32;
- the tensors cached for the backward pass are the FP8 tensors, not the originals;
- quantised operands are multiplied on tensor cores if the GPU supports FP8, else in FP32 (`fp8.gemm` bounds the
  difference); `MiniDS.precision_report` tells which.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minids.fp8 import cuda as fp8_cuda
from minids.fp8.formats import Rounded
from minids.model.moe import Experts

ALONG_CHANNELS, ALONG_TOKENS, BLOCK = (1, 128), (128, 1), (128, 128)


@dataclass(frozen=True)
class Casting:
    """Quantisation settings in which V3's layers differ."""

    power_of_two: bool = False  # scales of the input, which reduces the error of quantising it again along tokens
    cached_as: Literal["e4m3", "e5m6"] = "e4m3"  # format of the input cached for the backward pass
    gradient_sent_in_fp8: bool = False  # output gradient arrives in FP8, tiles along channels, scales powers of two


AFTER_ATTENTION = Casting(power_of_two=True, cached_as="e5m6")
DISPATCHED = Casting(power_of_two=True)  # input of experts: dispatched in FP8
COMBINED = Casting(gradient_sent_in_fp8=True)  # output of experts: combined in BF16, its gradient dispatched in FP8


class _Fp8Matmul(torch.autograd.Function):
    """x [rows, in] times weight [in, out], or [experts, in, out] with `tokens_per_expert` (as `moe.grouped_matmul`).

    Tiles run along the contraction dimension of each product: channels in the first two, tokens in the third, for
    which the cached input is quantised again (PITFALLS 21).
    """

    @staticmethod
    def forward(ctx, x, weight, tokens_per_expert, casting):
        weight = Rounded.of(weight, BLOCK)
        rounded = cached = Rounded.of(x, ALONG_CHANNELS, power_of_two=casting.power_of_two)
        if casting.cached_as != "e4m3":
            cached = Rounded.of(x, ALONG_CHANNELS, format=casting.cached_as, power_of_two=casting.power_of_two)
        ctx.save_for_backward(cached.q, cached.scale, weight.q, weight.scale)
        ctx.tokens_per_expert, ctx.casting = tokens_per_expert, casting
        return _multiply(rounded, weight, tokens_per_expert).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x = Rounded(*ctx.saved_tensors[:2], ALONG_CHANNELS)
        weight = Rounded(*ctx.saved_tensors[2:], BLOCK)
        tokens_per_expert, casting = ctx.tokens_per_expert, ctx.casting
        grad_x = grad_weight = None
        if sent := casting.gradient_sent_in_fp8:
            grad = Rounded.of(grad, ALONG_CHANNELS, power_of_two=True).values()
        if ctx.needs_input_grad[0]:
            rounded = Rounded.of(grad, ALONG_CHANNELS, power_of_two=sent)  # no further rounding if quantised above
            grad_x = _multiply(rounded, weight.mT, tokens_per_expert)
        if ctx.needs_input_grad[1]:
            x = x.values()
            if tokens_per_expert is not None:
                slot, tokens_per_expert = _begin_on_tiles(tokens_per_expert)
                x, grad = (
                    t.new_zeros(int(tokens_per_expert.sum()), t.shape[1]).index_copy(0, slot, t) for t in (x, grad)
                )
            x = Rounded.of(x, ALONG_TOKENS, power_of_two=casting.power_of_two)
            grad = Rounded.of(grad, ALONG_TOKENS, power_of_two=sent)
            grad_weight = _multiply(x.mT, grad, tokens_per_expert)
        return grad_x, grad_weight, None, None


def _multiply(a: Rounded, b: Rounded, tokens_per_expert: Int[Tensor, "experts"] | None) -> Float[Tensor, "..."]:
    """Multiply on FP8 tensor cores if available, else in FP32, also under autocast: BF16 cannot represent operands."""
    if fp8_cuda.kernel(a.q.device):
        return (
            fp8_cuda.multiply(a, b) if tokens_per_expert is None else fp8_cuda.multiply_grouped(a, b, tokens_per_expert)
        )
    with torch.autocast(a.q.device.type, enabled=False):
        left, right = a.values(), b.values()
        if tokens_per_expert is None:
            return left @ right
        m, n = left.shape[0], right.shape[-1]
        if any(width % 4 for width in (*right.shape[-2:], *(left.shape[:1] if right.ndim == 2 else ()))):
            left, right = _on_multiples_of_4(left), _on_multiples_of_4(right)  # rows of the kernel: 16 bytes, or more
        return F.grouped_mm(left, right, offs=tokens_per_expert.cumsum(0).to(torch.int32))[..., :m, :n]


def _on_multiples_of_4(x: Float[Tensor, "... rows cols"]) -> Float[Tensor, "... _ _"]:
    """Pad rows and columns with zeros."""
    return F.pad(x, (0, -x.shape[-1] % 4, 0, -x.shape[-2] % 4))


def _begin_on_tiles(tokens_per_expert: Int[Tensor, "experts"]) -> tuple[Int[Tensor, "rows"], Int[Tensor, "experts"]]:
    """Compute new row indices so that each expert's rows start at a tile of 128, and the padded rows per expert.

    Without padding, tokens of two experts would share scales.
    """
    filled = (tokens_per_expert + 127) // 128 * 128
    moved = (filled.cumsum(0) - filled) - (tokens_per_expert.cumsum(0) - tokens_per_expert)
    return torch.arange(int(tokens_per_expert.sum()), device=tokens_per_expert.device) + moved.repeat_interleave(
        tokens_per_expert
    ), filled


def _path(weight: Tensor) -> str:
    kernel = fp8_cuda.kernel(weight.device)
    return f"E4M3, on tensor cores ({kernel})" if kernel else "E4M3, emulated in float32"


class Fp8Linear(nn.Linear):
    """Linear layer without bias that multiplies in FP8; it uses the weight of the given layer."""

    def __init__(self, linear: nn.Linear, casting: Casting = Casting()):  # noqa: B008 - frozen
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.casting = linear.weight, casting
        self.train(linear.training)

    @property
    def computes_in(self) -> str:
        """Describe the precision, for `MiniDS.precision_report`."""
        return _path(self.weight)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        out = _Fp8Matmul.apply(x.reshape(-1, self.in_features), self.weight.T, None, self.casting)
        return out.view(*x.shape[:-1], self.out_features)


class Fp8SwiGLU:
    """Arithmetic of experts in FP8, a replacement of `moe.GroupedSwiGLU`."""

    def __call__(
        self,
        rows: Float[Tensor, "rows dim"],
        weights: Float[Tensor, "rows 1"],
        tokens_per_expert: Int[Tensor, "experts"],
        matrices: tuple[Tensor, Tensor, Tensor],
    ) -> Float[Tensor, "rows dim"]:
        gate, up, down = matrices
        gate = _Fp8Matmul.apply(rows, gate, tokens_per_expert, DISPATCHED)
        up = _Fp8Matmul.apply(rows, up, tokens_per_expert, DISPATCHED)
        return _Fp8Matmul.apply(_SwiGLUCachedInFp8.apply(gate, up, weights), down, tokens_per_expert, COMBINED)

    def computes_in(self, weight: Tensor) -> str:
        """Describe the precision, for `MiniDS.precision_report`."""
        return _path(weight)


class _SwiGLUCachedInFp8(torch.autograd.Function):
    """silu(gate) * up * weight, with gate and up cached in FP8 and the product recomputed in the backward pass."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        gate8, up8 = Rounded.of(gate, ALONG_CHANNELS), Rounded.of(up, ALONG_CHANNELS)
        ctx.save_for_backward(gate8.q, gate8.scale, up8.q, up8.scale, weight)
        return F.silu(gate) * up * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *cached, weight = ctx.saved_tensors
        gate, up = (Rounded(*pair, ALONG_CHANNELS).values() for pair in (cached[:2], cached[2:]))
        with torch.enable_grad():
            inputs = [tensor.to(grad.dtype).detach().requires_grad_() for tensor in (gate, up, weight)]
            return torch.autograd.grad(F.silu(inputs[0]) * inputs[1] * inputs[2], inputs, grad)


def convert_to_fp8(model: nn.Module, where: Callable[[str], bool] = lambda name: True) -> None:
    """Convert the linear layers and routed experts of `model` with true `where(name)` to FP8, in place.

    Embedding, output head, gate, norms and the attention core keep their precision (FACTS.md section 5). Parameters
    keep their names and identity: a linear layer is replaced by one with the same weight, experts get another
    arithmetic. Raises `ValueError` if their weights are not float32, and then changes nothing.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Experts) and name != "head" and where(name)
    }
    for weight in (weight for layer in layers.values() for weight in layer.parameters()):
        if torch.finfo(weight.dtype).bits < 32:
            raise ValueError(f"weights are {weight.dtype}: training in FP8 needs float32 weights")
    for name, layer in layers.items():
        if isinstance(layer, Experts):
            layer.arithmetic = Fp8SwiGLU()
        else:
            casting = AFTER_ATTENTION if name.endswith("attention.o_proj") else Casting()
            model.set_submodule(name, Fp8Linear(layer, casting))
