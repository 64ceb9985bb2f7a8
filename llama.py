"""A Llama-style language model in one file: how a prompted model arrives at its answer.

Text becomes token ids, ids become vectors, and each layer does two things to every vector: attention, which looks back at the
earlier tokens, and a gated MLP. Positions enter as rotations of queries and keys, so that only distances matter; several
query heads share one key-value head, which shrinks what has to be remembered. What has to be remembered is the KV cache:
the keys and values of every token so far, so that a new token costs one step and not a whole pass, and so that a beginning
shared by many prompts (instructions, examples) is computed once and reused. The answer is read off greedily, the likeliest
token each time. Llama 2 and 3, Mistral 7B, SmolLM2, TinyLlama and their kin are all this one model with other numbers.

B batch, T new tokens, S tokens in the cache, C hidden size, nh query heads, kv key-value heads, hs head size, V vocabulary.
"""

import functools
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command import Parser, number, printable, run
from gguf import GGUFTensor, read_gguf
from llama_tokenizer import TEMPLATES, Tokenizer, read_json, tokenizer_from_folder, tokenizer_from_gguf
from weights import open_safetensors, open_torch

PREFILL_CHUNK = 512           # tokens a pass: bounds the memory that the attention mask of a long prompt takes
MAX_GUESSES = 7               # with the token before them eight, the most that cost hardly more than one
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# --- The model ---------------------------------------------------------------------------------------------------------

@dataclass
class LlamaConfig:
    """Sizes of a model. rope_scaling: None, {"rope_type": "linear" | "llama3", ...} as in config.json, or {"rope_type":
    "factors", "factors": Tensor (hs / 2,)}. sliding_window: how many tokens back attention sees, None for all."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if type(getattr(self, name)) is not int or not 0 < getattr(self, name) < 2**31:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not a positive integer")
        if self.num_hidden_layers > 1000 or self.head_dim % 2 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_hidden_layers} layers with {self.num_attention_heads} heads of size {self.head_dim} "
                             f"over {self.num_key_value_heads} key-value heads make no Llama model")
        if not all(isinstance(x, (int, float)) and 0 < x < math.inf for x in (self.rms_norm_eps, self.rope_theta)):
            raise ValueError("rms_norm_eps and rope_theta must be positive numbers")
        scaling = {key: value for key, value in (self.rope_scaling or {}).items() if isinstance(value, float)}
        if not all(0 < x < math.inf for x in scaling.values()) or \
                scaling.get("low_freq_factor", 0) >= scaling.get("high_freq_factor", 1):
            raise ValueError(f"the rope scaling {scaling} stretches nothing")
        if self.sliding_window is not None and not (type(self.sliding_window) is int and self.sliding_window > 0):
            raise ValueError(f"sliding_window is {self.sliding_window!r}, not a positive integer")


def _inverse_frequencies(config: LlamaConfig) -> Tensor:
    """Radians a position by which each pair of a head's numbers turns: (hs / 2,) float32. Llama 3's scaling stretches the
    slow pairs (long wavelengths) by `factor`, leaves the fast ones, and blends in between: Llama 3.1's model card."""
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "factors":
        return frequencies / scaling["factors"]
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)      # within the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / scaling["factor"] + blend * frequencies


class KVCache:
    """Room for the keys and values of `capacity` tokens of `batch_size` sequences: keys, values (layers, B, kv, capacity, hs).

    length: the slots filled. Sequences of unequal length end in the same slot: between the `shared` first slots and its own
    tokens, row b has padding[b] slots (padding (B,) int64, or None) that nothing but they themselves ever sees.
    """

    def __init__(self, model: "Llama", batch_size: int, capacity: int):
        c, like = model.config, model.embed_tokens.weight
        shape = (c.num_hidden_layers, batch_size, c.num_key_value_heads, capacity, c.head_dim)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.length = self.shared = 0
        self.padding: Tensor | None = None

    def start_with(self, prefix: "Prefix", length: int) -> None:
        """Copies the first `length` tokens of the prefix into every row. The prefix stays as it is."""
        self.keys[..., :length, :] = prefix.cache.keys[..., :length, :]
        self.values[..., :length, :] = prefix.cache.values[..., :length, :]
        self.length = self.shared = length

    def positions_and_mask(self, new: int, window: int | None) -> tuple[Tensor, Tensor | None]:
        """For `new` more tokens: their positions (1 or B, T), and what each may see (1 or B, 1, T, S) bool; None for all."""
        slots = torch.arange(self.length + new, device=self.keys.device)
        queries = slots[self.length:]
        if self.padding is None:
            if new == 1 and (window is None or len(slots) <= window):
                return queries[None], None
            positions, hidden = slots[None], torch.zeros(1, len(slots), dtype=torch.bool, device=slots.device)
        else:
            own = slots >= self.shared
            positions = slots - own * self.padding[:, None]                                       # (B, S)
            hidden = own & (slots < self.shared + self.padding[:, None])                          # (B, S)
        behind = positions[:, self.length:, None] - positions[:, None, :]                         # (B, T, S)
        visible = (slots <= queries[:, None]) & ~hidden[:, None, :]
        if window is not None:
            visible = visible & (behind < window)
        # A padding slot sees itself: with nothing to see its softmax would be NaN, and NaN spreads.
        visible = visible | (slots == queries[:, None])
        return positions[:, self.length:], visible[:, None]


