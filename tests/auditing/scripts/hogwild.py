"""Hogwild: processes without a group train one model in shared memory, each on its own shuffle of all samples."""

import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def make_data(seed, count):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(1) > 0).long())


def train(number, model):
    torch.manual_seed(100 + number)
    loader = DataLoader(make_data(1, 64), batch_size=8, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        print(f"process {number}, epoch {epoch}: {loss.item():.3f}")


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    model.share_memory()
    processes = [mp.Process(target=train, args=(number, model)) for number in range(2)]
    for one in processes:
        one.start()
    for one in processes:
        one.join()
    x, y = make_data(2, 32).tensors
    with torch.no_grad():
        print(f"accuracy {(model(x).argmax(1) == y).float().mean():.3f}")


if __name__ == "__main__":
    main()
