"""Layers that multiply in FP8 as DeepSeek-V3 trains them, and a MiniDS made of them (FACTS.md section 5).

Notable choices:
- all three products of a layer read E4M3: its output, the gradient of its input, the gradient of its weight;
- parameters stay what and where they were, in float32: only the layer around them changes, so optimizers, checkpoints
  and exports notice nothing, and gradients add up in float32;
- what waits for the backward pass is the 8-bit tensors themselves, not what they were made of;
- the rounded operands are multiplied on the tensor cores of a GPU that knows FP8 and elsewhere in float32 (`fp8.gemm`
  bounds the difference); `MiniDS.precision_report` says which.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minids.model import fp8_cuda
from minids.model.fp8 import Rounded
from minids.model.moe import Experts

ALONG_CHANNELS, ALONG_TOKENS, BLOCK = (1, 128), (128, 1), (128, 128)


@dataclass(frozen=True)
class Casting:
    """Where V3's layers differ in how they round."""

    power_of_two: bool = False  # scales of the input; cutting its tiles anew then loses less
    cached_as: Literal["e4m3", "e5m6"] = "e4m3"  # the input, for the backward pass
    gradient_sent_in_fp8: bool = False  # of the output, in tiles along channels with powers of two


AFTER_ATTENTION = Casting(power_of_two=True, cached_as="e5m6")
DISPATCHED = Casting(power_of_two=True)  # what experts read: sent to them in FP8
COMBINED = Casting(gradient_sent_in_fp8=True)  # what experts write: in BF16, but its gradient comes back in FP8


class _Fp8Matmul(torch.autograd.Function):
    """x [rows, in] times weight [in, out]; with `load` times weight [experts, in, out], as `moe.grouped_matmul` does.

    Tiles lie along the dimension that a product sums over: channels in the first two, tokens in the third, for which
    the cached input is cut into tiles anew (PITFALLS 21).
    """

    @staticmethod
    def forward(ctx, x, weight, load, casting):
        weight = Rounded.of(weight, BLOCK)
        rounded = cached = Rounded.of(x, ALONG_CHANNELS, power_of_two=casting.power_of_two)
        if casting.cached_as != "e4m3":
            cached = Rounded.of(x, ALONG_CHANNELS, format=casting.cached_as, power_of_two=casting.power_of_two)
        ctx.save_for_backward(cached.q, cached.scale, weight.q, weight.scale)
        ctx.load, ctx.casting = load, casting
        return _multiply(rounded, weight, load).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x = Rounded(*ctx.saved_tensors[:2], ALONG_CHANNELS)
        weight = Rounded(*ctx.saved_tensors[2:], BLOCK)
        load, casting = ctx.load, ctx.casting
        grad_x = grad_weight = None
        if sent := casting.gradient_sent_in_fp8:
            grad = Rounded.of(grad, ALONG_CHANNELS, power_of_two=True).values()
        if ctx.needs_input_grad[0]:
            rounded = Rounded.of(grad, ALONG_CHANNELS, power_of_two=sent)  # a second time changes nothing
            grad_x = _multiply(rounded, weight.mT, load)
        if ctx.needs_input_grad[1]:
            x = x.values()
            if load is not None:
                slot, load = _begin_on_tiles(load)
                x, grad = (t.new_zeros(int(load.sum()), t.shape[1]).index_copy(0, slot, t) for t in (x, grad))
            x = Rounded.of(x, ALONG_TOKENS, power_of_two=casting.power_of_two)
            grad = Rounded.of(grad, ALONG_TOKENS, power_of_two=sent)
            grad_weight = _multiply(x.mT, grad, load)
        return grad_x, grad_weight, None, None


def _multiply(a: Rounded, b: Rounded, load: Int[Tensor, "experts"] | None) -> Float[Tensor, "..."]:
    """On tensor cores where there are such; else in float32, under autocast too: bfloat16 cannot hold the operands."""
    if fp8_cuda.kernel(a.q.device):
        return fp8_cuda.multiply(a, b) if load is None else fp8_cuda.multiply_grouped(a, b, load)
    with torch.autocast(a.q.device.type, enabled=False):
        a, b = a.values(), b.values()
        return a @ b if load is None else F.grouped_mm(a, b, offs=load.cumsum(0).to(torch.int32))


