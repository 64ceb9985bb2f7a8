"""Readers of weight files: what they give, and that nothing in a file can fool or hurt them."""

import json
import os
import pickle
import random
import struct

import pytest
import torch

import weights
from tests.conftest import Malicious
from weights import open_pickle, open_safetensors, open_torch, save_safetensors


def write(path, header, data: bytes = b"", size: int | None = None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if size is None else size) + encoded + data)
    return path


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_written_byte_by_byte(tmp_path):
    data = struct.pack("<3f", 1.5, -2, 3) + struct.pack("<2q", 7, -8) + b"\x01"
    path = write(tmp_path / "a.safetensors", {"__metadata__": {"format": "pt"}, "f": entry(0, 12, [3]), "empty": entry(12, 12, [0, 4]),
                                              "i": entry(12, 28, [2, 1], "I64"), "b": entry(28, 29, [], "BOOL")}, data)
    tensors = open_safetensors(path)
    assert tensors["f"].tolist() == [1.5, -2, 3] and tensors["i"].tolist() == [[7], [-8]]
    assert tensors["b"].item() is True and tensors["empty"].shape == (0, 4)


@pytest.mark.parametrize("name, dtype", weights.DTYPES.items())
def test_every_dtype_there_and_back(tmp_path, name, dtype):
    tensors = {"odd": torch.ones(3, dtype=torch.uint8), "x": torch.arange(6).reshape(2, 3).to(dtype)}      # 'odd' puts x at no multiple of its size
    save_safetensors(tmp_path / "x.safetensors", tensors, {"made": "here"})
    back = open_safetensors(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys() and back["x"].dtype == dtype and torch.equal(back["x"], tensors["x"])


def test_views_do_not_write_to_the_file(tmp_path):
    save_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(4)})
    before = (tmp_path / "x.safetensors").read_bytes()
    open_safetensors(tmp_path / "x.safetensors")["x"].fill_(1)
    assert (tmp_path / "x.safetensors").read_bytes() == before


@pytest.mark.parametrize("header", [
    {"x": entry(0, 8, [3])}, {"x": entry(0, 16, [3])}, {"x": entry(4, 12, [2])}, {"x": entry(-4, 4, [2])},
    {"x": entry(0, 4, [1]), "y": entry(0, 8, [2])}, {"x": entry(0, 8, [2]), "y": entry(12, 12, [0])},
    {"x": entry(0, 8, [2**40, 2**40])}, {"x": entry(0, 8, [-1, -2])}, {"x": entry(0, 8, [2], "F33")}, {"x": entry(0, 2**62, [2**60])},
    {"x": entry(0, 8, [2.0])}, {"x": entry(0, 8, [True, 2])}, {"x": {"dtype": "F32"}}, {"x": None}, {"x": entry(0, 4, [1])}, [], "x", 3, None,
    b"{", b"\xff\xfe", b'{"x":' * 50_000,
])
def test_lying_headers_are_named(tmp_path, header):
    path = write(tmp_path / "lie.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match="lie.safetensors"):
        open_safetensors(path)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 10) + b"{}"])
def test_short_files_are_named(tmp_path, content):
    (tmp_path / "short.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="short.safetensors"):
        open_safetensors(tmp_path / "short.safetensors")


def test_flipped_bytes_are_an_error_or_change_nothing_but_values(tmp_path):
    good = tmp_path / "good.safetensors"
    save_safetensors(good, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)})
    original, rng = good.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(1000):
        damaged = bytearray(original)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        (tmp_path / "bad.safetensors").write_bytes(damaged)
        try:
            sum(t.numel() for t in open_safetensors(tmp_path / "bad.safetensors").values())
        except ValueError as error:
            assert "bad.safetensors" in str(error)
            refused += 1
    assert refused > 300


@pytest.mark.parametrize("write_it", [lambda value, file: torch.save(value, file), lambda value, file: file.write(pickle.dumps(value))])
def test_a_pickle_runs_no_code(tmp_path, write_it):
    path, trace = tmp_path / "evil.bin", tmp_path / "was-here"
    with open(path, "wb") as file:
        write_it({"x": Malicious(trace)}, file)
    with pytest.raises(ValueError, match="evil.bin"):
        open_torch(path)
    assert not trace.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights(tmp_path, zipped):
    path = tmp_path / "w.bin"
    torch.save({"x": torch.arange(3)}, path, _use_new_zipfile_serialization=zipped)
    assert open_torch(path)["x"].tolist() == [0, 1, 2]
    content = path.read_bytes()
    for damaged in (content[:-40], content[:100], b"", os.urandom(500)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="w.bin"):
            open_torch(path)


def test_other_contents_and_missing_files(tmp_path):
    torch.save({"x": 3}, tmp_path / "n.bin")
    with pytest.raises(ValueError, match="n.bin"):
        open_torch(tmp_path / "n.bin")
    for read in (open_safetensors, open_pickle):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")
