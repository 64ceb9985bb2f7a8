"""The decoder against a plain one written here and against transformers; caches, batches, drafts; checkpoints, good and bad."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import llama
from gguf import TYPES
from llama import KVCache, LlamaConfig, generate, generate_batch, load, prefill
from tests.test_gguf import random_blocks, write_gguf
from weights import save_safetensors

CONFIG = LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8, max_position_embeddings=128)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
VARIANTS = {"plain": CONFIG, "tied": replace(CONFIG, tie_word_embeddings=True), "window": replace(CONFIG, sliding_window=5),
            "llama3": replace(CONFIG, rope_scaling=LLAMA3, rope_theta=500.0), "one head": replace(CONFIG, num_key_value_heads=1),
            "linear": replace(CONFIG, rope_scaling={"rope_type": "linear", "factor": 2.0}),
            "wide": replace(CONFIG, num_key_value_heads=4, head_dim=16)}
TEXTS = ["The train was late again and I am so angry.", "What a wonderful day with the dog!", "I miss the sun, always."] * 40


def random_weights(config: LlamaConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint under Hugging Face's names, with weights large enough for answers to differ."""
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for target, parts in llama._parameters(config).items():
        for name, rows in parts:
            columns = {"o_proj": config.num_attention_heads * config.head_dim, "down_proj": config.intermediate_size}
            shape = (rows,) if "norm" in name else (rows, columns.get(name.split(".")[-2], config.hidden_size))
            weights[name] = torch.randn(shape, generator=random) * (0.3 if len(shape) == 2 else 0.1) + (len(shape) == 1)
    return weights


