"""How a prompted model reads: text to token ids and back, and the marks that make a text somebody's turn in a conversation.

Llama 3 and SmolLM2 cut a text into words, numbers and punctuation, then glue each piece's bytes together pair by pair, in the
order in which those pairs were learnt: byte-level byte-pair encoding, which is written out here. Llama 2 and Mistral do much
the same over whole sentences, with the sentencepiece package. Around the text stand control tokens, by which the model knows
whose turn it is. They come from a template and from nowhere else: a text that spells one out stays text, so that what is
being classified cannot take the floor.
"""

import functools
import heapq
import json
import re
import struct
import sys
import unicodedata
from abc import ABC, abstractmethod
from pathlib import Path

import sentencepiece

TEMPLATES = {"chatml": "<|im_start|>", "llama-3": "<|start_header_id|>", "llama-2": "<<SYS>>", "mistral": "[INST]"}  # and their marks
ANSWER_ENDS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}


class Tokenizer(ABC):
    """Text to ids and back. control: the ids of the tokens that only a template may insert, by name.

    encode(text) -> ids without any control token, whatever the text says; decode(ids) leaves control tokens out.
    template: one of TEMPLATES, or None if the checkpoint does not tell. stop_ids: what ends an answer.
    """

    control: dict[str, int]
    vocab_size: int
    template: str | None = None
    stop_ids: tuple[int, ...] = ()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Text -> ids, none of them a control token."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Ids -> text, control tokens left out."""

    def _control(self, *names: str) -> list[int]:
        for name in names:
            if name in self.control:
                return [self.control[name]]
        raise ValueError(f"the vocabulary has no {names[0]} token, so {self.template!r} is not its template: choose another")

    def chat(self, system: str, user: str) -> list[int]:
        """One turn as the model was trained to see it, up to where its answer begins. An empty `system` leaves that part out.

        Sources: the model cards of Llama 2, Llama 3, Mistral 7B Instruct v0.1; OpenAI's ChatML.
        """
        turns = [(role, text) for role, text in (("system", system), ("user", user)) if text or role == "user"]
        if self.template == "chatml":
            start, end = self._control("<|im_start|>"), self._control("<|im_end|>") + self.encode("\n")
            return sum((start + self.encode(f"{role}\n{text}") + end for role, text in turns), []) \
                + start + self.encode("assistant\n")
        if self.template == "llama-3":
            start, end = self._control("<|start_header_id|>"), self._control("<|end_header_id|>")
            body = sum((start + self.encode(role) + end + self.encode("\n\n" + text.strip()) + self._control("<|eot_id|>")
                        for role, text in turns), self._control("<|begin_of_text|>"))
            return body + start + self.encode("assistant") + end + self.encode("\n\n")
        if self.template not in TEMPLATES:
            raise ValueError(f"this checkpoint names no chat template that is known here: choose one of {', '.join(TEMPLATES)}")
        # These two mark turns with plain text, which a text could imitate: a space inside takes such a mark apart.
        system, user = (re.sub(r"\[(?=/?INST\])|<(?=</?SYS>>)", r"\g<0> ", text) for text in (system, user))
        if system:
            user = f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}" if self.template == "llama-2" else f"{system}\n\n{user}"
        begin = self._control("<s>")
        if "[INST]" in self.control:                                   # from Mistral's v0.3 on the marks are control tokens
            return begin + self._control("[INST]") + self.encode(user) + self._control("[/INST]")
        return begin + self.encode(f"[INST] {user} [/INST]")


WHITE_SPACE = "\\t-\\r\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"     # Unicode's; re's \s has more
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")


@functools.cache
def _categories() -> str:
    """The two letters of every character's general category, one after the other."""
    return "".join(map(unicodedata.category, map(chr, range(sys.maxunicode + 1))))


@functools.cache
def _ranges(name: str) -> str:
    """The characters of a Unicode category ('L', 'Lu', ...) as ranges to stand between [ and ] in a pattern."""
    spans = [match.span() for match in re.finditer(f"(?:{name if len(name) == 2 else name + '[a-z]'})+", _categories())]
    if not spans:
        raise ValueError(f"unknown Unicode category {name!r}")
    return "".join(f"\\U{start // 2:08x}-\\U{end // 2 - 1:08x}" for start, end in spans)


