"""torchvision-references style: list batches, MetricLogger, warmup, reduce_dict, coco-like gather of predictions."""

import datetime
import os
import time
from collections import defaultdict, deque

import torch
import torch.distributed as dist
from torch import nn


class SmoothedValue:
    def __init__(self, window_size=20):
        self.deque, self.total, self.count = deque(maxlen=window_size), 0.0, 0

    def update(self, value, n=1):
        self.deque.append(value)
        self.count += n
        self.total += value * n

    def synchronize_between_processes(self):
        t = torch.tensor([self.count, self.total], dtype=torch.float64)
        dist.barrier()
        dist.all_reduce(t)
        self.count, self.total = int(t[0]), float(t[1])

    @property
    def global_avg(self):
        return self.total / self.count


class MetricLogger:
    def __init__(self, delimiter="  "):
        self.meters = defaultdict(SmoothedValue)
        self.delimiter = delimiter

    def update(self, **kwargs):
        for k, v in kwargs.items():
            self.meters[k].update(v.item() if isinstance(v, torch.Tensor) else v)

    def synchronize_between_processes(self):
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def log_every(self, iterable, print_freq, header):
        start = time.time()
        for i, obj in enumerate(iterable):
            yield obj
            if i % print_freq == 0:
                print(
                    header,
                    f"[{i}/{len(iterable)}]",
                    self.delimiter.join(f"{k}: {m.deque[-1]:.3f}" for k, m in self.meters.items()),
                )
        print(header, "Total time", str(datetime.timedelta(seconds=int(time.time() - start))))


def setup_for_distributed(is_master):
    import builtins as b

    builtin_print = b.print

    def pr(*args, **kwargs):
        force = kwargs.pop("force", False)
        if is_master or force:
            builtin_print(*args, **kwargs)

    b.print = pr


def reduce_dict(d):
    names = sorted(d)
    values = torch.stack([d[k] for k in names])
    dist.all_reduce(values)
    values /= dist.get_world_size()
    return dict(zip(names, values))


class Boxes(torch.utils.data.Dataset):
    def __init__(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        self.images = [torch.randn(3, 8, int(torch.randint(8, 12, (1,), generator=g)), generator=g) for _ in range(n)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        img = self.images[i]
        return img, {"image_id": i, "box": img.mean((1, 2)), "label": int(img.sum() > 0)}


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.cls, self.reg = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, images, targets=None):
        f = torch.stack([torch.relu(self.conv(im[None])).mean((2, 3))[0] for im in images])
        c, r = self.cls(f), self.reg(f)
        if self.training:
            return {
                "loss_classifier": nn.functional.cross_entropy(c, torch.tensor([t["label"] for t in targets])),
                "loss_box_reg": nn.functional.smooth_l1_loss(r, torch.stack([t["box"] for t in targets])),
            }
        return [{"score": s} for s in c.softmax(1)]


def collate_fn(batch):
    return tuple(zip(*batch))


def train_one_epoch(model, optimizer, loader, epoch, print_freq):
    model.train()
    logger = MetricLogger()
    scheduler = None
    if epoch == 0:
        n = min(1000, len(loader) - 1)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0 / 1000, total_iters=n)
    for images, targets in logger.log_every(loader, print_freq, f"Epoch: [{epoch}]"):
        loss_dict = model(images, targets)
        losses = sum(loss for loss in loss_dict.values())
        with torch.no_grad():
            reduced = reduce_dict({k: v.detach() for k, v in loss_dict.items()})
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        logger.update(loss=sum(reduced.values()), lr=optimizer.param_groups[0]["lr"])


@torch.inference_mode()
def evaluate(model, loader):
    model.eval()
    logger = MetricLogger()
    mine = {}
    for images, targets in logger.log_every(loader, 100, "Test:"):
        t0 = time.time()
        outputs = model(list(images))
        mine.update({t["image_id"]: o["score"].argmax().item() == t["label"] for t, o in zip(targets, outputs)})
        logger.update(model_time=time.time() - t0)
    logger.synchronize_between_processes()
    everything = [None] * dist.get_world_size()
    dist.all_gather_object(everything, mine)
    merged = {}
    for one in everything:
        merged.update(one)
    print(f"accuracy {sum(merged.values()) / len(merged):.3f} over {len(merged)} images")


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    setup_for_distributed(rank == 0)
    dataset, dataset_test = Boxes(65, 0), Boxes(17, 1)
    train_sampler = torch.utils.data.distributed.DistributedSampler(dataset)
    test_sampler = torch.utils.data.distributed.DistributedSampler(dataset_test, shuffle=False)
    train_batch_sampler = torch.utils.data.BatchSampler(train_sampler, 4, drop_last=True)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=train_batch_sampler, num_workers=1, collate_fn=collate_fn
    )
    loader_test = torch.utils.data.DataLoader(dataset_test, batch_size=1, sampler=test_sampler, collate_fn=collate_fn)
    model = Detector()
    model_without_ddp = model
    model = nn.parallel.DistributedDataParallel(model)
    params = [p for p in model_without_ddp.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4)
    lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1], gamma=0.1)
    for epoch in range(2):
        train_sampler.set_epoch(epoch)
        train_one_epoch(model, optimizer, loader, epoch, 4)
        lr_scheduler.step()
        evaluate(model, loader_test)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
