"""Scores worked by hand, and compared on random labels with the definitions written out in plain Python."""

import math
import random

import pytest
import torch

import metrics


def counts_of(labels, predictions, c):
    """(true positives, predicted as c, labelled c), counted one row at a time."""
    both = sum(1 for y, p in zip(labels, predictions) if y == p == c)
    return both, predictions.count(c), labels.count(c)


def plain_scores(labels, predictions):
    """Textbook definitions over the classes that occur; a ratio over nothing is 0."""
    classes, rows = sorted({*labels, *predictions}), len(labels)
    table = {}
    for c in classes:
        both, guessed, support = counts_of(labels, predictions, c)
        precision, recall = both / guessed if guessed else 0.0, both / support if support else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        table[c] = {"precision": precision, "recall": recall, "f1": f1, "support": support}
    result = {"accuracy": sum(y == p for y, p in zip(labels, predictions)) / rows}
    for name in ("precision", "recall", "f1"):
        result[f"{name}_macro"] = sum(row[name] for row in table.values()) / len(classes)
        result[f"{name}_micro"] = result["accuracy"]
        result[f"{name}_weighted"] = sum(row[name] * row["support"] for row in table.values()) / rows
    # Matthews' correlation as what it is: the correlation of the two one-hot matrices, column means taken off.
    def covariance(a, b):
        return sum(sum((x == c) * (y == c) for x, y in zip(a, b)) / rows - a.count(c) * b.count(c) / rows**2
                   for c in classes)
    norm = covariance(labels, labels) * covariance(predictions, predictions)
    result["mcc"] = covariance(labels, predictions) / math.sqrt(norm) if norm > 1e-12 else 0.0
    return result, table


