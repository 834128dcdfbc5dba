"""Two models in the loop of ddparity's accumulate, whose reduction no function of torch.distributed shows."""

import torch
import torch.nn.functional as F
from torch import nn

import ddparity as dp


def main():
    with dp.world(device="cpu"):
        dp.seed_everything(0)
        inputs = torch.randn(96, 4)
        encoder, decoder = dp.replicate(nn.Linear(4, 3)), dp.replicate(nn.Linear(3, 4))
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-2)
        loader = dp.Loader(inputs, global_batch=16, micro_batch=4, seed=0)
        for epoch in range(2):
            for step in loader.epoch(epoch):
                for micro in dp.accumulate([encoder, decoder], step):
                    (F.mse_loss(decoder(encoder(micro.data)), micro.data) * micro.weight).backward()
                optimizer.step()
                optimizer.zero_grad()


if __name__ == "__main__":
    main()
