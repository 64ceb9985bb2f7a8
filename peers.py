"""Ours beside others: how two programs are compared fairly, and the comparisons with what people use otherwise.

Both run in one process, in alternating blocks, and what counts is the median of the ratios, because no machine is equally fast
for long. Both are warmed up first, and must give the same answers. The garbage collector stays on, as in real life. What others
could have done beforehand is not timed: they get their graph exported, and their training texts tokenized. Every bar that is to
be held stands in BARS; `python bench.py --peers --train` measures them.
"""

import contextlib
import dataclasses
import gc
import importlib
import io
import os
import random
import statistics
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import train
from batches import TokenRows, epoch_steps
from data import print_table
from emobert import BertConfig, EmoBERT, hugging_face_names
from infer import Classifier
from tokenizer import WordPieceTokenizer

POINTS = ((1, 8), (1, 32), (1, 128), (1, 256), (32, 32), (32, 128))      # texts x tokens at which encoders are compared

# How many times as fast as another program it must be at least (or which share it must reach), and what it may cost at most.
BARS = {"encode, cache warm: tokenizers": 8.0, "encode, cache warm: flash-tokenizer": 1.0,
        "encode, unseen texts: flash-tokenizer": 0.5, "encode, cache cold: flash-tokenizer": 0.4, "encode_batch: tokenizers": 4.0,
        **{f"pooled {B} x {T}: transformers": 1.5 for B, T in POINTS},
        **{f"pooled {B} x {T}: ONNX Runtime": 0.7 if B * T < 128 else 1.0 for B, T in POINTS},
        "predict: transformers": 4.0, "training: transformers": 2.0, "training: as published": 12.0,
        "256 tokens: the paper": 40.0, "share of the matrix-product limit": 0.5}
AT_MOST = {"resident memory, MB": 400.0, "startup over import torch, s": 0.6}


# How it is timed, judged and shown.

def once(function: Callable) -> float:
    """Seconds of one call, the GPU's part included."""
    began = time.perf_counter()
    function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def times(function: Callable, seconds: float, least: int = 3) -> list[float]:
    """Seconds of single calls: as many as fit into `seconds`, at least `least`, after calls for a fifth of that that do not count."""
    warm = once(function)
    while warm < seconds / 5:
        warm += once(function)
    gc.collect()
    found = [once(function) for _ in range(least)]
    while sum(found) < seconds:
        found.append(once(function))
    return found


def paired(ours: Callable, theirs: Callable, s: Namespace, rounds: int | None = None) -> list[tuple[float, float]]:
    """Seconds of a call of ours and of theirs, round by round.

    Each side runs for a block of s.block seconds in turn, and begins every other round. In the pauses a runtime's threads fall
    asleep, which would otherwise wait, busily, on the core on which the other side is measured.
    """
    sides, repeats = (ours, theirs), []
    for call in sides:
        spent = last = once(call)
        while spent < s.block:
            spent += (last := once(call))
        repeats.append(max(1, round(s.block / last)))
    gc.collect()
    found = []
    for i in range(rounds or s.rounds):
        pair = [0.0, 0.0]
        for side in (0, 1) if i % 2 else (1, 0):
            time.sleep(0.01)
            pair[side] = once(lambda: [sides[side]() for _ in range(repeats[side])]) / repeats[side]
        found.append((pair[0], pair[1]))
    return found


def judged(name: str, value: float) -> dict:
    """{"bar", "verdict"}: 'holds' or 'falls short'; None and '' for what has no bar."""
    bar, held = (AT_MOST[name], value <= AT_MOST[name]) if name in AT_MOST else (BARS.get(name), value >= BARS.get(name, 0.0))
    return {"bar": bar, "verdict": "" if bar is None else "holds" if held else "falls short"}


def row(what: str, beside: str, threads: int, pairs: list[tuple[float, float]]) -> dict:
    """Seconds of ours and theirs, round by round -> our median in ms, and the median of how many times as fast we were."""
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    return {"what": what, "beside": beside, "threads": threads, "ms": statistics.median(ours for ours, _ in pairs) * 1e3, "ratio": ratio,
            **judged(f"{what}: {beside}", ratio)}


