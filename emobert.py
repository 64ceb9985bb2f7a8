"""EmoBERT: a small BERT that reads a text once and answers several questions about it.

The encoder turns token ids into one vector a token: embeddings, then layers in which every token looks at every other
(attention) and thinks for itself (two matrices around a GELU). The vector of the first token, [CLS], is taken as the text's
own, passed through a tanh layer, and each task has one Linear on top: three numbers for the sentiment, eight for the
emotion. This file holds the model, the way pretrained weights get into it by name, and its checkpoints.

Shapes in the comments: B batch, T tokens, C hidden size, nh attention heads, hs head size = C / nh.
"""

import dataclasses
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import download
from tokenizer import WordPieceTokenizer
from weights import open_pickle, open_safetensors, open_torch

FORMAT_VERSION = 1

# Encoders that can be had by name: their address at a fixed revision, and the sha256 of each file where it is known.
HUB = "https://huggingface.co/{name}/resolve/{revision}/{file}"
PRETRAINED = {
    "prajjwal1/bert-tiny": ("6f75de8b60a9f8a2fdf7b69cbd86d9e64bcb3837", {
        "config.json": None,
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        "pytorch_model.bin": "dab2c2bddcfb48ea430ef63fd76d46d67d704487844d967256a50dd7d7fd0a66"}),
}


