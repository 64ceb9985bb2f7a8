"""Numbers on a command line, and errors that are one harmless line."""

import argparse

import pytest

import command
from command import Parser, number, printable


@pytest.mark.parametrize("convert, good, bad", [
    (number(least=0), ["0", "1.5", "1e3"], ["-1", "nan", "inf", "-inf"]), (number(int, above=0), ["1", "99"], ["0", "-3"]),
    (number(least=0, below=1), ["0", "0.99"], ["1", "-0.1", "nan"]), (number(int, least=2), ["2"], ["1"]),
])
def test_numbers(convert, good, bad):
    for text in good:
        assert convert(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="must be"):
            convert(text)
    with pytest.raises(ValueError):
        convert("many")


def test_a_parser_complains_in_one_line(capsys):
    parser = Parser("x.py", "What it does.")
    parser.add_argument("--n", type=number(int, above=0))
    for wrong in (["--n", "0"], ["--n", "x"], ["--m"], ["\x1b[31m\nfoo"]):
        with pytest.raises(SystemExit) as exit:
            parser.parse_args(wrong)
        err = capsys.readouterr().err
        assert exit.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "\x1b" not in err
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(["-h"])
    assert exit.value.code == 0 and "What it does." in capsys.readouterr().out


def test_printable():
    assert printable("a\x1b[0m\n\x9b\u202eb é 😀 👩\u200d👧 ❤\ufe0f") == "a\ufffd[0m\ufffd\ufffd\ufffdb é 😀 👩\u200d👧 ❤\ufe0f"


@pytest.mark.parametrize("error", [ValueError("two\nlines \x1b[0m"), FileNotFoundError(2, "No such file", "x"), ValueError("y" * 5000)])
def test_run_complains_in_one_line(error, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.reconfigure", lambda **_: None, raising=False)

    def main():
        raise error
    with pytest.raises(SystemExit) as exit:
        command.run(main)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "\x1b" not in err and len(err) < 700


def test_run_passes_the_status_on_and_hides_no_defect(monkeypatch):
    monkeypatch.setattr("sys.stdout.reconfigure", lambda **_: None, raising=False)
    for value, status in ((lambda: 0, 0), (lambda: 130, 130)):
        with pytest.raises(SystemExit) as exit:
            command.run(value)
        assert exit.value.code == status
    with pytest.raises(ZeroDivisionError):
        command.run(lambda: 1 // 0)