def show(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(heading: list[str], rows: list[list]) -> None:
    print_table(heading, *([show(cell) if isinstance(cell, float) else cell for cell in cells] for cells in rows))


def progress(items, name: str):
    return tqdm(list(items), desc=name, disable=None, leave=False)


def more_texts(texts: list[str], n: int, rng: random.Random) -> list[str]:
    """n texts of a kind: these, and if they are too few, more of their words in random order, of their lengths."""
    words, lengths = [word for text in texts for word in text.split(" ")], [text.count(" ") + 1 for text in texts]
    return texts[:n] + [" ".join(rng.choices(words, k=rng.choice(lengths))) for _ in range(n - len(texts))]


def some_ids(config: BertConfig, B: int, T: int, device="cpu") -> tuple[Tensor, Tensor]:
    """Random input_ids (B, T) int64 and a mask without padding."""
    ids = torch.randint(config.vocab_size, (B, T), device=device)
    return ids, torch.ones_like(ids)


def installed(module: str, name: str):
    """The module, or None, said in a line, if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError:
        print(f"{name}: not installed (it is in requirements-dev.txt), skipped")
        return None


def must_agree(name: str, ours: Tensor, theirs: Tensor) -> None:
    if not (difference := (ours - theirs).abs().max().item()) < 1e-3:
        raise ValueError(f"{name} gives other answers than ours, by {difference:.2g}: there is nothing to compare")


# Tokenizers.

def rust(module, vocab_file: str, lowercase: bool) -> Callable:
    encode = module.BertWordPieceTokenizer(vocab_file, lowercase=lowercase).encode
    return lambda text: encode(text).ids


def flash(module, vocab_file: str, lowercase: bool) -> Callable:
    encode = module.BertTokenizerFlash(vocab_file, do_lower_case=lowercase).tokenizer.encode
    return lambda text: encode(text, "longest", 512)


def nano(module, vocab_file: str, lowercase: bool) -> Callable:
    encode = module.Tokenizer.from_vocab(vocab_file, lowercase=lowercase).encode
    return lambda text: encode(text).tolist()


# name -> module, and what makes one with nothing in its cache, as a function from a text to ids
TOKENIZERS = {"tokenizers": ("tokenizers.implementations", rust), "flash-tokenizer": ("flash_tokenizer", flash), "nanotoken": ("nanotoken", nano)}


def compare_tokenizers(tokenizer: WordPieceTokenizer, texts: list[str], s: Namespace) -> list[dict]:
    """4,096 texts one by one with warm caches, and as a batch; then a quarter of the texts as if never seen, after texts made of the rest."""
    rows, batch, measured = [], more_texts(texts, 4096, s.rng), texts[::4][:4096]
    others = more_texts([text for i, text in enumerate(texts) if i % 4], s.others, s.rng)
    seen, chunks = set(" ".join(others).split(" ")), " ".join(measured).split(" ")
    new = sum(chunk not in seen for chunk in chunks) / len(chunks)
    print(f"unseen texts: {new:.1%} of the words of {len(measured):,} are not in the {len(others):,} others")
    with tempfile.TemporaryDirectory() as folder:
        settings = str(Path(folder) / "vocab.txt"), tokenizer.lowercase
        Path(settings[0]).write_text("\n".join(tokenizer.vocab) + "\n", encoding="utf-8")
        modules = {name: module for name, (path, _) in TOKENIZERS.items() if (module := installed(path, name))}
        makers: dict[str, Callable] = {"ours": lambda: WordPieceTokenizer.from_file(*settings).encode,
                  **{name: partial(TOKENIZERS[name][1], module, *settings) for name, module in modules.items()}}
        ours = makers["ours"]()
        for name in modules:
            theirs = makers[name]()
            print(f"{name}: other ids than ours for {sum(ours(text) != theirs(text) for text in batch):,} of {len(batch):,} texts")
            pairs = paired(lambda: [ours(text) for text in batch], lambda: [theirs(text) for text in batch], s)
            rows.append(row("encode, cache warm", name, 1, [(a / len(batch), b / len(batch)) for a, b in pairs]))
        for what, before in (("encode, unseen texts", others), ("encode, cache cold", [])):
            found: dict[str, list[float]] = {name: [] for name in makers}
            for i in progress(range(s.rounds), what):
                for name in sorted(makers, reverse=bool(i % 2)):
                    gc.collect()
                    encode = makers[name]()
                    for text in before:
                        encode(text)
                    found[name].append(once(lambda: [encode(text) for text in measured]) / len(measured))
            rows += [row(what, name, 1, list(zip(found["ours"], found[name]))) for name in modules]
        if "tokenizers" in modules:
            many = modules["tokenizers"].BertWordPieceTokenizer(settings[0], lowercase=settings[1]).encode_batch
            for threads in s.both:
                os.environ["TOKENIZERS_PARALLELISM"] = str(threads > 1).lower()      # is read at every call
                rows.append(row("encode_batch", "tokenizers", threads, paired(lambda: tokenizer.encode_batch(batch), lambda: many(batch), s)))
    return rows


# Encoders.

def hugging_face_weights(model: EmoBERT) -> dict[str, Tensor]:
    """The encoder's weights by the names of Hugging Face's BertModel; segment embeddings are zero there, as ours are in the positions'."""
    weights = {"embeddings.token_type_embeddings.weight": torch.zeros(model.config.type_vocab_size, model.config.hidden_size)}
    for ours, theirs in hugging_face_names(model.config).items():
        parameter = model.encoder.get_parameter(ours).detach().cpu()
        weights |= zip(theirs, parameter.chunk(3) if len(theirs) == 3 else [parameter])
    return weights


class Graph(nn.Module):
    """The whole of BERT in plain operations, for a runtime to optimise: ids and mask (B, T) -> pooled (B, C)."""

    def __init__(self, model: EmoBERT):
        super().__init__()
        self.config, self.weights = model.config, hugging_face_weights(model)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.config.hidden_size,), self.weights[name + ".weight"], self.weights[name + ".bias"], self.config.layer_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        (B, T), C, nh = input_ids.shape, self.config.hidden_size, self.config.num_attention_heads
        words, positions = (self.weights[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
        x = self.norm("embeddings.LayerNorm", words[input_ids] + positions[:T])                                 # (B, T, C)
        hidden = (1.0 - attention_mask[:, None, None, :].float()) * -1e4
        for layer in (f"encoder.layer.{i}." for i in range(self.config.num_hidden_layers)):
            q, k, v = (self.linear(f"{layer}attention.self.{name}", x).view(B, T, nh, C // nh).transpose(1, 2) for name in ("query", "key", "value"))
            attention = (q @ k.transpose(-1, -2) * (C // nh) ** -0.5 + hidden).softmax(-1)                      # (B, nh, T, T)
            attended = self.linear(layer + "attention.output.dense", (attention @ v).transpose(1, 2).reshape(B, T, C))
            x = self.norm(layer + "attention.output.LayerNorm", x + attended)
            x = self.norm(layer + "output.LayerNorm", x + self.linear(layer + "output.dense", F.gelu(self.linear(layer + "intermediate.dense", x))))
        return torch.tanh(self.linear("pooler.dense", x[:, 0]))


def onnx_session(runtime, model: EmoBERT, threads: int):
    """The whole network in ONNX Runtime, whose graph optimisations are all on unless told otherwise."""
    example, options = torch.ones(1, 16, dtype=torch.int64), runtime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")      # this way to export is called old; the new one needs more packages
        file = str(Path(folder) / "bert.onnx")
        torch.onnx.export(Graph(model), (example, example), file, input_names=["ids", "mask"], output_names=["pooled"], opset_version=17,
                          dynamic_axes={name: {0: "B", 1: "T"} for name in ("ids", "mask")}, dynamo=False)
        return runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def bert_config(transformers, config: BertConfig, **more):
    return transformers.BertConfig(**dataclasses.asdict(config), **more)


@torch.inference_mode()
def compare_encoders(model: EmoBERT, s: Namespace) -> list[dict]:
    rows, peers = [], {}
    if transformers := installed("transformers", "transformers"):
        bert = transformers.BertModel(bert_config(transformers, model.config)).eval()
        bert.load_state_dict(hugging_face_weights(model))
        peers["transformers"] = lambda ids, mask: bert(input_ids=ids, attention_mask=mask).pooler_output
    runtime = installed("onnx", "ONNX") and installed("onnxruntime", "ONNX Runtime")
    for threads in s.both:
        torch.set_num_threads(threads)
        if runtime:
            session = onnx_session(runtime, model, threads)
            peers["ONNX Runtime"] = lambda ids, mask: session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0]
        for B, T in progress(POINTS, "pooled"):
            batch = some_ids(model.config, B, T)
            for name, theirs in peers.items():
                must_agree(name, model.encoder.pooled(*batch), torch.as_tensor(theirs(*batch)))
                rows.append(row(f"pooled {B} x {T}", name, threads, paired(lambda: model.encoder.pooled(*batch), lambda: theirs(*batch), s)))
    return rows


def compare_predict(classifier: Classifier, texts: list[str], s: Namespace) -> list[dict]:
    """predict, for all tasks, beside a transformers pipeline with the same weights that answers one."""
    if not (transformers := installed("transformers", "transformers")):
        return []
    transformers.logging.set_verbosity_error()
    model, rows, many = classifier.model, [], more_texts(texts, s.many, s.rng)
    task, labels = list(model.labels.items())[-1]
    theirs = transformers.BertForSequenceClassification(bert_config(transformers, model.config, id2label=dict(enumerate(labels)))).eval()
    temperature = classifier.temperature.get(task, 1.0)
    theirs.load_state_dict({**{f"bert.{name}": weight for name, weight in hugging_face_weights(model).items()},
                            **{f"classifier.{name}": weight / temperature for name, weight in model.heads[task].named_parameters()}})
    tokenizer = transformers.BertTokenizerFast(vocab={token: i for i, token in enumerate(classifier.tokenizer.vocab)},
                                               do_lower_case=classifier.tokenizer.lowercase, model_max_length=classifier.max_length)
    pipeline = transformers.pipeline("text-classification", model=theirs, tokenizer=tokenizer, device="cpu", batch_size=64, top_k=None,
                                     truncation=True, function_to_apply="softmax")
    answers = [getattr(p, task) for p in classifier.predict(texts[:64])], [{a["label"]: a["score"] for a in found} for found in pipeline(texts[:64])]
    must_agree("the pipeline", *(torch.tensor([[answer[label] for label in labels] for answer in found]) for found in answers))
    for threads in progress(s.both, "predict"):
        torch.set_num_threads(threads)
        os.environ["TOKENIZERS_PARALLELISM"] = str(threads > 1).lower()
        rows.append(row("predict", "transformers", threads, paired(lambda: classifier.predict(many), lambda: pipeline(many), s, rounds=3)))
    return rows


def compare_peers(classifier: Classifier, texts: list[str], s: Namespace) -> list[dict]:
    """Everything above, with one thread and with all."""
    s.both = sorted({1, threads := torch.get_num_threads()})
    rows = compare_tokenizers(classifier.tokenizer, texts, s) + compare_encoders(classifier.model, s) + compare_predict(classifier, texts, s)
    torch.set_num_threads(threads)
    print(f"\nms: encode for a text, encode_batch for 4,096, pooled for a batch of texts x tokens, predict for {s.many:,} texts")
    table(["ours", "threads", "ms", "beside", "times as fast", "bar", ""],
          [[r["what"], str(r["threads"]), r["ms"], r["beside"], r["ratio"], r["bar"], r["verdict"]] for r in rows])
    return rows


# Training.

def transformers_step(transformers, run: train.Run, published: bool) -> Callable[[dict[str, Tensor]], float]:
    """A training step as it is usually written, from rows that are tokenized already.

    Plain: the rows of all tasks go through BertModel together, padded to the longest. As published: a pass for each task, padded to
    256, no dropout, no clipping. Both update with AdamW as it comes.
    """
    model = transformers.BertModel(bert_config(transformers, run.model.config)).to(run.device).train(not published)
    heads = nn.ModuleDict({task: nn.Linear(run.model.config.hidden_size, len(labels)) for task, labels in run.model.labels.items()}).to(run.device)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=run.settings.lr, weight_decay=run.settings.weight_decay)
    texts = {task: rows.ids.long().split(rows.lengths.tolist()) for task, rows in run.rows["train"].items()}
    if published:
        texts = {task: [F.pad(ids, (0, 256 - len(ids)), value=run.tokenizer.pad_id) for ids in rows] for task, rows in texts.items()}

    def read(rows: list[Tensor]) -> Tensor:
        input_ids = pad_sequence(rows, batch_first=True, padding_value=run.tokenizer.pad_id)
        return model(input_ids=input_ids, attention_mask=(input_ids != run.tokenizer.pad_id).long()).pooler_output

    def step(chosen: dict[str, Tensor]) -> float:
        parts = {task: [texts[task][i] for i in rows.tolist()] for task, rows in chosen.items()}
        pooled = map(read, parts.values()) if published else read(sum(parts.values(), [])).chunk(len(parts))
        loss = sum(run.task_weights[task] * F.cross_entropy(heads[task](x), run.labels["train"][task][chosen[task]])
                   for task, x in zip(parts, pooled))
        optimizer.zero_grad()
        loss.backward()
        if not published:
            nn.utils.clip_grad_norm_(parameters, train.CLIP)
        optimizer.step()
        return loss.item()
    return step


def compare_training(texts: list[str], s: Namespace) -> list[dict]:
    """Rows of both tasks a second: the step of train.py, and two loops as others write them, over the same rows in the same order."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings, _ = train.arguments(["--encoder", str(s.checkpoint), "--mixture", "starter", "--device", s.device])
        run = train.Run(settings, Path(folder) / "run", resume=False)
    chosen = more_texts(texts, min(4096, s.many), s.rng)
    for task in run.tasks:      # the labels do not matter for the speed
        run.rows["train"][task] = TokenRows(chosen, run.tokenizer, settings.max_length, task).to(run.device)
        run.labels["train"][task] = torch.randint(len(run.model.labels[task]), (len(chosen),), device=run.device)
    plan = epoch_steps(run.rows["train"], settings.batch_size, "longest", 1, 0)
    loops: dict[str, Callable] = {"ours": run.train_step}
    if transformers := installed("transformers", "transformers"):
        loops |= {"transformers": transformers_step(transformers, run, False), "as published": transformers_step(transformers, run, True)}
    found: dict[str, list[float]] = {name: [] for name in loops}      # seconds a row
    for i in progress(range(s.rounds + 1), "training"):
        for name, step in loops.items():
            steps = [plan[(i * s.steps + k) % len(plan)] for k in range(s.steps if name != "as published" else -(-s.steps // 8))]
            found[name].append(once(lambda: [step(rows) for rows in steps]) / (len(steps) * settings.batch_size * len(run.tasks)))
    rows = [row("training", name, torch.get_num_threads(), list(zip(found["ours"], found[name]))[1:]) for name in loops]      # the first one warms up
    for r in rows:
        r["rows_per_second"] = 1 / statistics.median(found[r["beside"]][1:])
    table([f"training, {settings.batch_size} rows a task", "rows/s", "ours, times as fast", "bar", ""],
          [[r["beside"], r["rows_per_second"], r["ratio"], r["bar"], r["verdict"]] for r in rows])
    return rows
