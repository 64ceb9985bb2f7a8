"""The GGUF reader: blocks taken apart by hand and by the gguf package, whole files, and files that lie."""

import math
import struct
import sys

import numpy as np
import pytest
import torch

from gguf import TYPES, read_gguf

NUMBERS = dict(zip(TYPES, (0, 1, 30, 2, 3, 6, 7, 8, 12, 13, 14)))


def text(string: str) -> bytes:
    return struct.pack("<Q", len(string.encode())) + string.encode()


def value(item) -> bytes:
    """A metadata value with its type in front."""
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + text(item)
    body = [value(x) for x in item]
    return struct.pack("<I", 9) + body[0][:4] + struct.pack("<Q", len(body)) + b"".join(b[4:] for b in body)


def write_gguf(path, metadata: dict, tensors: dict, alignment: int = 32, version: int = 3):
    """tensors: name -> (type, shape with the rows first, bytes), or a float32 tensor."""
    tensors = {name: t if isinstance(t, tuple) else ("F32", tuple(t.shape), t.contiguous().numpy().tobytes())
               for name, t in tensors.items()}
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + value(item) for key, item in metadata.items())
    body = b""
    for name, (kind, shape, data) in tensors.items():
        body += b"\0" * (-len(body) % alignment)
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", NUMBERS.get(kind, 99), len(body))
        body += data
    path.write_bytes(head + b"\0" * (-len(head) % alignment) + body)
    return path


def random_blocks(kind: str, n: int, seed: int = 0) -> np.ndarray:
    """(n, bytes) of any bits, except that the half-precision scales are finite."""
    blocks = np.random.default_rng(seed).integers(0, 256, (n, TYPES[kind][1]), dtype=np.uint8)
    scales = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for start in scales:
        blocks[:, start:start + 2] = np.random.default_rng(seed + 1).normal(size=n).astype(np.float16)[:, None].view(np.uint8)
    return blocks


def half(block, at: int) -> float:
    return struct.unpack_from("<e", bytes(block), at)[0]