def reference(weights: dict, config: LlamaConfig, ids: list[int]) -> torch.Tensor:
    """Logits (T, V) by the model's definition, a token and a head at a time: complex rotations, no cache, nothing fused."""
    hs, scaling = config.head_dim, config.rope_scaling or {}
    rate = [config.rope_theta ** (-2 * i / hs) for i in range(hs // 2)]
    if scaling.get("rope_type") == "linear":
        rate = [r / scaling["factor"] for r in rate]
    if scaling.get("rope_type") == "llama3":
        for i, r in enumerate(rate):
            turns = scaling["original_max_position_embeddings"] * r / 6.283185307179586
            share = min(1.0, max(0.0, (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])))
            rate[i] = r * share + r / scaling["factor"] * (1 - share)

    def norm(x, name):
        return x / (x.pow(2).mean() + config.rms_norm_eps).sqrt() * weights[name]

    def turn(head, position):
        pairs = torch.complex(head[:hs // 2], head[hs // 2:]) * torch.polar(torch.ones(hs // 2), torch.tensor(rate) * position)
        return torch.cat((pairs.real, pairs.imag))

    xs = [weights["model.embed_tokens.weight"][i] for i in ids]
    for layer in range(config.num_hidden_layers):
        w = {name: weights[f"model.layers.{layer}.{name}.weight"] for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
        normed = [norm(x, f"model.layers.{layer}.input_layernorm.weight") for x in xs]
        q, k, v = ([(w[f"self_attn.{part}_proj"] @ x).split(hs) for x in normed] for part in "qkv")
        for t in range(len(ids)):
            heads = []
            for head in range(config.num_attention_heads):
                group = head * config.num_key_value_heads // config.num_attention_heads
                seen = range(max(0, t + 1 - (config.sliding_window or t + 1)), t + 1)
                scores = torch.stack([turn(q[t][head], t) @ turn(k[s][group], s) for s in seen]) / hs**0.5
                heads.append(sum(p * v[s][group] for p, s in zip(scores.softmax(0), seen)))
            xs[t] = xs[t] + w["self_attn.o_proj"] @ torch.cat(heads)
            y = norm(xs[t], f"model.layers.{layer}.post_attention_layernorm.weight")
            xs[t] = xs[t] + w["mlp.down_proj"] @ (F.silu(w["mlp.gate_proj"] @ y) * (w["mlp.up_proj"] @ y))
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return torch.stack([head @ norm(x, "model.norm.weight") for x in xs])


def spell(weights: dict, config: LlamaConfig, ids: list[int], count: int, penalty: float) -> list[int]:
    """Greedy decoding by the definition: the whole text anew for every token."""
    ids, start = list(ids), len(ids)
    for _ in range(count):
        logits = reference(weights, config, ids)[-1]
        for i in set(ids):
            logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
        ids.append(int(logits.argmax()))
    return ids[start:]


@pytest.fixture(scope="session")
def spm_model() -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=out, vocab_size=320, model_type="bpe",
                                             byte_fallback=True, character_coverage=0.98, minloglevel=2,
                                             normalization_rule_name="identity", remove_extra_whitespaces=False)      # as Llama 2's
    return out.getvalue()


def settings(config: LlamaConfig, kind: str | None = None) -> dict:
    values = dict(vars(config), model_type=kind or ("mistral" if config.sliding_window else "llama"), eos_token_id=2, hidden_act="silu")
    return values


@pytest.fixture
def folder(tmp_path, spm_model):
    """Makes a Hugging Face folder: folder(config, weights=…, shards=…, binary=…)."""
    def make(config: LlamaConfig = CONFIG, weights: dict | None = None, shards: int = 1, binary: bool = False, **more):
        path = tmp_path / "model"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(settings(config) | more))
        (path / "tokenizer.model").write_bytes(spm_model)
        weights = random_weights(config) if weights is None else weights
        stem, suffix = ("pytorch_model", "bin") if binary else ("model", "safetensors")
        index = {}
        for shard in range(shards):
            name = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
            part = dict(list(weights.items())[shard::shards])          # q, k and v of a layer end up in different files
            torch.save(part, path / name) if binary else save_safetensors(path / name, part)
            index |= dict.fromkeys(part, name)
        if shards > 1:
            (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
        return path
    return make


PROMPT = [1, 40, 41, 42, 40, 7, 260, 33, 90, 41, 5, 200]


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_answers_equal_the_definition(name, folder):
    config = VARIANTS[name]
    model, _ = load(folder(config))
    want = reference(random_weights(config), config, PROMPT)
    torch.testing.assert_close(model(torch.tensor([PROMPT]))[0], want, rtol=1e-3, atol=1e-3)
    answer = spell(random_weights(config), config, PROMPT, 8, 1.3)
    assert generate(model, PROMPT, 8, 1.3) == answer
    assert generate(model, PROMPT, 8, 1.3, prefix=prefill(model, PROMPT[:7])) == answer


def test_cached_equals_uncached_and_the_cache_refuses_to_overflow(folder):
    model, _ = load(folder(VARIANTS["window"]))
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    whole, cache = model(ids), KVCache(model, 2, 12)
    steps = torch.cat([model(part, cache) for part in ids.split((5, 1, 4, 2), dim=1)], dim=1)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)
    assert cache.length == 12
    with pytest.raises(ValueError, match="13 tokens do not fit"):
        model(ids[:, :1], cache)


@pytest.mark.parametrize("name", ["plain", "window", "llama3"])
@pytest.mark.parametrize("shared", [0, 4])
def test_batched_equals_single(name, shared, folder):
    model, _ = load(folder(VARIANTS[name]))
    begin = PROMPT[:shared]
    prompts = [begin + PROMPT[:n] for n in (1, 9, 4, 12)] + [begin + [7, 8]]
    prefix = prefill(model, begin) if shared else None
    single = [generate(model, prompt, 9, 1.2, stop_ids=(), prefix=prefix) for prompt in prompts]
    assert generate_batch(model, prompts, 9, 1.2, prefix=prefix) == single
    stop = single[1][3]
    cut = [ids[:ids.index(stop)] if stop in ids else ids for ids in single]
    assert generate_batch(model, prompts, 9, 1.2, stop_ids=(stop,), prefix=prefix) == cut
    assert [generate(model, prompt, 9, 1.2, stop_ids=(stop,)) for prompt in prompts] == cut
    assert generate_batch(model, []) == []


def test_long_prompts_go_through_in_chunks(folder, monkeypatch):
    model, _ = load(folder(VARIANTS["window"]))
    prompts = [PROMPT * 3, PROMPT * 2]
    want, want_logits = generate_batch(model, prompts, 6), model(torch.tensor([prompts[0]]))
    monkeypatch.setattr(llama, "PREFILL_CHUNK", 5)
    assert generate_batch(model, prompts, 6) == want
    assert [generate(model, p, 6, prefix=prefill(model, PROMPT)) for p in prompts] == want
    torch.testing.assert_close(model(torch.tensor([prompts[0]])), want_logits)


def test_a_prefix_is_reused_and_never_changed(folder):
    model, _ = load(folder())
    prefix = prefill(model, PROMPT[:6])
    keys, values = prefix.cache.keys.clone(), prefix.cache.values.clone()
    for prompt in (PROMPT, PROMPT[:6] + [9], PROMPT[:6], PROMPT):      # the third is the prefix itself
        assert generate(model, prompt, 5, prefix=prefix) == generate(model, prompt, 5)
    assert torch.equal(prefix.cache.keys, keys) and torch.equal(prefix.cache.values, values)
    assert prefix.ids == tuple(PROMPT[:6]) and prefix.cache.length == 6
    with pytest.raises(ValueError, match="does not begin with the prefix"):
        generate(model, PROMPT[1:], prefix=prefix)


def test_guesses_never_change_the_answer(folder):
    model, _ = load(folder())
    assert model.draft is not None
    draft = model.draft
    plain = []
    model.draft = None
    for penalty in (1.0, 1.5):
        plain.append(generate(model, PROMPT, 30, penalty))
    stop = plain[1][20]
    stopped = generate(model, PROMPT, 30, 1.5, (stop,))
    for guesser in (draft, model, load(folder(weights=random_weights(CONFIG, 5)))[0]):     # good, perfect and hopeless
        model.draft = guesser if guesser is not model else load(folder())[0]
        assert [generate(model, PROMPT, 30, penalty) for penalty in (1.0, 1.5)] == plain
        assert generate(model, PROMPT, 30, 1.5, (stop,)) == stopped
        assert generate(model, PROMPT, 1, 1.5) == plain[1][:1]


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[4.0, 3.9, -1.0, -1.2], [-1.0, -1.1, -2.0, -9.0]])
    seen = torch.tensor([[True, False, True, False], [True, False, False, False]])
    assert llama._choose(logits, seen, 1.1).tolist() == [[1], [0]]     # 4 / 1.1 < 3.9; -1 * 1.1 = -1.1, and the first of equals
    assert seen.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert llama._choose(logits, seen, 1.2).tolist() == [[0], [1]]


