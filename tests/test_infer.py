"""Answers: the API, the command line, files of every format, bad input of every kind."""

import io
import json
import os
import pickle
import runpy
import subprocess
import sys
import threading

import pytest
import torch

import data
import infer
from emobert import BertConfig, EmoBERT, load_checkpoint, save_checkpoint
from infer import DEFAULT_CHECKPOINT, Classifier
from tests.conftest import TINY, Malicious

TEXTS = ["so happy!", "the rain, the night; never again", "", "why?", "a very very very good day with you and the dog", "lost my friend"]


@pytest.fixture
def classifier(tiny, tokenizer):
    return Classifier(tiny, tokenizer)


def flat(predictions):
    return torch.tensor([[p.sentiment[name] for name in data.LABELS["sentiment"]] + [p.emotion[name] for name in data.LABELS["emotion"]]
                         for p in predictions])


# The API.

def test_one_text_or_many(classifier):
    (one,) = classifier.predict("so happy!")
    assert one.text == "so happy!" and one.n_tokens == 5 and one.truncated is False
    for scores, names in ((one.sentiment, data.LABELS["sentiment"]), (one.emotion, data.LABELS["emotion"])):
        assert set(scores) == set(names) and abs(sum(scores.values()) - 1) < 1e-5
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert classifier.predict([]) == []
    assert [p.text for p in classifier.predict(iter(TEXTS))] == TEXTS
    assert [p.text for p in classifier.predict(tuple(TEXTS))] == TEXTS


def test_probabilities_are_the_models(classifier, tiny, tokenizer):
    input_ids, attention_mask = tokenizer.pad([tokenizer.encode(TEXTS[1])])
    logits = tiny(input_ids, attention_mask)
    expected = torch.cat([logits[task].softmax(-1) for task in ("sentiment", "emotion")], -1)
    torch.testing.assert_close(flat(classifier.predict(TEXTS[1])), expected, atol=1e-6, rtol=0)


def test_the_same_alone_and_in_company(classifier):
    alone = flat([classifier.predict(text)[0] for text in TEXTS])
    for batch_size in (1, 2, 5, 64):
        torch.testing.assert_close(flat(classifier.predict(TEXTS, batch_size)), alone, atol=1e-6, rtol=0)


def test_blanks_around_a_text_do_not_matter(classifier):
    texts = ["so happy!", "  so happy!", "so happy!   \n"]
    answers = flat(classifier.predict(texts))
    torch.testing.assert_close(answers, answers[:1].expand(3, -1), atol=1e-6, rtol=0)


def test_long_texts_are_cut_and_say_so(tiny, tokenizer):
    (long,) = Classifier(tiny, tokenizer).predict("day " * 200)
    assert long.n_tokens == 64 and long.truncated
    (short,) = Classifier(tiny, tokenizer, max_length=10).predict("day " * 200)
    (same,) = Classifier(tiny, tokenizer).predict("day " * 8)
    assert short.n_tokens == 10 and short.truncated and not same.truncated and same.n_tokens == 10
    torch.testing.assert_close(flat([short]), flat([same]))
    for wrong in (1, 65):
        with pytest.raises(ValueError, match="max_length"):
            Classifier(tiny, tokenizer, max_length=wrong)


def test_temperature_softens(tiny, tokenizer):
    sharp, soft = (Classifier(tiny, tokenizer, t).predict("so happy!")[0] for t in (None, {"emotion": 5.0}))
    assert list(sharp.emotion) == list(soft.emotion) and max(soft.emotion.values()) < max(sharp.emotion.values())
    assert sharp.sentiment == soft.sentiment


def test_checkpoints_of_one_task_and_of_others(tokenizer):
    config = BertConfig(vocab_size=tokenizer.vocab_size, **TINY)
    (answer,) = Classifier(EmoBERT(config, {"emotion": data.LABELS["emotion"]}).eval(), tokenizer).predict("why?")
    assert answer.sentiment == {} and len(answer.emotion) == 8
    with pytest.raises(ValueError, match="tasks topic"):
        Classifier(EmoBERT(config, {"topic": ["a", "b"]}), tokenizer)


def test_wrong_arguments(classifier):
    for wrong in ([3], ["x", None], [b"x"]):
        with pytest.raises(TypeError, match="not str"):
            classifier.predict(wrong)
    with pytest.raises(ValueError, match="batch_size"):
        classifier.predict("x", batch_size=0)


