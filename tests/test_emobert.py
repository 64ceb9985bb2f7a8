"""The encoder against a slow, plain BERT written here from the paper; loading by name; checkpoints."""

import hashlib
import json
import math
import os
import random

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


@pytest.mark.parametrize("lengths", [(6, 6), (6, 1, 3)], ids=["full", "padded"])
@pytest.mark.parametrize("layers, heads", [(1, 2), (2, 3), (3, 3), (3, 2)])
def test_pooled_is_forward_pooled(layers, heads, lengths):
    """In double precision, values and gradients of the two ways agree to far more digits than a wrong term would leave."""
    torch.manual_seed(2)
    values = CONFIG | dict(hidden_size=48, num_hidden_layers=layers, num_attention_heads=heads,
                           hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    encoder = BertEncoder(BertConfig(**values)).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids, mask = rows_of(lengths)
    for training in (True, False):
        encoder.train(training)
        short, long = encoder.pooled(ids, mask), torch.tanh(encoder.pooler(encoder(ids, mask)[:, 0]))
        torch.testing.assert_close(short, long, atol=1e-11, rtol=1e-9)
        gradients = [torch.autograd.grad((y * torch.arange(48)).sum(), list(encoder.parameters())) for y in (short, long)]
        for (name, _), a, b in zip(encoder.named_parameters(), *gradients):
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6, msg=name)


def test_padding_is_never_looked_at(tiny):
    """Whatever ids stand there, however wide it is, and of whatever type the mask is, the answers are those of the row alone."""
    ids, mask = rows_of((7, 2, 5), 80)
    junk = torch.where(mask == 1, ids, torch.arange(7) + 20)
    wide, wide_mask = torch.nn.functional.pad(junk, (0, 9), value=3), torch.nn.functional.pad(mask, (0, 9))
    with torch.no_grad():
        expected = tiny(ids, mask)
        for other, other_mask in ((junk, mask), (wide, wide_mask), (ids, mask.bool()), (ids, mask.float())):
            for task, logits in tiny(other, other_mask).items():
                torch.testing.assert_close(logits, expected[task], atol=1e-5, rtol=1e-5)
            hidden = tiny.encoder(other, other_mask)
            for i, n in enumerate((7, 2, 5)):
                alone = tiny.encoder(ids[i:i + 1, :n], mask[i:i + 1, :n])[0]
                torch.testing.assert_close(hidden[i, :n], alone, atol=1e-5, rtol=1e-5)


def test_alone_as_in_a_batch():
    """With weights of the size that training leaves, a row's answer does not depend on its neighbours to six digits."""
    torch.manual_seed(0)
    model = EmoBERT(BertConfig(**CONFIG), {"a": ["x", "y"]}).eval()
    lengths = (9, 1, 30, 4)
    ids, mask = rows_of(lengths)
    with torch.no_grad():
        together = model(ids, mask)["a"]
        for i, n in enumerate(lengths):
            torch.testing.assert_close(model(ids[i:i + 1, :n], mask[i:i + 1, :n])["a"][0], together[i], atol=1e-6, rtol=0)


def test_heads_read_the_pooled_vector(tiny):
    ids, mask = rows_of((4, 2), 80)
    with torch.no_grad():
        logits, pooled = tiny(ids, mask), tiny.encoder.pooled(ids, mask)
        for task, names in tiny.labels.items():
            head = tiny.heads[task]
            assert logits[task].shape == (2, len(names))
            torch.testing.assert_close(logits[task], pooled @ head.weight.T + head.bias, atol=1e-5, rtol=1e-5)


def test_how_a_model_starts():
    torch.manual_seed(0)
    parameters = dict(EmoBERT(BertConfig(**CONFIG), {"a": [str(i) for i in range(30)]}).named_parameters())
    for name, parameter in parameters.items():
        if "norm" in name:
            assert parameter.eq(1.0 if name.endswith("weight") else 0.0).all(), name
        elif name.endswith("bias"):
            assert parameter.eq(0).all(), name
        else:
            assert abs(parameter.std().item() - 0.02) < 0.004, name


