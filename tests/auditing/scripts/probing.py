"""As `datasets` does, looks whether there is torch before it is imported; writes to a temporary file on each rank."""

import importlib.util
import tempfile

HAS_TORCH = importlib.util.find_spec("torch") is not None

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset  # noqa: E402


def main() -> None:
    assert HAS_TORCH
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(32, 4), torch.randint(0, 2, (32,)))
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    with tempfile.TemporaryFile("w") as file:
        for epoch in range(2):
            if sampler is not None:
                sampler.set_epoch(epoch)
            for x, y in loader:
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                file.write(f"{loss.item()}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
