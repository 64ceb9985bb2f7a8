"""The benchmark: what it counts, what it compares, what it reports. No test here depends on how fast anything is."""

import io
import json
import random
import sys
from argparse import Namespace

import pytest
import torch

import bench
import data
import peers
from emobert import BertConfig, BertEncoder, EmoBERT, _from_hugging_face, save_checkpoint
from infer import Classifier, Prediction
from tests.conftest import TINY, WORDS

PEERS = ("tokenizers.implementations", "flash_tokenizer", "nanotoken", "transformers", "onnx", "onnxruntime")
SMALL = dict(seconds=0.001, rounds=2, block=0.001, many=70, others=80, starts=1, typed=1, steps=1)


@pytest.fixture
def texts() -> list[str]:
    rng = random.Random(3)
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, 12))) for _ in range(80)]


@pytest.fixture
def model(tokenizer) -> EmoBERT:
    """The tiny model, but as long as the tables of the report need it; weights large enough for answers to differ."""
    torch.manual_seed(0)
    model = EmoBERT(BertConfig(vocab_size=tokenizer.vocab_size, **{**TINY, "max_position_embeddings": 512}), data.LABELS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def files(model, tokenizer, texts, tmp_path) -> list[str]:
    """Options that name a checkpoint and a file of texts."""
    save_checkpoint(tmp_path / "model.pt", model, tokenizer, temperature={"emotion": 1.5})
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    return ["--checkpoint", str(tmp_path / "model.pt"), "--texts", str(tmp_path / "texts.txt"), "--threads", "1", "--quick"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "QUICK", SMALL)
    monkeypatch.setattr(bench, "TABLE_BATCHES", (1, 2))
    monkeypatch.setattr(bench, "MATRICES", (16, 32))
    monkeypatch.setattr(peers, "POINTS", ((1, 8), (2, 8)))


def settings(**more) -> Namespace:
    return Namespace(**{**SMALL, "rng": random.Random(1), "device": "cpu", "both": [1], **more})


class Clock:
    """A clock that only moves when it is told to, in the place of the module time."""

    def __init__(self):
        self.now, self.pauses = 0.0, 0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.pauses += 1

    def spend(self, seconds):
        self.now += seconds


# Counting and judging.

def test_multiply_adds_by_hand():
    config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    # 5 tokens, a full layer: q, k and v 5*48, scores 2 heads*5*5*2, means as many, output 5*16, network 5*(32+32)
    full = 240 + 100 + 100 + 80 + 320
    # the last layer: query 16, through the key matrix 16, scores 2 heads*5*4, means as many, values 16, output 16, network 64
    last = 16 + 16 + 40 + 40 + 16 + 16 + 64
    assert bench.multiply_adds(config, 1, 5) == full + last + 16
    assert bench.multiply_adds(config, 3, 5) == 3 * (full + last + 16)
    config.num_hidden_layers = 1
    assert bench.multiply_adds(config, 1, 5) == last + 16
    config.num_hidden_layers = 4
    assert bench.multiply_adds(config, 1, 5) == 3 * full + last + 16


def test_summary_by_hand():
    assert bench.summary([float(n) for n in range(21, 0, -1)]) == {"median": 11.0, "p95": 20.0, "runs": 21}
    assert bench.summary([1.0, 2.0]) == {"median": 1.5, "p95": pytest.approx(1.95), "runs": 2}


def test_times_leave_the_warm_up_out(monkeypatch):
    clock, calls = Clock(), []
    monkeypatch.setattr(peers, "time", clock)

    def slow_at_first():
        calls.append(1)
        clock.spend(5.0 if len(calls) == 1 else 0.25)

    assert peers.times(slow_at_first, seconds=2.0) == [0.25] * 8 and len(calls) == 9
    assert peers.times(slow_at_first, seconds=0.0, least=4) == [0.25] * 4


def test_pairs_are_of_one_moment(monkeypatch):
    """The machine gets slower all the time; the ratios do not notice, and neither side is always the first."""
    clock, order, slowness = Clock(), [], [1.0]
    monkeypatch.setattr(peers, "time", clock)

    def side(name, seconds):
        def call():
            order.append(name)
            slowness[0] *= 1.001
            clock.spend(seconds * slowness[0])
        return call

    pairs = peers.paired(side("ours", 1.0), side("theirs", 3.0), settings(block=0.5, rounds=4))
    assert order == ["ours", "theirs"] + ["theirs", "ours", "ours", "theirs"] * 2 and clock.pauses == 8
    found = peers.row("predict", "transformers", 1, pairs)
    assert len(pairs) == 4 and found["ratio"] == pytest.approx(3.0, rel=0.01)
    assert found["bar"] == 4.0 and found["verdict"] == "falls short"
    order.clear()
    peers.paired(side("ours", 0.1), side("theirs", 1.0), settings(block=1.0, rounds=1))
    assert order.count("ours") == pytest.approx(20, abs=1) and order.count("theirs") == 2      # blocks last alike


def test_row_by_hand():
    found = peers.row("encode, cache warm", "flash-tokenizer", 2, [(1.0, 2.0), (2.0, 6.0), (4.0, 4.0)])
    assert found == {"what": "encode, cache warm", "beside": "flash-tokenizer", "threads": 2, "ms": 2000.0, "ratio": 2.0, "bar": 1.0, "verdict": "holds"}


def test_bars_are_complete():
    expected = {("encode, cache warm", "tokenizers"): 8, ("encode, cache warm", "flash-tokenizer"): 1, ("encode, unseen texts", "flash-tokenizer"): 0.5,
                ("encode, cache cold", "flash-tokenizer"): 0.4, ("encode_batch", "tokenizers"): 4, ("predict", "transformers"): 4,
                ("training", "transformers"): 2, ("training", "as published"): 12, ("256 tokens", "the paper"): 40}
    for point in ("1 x 8", "1 x 32", "1 x 128", "1 x 256", "32 x 32", "32 x 128"):
        expected["pooled " + point, "transformers"] = 1.5
        expected["pooled " + point, "ONNX Runtime"] = 0.7 if point in ("1 x 8", "1 x 32") else 1.0
    assert peers.BARS == {": ".join(key): value for key, value in expected.items()} | {"share of the matrix-product limit": 0.5}
    assert peers.AT_MOST == {"resident memory, MB": 400, "startup over import torch, s": 0.6}
    assert peers.judged("predict: transformers", 4.0) == {"bar": 4.0, "verdict": "holds"}
    assert peers.judged("predict: transformers", 3.99)["verdict"] == "falls short"
    assert peers.judged("resident memory, MB", 400.0)["verdict"] == "holds"
    assert peers.judged("resident memory, MB", 401.0)["verdict"] == "falls short"
    assert peers.judged("encode, cache cold: nanotoken", 0.1) == {"bar": None, "verdict": ""}


# Texts.

def test_more_texts_are_of_the_same_words(texts):
    assert peers.more_texts(texts, 5, random.Random(0)) == texts[:5]
    more = peers.more_texts(texts, 200, random.Random(0))
    assert len(more) == 200 and more[:80] == texts and more == peers.more_texts(texts, 200, random.Random(0))
    assert {word for text in more for word in text.split(" ")} <= set(WORDS)
    assert {len(text.split(" ")) for text in more} <= {len(text.split(" ")) for text in texts} and len(set(more[80:])) > 100


def test_texts_of_so_many_tokens(tokenizer):
    texts = ["happy strange", "the dog"]      # 'strange' is seven pieces here
    for n in (3, 9, 64):
        assert len(tokenizer.encode(bench.text_of(tokenizer, texts, n, random.Random(n)), None)) == n
    with pytest.raises(ValueError, match="make up 8 tokens"):
        bench.text_of(tokenizer, ["strange"], 8, random.Random(0))
    assert len(tokenizer.encode(bench.text_of(tokenizer, ["strange"], 16, random.Random(0)), None)) == 16


def test_typing_reads_all_of_the_text_at_every_word():
    read = []

    class Reader:
        def predict_timed(self, text):
            read.append(text)
            return [Prediction(text, {}, {}, len(text.split()) + 2, False)], {"total": float(len(read))}

    events = bench.type_text(Reader(), "so happy to see you".split())
    assert read == ["so ", "so happy ", "so happy to ", "so happy to see ", "so happy to see you "]
    assert events == [{"total": float(n)} for n in range(1, 6)]
    read.clear()
    assert len(bench.type_text(Reader(), ["a"] * 50, window=10)) == 8 and len(read) == 9      # the one that does not fit does not count


# The peers.

def test_weights_and_graph_are_ours(model, tokenizer):
    weights = peers.hugging_face_weights(model)
    fresh = BertEncoder(model.config)
    fresh.load_state_dict(_from_hugging_face(weights, fresh, "here"))
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.encoder.state_dict().values()))
    input_ids, attention_mask = tokenizer.pad([tokenizer.encode(text) for text in ("the happy dog", "why?", "a very very good day with you")])
    torch.testing.assert_close(peers.Graph(model)(input_ids, attention_mask), model.encoder.pooled(input_ids, attention_mask), atol=1e-4, rtol=0)


