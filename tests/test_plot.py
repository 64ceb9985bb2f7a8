"""What the figures show is read back from their axes; a whole run becomes PNG files."""

import json
import sys

import pytest
import torch

import data
import evaluate
import plot
import train
from emobert import BertConfig, EmoBERT, save_checkpoint
from tests.conftest import TINY

EPOCHS = [{"epoch": n, "loss": {"emotion": 2.0 / n, "sentiment": 1.0 / n}, "validation_loss": {"emotion": 2.5 / n},
           "validation": {"emotion": {"accuracy": n / 10, "f1_macro": n / 20}}, "best": n < 3} for n in (1, 2, 3)]
SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def plt():
    pytest.importorskip("matplotlib", reason="plot.py needs matplotlib: pip install -r requirements-dev.txt")
    plt = plot.pyplot()
    yield plt
    plt.close("all")


@pytest.fixture
def run_folder(tmp_path, monkeypatch, tokenizer, short_corpus):
    """Two epochs of training on the short corpus, in runs/a."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    save_checkpoint("start.pt", EmoBERT(BertConfig(vocab_size=tokenizer.vocab_size, **TINY), data.LABELS), tokenizer)
    assert train.main(["--mixture", "starter", "--encoder", "start.pt", "--device", "cpu", "--batch-size", "4", "--max-length", "16",
                       "--epochs", "2", "--run", "a"]) == 0
    return tmp_path / "runs" / "a"


def test_loss_curves(plt):
    values = {"training": lambda record, task: record["loss"][task], "validation": lambda record, task: record["validation_loss"].get(task)}
    emotion, sentiment = plot.curves(plt, EPOCHS, values, "loss", "nats").axes
    assert emotion.get_title() == "emotion" and emotion.get_xlabel() == "epoch" and emotion.get_ylabel() == "nats"
    lines = {line.get_label(): line.get_xydata().tolist() for line in emotion.lines}
    assert lines["training"] == [[1, 2.0], [2, 1.0], [3, 2 / 3]] and lines["validation"] == [[1, 2.5], [2, 1.25], [3, 2.5 / 3]]
    assert "best weights, epoch 2" in lines and lines["best weights, epoch 2"][0][0] == 2
    assert "validation" not in [line.get_label() for line in sentiment.lines]      # there is none: no line, no legend


def test_label_bars(plt):
    counts = {"sentiment": {split: dict(zip(data.LABELS["sentiment"], numbers)) for split, numbers in (
        ("train", (60, 20, 10)), ("validation", (5, 5, 0)), ("test", (0, 0, 0)))}}
    figure = plot.label_counts(plt, counts, "labels")
    ax = figure.axes[0]
    assert [[bar.get_width() for bar in group] for group in ax.containers] == [[60, 20, 10], [5, 5, 0], [0, 0, 0]]
    assert [bar.get_x() for bar in ax.containers[1]] == [60, 20, 10]
    assert [text.get_text() for text in ax.texts] == ["65 (65%)", "25 (25%)", "10 (10%)"]


def results() -> dict:
    """Sentiment answers of which all negatives, no neutrals and half of the positives are right."""
    labels = torch.tensor([0, 0, 1, 2, 2])
    predictions = torch.tensor([0, 0, 2, 2, 0])
    return {"sentiment": evaluate.score_task(torch.nn.functional.one_hot(predictions, 3) * 2.0, labels, data.LABELS["sentiment"])}


def test_confusion_matrix(plt):
    ax = plot.confusion(plt, results(), "confusion").axes[0]
    assert [text.get_text() for text in ax.texts] == ["100", "0", "0", "0", "0", "100", "50", "0", "50"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == data.LABELS["sentiment"] and ax.get_ylabel() == "true"


def test_reliability(plt):
    found = results()
    upper, lower = plot.reliability(plt, found, "reliability").axes
    confidence = torch.tensor([2.0, 0, 0]).softmax(0)[0].item()
    dots = next(line for line in upper.lines if line.get_label() == "model").get_xydata().tolist()
    assert dots == [pytest.approx([confidence, 0.6])] and upper.get_title() == f"sentiment, ECE {found['sentiment']['ece']:.3f}"
    assert sum(bar.get_height() for bar in lower.patches) == pytest.approx(1) and max(bar.get_height() for bar in lower.patches) == 1


def test_precision_recall(plt):
    ax = plot.precision_recall(plt, results(), "curves").axes[0]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(legend) == 3 and legend[0].startswith("negative ")      # best first
    assert ax.lines[0].get_xdata()[-1] == 1.0


def test_a_run_becomes_figures(plt, run_folder, capsys):
    assert plot.main([str(run_folder)]) == 0
    assert {path.name for path in run_folder.glob("*.png")} == {"loss.png", "scores.png", "labels.png"}
    assert "--out" in capsys.readouterr().out      # how to get the others
    arguments = [str(run_folder / "best.pt"), "--mixture", "starter", "--device", "cpu", "--out", str(run_folder / "evaluation.json")]
    assert evaluate.main(arguments) == 0
    assert plot.main([str(run_folder), "--out", str(run_folder / "figures")]) == 0
    pictures = list((run_folder / "figures").iterdir())
    assert {path.name for path in pictures} == {f"{name}.png" for name in (
        "loss", "scores", "labels", "precision_recall", "confusion", "reliability")}
    assert all(path.read_bytes().startswith(SIGNATURE) and path.stat().st_size > 5000 for path in pictures)
    (run_folder / "evaluation.json").write_text('{"corrected": []}', encoding="utf-8")      # of another kind of comparison
    with pytest.raises(ValueError, match="evaluation.json: not what"):
        plot.main([str(run_folder)])


def test_no_run(plt, tmp_path):
    with pytest.raises(ValueError, match="not the folder of a run"):
        plot.main([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="metrics.jsonl: not JSON"):
        plot.main([str(tmp_path)])


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="plot.py needs matplotlib: pip install -r requirements-dev.txt"):
        plot.main([str(tmp_path)])


def test_the_curves_come_from_a_real_log(run_folder):
    """The keys that plot.py reads are those that train.py writes."""
    for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert set(record["loss"]) == set(record["validation_loss"]) == set(record["validation"]) == set(data.LABELS)
        assert {"epoch", "best"} <= record.keys() and {"accuracy", "f1_macro"} <= record["validation"]["emotion"].keys()