def test_int8_is_close_and_small(folder):
    path = folder()
    model, quantized = load(path)[0], load(path, int8=True)[0]
    logits, coarse = model(torch.tensor([PROMPT])), quantized(torch.tensor([PROMPT]))
    assert 0 < (coarse - logits).abs().mean() < 0.1 * logits.std()
    weight = torch.randn(5, 64)
    layer = llama.Int8Linear(weight)
    assert layer.weight.dtype == torch.int8
    error = layer.weight.float() * layer.scale[:, None].float() - weight
    assert error.abs().max() <= 0.01 * weight.abs().max()
    assert quantized.layers[0].mlp.down_proj.weight.dtype == torch.int8 and quantized.draft is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, folder):
    path = folder()
    model = load(path, dtype)[0]
    assert {p.dtype for p in model.parameters()} == {dtype}
    logits = load(path)[0](torch.tensor([PROMPT]))
    assert (model(torch.tensor([PROMPT])).float() - logits).abs().mean() < 0.1 * logits.std()
    assert len(generate(model, PROMPT, 4)) == 4


@pytest.mark.parametrize("shards, binary", [(3, False), (1, True), (3, True)])
def test_all_layouts_of_a_folder_give_the_same_model(folder, shards, binary, tmp_path):
    want = load(folder())[0](torch.tensor([PROMPT]))
    (tmp_path / "model" / "model.safetensors").unlink()
    assert torch.equal(load(folder(shards=shards, binary=binary))[0](torch.tensor([PROMPT])), want)


