"""FSDP2: fully_shard per block, distributed checkpoint, clip of DTensors, mixed precision."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def build():
    return nn.Sequential(
        nn.Embedding(40, 16),
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
        nn.Linear(16, 40),
    )


def main():
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    model = build()
    policy = MixedPrecisionPolicy()
    for layer in model:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 40, (128, 9), generator=torch.Generator().manual_seed(3))
    data = TensorDataset(ids)
    sampler = DistributedSampler(data, shuffle=True)
    loader = DataLoader(data, batch_size=8, sampler=sampler, drop_last=True)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for i, (t,) in enumerate(loader):
            model.set_requires_gradient_sync(i % 2 == 1)
            logits = model(t[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), t[:, 1:].flatten()) / 2
            loss.backward()
            if i % 2 == 1:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optim.step()
                optim.zero_grad()
    folder = os.path.join(tempfile.gettempdir(), f"dcp-{os.environ['MASTER_PORT']}")
    m, o = get_state_dict(model, optim)
    dcp.save({"model": m, "optim": o}, checkpoint_id=folder)
    if rank == 0:
        print("saved")
        import shutil

        shutil.rmtree(folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
