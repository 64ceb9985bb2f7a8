"""Reading a GGUF file: the format in which llama.cpp's quantized models travel, one file with everything in it.

The file opens with a table of metadata (the sizes of the model, its whole vocabulary, its chat template), goes on with a
table of tensors (name, shape, type, offset) and ends with their bytes. Most tensors are quantized in blocks of 32 or 256
weights: a block holds its small integers, four to eight bits each, and one or two scales that turn them back into
floats, w = scale * q + offset. The K types add a second level: eight or sixteen little scales a block, themselves packed
into six or eight bits. Here a block's bytes are pulled apart for a whole tensor at a time. Nothing in the file is
believed: every count and offset is compared with what is left of the file before anything of that size is made.

Formats: docs/gguf.md and src/ggml-common.h of the ggml project. Arrays of arrays and big-endian files are not read.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32        # bytes; general.alignment overrides it
CHUNK = 1 << 20               # weights dequantized at a time: what is in flight stays in the processor's cache


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor that still lies in its file. `shape` is in PyTorch's order, rows first; `offset` and `size` are bytes."""

    path: Path
    type: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights, of `shape`, computed in float32 and rounded to `dtype`. The file is mapped only meanwhile."""
        per_block, block_bytes, unpack = TYPES[self.type]
        data = np.memmap(self.path, dtype=np.uint8, mode="c", offset=self.offset, shape=(self.size,))
        blocks = torch.from_numpy(data).view(-1, block_bytes)                              # (n, bytes)
        weights = torch.empty(len(blocks), per_block, dtype=dtype)
        step = CHUNK // per_block
        for start in range(0, len(blocks), step):
            weights[start:start + step] = unpack(blocks[start:start + step])
        return weights.view(self.shape)


def read_gguf(path) -> tuple[dict, dict[str, GGUFTensor]]:
    """Metadata (name -> number, string, bool or list of these) and tensors (name -> GGUFTensor) of a GGUF file.

    Reads versions 2 and 3. Raises FileNotFoundError, or ValueError naming the file and what is wrong in it.
    """
    path = Path(path)
    with open(path, "rb") as file:
        size = path.stat().st_size
        if size < 24 or file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, _Cursor(path, data))


class _Cursor:
    """Reads little-endian values one after the other, and refuses to run past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.position = path, data, 4

    def fail(self, reason: str):
        raise ValueError(f"{self.path}: damaged GGUF file: {reason}")

    def take(self, size: int, what: str) -> int:
        """Moves on by `size` bytes and returns where they begin."""
        if size > len(self.data) - self.position:
            self.fail(f"{what} runs past the end")
        self.position += size
        return self.position - size

    def scalar(self, form: str, what: str):
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form), what))[0]

    def count(self, least: int, what: str) -> int:
        """A count of items that take at least `least` bytes each: more than the rest of the file can hold is a lie."""
        count = self.scalar("<Q", what)
        if count * least > len(self.data) - self.position:
            self.fail(f"{what}: {count} items cannot be in this file")
        return count

    def string(self, what: str) -> str:
        size = self.count(1, what)
        start = self.take(size, what)
        try:
            return self.data[start:start + size].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def value(self, kind: int, what: str):
        if kind in SCALARS:
            return self.scalar(SCALARS[kind], what)
        if kind == STRING:
            return self.string(what)
        kind = self.scalar("<I", what) if kind == ARRAY else None
        if kind == STRING:
            return [self.string(what) for _ in range(self.count(8, what))]
        if kind not in SCALARS:
            self.fail(f"{what} has a type that this reader does not know")
        count = self.count(struct.calcsize(SCALARS[kind]), what)
        start = self.take(count * struct.calcsize(SCALARS[kind]), what)
        return np.frombuffer(self.data, SCALARS[kind], count, start).tolist()


