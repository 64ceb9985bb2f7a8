"""What every command line of this project does alike: numbers that are checked, errors of one line, a quiet end.

A person who mistypes something, or whose disk is full, is told so in one line on stderr that begins with 'error:', and the
exit status is 2. A traceback means a defect of ours. Ctrl-C ends with status 130, as the shell expects.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line; the description is the file's own text, as it stands."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        self.exit(2, f"error: {printable(message)} (python {self.prog} -h explains)\n")


def number(kind: type = float, least: float = -math.inf, below: float = math.inf, above: float = -math.inf) -> Callable[[str], float]:
    """For add_argument(type=…): a number of the kind, finite, at least `least`, above `above`, below `below`."""
    def convert(text: str):
        value = kind(text)
        if not (least <= value < below and value > above):
            bounds = [f"at least {least:g}"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf) + [f"below {below:g}"]
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds) if below < math.inf else bounds[0]}, not {text}")
        return value
    convert.__name__ = "number" if kind is float else "whole number"      # argparse says: invalid whole number value
    return convert


def printable(text: str) -> str:
    """The text on one line, with nothing in it that a terminal would obey. Emoji joined by U+200D stay whole."""
    return "".join(c if c.isprintable() or c == "\u200d" else "\ufffd" for c in text)


def run(main: Callable[[], int]) -> None:
    """Runs a command's main and ends the process with its exit status, or with an error of one line."""
    try:
        if sys.stdout is None:
            raise ValueError("stdout is closed")
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")      # on Windows it would be something else
        sys.exit(main())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or the interpreter would complain again at its end
        complain("the program that read the answers went away")
    except (ValueError, OSError) as error:
        complain(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def complain(message: str) -> None:
    message = printable(" ".join(message.split()))
    print("error: " + (message if len(message) <= 600 else message[:600] + " …"), file=sys.stderr)
    sys.exit(2)
