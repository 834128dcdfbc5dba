"""Draw terminal_parity.svg and terminal_audit.svg, the pictures of the README, from real runs.

    python docs/terminal.py

It trains examples/digits.py on one process and on four, and audits a script with two common faults. It takes about a
minute on two cores.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

DOCS = Path(__file__).parent
WIDTH = 104  # characters

# As in many tutorials: each rank draws its own data set, and nobody calls set_epoch.
SCRIPT = """\
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

dist.init_process_group("gloo")
x = torch.rand(512, 20)
data = TensorDataset(x, x.sum(1, keepdim=True))
loader = DataLoader(data, batch_size=32, sampler=DistributedSampler(data))
model = DistributedDataParallel(torch.nn.Linear(20, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for epoch in range(3):
    for inputs, targets in loader:
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
dist.destroy_process_group()
"""


def run(words: list[str], folder: str) -> str:
    """Return what a command of ddparity prints, in colours. An audit that finds faults ends with 1."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "ddparity", *words]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}")
    # The path of the temporary folder says nothing; spaces in its place keep the table's width.
    return re.sub(rf"{re.escape(folder)}/(\S+)", lambda found: found[1] + " " * (len(folder) + 1), done.stdout)


def draw(name: str, title: str, parts: list[tuple[str, str]]) -> None:
    """Draw commands and what they printed."""
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, color_system="truecolor")
        for number, (command, printed) in enumerate(parts):
            console.print(Text(("\n" if number else "") + "$ ", style="bold green").append(command, style="bold white"))
            console.print(Text.from_ansi(printed.rstrip()))
    svg = console.export_svg(title=title, theme=MONOKAI, unique_id=name)
    # rich loads its font from the network. Characters keep their places with any font of fixed width.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")
    (DOCS / f"{name}.svg").write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")


def last_table(printed: str) -> str:
    """Return the last lines, from the table's title on."""
    lines = printed.rstrip().splitlines()
    start = max(number for number, line in enumerate(lines) if "trained on" in line)
    return "\n".join(lines[start:])


def main() -> None:
    """Run everything, and draw."""
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for nproc in (1, 4):
            words = ["train", "digits.py", "--nproc", str(nproc), "--reduction", "strict"]
            (Path(folder) / "digits.py").write_text((DOCS.parent / "examples" / "digits.py").read_text())
            parts.append((f"ddparity {' '.join(words)}", last_table(run(words, folder))))
        draw("terminal_parity", "the same bits on 1 and 4 processes", parts)
        (Path(folder) / "train.py").write_text(SCRIPT)
        printed = run(["audit", "train.py"], folder)
        draw("terminal_audit", "what is wrong with a script", [("ddparity audit train.py", printed)])


if __name__ == "__main__":
    main()
