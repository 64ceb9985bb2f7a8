"""Answers: the `Classifier` that other programs import, and the command line.

A text is tokenized, padded to the longest of its batch, read by the model, and each head's logits become probabilities. Texts
are sorted by length before they are cut into batches, and handed back in the order they came in; padding is masked exactly, so
a text gets the same answer alone and in company.

    python infer.py "I can't wait to see you" "leave me alone"
    python infer.py --json < texts.txt > answers.jsonl
    python infer.py --file reviews.csv --column comment --out answers.jsonl
"""

import argparse
import csv
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from command import Parser, number, printable, run
from emobert import EmoBERT, choose_device, load_checkpoint
from tokenizer import WordPieceTokenizer

DEFAULT_CHECKPOINT = Path(__file__).resolve().parent / "assets" / "emobert-tiny.pt"
TASKS = ("sentiment", "emotion")
CHUNK = 4096              # texts that are read from a file before the model is asked
BAR = 20                  # characters of the longest bar
MAX_FIELD = 1 << 28       # characters in one cell of a CSV file
UNSAFE = re.compile("[\x7f-\x9f\ud800-\udfff]")


@dataclass
class Prediction:
    """What the model says about one text. Probabilities by label, best first; {} for a task that the checkpoint lacks."""
    text: str
    sentiment: dict[str, float]
    emotion: dict[str, float]
    n_tokens: int         # tokens that were read, [CLS] and [SEP] included
    truncated: bool       # whether the text had more