class Int8Linear(nn.Module):
    """A linear layer without bias whose rows are int8 times a scale: weight (out, in) int8, scale (out,) float.

    A quarter of float32's memory traffic, which is what decoding waits for; a weight is off by up to a 254th of the largest
    in its row, and on a CPU the inputs are rounded to bfloat16, for which there is a kernel that reads int8 as it is.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-8).float() / 127
        self.register_buffer("weight", torch.empty_like(weight, dtype=torch.int8))
        for rows in range(0, len(weight), 4096):                       # a slice at a time: the quotient is float32
            part = slice(rows, rows + 4096)
            self.weight[part] = (weight[part] / scale[part]).round().to(torch.int8)
        self.register_buffer("scale", scale[:, 0].to(torch.bfloat16 if weight.device.type == "cpu" else weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            rows = x.reshape(-1, x.shape[-1]).bfloat16()
            return torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1).to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


class PackedLinear(nn.Module):
    """A float32 linear layer without bias on a CPU, its weight laid out for oneDNN's kernels: the same numbers, and for the few
    rows of a short prompt or a checked draft up to twice as fast as F.linear, which goes to another library."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class Int4Linear(nn.Module):
    """A linear layer without bias for a draft on a CPU: four bits a weight, with a scale and an offset for every 32.

    Coarse, but an eighth of float32's memory traffic; of a GGUF checkpoint of type Q4_1 it keeps nearly all.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        groups = weight.unflatten(1, (-1, 32))                         # (out, in / 32, 32)
        low, high = groups.aminmax(dim=2, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-8)
        levels = ((groups - low) / scale).round_().to(torch.int32).flatten(1)
        self.register_buffer("weight", torch._convert_weight_to_int4pack_for_cpu(levels, 1))
        # The kernel computes scale * (level - 8) + offset.
        self.register_buffer("scales", torch.cat((scale, low + 8 * scale), dim=2).transpose(0, 1).to(torch.bfloat16).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        y = torch._weight_int4pack_mm_for_cpu(x.flatten(0, -2).bfloat16(), self.weight, 32, self.scales)
        return y.float().view(*x.shape[:-1], -1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; queries, keys and values come from one matrix."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.nh, self.kv, self.hs = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.qkv_proj = nn.Linear(c.hidden_size, (self.nh + 2 * self.kv) * self.hs, bias=False)
        self.o_proj = nn.Linear(self.nh * self.hs, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor, start: int):
        B, T, _ = x.shape
        end, group = start + T, self.nh // self.kv
        qkv = self.qkv_proj(x).view(B, T, -1, self.hs)                 # (B, T, nh + 2 kv, hs)
        first, second = qkv[:, :, :-self.kv].chunk(2, dim=-1)          # number i is paired with number i + hs / 2
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        q = rotated[:, :, :self.nh]
        keys[:, :, start:end] = rotated[:, :, self.nh:].transpose(1, 2)          # (B, kv, T, hs)
        values[:, :, start:end] = qkv[:, :, -self.kv:].transpose(1, 2)
        # The query heads of a group line up as further queries of their key-value head, which is read once for all.
        q = q.view(B, T, self.kv, group, self.hs).permute(0, 2, 3, 1, 4).reshape(B, self.kv, group * T, self.hs)
        y = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
        y = y.view(B, self.kv, group, T, self.hs).permute(0, 3, 1, 2, 4).reshape(B, T, -1)   # (B, T, nh * hs)
        return self.o_proj(y)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); gate and up come from one matrix."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, *attention) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder. Llama(config) has random weights; `load` gives one with a checkpoint's."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        # As nn.Linear begins; nn.Embedding's own normal_ would spend two seconds on imports where the device is meta.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size).uniform_(-1, 1))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        with torch.device("cpu"):                                      # never on the meta device: no checkpoint holds them
            self.frequencies = _inverse_frequencies(config)
        self.draft: Llama | None = None                                # a coarser twin that guesses ahead; see generate_batch
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def hidden_states(self, ids: Tensor, cache: KVCache) -> Tensor:
        """ids (B, T) int64, the tokens that follow those in the cache -> (B, T, C), ready for lm_head. Advances the cache."""
        B, T = ids.shape
        start = cache.length
        if start + T > cache.keys.shape[3]:
            raise ValueError(f"{start + T} tokens do not fit into a cache of {cache.keys.shape[3]}")
        positions, mask = cache.positions_and_mask(T, self.config.sliding_window)
        self.frequencies = self.frequencies.to(ids.device)
        angles = positions.unsqueeze(-1).float() * self.frequencies                           # (1 or B, T, hs / 2)
        x = self.embed_tokens(ids)
        cos, sin = (f(angles).unsqueeze(2).to(x.dtype) for f in (torch.cos, torch.sin))       # (1 or B, T, 1, hs / 2)
        if mask is not None:                                           # once for each query head of a group
            mask = mask.repeat(1, 1, self.config.num_attention_heads // self.config.num_key_value_heads, 1)
        for layer, block in enumerate(self.layers):
            x = block(x, cos, sin, mask, cache.keys[layer], cache.values[layer], start)
        cache.length = start + T
        return self.norm(x)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) int64 -> logits (B, T, V). With a cache, ids follow what is in it, and are added to it."""
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(f"{ids.shape[1]} tokens are longer than the context of {self.config.max_position_embeddings}")
        return self.lm_head(self.hidden_states(ids, cache or KVCache(self, *ids.shape)))


