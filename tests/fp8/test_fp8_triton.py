"""The Triton kernel without a GPU: run by Triton's interpreter, and compiled for the GPUs it is meant for.

The interpreter widens E4M3 to float16, which holds all of its numbers (its NaN comes out as 480), and multiplies in
float32: indices, masks, strides, scales and the order of sums are tested, the width of a tensor core's register is not.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from fp8_layers import FORMS, expert_layer, fp8_linear
from fp8_reference import exact, matrix
from jaxtyping import install_import_hook

from minids.fp8 import cuda as fp8_cuda
from minids.fp8.formats import Rounded
from minids.fp8.gemm import gemm

pytest.importorskip("triton")

B_TILES = [(128, 128), (128, 1)]
SIZES = [(1, 1, 1), (1, 256, 64), (130, 300, 200), (3, 640, 129), (257, 127, 65), (0, 5, 3), (4, 0, 3), (4, 300, 0)]
VIEWS = [(False, False), (False, True), (True, False)]  # of a, of b: as V3's three products read them


@pytest.fixture(scope="module")
def interpreted():
    """Calls a function in a process whose kernels run on the CPU: Triton decides that once, when it is imported."""
    hook = install_import_hook, (["minids.fp8"], "shapes.check")
    with ProcessPoolExecutor(1, get_context("spawn"), *hook) as process:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            process.submit(bool).result()
        yield lambda function, *args: process.submit(function, *args).result()


def operands(m, k, n, b_tile, views=(False, False)):
    """Neighbouring tiles differ by powers of ten; a view is the transpose of a matrix that was rounded as such."""
    made = []
    for (rows, cols), tile, view, seed in zip(((m, k), (k, n)), ((1, 128), b_tile), views, (1, 2), strict=True):
        size = 10.0 ** torch.randint(-3, 4, (-(-rows // 128), -(-cols // 128)), generator=torch.manual_seed(seed))
        x = matrix(rows, cols, seed=seed) * size.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
        made.append(Rounded.of(x.T, tile[::-1]).mT if view else Rounded.of(x, tile))
    return made


def check_product(m, k, n, b_tile, views):
    a, b = operands(m, k, n, b_tile, views)
    fp8_cuda.kernel = lambda device: "Triton"
    got = fp8_cuda.multiply(a, b)
    want, size = exact(a[:2], b[:2], b_tile)
    # float32 rounds 127 additions in a block, two multiplications by scales and the addition of each block
    bound = (127 + 2 + -(-k // 128)) * 2.0**-24 * size
    assert got.dtype == torch.float32 and got.shape == (m, n) and ((got - want).abs() <= bound).all()
    assert (
        (got - a.values() @ b.values()).abs() <= 2 * bound + k * 2.0**-24 * size
    ).all()  # the emulation's plain path
    promoted = gemm(a[:2], b[:2], accumulator_bits=24)
    assert ((got - promoted).abs() <= bound + 37 * 2.0**-23 * size).all()


@pytest.mark.parametrize("b_tile", B_TILES)
@pytest.mark.parametrize("m, k, n", SIZES)
@pytest.mark.parametrize("views", VIEWS)
def test_the_kernel_equals_the_emulation_at_any_size(interpreted, m, k, n, b_tile, views):
    interpreted(check_product, m, k, n, b_tile, views)


def check_addresses(m, k, n, b_tile):
    from triton.runtime.interpreter import interpreter_builder as builder

    from minids.fp8 import triton as fp8_triton

    read, written = set(), []
    load = builder.create_masked_load

    def watched_load(pointers, mask, *rest):
        read.update(pointers.data[mask.data].tolist())
        return load(pointers, mask, *rest)

    def watched_store(pointers, value, mask, *rest):  # and nothing is stored, where it may not belong
        written.extend(pointers.data[mask.data].tolist())

    def addresses(x):
        return {x.data_ptr() + i * x.element_size() for i in range(x.numel())}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        a, b = operands(m, k, n, b_tile)
        out = fp8_triton.multiply(a, b)
    assert read == set().union(*map(addresses, (a.q, a.scale, b.q, b.scale)))
    assert len(written) == m * n and set(written) == addresses(out)


@pytest.mark.parametrize("b_tile", B_TILES)
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (130, 300, 200)])
def test_the_kernel_touches_its_operands_and_nothing_beside(interpreted, m, k, n, b_tile):
    interpreted(check_addresses, m, k, n, b_tile)


def by_triton_and_emulated(make, *args):
    """Output and gradients that `make` returns, and the same without the kernel; and the path that the report names."""
    results = []
    for path in ("Triton", None):
        fp8_cuda.kernel = lambda device, path=path: path
        torch.manual_seed(0)
        layer, tensors = make(*args)
        results.append((layer.computes_in, [t.detach().numpy() for t in tensors]))
    (path, got), (_, want) = results
    return path, [(torch.tensor(x) - torch.tensor(y)).abs() / abs(y).max() for x, y in zip(got, want, strict=True)]


def linear(casting):
    layer, x = fp8_linear(300, 200, casting), matrix(70, 300, seed=1).requires_grad_()
    out = layer(x)
    out.backward(matrix(70, 200, seed=3))
    return layer, [out, x.grad, layer.weight.grad]


def experts():
    _, layer, x, routing = expert_layer()
    out = layer(x, routing)
    out.backward(torch.ones_like(out))
    return layer, [out, x.grad, *(weight.grad for weight in layer.parameters())]


@pytest.mark.parametrize("casting", FORMS.values(), ids=FORMS)
def test_a_layer_equals_the_emulated_one(interpreted, casting):
    path, differences = interpreted(by_triton_and_emulated, linear, casting)
    assert path == "E4M3, on tensor cores (Triton)"
    assert len(differences) == 3 and all(off.max() < 3e-6 for off in differences)


def test_experts_equal_the_emulated_ones(interpreted):
    path, differences = interpreted(by_triton_and_emulated, experts)
    assert path == "E4M3, on tensor cores (Triton)" and len(differences) == 5
    for off in differences:
        # sums in another order may put single values on the next E4M3 number
        assert off.max() < 1e-3 and (off <= 3e-6).double().mean() > 0.98


@pytest.mark.parametrize("capability, columns_per_scale", [(89, 128), (100, 1), (120, 128)])
def test_the_kernel_compiles_to_products_in_fp8(monkeypatch, tmp_path, capability, columns_per_scale):
    """For operands whose rows begin at multiples of 16 bytes: then most of shared memory is used."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minids.fp8 import triton as fp8_triton

    names = fp8_triton._promoted.arg_names
    constants = dict(zip(names[-3:], (columns_per_scale, fp8_triton.ROWS, fp8_triton.COLS), strict=True))
    constants |= {"a_row": 4096, "a_col": 1, "b_row": 1, "b_col": 4096}
    types = dict.fromkeys(names, "i32") | dict.fromkeys(("a", "b"), "*fp8e4nv")
    types |= dict.fromkeys(("a_scale", "b_scale", "out"), "*fp32") | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names[:8])}
    source = ASTSource(fp8_triton._promoted, types, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    in_fp8 = {89: ".f32.e4m3.e4m3.f32", 100: "kind::f8f6f4", 120: ".f32.e4m3.e4m3.f32"}[capability]
    products = [line for line in compiled.asm["ptx"].splitlines() if "mma." in line and "%" in line]
    assert any(in_fp8 in line for line in products) and ".f16.f16" not in "".join(products)
    assert compiled.asm["cubin"] and compiled.metadata.shared <= 99 * 1024  # all that a block has on 8.9 and 12.0


def needs_fp8(test):
    there = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    return pytest.mark.gpu(pytest.mark.skipif(not there, reason="needs a GPU of compute capability 8.9")(test))


@needs_fp8
@pytest.mark.parametrize("b_tile", B_TILES)
@pytest.mark.parametrize("m, k, n", [*SIZES[:5], (256, 4096, 384)])
@pytest.mark.parametrize("views", VIEWS)
def test_a_gpu_computes_what_the_emulation_does(m, k, n, b_tile, views):
    """The tensor core's own sums are narrower: the bound is that of `gemm`."""
    from minids.fp8 import triton as fp8_triton

    a, b = operands(m, k, n, b_tile, views)
    got = fp8_triton.multiply(*(Rounded(x.q.cuda(), x.scale.cuda(), x.tile) for x in (a, b))).cpu()
    want, size = exact(a[:2], b[:2], b_tile)
    assert ((got - want).abs() <= (36 / 8192 + (k // 128 + 4) * 2.0**-24) * size).all()


@needs_fp8
def test_a_layer_on_a_gpu_computes_what_the_emulated_one_does(monkeypatch):
    choose = fp8_cuda.kernel
    monkeypatch.setattr(fp8_cuda, "kernel", lambda device: choose(device) and "Triton")  # on a Hopper GPU too
    layers = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        layer = fp8_linear(1024, 384).to(device)
        x = matrix(70, 1024, seed=1).to(device).requires_grad_()
        out = layer(x)
        out.backward(matrix(70, 384, seed=3).to(device))
        layers.append((layer.computes_in, [t.cpu() for t in (out, x.grad, layer.weight.grad)]))
    assert [path for path, _ in layers] == ["E4M3, on tensor cores (Triton)", "E4M3, emulated in float32"]
    for got, want in zip(layers[0][1], layers[1][1], strict=True):
        assert (got - want).norm() < 0.01 * want.norm()