def _compile(pattern: str) -> re.Pattern:
    """A splitting pattern as tokenizer.json writes them, which Python's re knows but for \\p{...}. One group: the whole."""
    out, in_class = [], False
    for token in re.findall(r"\\[pP]\{\w+\}|\\.|.", pattern, re.DOTALL):
        ranges = _ranges(token[3:-1]) if token[:2] in (r"\p", r"\P") else WHITE_SPACE if token in (r"\s", r"\S") else None
        if ranges is None:
            in_class = token == "[" or in_class and token != "]"
            out.append(token)
        elif token[1] in "PS" and in_class:
            raise ValueError(f"{token} inside [...] is not supported")
        else:
            out.append(ranges if in_class else f"[{'^' * (token[1] in 'PS')}{ranges}]")
    compiled = re.compile(f"({''.join(out)})")
    if compiled.groups != 1:
        raise ValueError(f"the pattern {pattern!r} has groups of its own")
    return compiled


class ByteLevelBPE(Tokenizer):
    """Byte-pair encoding over bytes, as GPT-2 introduced it: Llama 3 and SmolLM2 use it.

    A text is split by patterns (words with the space before them, numbers, punctuation); of a piece's UTF-8 bytes, each
    written as a printable character, the pair that was learnt first is merged, again and again, until no pair is left.
    vocab: token -> id; merges: pairs in the order learnt; control: token -> id; added: token -> id of tokens found in the
    text before anything else; whole: a piece that is a token needs no merges. Raises ValueError if these do not fit together.
    """

    def __init__(self, vocab: dict[str, int], merges, control: dict[str, int], patterns: list[str],
                 added: dict[str, int] | None = None, whole: bool = False):
        self.control, self.added, self.whole, self.splits = control, added or {}, whole, [_compile(p) for p in patterns]
        self.vocab = {token: i for token, i in vocab.items() if i not in control.values()}
        self.ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        for left, right in self.ranks:
            if not {left, right, left + right} <= self.vocab.keys():
                raise ValueError(f"the merge of {left!r} and {right!r} has no place in the vocabulary")
        self.tokens = {i: token for token, i in self.vocab.items()}
        self.vocab_size = 1 + max((*self.tokens, *control.values(), *self.added.values()), default=-1)
        # GPT-2's printable characters: bytes that print stand for themselves, the others for what follows U+00FF.
        printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
        self.byte_chars = {byte: chr(byte) for byte in printing}
        for byte in range(256):
            self.byte_chars.setdefault(byte, chr(256 + len(self.byte_chars) - len(printing)))
        self.char_bytes = {char: byte for byte, char in self.byte_chars.items()}
        if self.added:
            self.added_split = re.compile("(" + "|".join(map(re.escape, sorted(self.added, key=len, reverse=True))) + ")")
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.added_split.split(text) if self.added else [text]:
            if part in self.added:
                ids.append(self.added[part])
                continue
            pieces = [part]
            for split in self.splits:
                pieces = [piece for longer in pieces for piece in split.split(longer) if piece]
            for piece in pieces:
                found = self.cache.get(piece)
                if found is None:
                    found = self._merge(piece)
                    if len(self.cache) < 200_000 and len(piece) < 50:
                        self.cache[piece] = found
                ids += found
        return ids

    def _merge(self, piece: str) -> list[int]:
        # A byte that the vocabulary lacks (those that UTF-8 never uses, say) is dropped, as the tokenizers package does.
        parts = [char for byte in piece.encode("utf-8", "replace") if (char := self.byte_chars[byte]) in self.vocab]
        if self.whole and (word := "".join(parts)) in self.vocab:
            return [self.vocab[word]]
        before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
        heap: list[tuple] = []

        def offer(i: int) -> None:
            if 0 <= i and after[i] < len(parts) and (rank := self.ranks.get((parts[i], parts[after[i]]))) is not None:
                heapq.heappush(heap, (rank, i, parts[i], parts[after[i]]))

        for i in range(len(parts)):
            offer(i)
        while heap:                                                    # the lowest rank first, of equals the leftmost
            _, i, left, right = heapq.heappop(heap)
            j = after[i]
            if parts[i] != left or j >= len(parts) or parts[j] != right:
                continue                                               # one of the two has since merged with another
            parts[i], parts[j] = left + right, ""
            after[i] = after[j]
            if after[i] < len(parts):
                before[after[i]] = i
            offer(before[i])
            offer(i)
        return [self.vocab[part] for part in parts if part]

    def decode(self, ids: list[int]) -> str:
        """Bytes that are not UTF-8 (an answer cut off inside a character) become U+FFFD; control tokens are left out."""
        added = {i: token for token, i in self.added.items()}
        data = b"".join(added[i].encode("utf-8") if i in added else bytes(map(self.char_bytes.get, self.tokens[i]))
                        for i in ids if i in added or i in self.tokens)
        return data.decode("utf-8", errors="replace")