def _read(path: Path, cursor: _Cursor) -> tuple[dict, dict[str, GGUFTensor]]:
    version = cursor.scalar("<I", "the version")
    if version not in (2, 3):
        raise ValueError(f"{path}: GGUF version {version} is not supported (2 and 3 are; big-endian files are not)")
    tensor_count = cursor.count(8 + 4 + 8 + 4 + 8, "the tensor count")
    metadata = {}
    for _ in range(cursor.count(8 + 4 + 1, "the metadata count")):
        key = cursor.string("a metadata key")
        metadata[key] = cursor.value(cursor.scalar("<I", key), key)

    entries = []
    for _ in range(tensor_count):
        name = cursor.string("a tensor name")
        dimensions = cursor.scalar("<I", name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            cursor.fail(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.scalar("<Q", name) for _ in range(dimensions))[::-1]      # the file has the columns first
        entries.append((name, shape, cursor.scalar("<I", name), cursor.scalar("<Q", name)))

    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        cursor.fail(f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    end = 0
    for name, shape, number, offset in sorted(entries, key=lambda entry: entry[3]):
        kind = TYPE_NUMBERS.get(number)
        if kind is None:
            raise ValueError(f"{path}: tensor {name!r} has type number {number}; this reader knows {', '.join(TYPES)}")
        per_block, block_bytes, _ = TYPES[kind]
        if min(shape) < 1 or shape[-1] % per_block:
            cursor.fail(f"tensor {name!r} of type {kind} cannot have the shape {shape}")
        size = math.prod(shape) // per_block * block_bytes
        if offset % alignment or offset < end or start + offset + size > len(cursor.data):
            cursor.fail(f"tensor {name!r} lies outside the file or over another tensor")
        if name in tensors:
            cursor.fail(f"tensor {name!r} is there twice")
        tensors[name] = GGUFTensor(path, kind, shape, start + offset, size)
        end = offset + size
    return metadata, tensors


def _half(data: Tensor) -> Tensor:
    """Bytes (n, 2k) as k float16 numbers, widened: (n, k) float32."""
    return data.contiguous().view(torch.float16).float()


def _nibbles(data: Tensor, group: int) -> Tensor:
    """(n, k) bytes -> (n, 2k) four-bit numbers: of each group of bytes first the low halves, then the high ones."""
    groups = data.reshape(len(data), -1, 1, group)
    return torch.cat((groups & 15, groups >> 4), dim=2).view(len(data), -1)


def _bits(data: Tensor) -> Tensor:
    """(n, 4) bytes -> (n, 32) bits, lowest first."""
    return (data.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8) & 1).view(len(data), -1)


def _q4_0(block: Tensor) -> Tensor:
    return _half(block[:, :2]) * (_nibbles(block[:, 2:], 16).float() - 8)


def _q4_1(block: Tensor) -> Tensor:
    return _half(block[:, :2]) * _nibbles(block[:, 4:], 16) + _half(block[:, 2:4])


def _q5_0(block: Tensor) -> Tensor:
    return _half(block[:, :2]) * ((_nibbles(block[:, 6:], 16) | _bits(block[:, 2:6]) << 4).float() - 16)


def _q5_1(block: Tensor) -> Tensor:
    return _half(block[:, :2]) * (_nibbles(block[:, 8:], 16) | _bits(block[:, 4:8]) << 4) + _half(block[:, 2:4])


def _q8_0(block: Tensor) -> Tensor:
    return _half(block[:, :2]) * block[:, 2:].view(torch.int8)


def _k_scales(block: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets, (n, 8, 1) float32 each, of the eight sub-blocks of a Q4_K or Q5_K block.

    Twelve bytes hold eight six-bit scales and eight six-bit offsets: the first four of each kind in the low six bits of bytes
    0-3 and 4-7; the last four with their low nibbles in bytes 8-11 and their top two bits above those six.
    """
    low, high, rest = block[:, 4:8], block[:, 8:12], block[:, 12:16]
    scales = torch.cat((low & 63, rest & 15 | low >> 6 << 4), dim=1)
    offsets = torch.cat((high & 63, rest >> 4 | high >> 6 << 4), dim=1)
    return (_half(block[:, :2]) * scales).unsqueeze(2), (_half(block[:, 2:4]) * offsets).unsqueeze(2)


def _q4_k(block: Tensor) -> Tensor:
    scales, offsets = _k_scales(block)
    return (scales * _nibbles(block[:, 16:], 32).view(-1, 8, 32) - offsets).flatten(1)


def _q5_k(block: Tensor) -> Tensor:
    scales, offsets = _k_scales(block)
    # Byte j of the 32 holds the fifth bits of weight j of all eight sub-blocks.
    fifth = block[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8).view(8, 1) & 1                 # (n, 8, 32)
    return (scales * (_nibbles(block[:, 48:], 32).view(-1, 8, 32) | fifth << 4) - offsets).flatten(1)


def _q6_k(block: Tensor) -> Tensor:
    low = _nibbles(block[:, :128], 64)                                                                 # (n, 256)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    high = (block[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3).view(-1, 256)
    scales = _half(block[:, 208:]) * block[:, 192:208].view(torch.int8)                                # (n, 16)
    return (scales.unsqueeze(2) * ((low | high << 4).float() - 32).view(-1, 16, 16)).flatten(1)


# Type -> weights a block, bytes a block, and what turns blocks (n, bytes) uint8 into weights (n, weights) float32.
TYPES = {
    "F32": (1, 4, lambda block: block.view(torch.float32)),
    "F16": (1, 2, lambda block: block.view(torch.float16)),
    "BF16": (1, 2, lambda block: block.view(torch.bfloat16)),
    "Q4_0": (32, 18, _q4_0), "Q4_1": (32, 20, _q4_1), "Q5_0": (32, 22, _q5_0), "Q5_1": (32, 24, _q5_1),
    "Q8_0": (32, 34, _q8_0), "Q4_K": (256, 144, _q4_k), "Q5_K": (256, 176, _q5_k), "Q6_K": (256, 210, _q6_k),
}
TYPE_NUMBERS = dict(zip((0, 1, 30, 2, 3, 6, 7, 8, 12, 13, 14), TYPES))