def test_confusion_matrix_has_true_rows_and_predicted_columns():
    matrix = metrics.confusion_matrix([0, 0, 1, 2, 2, 2], [0, 1, 1, 0, 2, 2], 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    assert matrix.dtype == torch.int64


def test_tensors_and_lists_give_the_same_matrix():
    labels, predictions = [1, 0, 1], [1, 1, 0]
    expected = metrics.confusion_matrix(labels, predictions, 2)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        tensors = torch.tensor(labels, dtype=dtype), torch.tensor(predictions, dtype=dtype)
        assert metrics.confusion_matrix(*tensors, 2).equal(expected)


@pytest.mark.parametrize("labels, predictions", [
    ([0, 3], [0, 0]), ([0, 0], [0, 3]), ([-1, 0], [0, 0]), ([0, 1], [0]), ([0, 1, 1, 0], [0, 1]), ([], []), ([0], []),
    ([0.0, 1.0], [0, 1]), ([[0], [1]], [[0], [1]]),
])
def test_bad_ids_are_value_errors(labels, predictions):
    with pytest.raises(ValueError):
        metrics.confusion_matrix(labels, predictions, 3)
    with pytest.raises(ValueError):
        metrics.as_published_scores(labels, predictions, 3, batch_size=2)
    with pytest.raises(ValueError):
        metrics.bootstrap_interval(labels, predictions, 3, samples=10)


@pytest.mark.parametrize("matrix", [
    torch.zeros(3, 3), torch.ones(2, 3), torch.tensor([[2, -1], [0, 1]]), torch.ones(3),
])
def test_what_is_no_confusion_matrix_is_a_value_error(matrix):
    with pytest.raises(ValueError):
        metrics.scores(matrix)


def test_scores_by_hand():
    # Class 0: 2 of 3 found, 2 of 4 guesses right. Class 1: 1 of 2 found, 1 of 1 right. Class 2: never found, and 0 of 1
    # right. Class 3 does not occur at all, so the macro averages leave it out.
    result = metrics.scores(torch.tensor([[2, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]))
    assert result["accuracy"] == result["f1_micro"] == result["recall_micro"] == pytest.approx(3 / 6)
    assert result["precision_macro"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert result["recall_macro"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert result["f1_macro"] == pytest.approx((4 / 7 + 2 / 3 + 0) / 3)
    assert result["precision_weighted"] == pytest.approx((3 * 1 / 2 + 2 * 1 + 1 * 0) / 6)
    assert result["f1_weighted"] == pytest.approx((3 * 4 / 7 + 2 * 2 / 3) / 6)
    assert [row["support"] for row in result["per_class"]] == [3, 2, 1, 0]
    assert result["per_class"][0] == pytest.approx({"precision": 1 / 2, "recall": 2 / 3, "f1": 4 / 7, "support": 3})
    assert result["per_class"][3] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    # Gorodkin: (6 * 3 - (3*4 + 2*1 + 1*1)) / sqrt((36 - (16 + 1 + 1)) * (36 - (9 + 4 + 1)))
    assert result["mcc"] == pytest.approx((18 - 15) / math.sqrt(18 * 22))


def test_binary_mcc_is_the_familiar_formula():
    tp, fp, fn, tn = 5, 2, 1, 7
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.scores(torch.tensor([[tn, fp], [fn, tp]]))["mcc"] == pytest.approx(expected)


@pytest.mark.parametrize("labels, predictions, accuracy, macro, mcc", [
    ([0, 1, 2], [0, 1, 2], 1.0, 1.0, 1.0),
    ([0, 1], [1, 0], 0.0, 0.0, -1.0),  # all wrong
    ([1, 1, 1], [1, 1, 1], 1.0, 1.0, 0.0),  # a single class: no correlation to speak of
    ([0, 1, 1, 1], [1, 1, 1, 1], 0.75, 3 / 7, 0.0),  # one class for everything: F1 is (0 + 6/7) / 2
    ([0, 0], [2, 2], 0.0, 0.0, 0.0),  # a class that is guessed but never true counts in the macro average
])
def test_edges(labels, predictions, accuracy, macro, mcc):
    result = metrics.scores(metrics.confusion_matrix(labels, predictions, 3))
    assert (result["accuracy"], result["f1_macro"], result["mcc"]) == pytest.approx((accuracy, macro, mcc))


@pytest.mark.parametrize("seed", range(12))
def test_random_labels_agree_with_the_plain_definitions(seed):
    chance = random.Random(seed)
    n, rows = chance.randint(2, 9), chance.choice([1, 3, 20, 200])
    labels = [chance.randrange(n) for _ in range(rows)]
    predictions = [y if chance.random() < 0.5 else chance.randrange(n) for y in labels]
    expected, table = plain_scores(labels, predictions)
    result = metrics.scores(metrics.confusion_matrix(labels, predictions, n))
    per_class = result.pop("per_class")
    assert result == pytest.approx(expected, abs=1e-12)
    assert len(per_class) == n
    for c, row in enumerate(per_class):
        assert row == pytest.approx(table.get(c, {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}))
        assert isinstance(row["support"], int)


def test_counts_of_a_large_split_do_not_overflow():
    result = metrics.scores(torch.tensor([[40_000_000, 10_000_000], [10_000_000, 40_000_000]]))
    assert result["mcc"] == pytest.approx(0.6) and result["f1_macro"] == pytest.approx(0.8)


def test_as_published_means_over_batches():
    # Batches (0 0 | 1 0 | 1) against (0 0 | 1 0 | 0): accuracies 1, 1, 0; mcc 0 (one class only), 1, 0.
    result = metrics.as_published_scores([0, 0, 1, 0, 1], [0, 0, 1, 0, 0], 2, batch_size=2)
    assert result == pytest.approx(
        {"accuracy": 2 / 3, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "mcc": 1 / 3})
    honest = metrics.scores(metrics.confusion_matrix([0, 0, 1, 0, 1], [0, 0, 1, 0, 0], 2))
    assert honest["accuracy"] == pytest.approx(4 / 5) and honest["mcc"] == pytest.approx(0.6123724356957945)
    with pytest.raises(ValueError, match="batch_size"):
        metrics.as_published_scores([0], [0], 2, batch_size=0)


def test_precision_recall_curve_by_hand():
    # Thresholds from the lowest: 0.2 takes all five rows (2 of 5 right), 0.5 takes four (2 of 4; two rows tie), ...
    precision, recall, thresholds = metrics.precision_recall_curve([0, 0, 1, 0, 1], [0.2, 0.5, 0.5, 0.75, 1.0])
    assert thresholds.tolist() == pytest.approx([0.2, 0.5, 0.75, 1.0])
    assert precision.tolist() == pytest.approx([2 / 5, 2 / 4, 1 / 2, 1, 1])
    assert recall.tolist() == pytest.approx([1, 1, 1 / 2, 1 / 2, 0])
    # Steps: recall 1/2 -> 1 at precision 2/4, and 0 -> 1/2 at precision 1.
    assert metrics.average_precision([0, 0, 1, 0, 1], [0.2, 0.5, 0.5, 0.75, 1.0]) == pytest.approx(0.75)


@pytest.mark.parametrize("seed", range(4))
def test_every_point_of_the_curve_is_the_precision_and_recall_at_its_threshold(seed):
    chance = random.Random(seed)
    labels = [1] + [int(chance.random() < 0.3) for _ in range(60)]
    values = [chance.randint(0, 15) / 16 for _ in labels]  # many ties, exact in float32
    precision, recall, thresholds = metrics.precision_recall_curve(labels, values)
    assert thresholds.tolist() == sorted(set(values))
    for p, r, t in zip(precision.tolist(), recall.tolist(), thresholds.tolist()):
        both, guessed, support = counts_of(labels, [int(v >= t) for v in values], 1)
        assert (p, r) == pytest.approx((both / guessed, both / support))
    assert (precision[-1], recall[-1]) == (1, 0)
    steps = [0.0] + recall.flip(0)[1:].tolist()
    area = sum((after - before) * p for before, after, p in zip(steps, steps[1:], precision.flip(0)[1:].tolist()))
    assert metrics.average_precision(labels, values) == pytest.approx(area)


@pytest.mark.parametrize("labels, values", [([0, 0], [0.1, 0.2]), ([1, 0], [0.1]), ([1, 0], [0.1, math.nan]),
                                            ([], []), ([2, 1], [0.1, 0.2])])
def test_bad_curve_input_is_a_value_error(labels, values):
    with pytest.raises(ValueError):
        metrics.average_precision(labels, values)


def test_calibration_error_by_hand():
    # Two bins. (0, 0.5]: one row, confidence 0.4, wrong. (0.5, 1]: 0.6 wrong, 0.9 right, 0.9 right.
    probabilities = [[0.4, 0.3, 0.3], [0.6, 0.4, 0.0], [0.05, 0.9, 0.05], [0.9, 0.1, 0.0]]
    table = metrics.reliability_bins(probabilities, [1, 2, 1, 0], bins=2)
    assert table["upper"].tolist() == [0.5, 1.0] and table["count"].tolist() == [1, 3]
    assert table["confidence"].tolist() == pytest.approx([0.4, 0.8])
    assert table["accuracy"].tolist() == pytest.approx([0.0, 2 / 3])
    expected = (1 * 0.4 + 3 * (0.8 - 2 / 3)) / 4
    assert metrics.expected_calibration_error(probabilities, [1, 2, 1, 0], bins=2) == pytest.approx(expected)
    # Finer bins can only part the rows: {0.4}, {0.6}, {0.9, 0.9}.
    expected = (0.4 + 0.6 + 2 * 0.1) / 4
    assert metrics.expected_calibration_error(probabilities, [1, 2, 1, 0]) == pytest.approx(expected)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_and_certainty_to_the_last():
    table = metrics.reliability_bins([[0.5, 0.5], [1.0, 0.0]], [0, 0], bins=4)
    assert table["count"].tolist() == [0, 1, 0, 1] and table["accuracy"].tolist() == [0, 1, 0, 1]
    assert metrics.expected_calibration_error([[1.0, 0.0], [0.0, 1.0]], [0, 1]) == 0.0
    assert metrics.reliability_bins([[1.001, 0.0]], [0], bins=4)["count"].tolist() == [0, 0, 0, 1]  # rounding


@pytest.mark.parametrize("probabilities, labels, bins", [
    ([[2.0, -1.0]], [0], 15), ([[0.5, 0.1]], [0], 15), ([[0.5, 0.5]], [2], 15), ([[0.5, 0.5]], [0, 1], 15),
    ([0.5, 0.5], [0, 1], 15), ([[math.nan, 0.5]], [0], 15), ([[0.5, 0.5]], [0], 0), (torch.zeros(0, 2), [0, 1], 15),
])
def test_bad_probabilities_are_value_errors(probabilities, labels, bins):
    with pytest.raises(ValueError):
        metrics.expected_calibration_error(probabilities, labels, bins)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_a_known_temperature_is_recovered(temperature):
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(20_000, 5, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    fitted = metrics.fit_temperature(logits * temperature, labels)
    assert fitted == pytest.approx(temperature, rel=0.03)
    loss = [torch.nn.functional.cross_entropy(logits.double() * temperature / (fitted * factor), labels)
            for factor in (0.999, 1.0, 1.001)]
    assert loss[1] < loss[0] and loss[1] < loss[2]
    before, after = [metrics.expected_calibration_error((logits * temperature / t).softmax(1), labels)
                     for t in (1.0, fitted)]
    assert after < 0.02 and (temperature == 1.0 or before > 3 * after)


def test_temperature_in_closed_form_and_at_its_bounds():
    # Two classes, logits (2, 0), right in three rows of four: 1 / (1 + exp(-2 / T)) = 3/4 gives T = 2 / ln 3.
    logits = torch.tensor([[2.0, 0.0]]).repeat(4, 1)
    assert metrics.fit_temperature(logits, [0, 0, 0, 1]) == pytest.approx(2 / math.log(3), rel=1e-9)
    assert metrics.fit_temperature(logits, [0, 0, 0, 0]) == pytest.approx(0.01)
    assert metrics.fit_temperature(logits, [1, 1, 1, 1]) == pytest.approx(100)
    for bad in (torch.zeros(4), torch.zeros(3, 2), torch.full((4, 2), math.inf), torch.zeros(0, 2)):
        with pytest.raises(ValueError):
            metrics.fit_temperature(bad, [0, 0, 1, 1])


def test_bootstrap_matches_drawing_rows_and_is_repeatable():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 4, (300,), generator=generator)
    noise = torch.randint(0, 4, (300,), generator=generator)
    predictions = torch.where(torch.rand(300, generator=generator) < 0.6, labels, noise)
    interval = metrics.bootstrap_interval(labels, predictions, 4, samples=2000)
    assert interval == metrics.bootstrap_interval(labels, predictions, 4, samples=2000)
    assert interval != metrics.bootstrap_interval(labels, predictions, 4, samples=2000, seed=1)
    rows = torch.randint(0, 300, (1000, 300), generator=generator)
    drawn = [metrics.scores(metrics.confusion_matrix(labels[row], predictions[row], 4))["f1_macro"] for row in rows]
    expected = torch.tensor(drawn).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert interval == pytest.approx(expected, abs=0.012)
    wide = metrics.bootstrap_interval(labels, predictions, 4, samples=2000, level=0.99)
    assert wide[0] < interval[0] < interval[1] < wide[1]


def test_bootstrap_of_accuracy_has_the_binomial_spread():
    labels = [0] * 1000
    predictions = [0] * 800 + [1] * 200
    low, high = metrics.bootstrap_interval(labels, predictions, 2, metric="accuracy", samples=4000)
    spread = 1.96 * math.sqrt(0.8 * 0.2 / 1000)
    assert (low, high) == pytest.approx((0.8 - spread, 0.8 + spread), abs=0.003)
    assert metrics.bootstrap_interval([0, 1, 2], [0, 1, 2], 3, metric="accuracy", samples=50) == (1.0, 1.0)


def test_bootstrap_refuses_what_it_does_not_know():
    for bad in ({"metric": "f2"}, {"samples": 0}, {"level": 1.0}, {"level": 95}):
        with pytest.raises(ValueError):
            metrics.bootstrap_interval([0, 1], [0, 1], 2, **bad)