def by_hand(kind: str, block) -> list[float]:
    """One block, weight by weight, with Python's integers, as ggml-quants.c describes them."""
    b = [int(x) for x in block]
    out = []
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        quants = 2 + 2 * (kind[3] == "1") + 4 * (kind[1] == "5")
        high = int.from_bytes(bytes(b[quants - 4:quants]), "little") if kind[1] == "5" else 0
        for i in range(32):
            q = (b[quants + i % 16] >> (4 * (i // 16)) & 15) + ((high >> i & 1) << 4)
            out.append(half(block, 0) * (q - (8 if kind == "Q4_0" else 16)) if kind[3] == "0" else half(block, 0) * q + half(block, 2))
    elif kind == "Q8_0":
        out = [half(block, 0) * (x - 256 * (x > 127)) for x in b[2:]]
    elif kind in ("Q4_K", "Q5_K"):
        for i in range(256):
            j, packed = i // 32, b[4:16]
            if j < 4:
                scale, offset = packed[j] & 63, packed[j + 4] & 63
            else:
                scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
                offset = packed[j + 4] >> 4 | packed[j] >> 6 << 4
            quants = 16 if kind == "Q4_K" else 48
            q = b[quants + j // 2 * 32 + i % 32] >> (4 * (j % 2)) & 15
            if kind == "Q5_K":
                q += (b[16 + i % 32] >> j & 1) << 4
            out.append(half(block, 0) * scale * q - half(block, 2) * offset)
    else:
        for i in range(256):                                           # Q6_K: two halves of 128, four rows of 32 in each
            part, row, column = i // 128, i % 128 // 32, i % 32
            low = b[part * 64 + row % 2 * 32 + column] >> (4 * (row // 2)) & 15
            high = b[128 + part * 32 + column] >> (2 * row) & 3
            scale = b[192 + i // 16] - 256 * (b[192 + i // 16] > 127)
            out.append(half(block, 208) * scale * ((low | high << 4) - 32))
    return out


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind[0] == "Q"])
def test_blocks_weight_by_weight(kind, tmp_path):
    blocks = random_blocks(kind, 6)
    path = write_gguf(tmp_path / "a.gguf", {}, {"w": (kind, (2, 3 * TYPES[kind][0]), blocks.tobytes())})
    got = read_gguf(path)[1]["w"].dequantize()
    want = torch.tensor([by_hand(kind, block) for block in blocks], dtype=torch.float64).view(got.shape)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def peer():
    """The gguf package, which has the name of our module: imported as if ours were not there."""
    ours, path = sys.modules.pop("gguf"), sys.path
    sys.path = [folder for folder in path if "site-packages" in folder or "lib" in folder]
    try:
        return pytest.importorskip("gguf")
    finally:
        sys.path = path
        sys.modules["gguf"] = ours


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_equal_the_gguf_package(kind, tmp_path, peer):
    per_block, block_bytes, _ = TYPES[kind]
    assert peer.GGML_QUANT_SIZES[peer.GGMLQuantizationType[kind]] == (per_block, block_bytes)
    assert peer.GGMLQuantizationType[kind].value == NUMBERS[kind]
    blocks = random_blocks(kind, 4096)
    path = write_gguf(tmp_path / "a.gguf", {}, {"w": (kind, (64, 64 * per_block), blocks.tobytes())})
    with np.errstate(invalid="ignore"):
        want = peer.dequantize(blocks.reshape(64, -1), peer.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(read_gguf(path)[1]["w"].dequantize().numpy(), want)


def test_a_tensor_longer_than_a_chunk_and_another_dtype(tmp_path):
    weights = torch.randn(3, 1 << 19)
    tensor = read_gguf(write_gguf(tmp_path / "a.gguf", {}, {"w": weights}))[1]["w"]
    assert tensor.shape == weights.shape and torch.equal(tensor.dequantize(), weights)
    assert torch.equal(tensor.dequantize(torch.bfloat16), weights.bfloat16())


@pytest.mark.parametrize("version, alignment", [(2, 32), (3, 64)])
def test_metadata_and_tensors(tmp_path, version, alignment):
    metadata = {"general.alignment": alignment, "name": "a Llama – 羊駝", "flag": True, "rate": 0.5, "tokens": ["a", "", "ü"],
                "types": [1, 3, 1], "scores": [0.0, -1.5], "flags": [True, False]}
    tensors = {"a": torch.randn(5), "b": torch.randn(2, 3, 4), "c": torch.randn(7, 1)}
    path = write_gguf(tmp_path / "a.gguf", metadata, tensors, alignment, version)
    got, entries = read_gguf(path)
    assert got == metadata
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {name: t.shape for name, t in entries.items()}
    assert all(torch.equal(entries[name].dequantize(), t) for name, t in tensors.items())


GOOD = {"general.alignment": 32, "tokens": ["a", "b"], "number": 7}


def damaged(change, tmp_path, tensors=None):
    path = write_gguf(tmp_path / "bad.gguf", GOOD, tensors or {"w": torch.ones(4, 4), "x": torch.ones(8)})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"bad\.gguf") as error:
        read_gguf(path)
    return str(error.value)


def put(at: int, form: str, *values):
    return lambda data: data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form):]


def after(mark: bytes, form: str, *values):
    return lambda data: put(data.index(mark) + len(mark), form, *values)(data)


@pytest.mark.parametrize("change, reason", [
    (lambda data: b"", "not a GGUF"),
    (lambda data: b"GGML" + data[4:], "not a GGUF"),
    (put(4, "<I", 1), "version 1"),
    (put(4, ">I", 3), "big-endian"),
    (put(8, "<Q", 2**60), "tensor count"),
    (put(16, "<Q", 2**63), "metadata count"),
    (put(24, "<Q", 2**62), "metadata key"),
    (after(b"general.alignment", "<II", 4, 0), "alignment"),
    (after(b"general.alignment", "<II", 17, 1), "type"),
    (after(b"tokens", "<IIQ", 9, 8, 2**61), "2305843009213693952 items"),
    (after(b"tokens", "<IIQ", 9, 12, 2**59), "items"),
    (after(b"tokens", "<II", 9, 9), "type"),
    (after(b"tokens\x09\0\0\0\x08\0\0\0\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0", "<B", 0xFF), "UTF-8"),
    (after(b"\x01\0\0\0\0\0\0\0w", "<I", 5), "5 dimensions"),
    (after(b"\x01\0\0\0\0\0\0\0w", "<I", 0), "0 dimensions"),
    (after(b"\x01\0\0\0\0\0\0\0w", "<IQQ", 2, 2**40, 2**40), "outside the file"),
    (after(b"\x01\0\0\0\0\0\0\0w", "<IQQ", 2, 0, 4), "shape"),
    (after(b"\x01\0\0\0\0\0\0\0w", "<IQQI", 2, 4, 4, 12), "Q4_K"),
    (after(b"\x01\0\0\0\0\0\0\0w", "<IQQI", 2, 4, 4, 10), "type number 10"),
    (after(b"\x01\0\0\0\0\0\0\0x", "<IQIQ", 1, 8, 0, 0), "over another"),
    (after(b"\x01\0\0\0\0\0\0\0x", "<IQIQ", 1, 8, 0, 68), "outside"),
    (after(b"\x01\0\0\0\0\0\0\0x", "<IQIQ", 1, 8, 0, 2**63), "outside"),
    (lambda data: data.replace(b"\x01\0\0\0\0\0\0\0x", b"\x01\0\0\0\0\0\0\0w"), "twice"),
    (lambda data: data[:-1], "outside"),
])
def test_a_file_that_lies(change, reason, tmp_path):
    assert reason in damaged(change, tmp_path)


def test_every_truncation_is_noticed(tmp_path):
    size = len(write_gguf(tmp_path / "bad.gguf", GOOD, {"w": torch.ones(4, 4), "x": torch.ones(8)}).read_bytes())
    for end in range(0, size, 3):
        damaged(lambda data: data[:end], tmp_path)


def test_random_damage_never_leads_to_anything_but_a_value_error(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", GOOD, {"w": ("Q4_0", (2, 32), bytes(36)), "x": torch.ones(8)})
    whole, random = path.read_bytes(), np.random.default_rng(3)
    for _ in range(500):
        data = bytearray(whole)
        for at in random.integers(4, len(data) - 80, 3):
            data[at] = random.integers(256)
        path.write_bytes(data)
        try:
            metadata, tensors = read_gguf(path)
        except ValueError:
            continue
        for tensor in tensors.values():
            assert tensor.dequantize().numel() == math.prod(tensor.shape)