def test_training_through_the_first_row_only(tiny):
    """The shortcut of the last layer has the gradients of the long way, for every parameter."""
    ids, mask = rows_of((7, 3, 5), 80)
    encoder = tiny.encoder.train()
    encoder.config.hidden_dropout_prob = 0.0
    for layer in encoder.layers:
        layer.hidden_dropout = layer.attention_dropout = 0.0
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
    layer.hidden_dropout, layer.attention_dropout = 0.0, 1.0 - 1e-9
    x, mask = torch.randn(2, 5, 32), None
    torch.testing.assert_close(layer.first_row(x, mask), layer(x, mask)[:, 0], atol=1e-4, rtol=1e-4)


def test_dropout_is_on_in_training_only(tiny):
    ids, mask = rows_of((7, 3), 80)
    assert torch.equal(tiny.encoder.pooled(ids, mask), tiny.encoder.pooled(ids, mask))
    tiny.train()
    assert not torch.equal(tiny.encoder.pooled(ids, mask), tiny.encoder.pooled(ids, mask))


@pytest.mark.parametrize("hidden, attention", [(0.5, 0.0), (0.0, 0.5), (0.0, 0.0)])
def test_each_dropout_is_its_own(hidden, attention):
    config = BertConfig(**CONFIG | dict(hidden_dropout_prob=hidden, attention_probs_dropout_prob=attention))
    torch.manual_seed(0)
    encoder = BertEncoder(config)
    ids, mask = rows_of((7, 3))
    for function in (encoder, encoder.pooled):
        encoder.eval()
        calm = function(ids, mask)
        encoder.train()
        noisy, again = function(ids, mask), function(ids, mask)
        if hidden or attention:
            assert not torch.equal(noisy, calm) and not torch.equal(noisy, again)
        else:
            torch.testing.assert_close(noisy, calm, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("place", ["word_embeddings.weight", "layers.0.attention_output.bias", "layers.0.output.bias",
                                   "layers.1.attention_output.bias", "layers.1.output.bias"])
def test_every_place_of_dropout(place):
    """All weights but one tensor are zero, so that a training pass can only be random where that one is dropped out."""
    encoder = BertEncoder(BertConfig(**CONFIG | dict(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0)))
    torch.manual_seed(0)
    for name, parameter in encoder.named_parameters():
        carries = name == place or name in ("layers.0.output_norm.weight", "layers.1.attention_norm.weight", "layers.1.output_norm.weight")
        carries = carries or name == "layers.0.attention_norm.weight" or name == "embedding_norm.weight" and place.startswith("word")
        torch.nn.init.normal_(parameter) if carries or name == "pooler.weight" else torch.nn.init.zeros_(parameter)
    ids, mask = rows_of((4, 4))
    for function in (encoder, encoder.pooled):
        assert not torch.equal(function(ids, mask), function(ids, mask))


@pytest.mark.parametrize("name, value", [
    ("vocab_size", 0), ("vocab_size", "30522"), ("hidden_size", 32.0), ("hidden_size", -32), ("num_hidden_layers", True),
    ("intermediate_size", None), ("num_attention_heads", 3), ("type_vocab_size", 0), ("layer_norm_eps", math.nan),
    ("layer_norm_eps", "1e-12"), ("layer_norm_eps", -1e-12), ("hidden_dropout_prob", 1.0), ("hidden_dropout_prob", -0.1),
    ("attention_probs_dropout_prob", math.inf), ("attention_probs_dropout_prob", None),
])
def test_configurations_that_no_model_can_have(name, value):
    with pytest.raises(ValueError, match="attention heads" if value == 3 else name):
        BertConfig(**CONFIG | {name: value})


def test_rows_without_a_token_and_batches_without_a_row(tiny):
    """Nothing sensible comes of them, but numbers do, and the other rows are as they were."""
    ids, mask = rows_of((4, 4), 80)
    with torch.no_grad():
        expected = tiny.encoder.pooled(ids[:1], mask[:1])
        mask[1] = 0
        pooled = tiny.encoder.pooled(ids, mask)
        assert pooled.isfinite().all()
        torch.testing.assert_close(pooled[:1], expected, atol=1e-5, rtol=1e-5)
        assert tiny(ids[:0], mask[:0])["emotion"].shape == (0, 8) and tiny.encoder(ids[:0], mask[:0]).shape == (0, 4, 32)


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


@pytest.mark.parametrize("name", ["bert.pooler.dense.bias", "embeddings.LayerNorm.gamma"])
def test_two_weights_for_one_place(tmp_path, name):
    tensors = published_weights(BertConfig(**CONFIG)) | {name: torch.zeros(32)}
    with pytest.raises(ValueError, match="pytorch_model.bin: holds two weights for"):
        BertEncoder.from_pretrained(write_folder(tmp_path / "m", tensors, prefix=""))


def test_a_model_too_large_for_the_memory(tmp_path):
    with pytest.raises(ValueError, match="config.json: no such model fits"):
        BertEncoder.from_pretrained(write_folder(tmp_path / "m", {}, CONFIG | {"vocab_size": 10**13}))


def test_a_long_list_of_missing_weights_is_cut(tmp_path):
    with pytest.raises(ValueError, match=r"pytorch_model.bin: lacks the weights embeddings\.\S+, (\S+, ){3}\S+ and 34 more$"):
        BertEncoder.from_pretrained(write_folder(tmp_path / "m", {}))


def test_what_a_loaded_encoder_is(tmp_path):
    """In eval mode, float32 whatever the file holds, and from the safer of two files."""
    tensors = published_weights(BertConfig(**CONFIG))
    folder = write_folder(tmp_path / "m", {name: tensor.half() for name, tensor in tensors.items()}, safetensors=True)
    torch.save({"x": Malicious(tmp_path / "was-here")}, folder / "pytorch_model.bin")
    encoder = BertEncoder.from_pretrained(str(folder))
    assert not encoder.training and all(p.dtype == torch.float32 and p.requires_grad for p in encoder.parameters())
    assert torch.equal(encoder.pooler.weight, tensors["pooler.dense.weight"].half().float())
    position, segments = (tensors[f"embeddings.{name}_embeddings.weight"].half().float() for name in ("position", "token_type"))
    assert torch.equal(encoder.position_embeddings.weight, position + segments[0])      # added in float32, not in the file's half
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        BertEncoder.from_pretrained(folder)
    assert not (tmp_path / "was-here").exists()


def test_the_weights_outlive_the_file(tmp_path):
    """Training a loaded encoder must not write to the file it came from, nor depend on it."""
    folder = write_folder(tmp_path / "m", published_weights(BertConfig(**CONFIG)), safetensors=True)
    before = (folder / "model.safetensors").read_bytes()
    encoder = BertEncoder.from_pretrained(folder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


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
    monkeypatch.setenv("EMOBERT_MIRROR", str(tmp_path / "none"))
    assert not emobert.can_be_had("prajjwal1/bert-tiny")


def test_a_pretrained_encoder_is_fetched_once(tmp_path, monkeypatch, vocab):
    name, revision = "prajjwal1/bert-tiny", emobert.PRETRAINED["prajjwal1/bert-tiny"][0]
    mirror = tmp_path / "mirror/huggingface.co" / name / "resolve" / revision
    mirror.mkdir(parents=True)
    write_folder(mirror, published_weights(BertConfig(**CONFIG)))
    (mirror / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in mirror.iterdir()}
    monkeypatch.setitem(emobert.PRETRAINED, name, (revision, files))
    monkeypatch.setenv("EMOBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EMOBERT_MIRROR", str(tmp_path / "mirror"))
    first = BertEncoder.from_pretrained(name)
    monkeypatch.setenv("EMOBERT_MIRROR", str(tmp_path / "none"))      # from here on there is nothing to fetch from
    assert emobert.can_be_had(name) and pretrained_tokenizer(name).vocab == vocab
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), BertEncoder.from_pretrained(name).parameters()))


