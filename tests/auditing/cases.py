# ruff: noqa: E501 - the changes are lines of the scripts
"""The corpus: scripts without a fault, and the same scripts with one planted, as a change of their text.

python -m tests.auditing.cases [NAME...]        # runs all cases, or those whose name begins so
"""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import runpy
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ddparity.auditing.recording.install import begin
from ddparity.auditing.records import read_run
from ddparity.auditing.run import Report, compare, inspect_script
from tests.ranks import outcomes

SCRIPTS = Path(__file__).parent / "scripts"


@dataclasses.dataclass(frozen=True)
class Case:
    """A change of a script, and the codes that must be found.

    `allowed`: those that may be found, as their consequences. `absent`: those that must not, not even as a note.
    """

    name: str
    script: str
    changes: tuple[tuple[str, str], ...] = ()
    expected: frozenset[str] = frozenset()
    allowed: frozenset[str] = frozenset()
    arguments: tuple[str, ...] = ()
    nproc: int = 2
    absent: frozenset[str] = frozenset()
    steps: int = 50  # of an epoch, after which its loop is cut

    @property
    def hangs(self) -> bool:
        return bool(self.expected & {"DDP105", "DDP503"})

    def text(self) -> str:
        text = (SCRIPTS / f"{self.script}.py").read_text()
        for old, new in self.changes:
            assert text.count(old) >= 1, f"{self.name}: {old!r} is not in {self.script}.py"
            text = text.replace(old, new)
        return text


def make_case(
    name: str,
    script: str,
    *changes: tuple[str, str],
    codes: str = "",
    may: str = "",
    absent: str = "",
    arguments: tuple[str, ...] = (),
    nproc: int = 2,
    steps: int = 50,
) -> Case:
    expected, allowed, unwanted = (frozenset(text.split()) for text in (codes, may, absent))
    return Case(name, script, changes, expected, allowed, arguments, nproc, unwanted, steps)


CLEAN = [
    make_case("clean-functions", "functions"),
    make_case("clean-functions-3", "functions", nproc=3),
    make_case("clean-trainer", "trainer"),
    make_case("clean-trainer-tail", "trainer", arguments=("--samples", "80", "--accumulate", "3", "--workers", "2")),
    make_case("clean-spawned", "spawned"),
    make_case("clean-gan", "gan"),
    make_case("clean-by-hand", "by_hand"),
    make_case("clean-stream", "stream"),
    make_case("clean-imagenet", "imagenet"),
    make_case("clean-nanogpt", "nanogpt"),
    make_case("clean-hf-like", "hf_like"),
    make_case("clean-wgan", "wgan"),
    make_case("clean-sharded", "sharded"),
    make_case("clean-accumulated", "accumulated"),
    make_case(
        "clean-unequal-shards",
        "functions",
        (
            "train, test = make_data(1, 64)",
            "train, test = torch.utils.data.Subset(make_data(1, 84), range(0, 64) if rank == 0 else range(64, 84))",
        ),
        (
            "sampler = DistributedSampler(train, shuffle=True)",
            "sampler = torch.utils.data.RandomSampler(train, num_samples=16)",
        ),
        ("        sampler.set_epoch(epoch)\n", ""),
        may="DDP106",
    ),
    make_case("clean-short-tail", "trainer", arguments=("--samples", "84", "--accumulate", "3")),
    make_case("clean-autograd", "functions", ("loss.backward()", "torch.autograd.backward([loss])")),
    make_case(
        "clean-sliced",
        "functions",
        (
            "sampler = DistributedSampler(train, shuffle=True)",
            "sampler = torch.utils.data.RandomSampler(train, generator=torch.Generator().manual_seed(4))",
        ),
        ("        sampler.set_epoch(epoch)\n", ""),
        (
            "            optimizer.zero_grad()\n",
            "            x, y = x[rank::world], y[rank::world]\n            optimizer.zero_grad()\n",
        ),
    ),
    make_case(
        "clean-reducing-optimizer",
        "functions",
        (
            "EPOCHS = 2\n",
            "EPOCHS = 2\n\n\nclass Reducing(torch.optim.SGD):\n    def step(self, closure=None):\n        for group in self.param_groups:\n            for p in group['params']:\n                dist.all_reduce(p.grad)\n                p.grad /= dist.get_world_size()\n        return super().step(closure)\n",
        ),
        ("model = DDP(net)", "model = net"),
        ("model.module", "model"),
        ("torch.optim.SGD(model", "Reducing(model"),
    ),
    make_case(
        "clean-averaged-parameters",
        "functions",
        ("model = DDP(net)", "model = net"),
        ("model.module", "model"),
        (
            "            optimizer.step()\n",
            "            optimizer.step()\n            with torch.no_grad():\n                for p in model.parameters():\n                    dist.all_reduce(p)\n                    p /= world\n",
        ),
        codes="DDP310",
    ),
    *([make_case("clean-accelerated", "accelerated")] if importlib.util.find_spec("accelerate") else []),
    make_case(
        "clean-compiled",
        "functions",
        ("model = DDP(net)", "model = DDP(net)\n    step_model = torch.compile(model, backend='eager')"),
        ("F.cross_entropy(model(x), y)", "F.cross_entropy(step_model(x), y)"),
    ),
    make_case(
        "clean-manual-shards",
        "functions",
        (
            "train, test = make_data(1, 64), make_data(2, 30)",
            "train, test = make_data(10 + rank, 64), make_data(2, 30)",
        ),
        ("sampler = DistributedSampler(train, shuffle=True)", "sampler = torch.utils.data.RandomSampler(train)"),
        ("        sampler.set_epoch(epoch)\n", ""),
    ),
    make_case(
        "clean-weighted-sampler",
        "functions",
        (
            "sampler = DistributedSampler(train, shuffle=True)",
            "sampler = torch.utils.data.WeightedRandomSampler(torch.ones(64), 32)",
        ),
        ("        sampler.set_epoch(epoch)\n", ""),
    ),
    make_case(
        "clean-unfrozen-rewrapped",
        "functions",
        (
            "        model.train()\n",
            "        if epoch == 0:\n            net[0].requires_grad_(False)\n            model = DDP(net)\n"
            "        else:\n            net.requires_grad_(True)\n            model = DDP(net)\n        model.train()\n",
        ),
    ),
    make_case(
        "clean-join",
        "functions",
        ("sampler = DistributedSampler(train, shuffle=True)", "sampler = list(range(rank, 64 - 17 * rank, world))"),
        ("        sampler.set_epoch(epoch)\n", ""),
        (
            "        for x, y in loader:\n            optimizer.zero_grad()\n            loss = F.cross_entropy(model(x), y)\n"
            "            loss.backward()\n            optimizer.step()\n",
            "        with model.join():\n            for x, y in loader:\n                optimizer.zero_grad()\n"
            "                loss = F.cross_entropy(model(x), y, reduction='sum') / 16\n                loss.backward()\n"
            "                optimizer.step()\n",
        ),
        may="DDP106 DDP305",
    ),
]