# --- Greedy decoding ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Prefix:
    """A beginning shared by several prompts: its ids, and a cache of one row that holds it."""

    ids: tuple[int, ...]
    cache: KVCache


def _check_prompt(model: Llama, ids, more: int = 0) -> None:
    limit = model.config.max_position_embeddings
    if not ids:
        raise ValueError("the prompt is empty: there is nothing to continue")
    if len(ids) + more > limit:
        raise ValueError(f"{len(ids)} tokens and {more} new ones do not fit into the model's context of {limit}: shorten the prompt")
    if min(ids) < 0 or max(ids) >= model.config.vocab_size:
        raise ValueError(f"the prompt holds ids outside the vocabulary of {model.config.vocab_size}")


def _run(model: Llama, ids: Tensor, cache: KVCache, last: int = 1) -> Tensor:
    """(B, T) -> logits that follow the `last` tokens, (B, last, V) float32; a long input goes through in chunks."""
    *chunks, end = ids.tensor_split(tuple(range(PREFILL_CHUNK, ids.shape[1] - last, PREFILL_CHUNK)), dim=1)
    for chunk in chunks:
        model.hidden_states(chunk, cache)
    return model.lm_head(model.hidden_states(end, cache)[:, -last:]).float()


def _choose(logits: Tensor, seen: Tensor, repetition_penalty: float) -> Tensor:
    """The likeliest token after the penalty, (B, V) and the ids seen (B, V) bool -> (B, 1), which from now on are seen."""
    penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    ids = torch.where(seen, penalized, logits).argmax(dim=-1, keepdim=True)
    seen.scatter_(1, ids, True)
    return ids


@torch.no_grad()
def prefill(model: Llama, ids: list[int]) -> Prefix:
    """Computes the keys and values of a beginning once, for any number of `generate` calls. ValueError if it is too long."""
    _check_prompt(model, ids)
    cache = KVCache(model, 1, len(ids))
    for chunk in torch.tensor([ids], device=cache.keys.device).split(PREFILL_CHUNK, dim=1):
        model.hidden_states(chunk, cache)
    return Prefix(tuple(ids), cache)


