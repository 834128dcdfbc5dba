"""In the way of Accelerate's examples: prepare, accumulate, gather_for_metrics."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def make_data(count, seed):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(1) > 0).long())


def main():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(42)
    loader = DataLoader(make_data(96, 0), batch_size=6, shuffle=True)
    check = DataLoader(make_data(31, 1), batch_size=6)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
    model, optimizer, loader, check, schedule = accelerator.prepare(model, optimizer, loader, check, schedule)
    for epoch in range(2):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        model.eval()
        right = count = 0
        for x, y in check:
            with torch.no_grad():
                predicted = model(x).argmax(-1)
            predicted, y = accelerator.gather_for_metrics((predicted, y))
            right, count = right + (predicted == y).sum().item(), count + len(y)
        accelerator.print(f"epoch {epoch}: {right / count:.3f} of {count}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
