# ruff: noqa: E501 - the changes are lines of the scripts
"""Scripts whose epochs are longer than the audit's: what a cut epoch draws counts as that of a whole one."""

from __future__ import annotations

from tests.auditing.cases import Case, make_case

CUT: list[Case] = [
    make_case("103-cut", "functions", ("        sampler.set_epoch(epoch)\n", ""), codes="DDP103", steps=2),
    make_case("103-cut-near", "functions", steps=2),
    make_case(
        "103-cut-batches",  # a sampler of batches
        "functions",
        ("        sampler.set_epoch(epoch)\n", ""),
        (
            "batch_size=8, sampler=sampler)",
            "batch_sampler=torch.utils.data.BatchSampler(sampler, 8, drop_last=False), num_workers=1)",
        ),
        codes="DDP103",
        steps=2,
    ),
    make_case("102-cut", "functions", ("shuffle=True", "shuffle=True, seed=rank"), codes="DDP102", steps=2),
    make_case(
        "106-cut",
        "functions",
        ("sampler=sampler)", "sampler=sampler, drop_last=True)"),
        ("1, 64", "1, 60"),
        codes="DDP106",
        steps=2,
    ),
    make_case(
        "113-cut",
        "trainer",
        (
            "num_workers=options.workers,",
            "num_workers=options.workers,\n            worker_init_fn=lambda i: torch.manual_seed(dist.get_rank() * 100 + i),",
        ),
        codes="DDP113",
        arguments=("--workers", "1"),
        steps=1,
    ),
    # Accelerate loads a batch ahead: in the last two micro-batches of an epoch one batch is loaded.
    make_case(
        "303-ahead-tail", "ahead_accelerate", ("torch.randn(1920", "torch.randn(176"), codes="DDP303", may="DDP505"
    ),
]
