"""In the way of fine-tuning scripts: dict batches, a collate function, token-weighted loss, logging, exact gathers."""

import argparse
import logging
import math
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

logger = logging.getLogger(__name__)
PAD = -100


def tokenise(count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [{"ids": torch.randint(0, 19, (n,), generator=generator), "index": i} for i, n in enumerate(lengths)]


def collate(rows):
    ids = nn.utils.rnn.pad_sequence([row["ids"] for row in rows], batch_first=True, padding_value=0)
    labels = nn.utils.rnn.pad_sequence([row["ids"] for row in rows], batch_first=True, padding_value=PAD)
    return {"input_ids": ids, "labels": labels, "index": torch.tensor([row["index"] for row in rows])}


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.dropout = nn.Embedding(19, 12), nn.Dropout(0.1)
        self.rnn, self.head = nn.GRU(12, 12, batch_first=True), nn.Linear(12, 19)

    def forward(self, input_ids):
        return {"logits": self.head(self.rnn(self.dropout(self.embed(input_ids)))[0])}


def summed_loss(logits, labels):
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=PAD, reduction="sum"
    )


def windows(loader, size):
    window = []
    for batch in loader:
        window.append(batch)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def evaluate(model, loader, total):
    model.eval()
    outputs, indices = [], []
    with torch.no_grad():
        for batch in loader:
            logits = model(batch["input_ids"])["logits"]
            loss = nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], ignore_index=PAD, reduction="none"
            ).sum(1)
            outputs.append(loss)
            indices.append(batch["index"])
    both = [None] * dist.get_world_size()
    dist.all_gather_object(both, (torch.cat(outputs), torch.cat(indices)))
    found = torch.zeros(total)
    for values, at in both:
        found[at] = values  # a sample that the sampler repeats is written twice
    model.train()
    return found.mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gradient_accumulation_steps", type=int, default=3)
    parser.add_argument("--per_device_train_batch_size", type=int, default=4)
    parser.add_argument("--num_train_epochs", type=int, default=2)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    args = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    logging.basicConfig(stream=sys.stdout, level=logging.INFO if rank == 0 else logging.WARNING)
    torch.manual_seed(11)
    model = DistributedDataParallel(LM())
    torch.manual_seed(11 + rank)
    train, test = tokenise(80, 1), tokenise(21, 2)
    sampler = DistributedSampler(train, seed=11)
    loader = DataLoader(train, args.per_device_train_batch_size, sampler=sampler, collate_fn=collate)
    check = DataLoader(test, 4, sampler=DistributedSampler(test, shuffle=False), collate_fn=collate)
    decay = [p for n, p in model.named_parameters() if "bias" not in n]
    rest = [p for n, p in model.named_parameters() if "bias" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=5e-3
    )
    steps = args.num_train_epochs * math.ceil(len(loader) / args.gradient_accumulation_steps)
    schedule = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    for epoch in range(args.num_train_epochs):
        sampler.set_epoch(epoch)
        for window in windows(loader, args.gradient_accumulation_steps):
            tokens = sum((batch["labels"][:, 1:] != PAD).sum() for batch in window)
            dist.all_reduce(tokens)
            for i, batch in enumerate(window):
                model.require_backward_grad_sync = i == len(window) - 1
                loss = summed_loss(model(batch["input_ids"])["logits"], batch["labels"]) * world / tokens.item()
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        logger.info("epoch %d: %.4f", epoch, evaluate(model, check, len(test)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
