"""Readers of weight files: what they give, and that nothing in a file can fool or hurt them."""

import json
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


@pytest.mark.parametrize("spaces", range(8))
def test_data_at_any_offset_and_names_in_any_order(tmp_path, spaces):
    """A header may be of any length and need not be sorted; what it leaves unaligned is copied, the rest is not."""
    header = {"z": entry(1, 9, [2]), "a": entry(9, 9, [0, 7], "I64"), "b": entry(0, 1, [1], "U8"), "c": entry(9, 13, [])}
    path = write(tmp_path / "a.safetensors", json.dumps(header).encode() + b" " * spaces, b"\x07" + struct.pack("<3f", 1, 2, 3))
    tensors = open_safetensors(path)
    assert {name: t.tolist() for name, t in tensors.items()} == {"b": [7], "z": [1.0, 2.0], "a": [], "c": 3.0}
    assert tensors["a"].shape == (0, 7) and tensors["a"].dtype == torch.int64 and tensors["z"].data_ptr() % 4 == 0


def test_aligned_data_are_not_copied(tmp_path):
    save_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(4), "y": torch.zeros(4, dtype=torch.float64)})
    tensors = open_safetensors(tmp_path / "x.safetensors")
    assert tensors["x"].untyped_storage().data_ptr() == tensors["y"].untyped_storage().data_ptr()


def test_a_file_without_tensors(tmp_path):
    assert open_safetensors(write(tmp_path / "none.safetensors", {"__metadata__": {"a": "b"}})) == {}


@pytest.mark.parametrize("name, dtype", weights.DTYPES.items())
def test_every_dtype_there_and_back(tmp_path, name, dtype):
    tensors = {"odd": torch.ones(3, dtype=torch.uint8), "x": torch.arange(6).reshape(2, 3).to(dtype)}      # 'odd' puts x at no multiple of its size
    save_safetensors(tmp_path / "x.safetensors", tensors, {"made": "here"})
    back = open_safetensors(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys() and back["x"].dtype == dtype and torch.equal(back["x"], tensors["x"])


def test_what_is_saved(tmp_path):
    """Scalars, empty and transposed tensors, NaN bits and odd names come back; the header is what the format asks for."""
    nan = torch.tensor([float("nan"), -0.0, float("inf")])
    tensors = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 2), "é \n\"": torch.arange(6).reshape(2, 3).t(), "nan": nan}
    save_safetensors(tmp_path / "x.safetensors", tensors, {"made": "here"})
    back = open_safetensors(tmp_path / "x.safetensors")
    assert list(back) == list(tensors) and all(back[n].shape == t.shape and back[n].dtype == t.dtype for n, t in tensors.items())
    assert back["scalar"].item() == 3.5 and torch.equal(back["é \n\""], tensors["é \n\""])
    assert torch.equal(back["nan"].view(torch.int32), nan.view(torch.int32))
    content = (tmp_path / "x.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    assert size % 8 == 0 and json.loads(content[8:8 + size])["__metadata__"] == {"made": "here"}


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
    {"x": entry(0, 2, [2], "U8"), "y": entry(4, 8, [1])}, {"x": entry(0, 8, [2], ["F32"])}, {"x": entry(0, 8, [2], {})},
    {"x": entry(0, 8, [2]), "y": entry(8, 8, [2**62, 2**62, 0])}, {"x": entry(0, 4, {}), "y": entry(4, 8, [1])},
    {"x": {**entry(0, 8, [2]), "data_offsets": [0, 8, 8]}}, {"x": {**entry(0, 8, [2]), "data_offsets": [0]}},
    b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}',
    {"x": entry(8, 0, [2])}, {"x": entry(0, 8, [2]), "y": entry(0, 8, [2])}, {"x": entry(0, 4, [1]), "y": entry(4, 12, [2])},
    {"x": entry(0, 8, None)}, {"x": entry(0, 8, "2")}, {"x": entry(0, 8, [[2]])}, {"x": entry("0", "8", [2])},
    {"x": entry(0, 8, [2], None)}, {"x": entry(0, 8, [2], 7)}, {"x": [0, 8]}, {"x": {**entry(0, 8, [2]), "data_offsets": None}}, {"__metadata__": {}}, {},
    b"{", b"\xff\xfe", b'{"x":' * 50_000, b"[" * 50_000, b"", b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
    b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
    b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
])
def test_lying_headers_are_named(tmp_path, header):
    path = write(tmp_path / "lie.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match="lie.safetensors"):
        open_safetensors(path)


def test_what_the_format_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="x.safetensors: tensor 'x' is torch.complex64"):
        save_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(1, dtype=torch.complex64)})


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 10) + b"{}"])
def test_short_files_are_named(tmp_path, content):
    (tmp_path / "short.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="short.safetensors"):
        open_safetensors(tmp_path / "short.safetensors")


def test_flipped_bytes_are_an_error_or_change_nothing_but_values(tmp_path):
    path = tmp_path / "bad.safetensors"
    save_safetensors(path, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)})
    original, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(original)
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.unlink()      # a new file: the old one may still be mapped
        path.write_bytes(damaged)
        try:
            tensors = open_safetensors(path)
        except ValueError as error:
            assert "bad.safetensors" in str(error)
            refused += 1
        else:      # another name, dtype of that size or order of axes is a lie that no reader can see
            assert [t.numel() * t.element_size() for t in tensors.values()] == [24, 32], damaged
    assert refused > 600


@pytest.mark.parametrize("write_it", [
    torch.save, lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False),
    lambda value, file: file.write(pickle.dumps(value, protocol=2))], ids=["zip", "legacy", "pickle"])
def test_a_pickle_runs_no_code(tmp_path, write_it):
    path, trace = tmp_path / "evil.bin", tmp_path / "was-here"
    with open(path, "wb") as file:
        write_it({"x": Malicious(trace)}, file)
    with pytest.raises(ValueError, match="evil.bin: .*asks to run .*mkdir") as caught:
        open_torch(path)
    assert not trace.exists() and "can still be loaded" not in str(caught.value)      # torch's own advice is to trust the file


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights(tmp_path, zipped):
    path = tmp_path / "w.bin"
    torch.save({"x": torch.arange(3)}, path, _use_new_zipfile_serialization=zipped)
    assert open_torch(path)["x"].tolist() == [0, 1, 2]
    content = path.read_bytes()
    rng = random.Random(1)
    for damaged in (content[:-40], content[:100], b"", rng.randbytes(500), *(content[:n] for n in range(1, len(content), 41))):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="w.bin"):
            open_torch(path)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.unlink()
        path.write_bytes(damaged)
        try:
            assert all(isinstance(tensor, torch.Tensor) for tensor in open_torch(path).values())
        except ValueError as error:
            assert "w.bin" in str(error)


def test_other_contents_and_missing_files(tmp_path):
    tensor = torch.zeros(1)
    for other in ({"x": 3}, {3: tensor}, {"x": tensor.to_sparse()}, [tensor], tensor, None, {"x": {"y": tensor}}, torch.nn.Linear(1, 1)):
        torch.save(other, tmp_path / "n.bin")
        with pytest.raises(ValueError, match="n.bin"):
            open_torch(tmp_path / "n.bin")
    for read in (open_safetensors, open_pickle, open_torch):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")