def generate(model: Llama, prompt: list[int], max_new_tokens: int = 7, repetition_penalty: float = 1.1,
             stop_ids=(), prefix: Prefix | None = None) -> list[int]:
    """The greedy continuation of one prompt: generate_batch for a single sequence."""
    return generate_batch(model, [prompt], max_new_tokens, repetition_penalty, stop_ids, prefix)[0]


@torch.inference_mode()
def generate_batch(model: Llama, prompts: list[list[int]], max_new_tokens: int = 7, repetition_penalty: float = 1.1,
                   stop_ids=(), prefix: Prefix | None = None) -> list[list[int]]:
    """Greedy continuations of several prompts at once: the new ids of each, up to and without the first of stop_ids.

    prefix: a beginning that all the (whole) prompts have, from `prefill`; it is copied, never changed. Before each choice the
    logit of every id seen so far, prompt included, is divided by repetition_penalty if positive and multiplied by it if
    negative, once however often it occurred (Keskar et al. 2019, section 4.1, as transformers applies it).
    A single prompt of a model that has a draft is decoded speculatively (Leviathan et al. 2023, for greedy decoding): the draft
    guesses some tokens, one pass of the model checks them all, and those before the first wrong one are its own choices.
    Raises ValueError for an empty prompt, one that does not start with the prefix, and one that does not fit the context.
    """
    if not prompts:
        return []
    if max_new_tokens < 1 or not repetition_penalty > 0:
        raise ValueError("max_new_tokens must be at least 1 and repetition_penalty above 0")
    shared = len(prefix.ids) if prefix else 0
    for prompt in prompts:
        _check_prompt(model, prompt, max_new_tokens)
        if prefix and tuple(prompt[:shared]) != prefix.ids:
            raise ValueError("the prompt does not begin with the prefix it is given")
    shared = min(shared, *(len(prompt) - 1 for prompt in prompts))     # the last token has to run: its output is needed
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    cache = KVCache(model, len(prompts), longest + max_new_tokens)
    device = cache.keys.device
    if prefix:
        cache.start_with(prefix, shared)
    if padding.any():
        cache.shared, cache.padding = shared, padding.to(device)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt[shared:]) for prompt in prompts], device=device)
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, torch.tensor(prompt, device=device)] = True

    answers: list[list[int]] = [[] for _ in prompts]
    open_rows, stop_ids = set(range(len(prompts))), set(stop_ids)
    guesses = ids[:, :0]                                               # (B, n), n > 0 only for a single prompt
    while open_rows:
        logits = _run(model, torch.cat((ids, guesses), dim=1), cache, 1 + guesses.shape[1])
        for i in range(logits.shape[1]):
            ids = _choose(logits[:, i], seen, repetition_penalty)
            for row in sorted(open_rows):
                new = ids[row].item()
                answers[row] += [new] * (new not in stop_ids)
                if new in stop_ids or len(answers[row]) == max_new_tokens:
                    open_rows.remove(row)
            if not open_rows or i < guesses.shape[1] and guesses[0, i] != ids:
                break
        cache.length -= logits.shape[1] - 1 - i                        # the tokens behind a wrong guess never were
        guesses = ids[:, :0]
        if open_rows and model.draft and len(prompts) == 1:
            left = max_new_tokens - len(answers[0]) - 1
            guesses = _guess(model.draft, ids, cache, seen.clone(), repetition_penalty, left, stop_ids)
    return answers


def _guess(draft: Llama, ids: Tensor, cache: KVCache, seen: Tensor, repetition_penalty: float, count: int, stop_ids) -> Tensor:
    """Up to MAX_GUESSES tokens that may well follow ids (1, 1), as (1, n). What it writes into the cache is overwritten."""
    length, guesses = cache.length, [ids]
    while len(guesses) <= min(count, MAX_GUESSES) and int(guesses[-1]) not in stop_ids:
        guesses.append(_choose(_run(draft, guesses[-1], cache)[:, 0], seen, repetition_penalty))
    cache.length = length
    return torch.cat(guesses[1:] or [ids[:, :0]], dim=1)


# --- Checkpoints -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint: its shape, and how to get it (in a dtype, or near it), mapped only while somebody holds it."""

    shape: tuple[int, ...]
    fetch: Callable[[torch.dtype], Tensor]