class SentencePiece(Tokenizer):
    """The tokenizer of Llama 2 and Mistral, run by the sentencepiece package. model: the bytes of a tokenizer.model."""

    def __init__(self, model: bytes, more_control: dict[str, int] | None = None):
        self.model = sentencepiece.SentencePieceProcessor()
        self.model.LoadFromSerializedProto(model)
        size = self.model.vocab_size()
        self.control = {self.model.id_to_piece(i): i for i in range(size) if self.model.is_control(i)} | (more_control or {})
        self.vocab_size = 1 + max((size - 1, *self.control.values()))

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i < self.model.vocab_size() and not self.model.is_control(i)])


# --- From files --------------------------------------------------------------------------------------------------------

# GGUF names the way a text is split by tokenizer.ggml.pre. SmolLM also sets each digit apart first; transformers leaves that
# out when it reads a GGUF file and so does this, to give the same ids: it matters only for two spaces before a digit.
GGUF_PATTERNS = {"llama-bpe": LLAMA3_PATTERN, "llama3": LLAMA3_PATTERN, "smollm": GPT2_PATTERN, "gpt-2": GPT2_PATTERN,
                 "default": GPT2_PATTERN}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4      # token types, the same in GGUF and in sentencepiece
DAMAGE = (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError, OverflowError, RecursionError, struct.error, re.error)


def read_json(path: Path) -> dict:
    """The JSON object in a file. FileNotFoundError, or ValueError naming the file if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def tokenizer_from_folder(folder: Path, model_type: str, end_ids: list[int]) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.model, else tokenizer.json with byte-level BPE.

    model_type: config.json's, which settles the template where no chat template is given. end_ids: its end-of-text ids.
    Raises FileNotFoundError, or ValueError naming the file that cannot be read.
    """
    settings_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    file = folder / ("tokenizer.model" if (folder / "tokenizer.model").is_file() else "tokenizer.json")
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: has neither tokenizer.model nor tokenizer.json; copy one from where the model is from")
    content = read_json(file) if file.suffix == ".json" else file.read_bytes()
    try:
        if file.suffix == ".json":
            tokenizer: Tokenizer = _byte_level_from_json(content)
        else:
            added = settings.get("added_tokens_decoder", {}).items()
            tokenizer = SentencePiece(content, {token["content"]: int(i) for i, token in added if token.get("special")})
    except DAMAGE as error:
        raise ValueError(f"{file}: not a tokenizer that can be read here ({error})") from None
    chat = template_file.read_text(encoding="utf-8") if template_file.is_file() else str(settings.get("chat_template") or "")
    return _with_template(tokenizer, chat, "mistral" if model_type == "mistral" else "llama-2", end_ids)


