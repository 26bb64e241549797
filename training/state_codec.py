"""Python state as JSON and back, exactly: tuples, bytes, arrays and tensors keep their type.

Checkpoints hold small Python state beside the tensors: random states, sampler positions, schedulers, parameter groups.
Pickle would run whatever a stranger put into the file, and plain JSON turns tuples into lists. So the few types that
JSON lacks are written as an object with one reserved key, e.g. `{"__tuple__": [1, 2]}`.
Not covered: large tensors, which live in the tensor file (training/shard_file.py), and classes of the user's own.
"""

from __future__ import annotations

import base64
import ctypes
import io
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)  # not frozen: hundreds are made in every save, on the loop's time
class TensorRef:
    """Stands in a tree for a tensor that is stored in the tensor file under `key`."""

    key: str


@dataclass(frozen=True)
class Encoded:
    """A value that was encoded earlier, because it might have changed since."""

    json: Any


@dataclass(slots=True)
class _Bytes:
    """A tensor's content."""

    dtype: torch.dtype
    shape: torch.Size
    data: bytes


def frozen(value: Any, where: str = "state") -> Any:
    """What `encode` may be given later, on another thread: a copy of whatever could change until then.

    Raises TypeError as `encode` does."""
    if type(value) in _CONSTANT:
        return value
    if type(value) is dict:
        return {key: frozen(item, f"{where}.{key}") for key, item in value.items()}
    if type(value) is torch.Tensor:
        return _Bytes(value.dtype, value.shape, tensor_bytes(value))
    return Encoded(encode(value, where))


_CONSTANT = {type(None), bool, int, float, str, bytes}


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The raw bytes of a tensor, row-major, wherever it lives."""
    flat = tensor if tensor.is_cpu and tensor.is_contiguous() else tensor.detach().cpu().contiguous()
    return ctypes.string_at(flat.data_ptr(), flat.nbytes) if flat.nbytes else b""


def encode(value: Any, where: str = "state") -> Any:
    """`value` as JSON-able data. Raises TypeError naming the place of what cannot be stored without pickle."""
    if value is None or (isinstance(value, (bool, int, float, str)) and type(value).__module__ == "builtins"):
        return value
    if type(value) is list:
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if type(value) is tuple:
        return {"__tuple__": [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, TensorRef):
        return {"__ref__": value.key}
    if isinstance(value, Encoded):
        return value.json
    if isinstance(value, (bytes, bytearray)):
        return {"__bytes__": base64.b64encode(value).decode()}
    if isinstance(value, torch.Tensor):
        value = _Bytes(value.dtype, value.shape, tensor_bytes(value))
    if isinstance(value, _Bytes):
        data = base64.b64encode(value.data).decode()
        return {"__tensor__": [str(value.dtype).removeprefix("torch."), list(value.shape), data]}
    if isinstance(value, dict):
        return _encode_dict(value, where)
    if type(value).__module__ == "numpy":
        import numpy as np

        array = np.ascontiguousarray(value)
        if array.dtype.hasobject:
            raise TypeError(f"{where}: a NumPy array of Python objects cannot be stored without pickle; store numbers")
        kind = "__ndarray__" if isinstance(value, np.ndarray) else "__npscalar__"
        return {kind: [array.dtype.str, list(np.shape(value)), base64.b64encode(array.tobytes()).decode()]}
    return _encode_by_torch(value, where)


def _encode_dict(value: dict[Any, Any], where: str) -> Any:
    plain = type(value) is dict and all(type(key) is str for key in value)
    if plain and not (len(value) == 1 and next(iter(value)).startswith("__")):
        return {key: encode(item, f"{where}.{key}") for key, item in value.items()}
    kinds = {dict: "__dict__", OrderedDict: "__ordered__", Counter: "__counter__"}
    if type(value) not in kinds:
        return _encode_by_torch(value, where)
    return {kinds[type(value)]: [[encode(k, where), encode(v, f"{where}.{k}")] for k, v in value.items()]}


def _encode_by_torch(value: Any, where: str) -> Any:
    """Types that torch itself allows in a `weights_only` load: torch.Size, torch.dtype, torch.device, defaultdict..."""
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
        torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
    except Exception as error:  # pickling runs the class's own code: anything may come
        raise TypeError(
            f"{where}: {type(value).__module__}.{type(value).__qualname__} cannot be stored without pickle; "
            "give numbers, text, bytes, tensors, arrays, and lists, tuples and dicts of them"
        ) from error
    return {"__torch__": base64.b64encode(stream.getvalue()).decode()}


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        tag, body = next(iter(value.items()))
        if tag in _DECODERS:
            return _DECODERS[tag](body)
    return {key: decode(item) for key, item in value.items()}


def _decode_tensor(body: Any) -> torch.Tensor:
    dtype, shape, data = body
    raw = bytearray(base64.b64decode(data))
    if not raw:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.frombuffer(raw, dtype=torch.uint8).view(getattr(torch, dtype)).reshape(shape)


def _decode_array(body: Any) -> Any:
    import numpy as np

    dtype, shape, data = body
    return np.frombuffer(bytearray(base64.b64decode(data)), dtype=np.dtype(dtype)).reshape(shape)


_DECODERS: dict[str, Any] = {
    "__tuple__": lambda body: tuple(decode(item) for item in body),
    "__ref__": TensorRef,
    "__bytes__": base64.b64decode,
    "__tensor__": _decode_tensor,
    "__ndarray__": _decode_array,
    "__npscalar__": lambda body: _decode_array(body)[()],
    "__dict__": lambda body: {decode(k): decode(v) for k, v in body},
    "__ordered__": lambda body: OrderedDict((decode(k), decode(v)) for k, v in body),
    "__counter__": lambda body: Counter({decode(k): decode(v) for k, v in body}),
    "__torch__": lambda body: torch.load(io.BytesIO(base64.b64decode(body)), weights_only=True),
}
