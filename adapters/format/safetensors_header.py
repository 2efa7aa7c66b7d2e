"""The header of a safetensors file, checked before anything reads the tensors.

Format: https://huggingface.co/docs/safetensors#format
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from adapters.errors import AdapterRejected
from adapters.format.files import WEIGHTS, parse_object

MAX_HEADER_BYTES = 16 << 20
MAX_KEY_LENGTH = 500

_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


class StoredTensor(NamedTuple):
    """A tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the end of the header."""
    end: int


class SizedFile(Protocol):
    """A file of known size that is read from its beginning."""

    size: int
    """Bytes."""

    def read(self, size: int, /) -> bytes:
        """Return exactly the next ``size`` bytes."""


def read_header(file: SizedFile) -> Mapping[str, StoredTensor]:
    """Return key -> tensor, in key order. Reads ``file`` from its beginning to the end of the header.

    The tensors fill the rest of the file exactly: no overlap, no hole, nothing past the end.
    Raises :class:`AdapterRejected`.
    """
    size = file.size
    length = int.from_bytes(file.read(min(8, size)), "little")
    if size < 8 or length > size - 8:
        raise AdapterRejected("is cut short: its header reaches past the end of the file", file=WEIGHTS)
    if length > MAX_HEADER_BYTES:
        raise AdapterRejected(f"has a header larger than {MAX_HEADER_BYTES >> 20} MiB", file=WEIGHTS)
    entries = parse_object(file.read(length), WEIGHTS)
    entries.pop("__metadata__", None)
    tensors = {key: _tensor(key, entries[key]) for key in sorted(entries)}
    _check_coverage(tensors, size - 8 - length)
    return tensors


def _tensor(key: str, entry: Any) -> StoredTensor:
    if len(key) > MAX_KEY_LENGTH:
        raise AdapterRejected(f"has a tensor whose name has {len(key)} characters", file=WEIGHTS)
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if len(entry) == 3:
            numbers = [*shape, begin, end]
        case _:
            raise AdapterRejected("its header entry is not {dtype, shape, data_offsets}", file=WEIGHTS, tensor=key)
    # bool is an int to isinstance; eight dimensions and 63 bits keep the product below from growing without end.
    if len(shape) > 8 or not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise AdapterRejected("its shape or offsets are not sensible whole numbers", file=WEIGHTS, tensor=key)
    if dtype not in _DTYPE_BYTES:
        raise AdapterRejected(f"has the unknown dtype {dtype[:20]!r}", file=WEIGHTS, tensor=key)
    if end - begin != math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise AdapterRejected(f"its offsets [{begin}, {end}] do not fit {dtype} {shape}", file=WEIGHTS, tensor=key)
    return StoredTensor(dtype, tuple(shape), begin, end)


def _check_coverage(tensors: Mapping[str, StoredTensor], size: int) -> None:
    filled = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.end > size:
            raise AdapterRejected("reaches past the end of the file", file=WEIGHTS, tensor=key)
        if tensor.begin < filled:
            raise AdapterRejected("overlaps another tensor", file=WEIGHTS, tensor=key)
        if tensor.begin > filled:
            raise AdapterRejected("leaves a hole before it", file=WEIGHTS, tensor=key)
        filled = tensor.end
    if filled != size:
        raise AdapterRejected(f"has {size - filled} bytes that belong to no tensor", file=WEIGHTS)
