"""WordPiece: text in, the ids of a fixed vocabulary out.

A text is cleaned (control characters dropped, accents stripped, lower-cased), cut at white space and around every
punctuation mark and Chinese character, and each word is then spelled with the longest pieces the vocabulary has, left to
right: 'unhappily' -> 'un', '##happi', '##ly'. A word that cannot be spelled is [UNK].

People repeat themselves: nine of ten blank-separated chunks of a text have been seen before. Nothing above looks across a
blank, so the ids of a chunk never depend on its neighbours, and encoding a text is: cut at blanks, look every chunk up in
a dictionary, join. Only a chunk that is not there goes through the rules. That makes plain Python faster than the
compiled tokenizers, without a second implementation that could disagree with the first.

    >>> tokenizer = WordPieceTokenizer("[PAD] [UNK] [CLS] [SEP] un ##happi ##ly they left .".split())
    >>> tokenizer.tokenize("Unhappily, they LEFT.")
    ['un', '##happi', '##ly', '[UNK]', 'they', 'left', '.']
    >>> tokenizer.encode("they left.")
    [2, 7, 8, 9, 3]
"""

import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAX_WORD_LENGTH = 100     # characters; a longer word is [UNK] (the limit of Hugging Face; google-research/bert has 200)
CACHE_SIZE = 1 << 17      # chunks; beyond that the cache starts afresh from the vocabulary
CACHED_LENGTH = 32        # characters; a longer chunk hardly ever comes back
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# The blocks that are written without spaces, so that every character is a word. The range that begins at 2B920 ought
# to begin at 2B820; the tokenizer that everybody's ids come from has it like this.
CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
           (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))
# The same tokenizer knows accents, format characters and punctuation as of Unicode 8. What has come since, in ranges that also hold
# characters to which no rule applies, and four that changed their kind:
LATER = """
    5C8-5C9 61D 7FD 890-8E2 9FD-9FE A76 AFA-AFF B53-B55 C04-C3C C77 C84 D00 D3B-D3C D81 EBA ECE 180F-1886 1ABF-1AF0
    1B4E-1B4F 1B7D-1B7F 1DF6-1DFB 2E43-2E63 A82C A8C5 A8FF A9BD 10D24-10F89 11070-11074 110C2-110CD 111CF 1123E-11241
    1133B 113BB-1145E 11660-1166C 116B9 1182F-11FFF 12FF1-1612F 16D6D-16F4F 16FE2-16FE4 1CF00-1D128 1D25B-1D25C
    1E000-1E6F5 1E944-1E95F
"""
LATER_RANGES = [range(int(first, 16), int(last or first, 16) + 1) for first, _, last in (part.partition("-") for part in LATER.split())]
CHANGED = {"\u166d": "Po", "\U000111c9": "Po", "\u1734": "Mn", "\U0001171e": "Mn"}


def _category(char: str) -> str:
    """The Unicode category of a character, as of Unicode 8."""
    code = ord(char)
    return CHANGED.get(char) or ("Lo" if any(code in later for later in LATER_RANGES) else unicodedata.category(char))


