"""The rules of WordPiece, by hand, and the cache that must never change an answer."""

import pickle
import random
import threading
import unicodedata

import pytest
import torch

import tokenizer as module
from tokenizer import WordPieceTokenizer

#        0     1     2     3     4   5       6   7    8    9 10  11  12  13   14
SMALL = "[PAD] [UNK] [CLS] [SEP] un ##happi ##ly they left . [ ] sep 中 naive".split()


@pytest.fixture
def small():
    return WordPieceTokenizer(SMALL)


@pytest.mark.parametrize("text, pieces", [
    ("Unhappily, they LEFT.", ["un", "##happi", "##ly", "[UNK]", "they", "left", "."]),
    ("they\tleft\r\nthey", ["they", "left", "they"]),
    ("they\u00a0left\u3000they\u2028left", ["they", "left", "they", "left"]),
    ("th\x00e\u200by\x1c le\ufffdft", ["they", "left"]),                    # controls join what they stand between
    ("they中left", ["they", "中", "left"]),
    ("Naïve NAI\u0308VE", ["naive", "naive"]),                             # accents go, composed or not
    ("they...left", ["they", ".", ".", ".", "left"]),
    ("[SEP] sep", ["[", "sep", "]", "sep"]),                               # a control token in a text is text
    ("unhappi ly", ["un", "##happi", "[UNK]"]),                            # '##ly' does not begin a word
    ("", []), ("   ", []), ("\x00\u200b", []),
])
def test_rules(small, text, pieces):
    assert small.tokenize(text) == pieces
    assert small.encode(text) == [2, *(SMALL.index(piece) for piece in pieces), 3]


def test_longest_match_first_and_no_partial_words():
    tokenizer = WordPieceTokenizer("[PAD] [UNK] [CLS] [SEP] a ab abc ##c ##cd".split())
    assert tokenizer.tokenize("abc abcd ab abd") == ["abc", "[UNK]", "ab", "[UNK]"]      # greedy: abc + ##d, never ab + ##cd


def test_words_longer_than_the_limit():
    tokenizer = WordPieceTokenizer("[PAD] [UNK] [CLS] [SEP] a ##a".split())
    assert len(tokenizer.tokenize("a" * 100)) == 100
    assert tokenizer.tokenize("a" * 101) == ["[UNK]"]
    assert tokenizer.tokenize("A" * 101 + " a") == ["[UNK]", "a"]
    assert len(tokenizer.tokenize("a\u0301" * 100)) == 100      # counted without the accents
    whole = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "b" * 101, "b" * 100])
    assert whole.tokenize("b" * 101 + " " + "b" * 100) == ["[UNK]", "b" * 100]      # even if the vocabulary has the word


def test_words_of_the_vocabulary_go_through_the_rules_too():
    """The cache starts with the vocabulary, but not with what the rules would take apart, fold or drop."""
    tokenizer = WordPieceTokenizer("[PAD] [UNK] [CLS] [SEP] They they # ##ly don't don ' t é e".split())
    assert tokenizer.tokenize("They ##ly don't é [UNK] [CLS]") == \
        ["they", "#", "#", "[UNK]", "don", "'", "t", "e", "[UNK]", "[UNK]", "[UNK]", "[UNK]", "[UNK]", "[UNK]"]
    cased = WordPieceTokenizer("[PAD] [UNK] [CLS] [SEP] They don't don ' t".split(), lowercase=False)
    assert cased.tokenize("They they don't") == ["They", "[UNK]", "don", "'", "t"]


def test_a_mark_after_a_blank_belongs_to_nobody(small):
    assert small.tokenize("they \u0301left") == ["they", "left"]
    assert small.tokenize("they \u0301 left\u0323\u0301") == ["they", "left"]


def test_lower_case_knows_no_context():
    tokenizer = WordPieceTokenizer("[PAD] [UNK] [CLS] [SEP] οδοσ οδος i".split())
    assert tokenizer.tokenize("ΟΔΟΣ οδος İ") == ["οδοσ", "οδος", "i"]


def test_cased_vocabulary_keeps_case_and_accents():
    tokenizer = WordPieceTokenizer("[PAD] [UNK] [CLS] [SEP] Über über uber .".split(), lowercase=False)
    assert tokenizer.tokenize("Über über. Uber") == ["Über", "über", ".", "[UNK]"]
    assert tokenizer.tokenize("\x07über\x01") == ["über"]
    assert tokenizer.tokenize("a.\n.\tx") == ["[UNK]", ".", ".", "[UNK]"]


