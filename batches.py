"""From texts to rectangles of token ids, with as little padding as can be.

A batch is as wide as its longest row, so rows of like length belong together. For an answer that is a matter of sorting. For
training the order must be random as well: the rows are shuffled, sorted by length within large windows, cut into batches,
and the batches shuffled. Every order is a function of (seed, epoch) alone, so a run that was interrupted can find its
place again. Two tasks are walked side by side: a step takes a batch of each, of similar lengths.
"""

from array import array
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tokenizer import WordPieceTokenizer

WINDOW = 64      # batches that are sorted together: long enough to fill them evenly, short enough to stay random


class TokenRows:
    """Tokenized texts, back to back in one tensor: `ids` (total tokens,) int32, `starts` and `lengths` (N,) int64.

    Texts of hundreds of megabytes fit, and a batch is cut out by indexing, on whatever device the tensors are.
    """

    def __init__(self, texts, tokenizer: WordPieceTokenizer, max_length: int, name: str = "texts"):
        flat, lengths = array("i"), array("q")
        for text in tqdm(texts, desc=f"tokenizing {name}", unit=" texts", disable=None, leave=False):
            row = tokenizer.encode(text, max_length)
            lengths.append(len(row))
            flat.extend(row)
        self.ids, self.lengths = (torch.from_numpy(np.array(numbers)) for numbers in (flat, lengths))
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.pad_id = tokenizer.pad_id

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device) -> "TokenRows":
        self.ids, self.lengths, self.starts = (t.to(device) for t in (self.ids, self.lengths, self.starts))
        return self

    def batch(self, rows: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Row numbers (B,) -> input_ids and attention_mask (B, T) int64, T the longest row's length unless `width` is given."""
        lengths = self.lengths[rows]
        columns = torch.arange(width or int(lengths.max()), device=self.ids.device)
        mask = columns < lengths[:, None]                                                       # (B, T)
        places = (self.starts[rows][:, None] + columns).clamp_(max=len(self.ids) - 1)
        return self.ids[places].long().masked_fill_(~mask, self.pad_id), mask.long()

    def by_length(self, max_tokens: int) -> Iterator[Tensor]:
        """Row numbers in batches of at most max_tokens tokens, padding included, shortest rows first."""
        order = self.lengths.argsort(stable=True)
        begin = 0
        lengths = self.lengths[order].tolist()
        for end in range(1, len(lengths) + 1):
            if end == len(lengths) or (end + 1 - begin) * lengths[end] > max_tokens:
                yield order[begin:end]
                begin = end


def steps_per_epoch(rows: dict[str, TokenRows], batch_size: int, pairing: str) -> int:
    """How many steps an epoch has: 'longest' until every row of every task was seen, 'shortest' until a task runs out."""
    counts = [len(r) for r in rows.values()]
    if pairing == "shortest":
        return max(1, min(counts) // batch_size)
    return max(1, -(-max(counts) // batch_size))


def epoch_steps(rows: dict[str, TokenRows], batch_size: int, pairing: str, seed: int, epoch: int) -> list[dict[str, Tensor]]:
    """The steps of one epoch: task -> row numbers (batch_size,), the same for the same (seed, epoch).

    A task that runs out before the others starts over in a new order, so that the last batch is full as well.
    """
    steps = steps_per_epoch(rows, batch_size, pairing)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    orders = {}
    for task, task_rows in rows.items():
        needed, n = steps * batch_size, len(task_rows)
        order = torch.cat([torch.randperm(n, generator=generator) for _ in range(-(-needed // n))])[:needed]
        lengths = task_rows.lengths.cpu()
        windows = [w[lengths[w].argsort(stable=True)] for w in order.split(WINDOW * batch_size)]
        orders[task] = torch.cat(windows).view(steps, batch_size)
    return [{task: order[i] for task, order in orders.items()} for i in torch.randperm(steps, generator=generator).tolist()]