FAULTY = [
    # The data.
    make_case("101-no-sampler", "functions", ("sampler=sampler", "shuffle=False"), codes="DDP101"),
    make_case("101-shuffled", "trainer", ("sampler=self.sampler", "shuffle=True"), codes="DDP101"),
    make_case(
        "101-one-rank",
        "functions",
        ("train, shuffle=True", "train, world, 0, shuffle=True"),
        codes="DDP101",
        may="DDP111",
    ),
    make_case(
        "101-by-hand",
        "by_hand",
        ("generator = torch.Generator().manual_seed(1337 + rank)", "generator = torch.Generator().manual_seed(1337)"),
        ("nn.Dropout(0.1)", "nn.Identity()"),
        codes="DDP101",
    ),
    make_case("101-stream", "stream", ("Lines(96, rank, world)", "Lines(96, 0, 1)"), codes="DDP101"),
    make_case(
        "101-generator",
        "functions",
        ("sampler=sampler", "shuffle=True, generator=torch.Generator().manual_seed(0)"),
        codes="DDP101",
    ),
    make_case("102-seeds", "functions", ("shuffle=True", "shuffle=True, seed=rank"), codes="DDP102"),
    make_case("102-trainer", "trainer", ("seed=3", "seed=3 + dist.get_rank()"), codes="DDP102"),
    make_case("103-functions", "functions", ("        sampler.set_epoch(epoch)\n", ""), codes="DDP103"),
    make_case("103-trainer", "trainer", ("            self.sampler.set_epoch(epoch)\n", ""), codes="DDP103"),
    make_case("103-spawned", "spawned", ("        sampler.set_epoch(epoch)\n", ""), codes="DDP103"),
    make_case(
        "104-random-data",
        "functions",
        ("make_data(1, 64), make_data(2, 30)", "make_data(10 + rank, 64), make_data(2, 30)"),
        codes="DDP104",
    ),
    make_case("104-split", "spawned", (", generator=torch.Generator().manual_seed(42)", ""), codes="DDP104"),
    make_case(
        "105-sampler",
        "functions",
        ("sampler = DistributedSampler(train, shuffle=True)", "sampler = range(rank, 64 - 17 * rank, world)"),
        ("        sampler.set_epoch(epoch)\n", ""),
        codes="DDP105",
        may="DDP503 DDP106 DDP107 DDP305",
    ),
    make_case("105-stream", "stream", ("Lines(96,", "Lines(96 - 30 * rank,"), codes="DDP105", may="DDP503 DDP305"),
    make_case(
        "106-drop",
        "trainer",
        ("num_workers=options.workers,", "drop_last=True,"),
        codes="DDP106",
        may="DDP111 DDP112",
        arguments=("--batch", "16", "--workers", "0"),
    ),
    make_case(
        "109-workers",
        "stream",
        ("self.rank * workers + worker, None, self.world * workers", "self.rank, None, self.world"),
        codes="DDP109",
    ),
    make_case(
        "111-main",
        "trainer",
        ("            generator=torch.Generator().manual_seed(100 + self.rank),\n", ""),
        codes="DDP111",
        arguments=("--workers", "0"),
    ),
    make_case("112-workers", "trainer", ("manual_seed(100 + self.rank)", "manual_seed(100)"), codes="DDP112"),
    make_case("111-numpy", "spawned", ("np.random.seed(10 + rank)", "np.random.seed(10)"), codes="DDP111"),
    make_case(
        "113-worker-init",
        "trainer",
        (
            "num_workers=options.workers,",
            "num_workers=options.workers,\n            worker_init_fn=lambda i: torch.manual_seed(dist.get_rank() * 100 + i),",
        ),
        codes="DDP113",
    ),
    make_case("111-noise", "gan", ("torch.manual_seed(50 + rank)", "torch.manual_seed(50)"), codes="DDP111"),
    # The model.
    make_case(
        "201-no-ddp", "functions", ("model = DDP(net)", "model = net"), ("model.module", "model"), codes="DDP201"
    ),
    make_case(
        "201-module",
        "trainer",
        ("self.loss(self.model(x), y)", "self.loss(self.model.module(x), y)"),
        codes="DDP201",
        may="DDP306",
    ),
    make_case(
        "201-frozen",
        "functions",
        ("model = DDP(net)", "net[0].requires_grad_(False)\n    model = DDP(net)"),
        (
            "        model.train()\n",
            "        model.train()\n        net.requires_grad_(epoch > 0)\n        net[2].requires_grad_(True)\n",
        ),
        codes="DDP201",
        may="DDP202",
    ),
    make_case(
        "201-outside",
        "functions",
        ("    model = DDP(net)\n", "    model = DDP(net)\n    head = nn.Linear(2, 2)\n"),
        ("F.cross_entropy(model(x), y)", "F.cross_entropy(head(model(x)), y)"),
        ("torch.optim.SGD(model.parameters()", "torch.optim.SGD([*model.parameters(), *head.parameters()]"),
        codes="DDP201",
    ),
    make_case("202-rate", "functions", ("lr=0.1", "lr=0.1 * (rank + 1)"), codes="DDP202"),
    make_case(
        "202-loaded",
        "trainer",
        (
            "        self.loss = nn.MSELoss()",
            "        self.loss = nn.MSELoss()\n        if self.rank == 0:\n            nn.init.zeros_(self.model.module[0].bias)",
        ),
        codes="DDP202",
    ),
    make_case(
        "203-no-broadcast", "by_hand", ("        dist.broadcast(parameter.data, src=0)", "        pass"), codes="DDP203"
    ),
    make_case(
        "203-teacher",
        "functions",
        ("    path = ", "    teacher = nn.Linear(8, 2)\n    path = "),
        (
            "            loss = F.cross_entropy(model(x), y)\n",
            "            teacher.eval()\n            loss = F.cross_entropy(model(x), y) + F.mse_loss(model(x), teacher(x).detach())\n",
        ),
        codes="DDP203",
        may="DDP302",
    ),
    make_case("211-few", "spawned", ("DataLoader(train, 10,", "DataLoader(train, 2,"), codes="DDP211"),
    make_case(
        "212-left-out",
        "imagenet",
        (
            "model = torch.nn.parallel.Dist",
            "import ddparity\n    model = nn.Sequential(ddparity.convert_sync_batchnorm(model), nn.BatchNorm1d(4))\n    model = torch.nn.parallel.Dist",
        ),
        codes="DDP212",
    ),
    make_case("213-buffers", "spawned", ("DDP(net())", "DDP(net(), broadcast_buffers=False)"), codes="DDP213"),
    # The gradients.
    make_case(
        "301-tail",
        "trainer",
        ("last = i == len(window) - 1", "last = i == self.options.accumulate - 1"),
        codes="DDP301",
        arguments=("--accumulate", "3"),
        may="DDP306",
    ),
    make_case(
        "301-always",
        "functions",
        (
            "            loss = F.cross_entropy(model(x), y)\n            loss.backward()\n",
            "            with model.no_sync():\n                loss = F.cross_entropy(model(x), y)\n                loss.backward()\n",
        ),
        codes="DDP301",
    ),
    make_case(
        "302-no-no-sync",
        "trainer",
        ("contextlib.nullcontext() if last else self.model.no_sync()", "contextlib.nullcontext()"),
        codes="DDP302",
    ),
    make_case(
        "302-backward-only",
        "trainer",
        (
            "            with contextlib.nullcontext() if last else self.model.no_sync():\n                loss = self.loss(self.model(x), y) / len(window)\n",
            "            loss = self.loss(self.model(x), y) / len(window)\n            with contextlib.nullcontext() if last else self.model.no_sync():\n",
        ),
        codes="DDP302",
    ),
    make_case(
        "303-tail",
        "trainer",
        ("/ len(window)", "/ self.options.accumulate"),
        codes="DDP303",
        arguments=("--accumulate", "3"),
    ),
    make_case("304-undivided", "trainer", (" / len(window)", ""), codes="DDP304"),
    make_case(
        "305-unequal",
        "functions",
        ("sampler = DistributedSampler(train, shuffle=True)", "sampler = range(rank, 64 - 6 * rank, world)"),
        ("        sampler.set_epoch(epoch)\n", ""),
        codes="DDP305",
        may="DDP106 DDP107",
    ),
    make_case("305-tokens", "stream", ("target[-2:] = -100", "target[: i % 5] = -100"), codes="DDP305"),
    make_case(
        "306-clip",
        "by_hand",
        (
            "        average_gradients(model, world)\n",
            "        nn.utils.clip_grad_norm_(model.parameters(), 0.1)\n        average_gradients(model, world)\n",
        ),
        codes="DDP306",
    ),
    make_case(
        "307-twice",
        "functions",
        (
            "            loss.backward()\n",
            "            loss.backward()\n            for parameter in model.parameters():\n                dist.all_reduce(parameter.grad)\n",
        ),
        codes="DDP307",
    ),
    make_case(
        "307-redundant",
        "functions",
        (
            "            loss.backward()\n",
            "            loss.backward()\n            for parameter in model.parameters():\n                dist.all_reduce(parameter.grad)\n                parameter.grad /= world\n",
        ),
        codes="DDP307",
    ),
    make_case(
        "307-scaled",
        "functions",
        ("F.cross_entropy(model(x), y)", "F.cross_entropy(model(x), y) / world_size"),
        ("    rank, world =", "    world_size = dist.get_world_size()\n    rank, world ="),
        codes="DDP307",
    ),
    make_case("308-clip-scaled", "spawned", ("            scaler.unscale_(optimizer)\n", ""), codes="DDP308"),
    make_case(
        "309-zeroed",
        "trainer",
        (
            "        for i, (x, y) in enumerate(window):\n",
            "        for i, (x, y) in enumerate(window):\n            self.optimizer.zero_grad()\n",
        ),
        codes="DDP309",
    ),
    # Evaluation, files, collectives, output, speed.
    make_case(
        "401-padding",
        "functions",
        ("sampler=range(rank, len(test), world)", "sampler=DistributedSampler(test, shuffle=False)"),
        ("make_data(2, 30)", "make_data(2, 31)"),
        codes="DDP401",
    ),
    make_case("402-shard", "functions", ("    dist.all_reduce(total)\n", ""), codes="DDP402"),
    make_case(
        "403-order",
        "functions",
        (
            "            total += torch.tensor([(model(x).argmax(1) == y).sum(), len(y)])\n    dist.all_reduce(total)\n",
            "            outputs.append(model(x))\n    whole = torch.cat(outputs)\n    parts = [torch.zeros_like(whole) for _ in range(dist.get_world_size())]\n    dist.all_gather(parts, whole)\n    labels = loader.dataset.tensors[1]\n    total = torch.tensor([(torch.cat(parts).argmax(1) == labels).sum(), len(labels)])\n",
        ),
        ("    total = torch.zeros(2)\n", "    outputs = []\n"),
        codes="DDP403",
    ),
    make_case(
        "404-everything", "functions", ("sampler=range(rank, len(test), world)", "shuffle=False"), codes="DDP404"
    ),
    make_case(
        "405-means",
        "functions",
        (
            "    dist.all_reduce(total)\n    return (total[0] / total[1]).item()",
            "    mean = total[0] / total[1]\n    dist.all_reduce(mean)\n    return mean.item() / dist.get_world_size()",
        ),
        ("make_data(2, 30)", "make_data(2, 29)"),
        codes="DDP405",
    ),
    make_case(
        "501-all-save",
        "functions",
        (
            "    if rank == 0:\n        torch.save(model.module.state_dict(), path)\n",
            "    torch.save(model.module.state_dict(), path)\n",
        ),
        codes="DDP501",
    ),
    make_case(
        "502-no-barrier",
        "functions",
        (
            "path)\n    dist.barrier()\n",
            "path)\n    while not os.path.exists(path):\n        pass\n    import time\n    time.sleep(0.5)\n",
        ),
        codes="DDP502",
    ),
    make_case(
        "503-one-rank",
        "functions",
        (
            "    torch.load(path)\n",
            "    torch.load(path)\n    if rank == 0:\n        dist.all_reduce(torch.ones(3))\n    else:\n        dist.barrier()\n",
        ),
        codes="DDP503",
    ),
    make_case(
        "505-and-other-notes",
        "functions",
        ("    dist.destroy_process_group()\n", ""),
        ("        if rank == 0:\n            print(", "        if True:\n            print("),
        (
            "EPOCHS = 2\n",
            "EPOCHS = 4\nimport time, tqdm, tempfile as t\nfrom torch.utils.tensorboard import SummaryWriter\nfolder = t.mkdtemp()\n",
        ),
        ("    for epoch in", "    writer = SummaryWriter(folder)\n    for epoch in"),
        (
            "        for x, y in loader:\n            optimizer",
            "        for x, y in tqdm.tqdm(loader):\n            optimizer",
        ),
        (
            "            optimizer.step()\n",
            "            time.sleep(0.04 * rank)\n            optimizer.step()\n            loss.item()\n",
        ),
        ("DDP(net)", "DDP(net, find_unused_parameters=True)"),
        ("shuffle=True", "shuffle=False"),
        ("make_data(1, 64)", "make_data(1, 65)"),
        ("sampler=range(rank, len(test), world)", "shuffle=False"),
        codes="DDP505 DDP601 DDP602 DDP603 DDP701 DDP702 DDP704 DDP107 DDP108 DDP404",
    ),
    make_case("505-destroy", "trainer", ("    dist.destroy_process_group()\n", ""), codes="DDP505"),
    make_case(
        "601-prints",
        "functions",
        ("        if rank == 0:\n            print(", "        if True:\n            print("),
        codes="DDP601",
    ),
    make_case(
        "603-functions",
        "functions",
        (
            "EPOCHS = 2\n",
            "EPOCHS = 2\nfrom torch.utils.tensorboard import SummaryWriter\nimport tempfile as t; folder = t.mkdtemp()\n",
        ),
        ("    for epoch in", "    writer = SummaryWriter(folder)\n    for epoch in"),
        codes="DDP603",
    ),
    make_case(
        "702-sleeps",
        "functions",
        ("EPOCHS = 2", "EPOCHS = 4\nimport time"),
        ("            loss.backward()\n", "            time.sleep(0.04 * rank)\n            loss.backward()\n"),
        codes="DDP702",
    ),
    make_case("701-unused", "functions", ("DDP(net)", "DDP(net, find_unused_parameters=True)"), codes="DDP701"),
    make_case(
        "704-item",
        "functions",
        ("            optimizer.step()\n", "            optimizer.step()\n            loss.item()\n"),
        codes="DDP704",
    ),
    # The same faults in other styles.
    make_case(
        "101-imagenet",
        "imagenet",
        ("shuffle=(train_sampler is None)", "shuffle=True"),
        ("        sampler=train_sampler,\n", ""),
        codes="DDP101",
    ),
    make_case(
        "101-nanogpt",
        "nanogpt",
        ("1337 + seed_offset", "1337"),
        ("dropout=0.1", "dropout=0.0"),
        ("iter_num % eval_interval == 0 and master_process", "False"),
        codes="DDP101",
    ),
    make_case(
        "102-hf",
        "hf_like",
        ("sampler = DistributedSampler(train, seed=11)", "sampler = DistributedSampler(train, seed=11 + rank)"),
        codes="DDP102",
    ),
    make_case("103-imagenet", "imagenet", ("            train_sampler.set_epoch(epoch)\n", ""), codes="DDP103"),
    make_case(
        "103-wrong-sampler",
        "hf_like",
        ("        sampler.set_epoch(epoch)\n", "        check.sampler.set_epoch(epoch)\n"),
        codes="DDP103",
    ),
    make_case("104-hf", "hf_like", ("tokenise(80, 1)", "tokenise(80, 1 + rank)"), codes="DDP104", may="DDP305"),
    make_case(
        "106-imagenet",
        "imagenet",
        ("FakeImages(96, True)", "FakeImages(100, True)"),
        ("sampler=train_sampler", "sampler=train_sampler, drop_last=True"),
        ("default=12, type=int", "default=32, type=int"),
        codes="DDP106",
    ),
    make_case(
        "112-imagenet",
        "imagenet",
        ("torch.manual_seed(args.seed + args.rank)", "torch.manual_seed(args.seed)"),
        codes="DDP112",
    ),
    make_case(
        "113-imagenet",
        "imagenet",
        (
            "num_workers=args.workers",
            "num_workers=args.workers, worker_init_fn=lambda i: random.seed(args.rank * 64 + i)",
        ),
        codes="DDP113",
    ),
    make_case("201-wgan", "wgan", ("            average(critic)\n", ""), codes="DDP201"),
    make_case(
        "201-nanogpt-raw",
        "nanogpt",
        ("            logits, loss = model(X, Y)", "            logits, loss = raw_model(X, Y)"),
        codes="DDP201",
        may="DDP306",
    ),
    make_case(
        "201-hf-head",
        "hf_like",
        (
            "model = DistributedDataParallel(LM())",
            "lm = LM()\n    lm.head.requires_grad_(False)\n    model = DistributedDataParallel(lm)\n    lm.head.requires_grad_(True)",
        ),
        codes="DDP201",
        may="DDP306",
    ),
    make_case(
        "202-nanogpt",
        "nanogpt",
        ("learning_rate * (it + 1)", "(1 + seed_offset) * learning_rate * (it + 1)"),
        codes="DDP202",
    ),
    make_case(
        "203-wgan",
        "wgan",
        ("    critic = nn.Sequential(", "    torch.manual_seed(rank)\n    critic = nn.Sequential("),
        codes="DDP203",
    ),
    make_case("211-imagenet", "imagenet", ("default=12, type=int", "default=4, type=int"), codes="DDP211"),
    make_case(
        "213-imagenet",
        "imagenet",
        ("DistributedDataParallel(model)", "DistributedDataParallel(model, broadcast_buffers=False)"),
        codes="DDP213",
    ),
    make_case(
        "301-nanogpt",
        "nanogpt",
        ("micro_step == gradient_accumulation_steps - 1", "False"),
        codes="DDP301",
        may="DDP306",
    ),
    make_case(
        "301-hf-tail",
        "hf_like",
        ("i == len(window) - 1", "i == args.gradient_accumulation_steps - 1"),
        codes="DDP301",
        may="DDP306",
    ),
    make_case(
        "302-nanogpt",
        "nanogpt",
        (
            "            model.require_backward_grad_sync = micro_step == gradient_accumulation_steps - 1\n",
            "            pass\n",
        ),
        codes="DDP302",
    ),
    make_case(
        "303-nanogpt", "nanogpt", ("loss = loss / gradient_accumulation_steps", "loss = loss / 4"), codes="DDP303"
    ),
    make_case("304-nanogpt", "nanogpt", ("loss = loss / gradient_accumulation_steps", "pass"), codes="DDP304"),
    make_case(
        "305-hf",
        "hf_like",
        ('reduction="sum"', 'reduction="mean"'),
        (" * world / tokens.item()", " / len(window)"),
        codes="DDP305",
    ),
    make_case(  # each rank divides the sum by its own count
        "305-hf-own",
        "hf_like",
        ("            dist.all_reduce(tokens)\n", ""),
        (" * world / tokens.item()", " / tokens.item()"),
        codes="DDP305",
    ),
    make_case(
        "306-wgan",
        "wgan",
        (
            "            average(critic)\n",
            "            nn.utils.clip_grad_norm_(critic.parameters(), 0.01)\n            average(critic)\n",
        ),
        codes="DDP306",
    ),
    make_case(
        "307-imagenet",
        "imagenet",
        (
            "        loss.backward()\n",
            "        loss.backward()\n        for p in model.parameters():\n            dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)\n",
        ),
        codes="DDP307",
    ),
    make_case(
        "308-nanogpt",
        "nanogpt",
        ("enabled=False", "enabled=True, init_scale=64.0"),
        ("        scaler.unscale_(optimizer)\n", ""),
        codes="DDP308",
    ),
    make_case(
        "309-nanogpt",
        "nanogpt",
        (
            "        scaler.scale(loss).backward()",
            "        optimizer.zero_grad(set_to_none=True)\n        scaler.scale(loss).backward()",
        ),
        codes="DDP309",
    ),
    make_case(
        "401-imagenet",
        "imagenet",
        ("shuffle=False, drop_last=True", "shuffle=False"),
        ("    if len(loader.sampler) * args.world_size < len(loader.dataset):\n", "    if False:\n"),
        codes="DDP401",
    ),
    make_case(
        "402-imagenet",
        "imagenet",
        ("    losses.all_reduce()\n    top1.all_reduce()\n", ""),
        ("if len(loader.sampler) * args.world_size < len(loader.dataset)", "if False"),
        ("shuffle=False, drop_last=True", "shuffle=False"),
        codes="DDP402",
    ),
    make_case(
        "501-imagenet",
        "imagenet",
        (
            "            if args.rank == 0:\n                save_checkpoint",
            "            if True:\n                save_checkpoint",
        ),
        (
            "    with tempfile.TemporaryDirectory() as folder:",
            "    folder = os.path.join(os.path.dirname(__file__), 'kept')\n    os.makedirs(folder, exist_ok=True)\n    if True:",
        ),
        codes="DDP501",
    ),
    make_case(
        "502-read-early",
        "hf_like",
        (
            "    logging.basicConfig(",
            '    name = os.path.join(os.path.dirname(__file__), "kept.json")\n    if rank == 0:\n        open(name, "w").write("1")\n    while not os.path.exists(name):\n        pass\n    open(name).read()\n    logging.basicConfig(',
        ),
        codes="DDP502",
    ),
    make_case(
        "602-bars",
        "hf_like",
        ("in windows(loader, args.gradient_accumulation_steps)", "in __import__('tqdm').tqdm(windows(loader, 3))"),
        codes="DDP602",
    ),
    make_case(
        "701-nanogpt",
        "nanogpt",
        ("model = DDP(model)", "model = DDP(model, find_unused_parameters=True)"),
        codes="DDP701",
    ),
    make_case(
        "703-nanogpt",
        "nanogpt",
        (
            "torch.triu(torch.ones(block_size, block_size, dtype=torch.bool), 1))",
            'torch.triu(torch.ones(block_size, block_size, dtype=torch.bool), 1))\n        self.register_buffer("table", torch.zeros(600, 600))',
        ),
        codes="DDP703",
    ),
    make_case("107-never", "functions", ("shuffle=True", "shuffle=False"), codes="DDP107"),
    make_case("108-padding", "functions", ("make_data(1, 64)", "make_data(1, 65)"), codes="DDP108"),
    make_case("114-dropout", "hf_like", ("torch.manual_seed(11 + rank)", "torch.manual_seed(11)"), codes="DDP114"),
    make_case(
        "404-imagenet",
        "imagenet",
        ("sampler=val_sampler", "sampler=None"),
        ("    if len(loader.sampler) * args.world_size < len(loader.dataset):\n", "    if False:\n"),
        codes="DDP404",
    ),
    make_case(
        "503-hf",
        "hf_like",
        ("            dist.all_reduce(tokens)\n", "            dist.all_reduce(tokens) if rank else dist.barrier()\n"),
        codes="DDP503",
    ),
    make_case("505-imagenet", "imagenet", ("    dist.destroy_process_group()\n", ""), codes="DDP505"),
    make_case(
        "601-imagenet",
        "imagenet",
        ('    if args.rank == 0:\n        print(f" * Acc', '    if True:\n        print(f" * Acc'),
        codes="DDP601",
    ),
    make_case(
        "704-nanogpt",
        "nanogpt",
        (
            "        scaler.scale(loss).backward()",
            "        print(loss.item()) if loss.item() < 0 else None\n        scaler.scale(loss).backward()",
        ),
        codes="DDP704",
    ),
]


