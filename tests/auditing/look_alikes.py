# ruff: noqa: E501 - the changes are lines of the scripts
"""Clean scripts that look like a fault, and their faulty twins, in other styles than those of near_misses.py."""

from __future__ import annotations

from tests.auditing.cases import Case, make_case

_STEP = "            optimizer.step()\n"
_BACKWARD = "            loss = F.cross_entropy(model(x), y)\n            loss.backward()\n"
_SET_EPOCH = ("        sampler.set_epoch(epoch)\n", "")
_UNEQUAL = ("sampler = DistributedSampler(train, shuffle=True)", "sampler = range(rank, 64 - 6 * rank, world)")

_WRAPPER = (  # shares out what another sampler draws, as Catalyst's and Lightning's wrappers do
    "def evaluate(",
    "class Drawn(torch.utils.data.Dataset):\n    def __init__(self, sampler):\n        self._sampler = sampler\n        self.draw()\n\n"
    "    def draw(self):\n        self.items = list(self._sampler)\n\n    def __len__(self):\n        return len(self._sampler)\n\n"
    "    def __getitem__(self, i):\n        return self.items[i]\n\n\n"
    "class Wrapper(DistributedSampler):\n    def __init__(self, sampler, **options):\n        super().__init__(Drawn(sampler), **options)\n\n"
    "    def __iter__(self):\n        self.dataset.draw()\n        return (self.dataset[i] for i in super().__iter__())\n\n\ndef evaluate(",
)
_SUBSET = (
    "sampler = DistributedSampler(train, shuffle=True)",
    "chosen = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:24].tolist()\n    sampler = Wrapper(\n"
    "        torch.utils.data.SubsetRandomSampler(chosen, torch.Generator().manual_seed(5))\n    )",
)

_PROJECTED = (  # in the way of PCGrad
    "            grads = []\n            for weight in (0.0, 0.3):\n                optimizer.zero_grad()\n"
    "                loss = F.cross_entropy(model(x), y, label_smoothing=weight)\n                loss.backward()\n"
    "                grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))\n"
    "            first, second = grads\n            dot = (first @ second).item()\n"
    "            whole = first + second - min(dot, 0) * (first / first.square().sum() + second / second.square().sum())\n"
    "            for p, grad in zip(model.parameters(), whole.split([p.numel() for p in model.parameters()])):\n"
    "                p.grad = grad.view_as(p).clone()\n"
)
_CLIP = "            nn.utils.clip_grad_norm_(model.parameters(), 0.1)\n"
_ADD = "            optimizer.add_param_group({'params': list(net[0].parameters()), 'lr': 0.05})\n"
_ADDED = (
    ("torch.optim.SGD(model.parameters()", "torch.optim.SGD(net[2].parameters()"),
    ("        model.train()\n        for", "        if epoch == 1:\n" + _ADD + "        model.train()\n        for"),
    ("optimizer.zero_grad()", "model.zero_grad()"),
)
_CORRECT = (
    "            total += torch.tensor([(model(x).argmax(1) == y).sum(), len(y)])\n",
    "            total += (model(x).argmax(1) == y).sum()\n",
)
_OVER_LENGTH = (
    _CORRECT[0] + "    dist.all_reduce(total)\n    return (total[0] / total[1]).item()",
    _CORRECT[1] + "    dist.all_reduce(total)\n    return (total[0] / len(loader.dataset)).item()",
)
_ODD = ("make_data(2, 30)", "make_data(2, 31)")
_BY_OBJECTS = (
    "    dist.all_reduce(total)\n    return (total[0] / total[1]).item()",
    "    parts = [None] * dist.get_world_size()\n    dist.all_gather_object(parts, {'hits': int(total[0]), 'count': int(total[1])})\n"
    "    return sum(one['hits'] for one in parts) / sum(one['count'] for one in parts)",
)
_PADDED_FOLD = ("sampler=range(rank, len(te), world)", "sampler=DistributedSampler(te, shuffle=False)")
_BY_MESSAGES = (
    "        dist.all_reduce(parameter.grad)\n",
    "        other = torch.empty_like(parameter.grad)\n        pair = [(dist.isend, parameter.grad.clone()), (dist.irecv, other)]\n"
    "        for work in dist.batch_isend_irecv([dist.P2POp(call, part, 1 - dist.get_rank()) for call, part in pair]):\n"
    "            work.wait()\n        parameter.grad += other\n",
)
_BY_HAND = ("model = DDP(net)", "model = net"), ("model.module", "model")
_REDUCE = "            for p in model.parameters():\n                dist.all_reduce(p.grad)\n                p.grad /= world\n"
_REPLICAS = (  # two replicas of a pipeline of two stages
    (
        "    torch.manual_seed(7)\n",
        "    mesh = dist.device_mesh.init_device_mesh('cpu', (2, 2), mesh_dim_names=('replicas', 'stages'))\n"
        "    rank, world, replica = mesh.get_local_rank('stages'), 2, mesh.get_local_rank('replicas')\n    torch.manual_seed(7)\n",
    ),
    (
        "module = blocks[rank]",
        "module = torch.distributed.fsdp.fully_shard(blocks[rank], mesh=mesh['replicas'])",
    ),
    ('torch.device("cpu"))', 'torch.device("cpu"), group=mesh.get_group("stages"))'),
    ("nn.BatchNorm1d", "nn.LayerNorm"),
)