def test_pickles_and_is_shared_by_threads(classifier, capsys):
    expected = classifier.predict(TEXTS)
    assert pickle.loads(pickle.dumps(classifier)).predict(TEXTS) == expected
    wrong = []

    def work():
        for _ in range(20):
            wrong.extend(1 for p, q in zip(classifier.predict(TEXTS), expected) if p != q)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and capsys.readouterr() == ("", "")


# The bundled model.

def test_the_bundled_model():
    model, tokenizer, _ = load_checkpoint(DEFAULT_CHECKPOINT)
    assert DEFAULT_CHECKPOINT.stat().st_size < 10_000_000 and model.config == BertConfig(
        hidden_dropout_prob=model.config.hidden_dropout_prob, attention_probs_dropout_prob=model.config.attention_probs_dropout_prob)
    assert model.labels == data.LABELS and tokenizer.vocab_size == 30522
    first, second, third = Classifier(model, tokenizer).predict(
        ["I miss my grandmother so much, it hurts", "what a wonderful surprise, thank you!!", "I am furious, they lied to us again"])
    assert next(iter(first.emotion)) == "sad" and next(iter(first.sentiment)) == "negative"
    assert next(iter(second.sentiment)) == "positive"
    assert next(iter(third.emotion)) == "anger" and next(iter(third.sentiment)) == "negative"


# The command line.

