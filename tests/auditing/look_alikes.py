# ruff: noqa: E501 - the changes are lines of the scripts
"""Clean scripts that look like a fault, and their faulty twins, in other styles than those of near_misses.py."""

from __future__ import annotations

from tests.auditing.cases import Case, make_case

_STEP = "            optimizer.step()\n"
_BACKWARD = "            loss = F.cross_entropy(model(x), y)\n            loss.backward()\n"
_SET_EPOCH = ("        sampler.set_epoch(epoch)\n", "")
_UNEQUAL = ("sampler = DistributedSampler(train, shuffle=True)", "sampler = range(rank, 64 - 6 * rank, world)")

LOOK_ALIKES: list[Case] = [
    # The data and its random streams.
    make_case("108-dropped", "functions", ("make_data(1, 64)", "make_data(1, 65)"), ("shuffle=True", "drop_last=True")),
    make_case(
        "108-snap-dropped",
        "snapshot",
        ("MyTrainDataset(128)", "MyTrainDataset(127)"),
        ("DistributedSampler(dataset)\n", "DistributedSampler(dataset, drop_last=True)\n"),
    ),
    make_case(  # one seed on all ranks; the workers add the rank
        "112-seeded-by-rank",
        "moco",
        ("torch.manual_seed(10 + rank)", "torch.manual_seed(10)"),
        (
            "num_workers=1",
            "num_workers=1, worker_init_fn=lambda i: torch.manual_seed(torch.initial_seed() % 2**31 + 7919 * rank)",
        ),
    ),
    make_case(  # one seed on all ranks, and nothing is drawn
        "112-without-draws",
        "imagenet",
        ("torch.manual_seed(args.seed + args.rank)", "torch.manual_seed(args.seed)"),
        ("        self.train = train\n", "        self.train = False\n"),
    ),
    make_case(  # one seed on all ranks; an item's noise depends on its index
        "112-by-item",
        "trainer",
        ("manual_seed(100 + self.rank)", "manual_seed(100)"),
        ("torch.randn(4)", "torch.randn(4, generator=torch.Generator().manual_seed(index))"),
    ),
    make_case(  # worker_init_fn seeds, with what the loader draws for each epoch
        "113-by-epoch",
        "trainer",
        (
            "num_workers=options.workers,",
            "num_workers=options.workers,\n            worker_init_fn=lambda i: torch.manual_seed(torch.initial_seed() % 2**31 + dist.get_rank()),",
        ),
    ),
    make_case(  # two models are trained one after the other, under one seed
        "113-two-models",
        "trainer",
        ('--epochs", type=int, default=2', '--epochs", type=int, default=1'),
        (
            "    torch.manual_seed(7)\n    model =",
            "    for width in (8, 16):\n        train(options, width)\n    dist.destroy_process_group()\n\n\n"
            "def train(options, width):\n    torch.manual_seed(7)\n    model =",
        ),
        ("nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)", "nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1)"),
        (
            "    Trainer(model, options).fit()\n    dist.destroy_process_group()\n",
            "    torch.manual_seed(dist.get_rank())\n    Trainer(model, options).fit()\n",
        ),
        arguments=("--workers", "0"),
    ),
    make_case(  # seeds at the start of each epoch, others in each
        "113-at-the-start",
        "spawned",
        (
            "        sampler.set_epoch(epoch)\n",
            "        sampler.set_epoch(epoch)\n        np.random.seed(100 * epoch + rank)\n",
        ),
    ),
    make_case(  # worker_init_fn runs once for workers that stay
        "113-workers-that-stay",
        "imagenet",
        (
            "num_workers=args.workers",
            "num_workers=args.workers, persistent_workers=True, worker_init_fn=lambda i: random.seed(args.rank * 64 + i)",
        ),
    ),
    # The model.
    make_case(
        "212-converted",
        "imagenet",
        (
            "model = torch.nn.parallel.Dist",
            "import ddparity\n    model = ddparity.convert_sync_batchnorm(model)\n    model = torch.nn.parallel.Dist",
        ),
        ("default=12, type=int", "default=4, type=int"),
    ),
    # The gradients.
    make_case(  # two parts of one loss: the first adds to what the second reduces
        "301-two-parts",
        "functions",
        (
            _BACKWARD,
            "            with model.no_sync():\n                penalty = model(x).square().mean()\n                penalty.backward()\n"
            + _BACKWARD,
        ),
    ),
    make_case(  # micro-batches of other lengths, each with its share of the window
        "304-weighted",
        "trainer",
        ("/ len(window)", "* len(x) / sum(len(one) for one, _ in window)"),
        arguments=("--samples", "84", "--accumulate", "3"),
    ),
    make_case(  # gradients divided before the clip
        "304-by-hand",
        "nanogpt",
        ("loss = loss / gradient_accumulation_steps", "pass"),
        (
            "    if grad_clip != 0.0:\n",
            "    for p in model.parameters():\n        p.grad /= gradient_accumulation_steps\n    if grad_clip != 0.0:\n",
        ),
    ),
    make_case(  # gradients summed over the ranks, then divided by the ranks times the micro-batches, then clipped
        "304-by-hand-flat",
        "flat",
        (" / a.accum\n", "\n"),
        ("flat.div_(dist.get_world_size())", "flat.div_(dist.get_world_size() * 2)"),
    ),
    make_case(  # two tasks of one batch, whose losses are added up
        "304-tasks",
        "functions",
        (
            _BACKWARD,
            "            for task in range(2):\n                model.require_backward_grad_sync = task == 1\n"
            "                loss = F.cross_entropy(model(x), y if task else 1 - y)\n                loss.backward()\n",
        ),
    ),
    make_case(  # a sum over the global count
        "305-summed",
        "functions",
        _UNEQUAL,
        _SET_EPOCH,
        (
            "            loss = F.cross_entropy(model(x), y)\n",
            "            count = torch.tensor(len(y))\n            dist.all_reduce(count)\n"
            "            loss = F.cross_entropy(model(x), y, reduction='sum') * world / count.item()\n",
        ),
        may="DDP106",
    ),
    make_case(  # means with the weights of their counts
        "305-weighted-means",
        "stream",
        ("target[-2:] = -100", "target[: i % 5] = -100"),
        (
            "            loss.backward()\n",
            "            own = (target != -100).sum()\n            whole = own.clone()\n            dist.all_reduce(whole)\n"
            "            (loss * (own * world / whole)).backward()\n",
        ),
    ),
    make_case(  # a scaler that is switched off
        "308-disabled",
        "nanogpt",
        ("        scaler.unscale_(optimizer)\n", ""),
    ),
    make_case(  # the generator's gradients are scaled, the discriminator's are clipped
        "308-another-model",
        "gan",
        ("    criterion =", "    scaler = torch.amp.GradScaler('cpu', init_scale=64.0)\n    criterion ="),
        (
            "            loss.backward()\n            for_generator.step()\n",
            "            scaler.scale(loss).backward()\n            scaler.step(for_generator)\n            scaler.update()\n",
        ),
        (
            "            for_discriminator.step()\n",
            "            nn.utils.clip_grad_norm_(discriminator.parameters(), 0.1)\n            for_discriminator.step()\n",
        ),
    ),
    make_case(  # both losses are scaled before either model is unscaled
        "308-two-models",
        "gan",
        ("    criterion =", "    scaler = torch.amp.GradScaler('cpu', init_scale=64.0)\n    criterion ="),
        (
            "            loss.backward()\n            for_discriminator.step()\n",
            "            scaler.scale(loss).backward()\n",
        ),
        (
            "            loss.backward()\n            for_generator.step()\n",
            "            scaler.scale(loss).backward()\n            for each, one in ((generator, for_generator), (discriminator, for_discriminator)):\n"
            "                scaler.unscale_(one)\n                nn.utils.clip_grad_norm_(each.parameters(), 0.1)\n"
            "                scaler.step(one)\n            scaler.update()\n",
        ),
    ),
    make_case(  # the mean over the ranks, made for the log, is what goes backward
        "307-reduced-loss",
        "functions",
        (
            "def main():\n",
            "def mean_of_ranks(value):\n    value = value.clone()\n    dist.all_reduce(value)\n"
            "    return value / dist.get_world_size()\n\n\ndef main():\n",
        ),
        (_BACKWARD, "            loss = mean_of_ranks(F.cross_entropy(model(x), y))\n            loss.backward()\n"),
        codes="DDP307",
    ),
    make_case(  # the same for the log alone
        "307-reduced-for-the-log",
        "functions",
        (
            "def main():\n",
            "def mean_of_ranks(value):\n    value = value.clone()\n    dist.all_reduce(value)\n"
            "    return value / dist.get_world_size()\n\n\ndef main():\n",
        ),
        (
            _BACKWARD,
            "            loss = F.cross_entropy(model(x), y)\n            shown = mean_of_ranks(loss)\n            loss.backward()\n",
        ),
    ),
    make_case(  # parameters are broadcast again, although their gradients are averaged
        "310-broadcast-again",
        "by_hand",
        (
            "        optimizer.step()\n",
            "        optimizer.step()\n        for parameter in model.parameters():\n            dist.broadcast(parameter.data, src=0)\n",
        ),
    ),
    make_case(  # parameters are averaged, although DDP has reduced their gradients
        "310-averaged-too",
        "functions",
        (
            _STEP,
            _STEP
            + "            for p in model.parameters():\n                dist.all_reduce(p.data)\n                p.data /= world\n",
        ),
    ),
    # Files, groups, and what the audit reads itself.
    make_case(
        "501-by-keyword",
        "functions",
        ("torch.save(model.module.state_dict(), path)", "torch.save(f=path, obj=model.module.state_dict())"),
        ("torch.load(path)", "torch.load(f=path)"),
    ),
    make_case(  # a collective of two of three ranks before a checkpoint
        "502-subgroup",
        "functions",
        ("    path = ", "    pair = dist.new_group([0, 1])\n    path = "),
        (
            "    if rank == 0:\n        torch.save",
            "    if rank < 2:\n        dist.all_reduce(torch.ones(1), group=pair)\n    if rank == 0:\n        torch.save",
        ),
        nproc=3,
        may="DDP106",
    ),
    make_case(  # a collective of two of three ranks, after which the third reads without a barrier
        "502-subgroup-alone",
        "functions",
        ("    path = ", "    pair = dist.new_group([0, 1])\n    path = "),
        (
            "path)\n    dist.barrier()\n",
            "path)\n    if rank < 2:\n        dist.all_reduce(torch.ones(1), group=pair)\n    import time\n    time.sleep(1.0)\n",
        ),
        nproc=3,
        codes="DDP502",
        may="DDP106",
    ),
    make_case(
        "502-under-a-lock",
        "functions",
        ("EPOCHS = 2\n", "EPOCHS = 2\nimport fcntl\n"),
        (
            "    train, test =",
            "    cache = os.path.join(tempfile.gettempdir(), f'ddparity-cache-{os.environ[\"MASTER_PORT\"]}')\n"
            "    with open(cache + '.lock', 'a') as lock:\n        fcntl.flock(lock, fcntl.LOCK_EX)\n"
            "        if not os.path.exists(cache):\n            torch.save(torch.ones(3), cache)\n    torch.load(cache)\n    train, test =",
        ),
    ),
    make_case(  # items are kept on the disk by the rank that loads them, and the audit reads some of all again
        "502-kept-items",
        "functions",
        (
            "def evaluate(",
            "class Kept(torch.utils.data.Dataset):\n    def __init__(self, base, folder):\n        self.base, self.folder = base, folder\n\n"
            "    def __len__(self):\n        return len(self.base)\n\n    def __getitem__(self, i):\n        path = f'{self.folder}/{i}.pt'\n"
            "        if not os.path.exists(path):\n            torch.save(self.base[i], path)\n        return torch.load(path)\n\n\ndef evaluate(",
        ),
        (
            "    net =",
            "    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'kept')\n    os.makedirs(folder, exist_ok=True)\n    train = Kept(train, folder)\n    net =",
        ),
        ("EPOCHS = 2", "EPOCHS = 1"),
    ),
    make_case(  # a rank outside of the group: torch warns and returns
        "503-not-a-member",
        "functions",
        ("    path = ", "    alone = dist.new_group([0])\n    path = "),
        (_STEP, _STEP + "            dist.all_reduce(torch.ones(2), group=alone)\n"),
    ),
    make_case(  # one data set, with noise of each rank's own generator
        "104-noise-of-the-rank",
        "functions",
        (
            "def evaluate(",
            "class Noisy(torch.utils.data.Dataset):\n    def __init__(self, base, rank):\n        self.base, self.rank, self.epoch = base, rank, 0\n\n"
            "    def __len__(self):\n        return len(self.base)\n\n    def __getitem__(self, i):\n"
            "        generator = torch.Generator().manual_seed(1000 * self.rank + 100 * self.epoch + i)\n"
            "        x, y = self.base[i]\n        return x + 0.1 * torch.randn(8, generator=generator), y\n\n\ndef evaluate(",
        ),
        ("    net =", "    train = Noisy(train, rank)\n    net ="),
        ("        model.train()\n", "        model.train()\n        train.epoch = epoch\n"),
    ),
    make_case(  # the same, of items that the data set does not keep: their labels are the same
        "104-noise-of-read-items",
        "trainer",
        (
            "        return self.x[index] + 0.01 * torch.randn(4), self.y[index]",
            "        generator = torch.Generator().manual_seed(1000 * dist.get_rank() + index)\n"
            "        x = torch.full((4,), index / 80)\n        return x + 0.01 * torch.randn(4, generator=generator), x.sum(0, keepdim=True)",
        ),
        ("        self.x =", "        self.count = count\n        x ="),
        ("        self.y = self.x.sum(1, keepdim=True)\n", ""),
        ("return len(self.x)", "return self.count"),
    ),
    # Output and speed.
    make_case(
        "505-in-finally",
        "functions",
        ("    dist.destroy_process_group()\n", ""),
        ("    main()\n", "    try:\n        main()\n    finally:\n        dist.destroy_process_group()\n"),
    ),
    make_case(
        "602-class-rank-0",
        "trainer",
        ("for batch in self.loader", "for batch in __import__('tqdm').tqdm(self.loader, disable=self.rank != 0)"),
    ),
    make_case(
        "603-class-rank-0",
        "trainer",
        ("import argparse\n", "import argparse\nimport tempfile\n"),
        (
            "        self.loss =",
            "        from torch.utils import tensorboard\n        self.log = tensorboard.SummaryWriter(log_dir=tempfile.mkdtemp()) if self.rank == 0 else None\n        self.loss =",
        ),
    ),
    make_case(  # rank 0 takes longer once an epoch
        "702-between-epochs",
        "functions",
        ("EPOCHS = 2", "EPOCHS = 4\nimport time"),
        (
            "        if rank == 0:\n            print",
            "        time.sleep(0 if rank else 0.1)\n        if rank == 0:\n            print",
        ),
    ),
    make_case("703-queue", "moco", ("K=64", "K=2**16")),  # a large buffer that changes
]
