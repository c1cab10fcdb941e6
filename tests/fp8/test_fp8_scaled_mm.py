"""The FP8 product on tensor cores by PyTorch's scaled_mm: its demands, and agreement with the emulation."""

import math

import pytest
import torch
import torch.nn.functional as F
from fp8_layers import FORMS, close, expert_layer, fp8_linear
from fp8_reference import exact, matrix, per_element
from plain_model import build

from minids.fp8 import cuda as fp8_cuda
from minids.fp8.formats import Rounded
from minids.fp8.linear import convert_to_fp8


def library(a, b, a_scale, a_recipe, b_scale, b_recipe, output_dtype):
    """What PyTorch demands of a product with V3's scales, and the product by its definition, in float64."""
    (m, k), (_, n) = a.shape, b.shape
    ceil = math.ceil
    assert a.dtype == b.dtype == torch.float8_e4m3fn and output_dtype == torch.float32
    assert a.is_contiguous() and b.mT.is_contiguous() and m % 16 == k % 16 == n % 16 == 0
    assert a_recipe == F.ScalingType.BlockWise1x128 and a_scale.shape == (m, ceil(k / 128))
    in_rows = b_recipe == F.ScalingType.BlockWise1x128
    assert in_rows or b_recipe == F.ScalingType.BlockWise128x128
    assert b_scale.shape == ((n, ceil(k / 128)) if in_rows else (ceil(k / 512) * 4, ceil(n / 128)))
    for scale in (a_scale, b_scale):
        assert scale.dtype == torch.float32 and scale.stride(0) == 1
        assert scale.stride(1) == scale.shape[0] or scale.stride() == (1, 1) and scale.shape[1] == 1
    b_scales = b_scale.T if in_rows else b_scale[: ceil(k / 128)]
    b_values = b.double() * torch.tensor(per_element(b_scales, (128, 1 if in_rows else 128), (k, n)))
    return ((a.double() * torch.tensor(per_element(a_scale, (1, 128), (m, k)))) @ b_values).to(output_dtype)


@pytest.fixture
def tensor_cores(monkeypatch):
    """The path of a Hopper GPU, with PyTorch's kernel replaced by its definition."""
    monkeypatch.setattr(fp8_cuda.F, "scaled_mm", library)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    choose = fp8_cuda.kernel
    monkeypatch.setattr(fp8_cuda, "kernel", lambda _: choose(torch.device("cuda")))


@pytest.mark.parametrize("b_tile", [(128, 128), (128, 1)])
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (16, 128, 16), (130, 300, 200), (3, 640, 129), (0, 5, 3), (4, 0, 3)])
def test_the_product_on_tensor_cores_meets_the_demands_of_the_library_at_any_size(tensor_cores, m, k, n, b_tile):
    a, b = Rounded.of(matrix(m, k, seed=1), (1, 128)), Rounded.of(matrix(k, n, seed=2), b_tile)
    got = fp8_cuda.multiply(a, b)
    torch.testing.assert_close(got, (a.values().double() @ b.values().double()).float())


@pytest.mark.parametrize("casting", FORMS.values(), ids=FORMS)
def test_a_layer_on_tensor_cores_equals_the_emulated_one(tensor_cores, monkeypatch, casting):
    def products(x, weight):
        layer = fp8_linear(300, 200, casting)
        layer.weight.data, x = weight, x.clone().requires_grad_()
        out = layer(x)
        out.backward(matrix(70, 200, seed=3))
        return out, x.grad, layer.weight.grad

    x, weight = matrix(70, 300, seed=1), matrix(200, 300, seed=2)
    on_tensor_cores = products(x, weight)
    monkeypatch.setattr(fp8_cuda, "kernel", lambda *_: None)
    for got, want in zip(on_tensor_cores, products(x, weight), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4 * want.abs().max().item())


def test_experts_on_tensor_cores_equal_the_emulated_ones(tensor_cores, monkeypatch):
    results = []
    for on_tensor_cores in (True, False):
        if not on_tensor_cores:
            monkeypatch.setattr(fp8_cuda, "kernel", lambda *_: None)
        torch.manual_seed(0)
        _, layer, x, routing = expert_layer()
        out = layer(x, routing)
        out.backward(torch.ones_like(out))
        results.append([out, x.grad, *(p.grad for p in layer.parameters())])
    for got, want in zip(*results, strict=True):
        # sums in another order may put single values on the next E4M3 number
        assert ((got - want).abs() <= 3e-6 * want.abs().max()).double().mean() > 0.98
        close(got, want, 1e-3)


def test_the_report_names_the_path_of_each_layer(tensor_cores):
    model = build(dtype=torch.float32)
    convert_to_fp8(model)
    assert set(model.precision_report().values()) == {"float32", "E4M3, on tensor cores (scaled_mm)"}


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("rows", [256, 70])
def test_a_hopper_gpu_computes_what_the_emulation_does(rows):
    """The tensor core's own sums are narrower: the bound is that of `gemm`."""
    a, b = Rounded.of(matrix(rows, 1024, seed=1), (1, 128)), Rounded.of(matrix(1024, 384, seed=2), (128, 128))
    want, size = exact((a.q, a.scale), (b.q, b.scale))
    got = fp8_cuda.multiply(*(Rounded(x.q.cuda(), x.scale.cuda(), x.tile) for x in (a, b))).cpu().double()
    assert ((got - want).abs() <= (36 / 8192 + 2**-20) * size).all()
    layers = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        layer = fp8_linear(1024, 384).to(device)
        x = matrix(rows, 1024, seed=1).to(device).requires_grad_()
        layer(x).backward(matrix(rows, 384, seed=3).to(device))
        layers.append((layer.computes_in, [t.cpu() for t in (layer(x), x.grad, layer.weight.grad)]))
    assert [path for path, _ in layers] == ["E4M3, on tensor cores (scaled_mm)", "E4M3, emulated in float32"]
    for got, want in zip(layers[0][1], layers[1][1], strict=True):
        assert (got - want).norm() < 0.01 * want.norm()
