"""fairseq: batches by tokens, an iterator of shards that fills with empty batches, gradients times world over sample size."""

import contextlib
import itertools
import math

import torch
import torch.distributed as dist
from torch import nn

PAD = 0


class Data(torch.utils.data.Dataset):
    def __init__(self, n=70):
        g = torch.Generator().manual_seed(0)
        self.s = [torch.randint(1, 15, (int(k),), generator=g) for k in torch.randint(3, 10, (n,), generator=g)]

    def __len__(self):
        return len(self.s)

    def __getitem__(self, i):
        return {"id": i, "src": self.s[i]}

    def collater(self, rows):
        if not rows:
            return {}
        x = nn.utils.rnn.pad_sequence([r["src"] for r in rows], batch_first=True, padding_value=PAD)
        return {"src": x, "ntokens": int((x[:, 1:] != PAD).sum())}


class Epochs:
    def __init__(self, data, rank, world):
        self.data, self.rank, self.world = data, rank, world
        order = sorted(range(len(data)), key=lambda i: len(data.s[i]))
        self.frozen = [order[i : i + 5] for i in range(0, len(order), 5)]

    def next_epoch_itr(self, epoch):
        import numpy as np

        b = list(self.frozen)
        np.random.RandomState(1 + epoch).shuffle(b)
        n = math.ceil(len(b) / self.world)
        mine = b[self.rank :: self.world]
        mine += [[]] * (n - len(mine))
        return torch.utils.data.DataLoader(self.data, collate_fn=self.data.collater, batch_sampler=mine, num_workers=0)


class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.l, self.o = nn.Embedding(15, 8, padding_idx=PAD), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 15)

    def forward(self, src):
        return self.o(self.l(self.e(src))[0])


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    data = Data()
    model = nn.parallel.DistributedDataParallel(M())
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    it = Epochs(data, rank, world)
    freq = 2
    dummy = data.collater([data[0]])
    for epoch in range(3):
        ep = iter(it.next_epoch_itr(epoch))
        while True:
            samples = list(itertools.islice(ep, freq))
            if not samples:
                break
            model.train()
            opt.zero_grad()
            size = 0
            for i, s in enumerate(samples):
                empty = not s
                s = s or dummy
                with model.no_sync() if i < len(samples) - 1 else contextlib.nullcontext():
                    out = model(s["src"][:, :-1])
                    loss = nn.functional.cross_entropy(
                        out.transpose(1, 2), s["src"][:, 1:], ignore_index=PAD, reduction="sum"
                    )
                    if empty:
                        loss = loss * 0.0
                    else:
                        size += s["ntokens"]
                    loss.backward()
            t = torch.tensor([float(size), loss.item()])
            dist.all_reduce(t)
            for p in model.parameters():
                p.grad.mul_(world / t[0])
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
        if rank == 0:
            print(f"epoch {epoch} loss {t[1] / t[0]:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