def test_other_answers_are_not_compared():
    peers.must_agree("theirs", torch.tensor([0.5]), torch.tensor([0.5005]))
    for theirs in (0.51, float("nan")):
        with pytest.raises(ValueError, match="theirs gives other answers"):
            peers.must_agree("theirs", torch.tensor([0.5]), torch.tensor([theirs]))


def test_encoders_beside_the_real_ones(small, model):
    pytest.importorskip("transformers", reason="transformers is in requirements-dev.txt")
    pytest.importorskip("onnxruntime", reason="onnxruntime is in requirements-dev.txt")
    rows = peers.compare_encoders(model, settings())
    assert [(r["what"], r["beside"]) for r in rows] == [(what, peer) for what in ("pooled 1 x 8", "pooled 2 x 8") for peer in ("transformers", "ONNX Runtime")]
    assert all(r["ms"] > 0 and r["ratio"] > 0 for r in rows)


def test_predict_and_training_beside_the_real_ones(small, model, tokenizer, texts, files, short_corpus):
    pytest.importorskip("transformers", reason="transformers is in requirements-dev.txt")
    (found,) = peers.compare_predict(Classifier(model, tokenizer, {"emotion": 1.5}), texts, settings())
    assert found["beside"] == "transformers" and found["ratio"] > 0
    rows = peers.compare_training(texts, settings(checkpoint=files[1]))
    assert [r["beside"] for r in rows] == ["ours", "transformers", "as published"] and all(r["rows_per_second"] > 0 for r in rows)
    assert rows[0]["ratio"] == 1.0 and [r["bar"] for r in rows] == [None, 2.0, 12.0]


