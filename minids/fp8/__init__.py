"""FP8 training as in V3: formats and scales, an emulated tensor core, layers, and GPU kernels."""

from minids.fp8.formats import dequantize, quantize

__all__ = ["dequantize", "quantize"]
