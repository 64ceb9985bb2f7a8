"""The encoder against a slow, plain BERT written here from the paper; loading by name; checkpoints."""

import json
import math
import os

import pytest
import torch

import download
import emobert
from emobert import (
    BertConfig,
    BertEncoder,
    EmoBERT,
    choose_device,
    hugging_face_names,
    load_checkpoint,
    pretrained_folder,
    pretrained_tokenizer,
    save_checkpoint,
)
from tests.conftest import TINY, Malicious
from weights import save_safetensors

CONFIG = dict(vocab_size=50, **TINY)


def published_weights(config: BertConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under Hugging Face's names, in the layout of prajjwal1/bert-tiny, with everything it holds beside the encoder."""
    generator = torch.Generator().manual_seed(seed)
    C, inner = config.hidden_size, config.intermediate_size
    shapes = {"embeddings.word_embeddings.weight": (config.vocab_size, C), "embeddings.position_embeddings.weight": (config.max_position_embeddings, C),
              "embeddings.token_type_embeddings.weight": (config.type_vocab_size, C), "embeddings.LayerNorm": (C,), "pooler.dense": (C, C)}
    for i in range(config.num_hidden_layers):
        p = f"encoder.layer.{i}."
        shapes |= {p + f"attention.self.{name}": (C, C) for name in ("query", "key", "value")}
        shapes |= {p + "attention.output.dense": (C, C), p + "attention.output.LayerNorm": (C,), p + "intermediate.dense": (inner, C),
                   p + "output.dense": (C, inner), p + "output.LayerNorm": (C,)}
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith(".weight"):
            tensors[name] = torch.randn(shape, generator=generator) * 0.3
        else:
            tensors[name + ".weight"] = torch.randn(shape, generator=generator) * 0.3
            tensors[name + ".bias"] = torch.randn(shape[0], generator=generator) * 0.3
    return tensors


def write_folder(folder, tensors, config=CONFIG, prefix="bert.", gamma=False, safetensors=False):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if gamma:
        tensors = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in tensors.items()}
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    tensors |= {"cls.predictions.bias": torch.zeros(3), "cls.seq_relationship.weight": torch.zeros(2, 2),
                prefix + "embeddings.position_ids": torch.arange(64)[None]}
    if safetensors:
        save_safetensors(folder / "model.safetensors", tensors)
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def plain_bert(w, config: BertConfig, ids: list[int]) -> torch.Tensor:
    """Last hidden states (T, C) of one unpadded row, one head and one token at a time. Devlin et al. 2018; Vaswani et al. 2017."""
    C, nh = config.hidden_size, config.num_attention_heads
    hs = C // nh

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + config.layer_norm_eps).sqrt() \
            * w[name + ".weight"] + w[name + ".bias"]
    x = torch.stack([w["embeddings.word_embeddings.weight"][i] + w["embeddings.position_embeddings.weight"][t]
                     + w["embeddings.token_type_embeddings.weight"][0] for t, i in enumerate(ids)])
    x = norm(x, "embeddings.LayerNorm")
    for layer in range(config.num_hidden_layers):
        p = f"encoder.layer.{layer}."
        q, k, v = (linear(x, p + f"attention.self.{name}") for name in ("query", "key", "value"))
        heads = []
        for h in range(nh):
            part = slice(h * hs, (h + 1) * hs)
            rows = [torch.softmax(torch.stack([q[t, part] @ k[u, part] / math.sqrt(hs) for u in range(len(ids))]), 0) @ v[:, part]
                    for t in range(len(ids))]
            heads.append(torch.stack(rows))
        x = norm(x + linear(torch.cat(heads, -1), p + "attention.output.dense"), p + "attention.output.LayerNorm")
        inner = linear(x, p + "intermediate.dense")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = norm(x + linear(inner, p + "output.dense"), p + "output.LayerNorm")
    return x