def test_buffers_of_old_checkpoints_and_a_tied_copy_are_ignored(folder):
    config = VARIANTS["tied"]
    weights = random_weights(config)
    want = load(folder(config, weights))[0](torch.tensor([PROMPT]))
    weights |= {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.zeros(320, 32)}
    assert torch.equal(load(folder(config, weights))[0](torch.tensor([PROMPT])), want)


# --- GGUF

GGUF_LAYER = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
              "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down"}


def as_gguf(weights: dict, config: LlamaConfig) -> tuple[dict, dict]:
    """Metadata and tensors as llama.cpp's converter would write them."""
    metadata = {"general.architecture": "llama", "llama.block_count": config.num_hidden_layers, "llama.context_length": 128,
                "llama.embedding_length": config.hidden_size, "llama.feed_forward_length": config.intermediate_size,
                "llama.attention.head_count": config.num_attention_heads, "llama.attention.head_count_kv": config.num_key_value_heads,
                "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps, "llama.rope.freq_base": config.rope_theta,
                "llama.rope.dimension_count": config.head_dim, "llama.attention.key_length": config.head_dim,
                "llama.vocab_size": config.vocab_size}
    tensors = {}
    for name, weight in weights.items():
        parts = name.split(".")
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in parts:                                          # row (which, pair) of a head goes to row (pair, which)
                rows = [h * config.head_dim + which * config.head_dim // 2 + pair
                        for h in range(heads) for pair in range(config.head_dim // 2) for which in range(2)]
                weight = weight[rows]
        plain = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
        tensors[plain.get(name) or f"blk.{parts[2]}.{GGUF_LAYER['.'.join(parts[3:-1])]}.weight"] = weight
    return metadata, tensors


def spm_metadata(spm_model: bytes) -> dict:
    model = sentencepiece.SentencePieceProcessor(model_proto=spm_model)
    ids = range(model.vocab_size())
    types = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
            "tokenizer.ggml.scores": [model.get_score(i) for i in ids], "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.eos_token_id": 2}


@pytest.mark.parametrize("name", ["plain", "tied", "wide", "one head"])
def test_a_gguf_file_equals_the_folder(name, folder, tmp_path, spm_model):
    config = VARIANTS[name]
    model, tokenizer = load(folder(config))
    metadata, tensors = as_gguf(random_weights(config), config)
    path = write_gguf(tmp_path / "m.gguf", metadata | spm_metadata(spm_model), tensors)
    other, other_tokenizer = load(path)
    assert other.config == replace(model.config, rms_norm_eps=other.config.rms_norm_eps) and other.config.tie_word_embeddings == (name == "tied")
    torch.testing.assert_close(other(torch.tensor([PROMPT])), model(torch.tensor([PROMPT])), rtol=1e-4, atol=1e-4)
    for text in (*TEXTS[:3], "  two  spaces", "ünïcödé 羊駝 🦙\n\ttabs", "<s> [INST]", ""):
        assert other_tokenizer.encode(text) == tokenizer.encode(text)
        assert other_tokenizer.decode(other_tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert other_tokenizer.stop_ids == tokenizer.stop_ids == (2,)


def test_gguf_rope_factors_and_quantized_tensors(folder, tmp_path, spm_model):
    config = VARIANTS["llama3"]
    weights = random_weights(config)
    metadata, tensors = as_gguf(weights, config)
    plain = llama._inverse_frequencies(replace(config, rope_scaling=None))
    tensors["rope_freqs.weight"] = plain / llama._inverse_frequencies(config)
    quantized = {"blk.0.attn_v.weight": "Q8_0", "blk.1.ffn_gate.weight": "Q4_1", "token_embd.weight": "Q5_0"}
    for name, kind in quantized.items():
        shape = tuple(tensors[name].shape)
        tensors[name] = (kind, shape, random_blocks(kind, tensors[name].numel() // TYPES[kind][0]).tobytes())
    path = write_gguf(tmp_path / "m.gguf", metadata | spm_metadata(spm_model), tensors)
    for name, kind in (("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
                       ("model.layers.1.mlp.gate_proj.weight", "blk.1.ffn_gate.weight"), ("model.embed_tokens.weight", "token_embd.weight")):
        weights[name] = llama.read_gguf(path)[1][kind].dequantize()
    torch.testing.assert_close(load(path)[0](torch.tensor([PROMPT])), load(folder(config, weights))[0](torch.tensor([PROMPT])),
                               rtol=1e-4, atol=1e-3)


# --- transformers

@pytest.mark.parametrize("case", ["llama", "llama3", "mistral", "tied"])
def test_equals_transformers(case, tmp_path, spm_model):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3)
    if case == "mistral":
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=6)).eval()
    else:
        rope = {"rope_parameters": LLAMA3 | {"rope_theta": 300.0}} if case == "llama3" else {}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=case == "tied", **rope)).eval()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "tokenizer.model").write_bytes(spm_model)
    ours, _ = load(tmp_path)
    x = torch.tensor([PROMPT * 2])
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x).logits, rtol=1e-3, atol=1e-3)
    for prompt in (PROMPT * 2, PROMPT[3:], [5]):
        x = torch.tensor([prompt])
        want = model.generate(x, attention_mask=torch.ones_like(x), do_sample=False, repetition_penalty=1.1, max_new_tokens=20,
                              eos_token_id=None, pad_token_id=0)[0, len(prompt):].tolist()
        assert generate(ours, prompt, 20, 1.1) == want


