"""Which kernel multiplies on which device, and that the report says so.

The products themselves are tested in test_fp8_scaled_mm.py (the library) and test_fp8_triton.py.
"""

import pytest
import torch
from plain_model import build

from minids.fp8 import cuda as fp8_cuda
from minids.fp8.linear import convert_to_fp8

CHOICES = [
    ((7, 5), None), ((8, 0), None), ((8, 6), None), ((8, 9), "Triton"), ((9, 0), "scaled_mm"), ((10, 0), "Triton"),
    ((12, 1), "Triton"),
]  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """Says to `kernel` that every device is a GPU of this capability, and whether Triton is installed."""
    choose = fp8_cuda.kernel

    def pretend(capability, has_triton=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(fp8_cuda, "HAS_TRITON", has_triton)
        monkeypatch.setattr(fp8_cuda, "kernel", lambda _: choose(torch.device("cuda")))

    return pretend


@pytest.mark.parametrize("capability, kernel", CHOICES)
def test_the_library_where_it_has_the_recipes_and_triton_on_other_devices_with_fp8(gpu, capability, kernel):
    gpu(capability)
    assert fp8_cuda.kernel(torch.device("cuda")) == kernel


@pytest.mark.parametrize("capability, kernel", CHOICES)
def test_without_triton_the_library_alone(gpu, capability, kernel):
    gpu(capability, has_triton=False)
    assert fp8_cuda.kernel(torch.device("cuda")) == (kernel if kernel == "scaled_mm" else None)


def test_neither_a_cpu_nor_a_gpu_of_amd_has_one(gpu, monkeypatch):
    assert fp8_cuda.kernel(torch.device("cpu")) is None
    for capability in ((9, 4), (11, 0)):
        gpu(capability)
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert fp8_cuda.kernel(torch.device("cuda")) is None


@pytest.mark.parametrize("capability, kernel", CHOICES)
def test_the_report_names_the_kernel(gpu, capability, kernel):
    gpu(capability)
    path = f"on tensor cores ({kernel})" if kernel else "emulated in float32"
    model = build(dtype=torch.float32)
    convert_to_fp8(model)
    assert set(model.precision_report().values()) == {"float32", f"E4M3, {path}"}
