"""Is the model any good? Its scores on rows that it never saw, and the scores that they have to be compared with.

A score means little alone. So there are three comparisons: with what needs no training (the commonest class, heads of random
numbers), with what needs no transformer (a bag of words), and with an encoder that stays as it is while one linear layer is
fitted on top: such a "probe" tells what the encoder knows already, about the other task as well. Every table names its
protocol: `corrected` is one confusion matrix over the whole split, `as published` the mean over batches of 256 rows.

    python evaluate.py runs/NAME/best.pt                       Table 2: a checkpoint on a test split
    python evaluate.py --baselines                             Table 3: what it has to beat
    python evaluate.py --cross-task EMOTION.pt SENTIMENT.pt    Table 5: what one task teaches about the other
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import command
import data
import metrics
from batches import TokenRows
from command import Parser, number
from emobert import BertConfig, BertEncoder, EmoBERT, choose_device, load_checkpoint
from tokenizer import WordPieceTokenizer
from train import RECIPES, choose_encoder, choose_mixture, predict, replace_text, starting_point

BATCH = 256      # rows, in the paper's test loop
CORRECTED = "corrected: one confusion matrix over the whole split"
PUBLISHED = f"as published: means over batches of {BATCH} rows; precision, recall and F1 are micro, so they repeat accuracy"
# What the tables show, by the keys of metrics.scores and of score_task.
SHORT, BATCHED = ("accuracy", "f1_macro", "mcc"), ("accuracy", "precision", "recall", "f1", "mcc")
BY_CLASS = ("precision", "recall", "f1", "average_precision", "support")
WHOLE = ("rows", "accuracy", *(f"{key}_{average}" for average in ("macro", "weighted", "micro") for key in BY_CLASS[:3]),
         "f1_macro_true_classes", "mcc", "average_precision_macro", "ece", "ece_without_temperature")
PENALTIES = [10.0 ** -k for k in range(1, 7)]                    # L2 penalties of a linear fit, strongest first
RECALLS = torch.linspace(0.01, 1, 100, dtype=torch.float64)      # where a precision-recall curve is kept


def table(title: str, rows: list[list], markdown: bool = False) -> str:
    """Rows of cells, the first a heading, as aligned text or Markdown. Floats get four decimals, None is an empty cell."""
    cells = [["" if c is None else f"{c:.4f}" if isinstance(c, float) else f"{c:,}" if isinstance(c, int) else str(c)
              for c in row] for row in rows]
    if markdown:
        cells.insert(1, ["---"] + ["---:"] * (len(cells[0]) - 1))
        return f"**{title}**\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in cells)
    first, *others = (max(map(len, column)) for column in zip(*cells))      # widths
    lines = ["  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others))]) for row in cells]
    return "\n".join([title, *(line.rstrip() for line in lines)]) + "\n"


class Part(NamedTuple):
    texts: list[str]
    labels: Tensor      # (N,) int64


def trained_with(meta: dict, setting: str) -> str | int:
    """A setting of the run that a checkpoint comes from, or of the default recipe."""
    return meta.get("settings", {}).get(setting) or RECIPES["tuned"][setting]


def load_parts(s: argparse.Namespace, tasks, splits, meta: dict) -> tuple[str, dict[str, dict[str, Part]]]:
    """The data's name, and task -> split -> rows. A task of which the data hold no label at all is left out.

    Splits are cut as the checkpoint's were, or its training rows would be among them. Raises ValueError if one of the splits
    has no rows for another task, or if no task is left.
    """
    if s.source:
        rows, name = data.load_source(s.source, s.data_dir)[0], f"source '{s.source}'"
    else:
        mixture, why = choose_mixture(s.mixture, s.data_dir)
        published = (s.protocol or trained_with(meta, "protocol")) == "published"
        rows = data.load_corpus(mixture, s.data_dir, as_published=published).rows
        name = f"mixture '{mixture}'{why}" + ", splits as published (copies kept)" * published
    parts: dict[str, dict[str, Part]] = {}
    for task in [task for task in tasks if any(getattr(row, task) is not None for row in rows)] or tasks:
        for split in splits:
            chosen = [row for row in rows if row.split == split and getattr(row, task) is not None][:s.limit]
            if not chosen:
                raise ValueError(f"{name} has no {split} rows for {task}")
            labels = torch.tensor([getattr(row, task) for row in chosen])
            parts.setdefault(task, {})[split] = Part([row.text for row in chosen], labels)
    return name, parts


def open_checkpoint(path, device: str, wanted: str | None = None) -> tuple[EmoBERT, WordPieceTokenizer, dict]:
    """load_checkpoint. Raises ValueError if the labels are not those of the data, or if the wanted task has no head."""
    model, tokenizer, meta = load_checkpoint(path, device)
    for task, names in model.labels.items():
        if names != data.LABELS.get(task):
            raise ValueError(f"{path}: its labels for {task} are {names}, but those of the data are {data.LABELS.get(task)}")
    if wanted and wanted not in model.labels:
        raise ValueError(f"{path}: has no head for {wanted}, only for {' and '.join(model.labels)}")
    return model, tokenizer, meta


def read(texts, tokenizer: WordPieceTokenizer, config: BertConfig, device: str, meta: dict | None = None) -> TokenRows:
    """Texts as tokens, cut where the checkpoint's training cut them, or where the default recipe does."""
    return TokenRows(texts, tokenizer, min(trained_with(meta or {}, "max_length"), config.max_position_embeddings)).to(device)