def load(path, dtype: torch.dtype = torch.float32, device="cpu", int8: bool = False,
         template: str | None = None) -> tuple[Llama, Tokenizer]:
    """A model ready to generate, and its tokenizer, from a Hugging Face folder or a .gguf file.

    dtype is that of the weights in memory and of the computation; int8 turns the weights of the linear layers into int8
    as they are read. Peak memory is the model in that form and one tensor; float32 on an x86 processor adds a draft in four
    bits, which speeds up decoding and leaves its result as it is: a fifth more, for small models with a tied vocabulary
    up to a half (the output matrix is laid out anew for its kernel, the draft's is int8). template: one of
    TEMPLATES, in place of what the checkpoint says. Raises FileNotFoundError, or ValueError naming the file and what is
    wrong with it: another architecture, missing, unknown or misshapen tensors, a tokenizer that does not fit.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if template is not None and template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}: choose one of {', '.join(TEMPLATES)}")
    config, sources, tokenizer = (_open_folder if path.is_dir() else _open_gguf)(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path}: a tokenizer of {tokenizer.vocab_size} tokens, but a model of {config.vocab_size}")
    tokenizer.template = template or tokenizer.template
    return _fill(path, config, sources, dtype, torch.device(device), int8), tokenizer


def _fill(path: Path, config: LlamaConfig, sources: dict[str, Source], dtype, device, int8: bool) -> Llama:
    """The model with the tensors of a checkpoint, under Hugging Face's names, which must be exactly those it needs."""
    with torch.device("meta"):
        model = Llama(config)
    wanted = _parameters(config)
    shapes = {name: (rows, *model.get_parameter(target).shape[1:]) for target, parts in wanted.items() for name, rows in parts}
    odd = {"are missing": shapes.keys() - sources.keys(),
           "have no place in a Llama model": sources.keys() - shapes.keys(),
           "have another shape than config.json says": {f"{name} {sources[name].shape}, not {shapes[name]}" for name in
                                                        shapes.keys() & sources.keys() if sources[name].shape != shapes[name]}}
    for problem, names in odd.items():
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{path}: tensors that {problem}: {', '.join(sorted(names)[:5])}{more}")
    # The kernels behind PackedLinear and Int4Linear are those of x86 processors.
    fast = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    packed = fast and dtype == torch.float32 and device.type == "cpu" and not int8
    if packed and not (config.hidden_size % 32 | config.intermediate_size % 32 | config.head_dim % 8):
        with torch.device("meta"):
            model.draft = Llama(config)
    for target, parts in wanted.items():
        weight = torch.empty(model.get_parameter(target).shape, dtype=dtype, device=device)
        start = 0
        for name, rows in parts:
            weight[start:start + rows] = sources[name].fetch(dtype)
            start += rows
        _place(model, target, weight, int8, packed)
    if config.tie_word_embeddings:
        _place(model, "lm_head.weight", model.embed_tokens.weight, int8, packed)
    return model.eval()


def _place(model: Llama, target: str, weight: Tensor, int8: bool, packed: bool) -> None:
    """Puts a weight where it belongs, in the form chosen; where the model has a draft, it shares all but the linear layers."""
    name = target.removesuffix(".weight")
    module = model.get_submodule(name)
    linear = isinstance(module, nn.Linear)
    if linear and (int8 or packed):
        model.set_submodule(name, Int8Linear(weight) if int8 else PackedLinear(weight))
    else:
        module.weight = nn.Parameter(weight, requires_grad=False)
    if model.draft:
        # The last layer in eight bits: in four, the draft would be wrong too often.
        coarse = Int8Linear if name == "lm_head" else Int4Linear
        model.draft.set_submodule(name, coarse(weight) if linear else module)


def _parameters(c: LlamaConfig) -> dict[str, list[tuple[str, int]]]:
    """Our parameter -> the tensors of a Hugging Face checkpoint that it consists of, one below the other, with their rows."""
    C, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = {"input_layernorm": {"input_layernorm": C}, "post_attention_layernorm": {"post_attention_layernorm": C},
             "self_attn.qkv_proj": {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv},
             "self_attn.o_proj": {"self_attn.o_proj": C},
             "mlp.gate_up_proj": {"mlp.gate_proj": c.intermediate_size, "mlp.up_proj": c.intermediate_size},
             "mlp.down_proj": {"mlp.down_proj": C}}
    parameters = {"embed_tokens.weight": [("model.embed_tokens.weight", c.vocab_size)],
                  "norm.weight": [("model.norm.weight", C)]}
    for i in (f"layers.{i}." for i in range(c.num_hidden_layers)):
        for target, parts in layer.items():
            parameters[f"{i}{target}.weight"] = [(f"model.{i}{name}.weight", rows) for name, rows in parts.items()]
    if not c.tie_word_embeddings:
        parameters["lm_head.weight"] = [("lm_head.weight", c.vocab_size)]
    return parameters


