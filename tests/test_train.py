"""The loss by hand, the pieces of the loop, and whole runs: finished, killed, resumed, refused."""

import json
import math
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import train
from emobert import BertConfig, BertEncoder, EmoBERT, load_checkpoint, save_checkpoint
from tests.conftest import TINY
from train import IGNORED, learning_rate_factor, multitask_loss, principal_start, soft_loss

# The pieces.

def test_the_loss_is_the_weighted_sum():
    logits = {"sentiment": torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]), "emotion": torch.tensor([[0.0, 1.0, 0.0]] * 3)}
    labels = {"sentiment": torch.tensor([0, 0, IGNORED]), "emotion": torch.tensor([IGNORED, IGNORED, 2])}
    sentiment = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    emotion = math.log(2 + math.e)
    total, losses = multitask_loss(logits, labels, {"sentiment": 0.2, "emotion": 0.8})
    assert losses["sentiment"].item() == pytest.approx(sentiment, rel=1e-5) and losses["emotion"].item() == pytest.approx(emotion, rel=1e-5)
    assert total.item() == pytest.approx(0.2 * sentiment + 0.8 * emotion, rel=1e-5)
    weighted, _ = multitask_loss({"a": logits["sentiment"]}, {"a": torch.tensor([0, 1, IGNORED])}, {"a": 1.0}, {"a": torch.tensor([3.0, 1.0])})
    assert weighted.item() == pytest.approx((3 * math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 4, rel=1e-5)


def test_the_soft_loss_is_a_divergence():
    student, teacher = {"a": torch.tensor([[0.0, 0.0]])}, {"a": torch.tensor([[2 * math.log(3), 0.0]])}      # softened: 3/4 and 1/4
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert soft_loss(student, teacher, {"a": 0.5}).item() == pytest.approx(0.5 * expected, rel=1e-5)
    assert soft_loss(teacher, teacher, {"a": 1.0}).item() == pytest.approx(0, abs=1e-6)


def test_principal_components_keep_distances():
    """Embeddings that vary in few directions come through a narrower model with all their distances."""
    small, large = (BertEncoder(BertConfig(vocab_size=40, **TINY | dict(hidden_size=C))) for C in (4, 8))
    with torch.no_grad():
        large.word_embeddings.weight.copy_(torch.randn(40, 3) @ torch.randn(3, 8) + 5)
    principal_start(small, large)
    distances = [torch.cdist(e.word_embeddings.weight, e.word_embeddings.weight) for e in (small, large)]
    torch.testing.assert_close(*distances, atol=0.05, rtol=1e-3)
    assert small.word_embeddings.weight.mean(0).abs().max() < 1e-4
    with pytest.raises(ValueError, match="larger width"):
        principal_start(large, small)


def test_learning_rate():
    rates = [learning_rate_factor(step, 100, "linear") for step in range(100)]
    assert rates[0] == pytest.approx(1 / 6) and max(rates) == rates[5] == 1.0 and rates[99] == pytest.approx(1 / 94)
    assert all(a < b for a, b in zip(rates[:5], rates[1:6])) and all(a > b for a, b in zip(rates[6:], rates[7:]))
    assert {learning_rate_factor(step, 100, "constant") for step in range(100)} == {1.0}


def test_recipes_and_overrides():
    paper, given = train.arguments(["--recipe", "paper", "--lr", "0.5", "--dropout", "0.3"])
    assert given == {"recipe": "paper", "lr": 0.5, "dropout": 0.3}
    assert (paper.batch_size, paper.epochs, paper.weight_decay, paper.width, paper.pairing) == (256, 26, 1e-6, 256, "shortest")
    assert (paper.lr, paper.dropout) == (0.5, 0.3)
    plain, given = train.arguments([])
    assert given == {} and plain.pairing == "longest" and plain.width is None and (plain.alpha, plain.beta) == (0.2, 0.8)


@pytest.mark.parametrize("arguments, message", [
    (["--alpha", "0", "--beta", "0"], "both 0"), (["--epochs", "-1"], "above 0"), (["--epochs", "0"], "above 0"), (["--lr", "nan"], "above 0"),
    (["--alpha", "-1"], "at least 0"), (["--dropout", "1"], "below 1"), (["--task", "topic"], "invalid choice"), (["--patience", "-1"], "patience"),
])
def test_options_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err


# Whole runs.

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start(tokenizer, tmp_path):
    """A checkpoint with a small random encoder to begin from."""
    torch.manual_seed(3)
    path = tmp_path / "start.pt"
    save_checkpoint(path, EmoBERT(BertConfig(vocab_size=tokenizer.vocab_size, **TINY), data.LABELS), tokenizer)
    return path


def run(start, *more) -> list[str]:
    return ["--mixture", "starter", "--encoder", str(start), "--device", "cpu", "--batch-size", "4", "--max-length", "16", "--lr", "0.01", *more]


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_learns_and_reports(here, start, short_corpus, capsys):
    assert train.main(run(start, "--epochs", "30", "--patience", "0", "--run", "a", "--alpha", "0.4", "--beta", "0.6")) == 0
    log = log_of("runs/a")
    assert [line["epoch"] for line in log] == list(range(1, 31))
    assert log[-1]["loss"]["emotion"] < 0.7 * log[0]["loss"]["emotion"] and log[-1]["loss"]["sentiment"] < log[0]["loss"]["sentiment"]
    assert {"learning_rate", "rows_per_second", "seconds", "padding", "validation"} <= log[0].keys()
    model, _, meta = load_checkpoint("runs/a/best.pt")
    best = max(log, key=lambda line: sum(v["f1_macro"] for v in line["validation"].values()))
    assert meta["epoch"] == best["epoch"] and meta["validation"] == best["validation"] and meta["settings"]["beta"] == 0.6
    test = json.loads(Path("runs/a/test.json").read_text())
    assert set(test) == set(model.labels) and test["emotion"]["accuracy"] > 0.6
    out = capsys.readouterr().out
    assert "0.4 CE(sentiment) + 0.6 CE(emotion)" in out and "python infer.py --checkpoint" in out and "MCC" in out and "joy" in out


def test_one_task(here, start, short_corpus):
    assert train.main(run(start, "--epochs", "1", "--run", "a", "--task", "emotion")) == 0
    assert set(load_checkpoint("runs/a/best.pt")[0].labels) == {"emotion"}
    assert set(log_of("runs/a")[0]["loss"]) == {"emotion"}


def test_a_run_that_exists_is_not_overwritten(here, start, short_corpus):
    Path("runs/a").mkdir(parents=True)
    with pytest.raises(ValueError, match="exists: go on with --resume"):
        train.main(run(start, "--run", "a"))


def test_what_cannot_be_had_is_said(here, start, short_corpus, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("download.reachable", lambda url, timeout: asked.append(url))
    monkeypatch.setenv("EMOBERT_CACHE", str(here / "cache"))
    monkeypatch.delenv("EMOBERT_DATA", raising=False)
    monkeypatch.setattr(train, "BUNDLED", start)
    settings, _ = train.arguments(["--epochs", "1", "--batch-size", "4", "--max-length", "16", "--device", "cpu", "--run", "a"])
    train.Run(settings, here / "runs/a", resume=False)
    out = capsys.readouterr().out
    assert "the encoder of" in out and "bert-tiny is neither cached nor reachable" in out and "mixture 'starter' (the public sources" in out
    assert len(asked) == 2
    config = json.loads((here / "runs/a/config.json").read_text())      # a resumed run must not ask again and get another answer
    assert config["mixture"] == "starter" and config["encoder"] == str(start)


def test_bad_starts(here, start, short_corpus, tokenizer):
    for more, message in (["--mixture", "nope"], "unknown mixture 'nope'"), (["--device", "tpu"], "unknown device"), \
            (["--mixture", "all", "--data-dir", "none"], "none"), (["--encoder", str(here)], "config.json"), (["--encoder", "none.pt"], "none.pt"):
        with pytest.raises((ValueError, OSError), match=message):
            train.main(run(start, "--run", "a", *more))
    assert not Path("runs").exists()


DRIVER = """
import sys, torch, sources
from pathlib import Path
import train
sources.ASSETS = Path("assets")
torch.set_num_threads(1)
train.SAVE_EVERY = 0.0
step = train.Run.train_step
def slow(self, *a):
    print("step", self.step, file=sys.stderr, flush=True)
    return step(self, *a)
train.Run.train_step = slow
sys.exit(train.main())
"""


def start_run(here, *arguments):
    return subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], cwd=here, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": str(Path(train.__file__).parent)})


def kill_at(process, step: int, number: int) -> str:
    for line in process.stderr:
        if line.split() == ["step", str(step)]:
            process.send_signal(number)
            break
    return process.communicate(timeout=60)[0]


def without_times(folder):
    return [{k: v for k, v in line.items() if k not in ("seconds", "rows_per_second")} for line in log_of(folder)]


def test_killed_and_resumed_equals_uninterrupted_to_the_bit(here, start, short_corpus):
    options = run(start, "--epochs", "3", "--dropout", "0.2", "--patience", "0")
    whole = start_run(here, *options, "--run", "whole")
    killed = start_run(here, *options, "--run", "killed")
    kill_at(killed, 12, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert whole.communicate(timeout=60) and whole.returncode == 0
    resumed = start_run(here, "--resume", "runs/killed")
    out = kill_at(resumed, 20, signal.SIGINT)      # and once more, politely
    assert resumed.returncode == 130 and "resumed" in out and "go on with: python train.py --resume runs/killed" in out.replace(os.sep, "/")
    last = start_run(here, "--resume", "runs/killed")
    out, err = last.communicate(timeout=60)
    assert last.returncode == 0, err
    a, b = (torch.load(here / f"runs/{name}/last.pt", weights_only=True) for name in ("whole", "killed"))
    assert a["step"] == b["step"] == 27
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    assert without_times(here / "runs/whole") == without_times(here / "runs/killed")
    for name in ("best.pt",):
        first, second = (load_checkpoint(here / f"runs/{run}/{name}") for run in ("whole", "killed"))
        assert all(torch.equal(p, q) for p, q in zip(first[0].parameters(), second[0].parameters()))


def test_resuming_what_does_not_fit(here, start, short_corpus):
    train.main(run(start, "--epochs", "1", "--run", "a"))
    with pytest.raises(ValueError, match="started with lr = 0.01, not 7.0"):
        train.main(["--resume", "runs/a", "--lr", "7"])
    config = json.loads(Path("runs/a/config.json").read_text())
    Path("runs/a/config.json").write_text(json.dumps(config | {"lr": 0.5}))
    with pytest.raises(ValueError, match="lr was 0.01, not 0.5"):
        train.main(["--resume", "runs/a"])
    Path("runs/a/config.json").write_text(json.dumps(config))
    for content in (os.urandom(1000), b""):
        Path("runs/a/last.pt").write_bytes(content)
        with pytest.raises(ValueError, match="last.pt"):
            train.main(["--resume", "runs/a"])
    for state in ({"format": "emobert-run"}, {"format": "emobert-run", "settings": None}, {"format": "other"}, [1]):
        torch.save(state, "runs/a/last.pt")
        with pytest.raises(ValueError, match="last.pt"):
            train.main(["--resume", "runs/a"])
    for wrong in ("runs", "none", "runs/a/best.pt"):
        with pytest.raises(FileNotFoundError, match="not the folder of a run"):
            train.main(["--resume", wrong])
    for damaged in ("{", "[1]", "{}", "\xff"):
        Path("runs/a/config.json").write_text(damaged, encoding="latin-1")
        with pytest.raises(ValueError, match="config.json"):
            train.main(["--resume", "runs/a"])


def test_resuming_a_run_that_had_saved_nothing(here, start, short_corpus, capsys):
    options = run(start, "--epochs", "1")
    train.Run(train.arguments([*options, "--run", "a"])[0], here / "runs/a", resume=False)      # killed before its first save
    train.main([*options, "--run", "b"])
    capsys.readouterr()
    assert train.main(["--resume", "runs/a"]) == 0
    assert "nothing was saved yet" in capsys.readouterr().out
    a, b = (load_checkpoint(f"runs/{name}/best.pt")[0] for name in "ab")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_resuming_a_finished_run_changes_nothing(here, start, short_corpus, monkeypatch):
    """Neither one that came to its end nor one that stopped early, and not even if it was told to stop in its last step."""
    monkeypatch.setattr(train.Run, "score", lambda self, split: {"emotion": {"f1_macro": 0.5, "accuracy": 0.0, "loss": 1.0}} if split == "validation" else {})
    for name, epochs in (("whole", "1"), ("early", "5")):
        train.main(run(start, "--epochs", epochs, "--run", name, "--patience", "2"))
        before = Path(f"runs/{name}/metrics.jsonl").read_text(), Path(f"runs/{name}/best.pt").read_bytes()
        assert train.main(["--resume", f"runs/{name}"]) == 0
        assert before == (Path(f"runs/{name}/metrics.jsonl").read_text(), Path(f"runs/{name}/best.pt").read_bytes())
    assert len(log_of("runs/early")) == 3


@pytest.mark.parametrize("step", [8, 17, 26])
def test_a_stop_in_the_last_step_of_an_epoch_loses_nothing(here, start, short_corpus, monkeypatch, step):
    train.main(run(start, "--epochs", "3", "--run", "whole"))
    original = train.Run.train_step

    def told_to_stop(self, rows):
        self.stop = self.step == step
        return original(self, rows)
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train_step", told_to_stop)
        finished = train.main(run(start, "--epochs", "3", "--run", "stopped"))
    assert finished == (0 if step == 26 else 130)
    assert train.main(["--resume", "runs/stopped"]) == 0
    assert without_times("runs/whole") == without_times("runs/stopped") and len(log_of("runs/whole")) == 3


def test_a_loss_that_is_no_number_stops_the_run(here, start, short_corpus, monkeypatch):
    original, calls = train.multitask_loss, []

    def broken(*arguments):
        calls.append(1)
        loss, losses = original(*arguments)
        return loss * (math.inf if len(calls) == 12 else 1), losses
    monkeypatch.setattr(train, "multitask_loss", broken)
    with pytest.raises(ValueError, match="at step 12: .* The last good state is in"):
        train.main(run(start, "--epochs", "3", "--run", "a"))
    state = torch.load("runs/a/last.pt", weights_only=True)
    assert state["step"] == 9 and all(torch.isfinite(t).all() for t in state["model"].values())
    calls.extend([1] * 10)
    calls[:] = [1] * 11
    with pytest.raises(ValueError, match="at step 1: .* Nothing was saved yet"):
        train.main(run(start, "--epochs", "3", "--run", "b"))


def test_texts_longer_than_the_encoder_reads(here, start, short_corpus):
    for more in (["--max-length", "65"], ["--recipe", "paper", "--max-length", "16"]):
        with pytest.raises(ValueError, match="reads 64 tokens at most"):
            train.main([*run(start)[:-2], "--run", "a", *more])
    assert not Path("runs").exists()


def test_patience_and_best_weights(here, start, short_corpus, monkeypatch, capsys):
    scripted = iter([0.5, 0.9, 0.8, 0.7, 0.95])
    monkeypatch.setattr(train.Run, "score", lambda self, split: {"emotion": {"f1_macro": next(scripted), "accuracy": 0.0, "loss": 1.0}}
                        if split == "validation" else {})
    train.main(run(start, "--epochs", "5", "--run", "a", "--patience", "2"))
    assert "stopped early" in capsys.readouterr().out
    assert [line["best"] for line in log_of("runs/a")] == [True, True, False, False]
    assert load_checkpoint("runs/a/best.pt")[2]["epoch"] == 2


def test_a_teacher(here, start, short_corpus, vocab, capsys):
    train.main(run(start, "--epochs", "3", "--run", "teacher"))
    train.main(run(start, "--epochs", "1", "--run", "student", "--teacher", "runs/teacher/best.pt"))
    asked = torch.load("runs/student/teacher.pt", weights_only=True)
    assert asked["emotion"]["sentiment"].shape == (36, 3)
    from tokenizer import WordPieceTokenizer
    other = WordPieceTokenizer(vocab[:-1])
    save_checkpoint("other.pt", EmoBERT(BertConfig(vocab_size=other.vocab_size, **TINY), data.LABELS), other)
    with pytest.raises(ValueError, match="other.pt: a teacher needs the same vocabulary"):
        train.main(run(start, "--run", "b", "--teacher", "other.pt"))


def test_rare_classes_can_count_for_more(here, start, short_corpus):
    settings, _ = train.arguments(run(start, "--class-weights", "balanced", "--epochs", "1"))
    trained = train.Run(settings, here / "runs/a", resume=False)
    weights = trained.class_weights["sentiment"]
    assert weights[0] == pytest.approx(36 / (24 * 2)) and weights[2] == pytest.approx(36 / (12 * 2))      # no neutral rows at all


def test_two_processes_train_as_one(here, start, short_corpus):
    """The same global batch, shared out: the same losses, to rounding; and a batch that cannot be shared out is refused."""
    options = run(start, "--epochs", "2", "--dropout", "0", "--patience", "0")
    one = start_run(here, *options, "--run", "one")
    assert one.communicate(timeout=60) and one.returncode == 0
    (here / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--", "driver.py", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--run", "two"], cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("encoder   ") == 1      # said once, not by every process
    one, two = (log_of(here / f"runs/{name}") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"] and a["padding"] >= b["padding"] - 1e-9
        for kind in ("loss", "validation_loss"):
            assert a[kind] == pytest.approx(b[kind], rel=1e-4)
    first, second = (load_checkpoint(here / f"runs/{name}/best.pt")[0] for name in ("one", "two"))
    for p, q in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=2e-3)
    refused = subprocess.run([*command, "--run", "odd", "--batch-size", "3"], cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0 and "cannot be shared out over 2 processes" in refused.stderr


def test_several_seeds(here, start, short_corpus, capsys):
    assert train.main(run(start, "--epochs", "1", "--run", "s", "--seeds", "3", "--seed", "5", "--task", "emotion")) == 0
    accuracies = [json.loads(Path(f"runs/s-{seed}/test.json").read_text())["emotion"]["accuracy"] for seed in (5, 6, 7)]
    mean = sum(accuracies) / 3
    deviation = (sum((a - mean) ** 2 for a in accuracies) / 2) ** 0.5
    assert json.loads(Path("runs/s-seeds.json").read_text())["emotion"]["accuracy"] == pytest.approx([mean, deviation])
    assert f"accuracy {mean:.4f} ± {deviation:.4f}" in capsys.readouterr().out
    assert not torch.equal(*(next(load_checkpoint(f"runs/s-{seed}/best.pt")[0].parameters()) for seed in (5, 6)))


def test_the_published_protocol_keeps_copies_and_the_last_weights(here, start, short_corpus, capsys):
    """Copies of test texts are in training, which the report shows; and the weights are the last ones, not the best."""
    path = short_corpus / "starter.tsv"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines, *lines[1:]]) + "\n", encoding="utf-8")
    base = run(start, "--epochs", "2")
    train.main([*base, "--run", "a", "--protocol", "published"])
    test = json.loads(Path("runs/a/test.json").read_text())
    assert test["emotion"]["copied"]["rows"] >= 8 and "have a copy in training" in capsys.readouterr().out
    train.main([*base, "--run", "b"])
    assert json.loads(Path("runs/b/test.json").read_text())["emotion"]["copied"] == {
        "rows": 0, "accuracy": None, "accuracy_fresh": pytest.approx(json.loads(Path("runs/b/test.json").read_text())["emotion"]["accuracy"])}
    assert train.RECIPES["paper"]["keep"] == "last" and train.RECIPES["paper"]["protocol"] == "published"