# --- Bad input

@pytest.mark.parametrize("more, reason", [
    ({"model_type": "qwen2"}, "'qwen2'"), ({"model_type": None}, "None"), ({"hidden_size": 0}, "hidden_size"), ({"vocab_size": "x"}, "vocab_size"),
    ({"num_hidden_layers": 10**9}, "layers"), ({"num_attention_heads": 3}, "heads"), ({"attention_bias": True}, "attention_bias"),
    ({"hidden_act": "gelu"}, "gelu"), ({"rope_scaling": {"type": "yarn", "factor": 2}}, "yarn"), ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"rms_norm_eps": "small"}, "rms_norm_eps"), ({"rope_theta": -1}, "rope_theta"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"), ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "low_freq_factor"),
    ({"rope_scaling": 3}, "config.json"), ({"vocab_size": 2**40}, "vocab_size"), ({"vocab_size": 321}, "another shape"),
    ({"num_hidden_layers": 4}, "missing.*layers.3"), ({"num_hidden_layers": 2}, "no place.*layers.2"),
    ({"num_key_value_heads": 4}, r"another shape.*k_proj.weight \(16, 32\), not \(32, 32\)"),
    ({"tie_word_embeddings": False, "hidden_size": 64}, "another shape"), ({"sliding_window": 0, "model_type": "mistral"}, "sliding_window"),
])
def test_a_config_that_does_not_fit_is_refused_by_name(more, reason, folder):
    with pytest.raises(ValueError, match=reason) as error:
        load(folder(**more))
    assert "model" in str(error.value) and "\n" not in str(error.value)


