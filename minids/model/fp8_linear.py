"""Layers that multiply in FP8 as DeepSeek-V3 trains them, and a MiniDS made of them (FACTS.md section 5).

Notable choices:
- all three products of a layer read E4M3: its output, the gradient of its input, the gradient of its weight;
- parameters stay what and where they were, in float32: only the layer around them changes, so optimizers, checkpoints
  and exports notice nothing, and gradients add up in float32;
- what waits for the backward pass is the 8-bit tensors themselves, not what they were made of;
- the rounded operands are multiplied in float32 on every device (`fp8.gemm` bounds what a tensor core adds to that).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minids.config import ModelConfig
from minids.model.fp8 import Tile, dequantize, quantize
from minids.model.moe import Experts
from minids.model.transformer import MiniDS

ALONG_CHANNELS, ALONG_TOKENS, BLOCK = (1, 128), (128, 1), (128, 128)


@dataclass(frozen=True)
class Casting:
    """Where V3's layers differ in how they round."""

    power_of_two: bool = False  # scales of the input; cutting its tiles anew then loses less
    cached_as: Literal["e4m3", "e5m6"] = "e4m3"  # the input, for the backward pass
    gradient_sent_in_fp8: bool = False  # of the output, in tiles along channels with powers of two
    gradient_tile: Tile = ALONG_CHANNELS  # of the input-gradient product; V3 diverged with (128, 128) (appendix B.2)


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
        weight = quantize(weight, BLOCK)
        rounded = cached = quantize(x, ALONG_CHANNELS, power_of_two=casting.power_of_two)
        if casting.cached_as != "e4m3":
            cached = quantize(x, ALONG_CHANNELS, format=casting.cached_as, power_of_two=casting.power_of_two)
        ctx.save_for_backward(*cached, *weight)
        ctx.load, ctx.casting = load, casting
        return _multiply(dequantize(*rounded, ALONG_CHANNELS), dequantize(*weight, BLOCK), load).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        load, casting = ctx.load, ctx.casting
        grad_x = grad_weight = None
        if sent := casting.gradient_sent_in_fp8:
            grad = _rounded(grad, ALONG_CHANNELS, power_of_two=True)
        if ctx.needs_input_grad[0]:
            rounded = _rounded(grad, casting.gradient_tile, power_of_two=sent)  # a second time changes nothing
            grad_x = _multiply(rounded, dequantize(weight, weight_scale, BLOCK).mT, load)
        if ctx.needs_input_grad[1]:
            x = dequantize(x, x_scale, ALONG_CHANNELS)
            if load is not None:
                slot, load = _begin_on_tiles(load)
                x, grad = (t.new_zeros(int(load.sum()), t.shape[1]).index_copy(0, slot, t) for t in (x, grad))
            x = _rounded(x, ALONG_TOKENS, power_of_two=casting.power_of_two)
            grad = _rounded(grad, ALONG_TOKENS, power_of_two=sent)
            grad_weight = _multiply(x.mT, grad, load)
        return grad_x, grad_weight, None, None


def _rounded(x: Float[Tensor, "rows cols"], tile: Tile, power_of_two: bool) -> Float[Tensor, "rows cols"]:
    return dequantize(*quantize(x, tile, power_of_two=power_of_two), tile)


