"""The public data sets: where each is, how it is written, and how its labels become ours.

Every publisher has its own format and its own labels. Each source below names its files, the reader of its format and a
map onto our eight emotions and three sentiments. A row that cannot be used is refused and counted with the reason, never
dropped in silence. `text_key` says when two texts are copies of each other: the same tweet comes with and without its
quotation marks, its entities decoded or not, its link shortened or gone.
"""

import csv
import gzip
import html
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import download

ASSETS = Path(__file__).resolve().parent / "assets"
LABELS = {"sentiment": ["negative", "neutral", "positive"],
          "emotion": ["anger", "fear", "joy", "love", "neutral", "sad", "surprise", "worry"]}
SPLITS = ("train", "validation", "test")
HELD_OUT = {"test": 0, "validation": 1, "train": 2, None: 3}     # the lowest of a text's copies decides where it goes


# Label maps: a publisher's label, lower-cased, -> ours.

def _invert(**groups: str) -> dict[str, str]:
    return {name: ours for ours, names in groups.items() for name in names.split()}


SENTIMENT = _invert(negative="negative -1", neutral="neutral irrelevant 0", positive="positive 1")
EMOTION = _invert(anger="anger hate disgust", fear="fear", joy="joy happiness happy fun enthusiasm", love="love", worry="worry",
                  neutral="neutral relief empty boredom", sad="sad sadness shame guilt", surprise="surprise")
DAIR = dict(zip("012345", ["sad", "joy", "love", "anger", "fear", "surprise"]))
TWEETEVAL = {"emotion": dict(zip("0123", ["anger", "joy", "joy", "sad"])), "sentiment": dict(zip("012", LABELS["sentiment"]))}
_GOEMOTIONS = _invert(
    anger="anger annoyance disgust disapproval", fear="fear", worry="nervousness", love="love caring desire",
    joy="joy amusement excitement optimism pride relief gratitude admiration approval", neutral="neutral",
    sad="sadness grief disappointment remorse embarrassment", surprise="surprise realization confusion curiosity")
# The publisher numbers the 27 emotions in alphabetical order and puts neutral last.
GOEMOTIONS = {str(i): _GOEMOTIONS[name] for i, name in enumerate([*sorted(_GOEMOTIONS.keys() - {"neutral"}), "neutral"])}


# Formats: a reader turns a file into rows of cells; a row with too few cells is malformed.