def rows_of(lengths, vocab_size=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


@pytest.mark.parametrize("layers, heads", [(1, 2), (2, 2), (3, 4)])
@pytest.mark.parametrize("style", [dict(), dict(gamma=True), dict(prefix=""), dict(safetensors=True, prefix="")])
def test_equals_a_plain_bert(tmp_path, layers, heads, style):
    values = CONFIG | dict(num_hidden_layers=layers, num_attention_heads=heads)
    config = BertConfig(**values)
    tensors = published_weights(config)
    encoder = BertEncoder.from_pretrained(write_folder(tmp_path / "m", tensors, values, **style))
    lengths = (9, 1, 4, 9)
    ids, mask = rows_of(lengths)
    with torch.no_grad():
        hidden, pooled = encoder(ids, mask), encoder.pooled(ids, mask)
        for i, n in enumerate(lengths):
            expected = plain_bert(tensors, config, ids[i, :n].tolist())
            torch.testing.assert_close(hidden[i, :n], expected, atol=2e-5, rtol=1e-5)
            top = torch.tanh(expected[0] @ tensors["pooler.dense.weight"].T + tensors["pooler.dense.bias"])
            torch.testing.assert_close(pooled[i], top, atol=2e-5, rtol=1e-5)
            alone = encoder.pooled(ids[i:i + 1, :n], mask[i:i + 1, :n])
            torch.testing.assert_close(pooled[i:i + 1], alone, atol=2e-6, rtol=1e-5)


def test_training_through_the_first_row_only(tiny):
    """The shortcut of the last layer has the gradients of the long way, for every parameter."""
    ids, mask = rows_of((7, 3, 5), 80)
    encoder = tiny.encoder.train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in encoder.layers:
        layer.attention_dropout = 0.0
    target = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    gradients = []
    for short in (True, False):
        encoder.zero_grad()
        pooled = encoder.pooled(ids, mask) if short else torch.tanh(encoder.pooler(encoder(ids, mask)[:, 0]))
        (pooled * target).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in encoder.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=2e-4, rtol=1e-3, msg=name)
    assert gradients[0]["layers.1.query_key_value.weight"].abs().sum() > 0


def test_attention_dropout_scales_the_bias_of_the_values(tiny):
    """With all attention dropped, a layer must not see the values' bias either: as it is in the full layer."""
    layer = tiny.encoder.layers[1].train()
    layer.dropout.p, layer.attention_dropout = 0.0, 1.0 - 1e-9
    x, mask = torch.randn(2, 5, 32), None
    torch.testing.assert_close(layer.first_row(x, mask), layer(x, mask)[:, 0], atol=1e-4, rtol=1e-4)


def test_dropout_is_on_in_training_only(tiny):
    ids, mask = rows_of((7, 3), 80)
    assert torch.equal(tiny.encoder.pooled(ids, mask), tiny.encoder.pooled(ids, mask))
    tiny.train()
    assert not torch.equal(tiny.encoder.pooled(ids, mask), tiny.encoder.pooled(ids, mask))


def test_too_many_tokens(tiny):
    with pytest.raises(ValueError, match="65 tokens"):
        tiny.encoder(*rows_of((65,), 80))


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("pooler.dense.bias"), "lacks the weights pooler.dense.bias"),
    (lambda t: t.update({"encoder.layer.7.output.dense.bias": torch.zeros(1)}), "unexpected weights encoder.layer.7"),
    (lambda t: t.update({"pooler.dense.weight": torch.zeros(32, 31)}), r"pooler.dense.weight has the shape \(32, 31\)"),
    (lambda t: t.update({"encoder.layer.0.attention.self.key.weight": torch.zeros(16, 32)}), "self.key.weight has the shape"),
    (lambda t: t.update({"embeddings.token_type_embeddings.weight": torch.zeros(1, 32)}), "token_type_embeddings.weight has the shape"),
])
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    tensors = published_weights(BertConfig(**CONFIG))
    change(tensors)
    with pytest.raises(ValueError, match=message):
        BertEncoder.from_pretrained(write_folder(tmp_path / "m", tensors))


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        BertEncoder.from_pretrained(tmp_path / "none")
    folder = write_folder(tmp_path / "m", {})
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        BertEncoder.from_pretrained(folder)
    for text in ("{", "[]", '{"hidden_size": 33}', '{"hidden_size": "32"}', '{"num_hidden_layers": 0}', '{"model_type": "gpt2"}', '{"hidden_act": "relu"}'):
        (folder / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="config.json"):
            BertConfig.from_file(folder / "config.json")


def test_the_name_map_covers_every_parameter_once():
    config = BertConfig(**CONFIG)
    names = hugging_face_names(config)
    assert names.keys() == dict(BertEncoder(config).named_parameters()).keys()
    theirs = [name for group in names.values() for name in group]
    assert sorted(theirs) == sorted(published_weights(config))


def test_downloads_are_checked(tmp_path, monkeypatch):
    """A mirror that hands out other weights than the pinned ones is refused, and nothing is left in the cache."""
    mirror = tmp_path / "mirror/huggingface.co/prajjwal1/bert-tiny/resolve" / emobert.PRETRAINED["prajjwal1/bert-tiny"][0]
    mirror.mkdir(parents=True)
    for name in ("config.json", "vocab.txt", "pytorch_model.bin"):
        (mirror / name).write_text("{}", encoding="utf-8")
    monkeypatch.setenv("EMOBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EMOBERT_MIRROR", str(tmp_path / "mirror"))
    assert emobert.can_be_had("prajjwal1/bert-tiny")
    with pytest.raises(download.DownloadError, match="vocab.txt"):
        pretrained_folder("prajjwal1/bert-tiny")
    assert not list((tmp_path / "cache").rglob("vocab.txt"))


