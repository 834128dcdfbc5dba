# ruff: noqa: E501 - the changes are lines of the scripts
"""Scripts beside the line: they look faulty and are right, or the other way round. For `make audit-corpus` alone."""

from __future__ import annotations

import importlib.util

from tests.auditing.cases import Case, make_case

_STEP = "            optimizer.step()\n"
_WRITER = "from torch.utils.tensorboard import SummaryWriter\nimport tempfile as t; "
_TAIL = (  # an evaluation whose shards are unequal
    "    dist.all_reduce(total)\n    return (total[0] / total[1]).item()",
    "    mean = total[0] / total[1]\n    dist.all_reduce(mean)\n    return mean.item() / dist.get_world_size()",
)

NEAR: list[Case] = [
    make_case("101-near", "functions", ("shuffle=True)", "shuffle=True, num_replicas=world, rank=rank)")),
    make_case("102-near", "functions", ("shuffle=True", "shuffle=True, seed=5")),
    make_case(
        "103-near",
        "functions",
        ("        sampler.set_epoch(epoch)\n", ""),
        ("        model.train()\n", "        model.train()\n        loader.sampler.set_epoch(epoch)\n"),
    ),
    make_case(
        "104-near",
        "functions",
        (
            "make_data(1, 64)",
            "torch.utils.data.random_split(make_data(1, 80), [64, 16], torch.Generator().manual_seed(4))[0]",
        ),
    ),
    make_case("105-near", "functions", ("make_data(1, 64)", "make_data(1, 62)")),
    make_case(
        "106-near",
        "functions",
        ("make_data(1, 64)", "make_data(1, 66)"),
        ("sampler=sampler)", "sampler=sampler, drop_last=True)"),
    ),
    make_case(
        "107-near",
        "functions",
        ("shuffle=True", "shuffle=False"),
        ("make_data(1, 64), make", "torch.utils.data.Subset(make_data(1, 64), torch.randperm(64).tolist()), make"),
        may="DDP103",
    ),
    make_case("109-near", "stream", ("num_workers=2", "num_workers=0")),
    make_case(
        "111-near",
        "trainer",
        ("    Trainer(", "    torch.manual_seed(dist.get_rank())\n    Trainer("),
        arguments=("--workers", "0"),
    ),
    make_case(
        "114-near",
        "hf_like",
        ("nn.Dropout(0.1)", "nn.Dropout(0.0)"),
        ("manual_seed(11 + rank)", "manual_seed(11)"),
        absent="DDP114",
    ),
    make_case(
        "201-near", "functions", ("    model = DDP(net)", "    net[0].requires_grad_(False)\n    model = DDP(net)")
    ),
    make_case("202-near", "functions", (_STEP, _STEP + "            optimizer.param_groups[0]['lr'] *= 0.9\n")),
    make_case(
        "203-near",
        "functions",
        ("    model = DDP(net)", "    import copy\n    model = DDP(net)\n    ema = copy.deepcopy(model.module).eval()"),
        (
            _STEP,
            _STEP
            + "            for a, b in zip(ema.parameters(), model.module.parameters()):\n                a.data.lerp_(b.data, 0.1)\n",
        ),
    ),
    make_case(
        "211-near",
        "functions",
        ("nn.Linear(8, 16),", "nn.Linear(8, 16), nn.GroupNorm(2, 16),"),
        ("batch_size=8, sampler=sampler)", "batch_size=2, sampler=sampler)"),
    ),
    make_case(
        "212-near",
        "functions",
        ("nn.Linear(8, 16),", "nn.Linear(8, 16), nn.BatchNorm1d(16),"),
        ("DDP(net)", "DDP(dp.convert_sync_batchnorm(net))"),
        ("import torch\nimport", "import ddparity as dp\nimport torch\nimport"),
    ),
    make_case("213-near", "functions", ("DDP(net)", "DDP(net, broadcast_buffers=False)")),
    make_case(
        "213-copy",
        "functions",
        ("nn.Linear(8, 16),", "nn.Linear(8, 16), nn.BatchNorm1d(16),"),
        (
            "    model = DDP(net)",
            "    model = DDP(net)\n    ema = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)",
        ),
        (_STEP, _STEP + "            ema.update_parameters(net)\n"),
        (
            "        accuracy = evaluate(model, held_out)\n",
            "        accuracy = max(evaluate(model, held_out), evaluate(ema, held_out))\n",
        ),
        may="DDP213",  # a note: what each rank's forward left
    ),
    make_case("302-near", "gan"),
    make_case(
        "303-near",
        "trainer",
        ("    Trainer(", "    torch.manual_seed(dist.get_rank())\n    Trainer("),
        arguments=("--samples", "88", "--accumulate", "3", "--workers", "0"),
    ),
    make_case(
        "306-near", "functions", (_STEP, "            nn.utils.clip_grad_norm_(model.parameters(), 0.01)\n" + _STEP)
    ),
    make_case(
        "307-near",
        "functions",
        (
            "            loss.backward()\n",
            "            loss.backward()\n            seen = loss.detach().clone()\n            dist.all_reduce(seen)\n            seen /= world\n",
        ),
    ),
    make_case(
        "306-by-value",
        "by_hand",
        (
            "        loss.backward()\n",
            "        loss.backward()\n        nn.utils.clip_grad_value_(model.parameters(), 0.0005)\n",
        ),
        codes="DDP306",
    ),
    make_case(
        "309-by-the-model",
        "trainer",
        (
            "                loss.backward()\n",
            "                self.model.zero_grad()\n                loss.backward()\n",
        ),
        codes="DDP309",
        may="DDP111",
        arguments=("--workers", "0"),
    ),
    make_case(
        "309-near",
        "functions",
        ("            optimizer.zero_grad()\n", ""),
        (_STEP, _STEP + "            optimizer.zero_grad()\n"),
    ),
    make_case("401-near", "hf_like", ("tokenise(21, 2)", "tokenise(20, 2)")),
    make_case(
        "402-near",
        "functions",
        (
            _TAIL[0],
            "    mean = total\n    gathered = [torch.zeros(2) for _ in range(dist.get_world_size())]\n    dist.all_gather(gathered, mean)\n    return (sum(gathered)[0] / sum(gathered)[1]).item()",
        ),
    ),
    make_case(
        "402-gathered-in-one",
        "functions",
        (
            "    dist.all_reduce(total)\n",
            "    both = torch.zeros(4)\n    getattr(dist, 'all_gather_single', dist.all_gather_into_tensor)(both, total)\n"
            "    total = both.view(2, 2).sum(0)\n",
        ),
    ),
    make_case(
        "402-beside-another-reduction",
        "functions",
        ("    dist.all_reduce(total)\n    return", "    return"),
        (
            "        accuracy = evaluate(model, held_out)\n",
            "        accuracy = evaluate(model, held_out)\n        last = loss.detach().clone()\n        dist.all_reduce(last)\n        last /= world\n",
        ),
        codes="DDP402",
    ),
    make_case(
        "402-beside-a-barrier",
        "functions",
        ("    dist.all_reduce(total)\n    return", "    dist.barrier()\n    return"),
        codes="DDP402",
    ),
    make_case(
        "402-by-files",
        "functions",
        (
            "    dist.all_reduce(total)\n    return",
            "    folder = tempfile.gettempdir()\n    name = f'ddparity-{os.environ[\"MASTER_PORT\"]}'\n"
            "    torch.save(total, os.path.join(folder, f'{name}.{dist.get_rank()}'))\n    dist.barrier()\n"
            "    total = sum(torch.load(os.path.join(folder, f'{name}.{r}')) for r in range(2))\n    dist.barrier()\n    return",
        ),
    ),
    make_case(
        "401-batch-means",
        "functions",
        (
            "            total += torch.tensor([(model(x).argmax(1) == y).sum(), len(y)])\n    dist.all_reduce(total)\n    return (total[0] / total[1]).item()",
            "            part = (model(x).argmax(1) == y).float().mean()\n            dist.all_reduce(part)\n            total += torch.stack([part / dist.get_world_size() * len(y), torch.tensor(float(len(y)))])\n    return (total[0] / total[1]).item()",
        ),
        ("sampler=range(rank, len(test), world)", "sampler=DistributedSampler(test, shuffle=False)"),
        ("make_data(2, 30)", "make_data(2, 31)"),
        codes="DDP401",
    ),
    make_case(
        "402-by-a-helper",
        "functions",
        ("EPOCHS = 2\n", "EPOCHS = 2\n\n\ndef summed(value):\n    dist.all_reduce(value)\n    return value\n"),
        ("    dist.all_reduce(total)\n    return (total", "    total = summed(total)\n    return (total"),
    ),
    make_case(
        "402-in-the-caller",
        "functions",
        (_TAIL[0], "    return total"),
        (
            "        accuracy = evaluate(model, held_out)\n",
            "        counts = evaluate(model, held_out)\n        both = counts.clone()\n        dist.all_reduce(both)\n        accuracy = (both[0] / both[1]).item()\n",
        ),
    ),
    make_case(
        "403-labels-too",
        "functions",
        (
            "    dist.all_reduce(total)\n",
            "    outputs = torch.cat([model(x) for x, _ in loader]).detach()\n    labels = torch.cat([y for _, y in loader])\n"
            "    both = [[torch.zeros_like(v) for _ in range(2)] for v in (outputs, labels)]\n"
            "    dist.all_gather(both[0], outputs)\n    dist.all_gather(both[1], labels)\n    dist.all_reduce(total)\n",
        ),
    ),
    make_case(
        "404-near",
        "functions",
        (
            "        accuracy = evaluate(model, held_out)\n",
            "        accuracy = evaluate(model.module, held_out) if rank == 0 else 0\n        dist.barrier()\n",
        ),
        ("sampler=range(rank, len(test), world)", "shuffle=False"),
        ("    dist.all_reduce(total)\n    return", "    return"),
        absent="DDP404",
    ),
    make_case("405-near", "functions", _TAIL),
    make_case("405-trainer-style", "functions", _TAIL, ("make_data(2, 30)", "make_data(2, 27)"), codes="DDP405"),
    make_case(
        "501-near",
        "functions",
        (
            "    if rank == 0:\n        torch.save(model.module.state_dict(), path)\n",
            "    torch.save(model.module.state_dict(), f'{path}.{rank}')\n",
        ),
        ("    torch.load(path)\n", "    torch.load(f'{path}.{rank}')\n"),
        ("        os.remove(path)\n", "        os.remove(path + '.0'), os.remove(path + '.1')\n"),
    ),
    make_case("502-near", "functions", ("    torch.load(path)\n", "    torch.load(path) if rank == 1 else None\n")),
    make_case("503-near", "functions", (_STEP, _STEP + "            dist.all_reduce(torch.ones(3 if epoch else 2))\n")),
    make_case(
        "601-near",
        "functions",
        ('        if rank == 0:\n            print(f"epoch', '        if True:\n            print(f"rank {rank} epoch'),
    ),
    make_case(
        "601-captured",
        "functions",
        ("EPOCHS = 2\n", "EPOCHS = 2\nimport contextlib, io\n"),
        (
            _STEP,
            _STEP + "            with contextlib.redirect_stdout(io.StringIO()):\n                print('not shown')\n",
        ),
        absent="DDP601",
    ),
    make_case(
        "602-near",
        "hf_like",
        (
            "in windows(loader, args.gradient_accumulation_steps)",
            "in __import__('tqdm').tqdm(windows(loader, 3), disable=rank != 0)",
        ),
        absent="DDP602",
    ),
    make_case(
        "602-class",
        "trainer",
        ("for batch in self.loader", "for batch in __import__('tqdm').tqdm(self.loader, desc='train')"),
        codes="DDP602",
    ),
    make_case(
        "603-near",
        "functions",
        ("EPOCHS = 2\n", f"EPOCHS = 2\n{_WRITER}folder = t.mkdtemp()\n"),
        ("    for epoch in", "    writer = SummaryWriter(folder) if rank == 0 else None\n    for epoch in"),
        absent="DDP603",
    ),
    make_case(
        "603-class",
        "trainer",
        ("import argparse\n", "import argparse\nimport tempfile\n"),
        (
            "        self.loss =",
            "        from torch.utils import tensorboard\n        self.log = tensorboard.SummaryWriter(log_dir=tempfile.mkdtemp())\n        self.loss =",
        ),
        codes="DDP603",
    ),
    make_case(
        "701-near",
        "functions",
        ("DDP(net)", "DDP(Branch(net), find_unused_parameters=True)"),
        (
            "EPOCHS = 2\n",
            "EPOCHS = 2\n\n\nclass Branch(nn.Module):\n    def __init__(self, net):\n        super().__init__()\n        self.net, self.other, self.calls = net, nn.Linear(8, 2), 0\n\n    def forward(self, x):\n        self.calls += 1\n        return self.net(x) + (self.other(x) if self.calls % 3 else 0)\n",
        ),
    ),
    make_case(
        "702-slow-data",
        "trainer",
        (
            "        return self.x[index]",
            "        __import__('time').sleep(0.004 if dist.get_rank() == 0 else 0)\n        return self.x[index]",
        ),
        arguments=("--workers", "0", "--samples", "320"),
        codes="DDP702",
        may="DDP111",
    ),
    make_case(
        "702-near",
        "functions",
        ("EPOCHS = 2", "EPOCHS = 4\nimport time"),
        ("            loss.backward()\n", "            time.sleep(0.02)\n            loss.backward()\n"),
        absent="DDP702",
    ),
    make_case(
        "703-near",
        "nanogpt",
        (
            "torch.triu(torch.ones(block_size, block_size, dtype=torch.bool), 1))",
            'torch.triu(torch.ones(block_size, block_size, dtype=torch.bool), 1))\n        self.register_buffer("table", torch.zeros(100, 100))',
        ),
        absent="DDP703",
    ),
    make_case(
        "704-near",
        "functions",
        (_STEP, _STEP + "            if epoch % 2:\n                loss.item()\n"),
        absent="DDP704",
    ),
    make_case(
        "fsdp1-clip",
        "fsdp1",
        ("model.clip_grad_norm_(1.0)", "nn.utils.clip_grad_norm_(model.parameters(), 0.01)"),
        codes="DDP306",
    ),
    make_case("fsdp1-101", "fsdp1", ("sampler=sampler", "shuffle=True"), codes="DDP101"),
]
NEAR += [
    make_case(
        "303-two-losses",
        "trainer",
        (
            "                loss.backward()\n",
            "                penalty = self.loss(self.model(x), -y) / len(window)\n                loss.backward()\n"
            "                penalty.backward()\n",
        ),
        ("with contextlib.nullcontext() if last", "with contextlib.nullcontext() if False"),
        (
            "        torch.nn.utils.clip_grad_norm_",
            "        for p in self.model.parameters():\n            dist.all_reduce(p.grad)\n            p.grad /= self.world\n        torch.nn.utils.clip_grad_norm_",
        ),
        ("    Trainer(", "    torch.manual_seed(dist.get_rank())\n    Trainer("),
        arguments=("--accumulate", "4", "--workers", "0"),
    )
]
NEAR += [
    make_case(f"clean-{one}", one) for one in ("detectron", "dino", "rasampler", "guided", "fairseq", "clip", "cleanrl")
]
NEAR += [
    make_case("113-basicsr", "basicsr", codes="DDP113"),  # worker_init_fn seeds alike in each epoch, as BasicSR's does
    make_case("clean-rasampler-3", "rasampler", nproc=3),
    make_case("clean-clip-3", "clip", nproc=3),
]
if importlib.util.find_spec("torchdata"):
    NEAR += [
        make_case("stateful-near", "stateful"),
        make_case("stateful-near-workers", "stateful", arguments=("--workers", "2")),
        make_case(
            "stateful-101",
            "stateful",
            ("sampler=sampler", "shuffle=True, generator=torch.Generator().manual_seed(1)"),
            codes="DDP101",
        ),
        make_case(
            "stateful-103",
            "stateful",
            ("        sampler.set_epoch(epoch)\n", ""),
            codes="DDP103",
            arguments=("--workers", "2"),
        ),
    ]