def read_text(path: Path) -> str:
    """A UTF-8 file, gzip-compressed or not. Raises ValueError naming the file and the line that is not UTF-8."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not valid UTF-8; get the file again or convert it") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ValueError(f"{path}: damaged gzip file; delete it and get it again") from None


def read_lines(path: Path) -> list[str]:
    # Not splitlines(): it also breaks at U+2028 and U+0085, which occur inside tweets.
    return [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]


def read_tabs(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in read_lines(path)]


def read_csv(path: Path) -> Iterator[list[str]]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):                   # the rest of the file would be one long cell
                raise ValueError(f"{path}, line {reader.line_num}: a quote is opened and never closed") from None
            yield []                                             # malformed; the next line starts afresh


def read_table(path: Path) -> Iterator[list[str]]:
    """[text, label] of a CSV file with a header, whose names differ between sources and between files of one source."""
    rows = read_csv(path)
    header = [name.strip().lower() for name in next(rows, [])]
    columns = [next((header.index(name) for name in names if name in header), None) for names in (
        ("text", "content", "clean_text", "clean_comment"), ("label", "emotion", "sentiment", "category"))]
    if None in columns:
        raise ValueError(f"{path}: the first line {','.join(header)[:60]!r} names no text or no label column")
    for row in rows:
        yield [row[column] for column in columns] if len(row) == len(header) else []


def read_json(path: Path) -> Iterator[list[str]]:
    for line in read_lines(path):
        try:
            record = json.loads(line)
            cells = [record["text"] + "", str(record["label"])]
        except (ValueError, LookupError, TypeError):
            cells = []
        yield cells


def read_tweeteval(path: Path) -> Iterator[list[str]]:
    """[text, emotion, sentiment] of <task>/<split>_text.txt and the same lines of <split>_labels.txt beside it."""
    partner = path.with_name(path.name.replace("_text", "_labels"))
    texts, labels = ([], []) if path == partner else (read_lines(path), read_lines(partner))
    if len(texts) != len(labels):
        raise ValueError(f"{partner}: {len(labels)} labels for {len(texts)} texts; get both files again")
    for text, label in zip(texts, labels):
        yield [text, label, ""] if path.parent.name == "emotion" else [text, "", label]


def read_isear(path: Path) -> Iterator[list[str]]:
    """[text, emotion] of fields separated by |, which a text may contain; a line break within a text was turned into á."""
    for fields in (line.split("|") for line in read_lines(path)[1:]):
        text = re.sub(r"á\|?", " ", "|".join(fields[40:-2]))
        yield [text.replace('\\"', '"').replace("\\", '"').replace('""', '"'), fields[36]] if len(fields) > 42 else []


def read_vader(path: Path) -> Iterator[list[str]]:
    """[id, sentiment, text]: the published mean rating, from -4 to 4, counts as neutral up to half a point either way."""
    for cells in read_tabs(path):
        if len(cells) > 2 and re.fullmatch(r"-?[0-4](\.\d+)?", cells[1]):
            cells[1] = "positive" if float(cells[1]) > 0.5 else "negative" if float(cells[1]) < -0.5 else "neutral"
        yield cells


def read_starter(path: Path) -> list[list[str]]:
    header, *rows = read_tabs(path)
    if header != ["text", "emotion", "sentiment", "split"]:
        raise ValueError(f"{path}: the first line must be text, emotion, sentiment, split, separated by tabs")
    return rows


def unwrap(text: str) -> str:
    """Undo CSV quoting left in a text: `"a ""b"" c"` -> `a "b" c`. True quotation marks stay."""
    inner = text.strip()[1:-1]
    wrapped = text.strip() == f'"{inner}"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if wrapped else text


# The sources.

class File(NamedTuple):
    path: str                                 # below the source's folder
    split: str | None = None                  # the publisher's split; None: there is none, or it is not independent
    url: str | None = None                    # None: a person has to fetch it
    required: bool = True


@dataclass(frozen=True)
class Source:
    name: str                                 # and its folder below the data root
    page: str                                 # where a person gets it
    terms: str
    read: Callable[[Path], Iterable[list[str]]]
    columns: str                              # what the reader's cells are; rows of one `group` are versions of one text
    labels: dict[str, dict[str, str]]         # task -> publisher's label -> ours
    files: list[File]
    in_paper: bool = False
    decode: Callable[[str], str] = str        # undoes what the publisher did to a text

    def path(self, root: Path, file: File) -> Path:
        return (ASSETS if self.name == "starter" else root / self.name) / file.path

    def present(self, root: Path) -> list[File]:
        return [file for file in self.files if self.path(root, file).is_file()]

    def how_to_get(self, root: Path) -> str:
        return (f"put {', '.join(file.path for file in self.files if file.required)} from {self.page} into "
                f"{self.path(root, self.files[0]).parent}")


_KAGGLE, _GITHUB, _RAW = "https://www.kaggle.com/datasets/", "https://github.com/", "https://raw.githubusercontent.com/"
_HUB = "https://huggingface.co/datasets/dair-ai/emotion"
_DAIR = _HUB + "/resolve/0f2013aff0f120885b4892bddfe59faafa13a310/data/"
_GOOGLE = _RAW + "google-research/google-research/master/goemotions/data/"
_CARDIFF = _RAW + "cardiffnlp/tweeteval/main/datasets/"
_DATASTORIES = _RAW + "cbaziotis/datastories-semeval2017-task4/HEAD/dataset/Subtask_A/downloaded/"
_JCHARIS = _RAW + "Jcharis/end2end-nlp-project/HEAD/notebooks/data/"
_VADER = _RAW + "cjhutto/vaderSentiment/HEAD/additional_resources/hutto_ICWSM_2014.tar.gz"
_NAMES = ("train", "val", "test")
_EMOTION, _SENTIMENT = {"emotion": EMOTION}, {"sentiment": SENTIMENT}

SOURCES = {source.name: source for source in [
    Source("starter", "this repository", "this repository's", read_starter, "text emotion sentiment split",
           {**_EMOTION, **_SENTIMENT}, [File("starter.tsv")]),
    Source("dair_emotion", _HUB, "research, education", read_json, "text emotion", {"emotion": DAIR},
           [File(f"{s}.jsonl.gz", s, f"{_DAIR}{s}.jsonl.gz", s != "test") for s in SPLITS], True),
    Source("dair_emotion_unsplit", _HUB, "research, education", read_json, "text emotion", {"emotion": DAIR},
           [File("data.jsonl.gz", None, _DAIR + "data.jsonl.gz")], True),
    Source("goemotions", _GITHUB + "google-research/google-research/tree/master/goemotions", "CC BY 4.0",
           read_tabs, "text emotion id", {"emotion": GOEMOTIONS},
           [File(f"{n}.tsv", s, f"{_GOOGLE}{n}.tsv", s != "test") for n, s in zip(("train", "dev", "test"), SPLITS)]),
    Source("tweeteval", _GITHUB + "cardiffnlp/tweeteval", "SemEval's: do not redistribute", read_tweeteval,
           "text emotion sentiment", TWEETEVAL, [
               File(f"{t}/{n}_{kind}.txt", s, f"{_CARDIFF}{t}/{n}_{kind}.txt", s == "validation" or t + n == "emotiontrain")
               for t in TWEETEVAL for n, s in zip(_NAMES, SPLITS) for kind in ("text", "labels")], decode=unwrap),
    Source("semeval2017_task4a", "https://alt.qcri.org/semeval2017/task4/", "CC BY 3.0; do not redistribute", read_tabs,
           "id sentiment text", _SENTIMENT, [File(f"twitter-{n}-A.tsv", None, f"{_DATASTORIES}twitter-{n}-A.tsv") for n in (
               "2013dev", "2013test", "2013train", "2014sarcasm", "2014test", "2015test", "2015train", "2016dev", "2016devtest",
               "2016test", "2016train")], decode=unwrap),           # earlier years' tests: training material in 2017
    Source("crowdflower_emotion", _KAGGLE + "pashupatigupta/emotion-detection-from-text", "public domain", read_table,
           "text emotion", _EMOTION, [File("tweet_emotions.csv")], True),
    Source("emotions_in_text", _KAGGLE + "ishantjuyal/emotions-in-text", "not stated", read_table,
           "text emotion", _EMOTION, [File("Emotion_final.csv")], True),
    Source("emotion_dataset_raw", _GITHUB + "Jcharis/end2end-nlp-project", "not stated", read_table, "text emotion", _EMOTION,
           [File("emotion_dataset_raw.csv", None, _JCHARIS + "emotion_dataset_raw.csv")], True),
    Source("emotion_labels", _KAGGLE + "anjaneyatripathi/emotion-classification-nlp", "not stated", read_table,
           "text emotion", _EMOTION,
           [File(f"emotion-labels-{n}.csv", s) for n, s in zip(_NAMES, SPLITS)], True),
    Source("isear", _GITHUB + "sinmaniphel/py_isear_dataset", "not stated", read_isear, "text emotion", _EMOTION,
           [File("isear.csv", None, _RAW + "sinmaniphel/py_isear_dataset/HEAD/isear.csv")]),
    Source("twitter_tweets_sentiment", _KAGGLE + "yasserh/twitter-tweets-sentiment-dataset", "CC BY 4.0", read_table,
           "text sentiment", _SENTIMENT, [File("Tweets.csv")], True, decode=lambda text: text.replace("`", "'")),
    Source("twitter_entity_sentiment", _KAGGLE + "jp797498e/twitter-entity-sentiment-analysis", "not stated", read_csv,
           "group entity sentiment text", _SENTIMENT,               # no splits: every validation tweet's id is in training
           [File("twitter_training.csv"), File("twitter_validation.csv")], True),
    Source("twitter_sentiment", _KAGGLE + "saurabhshahane/twitter-sentiment-dataset", "not stated", read_table,
           "text sentiment", _SENTIMENT, [File("Twitter_Data.csv")], True),
    Source("reddit_sentiment", _KAGGLE + "cosmos98/twitter-and-reddit-sentimental-analysis-dataset", "not stated", read_table,
           "text sentiment", _SENTIMENT, [File("Reddit_Data.csv")]),
    Source("vader_icwsm2014", _GITHUB + "cjhutto/vaderSentiment", "MIT", read_vader, "id sentiment text", _SENTIMENT,
           [File(f"{n}_GroundTruth.txt", None, _VADER) for n in (
               "tweets", "amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets")]),
]}


# Rows.

@dataclass(slots=True)
class Row:
    """A text and, for each task, the id of its label or None. `source` is where the labels come from; a merged row with a
    label from each of two sources names both: 'sentiment source+emotion source'."""
    text: str
    emotion: int | None = None
    sentiment: int | None = None
    source: str = ""
    split: str | None = None
    group: str | None = None


_ESCAPES = re.compile(r"(?:\\u[0-9a-fA-F]{4})+")
_NAMES_AND_ADDRESSES = re.compile(r"(?:https?:|www\.)\S+|@\w+")


def clean(text: str) -> str:
    """HTML entities and \\uXXXX escapes decoded (half a surrogate pair is U+FFFD), white space collapsed."""
    text = html.unescape(text)
    if "\\u" in text:
        text = _ESCAPES.sub(lambda match: json.loads(f'"{match[0]}"'), text)
    return " ".join(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").split())


def text_key(text: str) -> str:
    """What copies of a text have in common: the cleaned text in lower case; if that has 12 or more letters and digits beside
    user names and web addresses, only these."""
    plain = clean(text).lower()
    bare = re.sub(r"[\W_]+", "", _NAMES_AND_ADDRESSES.sub(" ", plain))
    return bare if len(bare) >= 12 else plain


def make_row(source: Source, cells: list[str], split: str | None) -> Row | str:
    """A row of a source's file as ours, or the reason why it is refused."""
    columns = source.columns.split()
    if len(cells) < len(columns):
        return "malformed row"
    cell = dict(zip(columns, cells))
    text, split, ids = clean(source.decode(cell["text"])), cell.get("split", split), {}
    if not text:
        return "empty text"
    if text == "Not Available" or "[ No response.]" in text:
        return "no response"
    if split not in HELD_OUT:
        return f"unknown split '{split[:20]}'"
    for task in filter(cell.get, source.labels):
        names = [name.strip().lower().removesuffix(".0") for name in cell[task].split(",")]
        labels = {source.labels[task].get(name, f"unknown label '{name[:20]}'") for name in names}
        unknown = labels.difference(LABELS[task])
        if unknown or len(labels) > 1:
            return min(unknown, default="labels of two groups")
        ids[task] = LABELS[task].index(labels.pop())
    return Row(text, **ids, source=source.name, split=split, group=cell.get("group")) if ids else "no label"


def load_source(name: str, data_dir: str | Path | None = None) -> tuple[list[Row], Counter]:
    """One source as published: its rows, in file order with the publisher's splits, and the refusals by reason.

    Files that are not there are left out. Raises ValueError for an unknown name or an unreadable file, FileNotFoundError
    when the source has no file.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown source '{name}'; known: {', '.join(SOURCES)}")
    source, root = SOURCES[name], download.data_dir(data_dir)
    rows, refused = [], Counter()
    if not source.present(root):
        raise FileNotFoundError("missing data: " + source.how_to_get(root))
    for file in source.present(root):
        for cells in source.read(source.path(root, file)):
            row = make_row(source, cells, file.split)
            rows.append(row) if isinstance(row, Row) else refused.update([row])
    return rows, refused
