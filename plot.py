"""Figures of a run: what was learned, when it stopped helping, and where the model errs.

Loss and scores of each epoch (the paper's Figures 4 and 5) are in a run's metrics.jsonl. What needs every answer of the model
is read from evaluation.json: precision-recall curves show what a threshold would buy, confusion matrices which classes are
taken for which, reliability diagrams whether a confidence of 0.8 is right 80 % of the time.

    python evaluate.py runs/NAME/best.pt --out runs/NAME/evaluation.json
    python plot.py runs/NAME                     writes runs/NAME/*.png
"""

import json
import os
import textwrap
from pathlib import Path

import command
import data
from command import Parser

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"
# Okabe and Ito's colours, which the colour-blind can tell apart, with grey for their yellow.
COLOURS = [BLUE, ORANGE, "#009E73", "#CC79A7", GREY, "#E69F00", "#56B4E9", "#000000"]
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.color": "#E4E4E4", "grid.linewidth": 0.6, "axes.axisbelow": True,
         "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.4, "legend.frameon": False, "figure.dpi": 150,
         "savefig.bbox": "tight"}


def pyplot():
    """matplotlib.pyplot, drawing to files. Raises ValueError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plot.py needs matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update(STYLE)
    return pyplot


def read_json(path: Path, lines: bool = False):
    """A JSON file, or a file of JSON lines as a list. Raises ValueError naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def panels(plt, tasks, title: str, size: tuple[float, float] = (3.6, 2.9), rows: int = 1, **options):
    """A figure with a column of axes for each task -> figure, [(task, axes, …)]. size: of a column, in inches."""
    figure, axes = plt.subplots(rows, len(tasks), figsize=(size[0] * len(tasks), size[1]), squeeze=False, layout="constrained", **options)
    figure.suptitle(textwrap.fill(title, 40 * len(tasks)), fontsize=11)
    return figure, list(zip(tasks, *axes))


