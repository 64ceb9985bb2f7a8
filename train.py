"""Training: one encoder, several tasks, one weighted loss.

Each step takes a batch of sentiment rows and a batch of emotion rows, passes all of them through the encoder together, and
adds the two cross-entropies up: loss = alpha * CE(sentiment) + beta * CE(emotion) (Stigall et al. 2024, equation 1). After
each epoch the validation rows are scored; the weights with the best macro-F1 are kept. All that happens is a function of
the settings and the seed, and everything the next step depends on is saved now and then: a run that was killed goes on with
`--resume` as if nothing had happened, to the bit on a CPU.

    python train.py                                     both tasks, on what data can be had
    python train.py --task emotion --epochs 5           one task
    python train.py --resume runs/NAME                  goes on after an interruption
    torchrun --nproc_per_node=2 -- train.py             the same run, each batch shared out over two processes
"""

import argparse
import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import command
import data
import download
from batches import TokenRows, epoch_steps, steps_per_epoch
from command import Parser, number
from emobert import (
    PRETRAINED,
    BertConfig,
    BertEncoder,
    EmoBERT,
    can_be_had,
    choose_device,
    load_checkpoint,
    pretrained_tokenizer,
    save_checkpoint,
    write_atomically,
)
from metrics import confusion_matrix, expected_calibration_error, fit_temperature, scores
from tokenizer import WordPieceTokenizer
from weights import open_pickle

BUNDLED = Path(__file__).resolve().parent / "assets" / "emobert-tiny.pt"
IGNORED = -100                # the label of a row that the task has no label for
WARMUP = 0.06                 # share of all steps in which the learning rate rises
CLIP = 1.0                    # largest norm of the gradient
SAVE_EVERY = 60.0             # seconds between two saves within an epoch
EVALUATION_TOKENS = 16384     # tokens in a batch without gradients
TEMPERATURE, SOFT = 2.0, 0.8  # distillation: softness of the teacher's answer, and its share of the loss (Hinton et al. 2015)

RECIPES = {
    "tuned": dict(epochs=8, batch_size=64, lr=5e-4, weight_decay=0.01, max_length=128, dropout=0.1, pairing="longest", width=None,
                  schedule="linear", patience=3, keep="best", protocol="corrected"),
    # What the paper and its code did. Its early stopping held a higher loss to be a better one, so all it kept was the last weights.
    "paper": dict(epochs=26, batch_size=256, lr=1e-5, weight_decay=1e-6, max_length=256, dropout=0.0, pairing="shortest", width=256,
                  schedule="constant", patience=0, keep="last", protocol="published"),
}
MAY_CHANGE = ("device",)      # settings that a resumed run may change without becoming another run
PLACES = ("data_dir", "encoder", "init_from", "teacher", "run", "resume")      # settings that name files and folders of this machine


def multitask_loss(logits: dict[str, Tensor], labels: dict[str, Tensor], task_weights: dict[str, float],
                   class_weights: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """logits: task -> (B, n); labels: task -> (B,) int64, IGNORED where a row has none -> the weighted sum, and each task's mean CE."""
    losses = {task: F.cross_entropy(logits[task], labels[task], class_weights and class_weights[task], ignore_index=IGNORED)
              for task in labels}
    return sum(task_weights[task] * loss for task, loss in losses.items()), losses


def soft_loss(logits: dict[str, Tensor], teacher: dict[str, Tensor], task_weights: dict[str, float]) -> Tensor:
    """Both: task -> (B, n) logits -> the weighted sum of T^2 KL(teacher || student), both softened by T. Hinton et al. 2015."""
    return sum(task_weights[task] * TEMPERATURE ** 2 * F.kl_div(
        F.log_softmax(logits[task] / TEMPERATURE, -1), F.log_softmax(teacher[task] / TEMPERATURE, -1), reduction="batchmean",
        log_target=True) for task in teacher)


@torch.inference_mode()
def predict(model: EmoBERT, rows: TokenRows, amp: bool = False, name: str = "rows") -> dict[str, Tensor]:
    """task -> logits (N, n) float32 on the CPU, in the order of the rows. The model is left in the mode it was in."""
    training, device = model.training, rows.ids.device
    model.eval()
    answers = {task: torch.zeros(len(rows), len(names)) for task, names in model.labels.items()}
    with tqdm(total=len(rows), desc=name, unit=" rows", disable=None, leave=False) as bar:
        for batch in rows.by_length(EVALUATION_TOKENS):
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = model(*rows.batch(batch))
            for task, values in logits.items():
                answers[task][batch.cpu()] = values.float().cpu()
            bar.update(len(batch))
    model.train(training)
    return answers


def principal_start(encoder: BertEncoder, larger: BertEncoder) -> None:
    """Fills a small encoder's embeddings with the principal components of a larger one's, for the same vocabulary.

    Words that the larger model holds to be alike are then alike from the first step. Positions go into the same coordinates.
    Raises ValueError if the vocabularies differ in size or the larger encoder is not larger.
    """
    theirs, ours = larger.word_embeddings.weight.detach(), encoder.word_embeddings.weight
    if theirs.shape[0] != ours.shape[0] or theirs.shape[1] < ours.shape[1]:
        raise ValueError(f"cannot start embeddings of {tuple(ours.shape)} from {tuple(theirs.shape)}: same vocabulary, larger width needed")
    centred = theirs - theirs.mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)                     # ascending order of variance
    directions = directions[:, -ours.shape[1]:].flip(1)                        # (larger C, C)
    positions = larger.position_embeddings.weight.detach()[:len(encoder.position_embeddings.weight)]
    with torch.no_grad():
        ours.copy_(centred @ directions)
        encoder.position_embeddings.weight[:len(positions)] = (positions - positions.mean(0)) @ directions


