"""ddp-tutorial-series style: torchrun, Trainer with snapshots and resume, SyncBN, validation by shard."""

import argparse
import os
import shutil
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler


class MyTrainDataset(Dataset):
    def __init__(self, size, seed=0):
        self.size = size
        g = torch.Generator().manual_seed(seed)
        self.data = [(torch.rand(20, generator=g), torch.rand(1, generator=g)) for _ in range(size)]

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.data[index]


def ddp_setup():
    init_process_group(backend="gloo")


class Trainer:
    def __init__(self, model, train_data, val_data, optimizer, save_every, snapshot_path):
        self.gpu_id = int(os.environ["LOCAL_RANK"])
        self.global_rank = int(os.environ["RANK"])
        self.model = model
        self.train_data = train_data
        self.val_data = val_data
        self.optimizer = optimizer
        self.save_every = save_every
        self.epochs_run = 0
        self.snapshot_path = snapshot_path
        if os.path.exists(snapshot_path):
            self._load_snapshot(snapshot_path)
        self.model = DDP(self.model)

    def _load_snapshot(self, snapshot_path):
        snapshot = torch.load(snapshot_path, map_location="cpu")
        self.model.load_state_dict(snapshot["MODEL_STATE"])
        self.epochs_run = snapshot["EPOCHS_RUN"]
        if self.global_rank == 0:
            print(f"Resuming training from snapshot at Epoch {self.epochs_run}")

    def _run_batch(self, source, targets):
        self.optimizer.zero_grad()
        output = self.model(source)
        loss = F.mse_loss(output, targets)
        loss.backward()
        self.optimizer.step()

    def _run_epoch(self, epoch):
        self.train_data.sampler.set_epoch(epoch)
        self.model.train()
        for source, targets in self.train_data:
            self._run_batch(source, targets)

    @torch.no_grad()
    def _validate(self):
        self.model.eval()
        loss, seen = torch.zeros(()), torch.zeros(())
        for source, targets in self.val_data:
            loss += F.mse_loss(self.model(source), targets, reduction="sum")
            seen += len(source)
        dist.all_reduce(loss, op=dist.ReduceOp.SUM)
        dist.all_reduce(seen, op=dist.ReduceOp.SUM)
        return (loss / seen).item()

    def _save_snapshot(self, epoch):
        snapshot = {"MODEL_STATE": self.model.module.state_dict(), "EPOCHS_RUN": epoch}
        torch.save(snapshot, self.snapshot_path)

    def train(self, max_epochs):
        for epoch in range(self.epochs_run, max_epochs):
            self._run_epoch(epoch)
            val = self._validate()
            if self.global_rank == 0:
                print(f"[GPU{self.global_rank}] Epoch {epoch} | val {val:.4f}")
            if self.global_rank == 0 and epoch % self.save_every == 0:
                self._save_snapshot(epoch)


def load_train_objs():
    torch.manual_seed(1)
    train_set = MyTrainDataset(128)
    model = torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return train_set, model, optimizer


def prepare_dataloader(dataset, batch_size):
    return DataLoader(
        dataset, batch_size=batch_size, pin_memory=False, shuffle=False, sampler=DistributedSampler(dataset)
    )


def prepare_validation(dataset, batch_size):
    rank, world = dist.get_rank(), dist.get_world_size()
    part = torch.utils.data.Subset(dataset, list(range(rank, len(dataset), world)))
    return DataLoader(part, batch_size=batch_size)


def main(save_every, total_epochs, batch_size):
    ddp_setup()
    folder = os.path.join(tempfile.gettempdir(), f"snap-{os.environ['MASTER_PORT']}")
    os.makedirs(folder, exist_ok=True)
    dataset, model, optimizer = load_train_objs()
    train_data = prepare_dataloader(dataset, batch_size)
    val_data = prepare_validation(MyTrainDataset(33, seed=5), batch_size)
    trainer = Trainer(model, train_data, val_data, optimizer, save_every, os.path.join(folder, "snapshot.pt"))
    trainer.train(total_epochs)
    dist.barrier()
    if trainer.global_rank == 0:
        shutil.rmtree(folder)
    destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="simple distributed training job")
    parser.add_argument("--total_epochs", type=int, default=2)
    parser.add_argument("--save_every", type=int, default=1)
    parser.add_argument("--batch_size", default=16, type=int)
    args = parser.parse_args()
    main(args.save_every, args.total_epochs, args.batch_size)