@dataclass
class BertConfig:
    """The shape of an encoder, in the names of Hugging Face's config.json. The defaults are bert-tiny's (4.4 M parameters)."""
    vocab_size: int = 30522
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 512
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, whole = getattr(self, field.name), field.type in (int, "int")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or (value < 1 if whole else not 0 <= value < 1):
                raise ValueError(f"{field.name} is {value!r}, which no BERT can have")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} attention heads")

    @classmethod
    def from_file(cls, path) -> "BertConfig":
        """Reads a config.json. Raises FileNotFoundError, or ValueError naming the file if it describes another kind of model."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            kind = values.get("model_type", "bert"), values.get("hidden_act", "gelu"), values.get("position_embedding_type", "absolute")
            if kind != ("bert", "gelu", "absolute"):
                raise ValueError(f"model_type, hidden_act and position_embedding_type are {kind}; only ('bert', 'gelu', 'absolute') can be run")
            return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})
        except (ValueError, AttributeError, RecursionError) as error:      # a JSON error is a ValueError; a list has no .get
            raise ValueError(f"{path}: no usable BERT configuration ({error})") from None


# A short text is read in a few dozen operations of some microseconds each. Calling a module costs three more (it looks for hooks), and
# asking it for a parameter by attribute one, so the layers below apply their modules' parameters themselves.

def linear(module: nn.Module, x: Tensor) -> Tensor:
    parameters = module._parameters
    return F.linear(x, parameters["weight"], parameters["bias"])


def layer_norm(module: nn.Module, x: Tensor) -> Tensor:
    parameters = module._parameters
    return torch.layer_norm(x, module.normalized_shape, parameters["weight"], parameters["bias"], module.eps)


class BertLayer(nn.Module):
    """One transformer layer: attention, then a two-matrix network, each added to its input and normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        C = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attention_dropout, self.hidden_dropout = config.attention_probs_dropout_prob, config.hidden_dropout_prob
        self.query_key_value = nn.Linear(C, 3 * C)      # one product instead of three
        self.attention_output = nn.Linear(C, C)
        self.attention_norm = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(C, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, C)
        self.output_norm = nn.LayerNorm(C, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, C) -> (B, T, C). mask (B, T) bool, True where a token is; None if nothing is padding."""
        B, T, C = x.shape
        qkv = linear(self.query_key_value, x).view(B, T, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                                                      # (B, nh, T, hs) each
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.attention_dropout if self.training else 0.0)                                     # (B, nh, T, hs)
        return self._finish(x, attended.transpose(1, 2).reshape(B, T, C))

    def first_row(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, C) -> (B, C): forward(x, mask)[:, 0], without the work for the rows that nobody reads.

        With one query a head, keys and values need not be made at all. The score of token t is
        q . (Wk x_t + bk) = (Wk' q) . x_t + q . bk, whose last term is the same for every t and drops out of the softmax;
        and the weighted mean of Wv x_t + bv is Wv (weighted mean of x_t) + bv.
        """
        B, T, C = x.shape
        nh, hs = self.num_heads, C // self.num_heads
        weight_q, weight_k, weight_v = self.query_key_value.weight.view(3, C, C).unbind(0)
        bias_q, _, bias_v = self.query_key_value.bias.view(3, C).unbind(0)
        cls = x[:, 0]                                                                       # (B, C)
        q = F.linear(cls, weight_q, bias_q).view(B, nh, hs).transpose(0, 1)                 # (nh, B, hs)
        probe = torch.bmm(q, weight_k.view(nh, hs, C)).transpose(0, 1)                      # (B, nh, C)
        scores = torch.bmm(probe, x.transpose(1, 2)) * hs ** -0.5                           # (B, nh, T)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], torch.finfo(scores.dtype).min)
        attention = scores.softmax(-1)                                                      # (B, nh, T)
        bias = bias_v
        if self.training:      # attention that is dropped no longer sums to one, so neither does the values' bias
            attention = F.dropout(attention, self.attention_dropout)
            bias = (attention.sum(-1, keepdim=True) * bias_v.view(nh, hs)).reshape(B, C)
        mean = torch.bmm(attention, x).transpose(0, 1)                                      # (nh, B, C)
        attended = torch.bmm(mean, weight_v.view(nh, hs, C).transpose(1, 2))                # (nh, B, hs)
        return self._finish(cls, attended.transpose(0, 1).reshape(B, C) + bias)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """x and what its rows attended to, both (..., C), -> (..., C): the part of a layer in which each row is on its own."""
        x = layer_norm(self.attention_norm, x + self._drop(linear(self.attention_output, attended)))
        inner = F.gelu(linear(self.intermediate, x))                                        # (..., intermediate size)
        return layer_norm(self.output_norm, x + self._drop(linear(self.output, inner)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.hidden_dropout) if self.training else x


class BertEncoder(nn.Module):
    """BERT without its pretraining heads. Devlin et al. 2018, as in google-research/bert modeling.py.

    All tokens count as segment 0, so that segment's embedding is a part of the position embeddings here.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        for module in self.modules():      # BERT's own start: a narrow normal distribution, biases at zero
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def _embed(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, T) ids and mask -> x (B, T, C), and the mask as bool, or None if nothing is padding."""
        T = input_ids.shape[1]
        if T > self.config.max_position_embeddings:
            raise ValueError(f"{T} tokens, but the model reads {self.config.max_position_embeddings} at most: truncate when you encode")
        mask = attention_mask.bool()
        x = F.embedding(input_ids, self.word_embeddings.weight) + self.position_embeddings.weight[:T]      # (B, T, C)
        x = layer_norm(self.embedding_norm, x)
        if self.training:
            x = F.dropout(x, self.config.hidden_dropout_prob)
        # On a CPU a look at the mask is cheaper than masking; on a GPU it would wait for everything before it.
        return x, None if mask.device.type == "cpu" and bool(mask.all()) else mask

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, T) int64 -> last hidden states (B, T, C). Rows of padding hold nothing of use."""
        x, mask = self._embed(input_ids, attention_mask)
        for layer in self.layers:
            x = layer.forward(x, mask)
        return x

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, T) int64 -> (B, C): tanh(pooler(last hidden state of [CLS])).

        Equal to pooling what forward returns, at about half its cost for two layers: see BertLayer.first_row.
        """
        x, mask = self._embed(input_ids, attention_mask)
        *layers, last = self.layers
        for layer in layers:
            x = layer.forward(x, mask)
        return torch.tanh(linear(self.pooler, last.first_row(x, mask)))

    @classmethod
    def from_pretrained(cls, source) -> "BertEncoder":
        """An encoder with pretrained weights, in eval mode.

        source: a name in PRETRAINED (downloaded once, checked, cached), or a folder with config.json and model.safetensors or
        pytorch_model.bin, as Hugging Face lays them out. Raises FileNotFoundError, download.DownloadError, or ValueError that
        names the weights that are missing, unexpected or of another shape.
        """
        folder = pretrained_folder(source)
        config = BertConfig.from_file(folder / "config.json")
        for name, read in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_torch)):
            if (folder / name).is_file():
                try:
                    encoder = cls(config)
                except RuntimeError as error:
                    raise ValueError(f"{folder / 'config.json'}: no such model fits into memory ({str(error).splitlines()[0][:100]})") from None
                encoder.load_state_dict(_from_hugging_face(read(folder / name), encoder, folder / name))
                return encoder.eval()
        raise FileNotFoundError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin")