def test_tokenizers_beside_the_real_ones(tokenizer, texts, capsys):
    pytest.importorskip("tokenizers", reason="tokenizers is in requirements-dev.txt")
    rows = [r for r in peers.compare_tokenizers(tokenizer, texts, settings()) if r["beside"] == "tokenizers"]
    assert [r["what"] for r in rows] == ["encode, cache warm", "encode, unseen texts", "encode, cache cold", "encode_batch"]
    assert "tokenizers: other ids than ours for 0 of 4,096 texts" in capsys.readouterr().out


# The program.

def fake_process(command, stdout=None, **_):
    return Namespace(stdout="123.5\n")


def test_report_and_json(small, files, short_corpus, monkeypatch, capsys):
    monkeypatch.setattr(bench.subprocess, "run", fake_process)
    for name in PEERS:
        monkeypatch.setitem(sys.modules, name, None)      # importing it raises ImportError
    assert bench.main([*files, "--json", "--peers", "--train"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)
    assert list(results) == ["machine", "latency", "typing", "growth", "limit", "throughput", "memory", "startup", "gpu", "peers", "train"]
    assert set(results["machine"]) == {"cpu", "cores", "threads", "torch", "python", "device"} and results["machine"]["threads"] == 1
    assert [r["tokens"] for r in results["latency"]["rows"]] == [16, 64, 128, 256]
    assert all(set(r[part]) == {"median", "p95", "runs"} and r[part]["runs"] >= 10 for r in results["latency"]["rows"] for part in bench.PAPER)
    assert results["latency"]["bar"] == 40 and results["latency"]["verdict"]
    assert results["latency"]["times_the_paper"] == pytest.approx(154.23 / results["latency"]["rows"][-1]["total"]["median"])
    assert set(results["typing"]["mean_ms"]) == set(results["typing"]["times_the_paper"]) == {"tokenize", "inference", "total"}
    assert results["typing"]["answers"] > 100 and results["typing"]["words_a_minute"] == pytest.approx(60e3 / results["typing"]["mean_ms"]["total"])
    assert [r["tokens"] for r in results["growth"]["tokens"]] == [8, 16, 32, 64, 128, 256, 512] and results["growth"]["best_batch"] in (1, 2)
    assert set(results["limit"]) == {"gflops", "limit_gflops", "share", "bar", "verdict"} and results["throughput"]["texts"] == 70
    assert results["memory"] == {"resident_mb": 123.5, "bar": 400, "verdict": "holds"}
    assert set(results["startup"]) == {"answer_s", "import_torch_s", "over_s", "bar", "verdict"}
    assert results["gpu"] == "not measured" and "GPU: not measured" in lines and results["peers"] == []
    assert [r["beside"] for r in results["train"]] == ["ours"]
    for name in ("tokenizers", "flash-tokenizer", "nanotoken", "transformers", "ONNX"):
        assert any(line.startswith(f"{name}: not installed") for line in lines), name
    for words in ("154.23", "212", "words a minute", "matrix-product limit", "the paper: 2 GB"):
        assert any(words in line for line in lines), words


def test_commands_that_are_started(files, texts, monkeypatch):
    started = []
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **more: started.append((command, more)) or fake_process(command))
    s = bench.arguments(files)
    bench.startup(s)
    bench.memory(texts, s)
    answer, alone = started[0][0], started[1][0]
    assert answer[1].endswith("infer.py") and str(s.checkpoint) in answer and alone[1:] == ["-c", "import torch"]
    assert len(json.loads(started[-1][1]["input"])) == 1000


def test_weighing_a_process(files, texts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(texts)))
    bench.answer_and_weigh(files[1], "cpu")
    assert 50 < float(capsys.readouterr().out) < 20_000


def test_bad_input(files, tmp_path, checkpoint, capsys):
    (tmp_path / "few.txt").write_text("only one\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="few.txt: 1 texts are too few"):
        bench.main([*files, "--texts", str(tmp_path / "few.txt")])
    with pytest.raises(ValueError, match="reads 64 tokens at most"):
        bench.main([*files, "--checkpoint", str(checkpoint)])
    with pytest.raises(SystemExit) as end:
        bench.main([*files, "--threads", "0"])
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: ")