def test_tokenizer_of_a_folder(tmp_path, vocab):
    folder = write_folder(tmp_path / "m", {})
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    assert pretrained_tokenizer(folder).lowercase is True
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    assert pretrained_tokenizer(folder).lowercase is False


def test_any_number_of_tasks():
    config = BertConfig(**CONFIG)
    ids, mask = rows_of((4, 2))
    for labels in ({"a": ["x", "y"]}, {"a": ["x", "y"], "b": ["p", "q", "r"], "c": list("12345")}):
        logits = EmoBERT(config, labels)(ids, mask)
        assert {task: tuple(v.shape) for task, v in logits.items()} == {task: (2, len(names)) for task, names in labels.items()}
    for labels in ({}, {"a": ["x"]}, {"a": ["x", "x"]}):
        with pytest.raises(ValueError):
            EmoBERT(config, labels)


def test_bert_tiny_is_the_default():
    assert sum(p.numel() for p in BertEncoder(BertConfig()).parameters()) == 4_385_920 - 2 * 128      # less the folded token types


def test_checkpoint_round_trip(tiny, tokenizer, tmp_path):
    path = tmp_path / "a" / "b.pt"
    save_checkpoint(path, tiny, tokenizer, note="déjà vu", numbers=[1, 2.5])
    model, loaded, meta = load_checkpoint(path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny.parameters()))
    assert not model.training and model.labels == tiny.labels and loaded.vocab == tokenizer.vocab
    assert meta == {"note": "déjà vu", "numbers": [1, 2.5]}
    save_checkpoint(tmp_path / "other-name.pt", tiny, tokenizer, note="déjà vu", numbers=[1, 2.5])
    assert path.read_bytes() == (tmp_path / "other-name.pt").read_bytes()
    save_checkpoint(path, tiny, tokenizer, dtype=torch.float16)
    half, _, _ = load_checkpoint(path)
    for p, q in zip(half.parameters(), tiny.parameters()):
        assert p.dtype == torch.float32 and torch.equal(p, q.half().float())
    with pytest.raises(TypeError):
        save_checkpoint(path, tiny, tokenizer, what=object())


def test_a_failed_save_leaves_what_was_there(tiny, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(OSError):
                save_checkpoint(path, tiny, tokenizer)
        assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def damaged(content, **changes):
    return {**content, **changes}


@pytest.mark.parametrize("change", [
    lambda c: damaged(c, version=2), lambda c: damaged(c, version=None), lambda c: damaged(c, format="other"), lambda c: {}, lambda c: [1],
    lambda c: damaged(c, vocab=c["vocab"] + "\nmore"), lambda c: damaged(c, vocab=3), lambda c: damaged(c, labels={"emotion": []}),
    lambda c: damaged(c, config=c["config"] | {"hidden_size": 64}), lambda c: damaged(c, config=c["config"] | {"surprise": 1}),
    lambda c: damaged(c, weights={}), lambda c: damaged(c, weights=c["weights"] | {"more": torch.zeros(1)}),
    lambda c: damaged(c, weights=c["weights"] | {"encoder.pooler.bias": torch.zeros(31)}), lambda c: damaged(c, meta=None),
    lambda c: {k: v for k, v in c.items() if k != "config"},
])
def test_damaged_checkpoints_are_named(checkpoint, change):
    torch.save(change(torch.load(checkpoint, weights_only=True)), checkpoint)
    with pytest.raises(ValueError, match="tiny.pt"):
        load_checkpoint(checkpoint)


def test_a_later_format_is_refused_clearly(checkpoint):
    torch.save(damaged(torch.load(checkpoint, weights_only=True), version=9), checkpoint)
    with pytest.raises(ValueError, match="format 9, but this program reads format 1"):
        load_checkpoint(checkpoint)


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt")
    for content in (b"", os.urandom(3000)):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(ValueError, match="x.pt"):
            load_checkpoint(tmp_path / "x.pt")
    torch.save({"format": "emobert", "x": Malicious(tmp_path / "was-here")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt"):
        load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "was-here").exists()


def test_devices():
    assert choose_device("cpu") == "cpu" and choose_device("auto") in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no cuda"):
            choose_device("cuda")