def test_the_temperature_lowers_the_calibration_error(here, start, short_corpus):
    train.main(run(start, "--epochs", "12", "--patience", "0", "--run", "a"))
    meta = load_checkpoint("runs/a/best.pt")[2]
    assert set(meta["temperature"]) == {"sentiment", "emotion"} and all(t > 0 for t in meta["temperature"].values())
    losses = log_of("runs/a")[meta["epoch"] - 1]["validation_loss"]
    trained = train.Run(train.arguments(run(start))[0], here / "runs/b", resume=False)
    trained.model, _, _ = load_checkpoint("runs/a/best.pt")
    for task in losses:
        logits = train.predict(trained.model, trained.rows["validation"][task])[task]
        labels = trained.labels["validation"][task]
        assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(losses[task], abs=0.02)      # half precision
        calibrated = torch.nn.functional.cross_entropy(logits / meta["temperature"][task], labels).item()
        assert calibrated <= losses[task] + 1e-3


def test_tensorboard_is_asked_for_by_name(here, start, short_corpus, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        train.main(run(start, "--run", "a", "--tensorboard"))


# One step, by hand.

@pytest.fixture(autouse=True)
def signals():
    """main() takes over two signals; the next test gets them as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def made(here, start, short_corpus):
    """A Run that has not begun, without dropout, on a corpus in which some rows have an emotion alone."""
    file = short_corpus / "starter.tsv"
    file.write_text(file.read_text(encoding="utf-8") + "".join(f"you never {word}\tsurprise\t\ttrain\n" for word in "found rain late work".split()),
                    encoding="utf-8")

    def make(*more, name="made"):
        return train.Run(train.arguments(run(start, "--dropout", "0", "--run", name, *more))[0], here / "runs" / name, resume=False)
    return make


def test_a_step_learns_from_the_labels_of_its_own_rows(made):
    trained = made()
    step = {"sentiment": torch.tensor([3, 0, 9, 35]), "emotion": torch.tensor([7, 1, 2, 30])}
    corpus = data.load_corpus("starter")
    expected = {}
    for task, rows in step.items():
        part = corpus.split(task, "train")
        logits = trained.model(*trained.tokenizer.pad([trained.tokenizer.encode(part.texts[i], 16) for i in rows]))[task]
        expected[task] = torch.nn.functional.cross_entropy(logits, torch.tensor([part.labels[i] for i in rows])).item()
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    losses, tokens, places = trained.train_step(step)
    assert losses == pytest.approx(expected, rel=1e-5)
    lengths = [int(trained.rows["train"][task].lengths[i]) for task, rows in step.items() for i in rows]
    assert (tokens, places) == (sum(lengths), 8 * max(lengths))
    used = trained.tokenizer.ids["happy"]
    for name, p in trained.model.named_parameters():
        assert not torch.equal(p, before[name]), name
    assert not torch.equal(trained.model.encoder.word_embeddings.weight[used], before["encoder.word_embeddings.weight"][used])


def test_width_learning_rate_decay_and_clipping(made, monkeypatch):
    trained = made("--epochs", "2", "--weight-decay", "0.25")
    norms = []
    original = torch.nn.utils.clip_grad_norm_

    def clip(parameters, limit):
        parameters = list(parameters)
        for p in parameters:
            p.grad.mul_(1e6)
        norms.append(original(parameters, limit))
        assert math.sqrt(sum(float(p.grad.square().sum()) for p in parameters)) == pytest.approx(train.CLIP, rel=1e-3)
        return norms[-1]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    trained.settings.width, trained.step = 32, 11
    _, _, places = trained.train_step({task: torch.tensor([0, 1, 2, 3]) for task in trained.tasks})
    assert places == 8 * 32 and len(norms) == 1
    decays, plain = trained.optimizer.param_groups
    assert decays["weight_decay"] == 0.25 and plain["weight_decay"] == 0
    assert all(p.dim() == 2 for p in decays["params"]) and all(p.dim() == 1 for p in plain["params"])
    assert len(decays["params"]) + len(plain["params"]) == len(list(trained.model.parameters()))
    assert decays["lr"] == plain["lr"] == pytest.approx(0.01 * learning_rate_factor(11, 2 * trained.epoch_length, "linear"))


def test_the_log_says_how_much_was_padding(made):
    trained = made("--epochs", "1")
    real = places = 0
    for step in train.epoch_steps(trained.rows["train"], 4, "longest", 1, 0):
        lengths = torch.cat([trained.rows["train"][task].lengths[rows] for task, rows in step.items()])
        real, places = real + int(lengths.sum()), places + len(lengths) * int(lengths.max())
    trained.train()
    (line,) = log_of(trained.folder)
    assert line["padding"] == round(1 - real / places, 4) > 0 and line["step"] == trained.epoch_length == 10


def test_answers_come_in_the_order_of_the_rows(made, monkeypatch):
    monkeypatch.setattr(train, "EVALUATION_TOKENS", 40)
    trained = made("--dropout", "0.5")
    rows = trained.rows["train"]["emotion"]
    answers = train.predict(trained.model, rows)
    assert trained.model.training
    trained.model.eval()
    for i in range(len(rows)):
        for task, logits in trained.model(*rows.batch(torch.tensor([i]))).items():
            torch.testing.assert_close(answers[task][i], logits[0].detach(), atol=1e-5, rtol=0)


def test_a_students_soft_targets_belong_to_its_rows(made, start, monkeypatch):
    trained = made("--teacher", str(start))
    teacher, _, _ = load_checkpoint(start)
    seen, parts, total = {}, [], []
    monkeypatch.setattr(train, "soft_loss", lambda logits, targets, weights: seen.update(targets) or parts.append(soft_loss(logits, targets, weights))
                        or parts[-1])
    monkeypatch.setattr(train, "multitask_loss", lambda *more: parts.append(multitask_loss(*more)[0]) or multitask_loss(*more))
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: total.append(self.item()) or backward(self))
    step = {"sentiment": torch.tensor([3, 0, 9, 35]), "emotion": torch.tensor([7, 1, 2, 30])}
    texts = [data.load_corpus("starter").split(task, "train").texts[i] for task, rows in step.items() for i in rows]
    trained.train_step(step)
    expected = teacher(*trained.tokenizer.pad(trained.tokenizer.encode_batch(texts, 16)))
    for task in ("sentiment", "emotion"):
        torch.testing.assert_close(seen[task], expected[task].detach(), atol=1e-5, rtol=0)
    assert total == pytest.approx([(1 - train.SOFT) * parts[0].item() + train.SOFT * parts[1].item()])


def test_the_report_is_about_the_best_weights(here, start, short_corpus, monkeypatch):
    validation, tested = iter([0.9, 0.1]), []
    monkeypatch.setattr(train.Run, "score", lambda self, split: {"emotion": {"f1_macro": next(validation), "accuracy": 0.0, "loss": 0.0}}
                        if split == "validation" else tested.append(self.model.heads["emotion"].weight.detach().clone()) or {})
    train.main(run(start, "--epochs", "2", "--run", "a"))
    assert torch.equal(tested[0], load_checkpoint("runs/a/best.pt")[0].heads["emotion"].weight)
    assert not torch.allclose(tested[0], torch.load("runs/a/last.pt", weights_only=True)["model"]["heads.emotion.weight"], atol=1e-3)


def test_the_seed_decides_everything(here, start, short_corpus):
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        train.main(run(start, "--epochs", "1", "--dropout", "0.2", "--run", name, "--seed", seed))
    a, b, c = (load_checkpoint(f"runs/{name}/best.pt")[0].encoder.pooler.weight for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


# Where it starts.

def test_a_run_begins_with_the_encoder_it_was_given(made, start):
    given, _, _ = load_checkpoint(start)
    trained = made("--limit", "5", "--task", "sentiment", "--alpha", "0.3")
    assert all(torch.equal(p, q) for p, q in zip(trained.model.encoder.parameters(), given.encoder.parameters()))
    assert trained.task_weights == {"sentiment": 1.0} and set(trained.model.heads) == {"sentiment"}
    assert [len(rows["sentiment"]) for rows in trained.rows.values()] == [5, 5, 5]


def test_principal_components_by_hand():
    """Four words on two axes of a four-dimensional space, three times as far out on one: that axis comes first."""
    large = BertEncoder(BertConfig(vocab_size=4, **TINY | dict(hidden_size=4)))
    small = BertEncoder(BertConfig(vocab_size=4, **TINY | dict(hidden_size=2)))
    with torch.no_grad():
        large.word_embeddings.weight.copy_(torch.tensor([[5.0, 8, 5, 5], [5, 2, 5, 5], [5, 5, 5, 6], [5, 5, 5, 4]]))
        large.position_embeddings.weight.zero_()
        large.position_embeddings.weight[:2] += torch.tensor([[0.0, 64, 0, 0], [0, 0, 0, -64]])
    principal_start(small, large)
    torch.testing.assert_close(small.word_embeddings.weight.abs(), torch.tensor([[3.0, 0], [3, 0], [0, 1], [0, 1]]), atol=1e-5, rtol=0)
    apart = small.position_embeddings.weight[0] - small.position_embeddings.weight[1]      # in the same coordinates, signs and all
    signs = torch.stack([small.word_embeddings.weight[0, 0] / 3, small.word_embeddings.weight[2, 1]])
    torch.testing.assert_close(apart * signs, torch.tensor([64.0, 64.0]), atol=1e-3, rtol=0)
    other = BertEncoder(BertConfig(vocab_size=5, **TINY | dict(hidden_size=2)))
    with pytest.raises(ValueError, match="same vocabulary"):
        principal_start(other, large)


def test_what_is_on_disk_is_not_asked_for(monkeypatch):
    def refuse(url, timeout):
        raise AssertionError("asked the network")
    monkeypatch.setattr("download.reachable", refuse)
    monkeypatch.setattr(data, "missing_urls", lambda mixture, folder: [])
    assert train.choose_mixture("auto", None) == ("open", "") and train.choose_mixture("starter", None) == ("starter", "")
    monkeypatch.setattr(data, "missing_urls", lambda mixture, folder: ["https://example.org/a"])
    monkeypatch.setattr("download.reachable", lambda url, timeout: True)
    assert train.choose_mixture("auto", None) == ("open", "")


# Interruptions, wherever they come.

class Killed(BaseException):
    """Nothing of ours may catch it, as nothing can catch SIGKILL."""


OPTIONS = ["--epochs", "2", "--dropout", "0.2", "--batch-size", "16"]      # two epochs of three steps


def interrupt(monkeypatch, at, how):
    """Call `how()` at the at-th of: a step done, a file about to be written, a split about to be scored. Returns the count so far."""
    count = [0]

    def watch(target, name, after=False):
        original = getattr(target, name)

        def watched(*arguments, **options):
            result = original(*arguments, **options) if after else None
            count[0] += 1
            if count[0] == at:
                how()
            return result if after else original(*arguments, **options)
        monkeypatch.setattr(target, name, watched)
    watch(train.Run, "train_step", after=True)
    watch(train.Run, "score")
    watch(train, "write_atomically")
    watch(train, "save_checkpoint")
    watch(train, "replace_text")
    return count


def ended(folder):
    state = torch.load(Path(folder) / "last.pt", weights_only=True)
    model, _, meta = load_checkpoint(Path(folder) / "best.pt")
    tensors = [*state["model"].values(), *model.parameters(), *state["random"]]
    test = json.loads((Path(folder) / "test.json").read_text())
    return without_times(folder), *(state[name] for name in ("step", "best", "best_epoch")), meta["epoch"], tensors, test


def assert_same_end(folder, whole):
    *plain, tensors, test = ended(folder)
    *expected, wanted, wanted_test = whole
    assert plain == expected and test == wanted_test, folder
    assert all(map(torch.equal, tensors, wanted)), folder


@pytest.mark.parametrize("save_every", [-1.0, 1e9])      # seconds: after every step, or after epochs alone
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(here, start, short_corpus, monkeypatch, save_every):
    def die():
        raise Killed
    monkeypatch.setattr(train, "SAVE_EVERY", save_every)
    train.main(run(start, *OPTIONS, "--run", "whole"))
    whole = ended("runs/whole")
    with monkeypatch.context() as patch:
        moments = interrupt(patch, 0, die)
        train.main(run(start, *OPTIONS, "--run", "count"))
    assert moments[0] == (20 if save_every < 0 else 14)      # nothing went unwatched
    for moment in range(2, moments[0] + 1):      # the first is the writing of config.json: before it there is no run
        with monkeypatch.context() as patch, pytest.raises(Killed):
            interrupt(patch, moment, die)
            train.main(run(start, *OPTIONS, "--run", f"k{moment}"))
        assert train.main(["--resume", f"runs/k{moment}"]) == 0, moment
        assert_same_end(f"runs/k{moment}", whole)


# What goes wrong on the way.

def finite(folder):
    return all(torch.isfinite(t).all() for t in torch.load(Path(folder) / "last.pt", weights_only=True)["model"].values())


def test_a_gradient_that_is_no_number_never_reaches_the_weights(here, start, short_corpus, monkeypatch):
    """The loss can be fine and its gradient not; the loss would tell only after the weights were spoilt, and maybe saved."""
    monkeypatch.setattr(train, "SAVE_EVERY", -1.0)
    calls = []

    def treacherous(logits, *arguments):
        calls.append(1)
        total, losses = multitask_loss(logits, *arguments)
        return total + ((logits["emotion"] * 0).sum().sqrt() if len(calls) == 5 else 0), losses
    monkeypatch.setattr(train, "multitask_loss", treacherous)
    with pytest.raises(ValueError, match=r"step [56]\b"):
        train.main(run(start, "--epochs", "3", "--run", "a"))
    assert finite("runs/a")


def test_a_full_disk_keeps_the_last_state(here, start, short_corpus, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 1e9)
    original = torch.save

    def save(content, file):
        if content.get("step") == 18:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        original(content, file)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(torch, "save", save)
        train.main(run(start, "--epochs", "3", "--run", "a"))
    assert torch.load("runs/a/last.pt", weights_only=True)["step"] == 9 and not list(Path("runs/a").glob("*.part")) + list(Path("runs/a").glob(".*"))
    assert train.main(["--resume", "runs/a"]) == 0 and [line["epoch"] for line in log_of("runs/a")] == [1, 2, 3]


def as_program(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """train.py as a program, in this process: exit status and stderr."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    with pytest.raises(BaseException) as exit:      # a KeyboardInterrupt that came through would end pytest
        runpy.run_path(train.__file__, run_name="__main__")
    assert exit.type is SystemExit
    return exit.value.code, capsys.readouterr().err


def test_errors_are_one_line(here, start, short_corpus, monkeypatch, capsys):
    for options in (["--encoder", "none.pt"], ["--mixture", "nope"], ["--device", "tpu"], ["--resume", "none"], ["--teacher", "none.pt"]):
        code, err = as_program(monkeypatch, capsys, *(options if "--resume" in options else run(start, *options)))
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_ctrl_c_before_the_first_step(here, start, short_corpus, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "load_corpus", interrupted)
    code, err = as_program(monkeypatch, capsys, *run(start))
    assert code == 130 and "Traceback" not in err and not Path("runs").exists()
