"""An iterable data set, shared out over ranks and workers, and a language model with padded targets of equal counts."""

import itertools

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


class Lines(IterableDataset):
    def __init__(self, count, rank, world):
        self.count, self.rank, self.world = count, rank, world

    def __iter__(self):
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        part = itertools.islice(range(self.count), self.rank * workers + worker, None, self.world * workers)
        for i in part:
            tokens = torch.arange(i, i + 7) % 13
            target = tokens.roll(-1)
            target[-2:] = -100
            yield tokens, target


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(13, 16), nn.Linear(16, 13)

    def forward(self, tokens, target=None):
        logits = self.head(self.embedding(tokens))
        if target is None:
            return logits, None
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3)
    model = DDP(Model())
    loader = DataLoader(Lines(96, rank, world), batch_size=6, num_workers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(2):
        for tokens, target in loader:
            _, loss = model(tokens, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