def _open_folder(folder: Path) -> tuple[LlamaConfig, dict[str, Source], Tokenizer]:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json in it, so not a Hugging Face model folder")
    settings = read_json(config_file)
    try:
        config = _config_from_json(settings)
    except KeyError as error:
        raise ValueError(f"{config_file}: lacks {error}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{config_file}: {error}") from None
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    ends = [s.get("eos_token_id") for s in (settings, generation)]                            # each a number, a list or nothing
    ends = [i for end in ends for i in (end if isinstance(end, list) else [end]) if isinstance(i, int)]
    tokenizer = tokenizer_from_folder(folder, settings["model_type"], ends)

    sources: dict[str, Source] = {}
    for file in _weight_files(folder):
        safe = file.suffix == ".safetensors"
        for name, tensor in (open_safetensors if safe else open_torch)(file).items():
            if name in sources:
                raise ValueError(f"{file}: tensor {name!r} is in another file, too")
            if not tensor.is_floating_point():
                raise ValueError(f"{file}: tensor {name!r} holds {tensor.dtype}: a quantized checkpoint; use one in GGUF")
            # Opened anew for each tensor: pages of a map count as memory in use for as long as the map is there.
            def fetch(_, file=file, name=name, tensor=None if safe else tensor):
                return open_safetensors(file)[name] if tensor is None else tensor

            sources[name] = Source(tuple(tensor.shape), fetch)
    # Buffers that early checkpoints hold beside the weights, and the copy of a tied matrix, carry nothing of their own.
    surplus = [n for n in sources if n.endswith(".rotary_emb.inv_freq")] + ["lm_head.weight"] * config.tie_word_embeddings
    for name in surplus:
        sources.pop(name, None)
    return config, sources, tokenizer


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
                raise ValueError(f"{index}: has no weight_map of tensors to files of this folder")
            files = [folder / n for n in sorted(set(names.values()))]
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(f"{file}: missing, though {index.name} counts on it; download it again")
            return files
    raise FileNotFoundError(f"{folder}: neither model.safetensors nor pytorch_model.bin, nor an index of either")


