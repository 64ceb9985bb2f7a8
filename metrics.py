"""Everything a classifier's scores can say follows from one table: the confusion matrix.

Count, over the whole test split, how often a row of class i was called class j. The diagonal is what went right, row
sums are how often each class occurs, column sums how often it was guessed; precision, recall, F1, accuracy and
Matthews' correlation are ratios of those sums, computed here once, for one matrix or for a thousand (which makes
bootstrap intervals cheap). Ratios do not average: the mean of a score over batches is not the score of the split, and
`as_published_scores` is there to show the difference. Two questions need probabilities, not just winners: how precision
trades against recall as a threshold moves, and whether a confidence of 0.8 is right 80 % of the time.

Shapes: N rows, n classes, S matrices at once. Every function raises ValueError for an empty input, for lengths that
differ, and for class ids outside 0..n-1.
"""

import torch
from torch import Tensor


def _class_ids(values, n: int, name: str, rows: int | None = None) -> Tensor:
    """`values` as an int64 tensor (N,) on the CPU, after the checks named above; `rows` is the N it must have."""
    ids = torch.as_tensor(values).detach().cpu()
    if ids.dim() != 1 or len(ids) == 0 or len(ids) != (rows or len(ids)):
        raise ValueError(f"{name} must be a list of {rows or 'one or more'} class ids, got shape {tuple(ids.shape)}")
    if ids.is_floating_point() or ids.min() < 0 or ids.max() >= n:
        raise ValueError(f"{name} must be integers in 0..{n - 1}, got {ids.min().item()} to {ids.max().item()}")
    return ids.long()


def _class_scores(values, name: str) -> Tensor:
    """`values` as a float64 tensor (N, n) on the CPU; ValueError unless it is one with rows, and all of it finite."""
    values = torch.as_tensor(values).detach().cpu().double()
    if values.dim() != 2 or len(values) == 0 or not values.isfinite().all():
        raise ValueError(f"{name} must be finite and of shape (N, n), got shape {tuple(values.shape)}")
    return values


def confusion_matrix(labels, predictions, n: int) -> Tensor:
    """Counts (n, n), int64: rows are true classes, columns predicted ones. Takes N class ids each, in any sequence."""
    labels = _class_ids(labels, n, "labels")
    predictions = _class_ids(predictions, n, "predictions", rows=len(labels))
    return torch.bincount(labels * n + predictions, minlength=n * n).reshape(n, n)


