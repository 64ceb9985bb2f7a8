"""From many sources to three splits that share no text.

The sources copy from one another, so a plain random cut puts copies of test texts into training: all copies of a text are
found first, over all sources and both tasks, and merged into one row (which may then carry an emotion AND a sentiment);
only then are rows split. `as_published=True` does what the paper did instead: copies kept, one shuffle, one cut.
`python data.py` prints what came from where; `--mixture paper` puts the paper's Table 1 beside it.
"""

import hashlib
import json
import os
import random
import tarfile
import time
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import download
from command import Parser, run
from sources import HELD_OUT, LABELS, SOURCES, SPLITS, File, Row, Source, load_source, text_key

MIXTURES = {"open": [s.name for s in SOURCES.values() if all(file.url or not file.required for file in s.files)],
            "paper": [s.name for s in SOURCES.values() if s.in_paper]}

# Stigall et al. 2024, Table 1 (its emotion 'neutral' repeats the count of surprise), and what each source adds to the
# emotions when its published files are complete. Columns as in LABELS.
PAPER = {"sentiment": [320538, 498067, 357904], "emotion": [71306, 60399, 175262, 41678, 22819, 146814, 22819, 8459]}
PAPER_SOURCES = {"dair_emotion_unsplit": [57317, 47712, 141067, 34554, 0, 121187, 14972, 0],
                 "dair_emotion": [2709, 2373, 6761, 1641, 0, 5797, 719, 0],
                 "emotions_in_text": [2993, 2652, 7029, 1641, 0, 6265, 879, 0],
                 "crowdflower_emotion": [1433, 0, 7744, 3842, 11170, 5165, 2187, 8459],
                 "emotion_labels": [1701, 2252, 1616, 0, 0, 1533, 0, 0],
                 "emotion_dataset_raw": [5153, 5410, 11045, 0, 2254, 6868, 4062, 0]}


# Getting the files.

def mixture_sources(mixture: str, root: Path) -> list[str]:
    """Names of a mixture's sources in the registry's order. Raises ValueError, or FileNotFoundError for an empty 'all'."""
    mixtures = {**MIXTURES, "all": [name for name, source in SOURCES.items() if source.present(root)]}
    if "all" in mixture.split(",") and not set(mixtures["all"]) - {"starter"}:
        raise FileNotFoundError(f"{root}: no data here; name its folder with --data-dir, or download with --mixture open")
    names = set()
    for part in mixture.split(","):
        if part not in SOURCES and part not in mixtures:
            raise ValueError(f"unknown mixture '{part}'; known: {', '.join(mixtures)}, or sources: {', '.join(SOURCES)}")
        names.update(mixtures.get(part, [part]))
    return [name for name in SOURCES if name in names]


def fetch(source: Source, file: File, root: Path) -> None:
    """Download one file. Of a .tar.gz, unpack the source's files by their bare names; no other member touches the disk."""
    path = source.path(root, file)
    if not file.url.endswith(".tar.gz"):
        download.download(file.url, path)
        return
    archive = download.download(file.url, path.with_name(file.url.rsplit("/", 1)[1]))
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.rsplit("/", 1)[-1]
                if member.isfile() and name in [wanted.path for wanted in source.files]:
                    path.with_name("unpacked.part").write_bytes(tar.extractfile(member).read())
                    os.replace(path.with_name("unpacked.part"), path.with_name(name))
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: damaged archive ({error}); delete it and try again") from None
    archive.unlink()
    if not path.is_file():
        raise ValueError(f"{file.url} holds no {file.path}; {source.how_to_get(root)}")


def missing_urls(mixture: str, data_dir: str | Path | None = None) -> list[str]:
    """The addresses of the required files of a mixture that are not on disk."""
    root = download.data_dir(data_dir)
    return [file.url for name in mixture_sources(mixture, root) for file in SOURCES[name].files
            if file.url and file.required and not SOURCES[name].path(root, file).is_file()]