class Classifier:
    """A loaded model that answers texts. Keeps no state between calls, so threads may share one."""

    def __init__(self, model: EmoBERT, tokenizer: WordPieceTokenizer, temperature: dict[str, float] | None = None,
                 max_length: int | None = None):
        """temperature: task -> what its logits are divided by. max_length: tokens that are read of a text (default: all the model can)."""
        if unknown := set(model.labels) - set(TASKS):
            raise ValueError(f"the checkpoint has the tasks {', '.join(sorted(unknown))}; Classifier knows {' and '.join(TASKS)}")
        limit = model.config.max_position_embeddings
        if max_length is not None and not 2 <= max_length <= limit:
            raise ValueError(f"max_length must lie between 2 and the model's {limit}, not {max_length}")
        self.model, self.tokenizer = model, tokenizer
        self.max_length = max_length or limit
        self.temperature = temperature or {}
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, path=DEFAULT_CHECKPOINT, device="auto", max_length: int | None = None) -> "Classifier":
        """Reads a checkpoint. Raises FileNotFoundError; ValueError for a damaged checkpoint or a device that is not there."""
        model, tokenizer, meta = load_checkpoint(path, choose_device(device))
        return cls(model, tokenizer, meta.get("temperature"), max_length)

    def predict(self, texts: str | Sequence[str], batch_size: int = 64) -> list[Prediction]:
        """One Prediction a text, in the order given; a single text gives a list of one. Raises TypeError or ValueError on other input."""
        return self.predict_timed(texts, batch_size)[0]

    def predict_timed(self, texts: str | Sequence[str], batch_size: int = 64) -> tuple[list[Prediction], dict[str, float]]:
        """predict, and the milliseconds that it spent: {"tokenize", "inference", "total"}; inference is from ids to probabilities."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        started = time.perf_counter()
        rows = []
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {i} is of type {type(text).__name__}, not str")
            rows.append(self.tokenizer.encode(text, None))
        tokenized = time.perf_counter()
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        probabilities: dict[str, list] = {task: [None] * len(rows) for task in self.model.labels}
        with torch.inference_mode():
            for begin in range(0, len(order), batch_size):
                batch = order[begin:begin + batch_size]
                input_ids, attention_mask = self.tokenizer.pad([self._cut(rows[i]) for i in batch])
                for task, logits in self.model(input_ids.to(self.device), attention_mask.to(self.device)).items():
                    values = torch.softmax(logits / self.temperature.get(task, 1.0), -1).tolist()
                    for i, row in zip(batch, values):
                        probabilities[task][i] = row
        inferred = time.perf_counter()
        labels = self.model.labels
        answers = [Prediction(text, *({} if task not in labels else _best_first(labels[task], probabilities[task][i]) for task in TASKS),
                              min(len(row), self.max_length), len(row) > self.max_length)
                   for i, (text, row) in enumerate(zip(texts, rows))]
        return answers, {"tokenize": (tokenized - started) * 1e3, "inference": (inferred - tokenized) * 1e3,
                         "total": (time.perf_counter() - started) * 1e3}

    def _cut(self, row: list[int]) -> list[int]:
        return row if len(row) <= self.max_length else [*row[:self.max_length - 1], self.tokenizer.sep_id]


def _best_first(labels: list[str], values: list[float]) -> dict[str, float]:
    return dict(sorted(zip(labels, values), key=lambda item: -item[1]))


# Reading: one text at a time, whatever the file.

def read_lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """Lines of bytes -> texts without their line ends. Raises ValueError naming the line that is not UTF-8."""
    for place, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8-sig" if place == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise ValueError(f"{name}: line {place} is not UTF-8; convert the file first") from None


def read_file(path: Path, column: str | None) -> Iterator[str]:
    """The texts of a .txt, .csv, .tsv or .jsonl file. Raises FileNotFoundError; ValueError naming the file and the line."""
    readers = {".txt": read_lines, ".csv": read_table, ".tsv": read_table, ".jsonl": read_json}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: the name must end in {', '.join(readers)}")
    reader = readers[path.suffix.lower()]
    if column is not None and reader is read_lines:
        raise ValueError(f"{path}: a text file has no columns, leave --column out")
    with open(path, "rb") as file:
        if reader is read_lines:
            yield from read_lines(file, str(path))
        else:
            yield from reader((line + "\n" for line in read_lines(file, str(path))), path, column)


def read_table(lines: Iterator[str], path: Path, column: str | None) -> Iterator[str]:
    """Lines of a CSV or TSV file with a header -> one column's cells; a row that is too short has an empty text there.

    A quotation mark in a TSV file is a character like any other (IANA text/tab-separated-values); in a CSV file it must be closed.
    """
    csv.field_size_limit(MAX_FIELD)
    tabs = path.suffix.lower() == ".tsv"
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        place = _column(header, column, path)
        for row in reader:
            yield row[place] if place < len(row) else ""
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}") from None


def _column(header: list[str], column: str | None, path: Path) -> int:
    wanted = column if column is not None else header[0] if len(header) == 1 else "text"
    if wanted not in header:
        raise ValueError(f"{path}: no column '{wanted}'; it has {', '.join(header) or 'no header'}; name one with --column")
    return header.index(wanted)


def read_json(lines: Iterator[str], path: Path, column: str | None) -> Iterator[str]:
    """Lines of JSON objects -> the texts under one key."""
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[column or "text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: line {place} is no JSON object with a '{column or 'text'}' ({type(error).__name__})") from None
        if not isinstance(text, str):
            raise ValueError(f"{path}: line {place}: '{column or 'text'}' is no string")
        yield text


# Writing.

def best_label(probabilities: dict[str, float], min_confidence: float) -> str:
    """The most probable label, or 'uncertain' if even that is less probable than min_confidence."""
    label, confidence = next(iter(probabilities.items()))
    return label if confidence >= min_confidence else "uncertain"


def as_json(prediction: Prediction, ms: dict[str, float], min_confidence: float = 0.0) -> str:
    """One JSON object, on one line."""
    answer: dict = {"text": prediction.text}
    for task in TASKS:
        if found := getattr(prediction, task):
            answer[task] = {"label": best_label(found, min_confidence), "scores": {label: round(p, 6) for label, p in found.items()}}
    answer |= {"tokens": prediction.n_tokens, "truncated": prediction.truncated, "ms": {name: round(value, 3) for name, value in ms.items()}}
    # JSON leaves the controls above U+007E as they are, and terminals may obey them; lone surrogates cannot be written at all.
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(answer, ensure_ascii=False))


def as_text(prediction: Prediction, top_k: int, min_confidence: float = 0.0) -> str:
    """A few lines with bars. Control characters are shown as a replacement, never sent to the terminal."""
    lines = [printable(prediction.text) or "(empty text)"]
    for task in TASKS:
        if (found := getattr(prediction, task)) and best_label(found, min_confidence) == "uncertain":
            lines.append(f"  {task:9}  uncertain")
            continue
        for n, (label, p) in enumerate(islice(getattr(prediction, task).items(), top_k)):
            eighths = round(p * BAR * 8)
            bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
            lines.append(f"  {'' if n else task:9}  {label:8} {p:6.1%}  {bar}".rstrip())
    if prediction.truncated:
        lines.append(f"  (truncated: only the first {prediction.n_tokens} tokens were read)")
    return "\n".join(lines) + "\n"


def answer_all(classifier: Classifier, texts: Iterable[str], chunk: int, batch_size: int) -> Iterator[tuple[Prediction, dict[str, float]]]:
    """Predictions for any number of texts, in constant memory, each with its share of its chunk's milliseconds."""
    texts = iter(texts)
    while part := list(islice(texts, chunk)):
        predictions, ms = classifier.predict_timed(part, batch_size)
        share = {name: value / len(part) for name, value in ms.items()}
        for prediction in predictions:
            yield prediction, share


