"""Scores of a tiny model against the same worked out from its logits; baselines on data whose answer is known."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import evaluate
import metrics
import train
from batches import TokenRows
from emobert import BertConfig, EmoBERT, load_checkpoint, save_checkpoint
from evaluate import Part, fit_linear, published, random_heads, score_task, table
from tests.conftest import TINY

EMOTION, SENTIMENT = data.LABELS["emotion"], data.LABELS["sentiment"]


@pytest.fixture
def tiny(tiny):
    """The shared model, with norms that leave the answers to the text: it gives most of the labels to some row."""
    torch.manual_seed(5)
    for name, parameter in tiny.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.constant_(parameter, float("norm.weight" in name))
        else:
            torch.nn.init.normal_(parameter, std=0.5)
    return tiny


@pytest.fixture
def answer(short_corpus, capsys):
    """answer(argument, …) -> the JSON object that evaluate.py prints, for the 60-row starter corpus."""
    def call(*arguments) -> dict:
        if not {"--mixture", "--source"} & set(arguments):
            arguments += "--mixture", "starter"
        assert evaluate.main([*map(str, arguments), "--device", "cpu", "--json"]) == 0
        return json.loads(capsys.readouterr().out)
    return call


def logits_and_labels(path, task, split="test", limit=None):
    """What the tiny checkpoint says of a split of the starter corpus, by way of train.predict."""
    model, tokenizer, _ = load_checkpoint(path)
    part = data.load_corpus("starter").split(task, split)
    return train.predict(model, TokenRows(part.texts[:limit], tokenizer, 64)), torch.tensor(part.labels[:limit])


def line_of(report: dict, protocol: str, task: str, *words: str) -> dict:
    """The line of a comparison whose name has all these words."""
    found = [line for line in report[protocol] if line["task"] == task and all(word in line["model"] for word in words)]
    assert len(found) == 1, found
    return found[0]


# Tables.

def test_tables():
    rows = [["", "x", "rows"], ["a", 0.5, 1234], ["long name", None, "-"]]
    assert table("title", rows) == "title\n                x   rows\na          0.5000  1,234\nlong name              -\n"
    assert table("title", rows, markdown=True) == "**title**\n\n|  | x | rows |\n| --- | ---: | ---: |\n| a | 0.5000 | 1,234 |\n| long name |  | - |\n"


# A checkpoint on a split.

def test_scores_of_a_checkpoint(answer, checkpoint):
    report = answer(checkpoint)
    assert report["checkpoint"] == str(checkpoint) and report["data"] == "mixture 'starter'" and report["split"] == "test"
    for task, names in data.LABELS.items():
        found, (logits, labels) = report["corrected"][task], logits_and_labels(checkpoint, task)
        logits, n = logits[task], len(names)
        matrix = metrics.confusion_matrix(labels, logits.argmax(-1), n)
        expected = metrics.scores(matrix)
        cells = expected.pop("per_class")
        assert {key: found[key] for key in expected} == expected
        assert found["rows"] == 12 and found["confusion_matrix"] == matrix.tolist()
        assert found["ece"] == found["ece_without_temperature"] == pytest.approx(metrics.expected_calibration_error(logits.double().softmax(-1), labels))
        assert found["interval"]["f1_macro"] == list(metrics.bootstrap_interval(labels, logits.argmax(-1), n, seed=1))
        assert [(cell["label"], cell["f1"], cell["support"]) for cell in found["per_class"]] == [
            (name, cell["f1"], cell["support"]) for name, cell in zip(names, cells)]
        for i, cell in enumerate(found["per_class"]):
            if cell["support"]:
                assert cell["average_precision"] == pytest.approx(metrics.average_precision(labels == i, logits.double().softmax(-1)[:, i]))
            else:
                assert cell["average_precision"] is None and cell["curve"] is None
    average = report["corrected"]["average"]
    assert average["mcc"] == pytest.approx((report["corrected"]["emotion"]["mcc"] + report["corrected"]["sentiment"]["mcc"]) / 2)


def test_split_and_limit_choose_the_rows(answer, checkpoint):
    report = answer(checkpoint, "--split", "validation", "--limit", 5)
    logits, labels = logits_and_labels(checkpoint, "emotion", "validation", 5)
    assert report["split"] == "validation" and report["corrected"]["emotion"]["rows"] == 5
    assert report["corrected"]["emotion"]["confusion_matrix"] == metrics.confusion_matrix(labels, logits["emotion"].argmax(-1), 8).tolist()


def test_settings_of_the_checkpoint_are_used(answer, tiny, tokenizer, tmp_path):
    """The temperature for calibration, the length that training cut texts to, and the way it cut the splits."""
    path = tmp_path / "warm.pt"
    save_checkpoint(path, tiny, tokenizer, temperature={"emotion": 3.0}, settings={"max_length": 4, "protocol": "published"})
    report = answer(path)
    part = data.load_corpus("starter", as_published=True).split("emotion", "test")
    logits, labels = train.predict(tiny, TokenRows(part.texts, tokenizer, 4))["emotion"].double(), torch.tensor(part.labels)
    found = report["corrected"]["emotion"]
    assert "published" in report["data"] and found["rows"] == len(labels) and found["temperature"] == 3.0
    assert found["confusion_matrix"] == metrics.confusion_matrix(labels, logits.argmax(-1), 8).tolist()
    assert found["ece"] == pytest.approx(metrics.expected_calibration_error((logits / 3).softmax(-1), labels))
    assert found["ece_without_temperature"] == pytest.approx(metrics.expected_calibration_error(logits.softmax(-1), labels))
    assert found["ece"] != found["ece_without_temperature"] and report["corrected"]["sentiment"]["temperature"] == 1.0
    assert "published" not in answer(path, "--protocol", "corrected")["data"]


def test_a_class_that_only_the_predictions_hold():
    """Two rows of class 0, one of which is taken for class 2: F1 is 2/3 and 0, its mean over the true classes 2/3."""
    found = score_task(torch.tensor([[3.0, 0, 0], [0, 0, 3.0]]), torch.tensor([0, 0]), ["a", "b", "c"])
    assert found["f1_macro"] == pytest.approx(1 / 3) and found["f1_macro_true_classes"] == pytest.approx(2 / 3)
    assert [cell["average_precision"] for cell in found["per_class"]] == [1.0, None, None] and found["average_precision_macro"] == 1.0


def test_a_curve_keeps_the_precision_at_each_recall():
    """Scores in the order + - + -: precision 1 up to recall 1/2, then 2/3."""
    logits = torch.tensor([[4.0, 0], [3.0, 0], [2.0, 0], [1.0, 0]])
    curve = score_task(logits, torch.tensor([0, 1, 0, 1]), ["a", "b"])["per_class"][0]["curve"]
    assert len(curve["recall"]) == len(curve["precision"]) == 100
    assert curve["precision"][:50] == [1.0] * 50 and curve["precision"][50:] == pytest.approx([2 / 3] * 50)
    assert curve["recall"][0] == 0.5 and curve["recall"][-1] == 1.0


def test_as_published(answer, checkpoint, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 5)
    logits, labels = logits_and_labels(checkpoint, "emotion")
    predictions = logits["emotion"].argmax(-1)
    expected = metrics.as_published_scores(labels, predictions, 8, 5)
    assert answer(checkpoint)["as_published"]["emotion"] == expected == published(labels, predictions)
    # Beside a task of one batch only the first five rows are seen; beside one of as many batches, all twelve.
    assert published(labels, predictions, [12, 4]) == metrics.as_published_scores(labels[:5], predictions[:5], 8, 5)
    assert published(labels, predictions, [12, 11]) == expected != published(labels, predictions, [12, 4])


def test_printed_tables_name_their_protocol(checkpoint, short_corpus, capsys, tmp_path):
    arguments = [str(checkpoint), "--mixture", "starter", "--device", "cpu", "--out", str(tmp_path / "found.json")]
    assert evaluate.main(arguments) == 0
    plain = capsys.readouterr().out
    assert evaluate.main([*arguments, "--as-published", "--markdown"]) == 0
    markdown = capsys.readouterr().out
    assert plain.count("corrected: ") == 5 and "as published" not in plain and "95 % interval" in plain and "|" not in plain
    assert markdown.count("corrected: ") == 5 and markdown.count("as published: ") == 1 and "| --- | ---: |" in markdown
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert f"{found['corrected']['emotion']['mcc']:.4f}" in plain and not list(tmp_path.glob("*.part"))


def test_one_publisher_s_own_split(answer, checkpoint, tmp_path):
    """Rows as published, copies and all; a task without labels there is left out; a label outside the source's six is wrong."""
    folder = tmp_path / "data" / "dair_emotion"
    folder.mkdir(parents=True)
    rows = [("the night was so wonderful", 1), ("the night was so wonderful", 1), ("we miss the dog", 0), ("hate it", 3)]
    lines = "\n".join(json.dumps({"text": text, "label": label}) for text, label in rows)
    (folder / "validation.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    report = answer(checkpoint, "--source", "dair_emotion", "--split", "validation", "--data-dir", tmp_path / "data")
    model, tokenizer, _ = load_checkpoint(checkpoint)
    labels = torch.tensor([EMOTION.index(name) for name in ("joy", "joy", "sad", "anger")])
    logits = train.predict(model, TokenRows([text for text, _ in rows], tokenizer, 64))["emotion"]
    assert set(report["corrected"]) == {"emotion", "average"} and report["data"] == "source 'dair_emotion'"
    assert report["corrected"]["emotion"]["confusion_matrix"] == metrics.confusion_matrix(labels, logits.argmax(-1), 8).tolist()
    with pytest.raises(ValueError, match="source 'dair_emotion' has no test rows for emotion"):
        evaluate.main([str(checkpoint), "--source", "dair_emotion", "--data-dir", str(tmp_path / "data")])


# Linear fits.

def parts(*sizes, n=3) -> dict[str, Part]:
    return {split: Part([""] * size, torch.arange(size) % n) for split, size in zip(("train", "validation", "test"), sizes)}


def test_a_probe_separates_what_is_separable():
    part = parts(90, 30, 31)
    generator = torch.Generator().manual_seed(0)
    centres = 100 + 8 * torch.eye(3, 5)      # far from the origin, and one feature of two is always the same
    features = {split: (centres[rows.labels] + torch.randn(len(rows.labels), 5, generator=generator)).repeat(1, 2) for split, rows in part.items()}
    for values in features.values():
        values[:, 5:] = 7.0
    answers = fit_linear(features, part, 3, 10)
    assert all(torch.equal(answers[split], rows.labels) for split, rows in part.items())


def test_a_probe_keeps_the_penalty_that_validation_likes(monkeypatch):
    """Three features that matter a little among forty that do not: a weak penalty learns the training rows by heart."""
    part, generator = parts(60, 300, 300), torch.Generator().manual_seed(0)
    features = {split: torch.randn(len(rows.labels), 43, generator=generator) for split, rows in part.items()}
    for split, rows in part.items():
        features[split][:, :3] += 1.2 * torch.eye(3)[rows.labels]

    def right(penalties: list[float]) -> dict[str, float]:
        monkeypatch.setattr(evaluate, "PENALTIES", penalties)
        answers = fit_linear(features, part, 3, 43)
        return {split: (answers[split] == rows.labels).double().mean().item() for split, rows in part.items()}
    strong, weak, both = right([1.0]), right([1e-6]), right([1.0, 1e-6])
    assert weak["train"] == 1.0 > strong["train"] and weak["validation"] < strong["validation"] - 0.02 and both == strong
    assert right([100.0, 1.0]) == strong and right([100.0]) != strong      # and it does not stop at the first


def test_bag_of_words(tokenizer):
    texts = {0: ["the happy day", "happy"], 1: ["so sad the rain", "sad sad"], 2: ["we hate it", "hate hate dog"]}
    part = {split: Part([texts[i % 3][i // 3 % 2] for i in range(size)], torch.arange(size) % 3)
            for split, size in (("train", 30), ("validation", 6), ("test", 6))}
    part["test"] = Part(["it was a sad coffee", "we miss happy", "friend hate"], torch.tensor([1, 0, 2]))      # words never seen beside known ones
    rows = {split: TokenRows(rows.texts, tokenizer, 32) for split, rows in part.items()}
    assert torch.equal(fit_linear(rows, part, 3, tokenizer.vocab_size)["test"], part["test"].labels)


# Baselines.

@pytest.fixture
def bundled(checkpoint, monkeypatch):
    """The tiny checkpoint in place of the bundled one, whose vocabulary 'random' takes."""
    monkeypatch.setattr(train, "BUNDLED", checkpoint)


def test_majority_class_by_hand(answer, checkpoint, short_corpus):
    path = short_corpus / "starter.tsv"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines, *(f"train number {i}\tworry\tnegative\ttrain" for i in range(15))]) + "\n", encoding="utf-8")
    report = answer("--baselines", "--encoder", checkpoint, "--seeds", 2)
    worry = line_of(report, "corrected", "emotion", "majority class")      # 12 each of three emotions, 15 of worry, which no test row has
    assert worry["accuracy"] == 0.0 and worry["f1_macro"] == 0.0
    negative = line_of(report, "corrected", "sentiment", "majority class")
    assert negative["accuracy"] == pytest.approx(8 / 12) and negative["f1_macro"] == pytest.approx(0.8 / 2) and negative["mcc"] == 0.0


def test_fits_on_the_corpus(answer, checkpoint):
    """The probe sees the pooled vectors of the rows in their order; the bag of words knows more than the commonest class."""
    report = answer("--baselines", "--encoder", checkpoint, "--seeds", 2)
    model, tokenizer, _ = load_checkpoint(checkpoint)
    features, part = {}, {}
    for split in data.SPLITS:
        rows = data.load_corpus("starter").split("emotion", split)
        part[split] = Part(rows.texts, torch.tensor(rows.labels))
        with torch.no_grad():
            features[split] = model.encoder.pooled(*tokenizer.pad(tokenizer.encode_batch(rows.texts)))
    predictions = fit_linear(features, part, 8, 32)["test"]
    expected = metrics.scores(metrics.confusion_matrix(part["test"].labels, predictions, 8))
    assert line_of(report, "corrected", "emotion", "linear probe")["mcc"] == pytest.approx(expected["mcc"], abs=1e-6)
    assert line_of(report, "corrected", "emotion", "bag of words")["accuracy"] >= 0.5
    assert line_of(report, "corrected", "emotion", "majority class")["accuracy"] == pytest.approx(1 / 3)


def test_untrained_heads_by_hand(answer, checkpoint):
    report = answer("--baselines", "--encoder", checkpoint, "--seeds", 4, "--seed", 7)
    model, tokenizer, _ = load_checkpoint(checkpoint)
    test = data.load_corpus("starter").split("emotion", "test")
    with torch.inference_mode():
        features = model.encoder.pooled(*tokenizer.pad(tokenizer.encode_batch(test.texts)))
    found = []
    for seed in range(7, 11):
        head = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
        found.append(metrics.scores(metrics.confusion_matrix(test.labels, (features @ head.T).argmax(-1), 8)))
    values = torch.tensor([one["f1_macro"] for one in found], dtype=torch.float64)
    line = line_of(report, "corrected", "emotion", "untrained head, 4 seeds")
    assert line["f1_macro"] == pytest.approx(values.mean().item()) and line["deviation"]["f1_macro"] == pytest.approx(values.std().item())
    one = line_of(report, "as_published", "emotion", "untrained head, seed 7")
    assert one["accuracy"] == one["f1"] == pytest.approx(found[0]["accuracy"]) and values.std() > 0


def test_heads_are_one_product():
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    draws = random_heads(features, 3, seeds=6, seed=10)
    assert draws.shape == (6, 5) and torch.equal(draws[2:4], random_heads(features, 3, seeds=2, seed=12))


def test_baselines_repeat(answer, checkpoint, bundled):
    arguments = "--baselines", "--encoder", checkpoint, "random", "--seeds", 3
    first, again, other = answer(*arguments), answer(*arguments), answer(*arguments, "--seed", 2)
    assert first == again and first["encoders"]["random"].startswith("random weights")
    for word in ("untrained", "probe"):
        assert line_of(first, "corrected", "emotion", "random", word) != line_of(other, "corrected", "emotion", "random", word)


def test_baselines_print_both_protocols(checkpoint, short_corpus, capsys):
    assert evaluate.main(["--baselines", "--mixture", "starter", "--encoder", str(checkpoint), "--device", "cpu", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("corrected: ") == out.count("as published: ") == 1 and out.count(" ± ") == 6      # three scores of two tasks


# Across tasks.

@pytest.fixture
def singles(tokenizer, tmp_path) -> list[Path]:
    """A checkpoint with an emotion head and another with a sentiment head, both random."""
    paths = []
    for seed, task in enumerate(("emotion", "sentiment")):
        torch.manual_seed(seed)
        model = EmoBERT(BertConfig(vocab_size=tokenizer.vocab_size, **TINY), {task: data.LABELS[task]})
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        paths.append(tmp_path / f"{task}.pt")
        save_checkpoint(paths[-1], model, tokenizer)
    return paths


def test_cross_task(answer, singles, checkpoint):
    report = answer("--cross-task", *singles, "--encoder", checkpoint)
    for path, task, other in zip(singles, ("emotion", "sentiment"), ("sentiment", "emotion")):
        for labelled in (task, other):      # the head's ids, compared with the ids of its own labels and of the other task's
            logits, labels = logits_and_labels(path, labelled)
            expected = metrics.as_published_scores(labels, logits[task].argmax(-1), 8, 256)
            line = line_of(report, "as_published", labelled, f"{task} model")
            assert {key: line[key] for key in expected} == pytest.approx(expected)
        logits, labels = logits_and_labels(path, task)
        own = metrics.scores(metrics.confusion_matrix(labels, logits[task].argmax(-1), len(data.LABELS[task])))
        assert line_of(report, "corrected", task, f"{task} model", "own head")["mcc"] == pytest.approx(own["mcc"])
        probes = [line["model"] for line in report["corrected"] if line["task"] == other and "probe" in line["model"]]
        assert probes == [f"{task} model, linear probe", f"{checkpoint}, linear probe"]
    # The same probe as in the baselines, of the encoder alone: the head plays no part.
    emotion = answer("--baselines", "--encoder", singles[0], "--seeds", 2)
    probe = line_of(emotion, "corrected", "sentiment", "linear probe")
    assert line_of(report, "corrected", "sentiment", "emotion model, linear probe")["accuracy"] == probe["accuracy"]


def test_cross_task_needs_the_right_heads(singles, short_corpus, checkpoint):
    with pytest.raises(ValueError, match="sentiment.pt: has no head for emotion, only for sentiment"):
        evaluate.main(["--cross-task", *map(str, reversed(singles)), "--mixture", "starter", "--encoder", str(checkpoint)])


# Bad input.

@pytest.mark.parametrize("arguments, message", [
    (["{missing}"], "missing.pt"), (["{garbage}"], "garbage.pt"), (["{others}"], "others.pt: its labels for emotion are"),
    (["{checkpoint}", "--device", "tpu"], "unknown device 'tpu'"), (["{checkpoint}", "--mixture", "nope"], "unknown mixture 'nope'"),
    (["{checkpoint}", "--source", "nope"], "unknown source 'nope'"), (["--baselines", "--encoder", "{missing}"], "missing.pt"),
])
def test_bad_input(arguments, message, tmp_path, checkpoint, tokenizer, short_corpus):
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    others = EmoBERT(BertConfig(vocab_size=tokenizer.vocab_size, **TINY), {"emotion": EMOTION[::-1]})
    save_checkpoint(tmp_path / "others.pt", others, tokenizer)
    paths = {name: str(tmp_path / f"{name}.pt") for name in ("missing", "garbage", "others")} | {"checkpoint": str(checkpoint)}
    arguments = [argument.format(**paths) for argument in arguments]
    with pytest.raises((ValueError, OSError)) as error:
        evaluate.main(arguments if "--mixture" in arguments else [*arguments, "--mixture", "starter"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_empty_split(checkpoint, short_corpus):
    path = short_corpus / "starter.tsv"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.endswith("\ttest")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="mixture 'starter' has no test rows for emotion|for sentiment"):
        evaluate.main([str(checkpoint), "--mixture", "starter"])


@pytest.mark.parametrize("arguments", [[], ["a.pt", "--baselines"], ["--baselines", "--seeds", "0"], ["a.pt", "--limit", "0"]])
def test_options_that_make_no_sense(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(arguments)
    assert exit.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_the_command_ends_with_one_line(tmp_path):
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    command = [sys.executable, str(Path(evaluate.__file__)), str(tmp_path / "garbage.pt")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