def get_files(names: list[str], root: Path, downloads: bool, tolerant: bool) -> dict[str, list[str]]:
    """Download what is not there; source -> what is missing still. Raises FileNotFoundError, before any download, for what
    only a person can fetch, and download.DownloadError, both for required files only and not if `tolerant`."""
    absent = [(SOURCES[n], file) for n in names for file in SOURCES[n].files if not SOURCES[n].path(root, file).is_file()]
    by_hand = {source.name: source.how_to_get(root) for source, file in absent
               if file.required and not (file.url and downloads)}
    if by_hand and not tolerant:
        raise FileNotFoundError("missing data: " + "; ".join(by_hand.values()))
    missing = defaultdict(list)
    for source, file in absent:
        path, spare, reason = source.path(root, file), tolerant or not file.required, ""
        try:
            if downloads and file.url and not path.is_file():    # it may have come with its archive
                if spare and not download.reachable(file.url):   # waits less long than a download would
                    raise download.DownloadError("its host does not answer")
                fetch(source, file, root)
        except OSError as error:
            if not spare:
                raise
            reason = f" ({error})"
        if not path.is_file():
            missing[source.name].append(file.path + reason)
    return dict(missing)


# The corpus.

@dataclass
class TaskSplit:
    texts: list[str]
    labels: list[int]
    sources: list[str]                        # where each label comes from


@dataclass
class Corpus:
    rows: list[Row]                           # in a seeded order, each with its split
    report: dict                              # plain values: what was read, refused, merged, dropped, split

    def split(self, task: str, split: str) -> TaskSplit:
        """The rows of 'train', 'validation' or 'test' that have a label for 'emotion' or 'sentiment'."""
        if task not in LABELS or split not in SPLITS:
            raise ValueError(f"no {task}/{split}; tasks: {', '.join(LABELS)}; splits: {', '.join(SPLITS)}")
        rows = [row for row in self.rows if row.split == split and getattr(row, task) is not None]
        which = 0 if task == "sentiment" else -1
        return TaskSplit([row.text for row in rows], [getattr(row, task) for row in rows],
                         [row.source.split("+")[which] for row in rows])


def merge(copies: dict[str, list[Row]], seed: int) -> tuple[dict[str, Row], dict[str, Counter]]:
    """One row a key, in an order that depends on keys and seed alone. A label on which the copies disagree is dropped, and
    so is a row without any left. Also returns, for each task and pair of sources, on how many texts they disagree."""
    order = {name: i for i, name in enumerate(SOURCES)}
    merged, conflicts = {}, {task: Counter() for task in LABELS}
    for key in sorted(copies, key=lambda key: hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest()):
        rows = sorted(copies[key], key=lambda row: (HELD_OUT[row.split], order[row.source], row.text))
        labels, origins = {}, []
        for task in LABELS:
            votes = list(dict.fromkeys((row.source, getattr(row, task)) for row in rows if getattr(row, task) is not None))
            if len({label for _, label in votes}) > 1:
                conflicts[task].update({" / ".join(sorted((a, b))) for a, x in votes for b, y in votes if x != y})
            elif votes:
                labels[task] = votes[0][1]
                origins.append(votes[0][0])
        if labels:
            merged[key] = Row(rows[0].text, **labels, source="+".join(dict.fromkeys(origins)), group=rows[0].group)
    return merged, conflicts


def assign_splits(merged: dict[str, Row], copies: dict[str, list[Row]], seed: int) -> None:
    """Set each row's split. Texts that share a group, however indirectly, share a split: the most held-out publisher's
    split among all their copies, else 80/10/10 along the order of `merged` within a stratum of equal labels and source."""
    parent, first = {}, {}

    def root(key: str) -> str:                                   # the smallest key of all that are joined with this one
        while key in parent:
            key = parent[key]
        return key

    for key in merged:                                           # not a dropped text: '<unk>' would join a thousand groups
        for group in {row.group for row in copies[key] if row.group}:
            low, high = sorted((root(key), root(first.setdefault(group, key))))
            if low != high:
                parent[high] = low
    cluster = {key: root(key) for key in merged}
    split, strata = dict.fromkeys(cluster.values()), defaultdict(list)
    for key, name in cluster.items():
        split[name] = min(split[name], *(row.split for row in copies[key]), key=HELD_OUT.get)
    first_rows = {cluster[key]: row for key, row in reversed(merged.items())}
    for name, row in reversed(first_rows.items()):
        if split[name] is None:
            strata[row.emotion, row.sentiment, row.source].append(name)
    for stratum, names in strata.items():
        offset = random.Random(f"{seed} {stratum}").random()     # so that many tiny strata still add up to a tenth
        for i, name in enumerate(names):
            position = (i + offset) / len(names)
            split[name] = "test" if position < 0.1 else "validation" if position < 0.2 else "train"
    for key, row in merged.items():
        row.split = split[cluster[key]]


