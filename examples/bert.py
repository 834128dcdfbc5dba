"""Pretrain a small BERT on the reference manual that Python has in its library, then fine-tune it to name the topic.

ddparity run --nproc 2 examples/bert.py                          # add --reduction strict for equal bits
"""

import re
from collections import Counter
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Literal

import torch
import torch.nn.functional as F
import typer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import OneCycleLR

import ddparity as dp

PAD, FIRST, MASK, UNKNOWN = range(4)
NO_TARGET = -100
WIDTH, HEADS, LAYERS, DROPOUT, LONGEST = 64, 4, 2, 0.1, 64
MAX_TOKENS, MICRO_BATCHES = 256, 4
TOPICS = ["compound", "string-methods", "debugger", "formatstrings", "import", "typesmapping"]


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def read_sentences() -> list[tuple[list[str], int]]:
    """Return the sentences that only one topic has, each as its words and its topic, or -1."""
    found: dict[str, set[str]] = {}
    for topic, text in topics.items():
        for sentence in re.split(r"(?<=[.:])\s+", " ".join(text.split())):
            found.setdefault(sentence, set()).add(topic)
    number = {frozenset([topic]): number for number, topic in enumerate(TOPICS)}
    sentences = [(words_of(one)[: LONGEST - 1], number.get(frozenset(where), -1)) for one, where in found.items()]
    return [(words, topic) for words, topic in sentences if len(words) >= 5]


class Bert(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LONGEST, WIDTH)
        nn.init.normal_(self.word.weight, std=0.1)
        nn.init.normal_(self.place.weight, std=0.1)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, DROPOUT, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.layers(self.word(tokens) + self.place(places), src_key_padding_mask=tokens == PAD)


class TopicHead(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden[:, 0])


Sample = tuple[torch.Tensor, int]  # a sentence's tokens, and its topic


def masked(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Return padded sentences in which words are hidden. What is hidden follows from the micro-batch's seed."""
    tokens = pad_sequence([tokens for tokens, _ in samples], batch_first=True, padding_value=PAD)
    hidden = (torch.rand(tokens.shape) < 0.15) & (tokens > UNKNOWN)
    return {"tokens": tokens.masked_fill(hidden, MASK), "labels": tokens.masked_fill(~hidden, NO_TARGET)}


def labelled(samples: list[Sample]) -> dict[str, torch.Tensor]:
    tokens = pad_sequence([tokens for tokens, _ in samples], batch_first=True, padding_value=PAD)
    return {"tokens": tokens, "labels": torch.tensor([topic for _, topic in samples])}


def train(
    model: nn.Module,
    samples: list[Sample],
    collate: Callable[[list[Sample]], dict[str, torch.Tensor]],
    steps: int,
    rate: float,
) -> float:
    """Train for so many steps, and return the loss of the last one."""
    # At most so many tokens in a micro-batch, with the padding: few long sentences, or many short ones.
    plan = dp.LengthPlan([len(tokens) for tokens, _ in samples], max_units=MAX_TOKENS, micro_batches=MICRO_BATCHES)
    loader = dp.Loader(samples, plan, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    scheduler = OneCycleLR(optimizer, rate, total_steps=steps)
    device = next(model.parameters()).device
    for step in loader.steps(steps):
        total = torch.zeros((), device=device)
        # The mean of a micro-batch is over its targets: hidden words, or sentences.
        for micro in dp.accumulate(model, step, count=lambda data: (data["labels"] != NO_TARGET).sum()):
            logits, labels = model(micro.data["tokens"]), micro.data["labels"]
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=NO_TARGET)
            (loss * micro.weight).backward()
            total += loss.detach() * micro.share
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return dp.reduce(total).item()


def main(pretrain: int = 300, steps: int = 200, reduction: Literal["fast", "strict"] = "fast") -> str:
    """Pretrain and fine-tune for so many steps, and return the fingerprint of the fine-tuned weights."""
    with dp.world() as world:
        dp.setup_logging()
        dp.seed_everything(0)
        sentences = read_sentences()
        common = Counter(word for words, _ in sentences for word in words).most_common(2000)
        code = {word: number for number, (word, _) in enumerate(common, start=UNKNOWN + 1)}
        samples = [(torch.tensor([FIRST, *(code.get(w, UNKNOWN) for w in words)]), t) for words, t in sentences]
        of_topics = [sample for sample in samples if sample[1] >= 0]
        held_out = of_topics[::5]
        of_topics = [sample for number, sample in enumerate(of_topics) if number % 5]

        bert = Bert(len(code) + UNKNOWN + 1)
        model = dp.replicate(nn.Sequential(bert, nn.Linear(WIDTH, len(code) + UNKNOWN + 1)).to(world.device), reduction)
        loss = train(model, samples, masked, pretrain, 2e-3)
        if world.rank == 0:
            print(f"{len(samples)} sentences, loss of hidden words {loss:.3f}")

        model = dp.replicate(nn.Sequential(bert, TopicHead(WIDTH, len(TOPICS))).to(world.device), reduction)
        loss = train(model, of_topics, labelled, steps, 1e-3)
        logits = dp.predict(model, held_out, 64, inputs=lambda data: data["tokens"], collate_fn=labelled)  # on rank 0
        fingerprint = dp.fingerprint(model)
        if world.rank == 0:
            right = logits.argmax(1).cpu() == torch.tensor([topic for _, topic in held_out])
            print(f"{len(of_topics)} sentences of {len(TOPICS)} topics, loss {loss:.3f}")
            print(f"accuracy of {len(held_out)} others {right.float().mean():.3f}\nfingerprint {fingerprint}")
        return fingerprint


if __name__ == "__main__":
    typer.run(main)