def test_missing_and_surplus_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    path = folder(shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        load(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret"}}))
    with pytest.raises(ValueError, match="weight_map"):
        load(path)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors"):
        load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        load(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(path)


def test_tensors_missing_added_damaged_or_quantized(folder):
    weights = random_weights(CONFIG)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match="missing.*layers.1.mlp.up_proj"):
        load(folder(weights={k: v for k, v in weights.items() if k != name}))
    with pytest.raises(ValueError, match="no place.*q_proj.bias"):
        load(folder(weights=weights | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    with pytest.raises(ValueError, match="quantized"):
        load(folder(weights=weights | {name: torch.ones(64, 32, dtype=torch.int32)}))
    path = folder(weights=weights)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(path)


@pytest.mark.parametrize("change, reason", [
    ({"general.architecture": "falcon"}, "'falcon'"), ({"llama.expert_count": 8}, "experts"), ({"llama.block_count": "x"}, "num_hidden_layers"),
    ({"llama.attention.head_count": 0}, "metadata"), ({"llama.rope.scaling.type": "yarn"}, "yarn"), ({"llama.rope.dimension_count": 4}, "4 of 8"),
    ({"tokenizer.ggml.model": "bert"}, "'bert'"), ({"tokenizer.ggml.scores": [0.0]}, "scores"), ({"tokenizer.ggml.tokens": ["a"]}, "tokenizer"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b c"]}, "tokenizer"), ({"llama.vocab_size": 100}, "vocab|tokens"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "bloom", "tokenizer.ggml.merges": ["a b"]}, "'bloom'"),
])
def test_gguf_metadata_that_do_not_fit(change, reason, tmp_path, spm_model):
    metadata, tensors = as_gguf(random_weights(CONFIG), CONFIG)
    path = write_gguf(tmp_path / "m.gguf", metadata | spm_metadata(spm_model) | change, tensors)
    with pytest.raises(ValueError, match=reason) as error:
        load(path)
    assert "m.gguf" in str(error.value)


def test_gguf_tensors_that_do_not_fit(tmp_path, spm_model):
    metadata, tensors = as_gguf(random_weights(CONFIG), CONFIG)
    metadata |= spm_metadata(spm_model)
    for change, reason in (({"blk.0.attn_q.bias": torch.ones(32)}, "no place.*attn_q.bias"), ({"blk.7.attn_q.weight": torch.ones(32, 32)}, "no place"),
                           ({"blk.1.attn_k.weight": torch.ones(16, 16)}, "another shape")):
        with pytest.raises(ValueError, match=reason):
            load(write_gguf(tmp_path / "m.gguf", metadata, tensors | change))
    del tensors["blk.2.ffn_down.weight"]
    with pytest.raises(ValueError, match="missing.*layers.2.mlp.down_proj"):
        load(write_gguf(tmp_path / "m.gguf", metadata, tensors))


def test_prompts_that_cannot_be_continued(folder):
    model, _ = load(folder())
    for prompt, reason in (([], "empty"), ([5] * 122, "context of 128"), ([5, 320], "vocabulary"), ([-1], "vocabulary")):
        with pytest.raises(ValueError, match=reason):
            generate(model, prompt, 7)
    assert len(generate(model, [5] * 121, 7)) == 7
    with pytest.raises(ValueError, match="context"):
        prefill(model, [5] * 129)
    with pytest.raises(ValueError, match="context"):
        model(torch.zeros(1, 129, dtype=torch.int64))
    for wrong in ({"max_new_tokens": 0}, {"repetition_penalty": 0.0}):
        with pytest.raises(ValueError, match="at least 1"):
            generate(model, PROMPT, **wrong)
    with pytest.raises(ValueError, match="unknown template"):
        load(folder(), template="alpaca")


def test_command_line(folder, tmp_path):
    path = folder()
    command = [sys.executable, llama.__file__]
    done = subprocess.run([*command, path, "the dog", "--json", "--max-new-tokens", "4", "--template", "mistral"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, tokenizer = load(path, template="mistral")
    ids = tokenizer.chat("", "the dog")
    result = json.loads(done.stdout)
    answer = generate(model, ids, 4, stop_ids=tokenizer.stop_ids)
    assert (result["answer"], result["prompt_tokens"], result["new_tokens"]) == (tokenizer.decode(answer), len(ids), len(answer))
    done = subprocess.run([*command, tmp_path / "none", "hi"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