def arguments(argv=None) -> argparse.Namespace:
    parser = Parser("infer.py", __doc__)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="texts to classify; without any, each line of stdin is one")
    add("--file", type=Path, help="classify the texts of a .txt (a text a line), .csv, .tsv (with a header) or .jsonl file; answers are JSON lines")
    add("--column", metavar="NAME", help="the column, or JSON key, that holds the text (default: text)")
    add("--out", type=Path, metavar="FILE", help="write the answers to this file, all or nothing, instead of stdout")
    add("--json", action="store_true", help="one JSON object a line instead of bars")
    add("--top-k", type=number(int, least=1), default=3, metavar="K", help="labels shown a task in the readable output (default 3)")
    add("--min-confidence", type=number(least=0, below=1), default=0.0, metavar="P", help="answer 'uncertain' where the best label is less probable")
    add("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, metavar="FILE", help="a model from train.py (default: the bundled one)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    add("--threads", type=number(int, least=1), metavar="N", help="CPU threads to use (default: PyTorch's choice)")
    add("--batch-size", type=number(int, least=1), default=64, metavar="N", help="texts that the model reads at once (default 64)")
    add("--max-length", type=number(int, least=2), metavar="N", help="tokens that are read of a text (default: as many as the model can, 512)")
    settings = parser.parse_args(argv)
    if settings.file and settings.texts:
        parser.error("give texts or --file, not both")
    if settings.column and not settings.file:
        parser.error("--column belongs to --file")
    return settings


def main(argv=None) -> int:
    settings = arguments(argv)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.file and not settings.file.is_file():      # before the model is loaded
        raise FileNotFoundError(f"{settings.file}: no such file")
    if settings.out and not settings.out.parent.is_dir():
        raise FileNotFoundError(f"{settings.out.parent}: no such folder")
    classifier = Classifier.load(settings.checkpoint, settings.device, settings.max_length)
    chunk = CHUNK
    if settings.file:
        texts: Iterable[str] = with_progress(read_file(settings.file, settings.column), settings.out is not None or not sys.stdout.isatty())
    elif settings.texts:
        texts = settings.texts
    elif sys.stdin is None:
        raise ValueError("stdin is closed: give texts as arguments, or --file")
    else:
        texts = read_lines(sys.stdin.buffer, "stdin")
        if sys.stdin.isatty():
            print("Type a text and press Enter; Ctrl-D ends.", file=sys.stderr)
            chunk = 1
    readable = not (settings.json or settings.file or settings.out)
    least = settings.min_confidence
    answers = (as_text(p, settings.top_k, least) if readable else as_json(p, ms, least)
               for p, ms in answer_all(classifier, texts, chunk, settings.batch_size))
    if settings.out:
        write_lines(settings.out, answers)
    else:
        for answer in answers:
            print(answer, flush=chunk == 1)
        sys.stdout.flush()
    return 0


def with_progress(texts: Iterator[str], wanted: bool) -> Iterator[str]:
    from tqdm import tqdm  # here, so that a single text does not wait for it
    return iter(tqdm(texts, unit=" texts", disable=None if wanted else True))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes lines to a temporary name and renames it at the end: the file is complete, or as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for line in lines:
                file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