def choose_encoder(encoder: str) -> tuple[str, str]:
    """--encoder -> the encoder to start from, and why if it is not what was asked for. 'auto' is bert-tiny if it can be had."""
    if encoder != "auto":
        return encoder, ""
    name = next(iter(PRETRAINED))
    return (name, "") if can_be_had(name) else (str(BUNDLED), f" ({name} is neither cached nor reachable)")


def starting_point(encoder: str, init_from: str | None = None) -> tuple[BertEncoder, WordPieceTokenizer, str]:
    """--encoder (but 'auto') and --init-from -> an encoder, its tokenizer, and a few words that say what it is."""
    if encoder == "random":
        tokenizer = pretrained_tokenizer(init_from) if init_from else load_checkpoint(BUNDLED)[1]
        start = BertEncoder(BertConfig(vocab_size=tokenizer.vocab_size))
        said = "random weights in the shape of bert-tiny"
    elif encoder.endswith(".pt"):
        model, tokenizer, _ = load_checkpoint(encoder)
        start, said = model.encoder, f"the encoder of {encoder}"
    else:
        start, tokenizer, said = BertEncoder.from_pretrained(encoder), pretrained_tokenizer(encoder), encoder
    if init_from:
        principal_start(start, BertEncoder.from_pretrained(init_from))
        said += f", embeddings from the principal components of {init_from}"
    return start, tokenizer, said


def choose_mixture(mixture: str, data_dir: str | None) -> tuple[str, str]:
    """--mixture -> the mixture to load, and why if that is not what was asked for. 'auto' is 'open' if it can be had, else 'starter'."""
    if mixture != "auto":
        return mixture, ""
    missing = data.missing_urls("open", data_dir)
    if not missing or download.reachable(missing[0], timeout=2.0):
        return "open", ""
    return "starter", " (the public sources are neither on disk nor reachable; see python data.py -h)"


def learning_rate_factor(step: int, steps: int, schedule: str) -> float:
    """What the learning rate is multiplied with at a step: 1 throughout, or a linear rise and a linear fall to 0."""
    if schedule == "constant":
        return 1.0
    warmup = max(1, round(steps * WARMUP))
    return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))