# Clean scripts that look like a fault. Those whose name begins with a code look like that one.
LOOKS_LIKE = {
    "clean-accel_nlp": "DDP306 DDP401",
    "clean-buckets": "DDP105",
    "clean-cycle": "DDP401 DDP403",
    "clean-dcgan": "DDP302 DDP309",
    "clean-detectron": "DDP103 DDP503",
    "clean-distill": "DDP104 DDP203",
    "clean-flat": "DDP201 DDP502",
    "clean-gan": "DDP111 DDP204",
    "clean-groups": "DDP503",
    "clean-hf-like": "DDP114 DDP305 DDP307 DDP601",
    "clean-imagenet": "DDP107",
    "clean-iterable": "DDP109",
    "clean-join": "DDP105",
    "clean-kfold": "DDP402",
    "clean-lbfgs": "DDP301",
    "clean-manual-shards": "DDP104",
    "clean-moco": "DDP213",
    "clean-modern": "DDP114 DDP303",
    "clean-nanogpt": "DDP101 DDP704",
    "clean-rasampler": "DDP102",
    "clean-reducing-optimizer": "DDP201",
    "clean-short-tail": "DDP301 DDP303",
    "clean-sliced": "DDP101",
    "clean-snapshot": "DDP501",
    "clean-spawned": "DDP106 DDP308 DDP404 DDP505 DDP702",
    "clean-stream": "DDP109",
    "clean-sums": "DDP405 DDP701",
    "clean-unfrozen-rewrapped": "DDP201",
    "clean-weighted-sampler": "DDP102",
    "clean-wgan": "DDP202 DDP309",
    "113-two-models": "DDP103",
    "212-converted": "DDP211",
    "304-weighted": "DDP303 DDP305",
}