def _summarize(matrices: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores of S matrices (S, n, n): name -> (S,), and those of each class: name -> (S, n). All float64.

    Counts are integers, and each numerator here is 0 where its denominator is, so a denominator clamped to 1 is exactly
    scikit-learn's zero_division=0.
    """
    counts = matrices.double()
    hits = counts.diagonal(dim1=1, dim2=2)  # (S, n)
    support, predicted, total = counts.sum(2), counts.sum(1), counts.sum((1, 2))  # (S, n), (S, n), (S,)
    by_class = {"precision": hits / predicted.clamp(min=1), "recall": hits / support.clamp(min=1),
                "f1": 2 * hits / (support + predicted).clamp(min=1)}
    present = (support + predicted > 0).sum(1)  # (S,)
    accuracy = hits.sum(1) / total
    summary = {"accuracy": accuracy}
    for name, values in by_class.items():
        summary[f"{name}_macro"] = values.sum(1) / present  # an absent class adds 0 above and nothing below
        summary[f"{name}_micro"] = accuracy  # one label a row: a miss is one false positive and one false negative
        summary[f"{name}_weighted"] = (values * support).sum(1) / total
    covariance = hits.sum(1) * total - (support * predicted).sum(1)
    spread = (total.square() - predicted.square().sum(1)) * (total.square() - support.square().sum(1))
    summary["mcc"] = covariance / spread.sqrt().clamp(min=1)
    return summary, by_class


def scores(matrix: Tensor) -> dict:
    """All scores of one confusion matrix (n, n), as Python floats in 0..1 (mcc: -1..1).

    Keys: accuracy; precision, recall and f1, each with _macro, _micro and _weighted; mcc; and per_class, always n dicts
    {precision, recall, f1, support}. A ratio over nothing is 0.0, and so is an undefined mcc. Macro averages run over
    the classes that occur among labels or predictions, scikit-learn's default. Micro averages equal accuracy. mcc is
    Matthews' correlation for n classes (Gorodkin 2004). Raises ValueError for anything but a square matrix of counts.
    """
    matrix = torch.as_tensor(matrix)
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.sum() == 0 or matrix.min() < 0:
        raise ValueError(f"a confusion matrix is square, with counts and at least one row; got {tuple(matrix.shape)}")
    summary, by_class = _summarize(matrix[None])
    columns = [values[0].tolist() for values in by_class.values()] + [matrix.sum(1).tolist()]
    per_class = [dict(zip([*by_class, "support"], row)) for row in zip(*columns)]
    return {name: value.item() for name, value in summary.items()} | {"per_class": per_class}


def as_published_scores(labels, predictions, n: int, batch_size: int) -> dict[str, float]:
    """The paper's numbers (Tables 2, 3 and 5) as its code made them: {accuracy, precision, recall, f1, mcc}.

    Rows are cut into batches in the order given, each batch is scored alone, the means are reported. Three flaws keep
    this out of every other table. Precision, recall and F1 were micro averages, which all repeat accuracy when a row
    has one label, and say nothing of rare classes. A short last batch weighs as much as a full one. And Matthews'
    correlation is not linear: its mean depends on the batch size, and a batch of one class counts 0 even if all right.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    batches = zip(*(torch.as_tensor(ids).split(batch_size) for ids in (labels, predictions)), strict=True)
    summary, _ = _summarize(torch.stack([confusion_matrix(*batch, n) for batch in batches]))
    accuracy, mcc = summary["accuracy"].mean().item(), summary["mcc"].mean().item()
    return {"accuracy": accuracy, "precision": accuracy, "recall": accuracy, "f1": accuracy, "mcc": mcc}


def bootstrap_interval(labels, predictions, n: int, metric: str = "f1_macro", samples: int = 1000, seed: int = 0,
                       level: float = 0.95) -> tuple[float, float]:
    """(low, high): percentile bootstrap interval of one score of `scores` (Efron and Tibshirani 1993, chapter 13).

    The bootstrap scores N rows drawn with replacement, `samples` times. A score sees only the draw's confusion matrix,
    which is a multinomial draw over the cells of the original one. So cells are drawn instead of rows, each a binomial
    share of the rows not yet placed, for all samples at once: the same distribution, at a cost that is free of N.
    """
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"samples must be at least 1 and level between 0 and 1, got {samples} and {level}")
    cells = confusion_matrix(labels, predictions, n).flatten().double()  # (n * n,)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.zeros(samples, n * n, dtype=torch.float64)
    mass, unplaced = cells.sum(), cells.sum().expand(samples)
    for cell in cells.nonzero().flatten().tolist():
        draws[:, cell] = torch.binomial(unplaced, (cells[cell] / mass).expand(samples), generator=generator)
        mass, unplaced = mass - cells[cell], unplaced - draws[:, cell]
    summary, _ = _summarize(draws.reshape(samples, n, n))
    if metric not in summary:
        raise ValueError(f"unknown metric {metric!r}; choose one of {', '.join(summary)}")
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return tuple(torch.quantile(summary[metric], tails).tolist())