def cut_as_published(rows: list[Row], seed: int) -> list[Row]:
    """The paper's splits: each task's rows, copies and all, shuffled once and cut 80/10/10."""
    cut = []
    for task in LABELS:
        mine = [Row(row.text, **{task: getattr(row, task)}, source=row.source) for row in rows]
        mine = [row for row in mine if getattr(row, task) is not None]
        random.Random(seed).shuffle(mine)
        for i, row in enumerate(mine):
            row.split = SPLITS[max(0, 10 * i // len(mine) - 7)]
        cut += mine
    return cut


def count_labels(rows: list[Row], task: str) -> dict[str, int]:
    counts = Counter(getattr(row, task) for row in rows)
    return {name: counts[i] for i, name in enumerate(LABELS[task])}


def load_corpus(mixture: str = "starter", data_dir: str | Path | None = None, seed: int = 42, as_published: bool = False,
                download_missing: bool = True, tolerant: bool = False) -> Corpus:
    """A mixture of sources as training, validation and test rows.

    mixture: 'starter', 'open' (downloads), 'paper', 'all' (what is there, no download), source names, or several with commas.
    as_published: the splits of the paper's code, copies kept. tolerant: go on without required files; the report names them.
    Raises ValueError (unknown mixture, unreadable file), FileNotFoundError (files that a person has to fetch) and
    download.DownloadError.
    """
    started, root, mixture = time.perf_counter(), download.data_dir(data_dir), mixture.replace(" ", "")
    names, everything = mixture_sources(mixture, root), "all" in mixture.split(",")
    missing = get_files(names, root, download_missing and not everything, tolerant or everything)
    rows, copies, sources = [], defaultdict(list), {}
    for name in names:
        mine, refused = load_source(name, root) if SOURCES[name].present(root) else ([], Counter())
        sources[name] = {"read": len(mine) + refused.total(), "rows": len(mine), "refused": dict(refused.most_common()),
                         "repeated": 0, "shared": 0, "missing": missing.get(name, []), "terms": SOURCES[name].terms,
                         "labels": {task: count_labels(mine, task) for task in SOURCES[name].labels}}
        rows += mine
    for row in rows:
        copies[text_key(row.text)].append(row)
    for same in copies.values():
        counts = Counter(row.source for row in same)
        for name, n in counts.items():
            sources[name]["repeated"] += n - 1
            sources[name]["shared"] += len(counts) > 1
    merged, conflicts = merge(copies, seed)
    assign_splits(merged, copies, seed)
    final = cut_as_published(rows, seed) if as_published else list(merged.values())
    splits = {split: [row for row in final if row.split == split] for split in SPLITS}
    trained = {(task, text_key(row.text)) for row in splits["train"] for task in LABELS
               if as_published and getattr(row, task) is not None}                 # merged rows cannot meet again
    report = {"mixture": mixture, "data_dir": str(root), "seed": seed, "as_published": as_published, "sources": sources,
              "read": sum(source["read"] for source in sources.values()), "rows": len(final),
              "duplicates": len(rows) - len(copies), "unlabelled": len(copies) - len(merged),
              "conflicts": {task: dict(pairs.most_common()) for task, pairs in conflicts.items()},
              "splits": {split: len(mine) for split, mine in splits.items()},
              "both_labels": sum(None not in (row.emotion, row.sentiment) for row in final),
              "leaked": {task: sum((task, text_key(row.text)) in trained for row in splits["test"]
                                   if as_published and getattr(row, task) is not None) for task in LABELS},
              "labels": {task: {split: count_labels(mine, task) for split, mine in splits.items()} for task in LABELS},
              "seconds": round(time.perf_counter() - started, 2)}
    return Corpus(final, report)


# The command line.

def print_table(*rows: list) -> None:
    """Rows of cells, the first row a heading: names to the left, numbers to the right; None is an empty cell."""
    cells = [["" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *rest in cells:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]).rstrip())
    print()


def print_report(report: dict) -> None:
    sources, in_paper = report["sources"], report["mixture"] == "paper"
    how = "as published: copies kept" if report["as_published"] else "corrected: copies merged"
    print(f"mixture {report['mixture']} ({how}), seed {report['seed']}, {report['data_dir']}, {report['seconds']} s\n")
    table = [[name, s["read"], s["read"] - s["rows"], s["rows"], s["repeated"], s["shared"]] for name, s in sources.items()]
    print_table(["source", "read", "refused", "rows", "repeated", "shared"], *table,
                ["all", *(sum(column) for column in list(zip(*table))[1:])])
    print("repeated: rows whose text the same source has already; shared: texts that another source has, too\n")
    for task, names in LABELS.items():
        table = [[name, *s["labels"][task].values()] for name, s in sources.items() if task in s["labels"]]
        if table:
            table.append([f"all {task} rows", *(sum(column) for column in list(zip(*table))[1:])])
        if in_paper:
            complete = [[f"  {name}", *counts] for name, counts in PAPER_SOURCES.items()] if task == "emotion" else []
            table += [["  if complete:"] + [None] * len(names)] * bool(complete) + complete + [["paper", *PAPER[task]]]
        print_table([task, *names, "total"], *([*row, None if row[1] is None else sum(row[1:])] for row in table))
    if in_paper:
        print("paper: Stigall et al. 2024, Table 1; if complete: all published rows through the same label map\n")
    for task, names in LABELS.items():
        print_table([f"{task} split", *names, "total"],
                    *([split, *found.values(), sum(found.values())] for split, found in report["labels"][task].items()))
    print(f"{report['rows']:,} rows, {report['both_labels']:,} with both labels; {report['duplicates']:,} surplus copies; "
          f"{report['unlabelled']:,} texts without a label after conflicts\ntest rows whose text is also in train: "
          + ", ".join(f"{task} {n:,}" for task, n in report["leaked"].items()) + "\n")
    refused = [(n, f"{name}: {reason}") for name, s in sources.items() for reason, n in s["refused"].items()]
    conflicts = [(n, f"{task}: {pair}") for task, pairs in report["conflicts"].items() for pair, n in pairs.items()]
    for title, lines in (("refused rows", refused), ("texts in conflict", conflicts)):
        if lines:
            print_table([title, ""], *([line, n] for n, line in sorted(lines, reverse=True)[:20]))
    for name, source in sources.items():
        if source["missing"]:
            print(f"missing: {name}: {', '.join(source['missing'])}; {SOURCES[name].page}")


def main(argv=None) -> int:
    parser = Parser("data.py", __doc__)
    parser.add_argument("--mixture", default="starter", help="starter, open, paper, all, or names of sources with commas (default starter)")
    parser.add_argument("--data-dir", help="root of the data, a folder a source (default: $EMOBERT_DATA, else ~/.cache/emobert/data)")
    parser.add_argument("--seed", type=int, default=42, help="of the splits (default 42)")
    parser.add_argument("--as-published", action="store_true", help="the paper's splits: copies kept, one shuffle, one cut")
    parser.add_argument("--no-download", action="store_true", help="use only the files that are there")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    args = parser.parse_args(argv)
    report = load_corpus(args.mixture, args.data_dir, args.seed, args.as_published, not args.no_download,
                         tolerant=args.mixture == "paper").report
    print(json.dumps(report)) if args.json else print_report(report)
    return 0


if __name__ == "__main__":
    run(main)