def answer(capsys, *arguments) -> list[dict]:
    assert infer.main([str(a) for a in arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_readable(checkpoint, capsys):
    assert infer.main(["--checkpoint", str(checkpoint), "--top-k", "2", "so happy!", ""]) == 0
    out = capsys.readouterr().out
    assert "so happy!" in out and "(empty text)" in out and "█" in out and "{" not in out
    assert len(out.splitlines()) == 2 * (1 + 2 + 2 + 1)      # text, two labels of each task, an empty line


def test_terminal_escapes_are_not_passed_on(checkpoint, capsys):
    infer.main(["--checkpoint", str(checkpoint), "\x1b[31mred\x07"])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "red" in out


def test_json_lines(checkpoint, capsys):
    first, second = answer(capsys, "--checkpoint", checkpoint, "--json", "so happy!", "day " * 100)
    assert first["text"] == "so happy!" and first["tokens"] == 5 and first["truncated"] is False and second["truncated"] is True
    assert set(first["emotion"]["scores"]) == set(data.LABELS["emotion"]) and first["emotion"]["label"] == next(iter(first["emotion"]["scores"]))
    assert abs(sum(first["sentiment"]["scores"].values()) - 1) < 1e-4
    assert set(first["ms"]) == {"tokenize", "inference", "total"} and all(v >= 0 for v in first["ms"].values())


def test_uncertain(checkpoint, capsys):
    (row,) = answer(capsys, "--checkpoint", checkpoint, "--json", "so happy!", "--min-confidence", "0.999")
    assert row["emotion"]["label"] == row["sentiment"]["label"] == "uncertain" and max(row["emotion"]["scores"].values()) < 0.999
    (row,) = answer(capsys, "--checkpoint", checkpoint, "--json", "so happy!", "--min-confidence", str(max(row["emotion"]["scores"].values()) - 0.001))
    assert row["emotion"]["label"] != "uncertain"
    infer.main(["--checkpoint", str(checkpoint), "--min-confidence", "0.999", "so happy!"])
    assert capsys.readouterr().out.count("uncertain") == 2


def test_stdin_a_text_a_line(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufefffirst\r\n\nthird 😀\nlast".encode())))
    assert [row["text"] for row in answer(capsys, "--checkpoint", checkpoint, "--json")] == ["first", "", "third 😀", "last"]


FILES = {
    "a.txt": ("one\n\nthree, four\n", ["one", "", "three, four"], []),
    "bom.csv": ('\ufefftext,id\n"say ""hi""",1\n"two\nlines",2\n,3\n', ['say "hi"', "two\nlines", ""], []),
    "b.csv": ("id,comment\r\n1,x\r\n2\r\n3,z\r\n", ["x", "", "z"], ["--column", "comment"]),
    "c.tsv": ("text\tn\na, b\t1\nc\t2\n", ["a, b", "c"], []),
    "one.csv": ("review\nfine\n", ["fine"], []),
    "d.jsonl": ('{"text": "a", "n": 1}\n{"text": "\\u00e9"}\n', ["a", "é"], []),
    "e.jsonl": ('{"body": "a"}\n', ["a"], ["--column", "body"]),
    "empty.txt": ("", [], []),
    "quotes.tsv": ('text\tn\n"a" b\t1\n"c\t2\nd\t3\n', ['"a" b', '"c', "d"], []),
    "blank.jsonl": ('{"text": "a"}\n\n', ["a"], []),
}


@pytest.mark.parametrize("name", FILES)
def test_files(checkpoint, capsys, tmp_path, name):
    content, texts, options = FILES[name]
    (tmp_path / name).write_bytes(content.encode())
    assert [row["text"] for row in answer(capsys, "--checkpoint", checkpoint, "--file", tmp_path / name, *options)] == texts


def test_many_rows_are_read_in_parts(checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "CHUNK", 7)
    texts = [f"day {i} " + "so " * (i % 5) for i in range(30)]
    (tmp_path / "t.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    rows = answer(capsys, "--checkpoint", checkpoint, "--file", tmp_path / "t.txt")
    assert [row["text"] for row in rows] == texts
    assert answer(capsys, "--checkpoint", checkpoint, "--file", tmp_path / "t.txt", "--out", tmp_path / "o.jsonl") == []
    written = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["emotion"] for row in written] == [row["emotion"] for row in rows]


def test_a_failure_leaves_the_old_output(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "CHUNK", 1)
    (tmp_path / "t.txt").write_bytes(b"fine\nfine\n\xff\n")
    (tmp_path / "o.jsonl").write_text("old")
    with pytest.raises(ValueError, match="t.txt: line 3 is not UTF-8"):
        infer.main(["--checkpoint", str(checkpoint), "--file", str(tmp_path / "t.txt"), "--out", str(tmp_path / "o.jsonl")])
    assert (tmp_path / "o.jsonl").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.jsonl", "t.txt", "tiny.pt"]


@pytest.mark.parametrize("name, content, options, message", [
    ("a.csv", "x,y\n1,2\n", [], "no column 'text'; it has x, y"), ("a.csv", "", [], "no header"),
    ("a.tsv", "x\ty\n", ["--column", "z"], "no column 'z'"), ("a.txt", "x\n", ["--column", "z"], "no columns"),
    ("a.csv", 'text\n"never closed\n', [], "line 2"), ("a.doc", "x", [], "must end in"), ("a.jsonl", "{\n", [], "line 1 is no JSON object"), ("a.jsonl", '{"text": 3}\n', [], "no string"),
    ("a.jsonl", '{"text": "x"}\n[]\n', [], "line 2"), ("a.jsonl", '"text"\n', [], "line 1"), ("a.csv", "text\n\xff\n", [], "line 2 is not UTF-8"),
])
def test_files_that_cannot_be_read(checkpoint, tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        infer.main(["--checkpoint", str(checkpoint), "--file", str(tmp_path / name), *options])


def test_odd_texts(checkpoint, capsys):
    odd = ["\0", "\ud800 lone", "\x7f\x9b31m", "😀" * 50, "word " * 100_000, "x" * 500_000, "[SEP]", "e\u0301"]
    infer.main(["--checkpoint", str(checkpoint), "--json", *odd])
    out = capsys.readouterr().out
    assert [json.loads(line)["text"] for line in out.splitlines()] == odd and not set("\x7f\x9b\0") & set(out)


@pytest.mark.parametrize("arguments", [["--batch-size", "0", "x"], ["--top-k", "0", "x"], ["--threads", "x", "y"], ["--file", "a.txt", "x"],
                                       ["--column", "c", "x"], ["--max-length", "1", "x"], ["--nonsense"]])
def test_options_that_make_no_sense(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        infer.main(arguments)
    assert exit.value.code == 2 and "error:" in capsys.readouterr().err


def run(*arguments, **options):
    return subprocess.run([sys.executable, infer.__file__, *arguments], capture_output=True, timeout=60, **options)


@pytest.mark.parametrize("case", ["missing", "garbage", "malicious", "device", "file", "escapes", "folder", "option"])
def test_errors_are_one_line(tmp_path, checkpoint, case):
    (tmp_path / "garbage.pt").write_bytes(os.urandom(2000))
    (tmp_path / "malicious.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "was-here")))
    arguments = {"missing": ["--checkpoint", str(tmp_path / "none.pt"), "x"], "garbage": ["--checkpoint", str(tmp_path / "garbage.pt"), "x"],
                 "malicious": ["--checkpoint", str(tmp_path / "malicious.pt"), "x"], "device": ["--device", "tpu", "x"],
                 "file": ["--file", str(tmp_path / "none.csv")], "escapes": ["--file", str(tmp_path / "evil.csv")],
                 "folder": ["--file", str(tmp_path / "evil.csv"), "--out", str(tmp_path / "none" / "x.jsonl")],
                 "option": ["--batch-size", "0", "x"]}[case]
    (tmp_path / "evil.csv").write_text('a\x1b[31m,"b\nc"\n' + "d" * 5000)
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1 and b"\x1b" not in done.stderr and len(done.stderr) < 800
    assert not (tmp_path / "was-here").exists()


def test_a_reader_that_goes_away(checkpoint):
    command = f'"{sys.executable}" "{infer.__file__}" --checkpoint "{checkpoint}" --json | head -n 1'
    done = subprocess.run(command, shell=True, input=b"day\n" * 20_000, capture_output=True, timeout=60)
    assert done.stdout.count(b"\n") == 1 and b"Traceback" not in done.stderr and done.stderr.startswith(b"error: ")


@pytest.mark.skipif(os.name != "posix", reason="closes a file descriptor with a shell")
def test_a_closed_stdout(checkpoint):
    done = subprocess.run(f'"{sys.executable}" "{infer.__file__}" --checkpoint "{checkpoint}" x >&-', shell=True, capture_output=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(b"error: ") and b"Traceback" not in done.stderr


def test_bytes_that_are_no_text_in_an_argument(checkpoint):
    done = run("--checkpoint", str(checkpoint), "--json", b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert done.returncode == 0 and json.loads(done.stdout)["text"] == "caf\udce9"


# Numbers, exactly.

def test_temperature_is_a_division_and_comes_with_the_checkpoint(tiny, tokenizer, tmp_path):
    save_checkpoint(tmp_path / "t.pt", tiny, tokenizer, temperature={"emotion": 2.0, "sentiment": 0.5})
    logits = tiny(*tokenizer.pad([tokenizer.encode("so happy!")]))
    expected = torch.cat([(logits["sentiment"] / 0.5).softmax(-1), (logits["emotion"] / 2.0).softmax(-1)], -1)
    torch.testing.assert_close(flat(Classifier.load(tmp_path / "t.pt", "cpu").predict("so happy!")), expected, atol=1e-6, rtol=0)


def test_order_is_kept_when_lengths_are_shuffled(classifier):
    """Texts are sorted by length inside, and each is longer or shorter than its neighbours."""
    texts = [" ".join(["day"] * (37 * i % 70)) + f" {i}" for i in range(70)]
    answers = classifier.predict(texts, 7)
    assert [p.text for p in answers] == texts
    assert [p.n_tokens for p in answers] == [min(64, len(classifier.tokenizer.encode(text, None))) for text in texts]
    torch.testing.assert_close(flat(answers), flat([classifier.predict(text)[0] for text in texts]), atol=1e-6, rtol=0)


def test_batches_hold_texts_of_like_length(classifier, monkeypatch):
    widths = []
    original = classifier.tokenizer.pad
    monkeypatch.setattr(classifier.tokenizer, "pad", lambda rows, *more: widths.append(sorted(map(len, rows))) or original(rows, *more))
    classifier.predict(["day " * 30, "day", "day " * 20, "day", "day " * 40], batch_size=2)
    assert sorted(widths) == [[3, 3], [22, 32], [42]]


def test_a_text_that_just_fits_is_not_cut(classifier):
    assert [(p.n_tokens, p.truncated) for p in classifier.predict(["day " * 61, "day " * 62, "day " * 63])] == [(63, False), (64, False), (64, True)]


def test_rows_are_read_as_they_are_needed(classifier):
    taken = []
    answers = infer.answer_all(classifier, (taken.append(i) or f"day {i}" for i in range(10_000)), chunk=3, batch_size=2)
    assert next(answers)[0].text == "day 0" and len(taken) == 3


def test_bars_and_percentages_are_the_probabilities(checkpoint, capsys):
    infer.main(["--checkpoint", str(checkpoint), "--top-k", "8", "so happy!"])
    title, *lines = capsys.readouterr().out.rstrip("\n").splitlines()
    (answer,) = Classifier.load(checkpoint, "cpu").predict("so happy!")
    assert title == "so happy!" and len(lines) == 3 + 8
    for line, (label, p) in zip(lines, [*answer.sentiment.items(), *answer.emotion.items()]):
        words = line.replace("sentiment", "").replace("emotion", "").split()
        assert words[0] == label and abs(float(words[1].rstrip("%")) / 100 - p) < 0.00051
        drawn = sum(" ▏▎▍▌▋▊▉█".index(c) for c in "".join(words[2:])) / 8
        assert abs(drawn - p * 20) <= 1 / 16 + 1e-9
    assert lines[0].startswith("  sentiment  ") and lines[3].startswith("  emotion    ")


def test_one_task_on_the_command_line(tokenizer, tmp_path, capsys):
    save_checkpoint(tmp_path / "e.pt", EmoBERT(BertConfig(vocab_size=tokenizer.vocab_size, **TINY), {"emotion": data.LABELS["emotion"]}), tokenizer)
    (row,) = answer(capsys, "--checkpoint", tmp_path / "e.pt", "--json", "so happy!")
    assert set(row) == {"text", "emotion", "tokens", "truncated", "ms"}
    infer.main(["--checkpoint", str(tmp_path / "e.pt"), "so happy!"])
    assert "sentiment" not in capsys.readouterr().out


def test_options_reach_the_model(checkpoint, capsys):
    (row,) = answer(capsys, "--checkpoint", checkpoint, "--json", "--max-length", "5", "--threads", "2", "--batch-size", "1", "day " * 20)
    assert row["tokens"] == 5 and row["truncated"] is True and torch.get_num_threads() == 2
    torch.set_num_threads(1)
    infer.main(["--checkpoint", str(checkpoint), "--max-length", "5", "day " * 20])
    assert "only the first 5 tokens were read" in capsys.readouterr().out
    with pytest.raises(ValueError, match="between 2 and the model's 64"):
        infer.main(["--checkpoint", str(checkpoint), "--max-length", "65", "x"])


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        infer.main(["-h"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and all(option in out for option in ("--json", "--file", "--column", "--out", "--top-k", "--checkpoint"))


def test_a_person_at_the_keyboard_is_answered_line_by_line(checkpoint, capsys, monkeypatch):
    shown, flushed = [], []
    monkeypatch.setattr("builtins.print", lambda *a, print=print, **k: print(*a, **k) or flushed.append(k.get("flush")))

    class Keyboard(io.BytesIO):
        def __next__(self):
            shown.append(capsys.readouterr().out)
            return super().__next__()
    stdin = io.TextIOWrapper(Keyboard(b"so happy!\nwhy?\n"))
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    infer.main(["--checkpoint", str(checkpoint)])
    assert flushed == [None, True, True] and len(shown) == 3 and "so happy!" in shown[1] and "why?" in shown[2]


# What comes out is safe to look at, what goes in may be anything.


def as_program(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """infer.py as a program, in this process: exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(infer.__file__, run_name="__main__")
    return exit.value.code, *capsys.readouterr()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(checkpoint, monkeypatch, capsys):
    with open("/dev/full", "w", buffering=1 << 20) as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, _, err = as_program(monkeypatch, capsys, "--checkpoint", checkpoint, "x")
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
        with pytest.raises(OSError):
            full.close()


def test_big_cells_and_nul_bytes_in_a_table(checkpoint, capsys, tmp_path):
    big = "day, " * 100_000
    (tmp_path / "t.csv").write_text(f'id,text\n1,"{big}"\n2,a\0b\n', encoding="utf-8", newline="")
    if sys.version_info >= (3, 11):      # before, the csv module itself refuses NUL
        assert [row["text"] for row in answer(capsys, "--checkpoint", checkpoint, "--file", tmp_path / "t.csv")] == [big, "a\0b"]


def test_out_replaces_and_keeps_surrogates(checkpoint, capsys, tmp_path):
    (tmp_path / "o.jsonl").write_text("old")
    assert answer(capsys, "--checkpoint", checkpoint, "--out", tmp_path / "o.jsonl", "caf\udce9", "é\n") == []
    assert [json.loads(line)["text"] for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()] == ["caf\udce9", "é\n"]
    with pytest.raises(OSError):
        infer.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "none" / "o.jsonl"), "x"])


def test_lone_surrogates_are_readable(checkpoint, monkeypatch, capsys):
    assert infer.main(["--checkpoint", str(checkpoint), "caf\udce9"]) == 0
    assert capsys.readouterr().out.startswith("caf\ufffd\n")


def test_malice_inside_a_real_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"meta": Malicious(tmp_path / "was-here")}, tmp_path / "bad.pt")
    code, out, err = as_program(monkeypatch, capsys, "--checkpoint", tmp_path / "bad.pt", "x")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and "bad.pt" in err
    assert not (tmp_path / "was-here").exists()


def test_closed_stdin(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)      # what Python makes of `<&-`
    code, _, err = as_program(monkeypatch, capsys, "--checkpoint", checkpoint)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