def precision_recall_curve(labels_binary, scores) -> tuple[Tensor, Tensor, Tensor]:
    """Precision and recall of "score >= t" for every distinct score t: one class (label 1) against the rest (label 0).

    `scores` (N,) are probabilities or logits. Returns precision (K + 1,) and recall (K + 1,), float64, and thresholds
    (K,), ascending; the extra last point is precision 1, recall 0, as in scikit-learn. Raises ValueError also for
    scores that are not finite, and without any positive row, where recall would divide by zero.
    """
    labels, scores = _class_ids(labels_binary, 2, "labels_binary"), torch.as_tensor(scores).detach().cpu()
    if scores.shape != labels.shape or not scores.isfinite().all() or not labels.any():
        raise ValueError("a precision-recall curve needs a finite score for each label, and at least one label 1")
    scores, order = scores.sort(descending=True)
    hits = labels[order].cumsum(0).double()
    # Rows with equal scores pass a threshold together, so the curve has a point only where the score changes.
    ends = torch.cat([scores.diff().nonzero().flatten(), torch.tensor([len(scores) - 1])]).flip(0)  # (K,)
    precision, recall = hits[ends] / (ends + 1), hits[ends] / hits[-1]
    return torch.cat([precision, hits.new_ones(1)]), torch.cat([recall, hits.new_zeros(1)]), scores[ends]


def average_precision(labels_binary, scores) -> float:
    """Area under that curve as a sum of steps, (R_k - R_k+1) * P_k, with no interpolation between the points."""
    precision, recall, _ = precision_recall_curve(labels_binary, scores)
    return (-recall.diff() * precision[:-1]).sum().item()


def reliability_bins(probabilities, labels, bins: int = 15) -> dict[str, Tensor]:
    """Rows grouped by the probability of their predicted class into `bins` intervals of equal width, (left, right].

    `probabilities` (N, n), `labels` (N,). Returns four float64 tensors (bins,): upper (the right edge), confidence
    (mean probability of the predicted class), accuracy, and count; means are 0 in an empty bin. Raises ValueError also
    for rows that are not probabilities. Source: Guo et al. 2017, "On calibration of modern neural networks", section 2.
    """
    probabilities = _class_scores(probabilities, "probabilities")
    labels = _class_ids(labels, probabilities.shape[1], "labels", rows=len(probabilities))
    if bins < 1 or (probabilities < 0).any() or ((probabilities.sum(1) - 1).abs() > 0.01).any():
        raise ValueError("bins must be at least 1, and rows of probabilities sum to 1 (apply softmax to logits first)")
    confidence, predictions = probabilities.max(1)
    upper = torch.arange(1, bins + 1, dtype=torch.float64) / bins
    index = torch.bucketize(confidence, upper[:-1])
    count = torch.bincount(index, minlength=bins).double()
    right = (predictions == labels).double()
    means = [torch.bincount(index, weights, bins) / count.clamp(min=1) for weights in (confidence, right)]
    return {"upper": upper, "confidence": means[0], "accuracy": means[1], "count": count}


def expected_calibration_error(probabilities, labels, bins: int = 15) -> float:
    """Gap between confidence and accuracy in `reliability_bins`, averaged over rows (Guo et al. 2017, equation 3)."""
    table = reliability_bins(probabilities, labels, bins)
    gaps = (table["accuracy"] - table["confidence"]).abs() * table["count"]
    return (gaps.sum() / table["count"].sum()).item()


def fit_temperature(logits, labels) -> float:
    """The temperature T in 0.01..100 for which softmax(logits / T) has the least negative log-likelihood.

    `logits` (N, n), `labels` (N,). Dividing by T moves confidences, never the predicted class (Guo et al. 2017, section
    4.2). The loss is convex in b = 1 / T with slope mean(E[logit] - true logit), so halving an interval of log b by the
    sign of the slope finds the minimum exactly, with no learning rate. Where no finite T is best (all rows right, or
    worse than chance) the nearer end of the range is returned.
    """
    logits = _class_scores(logits, "logits")
    labels = _class_ids(labels, logits.shape[1], "labels", rows=len(logits))
    excess = logits - logits.gather(1, labels[:, None])  # (N, n), 0 at the true class
    low, high = torch.tensor([0.01, 100.0], dtype=torch.float64).log()
    for _ in range(60):
        middle = (low + high) / 2
        slope = ((logits * middle.exp()).softmax(1) * excess).sum()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return (-middle).exp().item()