class _Rules(dict):
    """A table for str.translate that asks `rule` about a character when it first meets it."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def __missing__(self, code: int) -> str:
        replacement = self.rule(chr(code))
        if len(self) < CACHE_SIZE:      # Unicode has a million characters; a text that shows them all must not fill the memory
            self[code] = replacement
        return replacement


def _clean(char: str) -> str:
    """Step one: controls are dropped, white space is a blank, a Chinese character is a word."""
    if char in "\t\n\r":
        return " "
    if char in "\0\ufffd" or _category(char) in ("Cc", "Cf", "Co", "Cs"):
        return ""
    if char.isspace():
        return " "
    code = ord(char)
    return f" {char} " if any(low <= code <= high for low, high in CHINESE) else char


def _isolate(char: str) -> str:
    """Step two, for a cased vocabulary: every punctuation mark is a word."""
    if char in "\t\n\r":      # only ASCII text comes here with its controls, see _words
        return " "
    category = _category(char)
    if category[0] == "P" or char.isascii() and category[0] == "S":      # ASCII symbols such as $ and ^ count as well
        return f" {char} "
    return "" if category == "Cc" else char


def _isolate_and_fold(char: str) -> str:
    """Step two, for a lower-case vocabulary: accents (split off by NFD) go, then case, one character at a time."""
    return "" if _category(char) == "Mn" else _isolate(char).lower()


class _ChunkCache(dict):
    """blank-separated chunk -> its ids, filled on demand, bounded, never wrong: an entry is a pure function of its key."""

    def __init__(self, compute, seed: dict[str, tuple]):
        super().__init__(seed)
        self.compute, self.seed = compute, seed

    def __missing__(self, chunk: str) -> tuple:
        ids = self.compute(chunk)
        if len(chunk) <= CACHED_LENGTH:
            if len(self) >= CACHE_SIZE:
                self.clear()
                self.update(self.seed)
            self[chunk] = ids
        return ids


class WordPieceTokenizer:
    """Text to ids as Hugging Face's BertTokenizerFast does it, except that a literal '[SEP]' in a text is text.

    vocab: the pieces in the order of their ids; it must hold [PAD], [UNK], [CLS] and [SEP], or ValueError.
    lowercase: True for the uncased models; also strips accents, as there.
    Source: google-research/bert tokenization.py, as rewritten in Hugging Face's tokenizers. Safe to share between threads.
    """

    def __init__(self, vocab: list[str], lowercase: bool = True):
        self.vocab = list(vocab)
        self.lowercase = lowercase
        self.ids = {token: i for i, token in enumerate(self.vocab)}
        missing = [token for token in SPECIAL[:4] if token not in self.ids]
        if missing:
            raise ValueError(f"the vocabulary has no {', '.join(missing)}: is this a BERT vocabulary, one token a line?")
        self.vocab_size = len(self.vocab)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (self.ids[token] for token in SPECIAL[:4])
        self.special_ids = frozenset(self.ids[token] for token in SPECIAL if token in self.ids)
        # The same letters are another token inside a word than at its start.
        self._continues = {token[2:]: i for token, i in self.ids.items() if token.startswith("##")}
        self._longest = max(map(len, self.vocab))
        self._clean = _Rules(_clean)
        self._isolate = _Rules(_isolate_and_fold if lowercase else _isolate)
        self._whole = {token: (i,) for token, i in self.ids.items() if len(token) <= MAX_WORD_LENGTH}
        # Vocabulary words that the rules leave as they are need never be looked at: the cache starts with them.
        plain = {token: ids for token, ids in self._whole.items() if token.isascii() and self._words(token) == [token]}
        self._lookup = _ChunkCache(self._encode_chunk, {**plain, "": ()}).__getitem__

    @classmethod
    def from_file(cls, path, lowercase: bool = True) -> "WordPieceTokenizer":
        """Reads a vocab.txt, one token a line. Raises FileNotFoundError, or ValueError naming the file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a vocabulary, not UTF-8 at byte {error.start}") from None
        try:
            return cls(text.removesuffix("\n").split("\n"), lowercase)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __reduce__(self):
        return type(self), (self.vocab, self.lowercase)

    # The rules: text -> words -> pieces.

    def _words(self, text: str) -> list[str]:
        """Cleans a text and cuts it into words and punctuation marks."""
        if text.isascii():      # no accents, no Chinese, no odd white space: one pass is enough
            if text.isalnum():
                return [text.lower() if self.lowercase else text]
        else:
            text = text.translate(self._clean)
            if self.lowercase:
                text = unicodedata.normalize("NFD", text)
        return text.translate(self._isolate).split()

    def _spell(self, word: str) -> tuple[int, ...]:
        """The ids of the longest pieces that spell a word, or of [UNK]."""
        if len(word) > MAX_WORD_LENGTH:
            return (self.unk_id,)
        pieces, rest, table = [], word, self.ids
        while rest:
            piece = rest[:self._longest]
            while piece not in table:
                piece = piece[:-1]
                if not piece:
                    return (self.unk_id,)
            pieces.append(table[piece])
            rest, table = rest[len(piece):], self._continues
        return tuple(pieces)

    def _encode_chunk(self, chunk: str) -> tuple[int, ...]:
        """The ids of a text, by the rules: the one place where they are applied."""
        ids: tuple[int, ...] = ()
        for word in self._words(chunk):
            ids += self._whole.get(word) or self._spell(word)
        return ids

    # The public face.

    def encode(self, text: str, max_length: int | None = 512) -> list[int]:
        """The ids of `[CLS] text [SEP]`, the text cut so that there are at most max_length of them (None: never cut).

        Raises ValueError if max_length leaves no room for [CLS] and [SEP].
        """
        try:
            ids = [self.cls_id, *chain.from_iterable(map(self._lookup, text.split(" ")))]
        except (AttributeError, TypeError):
            if isinstance(text, str):
                raise
            raise TypeError(f"a text must be a str, not {type(text).__name__}") from None
        if max_length is not None and len(ids) >= max_length:
            if max_length < 2:
                raise ValueError(f"max_length is {max_length}, but [CLS] and [SEP] alone take 2")
            del ids[max_length - 1:]
        ids.append(self.sep_id)
        return ids

    def encode_batch(self, texts: Iterable[str], max_length: int | None = 512) -> list[list[int]]:
        """encode for each of the texts, in order."""
        if isinstance(texts, str):
            raise TypeError("encode_batch takes many texts; encode takes one")
        return list(map(self.encode, texts, repeat(max_length)))

    def tokenize(self, text: str) -> list[str]:
        """The word pieces of a text, without special tokens."""
        return [self.vocab[i] for i in self.encode(text, None)[1:-1]]

    def pad(self, rows: Sequence[Sequence[int]], multiple_of: int = 1) -> tuple[Tensor, Tensor]:
        """Rows of ids as one rectangle, filled up on the right with [PAD].

        Returns input_ids (B, T) int64 and attention_mask (B, T) int64, 1 where a token is and 0 where padding is;
        T is the longest row's length, rounded up to a multiple of `multiple_of`. Raises ValueError if there are no rows.
        """
        if not rows or multiple_of < 1:
            raise ValueError("no rows to pad" if not rows else f"multiple_of must be at least 1, not {multiple_of}")
        longest = max(map(len, rows))
        longest += -longest % multiple_of
        if len(rows) == 1 and len(rows[0]) == longest:
            input_ids = torch.tensor(rows, dtype=torch.int64)
            return input_ids, torch.ones_like(input_ids)
        flat = array("q")
        for row in rows:
            flat.extend(row)
            flat.extend(repeat(self.pad_id, longest - len(row)))
        input_ids = torch.from_numpy(np.frombuffer(flat, dtype=np.int64)).view(len(rows), longest)
        lengths = torch.tensor([len(row) for row in rows])
        return input_ids, (torch.arange(longest) < lengths[:, None]).long()

    def decode(self, ids: Iterable[int]) -> str:
        """Ids back to a readable text: special tokens left out, pieces joined, no blank before . ? ! and the comma.

        What the rules threw away (case, accents, the width of gaps) does not come back. Raises ValueError for an id
        outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary of {self.vocab_size}")
        text = ""
        for token in (self.vocab[i] for i in ids if i not in self.special_ids):
            if text and token.startswith("##"):
                text += token[2:]
            else:
                text += token if not text or token in (".", "?", "!", ",") else " " + token
        return text
