"""What several tests share: a tiny model with a vocabulary that covers plain English letters."""

import os
import string

import pytest
import torch

import data
from emobert import BertConfig, EmoBERT, save_checkpoint
from tokenizer import WordPieceTokenizer

WORDS = ("the a i you we it is was not so very happy sad angry afraid love hate good bad day night rain sun dog cat friend home "
         "work coffee train late lost found what why again never always miss wonderful terrible").split()
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64)


class Malicious:
    """Pickled, it makes a folder when it is read back by a careless reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vocab() -> list[str]:
    letters = [*string.ascii_lowercase, *string.digits, *"!?.,'\"-#@()[]:;/&%$*_+=<>|~^`{}\\"]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *("##" + c for c in string.ascii_lowercase + string.digits)]


@pytest.fixture(scope="session")
def tokenizer(vocab) -> WordPieceTokenizer:
    return WordPieceTokenizer(vocab)


@pytest.fixture
def tiny(tokenizer) -> EmoBERT:
    """A random EmoBERT of both tasks, 32 wide; its weights are large enough for answers to differ."""
    torch.manual_seed(0)
    model = EmoBERT(BertConfig(vocab_size=tokenizer.vocab_size, **TINY), data.LABELS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def checkpoint(tiny, tokenizer, tmp_path):
    """A path to the tiny model's checkpoint."""
    path = tmp_path / "tiny.pt"
    save_checkpoint(path, tiny, tokenizer)
    return path


@pytest.fixture
def short_corpus(tmp_path, monkeypatch):
    """A starter corpus of 60 rows of our own in place of the real one: enough for training to have something to learn."""
    words = {"joy": "happy wonderful sun", "sad": "sad miss rain", "anger": "angry hate terrible"}
    sentiment = {"joy": "positive", "sad": "negative", "anger": "negative"}
    lines = ["text\temotion\tsentiment\tsplit"]
    for i in range(60):
        emotion = list(words)[i % 3]
        word = words[emotion].split()[i // 3 % 3]
        lines.append(f"{WORDS[i % 20]} {word} {WORDS[(7 * i) % 30]} {i}\t{emotion}\t{sentiment[emotion]}\t{['train', 'train', 'train', 'validation', 'test'][i // 3 % 5]}")
    folder = tmp_path / "assets"
    folder.mkdir()
    (folder / "starter.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setattr("sources.ASSETS", folder)
    return folder
