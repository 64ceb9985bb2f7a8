"""How fast it is, beside what: the paper's figures, the machine's own limit, and the programs that others use.

A time means little alone. So everything is warmed up first and told as a median of many runs; growth is shown, over tokens and over
texts; work is counted in multiply-adds and set against what the machine can do; and peers.py puts other programs beside ours.
Texts are the starter corpus's own and, where more are needed, its words in random order; `--texts` takes real ones.

    python bench.py                     latency, typing, growth, throughput, memory, startup
    python bench.py --peers --train     the same, then ours beside what others use, for answers and for training
    python bench.py --quick --json      a rough answer in seconds; the last line is JSON
"""

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from command import Parser, number, run
from emobert import BertConfig, EmoBERT, choose_device
from infer import DEFAULT_CHECKPOINT, Classifier, read_file
from peers import compare_peers, compare_training, judged, more_texts, once, progress, show, some_ids, table, times
from tokenizer import WordPieceTokenizer

ROOT = Path(__file__).resolve().parent
WINDOW = 256                                                              # tokens of the paper's context window
PAPER = {"tokenize": 146.20, "inference": 8.04, "total": 154.23}          # ms, means while somebody types, section 5.1.2
SPEEDS = "40 typed, 212 typed by the record holder, 150 spoken, 200 spoken fast"      # words a minute, the paper's introduction
LATENCY_TOKENS, TABLE_TOKENS, TABLE_BATCHES = (16, 64, 128, 256), (8, 16, 32, 64, 128, 256, 512), (1, 4, 16, 64, 256, 1024)
MATRICES = (1024, 2048)                                                   # widths of the square products that measure the machine

# Seconds for a time of ours; rounds of two programs, and seconds of a block; texts that predict answers, and that a tokenizer has
# seen before; starts of a process; texts typed; steps of training in a block.
FULL = dict(seconds=1.0, rounds=9, block=0.1, many=10_000, others=30_000, starts=7, typed=5, steps=16)
QUICK = dict(seconds=0.05, rounds=3, block=0.02, many=1_000, others=3_000, starts=1, typed=1, steps=2)


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "p95": float(np.percentile(values, 95)), "runs": len(values)}


# Texts, and the work that an answer needs.

def text_of(tokenizer: WordPieceTokenizer, texts: list[str], n: int, rng: random.Random) -> str:
    """A text of n tokens, [CLS] and [SEP] among them, of the texts' words in random order. Raises ValueError if they make none."""
    words, chosen, left = [word for text in texts for word in text.split()], [], n - 2
    for word in rng.choices(words or [""], k=100 * n):
        size = len(tokenizer.encode(word, None)) - 2
        if 0 < size <= left:
            chosen.append(word)
            left -= size
    if left:
        raise ValueError(f"the texts have no words that make up {n} tokens: give others with --texts")
    return " ".join(chosen)


def multiply_adds(config: BertConfig, B: int, T: int) -> int:
    """Multiply-adds that the tanh-pooled [CLS] of B texts of T tokens needs, in matrix products; look-ups cost none.

    C hidden size, I intermediate size, nh heads. A layer in full, for each text:
        T (3CC + CC + 2CI)     query, key and value; attention's output; the two matrices of the network
        2 TTC                  every token's scores with every token, and the weighted means of the values, over all heads
    The last layer, for its one row (BertLayer.first_row):
        CC + CC                the query, and the query taken through the key matrix
        2 nh TC                each head's scores with the rows as they are, and their weighted mean
        CC + CC + 2CI          the mean through the value matrix; attention's output; the network
    and CC for the pooler.
    """
    C, I, nh = config.hidden_size, config.intermediate_size, config.num_attention_heads      # noqa: E741
    full = T * (4 * C * C + 2 * C * I) + 2 * T * T * C
    last = 4 * C * C + 2 * C * I + 2 * nh * T * C
    return B * ((config.num_hidden_layers - 1) * full + last + C * C)


# The report. Each section prints itself and returns its numbers.