def test_truncation(small):
    assert small.encode("they left. they left.", max_length=5) == [2, 7, 8, 9, 3]
    assert small.encode("they left.", max_length=5) == [2, 7, 8, 9, 3]
    assert small.encode("they", max_length=2) == [2, 3]
    assert len(small.encode("they " * 1000)) == 512
    assert len(small.encode("they " * 1000, max_length=None)) == 1002
    for too_small in (1, 0, -3):
        for text in ("they", ""):
            with pytest.raises(ValueError, match=f"max_length is {too_small}"):
                small.encode(text, max_length=too_small)


@pytest.mark.parametrize("other", [None, 3, b"they", ["they"]])
def test_other_things_than_texts(small, other):
    for function in (small.encode, small.tokenize):
        with pytest.raises(TypeError, match=f"a text must be a str, not {type(other).__name__}"):
            function(other)
    with pytest.raises(TypeError, match="many texts"):
        small.encode_batch("they")


def test_batch_and_pad(small):
    rows = small.encode_batch(["they", "", "they left."], max_length=4)
    assert rows == [[2, 7, 3], [2, 3], [2, 7, 8, 3]]
    assert small.encode_batch(text for text in ("they", "left")) == [[2, 7, 3], [2, 8, 3]] and small.encode_batch([]) == []
    input_ids, attention_mask = small.pad(rows)
    assert input_ids.tolist() == [[2, 7, 3, 0], [2, 3, 0, 0], [2, 7, 8, 3]]
    assert attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert input_ids.dtype == attention_mask.dtype == torch.int64
    wide, mask = small.pad(rows, multiple_of=8)
    assert wide.shape == (3, 8) and mask.sum() == 9
    single, mask = small.pad(rows[:1])
    assert single.tolist() == [[2, 7, 3]] and mask.tolist() == [[1, 1, 1]]
    assert small.pad(rows[:1], multiple_of=4)[0].tolist() == [[2, 7, 3, 0]]
    for empty in ([[]], [[], []]):
        input_ids, mask = small.pad(empty)
        assert input_ids.shape == mask.shape == (len(empty), 0) and input_ids.dtype == mask.dtype == torch.int64
    for rows, multiple_of in (([], 1), ([[2, 3]], 0), ([[2, 3]], -8)):
        with pytest.raises(ValueError, match="multiple|no rows"):
            small.pad(rows, multiple_of)


def test_decode(small):
    assert small.decode([2, 4, 5, 6, 7, 8, 9, 3, 0, 0]) == "unhappily they left."
    assert small.decode([]) == ""
    for bad in (-1, len(SMALL)):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            small.decode([bad])


def test_reading_a_vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(SMALL) + "\n", encoding="utf-8")
    tokenizer = WordPieceTokenizer.from_file(path)
    assert tokenizer.vocab == SMALL and tokenizer.vocab_size == len(SMALL)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 1, 2, 3)
    with pytest.raises(FileNotFoundError):
        WordPieceTokenizer.from_file(tmp_path / "none.txt")
    for written in ("\r\n".join(SMALL).encode(), "\n".join(SMALL).encode()):      # as Windows writes it; without a last line end
        path.write_bytes(written)
        assert WordPieceTokenizer.from_file(path).vocab == SMALL
    path.write_text("[PAD]\n[SEP]\n[UNK]\n[CLS]\nÜber\n", encoding="utf-8")
    cased = WordPieceTokenizer.from_file(path, lowercase=False)
    assert cased.encode("Über") == [3, 4, 1] and cased.pad_id == 0
    path.write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab.txt: .*\[PAD\], \[UNK\], \[CLS\], \[SEP\]"):
        WordPieceTokenizer.from_file(path)
    path.write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(ValueError, match="vocab.txt: .*UTF-8"):
        WordPieceTokenizer.from_file(path)


POOLS = [range(0x20, 0x7F), range(0, 0x20), range(0x7F, 0x250), range(0x300, 0x400), range(0x1E00, 0x2100), range(0x3000, 0x30FF),
         range(0x4E00, 0x4E80), range(0xAC00, 0xAC80), range(0xD800, 0xE000), range(0xFE00, 0xFFFF), range(0x1F300, 0x1F700), range(0x20000, 0x20020)]


def strings(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(chr(rng.choice(rng.choice(POOLS + POOLS[:1] * 6))) for _ in range(rng.randrange(40))) for _ in range(n)]