def looks_like(case: Case) -> frozenset[str]:
    """Return the codes of the faults that a case looks like and does not have: they must not be found."""
    named = [f"DDP{case.name[:3]}"] if case.name[:3].isdigit() else []
    return frozenset([*named, *LOOKS_LIKE.get(case.name, "").split()]) - case.expected - case.allowed


def all_cases() -> list[Case]:
    """Return the whole corpus."""
    from tests.auditing.cut_loops import CUT
    from tests.auditing.look_alikes import LOOK_ALIKES
    from tests.auditing.more_cases import MORE
    from tests.auditing.near_misses import NEAR

    return [*CLEAN, *FAULTY, *MORE, *NEAR, *LOOK_ALIKES, *CUT]


def judge(case: Case, launched: bool | None = None) -> tuple[str, list[str]]:
    """Run a case. Return what is wrong with its findings ("": nothing), and the findings in words.

    Most cases run in forks of a process that has imported torch. `launched`: start the script as the command does.
    """
    if launched is None:
        launched = case.script in ("spawned", "hogwild") or case.hangs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{case.script}.py"
        path.write_text(case.text())
        options = {"nproc": case.nproc, "steps": case.steps}
        report = inspect_script(path, case.arguments, **options) if launched else _forked(case, path)
    codes = {one.code for one in report.findings}
    loud = {one.code for one in report.findings if one.severity != "note"}
    unwanted = case.absent | looks_like(case)
    missing, extra = case.expected - codes, (loud - case.expected - case.allowed) | (codes & unwanted)
    words = [f"{one.severity} {one.code} {one.line}/{one.cause_line}: {one.message}" for one in report.findings]
    wrong = [f"not found: {', '.join(sorted(missing))}"] if missing else []
    wrong += [f"false: {', '.join(sorted(extra))}"] if extra else []
    wrong += [one for one in report.seen["blind"] if "recorder" in one]
    if report.failed and not case.hangs:
        wrong.append(f"exit code {report.run.exit_code}")
    return "; ".join(wrong), words