def pretrained_folder(source) -> Path:
    """The folder of an encoder: the folder itself, or, for a name in PRETRAINED, the cache folder, filled if need be."""
    if str(source) not in PRETRAINED:
        folder = Path(source)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{source}: neither a folder with a config.json nor one of {', '.join(PRETRAINED)}")
        return folder
    revision, files = PRETRAINED[str(source)]
    folder = _cache_folder(source)
    for file, sha256 in files.items():
        download.download(HUB.format(name=source, revision=revision, file=file), folder / file, sha256)
    return folder


def _cache_folder(name: str) -> Path:
    return download.cache_path(name.replace("/", "--"), PRETRAINED[name][0])


def can_be_had(name: str) -> bool:
    """Whether an encoder of PRETRAINED is in the cache, or its address answers within some seconds."""
    revision, files = PRETRAINED[name]
    return (all((_cache_folder(name) / file).is_file() for file in files)
            or download.reachable(HUB.format(name=name, revision=revision, file="config.json"), timeout=2.0))


def pretrained_tokenizer(source) -> WordPieceTokenizer:
    """The tokenizer that belongs to BertEncoder.from_pretrained(source): its vocab.txt, cased if tokenizer_config.json says so."""
    folder = pretrained_folder(source)
    settings = folder / "tokenizer_config.json"
    try:
        lowercase = not settings.is_file() or bool(json.loads(settings.read_text(encoding="utf-8")).get("do_lower_case", True))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{settings}: damaged ({error})") from None
    return WordPieceTokenizer.from_file(folder / "vocab.txt", lowercase)


# Our names for one layer's tensors, and theirs. Three of theirs (query, key, value) make one of ours.
LAYER_NAMES = {"query_key_value": ("attention.self.query", "attention.self.key", "attention.self.value"),
               "attention_output": ("attention.output.dense",), "attention_norm": ("attention.output.LayerNorm",),
               "intermediate": ("intermediate.dense",), "output": ("output.dense",), "output_norm": ("output.LayerNorm",)}


def hugging_face_names(config: BertConfig) -> dict[str, tuple[str, ...]]:
    """Our name of every parameter -> the names of the tensors it is made of in Hugging Face's BertModel."""
    names = {"word_embeddings.weight": ("embeddings.word_embeddings.weight",),
             "position_embeddings.weight": ("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight")}
    for kind in ("weight", "bias"):
        names[f"embedding_norm.{kind}"] = (f"embeddings.LayerNorm.{kind}",)
        names[f"pooler.{kind}"] = (f"pooler.dense.{kind}",)
        for i in range(config.num_hidden_layers):
            for ours, theirs in LAYER_NAMES.items():
                names[f"layers.{i}.{ours}.{kind}"] = tuple(f"encoder.layer.{i}.{name}.{kind}" for name in theirs)
    return names


def _is_dropped(name: str) -> bool:
    """What a pretrained file may hold beside the encoder: the heads it was trained with, and a buffer of 0, 1, 2, …"""
    return name.startswith(("cls.", "classifier.", "qa_outputs.")) or name == "embeddings.position_ids"