def tokenizer_from_gguf(path: Path, metadata: dict) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata (tokenizer.ggml.*). Raises ValueError naming the file."""
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}.get
    try:
        tokens, kind = get("tokens"), get("model")
        types = get("token_type") or [NORMAL] * len(tokens)
        if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
            raise ValueError("the tokens and their types do not fit together")
        of_type = {kind: {token: i for i, token in enumerate(tokens) if types[i] == kind} for kind in (CONTROL, USER_DEFINED)}
        if kind == "gpt2":
            if get("pre", "default") not in GGUF_PATTERNS:
                raise ValueError(f"it splits text by {get('pre')!r}; known are {', '.join(GGUF_PATTERNS)}")
            pattern = GGUF_PATTERNS[get("pre", "default")]
            tokenizer: Tokenizer = ByteLevelBPE({token: i for i, token in enumerate(tokens)}, [m.split(" ") for m in get("merges")],
                                                of_type[CONTROL], [pattern], of_type[USER_DEFINED], pattern == LLAMA3_PATTERN)
        elif kind == "llama":
            tokenizer = SentencePiece(_sentencepiece_model(tokens, get("scores"), types, get("add_space_prefix", True)))
        else:
            raise ValueError(f"its kind is {kind!r}; 'gpt2' and 'llama' are known")
    except DAMAGE as error:
        raise ValueError(f"{path}: its tokenizer cannot be read here ({error})") from None
    default = "mistral" if "mistral" in str(metadata.get("general.name")).lower() else "llama-2"
    end_ids = [i for i in (get("eos_token_id"), get("eot_token_id")) if i is not None]
    return _with_template(tokenizer, str(metadata.get("tokenizer.chat_template") or ""), default, end_ids)


def _with_template(tokenizer: Tokenizer, chat_template: str, default: str, end_ids: list[int]) -> Tokenizer:
    """Sets template, by the marks in the checkpoint's own one or by the control tokens there are, and stop_ids."""
    found = [name for name, mark in TEMPLATES.items() if mark in (chat_template or tokenizer.control)]
    if not found and not chat_template and isinstance(tokenizer, SentencePiece):
        found = [default]
    tokenizer.template = found[0] if found else None
    ends = [tokenizer.control[ANSWER_ENDS[name]] for name in found[:1] if ANSWER_ENDS.get(name) in tokenizer.control]
    tokenizer.stop_ids = tuple(dict.fromkeys(end_ids + ends))
    return tokenizer


def _byte_level_from_json(content: dict) -> ByteLevelBPE:
    model, splitter = content["model"], content.get("pre_tokenizer") or {}
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    if model.get("type", "BPE") != "BPE" or not any(step.get("type") == "ByteLevel" for step in steps):
        raise ValueError("only byte-level BPE is read from a tokenizer.json; others need their tokenizer.model")
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(key)]
    if odd or content.get("normalizer"):
        raise ValueError(f"{(odd or ['a normalizer'])[0]} is not supported")
    patterns = []
    for step in steps:
        if step["type"] == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(step["pattern"]["Regex"] if "Regex" in step["pattern"] else re.escape(step["pattern"]["String"]))
        elif step["type"] != "ByteLevel" or step.get("add_prefix_space"):
            raise ValueError(f"the pre-tokenizer {step} is not supported")
        elif step.get("use_regex", True):
            patterns.append(GPT2_PATTERN)
    tokens = content.get("added_tokens") or []
    control, added = ({token["content"]: token["id"] for token in tokens if bool(token.get("special")) == special}
                      for special in (True, False))
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return ByteLevelBPE(model["vocab"], merges, control, patterns, added, bool(model.get("ignore_merges")))


def _sentencepiece_model(tokens: list[str], scores: list[float], types: list[int], prefix_space: bool) -> bytes:
    """The tokenizer.model that a GGUF vocabulary came from, as its protocol buffer (sentencepiece_model.proto)."""

    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    def number(field: int, n: int) -> bytes:
        return varint(field << 3) + varint(n)

    def block(field: int, data: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(data)) + data

    if len(scores) != len(tokens):
        raise ValueError("the tokens and their scores do not fit together")
    pieces = (block(1, block(1, token.encode("utf-8")) + varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, kind))
              for token, score, kind in zip(tokens, scores, types))
    unknown = types.index(UNKNOWN)
    trainer = number(3, 2) + number(35, 1) + number(40, unknown)       # BPE, unknown characters as bytes
    normalizer = number(3, int(prefix_space)) + number(4, 0) + number(5, 1)      # spaces are kept, and written as U+2581
    return b"".join(pieces) + block(2, trainer) + block(3, normalizer)