# A checkpoint on a split (Table 2).

def score_task(logits: Tensor, labels: Tensor, names: list[str], temperature: float = 1.0, seed: int = 0) -> dict:
    """logits (N, n), labels (N,) -> all that can be said of them, as plain JSON values: metrics.scores, bootstrap intervals,
    calibration with and without the temperature, the confusion matrix, and each class's precision-recall curve.

    A class that only the predictions hold counts 0 in the macro averages, as in scikit-learn; f1_macro_true_classes leaves it out.
    """
    n, predictions, probabilities = len(names), logits.argmax(-1), (logits.double() / temperature).softmax(-1)
    matrix = metrics.confusion_matrix(labels, predictions, n)
    result = metrics.scores(matrix) | {
        "rows": len(labels), "confusion_matrix": matrix.tolist(), "temperature": float(temperature),
        "interval": {key: metrics.bootstrap_interval(labels, predictions, n, key, seed=seed) for key in SHORT},
        "ece": metrics.expected_calibration_error(probabilities, labels),
        "ece_without_temperature": metrics.expected_calibration_error(logits.double().softmax(-1), labels),
        "reliability": {name: values.tolist() for name, values in metrics.reliability_bins(probabilities, labels).items()}}
    for i, (name, cell) in enumerate(zip(names, result["per_class"])):
        cell |= {"label": name, "average_precision": None, "curve": None}
        if cell["support"]:
            precision, recall, _ = metrics.precision_recall_curve(labels == i, probabilities[:, i])      # recall from 1 down to 0
            points = len(recall) - 1 - torch.searchsorted(recall.flip(0), RECALLS)
            cell["average_precision"] = metrics.average_precision(labels == i, probabilities[:, i])
            cell["curve"] = {"recall": recall[points].tolist(), "precision": precision[points].tolist()}
    there = [cell for cell in result["per_class"] if cell["support"]]
    return result | {"f1_macro_true_classes": sum(cell["f1"] for cell in there) / len(there),
                     "average_precision_macro": sum(cell["average_precision"] for cell in there) / len(there)}