def _from_hugging_face(tensors: dict[str, Tensor], encoder: BertEncoder, path) -> dict[str, Tensor]:
    """Tensors by Hugging Face's names -> a state_dict for `encoder`. Every tensor is used, or dropped by name, or an error."""
    found = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name in found:
            raise ValueError(f"{path}: holds two weights for {name}")
        if not _is_dropped(name):
            found[name] = tensor
    names = hugging_face_names(encoder.config)
    wanted = {theirs for group in names.values() for theirs in group}
    for problem, which in (("lacks the", wanted - found.keys()), ("holds the unexpected", found.keys() - wanted)):
        if which:
            raise ValueError(f"{path}: {problem} weights {_listed(which)}")
    state = {}
    for ours, parameter in encoder.named_parameters():
        parts = []
        for theirs in names[ours]:
            rows = encoder.config.type_vocab_size if "token_type" in theirs else len(parameter)
            expected = (rows // 3 if "query_key_value" in ours else rows, *parameter.shape[1:])
            if tuple(found[theirs].shape) != expected:
                raise ValueError(f"{path}: weight {theirs} has the shape {tuple(found[theirs].shape)}, but config.json asks for {expected}")
            parts.append(found[theirs].float())
        state[ours] = parts[0] + parts[1][0] if ours == "position_embeddings.weight" else torch.cat(parts)
    return state


def _listed(names) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class EmoBERT(nn.Module):
    """An encoder and one Linear a task. Stigall et al. 2024, section 3.2.1.

    labels: task -> its label names in the order of their ids, for any number of tasks.
    """

    def __init__(self, config: BertConfig, labels: dict[str, list[str]]):
        super().__init__()
        if not isinstance(labels, dict) or not labels or not all(
                isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names) > 1
                for names in labels.values()):
            raise ValueError("labels must name at least one task, and at least two different labels for each")
        if unfit := [task for task in labels if not str(task).isidentifier() or hasattr(nn.ModuleDict, str(task)) or task == "training"]:
            raise ValueError(f"{unfit[0]!r} cannot be the name of a task")
        self.config = config
        self.labels = {task: list(names) for task, names in labels.items()}
        self.encoder = BertEncoder(config)
        self.heads = nn.ModuleDict({task: nn.Linear(config.hidden_size, len(names)) for task, names in labels.items()})
        for head in self.heads.values():
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """input_ids, attention_mask (B, T) int64 -> task -> logits (B, number of labels). One pass, whatever the number of tasks."""
        pooled = self.encoder.pooled(input_ids, attention_mask)      # (B, C)
        return {task: linear(head, pooled) for task, head in self.heads.items()}


def save_checkpoint(path, model: EmoBERT, tokenizer: WordPieceTokenizer, *, dtype: torch.dtype = torch.float32, **meta) -> None:
    """Writes everything that an answer needs into one file: weights, config, labels, vocabulary, and `meta` (plain JSON values).

    dtype: of the stored weights; torch.float16 halves the file. The file is complete or not there: it is written to a temporary
    name and renamed. Raises OSError if it cannot be written, with what was there before left as it was.
    """
    write_atomically(path, {
        "format": "emobert", "version": FORMAT_VERSION,
        "config": dataclasses.asdict(model.config), "labels": model.labels,
        "vocab": "\n".join(tokenizer.vocab), "lowercase": tokenizer.lowercase,
        "meta": json.loads(json.dumps(meta)),      # a value that JSON cannot hold fails here, not in somebody's reader
        "weights": {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}})


def write_atomically(path, content) -> None:
    """torch.save to a temporary name beside `path`, then a rename: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        buffer = io.BytesIO()      # so that a full disk is an OSError, and the file's name does not get into the file
        torch.save(content, buffer)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, device="cpu") -> tuple[EmoBERT, WordPieceTokenizer, dict]:
    """Reads what save_checkpoint wrote: (EmoBERT in eval mode, float32, on `device`; its tokenizer; meta).

    Nothing in the file is executed (weights_only=True). Raises FileNotFoundError, or ValueError naming the file if it is damaged,
    of a later format, or no EmoBERT checkpoint at all.
    """
    content = open_pickle(path, "an EmoBERT checkpoint")
    if not isinstance(content, dict) or content.get("format") != "emobert":
        raise ValueError(f"{path}: not an EmoBERT checkpoint")
    if content.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path}: checkpoint format {content.get('version')!r}, but this program reads format {FORMAT_VERSION}; use a newer program")
    try:
        with torch.random.fork_rng([]):      # the random start is thrown away, and the caller's seed is not our business
            model = EmoBERT(BertConfig(**content["config"]), content["labels"])
        tokenizer = WordPieceTokenizer(content["vocab"].split("\n"), content["lowercase"])
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(f"{tokenizer.vocab_size} tokens in the vocabulary, {model.config.vocab_size} in the model")
        weights = {name: tensor.to(device, torch.float32) for name, tensor in content["weights"].items()}
        model.load_state_dict(weights, assign=True)
        meta = dict(content["meta"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged EmoBERT checkpoint ({' '.join(str(error).split())[:200]})") from None
    return model.eval(), tokenizer, meta


def choose_device(name: str) -> str:
    """'auto' or a device's name -> a device that is there. Raises ValueError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"unknown device '{name}': use auto, cpu, cuda or mps")
    if name.startswith("cuda") and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"there is no {name} on this machine: use --device cpu")
    return name
