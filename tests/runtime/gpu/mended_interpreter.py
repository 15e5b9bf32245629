"""Triton's interpreter with the arithmetic of a GPU: call `mend` once triton is imported.

As of Triton 3.6 it multiplies bf16 matrices as if their bits were integers, truncates where a GPU rounds to
nearest even, carries wrongly into the exponent of e4m3, and cannot loop up to a tensor with NumPy 2.4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_TORCH = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
_BITS = {8: (np.uint8, torch.uint8), 16: (np.uint16, torch.uint16), 32: (np.uint32, torch.int32)}


def _values(bits: np.ndarray, dtype: Any) -> torch.Tensor:
    """What the bits of an array in the interpreter's storage mean."""
    raw, size = np.ascontiguousarray(bits), dtype.primitive_bitwidth
    if size == 64:
        return torch.from_numpy(raw.view(np.float64).copy())
    stored, kind = _BITS[size]
    signed = np.int32 if size == 32 else stored
    return torch.from_numpy(raw.view(signed).copy()).view(kind).view(_TORCH[dtype.name])


def convert(bits: np.ndarray, from_dtype: Any, to_dtype: Any, rounding: Any) -> np.ndarray:
    """Floats of one kind as floats of another, rounded to nearest even, in their bits."""
    values = _values(bits, from_dtype).float().to(_TORCH[to_dtype.name])
    size = to_dtype.primitive_bitwidth
    stored, kind = _BITS[size]
    return values.view(kind).numpy().view(stored).reshape(np.shape(bits))


def mend() -> None:
    """Replace what is wrong; products are summed in float32."""
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        left, right = (_values(x.data, x.dtype.scalar).float().reshape(x.data.shape) for x in (a, b))
        return interpreter.TensorHandle(torch.matmul(left, right).numpy() + d.data, d.dtype.scalar)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    patch = interpreter._patch_lang_tensor
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = create_dot