def test_tokenizer_of_a_folder(tmp_path, vocab):
    folder = write_folder(tmp_path / "m", {})
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    assert pretrained_tokenizer(folder).lowercase is True
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    assert pretrained_tokenizer(folder).lowercase is False
    for content in (b"{", b"[]", b"\xff"):
        (folder / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer_config.json: damaged"):
            pretrained_tokenizer(folder)


def test_any_number_of_tasks():
    config = BertConfig(**CONFIG)
    ids, mask = rows_of((4, 2))
    for labels in ({"a": ["x", "y"]}, {"a": ["x", "y"], "b": ["p", "q", "r"], "c": list("12345")}):
        logits = EmoBERT(config, labels)(ids, mask)
        assert {task: tuple(v.shape) for task, v in logits.items()} == {task: (2, len(names)) for task, names in labels.items()}
    for labels in ({}, {"a": ["x"]}, {"a": ["x", "x"]}, {"a": []}, {"a": ["x", "y"], "b": ["z"]}, {"a": "xy"}, {"a": None}, [["x", "y"]],
                   {"a": [["x"], ["y"]]}, {"a.b": ["x", "y"]}, {"keys": ["x", "y"]}, {"training": ["x", "y"]}, {"": ["x", "y"]}, {3: ["x", "y"]}):
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


def test_a_checkpoint_can_be_saved_over_the_one_it_came_from(checkpoint, tiny):
    """Weights may still be mapped from the file when it is replaced."""
    model, tokenizer, _ = load_checkpoint(checkpoint)
    save_checkpoint(checkpoint, model, tokenizer, round=2)
    with torch.no_grad():
        model.heads["emotion"].bias += 1      # and what is done to the model later does not reach the file
    again, _, meta = load_checkpoint(checkpoint)
    assert meta == {"round": 2} and all(torch.equal(p, q) for p, q in zip(again.parameters(), tiny.parameters()))


def test_loading_leaves_the_random_numbers_alone(checkpoint):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load_checkpoint(checkpoint)
    assert torch.equal(torch.rand(3), expected)


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

    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        save_checkpoint(tmp_path / "folder", tiny, tokenizer)
    (tmp_path / "folder").rmdir()      # and so it is empty

    def half(content, file):
        file.write(b"half of it")
        full()
    monkeypatch.setattr(torch, "save", half)
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
    lambda c: {k: v for k, v in c.items() if k != "config"}, lambda c: damaged(c, config=[1]),
    lambda c: damaged(c, config=c["config"] | {"vocab_size": 10**13}), lambda c: damaged(c, weights=[1]), lambda c: torch.zeros(3),
    lambda c: damaged(c, weights=c["weights"] | {"encoder.pooler.bias": "x"}), lambda c: damaged(c, labels=[1]),
    lambda c: damaged(c, labels={"a.b": ["x", "y"]}), lambda c: damaged(c, vocab=c["vocab"].replace("[CLS]", "[ELS]")),
])
def test_damaged_checkpoints_are_named(checkpoint, change):
    torch.save(change(torch.load(checkpoint, weights_only=True)), checkpoint)
    with pytest.raises(ValueError, match="tiny.pt"):
        load_checkpoint(checkpoint)