def _begin_on_tiles(load: Int[Tensor, "experts"]) -> tuple[Int[Tensor, "rows"], Int[Tensor, "experts"]]:
    """Where each row goes so that every expert's rows begin on a new tile of 128, and the loads with the gaps.

    Otherwise the tokens of two experts would share scales.
    """
    filled = (load + 127) // 128 * 128
    moved = (filled.cumsum(0) - filled) - (load.cumsum(0) - load)
    return torch.arange(int(load.sum()), device=load.device) + moved.repeat_interleave(load), filled


def _path(layer: nn.Module) -> str:
    kernel = fp8_cuda.kernel(next(layer.parameters()).device)
    return f"E4M3, on tensor cores ({kernel})" if kernel else "E4M3, emulated in float32"


class Fp8Linear(nn.Linear):
    """A linear layer without bias that multiplies in FP8."""

    casting: Casting
    computes_in = property(_path)  # for `MiniDS.precision_report`

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        out = _Fp8Matmul.apply(x.reshape(-1, self.in_features), self.weight.T, None, self.casting)
        return out.view(*x.shape[:-1], self.out_features)


class Fp8Experts(Experts):
    """The routed experts of a layer multiplying in FP8."""

    computes_in = property(_path)

    def multiply(self, rows, weights, load) -> Float[Tensor, "rows dim"]:
        gate, up, down = self.matrices()
        gate = _Fp8Matmul.apply(rows, gate, load, DISPATCHED)
        up = _Fp8Matmul.apply(rows, up, load, DISPATCHED)
        return _Fp8Matmul.apply(_Fp8SwiGLU.apply(gate, up, weights), down, load, COMBINED)

    def by_token(self, x, experts, weights) -> Float[Tensor, "tokens dim"]:
        """The same for few tokens: what the layer computes must not depend on how many there are."""
        load = torch.bincount(experts.flatten(), minlength=len(self.gate_proj))
        return self.by_expert(x, experts, weights, load)


class _Fp8SwiGLU(torch.autograd.Function):
    """silu(gate) * up * weight, with gate and up cached in FP8 and the rest computed again in the backward pass."""

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


IN_FP8 = {nn.Linear: Fp8Linear, Experts: Fp8Experts}


def in_fp8(layer: nn.Module, casting: Casting = Casting()) -> nn.Module:  # noqa: B008 - frozen
    """The layer itself, of the class that multiplies in FP8 from now on; `casting` is that of a linear layer."""
    layer.__class__, layer.casting = IN_FP8[type(layer)], casting
    return layer


def convert_to_fp8(model: nn.Module, where: Callable[[str], bool] = lambda name: True) -> None:
    """Make `model` multiply in FP8, in place: its linear layers and routed experts for which `where(name)` is true.

    Embedding, output head, gate, norms and the attention core keep their precision (FACTS.md section 5). Parameters
    keep their names and identity: layers change their class and nothing else. Raises `ValueError` if they are not
    float32, and then changes nothing.
    """
    named = model.named_modules()
    layers = {name: module for name, module in named if type(module) in IN_FP8 and name != "head" and where(name)}
    for weight in (weight for layer in layers.values() for weight in layer.parameters()):
        if torch.finfo(weight.dtype).bits < 32:
            raise ValueError(f"weights are {weight.dtype}: training in FP8 needs them in float32")
    for name, layer in layers.items():
        in_fp8(layer, AFTER_ATTENTION if name.endswith("attention.o_proj") else Casting())


def convert_from_fp8(model: nn.Module) -> None:
    """Undo `convert_to_fp8`, in place."""
    for layer in model.modules():
        for plain, converted in IN_FP8.items():
            if type(layer) is converted:
                layer.__class__ = plain