class Run:
    """One training run: the folder runs/NAME, the state of everything, and the loop.

    config.json   the settings
    metrics.jsonl a line an epoch: losses, validation metrics, learning rate, rows a second, seconds
    best.pt       the checkpoint with the best validation macro-F1 (mean over the tasks)
    last.pt       all that is needed to go on: weights, optimizer, step, sums so far, random state
    """

    def __init__(self, settings: argparse.Namespace, folder: Path, resume: bool):
        self.settings, self.folder = settings, folder
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if settings.batch_size % self.world:
            raise ValueError(f"--batch-size {settings.batch_size} cannot be shared out over {self.world} processes")
        self.device = torch.device(settings.device)
        torch.manual_seed(settings.seed)
        self.load_data()
        if not resume and self.rank == 0:
            folder.mkdir(parents=True)
            replace_text(folder / "config.json", json.dumps(vars(settings), indent=2) + "\n")
        self.build()
        torch.manual_seed(settings.seed * 1009 + self.rank)      # for dropout, which must not be alike in all processes
        self.stop = False                      # set by a signal;
        self.stopping = False                  # what became of it after the next step, in all processes alike
        self.step = 0                          # steps done, over all epochs
        self.sums = dict.fromkeys(self.tasks, 0.0)      # of this epoch so far: the losses,
        self.read = [0, 0]                              # and the tokens read, without and with padding
        self.best, self.best_epoch = -1.0, 0
        self.temperature: dict[str, float] = {}      # of each head, fitted on the validation split after each epoch
        self.finished = 0                      # epochs whose line is in metrics.jsonl
        if resume and (folder / "last.pt").exists():
            self.restore()
        elif resume:
            self.say("resumed   from the start: nothing was saved yet")
        log = folder / "metrics.jsonl"
        if log.exists() and self.rank == 0:      # lines of epochs that were finished after the last save are written again
            lines = log.read_text(encoding="utf-8").splitlines()[:self.finished]
            replace_text(log, "".join(line + "\n" for line in lines))

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)

    def load_data(self) -> None:
        s = self.settings
        self.tasks = [s.task] if s.task else list(data.LABELS)
        # What 'auto' became is a setting from here on: a resumed run must not find another network and take another turn.
        s.encoder, why = choose_encoder(s.encoder)
        self.encoder, self.tokenizer, said = starting_point(s.encoder, s.init_from)
        self.say(f"encoder   {said}{why}")
        longest = self.encoder.config.max_position_embeddings
        if max(s.max_length, s.width or 0) > longest:
            raise ValueError(f"this encoder reads {longest} tokens at most: give --max-length {longest} or less"
                             + (", and not the paper's recipe, which pads to 256" if s.width else ""))
        self.teacher = load_checkpoint(s.teacher, self.device)[:2] if s.teacher else None
        if self.teacher and (self.teacher[1].vocab != self.tokenizer.vocab
                             or any(self.teacher[0].labels.get(task) != data.LABELS[task] for task in self.tasks)):
            raise ValueError(f"{s.teacher}: a teacher needs the same vocabulary and the same labels")
        s.mixture, why = choose_mixture(s.mixture, s.data_dir)
        published = s.protocol == "published"
        corpus = data.load_corpus(s.mixture, s.data_dir, as_published=published)
        self.say(f"data      mixture '{s.mixture}'{why}" + (", split as published: copies of test texts stay in training" if published else ""))
        self.rows: dict[str, dict[str, TokenRows]] = {}
        self.labels: dict[str, dict[str, Tensor]] = {}
        keys: dict[str, set[str]] = {}         # the training texts of each task, to find their copies among the test texts
        self.copied: dict[str, Tensor] = {}
        for split in data.SPLITS:
            self.rows[split], self.labels[split] = {}, {}
            for task in self.tasks:
                part = corpus.split(task, split)
                texts, labels = part.texts[:s.limit], part.labels[:s.limit]
                self.rows[split][task] = TokenRows(texts, self.tokenizer, s.max_length, f"{task} {split}").to(self.device)
                self.labels[split][task] = torch.tensor(labels, dtype=torch.int64, device=self.device)
                if split == "train":
                    keys[task] = set(map(data.text_key, texts))
                elif split == "test":
                    self.copied[task] = torch.tensor([data.text_key(text) in keys[task] for text in texts], dtype=torch.bool)
                mean = len(self.rows[split][task].ids) / max(1, len(texts))
                self.say(f"          {task:9} {split:10} {len(texts):7,} rows, {mean:5.1f} tokens a row")
            if split == "train" and not all(map(len, self.rows[split].values())):
                raise ValueError(f"mixture '{s.mixture}' has no training rows for {' and '.join(t for t in self.tasks if not len(self.rows[split][t]))}")

    def build(self) -> None:
        s, config = self.settings, self.encoder.config
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = s.dropout
        self.model = EmoBERT(config, {task: data.LABELS[task] for task in self.tasks})      # heads as the seed has them
        self.model.encoder.load_state_dict(self.encoder.state_dict())
        self.model.to(self.device).train()
        del self.encoder
        weights = [p for name, p in self.model.named_parameters() if p.dim() > 1]
        others = [p for name, p in self.model.named_parameters() if p.dim() <= 1]      # biases and norms are not decayed
        self.optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": s.weight_decay}, {"params": others, "weight_decay": 0.0}],
                                           lr=s.lr, fused=True)
        self.task_weights = {task: weight for task, weight in (("sentiment", s.alpha), ("emotion", s.beta)) if task in self.tasks}
        if s.task:
            self.task_weights = {s.task: 1.0}
        self.class_weights = None
        if s.class_weights == "balanced":
            counts = {task: self.labels["train"][task].bincount(minlength=len(data.LABELS[task])) for task in self.tasks}
            self.class_weights = {task: (c.sum() / (c.clamp(min=1) * (c > 0).sum())).float() for task, c in counts.items()}
        self.epoch_length = steps_per_epoch(self.rows["train"], s.batch_size, s.pairing)
        self.soft_targets = self.ask_teacher() if s.teacher else None
        parameters = sum(p.numel() for p in self.model.parameters())
        seen = {task: min(1.0, self.epoch_length * s.batch_size / len(rows)) for task, rows in self.rows["train"].items()}
        self.say(f"pairing   {s.pairing}: an epoch shows " + ", ".join(f"{share:.0%} of the {task} rows" for task, share in seen.items()))
        self.say(f"model     {parameters / 1e6:.1f} M parameters on {self.device}, {self.epoch_length:,} steps an epoch, {s.epochs} epochs, "
              f"loss = {' + '.join(f'{w:g} CE({task})' for task, w in self.task_weights.items())}")

    def ask_teacher(self) -> dict[str, dict[str, Tensor]]:
        """For the training rows of each task, the teacher's logits for every task: asked once, kept beside the run."""
        cache = self.folder / "teacher.pt"
        if not cache.is_file() and self.rank == 0:
            write_atomically(cache, {task: {own: logits for own, logits in predict(
                self.teacher[0], rows, self.settings.amp, f"teacher reads {task}").items() if own in self.tasks}
                for task, rows in self.rows["train"].items()})
        del self.teacher
        if self.world > 1:
            dist.barrier()
        return open_pickle(cache)

    # What survives the process.

    def random_states(self) -> list[Tensor]:
        """The state of this process's random numbers, on the CPU and the device; of all processes', one after the other."""
        states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])
        if self.world == 1:
            return states
        gathered: list = [None] * self.world
        dist.all_gather_object(gathered, states)
        return [state for own in gathered for state in own]

    def save(self) -> None:
        states = self.random_states()
        if self.rank == 0:
            write_atomically(self.folder / "last.pt", {
                "format": "emobert-run", "settings": vars(self.settings), "step": self.step, "finished": self.finished, "sums": self.sums,
                "read": self.read, "best": self.best, "best_epoch": self.best_epoch, "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "random": states})

    def restore(self) -> None:
        path = self.folder / "last.pt"
        state = open_pickle(path, "the state of a run")
        if not isinstance(state, dict) or state.get("format") != "emobert-run":
            raise ValueError(f"{path}: not the state of a run")
        try:
            for name, value in vars(self.settings).items():
                if state["settings"][name] != value and name not in MAY_CHANGE:
                    raise ValueError(f"{name} was {state['settings'][name]!r}, not {value!r}")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.finished, self.sums, self.read, self.best, self.best_epoch = (
                state[name] for name in ("step", "finished", "sums", "read", "best", "best_epoch"))
            own = state["random"][self.rank * len(state["random"]) // self.world:]
            torch.set_rng_state(own[0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(own[1], self.device)
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: does not fit this run ({' '.join(str(error).split())[:200]})") from None
        self.say(f"resumed   after step {self.step:,} of {self.epoch_length * self.settings.epochs:,}")

    # The loop.

    def train(self) -> bool:
        """Runs to the end, or until a signal asks to stop; True if it came to the end."""
        s = self.settings
        while self.finished < s.epochs:
            if s.patience and self.finished - self.best_epoch >= s.patience:
                self.say(f"stopped early: no better validation macro-F1 for {s.patience} epochs")
                break
            if not self.train_epoch(self.finished):
                self.save()
                return False
        return True

    def train_epoch(self, epoch: int) -> bool:
        """The steps of an epoch that are not done yet, and its line in metrics.jsonl; False if a signal asked to stop before."""
        s, done = self.settings, self.step - epoch * self.epoch_length
        plan = epoch_steps(self.rows["train"], s.batch_size, s.pairing, s.seed, epoch)
        began = saved = time.monotonic()
        with tqdm(total=len(plan), initial=done, desc=f"epoch {epoch + 1}/{s.epochs}", unit=" steps",
                  disable=True if self.rank else None, leave=False) as bar:
            for step in plan[done:]:
                if self.stopping:
                    return False
                losses, tokens, places = self.train_step(step)
                due, self.stopping = time.monotonic() - saved > SAVE_EVERY, self.stop
                if self.world > 1:      # all processes must count alike, and stop and save together
                    shared = torch.tensor([*losses.values(), tokens, places, self.stopping, due], dtype=torch.float64, device=self.device)
                    dist.all_reduce(shared)
                    *sums, tokens, places, stop, due = shared.tolist()
                    losses, self.stopping = dict(zip(losses, (value / self.world for value in sums))), stop > 0
                self.step += 1
                self.read = [self.read[0] + int(tokens), self.read[1] + int(places)]
                for task, loss in losses.items():
                    self.sums[task] += loss
                bar.update()
                if due:
                    self.save()
                    saved = time.monotonic()
        seconds = time.monotonic() - began
        record = {"epoch": epoch + 1, "step": self.step, "loss": {t: v / self.epoch_length for t, v in self.sums.items()},
                  "learning_rate": self.optimizer.param_groups[0]["lr"], "seconds": round(seconds, 2),
                  "rows_per_second": round((len(plan) - done) * s.batch_size * len(self.tasks) / max(seconds, 1e-9)),
                  "padding": round(1 - self.read[0] / self.read[1], 4), "validation": self.score("validation")}
        record["validation_loss"] = {task: v.pop("loss") for task, v in record["validation"].items()}
        f1 = [v["f1_macro"] for v in record["validation"].values()]
        mean = sum(f1) / len(f1) if f1 else 0.0
        record["best"] = not f1 or mean > self.best or s.keep == "last"
        if record["best"]:
            self.best, self.best_epoch = mean, epoch + 1
        if record["best"] and self.rank == 0:
            # A checkpoint travels: it says what it was made from, but not where that was. Half precision is plenty for answers.
            settings = {k: Path(v).name if k in PLACES and v else v for k, v in vars(s).items()}
            save_checkpoint(self.folder / "best.pt", self.model, self.tokenizer, dtype=torch.float16, settings=settings,
                            epoch=epoch + 1, validation=record["validation"], temperature=self.temperature)
        if self.rank == 0:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
        self.log_to_tensorboard(record)
        self.finished = epoch + 1
        self.sums, self.read = dict.fromkeys(self.tasks, 0.0), [0, 0]
        self.save()
        self.say(f"epoch {epoch + 1:2}  loss " + ", ".join(f"{task} {value:.4f}" for task, value in record["loss"].items())
              + "  validation " + ", ".join(f"{task} accuracy {v['accuracy']:.4f} macro-F1 {v['f1_macro']:.4f}"
                                            for task, v in record["validation"].items())
              + f"  {record['rows_per_second']:,} rows/s, {record['padding']:.0%} padding" + ("  best so far" if record["best"] else ""))
        return True

    def train_step(self, step: dict[str, Tensor]) -> tuple[dict[str, float], int, int]:
        """One update from the rows of all tasks; the loss of each task, tokens read and places computed."""
        s, train = self.settings, self.rows["train"]
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * learning_rate_factor(self.step, self.epoch_length * s.epochs, s.schedule)
        step = {task: rows[self.rank::self.world].to(self.device) for task, rows in step.items()}
        share = s.batch_size // self.world
        width = s.width or int(torch.stack([train[task].lengths[rows].max() for task, rows in step.items()]).max())
        parts = [train[task].batch(rows, width) for task, rows in step.items()]
        input_ids, attention_mask = (torch.cat(tensors) for tensors in zip(*parts))                  # (tasks * batch, T)
        labels = {task: torch.full((len(input_ids),), IGNORED, device=self.device) for task in step}
        for i, (task, rows) in enumerate(step.items()):
            labels[task][i * share:(i + 1) * share] = self.labels["train"][task][rows]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=s.amp):
            logits = self.model(input_ids, attention_mask)
        logits = {task: values.float() for task, values in logits.items()}
        loss, losses = multitask_loss(logits, labels, self.task_weights, self.class_weights)
        if self.soft_targets:
            teacher = {task: torch.cat([self.soft_targets[own][task][rows.cpu()] for own, rows in step.items()]).to(self.device)
                       for task in self.tasks}
            loss = (1 - SOFT) * loss + SOFT * soft_loss(logits, teacher, self.task_weights)
        self.optimizer.zero_grad()
        loss.backward()
        if self.world > 1:      # the mean over the whole batch is the mean of the means over equal shares
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.world
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        if not torch.isfinite(norm):      # nor is it if the loss is not; the weights are still good
            saved = self.folder / "last.pt"
            raise ValueError(f"the loss is {loss.item():g} and its gradient {norm.item():g} at step {self.step + 1}: a smaller --lr may help. "
                             + (f"The last good state is in {saved}" if saved.exists() else "Nothing was saved yet"))
        self.optimizer.step()
        return {task: value.item() for task, value in losses.items()}, int(attention_mask.sum()), attention_mask.numel()

    def score(self, split: str) -> dict[str, dict]:
        """task -> scores and mean cross-entropy on a split, for the tasks that have rows there.

        On the validation split each head's temperature is fitted along the way (Guo et al. 2017), and the calibration error is
        given before and after; on the test split the accuracy on texts with and without a copy in training.
        """
        result = {}
        if split == "validation":
            self.temperature = {}
        for task in self.tasks:
            if not len(self.rows[split][task]):
                continue
            logits = predict(self.model, self.rows[split][task], self.settings.amp, f"{split} {task}")[task]
            labels, predicted = self.labels[split][task].cpu(), logits.argmax(-1)
            result[task] = scores(confusion_matrix(labels, predicted, len(data.LABELS[task])))
            result[task]["loss"] = F.cross_entropy(logits, labels).item()
            if split == "validation":
                self.temperature[task] = fit_temperature(logits, labels)
            result[task]["ece"] = expected_calibration_error(logits.softmax(-1), labels)
            result[task]["ece_calibrated"] = expected_calibration_error((logits / self.temperature.get(task, 1.0)).softmax(-1), labels)
            if split == "test":
                right, copied = (predicted == labels).float(), self.copied[task]
                result[task]["copied"] = {"rows": int(copied.sum()), "accuracy": right[copied].mean().item() if copied.any() else None,
                                          "accuracy_fresh": right[~copied].mean().item() if not copied.all() else None}
        return result

    def log_to_tensorboard(self, record: dict) -> None:
        if not self.settings.tensorboard or self.rank:
            return
        from torch.utils.tensorboard import SummaryWriter  # checked when the run began
        with SummaryWriter(str(self.folder)) as writer:
            for task in record["loss"]:
                writer.add_scalar(f"{task}/loss", record["loss"][task], record["step"])
                for name, value in record["validation"].get(task, {}).items():
                    if isinstance(value, float):
                        writer.add_scalar(f"{task}/validation {name}", value, record["step"])


def replace_text(path: Path, text: str) -> None:
    """Writes a small text file to a temporary name and renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def report(results: dict[str, dict]) -> str:
    """task -> scores, as a table that a person can read: totals, then a line a class."""
    lines = []
    for task, s in results.items():
        lines.append(f"{task}: accuracy {s['accuracy']:.4f}, macro precision {s['precision_macro']:.4f}, recall {s['recall_macro']:.4f}, "
                     f"F1 {s['f1_macro']:.4f}, MCC {s['mcc']:.4f}")
        if "ece" in s:
            lines.append(f"  expected calibration error {s['ece']:.4f}, with the head's temperature {s['ece_calibrated']:.4f}")
        if s.get("copied", {}).get("rows"):
            fresh = s["copied"]["accuracy_fresh"]
            lines.append(f"  {s['copied']['rows']:,} test texts have a copy in training: accuracy {s['copied']['accuracy']:.4f} on them"
                         + (f", {fresh:.4f} on the others" if fresh is not None else ""))
        lines.append(f"  {'':10} {'precision':>9} {'recall':>9} {'F1':>9} {'rows':>7}")
        for name, c in zip(data.LABELS[task], s["per_class"]):
            lines.append(f"  {name:10} {c['precision']:9.4f} {c['recall']:9.4f} {c['f1']:9.4f} {c['support']:7,}")
    return "\n".join(lines)


DEFAULTS = dict(alpha=0.2, beta=0.8, task=None, mixture="auto", data_dir=None, encoder="auto", init_from=None, teacher=None, recipe="tuned",
                class_weights="none", limit=None, device="auto", amp=False, tensorboard=False, seed=1, seeds=1, run=None, resume=None)


def arguments(argv=None) -> tuple[argparse.Namespace, dict]:
    """The command line -> all settings, those that were left out filled in from the recipe and DEFAULTS; and what was given."""
    parser = Parser("train.py", __doc__)
    tuned = RECIPES["tuned"]

    def add(option: str, help: str, **more):
        parser.add_argument(option, default=None, help=help, **more)      # None: not given
    add("--alpha", "weight of the sentiment loss (default 0.2)", type=number(least=0))
    add("--beta", "weight of the emotion loss (default 0.8)", type=number(least=0))
    add("--task", "train one task only", choices=list(data.LABELS))
    add("--mixture", "what to train on: starter, open, paper, all, or names of sources with commas (see python data.py); default: open if it "
                     "can be had, else starter")
    add("--data-dir", "where the sources are (default $EMOBERT_DATA, else ~/.cache/emobert/data)", metavar="DIR")
    add("--encoder", "where the weights start: prajjwal1/bert-tiny, a folder with a pretrained BERT, a checkpoint (.pt), or random; default: "
                     "bert-tiny if it can be had, else the encoder of the bundled model")
    add("--init-from", "start the embeddings from the principal components of this larger BERT's", metavar="FOLDER")
    add("--teacher", "learn from the answers of this larger EmoBERT as well", metavar="CHECKPOINT")
    add("--recipe", "the settings below: tuned on validation data (default), or the paper's", choices=list(RECIPES))
    add("--epochs", f"tuned: {tuned['epochs']}", type=number(int, above=0))
    add("--batch-size", f"rows of each task in a step; tuned: {tuned['batch_size']}", type=number(int, above=0))
    add("--lr", f"highest learning rate of AdamW; tuned: {tuned['lr']}", type=number(above=0))
    add("--weight-decay", f"tuned: {tuned['weight_decay']}", type=number(least=0))
    add("--max-length", f"tokens that are read of a text; tuned: {tuned['max_length']}", type=number(int, least=2))
    add("--dropout", f"tuned: {tuned['dropout']}", type=number(least=0, below=1))
    add("--pairing", "an epoch ends when the longest task has been seen (the others start over), or when the shortest has (its surplus is "
                     "dropped, as published); tuned: longest", choices=("longest", "shortest"))
    add("--patience", f"epochs without a better validation macro-F1 before it stops, 0: never; tuned: {tuned['patience']}",
        type=number(int, least=0))
    add("--protocol", "published: copies of texts are kept and one random cut makes the splits, as the paper did; tuned: corrected",
        choices=("corrected", "published"))
    add("--class-weights", "balanced: rare classes count for more in the loss (default none; of several processes, each takes its own mean)", choices=("none", "balanced"))
    add("--limit", "use the first N rows of each split and task only, for a quick try", type=number(int, above=0), metavar="N")
    add("--device", "cpu, cuda, mps (default: the best there is)")
    add("--amp", "compute in bfloat16 where that is safe", action="store_true")
    add("--tensorboard", "write the metrics for TensorBoard into the run's folder as well", action="store_true")
    add("--seeds", "repeat the run with N seeds, --seed and those after it, and report mean and deviation", type=number(int, above=0), metavar="N")
    add("--seed", "whole number (default 1)", type=number(int, least=0, below=2**31))
    add("--run", "name of the run's folder below runs/ (default: the date and time)", metavar="NAME")
    add("--resume", "go on with the run in this folder; its settings come from its config.json", metavar="RUN")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    settings = argparse.Namespace(**{**DEFAULTS, **RECIPES[given.get("recipe", DEFAULTS["recipe"])], **given})
    if not settings.task and settings.alpha == settings.beta == 0:
        parser.error("--alpha and --beta are both 0: nothing would be learned")
    return settings, given


def settings_of(folder: Path, given: dict) -> argparse.Namespace:
    """The settings of the run in `folder`, for --resume. Raises FileNotFoundError, or ValueError naming an option that differs."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: not the folder of a run (it has no config.json)")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        missing = ({**DEFAULTS, **RECIPES["tuned"]}).keys() - settings.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if missing:
        raise ValueError(f"{path}: damaged (it lacks {', '.join(sorted(missing))})")
    for name, value in given.items():
        if name not in ("resume", *MAY_CHANGE) and settings[name] != value:
            raise ValueError(f"{folder} was started with {name} = {settings[name]!r}, not {value!r}: resume it without that option, or start a new run")
    return argparse.Namespace(**{**settings, **{name: given[name] for name in MAY_CHANGE if name in given}})


def run_once(settings: argparse.Namespace, folder: Path, resume: bool) -> dict | None:
    """One run from start, or from where it was, to its test report; None if a signal stopped it. Returns task -> scores."""
    run = Run(settings, folder, resume)

    def ask_to_stop(which, _):
        run.stop = True
        signal.signal(which, signal.default_int_handler if which == signal.SIGINT else signal.SIG_DFL)      # the second time at once
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, ask_to_stop)
    if not run.train():
        run.say(f"stopped after step {run.step:,}, all saved; go on with: python train.py --resume {folder}")
        return None
    if run.world > 1:
        dist.barrier()      # until the first process has written best.pt
    run.model, _, meta = load_checkpoint(folder / "best.pt", settings.device)
    run.temperature = meta["temperature"]
    results = run.score("test")
    run.say(f"\ntest split, weights of epoch {run.best_epoch}\n{report(results)}")
    if run.rank == 0:
        replace_text(folder / "test.json", json.dumps(results) + "\n")
    run.say(f"\nuse it: python infer.py --checkpoint {folder / 'best.pt'} \"I can't wait to see you\"")
    return results


def over_seeds(results: list[dict]) -> dict[str, dict[str, tuple[float, float]]]:
    """Test scores of several runs -> task -> metric -> (mean, standard deviation)."""
    summary: dict = {}
    for task in results[0]:
        for name, value in results[0][task].items():
            if isinstance(value, float):
                values = torch.tensor([result[task][name] for result in results], dtype=torch.float64)
                summary.setdefault(task, {})[name] = (values.mean().item(), values.std().item())
    return summary


def main(argv=None) -> int:
    settings, given = arguments(argv)
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package: pip install tensorboard")
    if "LOCAL_RANK" in os.environ:      # started by torchrun
        if choose_device(settings.device) == "cuda":
            settings.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(settings.device)
        dist.init_process_group("nccl" if settings.device.startswith("cuda") else "gloo")
    if settings.resume:
        folder = Path(settings.resume)
        settings = settings_of(folder, given)
        settings.device = choose_device(settings.device)
        return 130 if run_once(settings, folder, resume=True) is None else 0
    settings.device = choose_device(settings.device)
    names = [settings.run or time.strftime("%Y-%m-%d-%H%M%S")]
    if dist.is_initialized():
        dist.broadcast_object_list(names)      # their clocks may differ by a second
    (name,), results = names, []
    seeds = range(settings.seed, settings.seed + settings.seeds)
    folders = {seed: Path("runs") / (name if len(seeds) == 1 else f"{name}-{seed}") for seed in seeds}
    for folder in folders.values():
        if folder.exists() and os.environ.get("RANK", "0") == "0":
            raise ValueError(f"{folder} exists: go on with --resume {folder}, or give another name with --run")
    for seed, folder in folders.items():
        result = run_once(argparse.Namespace(**{**vars(settings), "seed": seed, "seeds": 1, "run": folder.name}), folder, resume=False)
        if result is None:
            return 130
        results.append(result)
    if len(seeds) > 1:
        summary = over_seeds(results)
        print(f"\ntest split, mean and standard deviation over {len(seeds)} seeds")
        for task, metrics in summary.items():
            print(f"{task:9} " + ", ".join(f"{metric} {mean:.4f} ± {deviation:.4f}" for metric, (mean, deviation) in metrics.items()
                                           if metric in ("accuracy", "f1_macro", "recall_macro", "mcc", "ece_calibrated")))
        replace_text(Path("runs") / f"{name}-seeds.json", json.dumps(summary) + "\n")
    return 0


if __name__ == "__main__":
    command.run(main)