def test_broken_bytes_of_a_checkpoint(checkpoint):
    """A checkpoint cut off anywhere is refused; with one byte changed it is refused, or at least is a model of the same shape."""
    content, rng = checkpoint.read_bytes(), random.Random(0)
    shapes = {name: t.shape for name, t in load_checkpoint(checkpoint)[0].state_dict().items()}
    for n in (*range(0, len(content), len(content) // 40), len(content) - 1):
        checkpoint.write_bytes(content[:n])
        with pytest.raises(ValueError, match="tiny.pt"):
            load_checkpoint(checkpoint)
    structure = [*range(2000), *range(len(content) - 6000, len(content))]      # the weights lie between
    for _ in range(150):
        broken = bytearray(content)
        broken[rng.choice(structure)] = rng.randrange(256)
        checkpoint.unlink()
        checkpoint.write_bytes(broken)
        try:
            assert {name: t.shape for name, t in load_checkpoint(checkpoint)[0].state_dict().items()} == shapes
        except ValueError as error:
            assert "tiny.pt" in str(error)


def test_a_later_format_is_refused_clearly(checkpoint):
    torch.save(damaged(torch.load(checkpoint, weights_only=True), version=9), checkpoint)
    with pytest.raises(ValueError, match="format 9, but this program reads format 1"):
        load_checkpoint(checkpoint)


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt")
    for content in (b"", random.Random(0).randbytes(3000), b"PK\x03\x04" + bytes(500), b'{"format": "emobert"}'):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(ValueError, match="x.pt"):
            load_checkpoint(tmp_path / "x.pt")
    torch.save({"format": "emobert", "x": Malicious(tmp_path / "was-here")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt"):
        load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "was-here").exists()


def test_devices():
    assert choose_device("cpu") == "cpu" and choose_device("auto") in ("cpu", "cuda", "mps")
    for unknown in ("tpu", "", "cuda:", "cuda:x", "cpu:0", "CPU"):
        with pytest.raises(ValueError, match=f"unknown device '{unknown}'"):
            choose_device(unknown)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no cuda"):
            choose_device("cuda")
