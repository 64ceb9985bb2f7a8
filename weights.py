"""Tensors on disk: the two file formats that checkpoints of the Hugging Face family come in.

A .safetensors file is eight bytes that give the length of a JSON header, the header (for each tensor its dtype, shape and
the byte range it occupies), then the raw bytes. That is all, so reading one is a matter of mapping the file and pointing
tensors at the map: nothing is copied until it is used, and nothing in the file can run. The older pytorch_model.bin is a
pickle, a small program; it is only ever read with weights_only=True, which refuses everything but tensors and containers.
A header can lie, so every number in it is checked against the size of the file before a tensor is made.
"""

import json
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 100_000_000      # bytes; the format's own limit


def open_safetensors(path) -> dict[str, Tensor]:
    """Name -> tensor of a .safetensors file, as read-only views of one memory map.

    The tensors share the file's pages: copy them before you write to them. Format: the safetensors README.
    Raises FileNotFoundError, or ValueError naming the file if the header does not describe the bytes behind it.
    """
    path = Path(path)
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{path}: not a safetensors file (only {size} bytes)")
    buffer = np.memmap(path, dtype=np.uint8, mode="c")      # copy-on-write: torch wants a writable array, the file stays as it is
    (header_size,) = struct.unpack("<Q", buffer[:8].tobytes())
    if header_size > min(size - 8, MAX_HEADER):
        raise ValueError(f"{path}: not a safetensors file (the header claims {header_size} of {size} bytes)")
    try:
        header = json.loads(buffer[8:8 + header_size].tobytes().decode("utf-8"), object_pairs_hook=_without_twins)
        header.pop("__metadata__", None)
        entries = []
        for name, entry in header.items():
            begin, end = map(_natural, entry["data_offsets"])
            if not isinstance(entry["shape"], list) or not isinstance(entry["dtype"], str):
                raise TypeError(f"{name!r} has the shape {entry['shape']!r} and the dtype {entry['dtype']!r}")
            entries.append((begin, end, name, entry["dtype"], [_natural(n) for n in entry["shape"]]))
        entries.sort()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged safetensors header ({type(error).__name__}: {error})") from None
    data = torch.from_numpy(buffer)[8 + header_size:]
    tensors, position = {}, 0
    for begin, end, name, dtype, shape in entries:
        if dtype not in DTYPES:
            raise ValueError(f"{path}: tensor {name!r} has the dtype {dtype!r}, which this reader does not know")
        itemsize = DTYPES[dtype].itemsize
        count = 1
        for n in shape:
            count *= n
        # The format allows neither gaps nor overlaps, which also rules out two names for one range.
        if begin != position or end > len(data) or end - begin != count * itemsize:
            raise ValueError(f"{path}: tensor {name!r} claims bytes {begin} to {end} for {dtype} {shape}; the file disagrees")
        try:
            tensors[name] = _view(data[begin:end], DTYPES[dtype], shape)
        except RuntimeError:      # a shape like (2**62, 2**62, 0) has the right number of bytes, but no tensor can have it
            raise ValueError(f"{path}: tensor {name!r} has the impossible shape {shape}") from None
        position = end
    if position != len(data):
        raise ValueError(f"{path}: {len(data) - position} bytes behind the last tensor")
    return tensors


def _without_twins(pairs: list[tuple[str, object]]) -> dict:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def _natural(value) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no size")
    return value


def _view(data: Tensor, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """Bytes (n,) uint8 as a tensor of the dtype and shape; copied only where the file left them unaligned."""
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(shape)


def save_safetensors(path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes name -> tensor as a .safetensors file (the caller sees to the atomic rename)."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise ValueError(f"{path}: tensor {name!r} is {tensor.dtype}, which the format cannot hold")
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)      # so that the data begin at a multiple of eight
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def open_pickle(path, what: str = "a PyTorch weight file"):
    """What torch.save wrote to `path`, read with weights_only=True: tensors and plain containers, no code.

    Raises FileNotFoundError, or ValueError naming the file if it is damaged or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():      # torch warns of foreign pickles before it refuses them
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks to run {found[1]}; nothing of it was run" if found else "damaged"
        raise ValueError(f"{path}: not {what} ({reason})") from None
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError, MemoryError,
            UnicodeDecodeError, AssertionError, struct.error, zipfile.BadZipFile, OSError, ImportError) as error:
        raise ValueError(f"{path}: not {what} ({type(error).__name__})") from None


def open_torch(path) -> dict[str, Tensor]:
    """Name -> tensor of a pytorch_model.bin. Raises as open_pickle does, and ValueError if it holds anything but tensors."""
    tensors = open_pickle(path)
    if not isinstance(tensors, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided and not v.is_quantized for k, v in tensors.items()):
        raise ValueError(f"{path}: holds something else than names and plain tensors")
    return tensors