def machine(device: str) -> dict:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):      # only Linux has it
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    found = {"cpu": name, "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
             "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
             "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device}
    print(", ".join(f"{key} {value}" for key, value in found.items()) + "\n")
    return found


def latency(classifier: Classifier, texts: list[str], s: argparse.Namespace) -> dict:
    """Classifier.predict on single texts, whose words it has seen before."""
    rows: list[dict] = []
    for n in progress(LATENCY_TOKENS, "latency"):
        turns, found = [text_of(classifier.tokenizer, texts, n, s.rng) for _ in range(8)], []
        runs = len(times(lambda: found.append(classifier.predict_timed(turns[len(found) % 8])[1]), s.seconds, least=10))
        rows.append({"tokens": n, **{part: summary([ms[part] for ms in found[-runs:]]) for part in PAPER}})
    table(["one text, ms: median (p95)", *PAPER, "runs"], [[f"{row['tokens']} tokens", *(
        f"{show(row[part]['median'])} ({show(row[part]['p95'])})" for part in PAPER), row["total"]["runs"]] for row in rows])
    faster = PAPER["total"] / rows[-1]["total"]["median"]
    result = {"rows": rows, "times_the_paper": faster, **judged("256 tokens: the paper", faster)}
    print(f"{show(faster)} times as fast as the paper's {PAPER['total']} ms; bar {result['bar']:g}: {result['verdict']}\n")
    return result


def type_text(classifier: Classifier, words: list[str], window: int = WINDOW) -> list[dict[str, float]]:
    """The paper's section 3.3: somebody types, and at every space the whole text is read again, until it exceeds the window.

    Returns the milliseconds of each answer: {"tokenize", "inference", "total"}.
    """
    events, text = [], ""
    for word in words:
        text += word + " "
        (prediction,), ms = classifier.predict_timed(text)
        if prediction.n_tokens > window:
            break
        events.append(ms)
    return events


def typing(texts: list[str], s: argparse.Namespace) -> dict:
    events = []
    for _ in progress(range(s.typed), "typing"):
        classifier = Classifier.load(s.checkpoint, s.device)      # with an empty cache
        classifier.predict(["i " * n for n in (4, 60, 250)] * 2, batch_size=1)
        events += type_text(classifier, text_of(classifier.tokenizer, texts, WINDOW, s.rng).split())
    means = {part: statistics.mean(ms[part] for ms in events) for part in PAPER}
    result = {"answers": len(events), "mean_ms": means, "times_the_paper": {part: PAPER[part] / means[part] for part in PAPER},
              "words_a_minute": 60e3 / means["total"]}
    table([f"typing, mean ms of {len(events):,} answers", *PAPER], [["here", *means.values()], ["the paper", *map(str, PAPER.values())],
                                                                    ["times as fast", *result["times_the_paper"].values()]])
    print(f"It keeps up with {result['words_a_minute']:,.0f} words a minute; people: {SPEEDS}.\n")
    return result


@torch.inference_mode()
def growth(model: EmoBERT, s: argparse.Namespace) -> dict:
    """The model's time against the number of tokens, and against the number of texts."""
    def ms(B: int, T: int) -> float:
        batch = some_ids(config, B, T, s.device)
        return statistics.median(times(lambda: model(*batch), s.seconds)) * 1e3

    config = model.config
    tokens = [{"tokens": T, "ms": ms(1, T), "multiply_adds": multiply_adds(config, 1, T)} for T in progress(TABLE_TOKENS, "tokens")]
    batches = [{"batch": B, "ms": (spent := ms(B, 32)), "texts_per_second": B / spent * 1e3} for B in progress(TABLE_BATCHES, "batches")]
    table(["one text: tokens", "ms", "us a token", "M multiply-adds"],
          [[str(r["tokens"]), r["ms"], r["ms"] / r["tokens"] * 1e3, r["multiply_adds"] / 1e6] for r in tokens])
    first, before, last = tokens[0], tokens[-2], tokens[-1]
    T, best = last["tokens"], max(batches, key=lambda r: r["texts_per_second"])
    slope = (last["ms"] - before["ms"]) / (T - before["tokens"]) * 1e3
    square = 2 * T * T * config.hidden_size * (config.num_hidden_layers - 1) / last["multiply_adds"]
    print(f"{T / first['tokens']:g} times the tokens take {show(last['ms'] / first['ms'])} times as long: a short text costs little more than "
          f"the calls of the operators.\nAt {T} tokens one more costs {show(slope)} us, and attention, which grows with the square, is "
          f"{square:.0%} of the work.\n")
    table(["texts of 32 tokens at once", "ms", "texts/s"], [[f"{r['batch']:,}", r["ms"], r["texts_per_second"]] for r in batches])
    gain = best["texts_per_second"] / batches[0]["texts_per_second"]
    print(f"A batch shares those calls, and its larger products use the cores better: {show(gain)} times the texts a second at best, in batches "
          f"of {best['batch']:,}.\nBeyond that, time grows as the batch does, or more, once its numbers no longer fit the caches.\n")
    return {"tokens": tokens, "batches": batches, "us_per_token": slope, "square_share": square, "best_batch": best["batch"]}


@torch.inference_mode()
def limit(model: EmoBERT, s: argparse.Namespace) -> dict:
    """The share of the best rate of torch.mm here, in float32, that 32 texts of 128 tokens reach, counting no work but what they need."""
    batch, best = some_ids(model.config, 32, 128, s.device), 0.0
    rate = multiply_adds(model.config, 32, 128) / statistics.median(times(lambda: model.encoder.pooled(*batch), s.seconds))
    for n in MATRICES:
        a, b = torch.randn(2, n, n, device=s.device)
        best = max(best, n ** 3 / min(times(lambda: torch.mm(a, b), s.seconds)))
    result = {"gflops": 2e-9 * rate, "limit_gflops": 2e-9 * best, "share": rate / best, **judged("share of the matrix-product limit", rate / best)}
    print(f"32 x 128 tokens: {rate / best:.0%} of the matrix-product limit ({show(2e-9 * rate)} of {show(2e-9 * best)} GFLOP/s); "
          f"bar {result['bar']:.0%}: {result['verdict']}")
    return result


def throughput(classifier: Classifier, texts: list[str], s: argparse.Namespace) -> dict:
    many = more_texts(texts, s.many, s.rng)
    rate = len(many) / statistics.median(times(lambda: classifier.predict(many), s.seconds))
    print(f"predict: {show(rate)} texts/s, for {len(many):,} texts of mixed length")
    return {"texts": len(many), "texts_per_second": rate}


def answer_and_weigh(checkpoint: str, device: str) -> None:
    """What the process of `memory` does: answers the texts on stdin one by one and prints its resident megabytes."""
    classifier = Classifier.load(checkpoint, device)
    for text in json.load(sys.stdin):
        classifier.predict(text)
    status = Path("/proc/self/status")
    if status.exists():
        print(next(int(line.split()[1]) * 1024 / 1e6 for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmRSS:")))
    else:
        import resource  # tells the most it ever was, in bytes on a Mac
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3))


def memory(texts: list[str], s: argparse.Namespace) -> dict:
    program = "import sys, bench; bench.answer_and_weigh(*sys.argv[1:])"
    answer = subprocess.run([sys.executable, "-c", program, str(s.checkpoint.absolute()), s.device],
                            input=json.dumps(more_texts(texts, 1000, s.rng)), stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    result = {"resident_mb": float(answer.stdout), **judged("resident memory, MB", float(answer.stdout))}
    print(f"resident memory after 1,000 texts: {show(result['resident_mb'])} MB (the paper: 2 GB); at most {result['bar']:g}: {result['verdict']}")
    return result


def startup(s: argparse.Namespace) -> dict:
    """Seconds from the start of infer.py to its answer, over those of a Python that only imports torch, in turn."""
    commands = ([str(ROOT / "infer.py"), "I can't wait to see you", "--checkpoint", str(s.checkpoint), "--device", s.device], ["-c", "import torch"])
    rounds = [[once(lambda: subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)) for command in commands]
              for _ in progress(range(s.starts + 1), "startup")][1:]      # the first one reads from the disk and compiles
    answer, torch_alone, over = (statistics.median(values) for values in zip(*((a, b, a - b) for a, b in rounds)))
    result = {"answer_s": answer, "import_torch_s": torch_alone, "over_s": over, **judged("startup over import torch, s", over)}
    print(f"startup: an answer after {answer:.2f} s, {over:.2f} s more than import torch; at most {result['bar']:g}: {result['verdict']}")
    return result


@torch.inference_mode()
def gpu(model: EmoBERT, s: argparse.Namespace) -> list[dict] | str:
    """Ids on the host to logits on the host: as usual, and as a CUDA graph, which saves the calls of the single operators."""
    if not s.device.startswith("cuda"):
        print("GPU: not measured\n")
        return "not measured"
    rows = []
    for B, T in ((1, 16), (1, 256), (4096, 32)):
        ids, (placed, mask) = some_ids(model.config, B, T)[0], some_ids(model.config, B, T, s.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):      # what is only done the first time must not be caught in the graph
            for _ in range(3):
                model(placed, mask)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            caught = model(placed, mask)
        eager, replayed = (statistics.median(times(call, s.seconds)) * 1e3 for call in (
            lambda: [logits.cpu() for logits in model(placed.copy_(ids), mask).values()],
            lambda: (placed.copy_(ids), graph.replay(), [logits.cpu() for logits in caught.values()])))
        rows.append({"batch": B, "tokens": T, "eager_ms": eager, "graph_ms": replayed, "texts_per_second": B / min(eager, replayed) * 1e3})
    table(["GPU: texts x tokens", "eager, ms", "CUDA graph, ms", "texts/s"],
          [[f"{r['batch']:,} x {r['tokens']}", r["eager_ms"], r["graph_ms"], r["texts_per_second"]] for r in rows])
    return rows


def arguments(argv=None) -> argparse.Namespace:
    parser = Parser("bench.py", __doc__)
    add = parser.add_argument
    add("--threads", type=number(int, least=1), metavar="N", help="CPU threads to use (default: PyTorch's choice)")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, metavar="FILE", help="a model from train.py (default: the bundled one)")
    add("--texts", type=Path, default=ROOT / "assets" / "starter.tsv", metavar="FILE",
        help="measure on these texts: .txt (a text a line), or .csv, .tsv or .jsonl with a 'text' (default: the starter corpus)")
    add("--peers", action="store_true",
        help="ours beside tokenizers, flash-tokenizer, nanotoken, transformers and ONNX Runtime, as far as installed")
    add("--train", action="store_true", help="rows a second in training, beside a plain transformers loop and the one as published")
    add("--quick", action="store_true", help="few runs: a rough answer in seconds")
    add("--json", action="store_true", help="the last line is one JSON object with all the numbers")
    settings = parser.parse_args(argv)
    settings.device = choose_device(settings.device)
    if not settings.device.startswith(("cpu", "cuda")):
        parser.error(f"times can be taken on cpu and cuda, not on {settings.device}")
    if settings.peers and settings.device != "cpu":
        parser.error("--peers compares on the CPU")
    vars(settings).update(QUICK if settings.quick else FULL, rng=random.Random(1))
    return settings


def main(argv=None) -> int:
    s = arguments(argv)
    if s.threads:
        torch.set_num_threads(s.threads)
    if ":" in s.device:
        torch.cuda.set_device(s.device)
    torch.manual_seed(1)
    classifier = Classifier.load(s.checkpoint, s.device)
    if classifier.max_length < max(TABLE_TOKENS):
        raise ValueError(f"{s.checkpoint}: reads {classifier.max_length} tokens at most; the tables need {max(TABLE_TOKENS)}")
    texts = [text for text in read_file(s.texts, None) if text.strip()]
    if len(texts) < 64:
        raise ValueError(f"{s.texts}: {len(texts)} texts are too few to measure on, give 64 or more")
    model = classifier.model
    results = {"machine": machine(s.device), "latency": latency(classifier, texts, s), "typing": typing(texts, s), "growth": growth(model, s),
               "limit": limit(model, s), "throughput": throughput(classifier, texts, s), "memory": memory(texts, s), "startup": startup(s),
               "gpu": gpu(model, s)}
    if s.peers:
        results["peers"] = compare_peers(classifier, texts, s)
    if s.train:
        results["train"] = compare_training(texts, s)
    if s.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    run(main)