def _multiply(a: Float[Tensor, "..."], b: Float[Tensor, "..."], load: Int[Tensor, "experts"] | None):
    """In float32 under autocast too: bfloat16 does not hold an E4M3 number times its scale."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b if load is None else F.grouped_mm(a, b, offs=load.cumsum(0).to(torch.int32))


def _begin_on_tiles(load: Int[Tensor, "experts"]) -> tuple[Int[Tensor, "rows"], Int[Tensor, "experts"]]:
    """Where each row goes so that every expert's rows begin on a new tile of 128, and the loads with the gaps.

    Otherwise the tokens of two experts would share scales.
    """
    filled = (load + 127) // 128 * 128
    moved = (filled.cumsum(0) - filled) - (load.cumsum(0) - load)
    return torch.arange(int(load.sum()), device=load.device) + moved.repeat_interleave(load), filled


class Fp8Linear(nn.Linear):
    """A linear layer without bias that multiplies in FP8. Takes over the weight of `linear`, which must be float32."""

    def __init__(self, linear: nn.Linear, casting: Casting):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        if linear.bias is not None:
            raise ValueError("a bias is not supported")
        self.weight, self.casting = _master(linear.weight), casting

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        out = _Fp8Matmul.apply(x.reshape(-1, self.in_features), self.weight.T, None, self.casting)
        return out.view(*x.shape[:-1], self.out_features)


class Fp8Experts(Experts):
    """The routed experts of a layer multiplying in FP8. Takes over the weights of `experts`, which must be float32."""

    def __init__(self, experts: Experts, config: ModelConfig, gradient_tile: Tile = ALONG_CHANNELS):
        with torch.device("meta"):
            super().__init__(config)
        for name, weight in experts.named_parameters():
            setattr(self, name, _master(weight))
        self.dispatched = replace(DISPATCHED, gradient_tile=gradient_tile)
        self.combined = replace(COMBINED, gradient_tile=gradient_tile)

    def by_expert(self, x, experts, weights, load) -> Float[Tensor, "tokens dim"]:
        order = experts.flatten().argsort(stable=True)
        rows = x.index_select(0, order // experts.shape[1])
        gate = _Fp8Matmul.apply(rows, self.gate_proj, load, self.dispatched)
        up = _Fp8Matmul.apply(rows, self.up_proj, load, self.dispatched)
        inner = _Fp8SwiGLU.apply(gate, up, weights.flatten().index_select(0, order)[:, None])
        out = _Fp8Matmul.apply(inner, self.down_proj, load, self.combined)
        return out.index_select(0, order.argsort()).view(*experts.shape, -1).sum(1)

    def by_token(self, x, experts, weights) -> Float[Tensor, "tokens dim"]:
        """The same for few tokens: what the layer computes must not depend on how many there are."""
        load = torch.bincount(experts.flatten(), minlength=len(self.gate_proj))
        return self.by_expert(x, experts, weights, load)


class _Fp8SwiGLU(torch.autograd.Function):
    """silu(gate) * up * weight, with gate and up cached in FP8 and the rest computed again in the backward pass."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(*quantize(gate, ALONG_CHANNELS), *quantize(up, ALONG_CHANNELS), weight)
        return F.silu(gate) * up * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *cached, weight = ctx.saved_tensors
        gate, up = dequantize(*cached[:2], ALONG_CHANNELS), dequantize(*cached[2:], ALONG_CHANNELS)
        with torch.enable_grad():
            inputs = [tensor.to(grad.dtype).detach().requires_grad_() for tensor in (gate, up, weight)]
            return torch.autograd.grad(F.silu(inputs[0]) * inputs[1] * inputs[2], inputs, grad)


def _master(weight: nn.Parameter) -> nn.Parameter:
    if torch.finfo(weight.dtype).bits < 32:
        raise ValueError(f"weights are {weight.dtype}: training in FP8 needs them in float32")
    return weight


def convert_to_fp8(
    model: MiniDS, where: Callable[[str], bool] = lambda name: True, gradient_tile: Tile = ALONG_CHANNELS
) -> None:
    """Make `model` multiply in FP8, in place: its linear layers and routed experts for which `where(name)` is true.

    Embedding, output head, gate, norms and the attention core keep their precision (FACTS.md section 5). Parameters
    keep their names and identity. Raises `ValueError` if they are not float32, and then changes nothing.
    """
    replacements = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not model.head and where(name):
            casting = AFTER_ATTENTION if name.endswith("attention.o_proj") else Casting()
            replacements[name] = Fp8Linear(module, replace(casting, gradient_tile=gradient_tile))
        elif type(module) is Experts and where(name):
            replacements[name] = Fp8Experts(module, model.config, gradient_tile)
    for name, layer in replacements.items():
        model.set_submodule(name, layer)


def convert_from_fp8(model: MiniDS) -> None:
    """Undo `convert_to_fp8`, in place."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, Fp8Linear | Fp8Experts):
            continue
        with torch.device("meta"):
            if isinstance(module, Fp8Linear):
                plain = nn.Linear(module.in_features, module.out_features, bias=False)
            else:
                plain = Experts(model.config)
        for parameter_name, parameter in module.named_parameters():
            setattr(plain, parameter_name, parameter)
        model.set_submodule(name, plain)


def precision_report(model: MiniDS) -> dict[str, str]:
    """In what every layer with parameters of its own computes, by the layer's name."""
    report = {}
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear | Fp8Experts):
            report[name] = "E4M3, emulated in float32"
        elif own := list(module.parameters(recurse=False)):
            report[name] = str(own[0].dtype).removeprefix("torch.")
    return report