def plain_wordpiece(text: str, vocab: set[str], lowercase: bool) -> list[str]:
    """google-research/bert's tokenization.py retold: one step after the other over the whole text, nothing remembered."""
    cleaned = ""
    for char in text:
        if char in "\t\n\r":
            cleaned += " "
        elif char in "\0\ufffd" or unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co"):
            continue
        elif 0x4E00 <= ord(char) < 0xA000 or 0x20000 <= ord(char) < 0x2A6E0:
            cleaned += f" {char} "
        else:
            cleaned += " " if char.isspace() else char
    if lowercase:
        cleaned = "".join(char.lower() for char in unicodedata.normalize("NFD", cleaned) if unicodedata.category(char) != "Mn")
    spaced = "".join(f" {char} " if unicodedata.category(char)[0] == "P" or char in "$+<=>^`|~" else char for char in cleaned)
    pieces = []
    for word in spaced.split():
        spelled = []
        while word and spelled != ["[UNK]"]:
            begin = "##" if spelled else ""
            end = next((n for n in range(min(len(word), 8), 0, -1) if begin + word[:n] in vocab), 0)
            spelled, word = (spelled + [begin + word[:end]], word[end:]) if end else (["[UNK]"], word)
        pieces += spelled
    return pieces


@pytest.mark.parametrize("lowercase", [True, False])
def test_equals_the_steps_one_by_one(lowercase):
    """With a vocabulary of nearly every character in POOLS, and some pairs, so that no difference can hide behind [UNK]."""
    rng = random.Random(4)
    chars = [c for pool in POOLS for c in map(chr, pool) if c.isprintable() and not c.isspace() and rng.random() < 0.95]
    pairs = [a + rng.choice(chars) for a in chars[:400]]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *chars, *pairs, *("##" + c for c in chars + pairs)]
    tokenizer, known = WordPieceTokenizer(vocab, lowercase), set(vocab)
    spelled = unknown = 0
    for text in strings(5, 1500) + [" ".join(strings(1000 + i, 4)) for i in range(200)]:
        pieces = tokenizer.tokenize(text)
        assert pieces == plain_wordpiece(text, known, lowercase), ascii(text)
        spelled, unknown = spelled + len(pieces), unknown + pieces.count("[UNK]")
    assert spelled > 10_000 and unknown < spelled / 3      # else the comparison says little


def test_the_cache_never_changes_an_answer(tokenizer, vocab):
    """Encoding in chunks from a warm cache equals applying the rules to the whole text, for every kind of character."""
    texts = strings(1, 2500)
    rng = random.Random(6)
    texts += [rng.choice([" ", "  ", " \u0301", "\u00a0 ", " \x1c"]).join(rng.choices(texts, k=3)) for _ in range(500)]
    warm = [tokenizer.encode(text, None) for text in texts]
    for text, ids in zip(texts, warm):
        assert ids == [tokenizer.cls_id, *tokenizer._encode_chunk(text), tokenizer.sep_id], ascii(text)
    assert [tokenizer.encode(text, None) for text in texts] == warm
    assert [WordPieceTokenizer(vocab).encode(text, None) for text in texts[:20]] == warm[:20]


def test_the_cache_is_bounded_and_right_when_it_overflows(vocab, monkeypatch):
    fresh = WordPieceTokenizer(vocab)
    texts = strings(2, 500)
    expected = [fresh.encode(text) for text in texts]
    small = WordPieceTokenizer(vocab)
    cache = small._lookup.__self__
    monkeypatch.setattr(module, "CACHE_SIZE", len(cache) + 50)
    for _ in range(2):
        for text, ids in zip(texts, expected):
            assert small.encode(text) == ids
            assert len(cache) <= module.CACHE_SIZE
    small.encode("y" * 5000)
    assert "y" * 5000 not in cache


def test_threads_share_a_tokenizer(vocab, monkeypatch):
    texts = strings(3, 400)
    expected = [WordPieceTokenizer(vocab).encode(text) for text in texts]
    shared, wrong = WordPieceTokenizer(vocab), []
    monkeypatch.setattr(module, "CACHE_SIZE", len(shared._lookup.__self__) + 20)

    def work():
        wrong.extend(text for text, ids in zip(texts, expected) if shared.encode(text) != ids)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pickles(small):
    before = pickle.dumps(small)
    expected = small.encode("Unhappily they")
    assert pickle.loads(before).encode("Unhappily they") == expected and pickle.dumps(small) == before      # no cache in it
    assert pickle.loads(pickle.dumps(WordPieceTokenizer(SMALL, lowercase=False))).tokenize("THEY they") == ["[UNK]", "they"]