def _forked(case: Case, path: Path) -> Report:
    records = path.parent / "records"
    records.mkdir()
    ended = outcomes(_run_script, case.nproc, str(records), str(path), case.arguments, case.steps, in_world=False)
    for one in ended:
        if one.error:
            print(one.trace)
    return compare(read_run(records, path, int(any(one.error for one in ended))))


def _run_script(records: str, path: str, arguments: tuple[str, ...], steps: int) -> None:
    sys.argv = [path, *arguments]
    for seed in (torch.seed, random.seed, np.random.seed):
        seed()  # the server's streams would be those of all ranks
    finish = begin(records, steps)
    runpy.run_path(path, run_name="__main__")
    finish()


def main() -> None:
    names = [one for one in sys.argv[1:] if one != "-v"]
    chosen = [one for one in all_cases() if not names or one.name.startswith(tuple(names))]
    failed = 0
    for case in chosen:
        start = time.monotonic()
        wrong, words = judge(case)
        failed += bool(wrong)
        print(f"## {case.name}: {wrong or 'right'} ({time.monotonic() - start:.1f} s)", flush=True)
        if wrong or "-v" in sys.argv:
            print("\n".join(f"##     {one}" for one in words), flush=True)
    print(f"## {len(chosen) - failed} of {len(chosen)} cases are right")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
