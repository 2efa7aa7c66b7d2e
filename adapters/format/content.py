"""Read an adapter's files once each, and compute the identity of their content on the way."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from adapters.errors import AdapterRejected
from adapters.format.files import SCHEME, WEIGHTS, chunks, open_file, present, size_of
from adapters.format.safetensors_header import StoredTensor
from adapters.format.spec import AdapterId

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that an adapter's matrices may have: safetensors' name -> torch's."""


class HashingFile:
    """An open file that is read once, from its beginning to its end; each byte is added to ``digests``."""

    def __init__(self, file: BinaryIO, name: str, digests: Sequence["hashlib._Hash"] = ()) -> None:
        self._file = file
        self._name = name
        self._digests = digests
        self.size = size_of(file)
        """Bytes, when it was opened."""
        self._left = self.size

    def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes. Raises AdapterRejected if the file has fewer, or the disk fails."""
        data = bytearray(size)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, buffer: memoryview) -> None:
        """Fill ``buffer`` with the next bytes. Raises as :meth:`read` does."""
        try:
            count = self._file.readinto(buffer)  # type: ignore[attr-defined]
        except OSError as error:
            raise AdapterRejected(f"cannot be read: {error.strerror}", file=self._name) from error
        if count != len(buffer):
            raise AdapterRejected("changed while it was read", file=self._name)
        self._left -= count
        for digest in self._digests:
            digest.update(buffer)

    def finish(self) -> None:
        """Read what is left of the file. Raises AdapterRejected if its size has changed since it was opened."""
        for chunk in chunks(self._file, self._name):
            self._left -= len(chunk)
            for digest in self._digests:
                digest.update(chunk)
        if self._left:
            raise AdapterRejected("changed while it was read", file=self._name)


class ContentReader:
    """Reads the files of the adapter in ``folder``, once each, in the order of :data:`~adapters.format.files.FILES`.

    Raises AdapterRejected if the config or the weights are missing.
    """

    def __init__(self, folder: Path, hashed: Collection[str] = ()) -> None:
        """``hashed``: the files whose own SHA-256 is wanted, too."""
        self._folder = folder
        self._left = list(present(folder))
        self._content = hashlib.sha256(SCHEME)
        self._hashed = {name: hashlib.sha256() for name in hashed}

    @contextmanager
    def weights(self) -> Iterator[HashingFile]:
        """Open the weights, to be read from their beginning; what the caller leaves unread is hashed at the end."""
        self._read_until(WEIGHTS)
        with self._open() as file:
            yield file

    def content_id(self) -> AdapterId:
        """Read the remaining files and return the identity of all of them (see :func:`content_id`)."""
        self._read_until(None)
        return AdapterId(self._content.hexdigest())

    def _read_until(self, name: str | None) -> None:
        while self._left and self._left[0] != name:
            with self._open():
                pass

    def sha256(self, name: str) -> str:
        """Return the SHA-256 (hex) of one of the ``hashed`` files, all of which has been read."""
        return self._hashed[name].hexdigest()

    @contextmanager
    def _open(self) -> Iterator[HashingFile]:
        name = self._left.pop(0)
        with open_file(self._folder, name) as opened:
            digests = [self._content, self._hashed[name]] if name in self._hashed else [self._content]
            file = HashingFile(opened, name, digests)
            self._content.update(len(name).to_bytes(8, "little") + name.encode() + file.size.to_bytes(8, "little"))
            yield file
            file.finish()


def content_id(folder: Path) -> AdapterId:
    """Return the SHA-256 (hex) over the adapter's content.

    Scheme: a fixed first line, then for each of :data:`~adapters.format.files.FILES` that is there: the length of its
    name, its name, the length of its bytes (both lengths as 8 bytes, little-endian), its bytes. Other files do not
    count. Raises AdapterRejected for a file that cannot be read, or that changes meanwhile.
    """
    return ContentReader(folder).content_id()


def read_tensors(file: HashingFile, header: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a weights file as (key, tensor), in the order in which they are stored.

    ``file`` must be just after its header, which :func:`~adapters.format.safetensors_header.read_header` returned. Each
    tensor has memory of its own. Raises AdapterRejected if the file is shorter than its header says.
    """
    for key, stored in sorted(header.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.dtype not in TORCH_DTYPES:
            raise AdapterRejected(f"has dtype {stored.dtype}, not F32, F16 or BF16", file=WEIGHTS, tensor=key)
        tensor = torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
        if tensor.numel():
            file.read_into(tensor.view(-1).view(torch.uint8).numpy().data)
        yield key, tensor