def curves(plt, epochs: list[dict], values: dict, title: str, unit: str):
    """A panel a task, with a line for each of `values`: name -> function of an epoch's record and a task."""
    figure, columns = panels(plt, list(epochs[0]["loss"]), title, sharey=unit == "score")
    best = max((record["epoch"] for record in epochs if record["best"]), default=None)
    for task, ax in columns:
        for (name, value), colour, marker in zip(values.items(), (BLUE, ORANGE), "os"):
            points = [(record["epoch"], value(record, task)) for record in epochs if value(record, task) is not None]
            if points:
                ax.plot(*zip(*points), color=colour, marker=marker, markersize=3.5, label=name)
        if best:
            ax.axvline(best, color=GREY, linewidth=0.9, linestyle=":", label=f"best weights, epoch {best}")
        ax.set(title=task, xlabel="epoch", ylabel=unit, xlim=(0.5, epochs[-1]["epoch"] + 0.5))
        ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(*columns[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def label_counts(plt, counts: dict, title: str):
    """counts: task -> split -> label -> rows, as a corpus reports them -> stacked bars (Figure 1)."""
    figure, columns = panels(plt, list(counts), title)
    for task, ax in columns:
        names, totals = list(counts[task]["train"]), [0] * len(counts[task]["train"])
        for (split, rows), colour in zip(counts[task].items(), (BLUE, ORANGE, COLOURS[5])):
            ax.barh(names, rows.values(), left=totals, color=colour, label=split, height=0.7)
            totals = [total + n for total, n in zip(totals, rows.values())]
        for name, total in zip(names, totals):
            ax.annotate(f"{total:,} ({total / max(1, sum(totals)):.0%})", (total, name), xytext=(3, 0), textcoords="offset points",
                        va="center", fontsize=8)
        ax.set(title=task, xlabel="rows", xlim=(0, 1.4 * max(1, *totals)), ylim=(len(names) - 0.5, -0.5))
        ax.grid(axis="y", visible=False)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.locator_params(axis="x", nbins=4)
    figure.legend(*columns[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def precision_recall(plt, results: dict, title: str):
    figure, columns = panels(plt, list(results), title, (3.6, 4.4))
    for task, ax in columns:
        cells = [(cell, colour) for cell, colour in zip(results[task]["per_class"], COLOURS) if cell["support"]]
        for cell, colour in sorted(cells, key=lambda pair: -pair[0]["average_precision"]):
            label = f"{cell['label']} {cell['average_precision']:.2f}"
            ax.plot(cell["curve"]["recall"], cell["curve"]["precision"], color=colour, label=label)
        ax.set(title=task, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
        ax.legend(title="average precision", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize=8, title_fontsize=8)
    return figure


def confusion(plt, results: dict, title: str):
    sizes = [1.6 + 0.5 * len(data.LABELS[task]) for task in results]
    figure, columns = panels(plt, list(results), title, (sum(sizes) / len(sizes) + 0.4, max(sizes) - 0.3), width_ratios=sizes)
    for task, ax in columns:
        names = data.LABELS[task]
        shares = [[count / max(1, sum(row)) for count in row] for row in results[task]["confusion_matrix"]]
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (i, row), j in ((item, j) for item in enumerate(shares) for j in range(len(names))):
            ax.text(j, i, f"{100 * row[j]:.0f}", ha="center", va="center", fontsize=8, color="white" if row[j] > 0.55 else "black")
        ax.set(title=task, xlabel="predicted", ylabel="true")
        ax.set_yticks(range(len(names)), names)
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        ax.grid(False)
        ax.spines[:].set_visible(False)
    return figure


def reliability(plt, results: dict, title: str):
    """Accuracy against confidence, above how many rows have that confidence (Guo et al. 2017, Figure 1). Rare ones get no dot."""
    figure, columns = panels(plt, list(results), title, (3.6, 4.4), rows=2, sharex=True, height_ratios=(3, 1))
    for task, upper, lower in columns:
        table, width = results[task]["reliability"], 1 / len(results[task]["reliability"]["upper"])
        shares = [count / sum(table["count"]) for count in table["count"]]
        dots = [(x, y) for x, y, share in zip(table["confidence"], table["accuracy"], shares) if share > 0.005]
        upper.plot((0, 1), (0, 1), color=GREY, linewidth=0.9, linestyle="--", label="perfect calibration")
        upper.plot([x for x, _ in dots], [y for _, y in dots], color=BLUE, marker="o", markersize=4, label="model")
        upper.vlines([x for x, _ in dots], [x for x, _ in dots], [y for _, y in dots], GREY, linewidth=0.9)
        upper.set(title=f"{task}, ECE {results[task]['ece']:.3f}", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        upper.legend(loc="upper left", fontsize=8)
        lower.bar([edge - width / 2 for edge in table["upper"]], shares, width=0.9 * width, color=BLUE)
        lower.set(xlabel="confidence in the predicted class", ylabel="share of rows")
    return figure


def main(argv=None) -> int:
    parser = Parser("plot.py", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the PNG files go (default: the run's folder)")
    s = parser.parse_args(argv)
    plt, name = pyplot(), s.run.resolve().name
    epochs = read_json(s.run / "metrics.jsonl", lines=True) if (s.run / "metrics.jsonl").is_file() else []
    if not epochs:
        raise ValueError(f"{s.run}: not the folder of a run with a finished epoch (its metrics.jsonl is missing or empty)")

    def write(figure, file: str) -> None:
        path = (s.out or s.run) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{file}.{os.getpid()}.part")
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
        plt.close(figure)
        print(path)

    losses = {"training": lambda record, task: record["loss"][task],
              "validation": lambda record, task: record.get("validation_loss", {}).get(task)}
    write(curves(plt, epochs, losses, f"{name}: loss by epoch", "cross-entropy (nats)"), "loss.png")
    found = {"accuracy": lambda record, task: record["validation"].get(task, {}).get("accuracy"),
             "macro-F1": lambda record, task: record["validation"].get(task, {}).get("f1_macro")}
    write(curves(plt, epochs, found, f"{name}: validation scores by epoch", "score"), "scores.png")
    config, path = read_json(s.run / "config.json"), s.run / "evaluation.json"
    if path.is_file():
        evaluation = read_json(path)
        if "checkpoint" not in evaluation:
            raise ValueError(f"{path}: not what python evaluate.py {s.run / 'best.pt'} --out writes")
        results = {task: result for task, result in evaluation["corrected"].items() if task in data.LABELS}
        for draw, title in ((precision_recall, "precision and recall of each class"), (confusion, "predictions in % of each true class"),
                            (reliability, "confidence and accuracy")):
            write(draw(plt, results, f"{name}: {title}, {evaluation['split']} split"), f"{draw.__name__}.png")
    else:
        print(f"for more figures: python evaluate.py {s.run / 'best.pt'} --mixture {config['mixture']} --out {path}")
    counts = data.load_corpus(config["mixture"], config["data_dir"], as_published=config.get("protocol") == "published",
                              download_missing=False).report["labels"]
    counts = {task: counts[task] for task in epochs[0]["loss"]}
    write(label_counts(plt, counts, f"labels of {config['mixture'].replace(',', ', ')}"), "labels.png")
    return 0


if __name__ == "__main__":
    command.run(main)