def _config_from_json(settings: dict) -> LlamaConfig:
    kind, heads = settings.get("model_type"), settings.get("num_attention_heads")
    if kind not in ("llama", "mistral"):
        raise ValueError(f"the architecture {kind!r} is not supported; 'llama' and 'mistral' are")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    odd = [key for key in ("attention_bias", "mlp_bias", "quantization_config") if settings.get(key)]
    odd += [f"rope type {scaling!r}"] * (scaling not in ("default", "linear", "llama3"))
    odd += [f"activation {settings.get('hidden_act')!r}"] * (settings.get("hidden_act", "silu") not in ("silu", "swish"))
    if odd:
        raise ValueError(f"{odd[0]} is not supported")
    needed = {"linear": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    return LlamaConfig(
        *(settings[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")), heads,
        settings.get("num_key_value_heads") or heads, settings.get("head_dim") or settings["hidden_size"] // heads,
        settings.get("max_position_embeddings", 2048), settings.get("rms_norm_eps", 1e-6),
        rope.get("rope_theta") or settings.get("rope_theta", 10000.0),
        {"rope_type": scaling} | {key: float(rope[key]) for key in needed[scaling]} if scaling in needed else None,
        settings.get("sliding_window") if kind == "mistral" else None, bool(settings.get("tie_word_embeddings", False)))


GGUF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
              "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
              "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
              "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def _open_gguf(path: Path) -> tuple[LlamaConfig, dict[str, Source], Tokenizer]:
    metadata, tensors = read_gguf(path)
    if (kind := metadata.get("general.architecture")) != "llama" or metadata.get("llama.expert_count"):
        raise ValueError(f"{path}: the architecture {kind!r}{' with experts' * (kind == 'llama')} is not supported; 'llama' is")
    get = {key.removeprefix("llama."): value for key, value in metadata.items()}.get
    factors, scaling = tensors.pop("rope_freqs.weight", None), get("rope.scaling.type", "none")
    try:
        heads, hidden = get("attention.head_count"), get("embedding_length")
        head_dim = get("attention.key_length") or hidden // heads
        if scaling not in ("none", "linear") or get("rope.dimension_count", head_dim) != head_dim:
            raise ValueError(f"positions with scaling {scaling!r} over {get('rope.dimension_count')} of {head_dim} numbers")
        rope = {"rope_type": "linear", "factor": float(get("rope.scaling.factor", 1.0))} if scaling == "linear" else None
        if factors and factors.shape == (head_dim // 2,):
            rope = {"rope_type": "factors", "factors": factors.dequantize()}
        config = LlamaConfig(
            get("vocab_size") or len(get("tokenizer.ggml.tokens")), hidden, get("feed_forward_length"), get("block_count"),
            heads, get("attention.head_count_kv") or heads, head_dim, get("context_length"),
            get("attention.layer_norm_rms_epsilon", 1e-5), get("rope.freq_base", 10000.0), rope,
            get("attention.sliding_window") or None, "output.weight" not in tensors)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: its metadata describe no Llama model ({error})") from None
    tokenizer = tokenizer_from_gguf(path, metadata)
    sources = {}
    for name, tensor in tensors.items():
        block, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(.*?)(?:\.weight)?", name).groups()
        full = f"model.layers.{block}.{GGUF_NAMES.get(part)}.weight" if block else f"{GGUF_NAMES.get(part)}.weight"
        turned = {"attn_q": heads, "attn_k": config.num_key_value_heads}.get(part, 0)
        sources[full if part in GGUF_NAMES else name] = Source(tensor.shape, functools.partial(_from_gguf, tensor, turned))
    return config, sources, tokenizer


def _from_gguf(tensor: GGUFTensor, heads: int, dtype: torch.dtype) -> Tensor:
    """A tensor in Hugging Face's order. llama.cpp rotates neighbouring numbers of a head, not number i with i + hs / 2, and
    stores the rows of queries and keys (heads > 0) accordingly: (head, pair, which of the two) -> (head, which, pair)."""
    weight = tensor.dequantize(dtype)
    return weight.view(heads, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape) if heads else weight


# --- Command line ------------------------------------------------------------------------------------------------------

def main() -> int:
    parser = Parser("llama.py", __doc__)
    parser.add_argument("path", help="a Hugging Face model folder or a .gguf file")
    parser.add_argument("prompt", help="what the user says")
    parser.add_argument("--system", default="", help="instructions that come before it")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=100)
    parser.add_argument("--repetition-penalty", type=number(float, above=0), default=1.1, help="1 for none (%(default)s)")
    parser.add_argument("--template", choices=TEMPLATES, help="the chat template, in place of the checkpoint's")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and computation (%(default)s)")
    parser.add_argument("--int8", action="store_true", help="weight-only quantization of the linear layers to eight bits")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device here: use --device cpu")
    clock = [time.perf_counter()]
    model, tokenizer = load(args.path, DTYPES[args.dtype], args.device, args.int8, args.template)
    ids = tokenizer.chat(args.system, args.prompt)
    clock.append(time.perf_counter())
    prefix = prefill(model, ids[:-1])
    clock.append(time.perf_counter())
    answer = generate(model, ids, args.max_new_tokens, args.repetition_penalty, tokenizer.stop_ids, prefix)
    clock.append(time.perf_counter())
    load_seconds, prefill_seconds, decode_seconds = (after - before for before, after in zip(clock, clock[1:]))
    # The end mark was decoded, too, where the answer was not cut off.
    speed = min(len(answer) + 1, args.max_new_tokens) / decode_seconds
    text = tokenizer.decode(answer)
    if args.json:
        print(json.dumps({"answer": text, "prompt_tokens": len(ids), "new_tokens": len(answer), "tokens_per_second": speed,
                          "load_seconds": load_seconds, "prefill_seconds": prefill_seconds}, ensure_ascii=False))
        return 0
    print("\n".join(map(printable, text.split("\n"))))
    print(f"loaded in {load_seconds:.1f} s, {len(ids)} tokens read in {prefill_seconds:.2f} s, "
          f"{len(answer)} written at {speed:.1f} tokens/s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