def published(labels: Tensor, predictions: Tensor, lengths: list[int] | None = None) -> dict[str, float]:
    """The paper's numbers for labels and predictions (N,), ids of one task compared with another's as they are.

    lengths: how many rows each task has, if there are several; the loop walked them side by side till one had no batch left.
    """
    rows = BATCH * min(-(-length // BATCH) for length in lengths or [len(labels)])
    return metrics.as_published_scores(labels[:rows], predictions[:rows], max(map(len, data.LABELS.values())), BATCH)


def evaluate_checkpoint(s: argparse.Namespace, device: str) -> tuple[dict, list[str]]:
    """What --json prints, and the tables."""
    model, tokenizer, meta = open_checkpoint(s.checkpoint, device)
    name, parts = load_parts(s, list(model.labels), [s.split], meta)
    labels = {task: part[s.split].labels for task, part in parts.items()}
    logits = {task: predict(model, read(part[s.split].texts, tokenizer, model.config, device, meta), name=task)[task]
              for task, part in parts.items()}
    temperature = meta.get("temperature") or {}
    results = {task: score_task(logits[task], labels[task], data.LABELS[task], temperature.get(task, 1.0), s.seed) for task in parts}
    batched = {task: published(labels[task], logits[task].argmax(-1), list(map(len, labels.values()))) for task in parts}
    for found, keys in ((results, WHOLE[1:]), (batched, BATCHED)):
        found["average"] = {key: sum(scored[key] for scored in found.values()) / len(parts) for key in keys}
    tables = []
    for protocol, found, keys in ((CORRECTED, results, WHOLE), (PUBLISHED, batched, BATCHED))[:1 + s.as_published]:
        rows = [["", *found]]
        for key in keys:
            rows.append([key, *(scored.get(key) for scored in found.values())])
            if key in results[next(iter(parts))]["interval"] and protocol is CORRECTED:
                rows.append(["  95 % interval", *("{:.4f}-{:.4f}".format(*results[task]["interval"][key]) for task in parts), None])
        tables.append(table(f"{s.checkpoint}, {name}, {s.split} split\n{protocol}", rows, s.markdown))
    for task in parts:
        names = data.LABELS[task]
        by_class = [[cell["label"], *(cell[key] for key in BY_CLASS)] for cell in results[task]["per_class"]]
        counts = [[label, *row] for label, row in zip(names, results[task]["confusion_matrix"])]
        tables.append(table(f"{task} by class ({CORRECTED})", [["", *BY_CLASS], *by_class], s.markdown))
        tables.append(table(f"{task}, true classes down, predicted ones across ({CORRECTED})", [["", *names], *counts], s.markdown))
    return {"checkpoint": str(s.checkpoint), "data": name, "split": s.split, "seed": s.seed,
            "corrected": results, "as_published": batched}, tables


# What needs less than fine-tuning (Table 3).

def fit_linear(features: dict, part: dict[str, Part], n: int, width: int) -> dict[str, Tensor]:
    """Multinomial logistic regression, fitted on 'train' -> its predictions (N,) for every split. Nothing in it is random.

    Features, by split, are a tensor (N, width), standardised here, or TokenRows, which stand for counts of tokens (ids below
    width). The L2 penalty falls by powers of ten, each fit (L-BFGS) going on from the last, until fewer rows of 'validation'
    are right; the fit before is taken.
    """
    weight, bias = torch.zeros(width, n, requires_grad=True), torch.zeros(n, requires_grad=True)
    bag = isinstance(features["train"], TokenRows)
    centre, scale = (0, 1) if bag else (features["train"].mean(0), features["train"].std(0).clamp(min=1e-6))

    def logits(split: str) -> Tensor:
        x = features[split]
        return (F.embedding_bag(x.ids, weight, x.starts.int(), mode="sum") if bag else (x - centre) / scale @ weight) + bias

    most, answers = -1, {}
    for penalty in tqdm(PENALTIES, desc="fitting", unit=" penalties", disable=None, leave=False):
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(logits("train"), part["train"].labels) + penalty / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        predictions = {split: logits(split).argmax(-1) for split in features}
        right = int((predictions["validation"] == part["validation"].labels).sum())
        if right < most:
            break
        most, answers = right, predictions
    return answers


def probe(encoder: BertEncoder, tokenizer: WordPieceTokenizer, part: dict[str, Part], n: int, device: str) -> tuple[dict, dict]:
    """For every split, what a linear layer fitted on a frozen encoder predicts (N,), and the features it sees (N, C)."""
    width = encoder.config.hidden_size
    model = EmoBERT(encoder.config, {"pooled": [str(i) for i in range(width)]})
    model.encoder = encoder
    nn.init.eye_(model.heads["pooled"].weight)      # so its "logits" are the pooled vectors themselves
    model.to(device)
    features = {split: predict(model, read(rows.texts, tokenizer, encoder.config, device), name=split)["pooled"].clone()
                for split, rows in part.items()}
    return fit_linear(features, part, n, width), features


def random_heads(features: Tensor, n: int, seeds: int, seed: int) -> Tensor:
    """features (N, C) -> (seeds, N): what `seeds` heads that were never trained predict. All heads are one matrix product."""
    heads = [torch.randn(n, features.shape[1], generator=torch.Generator().manual_seed(seed + i)) for i in range(seeds)]
    return (features @ torch.cat(heads).T).view(len(features), seeds, n).argmax(-1).T


def load_encoders(s: argparse.Namespace) -> dict[str, tuple[BertEncoder, WordPieceTokenizer, str]]:
    """--encoder -> by name as given: encoder, tokenizer, what it is. Random weights are a function of the seed."""
    encoders = {}
    for name in s.encoder:
        torch.manual_seed(s.seed)
        chosen, why = choose_encoder(name)
        encoder, tokenizer, said = starting_point(chosen)
        encoders[name] = encoder, tokenizer, f"{said}{why}, {sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M parameters"
    return encoders


def entry(model: str, task: str, labels: Tensor, *draws: Tensor) -> dict:
    """A line of a comparison: the scores of predictions (N,), or mean and standard deviation over several draws of them."""
    found = [metrics.scores(metrics.confusion_matrix(labels, draw, len(data.LABELS[task]))) for draw in draws]
    values = torch.tensor([[one[key] for key in SHORT] for one in found], dtype=torch.float64)      # (draws, scores)
    deviation = {"deviation": dict(zip(SHORT, values.std(0).tolist()))} if len(draws) > 1 else {}
    return {"model": model, "task": task, **dict(zip(SHORT, values.mean(0).tolist())), **deviation}


def comparison(what: str, name: str, encoders: dict, corrected: list[dict], batched: list[dict], s) -> tuple[dict, list[str]]:
    """The lines of a comparison under both protocols -> what --json prints, and the tables, sorted by task."""
    about = {title: said for title, (_, _, said) in encoders.items()}
    tables = ["".join(f"{title}: {said}\n" for title, said in about.items())]
    for protocol, lines, keys in ((CORRECTED, corrected, SHORT), (PUBLISHED, batched, BATCHED)):
        rows = [["", "task", *keys]]
        for line in sorted(lines, key=lambda line: line["task"]):
            spread = {key: f"{line[key]:.4f} ± {value:.4f}" for key, value in line.get("deviation", {}).items()}
            rows.append([line["model"], line["task"], *(spread.get(key, line[key]) for key in keys)])
        tables.append(table(f"{what}, {name}, {s.split} split\n{protocol}", rows, s.markdown))
    return {"data": name, "split": s.split, "seed": s.seed, "encoders": about, "corrected": corrected, "as_published": batched}, tables


def baselines(s: argparse.Namespace, device: str) -> tuple[dict, list[str]]:
    """What --json prints, and the tables. The bag of words counts the word pieces of the first encoder."""
    name, parts = load_parts(s, list(data.LABELS), s.fitting_splits, {})
    encoders, tests = load_encoders(s), {task: part[s.split].labels for task, part in parts.items()}
    corrected, batched = [], []
    for task, part in parts.items():
        labels, n, (encoder, tokenizer, _) = tests[task], len(data.LABELS[task]), encoders[s.encoder[0]]
        bags = {split: read(rows.texts, tokenizer, encoder.config, "cpu") for split, rows in part.items()}
        corrected += [entry("majority class", task, labels, part["train"].labels.mode().values.expand(len(labels))),
                      entry("bag of words", task, labels, fit_linear(bags, part, n, tokenizer.vocab_size)[s.split])]
        for title, (encoder, tokenizer, _) in encoders.items():
            predictions, features = probe(encoder, tokenizer, part, n, device)
            draws = random_heads(features[s.split], n, s.seeds, s.seed)
            corrected += [entry(f"{title}, untrained head, {s.seeds} seeds", task, labels, *draws),
                          entry(f"{title}, linear probe", task, labels, predictions[s.split])]
            batched.append({"model": f"{title}, untrained head, seed {s.seed}", "task": task,
                            **published(labels, draws[0], list(map(len, tests.values())))})
    return comparison("baselines (± standard deviation)", name, encoders, corrected, batched, s)


# One task's model on the other task (Table 5).

def cross_task(s: argparse.Namespace, device: str) -> tuple[dict, list[str]]:
    """What --json prints, and the tables."""
    models = {task: open_checkpoint(path, device, task) for task, path in zip(("emotion", "sentiment"), s.cross_task)}
    name, parts = load_parts(s, list(models), s.fitting_splits, models["emotion"][2])
    if missing := models.keys() - parts:
        raise ValueError(f"{name} has no {s.split} rows for {missing.pop()}")
    encoders, corrected, batched = load_encoders(s), [], []
    for (task, (model, tokenizer, meta)), other in zip(models.items(), reversed(models)):
        for t, part in parts.items():
            ids = predict(model, read(part[s.split].texts, tokenizer, model.config, device, meta), name=t)[task].argmax(-1)
            batched.append({"model": f"{task} model", "task": t, **published(part[s.split].labels, ids)})
            if t == task:
                corrected.append(entry(f"{task} model, its own head", task, part[s.split].labels, ids))
        for title, (encoder, words, _) in {f"{task} model": (model.encoder, tokenizer, ""), **encoders}.items():
            ids = probe(encoder, words, parts[other], len(data.LABELS[other]), device)[0][s.split]
            corrected.append(entry(f"{title}, linear probe", other, parts[other][s.split].labels, ids))
    return comparison("across tasks", name, encoders, corrected, batched, s)


def main(argv=None) -> int:
    parser = Parser("evaluate.py", __doc__)
    mode, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    mode.add_argument("checkpoint", nargs="?", type=Path, help="a model from train.py")
    mode.add_argument("--baselines", action="store_true", help="majority class, bag of words, untrained heads and linear probes")
    mode.add_argument("--cross-task", nargs=2, type=Path, metavar="CHECKPOINT", help="two models, each on the other's task")
    add("--split", choices=("test", "validation"), default="test")
    add("--mixture", default="auto", help="starter, open, paper, all, or sources with commas (default: as train.py chooses)")
    add("--source", metavar="NAME", help="instead of a mixture: a publisher's own splits, row by row as published")
    add("--protocol", choices=("corrected", "published"), help="how splits are cut (default: as the checkpoint's were, else corrected)")
    add("--data-dir", metavar="DIR", help="where the sources are (default $EMOBERT_DATA, else ~/.cache/emobert/data)")
    add("--encoder", nargs="+", default=["auto", "random"], help="encoders to compare with, each as for train.py (default auto random)")
    add("--as-published", action="store_true", help="print the paper's means over batches beside a checkpoint's scores")
    add("--seeds", type=number(int, above=0), default=20, metavar="N", help="how many untrained heads (default 20)")
    add("--seed", type=number(int, least=0, below=2**31), default=1, help="of bootstrap, untrained heads and random encoders (default 1)")
    add("--limit", type=number(int, above=0), metavar="N", help="use the first N rows of each split and task only, for a quick try")
    add("--device", default="auto", help="cpu, cuda, mps (default: the best there is)")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--out", type=Path, metavar="FILE", help="write the JSON object to FILE as well; plot.py draws runs/NAME/evaluation.json")
    s = parser.parse_args(argv)
    s.fitting_splits = list(dict.fromkeys(("train", "validation", s.split)))
    run = baselines if s.baselines else cross_task if s.cross_task else evaluate_checkpoint
    report, tables = run(s, choose_device(s.device))
    if s.out:
        replace_text(s.out, json.dumps(report) + "\n")
    print(json.dumps(report) if s.json else "\n".join(tables).rstrip())
    return 0


if __name__ == "__main__":
    command.run(main)