LOOK_ALIKES: list[Case] = [
    # Loops that load a batch ahead, where the audit ends an epoch; sums of an evaluation that are sent to rank 0.
    make_case("303-ahead-accelerate", "ahead_accelerate", absent="DDP303 DDP304"),
    make_case("303-ahead-prefetcher", "ahead_prefetcher", absent="DDP303 DDP304"),
    make_case("402-sent", "sent_sums", absent="DDP402"),
    # One DDP with two optimizers, each of whose backwards leaves the other's half out.
    make_case("701-turns", "gan_unused", absent="DDP701"),
    # A library looks whether there is torch, before anybody imports it; a temporary file has no name of its own.
    make_case("501-temporary", "probing", absent="DDP501"),
    make_case("101-probed", "probing", ("DistributedSampler(data)", "None"), codes="DDP101", may="DDP107"),
    # Samplers that others share out, over a part of the data set.
    make_case("106-chosen", "functions", _WRAPPER, _SUBSET, absent="DDP102 DDP106"),
    make_case(
        "106-chosen-dropped",
        "functions",
        _WRAPPER,
        _SUBSET,
        ("batch_size=8, sampler=sampler", "batch_size=8, sampler=sampler, drop_last=True"),
        codes="DDP106",
    ),
    make_case(
        "102-chosen",
        "functions",
        _WRAPPER,
        _SUBSET,
        ("manual_seed(3))[:24]", "manual_seed(rank))[:48]"),
        codes="DDP102",
    ),
    make_case(  # in one epoch
        "106-drawn-below",
        "functions",
        _WRAPPER,
        ("EPOCHS = 2", "EPOCHS = 1"),
        (
            "sampler = DistributedSampler(train, shuffle=True)",
            "sampler = Wrapper(torch.utils.data.RandomSampler(train, num_samples=32, generator=torch.Generator().manual_seed(5)))",
        ),
        absent="DDP102",
    ),
    make_case(
        "101-chosen",
        "functions",
        (
            "sampler = DistributedSampler(train, shuffle=True)",
            "sampler = torch.utils.data.SubsetRandomSampler(range(24))",
        ),
        _SET_EPOCH,
        codes="DDP101",
    ),
    # Processes that share a model train without a group.
    make_case("201-hogwild", "hogwild", absent="DDP101"),
    make_case("201-hogwild-spawned", "hogwild", ("mp.Process(", "mp.get_context('spawn').Process("), absent="DDP101"),
    # Layers that the optimizer gets later.
    make_case("201-added", "functions", *_ADDED, ("model = DDP(net)\n", "model = DDP(net)\n"), absent="DDP202 DDP701"),
    make_case(  # they are frozen until then, and the model is wrapped again
        "201-added-rewrapped",
        "functions",
        *_ADDED,
        ("    model = DDP(net)\n", "    net[0].requires_grad_(False)\n    model = DDP(net)\n"),
        (_ADD, _ADD + "            net[0].requires_grad_(True)\n            model = DDP(net)\n"),
        absent="DDP202",
    ),
    make_case(  # not wrapped again
        "201-added-frozen",
        "functions",
        *_ADDED,
        ("    model = DDP(net)\n", "    net[0].requires_grad_(False)\n    model = DDP(net)\n"),
        (_ADD, _ADD + "            net[0].requires_grad_(True)\n"),
        codes="DDP201",
        may="DDP202",
    ),
    make_case(  # after the first steps of a model of 0.2 million parameters
        "201-added-late",
        "functions",
        *_ADDED,
        ("    model = DDP(net)\n", "    net[0].requires_grad_(False)\n    model = DDP(net)\n"),
        ("epoch == 1", "epoch == 4"),
        ("EPOCHS = 2", "EPOCHS = 5"),
        ("nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)", "nn.Linear(8, 9000), nn.ReLU(), nn.Linear(9000, 12)"),
        (_ADD, _ADD + "            net[0].requires_grad_(True)\n"),
        codes="DDP201",
        may="DDP202",
    ),
    make_case(  # another optimizer, with all
        "201-remade",
        "functions",
        ("torch.optim.SGD(model.parameters()", "torch.optim.SGD(net[2].parameters()"),
        (
            "        model.train()\n        for",
            "        if epoch == 1:\n            optimizer = torch.optim.Adam(model.parameters(), 1e-3)\n        model.train()\n        for",
        ),
        absent="DDP202 DDP103",
    ),
    make_case("202-added", "functions", *_ADDED, ("'lr': 0.05", "'lr': 0.05 * (rank + 1)"), codes="DDP202"),
    # Each rank has a stage of the model.
    make_case("201-stages", "pipeline", absent="DDP101 DDP107 DDP203 DDP404"),
    make_case("203-stages-3", "pipeline", nproc=3, absent="DDP101 DDP201"),
    make_case("201-stages-by-hand", "stages", absent="DDP101 DDP203"),
    make_case("201-stages-by-hand-3", "stages", nproc=3, absent="DDP101 DDP203"),
    make_case(
        "101-by-messages",
        "by_hand",
        _BY_MESSAGES,
        ("manual_seed(1337 + rank)\n    optimizer", "manual_seed(1337)\n    optimizer"),
        ("nn.Dropout(0.1)", "nn.Identity()"),
        codes="DDP101",
    ),
    make_case("201-by-messages", "by_hand", _BY_MESSAGES, absent="DDP101 DDP203"),
    make_case(  # messages that no gradient follows
        "201-with-messages",
        "by_hand",
        (
            "        average_gradients(model, world)\n",
            "        dist.send(loss.detach(), 0) if rank else dist.recv(loss.detach(), 1)\n",
        ),
        codes="DDP201",
    ),
    make_case("101-replicas", "pipeline", *_REPLICAS, nproc=4, codes="DDP101", absent="DDP201"),
    make_case(
        "201-replicas",
        "pipeline",
        *_REPLICAS,
        ("shuffle=True, generator=generator", "sampler=sampler"),
        (
            "    loader =",
            "    sampler = torch.utils.data.DistributedSampler(x, num_replicas=2, rank=replica)\n    loader =",
        ),
        ("        module.train()\n", "        module.train()\n        sampler.set_epoch(epoch)\n"),
        nproc=4,
        absent="DDP101 DDP203",
    ),
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
    make_case(  # all load what rank 0 has trained: parameters are equal again, but nothing is averaged
        "301-loaded-again",
        "functions",
        (
            _BACKWARD,
            "            with model.no_sync():\n                loss = F.cross_entropy(model(x), y)\n                loss.backward()\n",
        ),
        (
            "        accuracy = ",
            "        if rank == 0:\n            torch.save(net.state_dict(), path)\n        dist.barrier()\n"
            "        net.load_state_dict(torch.load(path))\n        dist.barrier()\n        accuracy = ",
        ),
        codes="DDP301",
    ),
    make_case(  # rank 0 alone has the mean of the gradients, and sends its parameters
        "301-reduced-to-one",
        "by_hand",
        (
            "        dist.all_reduce(parameter.grad)\n",
            "        dist.reduce(parameter.grad, dst=0)\n",
        ),
        (
            "        optimizer.step()\n",
            "        optimizer.step()\n        for parameter in model.parameters():\n            dist.broadcast(parameter.data, src=0)\n",
        ),
    ),
    make_case(  # counts of samples, in objects
        "401-objects",
        "functions",
        _BY_OBJECTS,
        _ODD,
        ("sampler=range(rank, len(test), world)", "sampler=DistributedSampler(test, shuffle=False)"),
        codes="DDP401",
    ),
    make_case("401-objects-near", "functions", _BY_OBJECTS, _ODD, absent="DDP401"),
    make_case(  # each rank cuts its own part of the test data, without a sampler
        "404-own-part",
        "functions",
        (
            "DataLoader(test, batch_size=8, sampler=range(rank, len(test), world))",
            "DataLoader(TensorDataset(*(one[rank::world] for one in test.tensors)), batch_size=8)",
        ),
        absent="DDP404",
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

_NO_SAMPLER = ("batch_size=8, sampler=sampler", "batch_size=8")
_CLASS = "class Own(torch.utils.data.Dataset):\n    def __len__(self):\n        return {}\n\n    def __getitem__(self, i):\n{}\n\n\ndef evaluate("
_LOOK = "            if rank == 0 and epoch == 0:\n                {0}.eval()\n                {0}(x)\n                {0}.train()\n"

_LEFT_OUT = "    DDP._set_params_and_buffers_to_ignore_for_model(net, ['2.bias'])\n"
_DRAWN = "        x = torch.randn(8)\n        return x, (x.sum() > 0).long()"
_STATISTICS = "    x, y = train.tensors\n    x = (x - x[rank::world].mean(0)) / x[rank::world].std(0)\n"
_NOISY = (
    "class Noisy(torch.utils.data.Dataset):\n    def __init__(self, base):\n        self.base = base\n\n"
    "    def __len__(self):\n        return len(self.base)\n\n    def __getitem__(self, i):\n"
    "        x, y = self.base[i]\n        return x + 0.1 * torch.randn(8), y\n\n\ndef evaluate("
)
_TEACHER = "    teacher = nn.Linear(8, 2).requires_grad_(False)\n    optimizer ="
_AVERAGE = (
    "            with torch.no_grad():\n                wanted = teacher(x)\n"
    "                for p, q in zip(teacher.parameters(), model.parameters()):\n                    p.mul_(0.9).add_(q.mean(), alpha=0.1)\n"
    "            loss = loss + (wanted - x[:, :2]).square().mean()\n"
)
_VIEWS = (
    "                views = [self.model(x + 0.1 * torch.randn_like(x)) for _ in range(2)]\n"
    "                loss = (self.loss(views[0], y) + self.loss(views[1], y)) / 2 / {}\n"
)
_MEAN = (
    "    dist.all_reduce(total)\n    return (total[0] / total[1]).item()",
    "    w = dist.get_world_size()\n    mean = total[0] / total[1]\n    dist.all_reduce(mean)\n    return (mean / w).item()",
)
_PADDED = ("sampler=range(rank, len(test), world)", "sampler=DistributedSampler(test, shuffle=False)")

LOOK_ALIKES += [
    make_case(  # a data set that draws a new sample at each access, by equal streams
        "101-drawn-alike",
        "functions",
        ("def evaluate(", _CLASS.format(64, _DRAWN)),
        ("    net =", "    train = Own()\n    net ="),
        ("torch.manual_seed(1000 + rank)", "torch.manual_seed(1000)"),
        _NO_SAMPLER,
        _SET_EPOCH,
        codes="DDP101",
    ),
    make_case(  # the model labels each batch in eval mode, and is trained on it then
        "101-labelled",
        "functions",
        _NO_SAMPLER,
        (
            "            optimizer.zero_grad()\n",
            "            model.eval()\n            with torch.no_grad():\n                y = model(x).argmax(1)\n            model.train()\n            optimizer.zero_grad()\n",
        ),
        _SET_EPOCH,
        codes="DDP101",
    ),
    make_case(  # a data set that is made again for each epoch, with noise
        "103-made-again",
        "functions",
        ("def evaluate(", _NOISY),
        _SET_EPOCH,
        (
            "    for epoch in range(EPOCHS):\n",
            "    for epoch in range(EPOCHS):\n        noisy = Noisy(make_data(1, 64))\n        loader = DataLoader(noisy, batch_size=8, sampler=DistributedSampler(noisy))\n",
        ),
        codes="DDP103",
    ),
    make_case(  # samples of each rank's own; what they are found by, and the labels, are equal
        "104-own-samples",
        "functions",
        (
            "def evaluate(",
            "class Own(torch.utils.data.Dataset):\n    def __init__(self):\n        self.places, self.labels = list(range(64)), [i % 2 for i in range(64)]\n"
            "        self.rows = {i: torch.randn(8) for i in self.places}\n\n    def __len__(self):\n        return 64\n\n"
            "    def __getitem__(self, i):\n        return self.rows[self.places[i]], self.labels[i]\n\n\ndef evaluate(",
        ),
        ("    torch.manual_seed(1000 + rank)\n", "    torch.manual_seed(1000 + rank)\n    train = Own()\n"),
        codes="DDP104",
    ),
    make_case(  # normalised by the statistics of a rank's own share: the labels are equal
        "104-own-statistics",
        "functions",
        ("    net =", _STATISTICS + "    train = TensorDataset(x, y)\n    net ="),
        codes="DDP104",
    ),
    make_case(  # a teacher that each rank makes itself, averaged by hand, and never put into eval mode
        "203-own-teacher",
        "functions",
        ("    optimizer =", _TEACHER),
        ("            loss.backward()\n", _AVERAGE + "            loss.backward()\n"),
        codes="DDP203",
    ),
    make_case(  # the same, made under one seed
        "203-seeded-teacher",
        "functions",
        ("    torch.manual_seed(1000 + rank)\n", ""),
        ("    optimizer =", _TEACHER),
        ("            loss.backward()\n", _AVERAGE + "            loss.backward()\n"),
    ),
    make_case(  # two losses with weights, besides the division by the window
        "303-weights",
        "trainer",
        ("                loss = self.loss(self.model(x), y) / len(window)\n", _VIEWS.format("len(window)")),
    ),
    make_case(  # the same, with a constant at a short window
        "303-weights-tail",
        "trainer",
        (
            "                loss = self.loss(self.model(x), y) / len(window)\n",
            _VIEWS.format("self.options.accumulate"),
        ),
        codes="DDP303",
    ),
    make_case(  # padding is left out of the counts, and the loss of the training is averaged beside them
        "401-masked",
        "functions",
        ("    total = torch.zeros(2)\n", "    total, seen = torch.zeros(2), 0\n"),
        (
            "            total += torch.tensor([(model(x).argmax(1) == y).sum(), len(y)])\n",
            "            real = torch.arange(seen, seen + len(y)) * dist.get_world_size() + dist.get_rank() < 31\n            seen += len(y)\n"
            "            total += torch.stack([((model(x).argmax(1) == y) & real).sum(), real.sum()])\n",
        ),
        ("make_data(2, 30)", "make_data(2, 31)"),
        _PADDED,
        (
            "        accuracy = evaluate(model, held_out)\n",
            "        accuracy = evaluate(model, held_out)\n        running = loss.detach().clone()\n        dist.all_reduce(running)\n        running /= world\n",
        ),
    ),
    # Sums over the ranks, divided by the length of the data set.
    make_case("401-length", "functions", _OVER_LENGTH, _PADDED),  # nothing is padded
    make_case("401-length-padded", "functions", _OVER_LENGTH, _PADDED, _ODD, codes="DDP401"),
    make_case(
        "401-length-gathered",
        "functions",
        _CORRECT,
        (
            "    dist.all_reduce(total)\n    return (total[0] / total[1]).item()",
            "    size = len(loader.dataset)\n    parts = [torch.zeros(2) for _ in range(dist.get_world_size())]\n"
            "    dist.all_gather(parts, total)\n    total = sum(parts)\n    total /= size\n    return total[0].item()",
        ),
        _PADDED,
        _ODD,
        codes="DDP401",
    ),
    make_case(  # what is padding does not count
        "401-length-masked",
        "functions",
        _OVER_LENGTH,
        ("    total = torch.zeros(2)\n", "    total, place = torch.zeros(2), dist.get_rank()\n"),
        (
            "            total += (model(x).argmax(1) == y).sum()\n",
            "            real = place + dist.get_world_size() * torch.arange(len(y)) < len(loader.dataset)\n"
            "            place += dist.get_world_size() * len(y)\n            total += ((model(x).argmax(1) == y) & real).sum()\n",
        ),
        _PADDED,
        _ODD,
    ),
    make_case(  # beside a loss of the training that is summed and divided so
        "401-length-of-training",
        "functions",
        ("    total = torch.zeros(2)\n", "    total, seen = torch.zeros(2), 0\n"),
        (
            "            total += torch.tensor([(model(x).argmax(1) == y).sum(), len(y)])\n",
            "            real = torch.arange(seen, seen + len(y)) * dist.get_world_size() + dist.get_rank() < 31\n            seen += len(y)\n"
            "            total += torch.stack([((model(x).argmax(1) == y) & real).sum(), real.sum()])\n",
        ),
        _PADDED,
        _ODD,
        (
            "        accuracy = evaluate(model, held_out)\n",
            "        accuracy = evaluate(model, held_out)\n        running = loss.detach().clone()\n        dist.all_reduce(running)\n        running /= len(train)\n",
        ),
    ),
    # A metric that adds up hits and misses over the ranks.
    make_case("401-metric", "kfold", _PADDED_FOLD),
    make_case(
        "401-metric-padded",
        "kfold",
        _PADDED_FOLD,
        ("torch.randn(120,", "torch.randn(122,"),
        codes="DDP401",
        may="DDP102",
    ),
    make_case("401-mean", "functions", _MEAN, _PADDED),  # nothing is padded
    make_case("401-mean-padded", "functions", _MEAN, _PADDED, ("make_data(2, 30)", "make_data(2, 31)"), codes="DDP401"),
    make_case(  # two evaluations, whose counts are summed together after their times are shown
        "402-two-times",
        "functions",
        ("    dist.all_reduce(total)\n    return (total[0] / total[1]).item()", "    return total"),
        (
            "        accuracy = evaluate(model, held_out)\n",
            "        import time\n\n        counts = {}\n        for name in ('clean', 'shifted'):\n            start = time.time()\n"
            "            counts[name] = evaluate(model, held_out)\n            if rank == 0:\n"
            "                print(f'{epoch}: {name} took {time.time() - start:.2f} s')\n"
            "        both = torch.stack(list(counts.values()))\n        dist.all_reduce(both)\n"
            "        accuracy = (both[0, 0] / both[0, 1]).item()\n",
        ),
    ),
    make_case(  # the same, where the metric of a share is shown instead
        "402-two-metrics",
        "functions",
        ("    dist.all_reduce(total)\n    return (total[0] / total[1]).item()", "    return total"),
        (
            "        accuracy = evaluate(model, held_out)\n",
            "        counts = {}\n        for name in ('clean', 'shifted'):\n"
            "            counts[name] = evaluate(model, held_out)\n            if rank == 0:\n"
            "                print(f'{epoch}: {name} {(counts[name][0] / counts[name][1]).item():.3f}')\n"
            "        accuracy = 0\n",
        ),
        codes="DDP402",
    ),
    make_case(  # a data set that draws a new sample at each access
        "101-drawn",
        "functions",
        ("def evaluate(", _CLASS.format(64, "        x = torch.randn(8)\n        return x, (x.sum() > 0).long()")),
        ("    net =", "    train = Own()\n    net ="),
        _NO_SAMPLER,
        _SET_EPOCH,
    ),
    make_case(  # a validation batch now and then, from an iterator without an end
        "101-validation-iterator",
        "functions",
        (
            "    optimizer =",
            "    def forever(loader):\n        while True:\n            yield from loader\n\n"
            "    some = forever(DataLoader(make_data(5, 32), batch_size=8))\n    optimizer =",
        ),
        (
            _STEP,
            _STEP
            + "            model.eval()\n            with torch.no_grad():\n                model(next(some)[0])\n            model.train()\n",
        ),
    ),
    make_case(  # new samples each round
        "103-fresh-data",
        "functions",
        _SET_EPOCH,
        (
            "    for epoch in range(EPOCHS):\n",
            "    for epoch in range(EPOCHS):\n        train = make_data(10 + epoch, 64)\n        loader = DataLoader(train, batch_size=8, sampler=DistributedSampler(train))\n",
        ),
    ),
    make_case(  # noise that is drawn once, and kept
        "104-kept-noise",
        "functions",
        (
            "def evaluate(",
            "class Own(torch.utils.data.Dataset):\n    def __init__(self, base):\n        self.base, self.kept = base, {}\n\n"
            "    def __len__(self):\n        return len(self.base)\n\n    def __getitem__(self, i):\n        if i not in self.kept:\n"
            "            self.kept[i] = self.base[i][0] + 0.01 * torch.randn(8)\n        return self.kept[i], self.base[i][1]\n\n\ndef evaluate(",
        ),
        ("    net =", "    train = Own(train)\n    net ="),
    ),
    make_case(  # shards of other lengths, which begin again
        "105-restarts",
        "functions",
        ("make_data(1, 64)", "make_data(1 + rank, 48 - 16 * rank)"),
        ("sampler = DistributedSampler(train, shuffle=True)", "sampler = torch.utils.data.RandomSampler(train)"),
        _SET_EPOCH,
        (
            "        for x, y in loader:\n            optimizer",
            "        batches = iter(loader)\n        for _ in range(8):\n            try:\n                x, y = next(batches)\n"
            "            except StopIteration:\n                batches = iter(loader)\n                x, y = next(batches)\n            optimizer",
        ),
        may="DDP106",
    ),
    make_case(  # each epoch is another part of a large data set
        "106-another-part",
        "functions",
        ("make_data(1, 64)", "make_data(1, 640)"),
        (
            "def evaluate(",
            "class Part(torch.utils.data.Sampler):\n    def __len__(self):\n        return 32\n\n    def __iter__(self):\n"
            "        order = torch.randperm(640, generator=torch.Generator().manual_seed(self.epoch))[:64]\n"
            "        return iter(order[dist.get_rank() :: dist.get_world_size()].tolist())\n\n    def set_epoch(self, epoch):\n"
            "        self.epoch = epoch\n\n\ndef evaluate(",
        ),
        ("sampler = DistributedSampler(train, shuffle=True)", "sampler = Part()"),
    ),
    make_case(  # a part of the model that DDP is told to leave out, of each rank's own
        "201-left-out",
        "functions",
        (
            "    model = DDP(net)",
            "    nn.init.constant_(net[2].bias, 0.1 * rank)\n" + _LEFT_OUT + "    model = DDP(net)",
        ),
    ),
    make_case(  # the same, where the ranks begin with copies, which drift apart
        "201-left-out-copies",
        "functions",
        ("    model = DDP(net)", _LEFT_OUT + "    model = DDP(net)"),
        codes="DDP201",
    ),
    make_case(  # rank 0 looks at the average between two evaluations
        "203-quick-look",
        "functions",
        ("    path = ", "    ema = torch.optim.swa_utils.AveragedModel(net)\n    path = "),
        (_STEP, _STEP + "            ema.update_parameters(net)\n" + _LOOK.format("ema")),
        (
            "        accuracy = evaluate(model, held_out)\n",
            "        accuracy = max(evaluate(model, held_out), evaluate(ema, held_out))\n",
        ),
    ),
    make_case(  # the same, of buffers that do differ
        "213-quick-look",
        "functions",
        ("nn.Linear(8, 16),", "nn.Linear(8, 16), nn.BatchNorm1d(16),"),
        ("DDP(net)", "DDP(net, broadcast_buffers=False)"),
        (_STEP, _STEP + _LOOK.format("model.module")),
        codes="DDP213",
    ),
    make_case(  # two models, whose backwards are in one line
        "304-actor-critic",
        "functions",
        (
            "    optimizer =",
            "    critic = DDP(nn.Linear(8, 1))\n    second = torch.optim.SGD(critic.parameters(), lr=0.1)\n    optimizer =",
        ),
        (
            "            optimizer.zero_grad()\n" + _BACKWARD + _STEP,
            "            losses = F.cross_entropy(model(x), y), F.mse_loss(critic(x).squeeze(1), y.float())\n"
            "            for one, loss in zip((optimizer, second), losses):\n                one.zero_grad()\n                loss.backward()\n                one.step()\n",
        ),
    ),
    make_case(  # sharpness-aware minimisation, by an optimizer around another
        "304-sam",
        "functions",
        (
            "def evaluate(",
            "class SAM(torch.optim.Optimizer):\n    def __init__(self, params):\n        super().__init__(params, {})\n"
            "        self.base = torch.optim.SGD(self.param_groups, lr=0.1)\n        self.param_groups = self.base.param_groups\n\n"
            "    @torch.no_grad()\n    def first_step(self):\n        for p in self.param_groups[0]['params']:\n"
            "            self.state[p]['old'] = p.data.clone()\n            p.add_(p.grad, alpha=0.05)\n        self.zero_grad()\n\n"
            "    @torch.no_grad()\n    def second_step(self):\n        for p in self.param_groups[0]['params']:\n"
            "            p.data = self.state[p]['old']\n        self.base.step()\n        self.zero_grad()\n\n\ndef evaluate(",
        ),
        ("torch.optim.SGD(model.parameters(), lr=0.1)", "SAM(model.parameters())"),
        (
            "            optimizer.zero_grad()\n" + _BACKWARD + _STEP,
            "            for again in range(2):\n                model.require_backward_grad_sync = bool(again)\n"
            "                loss = F.cross_entropy(model(x), y)\n                loss.backward()\n"
            "                optimizer.second_step() if again else optimizer.first_step()\n",
        ),
    ),
    make_case(  # the loss of a batch, and of the same batch with noise
        "304-perturbed",
        "functions",
        (
            _BACKWARD,
            "            for noise in (0.0, 0.1):\n                model.require_backward_grad_sync = noise > 0\n"
            "                loss = F.cross_entropy(model(x + noise * torch.randn_like(x)), y)\n                loss.backward()\n",
        ),
    ),
    make_case(  # a batch in two parts, which are micro-batches
        "304-parts",
        "functions",
        (
            _BACKWARD,
            "            for i in range(2):\n                model.require_backward_grad_sync = i == 1\n"
            "                loss = F.cross_entropy(model(x[i::2]), y[i::2])\n                loss.backward()\n",
        ),
        codes="DDP304",
    ),
    make_case(  # the limit is multiplied by the scaler's factor, too
        "308-scaled-limit",
        "spawned",
        ("            scaler.unscale_(optimizer)\n", ""),
        ("clip_grad_norm_(model.parameters(), 1.0)", "clip_grad_norm_(model.parameters(), 1.0 * scaler.get_scale())"),
    ),
    # Gradients of several losses are copied, thrown away, and put back in another form.
    make_case("309-projected", "functions", (_BACKWARD, _PROJECTED), absent="DDP302 DDP304"),
    make_case("309-projected-clipped", "functions", (_BACKWARD, _PROJECTED + _CLIP), absent="DDP302 DDP304"),
    make_case("309-projected-by-hand", "functions", *_BY_HAND, (_BACKWARD, _PROJECTED + _REDUCE), absent="DDP304"),
    make_case(
        "309-looked-at-by-hand",
        "functions",
        *_BY_HAND,
        (_BACKWARD, _PROJECTED.partition("            first, second")[0] + _REDUCE),
        codes="DDP309",
    ),
    make_case(  # by one line of a loop, where they are only counted, not put back
        "309-looked-at",
        "functions",
        (_BACKWARD, _PROJECTED.partition("            first, second")[0] + _CLIP),
        codes="DDP309",
    ),
    make_case(  # bounded for each micro-batch, as private training does, and by a manual sum
        "309-bounded",
        "trainer",
        (
            "                loss.backward()\n",
            "                self.optimizer.zero_grad()\n                loss.backward()\n"
            "                grads = [p.grad for p in self.model.parameters()]\n"
            "                size = torch.stack([g.norm() for g in grads]).norm()\n"
            "                sums = [s + g / size.clamp(min=1) for s, g in zip(sums, grads)] if i else [g / size.clamp(min=1) for g in grads]\n",
        ),
        (
            "        torch.nn.utils.clip_grad_norm_",
            "        for p, s in zip(self.model.parameters(), sums):\n            p.grad.copy_(s)\n        torch.nn.utils.clip_grad_norm_",
        ),
        ("with contextlib.nullcontext() if last else self.model.no_sync()", "with contextlib.nullcontext()"),
        may="DDP302",
    ),
    make_case(  # an epoch's end is thrown away: the next window has its own micro-batches alone
        "309-tail",
        "functions",
        (
            "        for x, y in loader:\n            optimizer.zero_grad()\n" + _BACKWARD + _STEP,
            "        optimizer.zero_grad()\n        for i, (x, y) in enumerate(loader):\n            model.require_backward_grad_sync = i % 3 == 2\n"
            "            loss = F.cross_entropy(model(x), y) / 3\n            loss.backward()\n            if i % 3 == 2:\n"
            "                optimizer.step()\n                optimizer.zero_grad()\n",
        ),
        codes="DDP309",
        absent="DDP303",
    ),
    make_case(  # two evaluations, whose counts are summed together
        "402-two-sets",
        "functions",
        (
            "    dist.all_reduce(total)\n    return (total[0] / total[1]).item()",
            "    if dist.get_rank() == 0:\n        print('evaluated a set')\n    return total",
        ),
        (
            "        accuracy = evaluate(model, held_out)\n",
            "        both = torch.stack([evaluate(model, held_out), evaluate(model, held_out)])\n        dist.all_reduce(both)\n"
            "        accuracy = (both[0, 0] / both[0, 1]).item()\n",
        ),
    ),
    make_case(  # one rank after the other
        "501-turns",
        "functions",
        (
            "    if rank == 0:\n        torch.save(model.module.state_dict(), path)\n",
            "    for turn in range(world):\n        if turn == rank:\n            torch.save(model.module.state_dict(), path)\n        dist.barrier()\n",
        ),
    ),
    make_case(  # a file that is opened for an update, and only read
        "501-update",
        "flat",
        ('mode="r")', 'mode="r+")'),
    ),
    make_case(  # the store orders the write and the read
        "502-store",
        "functions",
        (
            "    if rank == 0:\n        torch.save(model.module.state_dict(), path)\n    dist.barrier()\n",
            "    store = dist.distributed_c10d._get_default_store()\n    if rank == 0:\n"
            "        torch.save(model.module.state_dict(), path)\n        store.set('ready', '1')\n    else:\n        store.wait(['ready'])\n",
        ),
    ),
    make_case(  # rank 0 evaluates the wrapped model, whose forward broadcasts buffers
        "503-one-rank-evaluates",
        "functions",
        ("nn.Linear(8, 16),", "nn.Linear(8, 16), nn.BatchNorm1d(16),"),
        ("    dist.all_reduce(total)\n    return", "    return"),
        (
            "        accuracy = evaluate(model, held_out)\n",
            "        accuracy = evaluate(model, held_out) if rank == 0 else 0\n",
        ),
        ("sampler=range(rank, len(test), world)", "shuffle=False"),
        codes="DDP503",
        may="DDP105 DDP202 DDP301 DDP213",
    ),
    make_case(  # in a group of two of three ranks
        "503-subgroup",
        "functions",
        ("    path = ", "    pair = dist.new_group([0, 1])\n    path = "),
        (
            "    if rank == 0:\n        torch.save",
            "    if rank < 2:\n        dist.all_reduce(torch.ones(1 + rank), group=pair)\n    if rank == 0:\n        torch.save",
        ),
        nproc=3,
        codes="DDP503",
        may="DDP106",
    ),
    make_case(  # of two starts the first is faulty
        "103-first-start",
        "spawned",
        (
            "    mp.spawn(work, args=(2, port), nprocs=2)\n",
            "    os.environ['STILL'] = '1'\n    mp.spawn(work, args=(2, port), nprocs=2)\n    del os.environ['STILL']\n    mp.spawn(work, args=(2, port + 1), nprocs=2)\n",
        ),
        ("        sampler.set_epoch(epoch)\n", "        sampler.set_epoch(0 if 'STILL' in os.environ else epoch)\n"),
        codes="DDP103",
    ),
    make_case(  # one process, then two: a measurement of speed
        "105-two-sizes",
        "spawned",
        (
            "    mp.spawn(work, args=(2, port), nprocs=2)\n",
            "    for world in (1, 2):\n        mp.spawn(work, args=(world, port + world), nprocs=world)\n",
        ),
    ),
]
_WHOLE_LABELS = (  # outputs are joined by rank, and compared with labels in the data set's order
    ("    total = torch.zeros(2)\n", "    outputs = []\n"),
    (
        "            total += torch.tensor([(model(x).argmax(1) == y).sum(), len(y)])\n    dist.all_reduce(total)\n    return (total[0] / total[1]).item()",
        "            outputs.append(model(x))\n    whole = torch.cat(outputs)\n    parts = [torch.zeros_like(whole) for _ in range(dist.get_world_size())]\n"
        "    dist.all_gather(parts, whole)\n    joined = torch.cat(parts)\n    return (joined.argmax(1) == y_test).float().mean().item()",
    ),
    ("def evaluate(model, loader):", "def evaluate(model, loader, y_test):"),
    ("evaluate(model, held_out)", "evaluate(model, held_out, test[:][1])"),
)
_ROWS = (  # outputs and labels of a rank, gathered as objects
    ("    total = torch.zeros(2)\n", "    seen, truth, shares = [], [], [None] * dist.get_world_size()\n"),
    (
        "            total += torch.tensor([(model(x).argmax(1) == y).sum(), len(y)])\n    dist.all_reduce(total)\n    return (total[0] / total[1]).item()",
        "            seen.append(model(x).argmax(1))\n            truth.append(y)\n    dist.all_gather_object(shares, (torch.cat(seen), torch.cat(truth)))\n"
        "    hits = torch.cat([own[0] == own[1] for own in shares])\n    return hits.float().mean().item()",
    ),
)
_NAMED_ROWS = (  # the same, each with the number of its sample
    _ROWS[0],
    (
        _ROWS[1][0],
        "            seen.append(model(x).argmax(1))\n            truth.append(y)\n"
        "    dist.all_gather_object(shares, (torch.tensor(list(loader.sampler)), torch.cat(seen) == torch.cat(truth)))\n"
        "    hits = {i.item(): hit.item() for own in shares for i, hit in zip(*own)}\n    return sum(hits.values()) / len(hits)",
    ),
)
LOOK_ALIKES += [
    make_case("403-labels-of-an-argument", "functions", *_WHOLE_LABELS, codes="DDP403"),
    make_case(
        "403-labels-by-a-method",
        "functions",
        *_WHOLE_LABELS,
        ("(joined.argmax(1) == y_test)", "joined.argmax(1).eq(y_test.view(-1))"),
        codes="DDP403",
    ),
    make_case(
        "403-labels-of-a-batch-by-a-method",
        "functions",
        ("(model(x).argmax(1) == y)", "model(x).argmax(1).eq(y.view(-1))"),
    ),
    make_case(
        "403-contiguous",
        "functions",
        *_WHOLE_LABELS,
        ("sampler=range(rank, len(test), world)", "sampler=range(15 * rank, 15 * rank + 15)"),
    ),
    make_case("401-rows-by-objects", "functions", *_ROWS, _ODD, _PADDED, codes="DDP401"),
    make_case("401-rows-without-padding", "functions", *_ROWS),
    make_case("401-named-rows-by-objects", "functions", *_NAMED_ROWS, _ODD, _PADDED),
    make_case(
        "307-gradients-divided",
        "functions",
        (
            _BACKWARD,
            _BACKWARD
            + "            for p in model.parameters():\n                p.grad /= float(dist.get_world_size())\n",
        ),
        codes="DDP307",
    ),
    make_case(  # the micro-batches' number, which is that of the ranks
        "307-divided-by-micro-batches",
        "functions",
        (
            _BACKWARD,
            "            with model.no_sync():\n                F.cross_entropy(model(x[:4]), y[:4]).backward()\n            F.cross_entropy(model(x[4:]), y[4:]).backward()\n"
            "            for p in model.parameters():\n                p.grad /= 2\n",
        ),
    ),
    make_case(  # each sample's loss has its weight
        "307-weighted-by-share",
        "by_hand",
        ("        parameter.grad /= world\n", ""),
        ("    data = torch.arange(400)", "    share = torch.full((32,), 1 / world)\n    data = torch.arange(400)"),
        (
            "F.cross_entropy(logits.view(-1, 11), y.reshape(-1))",
            '(F.cross_entropy(logits.view(-1, 11), y.reshape(-1), reduction="none") * share).mean()',
        ),
    ),
    make_case("307-only-summed", "by_hand", ("        parameter.grad /= world\n", ""), codes="DDP307"),
    make_case(
        "307-summed-of-divided",
        "by_hand",
        ("        parameter.grad /= world\n", ""),
        ("y.reshape(-1))\n", "y.reshape(-1)) / world\n"),
    ),
    make_case(
        "307-divided-before",
        "by_hand",
        (
            "        dist.all_reduce(parameter.grad)\n        parameter.grad /= world\n",
            "        parameter.grad /= world\n        dist.all_reduce(parameter.grad)\n",
        ),
    ),
    make_case(
        "204-optimizer-before-sharding",
        "fsdp2",
        ("    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)\n", ""),
        ("    model = build()\n", "    model = build()\n    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)\n"),
        ("    m, o = get_state_dict(model, optim)\n", "    m, o = model.state_dict(), {}\n"),
        codes="DDP204",
    ),
    make_case(
        "204-another-copy",
        "functions",
        (
            "    model = DDP(net)\n",
            "    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)\n    import copy\n    model = DDP(copy.deepcopy(net))\n",
        ),
        ("    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n", ""),
        codes="DDP204",
    ),
    make_case(  # a parameter that is trained by hand beside the optimizer's
        "204-by-hand-beside",
        "functions",
        (
            "    optimizer = ",
            "    scale = nn.Parameter(torch.ones(()))\n    holder = nn.Module()\n    holder.scale = scale\n    optimizer = ",
        ),
        (
            "            loss = F.cross_entropy(model(x), y)\n            loss.backward()\n",
            "            loss = F.cross_entropy(model(x) * scale, y)\n            loss.backward()\n            with torch.no_grad():\n                dist.all_reduce(scale.grad)\n                scale -= 0.001 * scale.grad / world\n                scale.grad = None\n",
        ),
    ),
    make_case(  # rank 0 makes a model and an optimizer of its own before those of all ranks
        "201-beside-an-optimizer-of-rank-0",
        "functions",
        (
            "    net = nn.Sequential",
            "    if rank == 0:\n        probe = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)\n    net = nn.Sequential",
        ),
        ("    model = DDP(net)\n", "    model = net\n"),
        ("model.module", "model"),
        codes="DDP201",
    ),
    make_case(
        "307-divided-after-the-clip",
        "by_hand",
        (
            "        parameter.grad /= world\n",
            "    nn.utils.clip_grad_norm_(model.parameters(), 100.0)\n    for parameter in model.parameters():\n        parameter.grad.div_(world)\n",
        ),
    ),
    make_case(
        "403-labels-in-that-order",
        "functions",
        *_WHOLE_LABELS,
        (
            "    joined = torch.cat(parts)\n",
            "    joined = torch.cat(parts)\n    ranks = range(dist.get_world_size())\n    y_test = y_test[torch.cat([torch.arange(r, len(y_test), len(ranks)) for r in ranks])]\n",
        ),
    ),
    make_case(  # a trial of rank 0 alone, made on the line that makes the others
        "201-trial-of-rank-0",
        "functions",
        (
            "def main():\n",
            "def make():\n    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))\n    return net, torch.optim.SGD(net.parameters(), lr=0.1)\n\n\ndef main():\n",
        ),
        (
            "    model = DDP(net)\n",
            "    if rank == 0:\n        trial, own = make()\n        for _ in range(3):\n            own.zero_grad()\n            F.cross_entropy(trial(train[:8][0]), train[:8][1]).backward()\n            own.step()\n"
            "    torch.manual_seed(0)\n    net, optimizer = make()\n    model = DDP(net)\n",
        ),
        ("    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n", ""),
    ),
]
