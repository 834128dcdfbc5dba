"""In the way of pytorch/examples imagenet: meters, a step schedule, workers with augmentation, an exact validation."""

import argparse
import os
import random
import shutil
import tempfile
import time
from enum import Enum

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.parallel
import torch.optim
import torch.utils.data
import torch.utils.data.distributed
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import Dataset, Subset


class FakeImages(Dataset):
    def __init__(self, count, train):
        state = np.random.RandomState(int(train))
        self.images = state.rand(count, 3, 8, 8).astype("float32")
        self.targets = state.randint(0, 4, count)
        self.train = train

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = torch.from_numpy(self.images[index])
        if self.train:
            top, left = random.randint(0, 2), random.randint(0, 2)
            image = image[:, top : top + 6, left : left + 6]
            if torch.rand(1) < 0.5:
                image = image.flip(2)
        else:
            image = image[:, 1:7, 1:7]
        return image, int(self.targets[index])


class Summary(Enum):
    NONE = 0
    AVERAGE = 1


class AverageMeter:
    def __init__(self, name, fmt=":f", summary_type=Summary.AVERAGE):
        self.name, self.fmt, self.summary_type = name, fmt, summary_type
        self.reset()

    def reset(self):
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val, n=1):
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count

    def all_reduce(self):
        total = torch.tensor([self.sum, self.count], dtype=torch.float32)
        dist.all_reduce(total, dist.ReduceOp.SUM, async_op=False)
        self.sum, self.count = total.tolist()
        self.avg = self.sum / self.count


def accuracy(output, target, topk=(1,)):
    with torch.no_grad():
        _, pred = output.topk(max(topk), 1, True, True)
        correct = pred.t().eq(target.view(1, -1).expand_as(pred.t()))
        return [correct[:k].reshape(-1).float().sum(0, keepdim=True).mul_(100.0 / target.size(0)) for k in topk]


def train(loader, model, criterion, optimizer, epoch, args):
    batch_time, losses, top1 = AverageMeter("Time"), AverageMeter("Loss"), AverageMeter("Acc@1")
    model.train()
    end = time.time()
    for i, (images, target) in enumerate(loader):
        output = model(images)
        loss = criterion(output, target)
        (acc1,) = accuracy(output, target)
        losses.update(loss.item(), images.size(0))
        top1.update(acc1[0].item(), images.size(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        batch_time.update(time.time() - end)
        end = time.time()
        if i % args.print_freq == 0 and args.rank == 0:
            print(f"Epoch: [{epoch}][{i}/{len(loader)}] loss {losses.avg:.3f} acc {top1.avg:.2f}")


def validate(loader, model, criterion, args):
    losses, top1 = AverageMeter("Loss"), AverageMeter("Acc@1")

    def run_validate(loader):
        with torch.no_grad():
            for images, target in loader:
                output = model(images)
                losses.update(criterion(output, target).item(), images.size(0))
                top1.update(accuracy(output, target)[0][0].item(), images.size(0))

    model.eval()
    run_validate(loader)
    losses.all_reduce()
    top1.all_reduce()
    if len(loader.sampler) * args.world_size < len(loader.dataset):
        rest = Subset(loader.dataset, range(len(loader.sampler) * args.world_size, len(loader.dataset)))
        run_validate(torch.utils.data.DataLoader(rest, batch_size=args.batch_size, shuffle=False))
    if args.rank == 0:
        print(f" * Acc@1 {top1.avg:.3f}")
    return top1.avg


def save_checkpoint(state, is_best, folder):
    torch.save(state, os.path.join(folder, "checkpoint.pth.tar"))
    if is_best:
        shutil.copyfile(os.path.join(folder, "checkpoint.pth.tar"), os.path.join(folder, "model_best.pth.tar"))


def main_worker(args):
    dist.init_process_group(backend="gloo", init_method="env://")
    args.rank, args.world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    model = torch.nn.parallel.DistributedDataParallel(model)
    random.seed(args.seed + args.rank)
    np.random.seed(args.seed + args.rank)
    torch.manual_seed(args.seed + args.rank)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    train_dataset, val_dataset = FakeImages(96, True), FakeImages(43, False)
    train_sampler = torch.utils.data.distributed.DistributedSampler(train_dataset)
    val_sampler = torch.utils.data.distributed.DistributedSampler(val_dataset, shuffle=False, drop_last=True)
    train_loader = torch.utils.data.DataLoader(
        train_dataset,
        batch_size=args.batch_size,
        shuffle=(train_sampler is None),
        num_workers=args.workers,
        sampler=train_sampler,
    )
    val_loader = torch.utils.data.DataLoader(
        val_dataset, batch_size=args.batch_size, shuffle=False, sampler=val_sampler
    )
    best = 0
    with tempfile.TemporaryDirectory() as folder:
        for epoch in range(args.epochs):
            train_sampler.set_epoch(epoch)
            train(train_loader, model, criterion, optimizer, epoch, args)
            acc1 = validate(val_loader, model, criterion, args)
            scheduler.step()
            is_best, best = acc1 > best, max(acc1, best)
            if args.rank == 0:
                save_checkpoint({"epoch": epoch + 1, "state_dict": model.state_dict(), "best": best}, is_best, folder)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", default=2, type=int)
    parser.add_argument("-b", "--batch-size", default=12, type=int)
    parser.add_argument("--lr", default=0.1, type=float)
    parser.add_argument("--seed", default=1, type=int)
    parser.add_argument("-j", "--workers", default=2, type=int)
    parser.add_argument("-p", "--print-freq", default=2, type=int)
    main_worker(parser.parse_args())


if __name__ == "__main__":
    main()
