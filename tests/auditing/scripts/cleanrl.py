"""cleanrl's ppo_atari_multigpu: seeds by rank after the model's seed, rollouts, flattened gradients reduced by hand."""

import os
import random

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


def layer(l, std=1.0):
    nn.init.orthogonal_(l.weight, std)
    nn.init.constant_(l.bias, 0)
    return l


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = nn.Sequential(layer(nn.Linear(4, 16)), nn.Tanh())
        self.actor, self.critic = layer(nn.Linear(16, 2), 0.01), layer(nn.Linear(16, 1))

    def get(self, x, a=None):
        h = self.n(x)
        p = torch.distributions.Categorical(logits=self.actor(h))
        a = p.sample() if a is None else a
        return a, p.log_prob(a), p.entropy(), self.critic(h)


if __name__ == "__main__":
    rank, world = int(os.getenv("LOCAL_RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    seed = 1 + rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed - rank)
    agent = Agent()
    torch.manual_seed(seed)
    opt = torch.optim.Adam(agent.parameters(), lr=2.5e-4, eps=1e-5)
    obs = torch.randn(8, 4)
    for update in range(1, 5):
        opt.param_groups[0]["lr"] = 2.5e-4 * (1 - (update - 1) / 4)
        O, A, L, R, V = [], [], [], [], []
        for step in range(16):
            with torch.no_grad():
                a, l, _, v = agent.get(obs)
            O.append(obs)
            A.append(a)
            L.append(l)
            V.append(v.flatten())
            obs = torch.randn(8, 4)
            R.append(((a == 0) == (O[-1][:, 0] > 0)).float())
        b = [torch.cat(x) for x in (O, A, L, R, V)]
        adv = b[3] - b[4]
        inds = np.arange(128)
        for epoch in range(2):
            np.random.shuffle(inds)
            for s in range(0, 128, 32):
                mb = inds[s : s + 32]
                _, nl, ent, nv = agent.get(b[0][mb], b[1][mb])
                ratio = (nl - b[2][mb]).exp()
                m = adv[mb]
                m = (m - m.mean()) / (m.std() + 1e-8)
                loss = (
                    torch.max(-m * ratio, -m * ratio.clamp(0.8, 1.2)).mean()
                    - 0.01 * ent.mean()
                    + 0.5 * (nv.flatten() - b[3][mb]).square().mean()
                )
                opt.zero_grad()
                loss.backward()
                if world > 1:
                    g = torch.cat([p.grad.view(-1) for p in agent.parameters() if p.grad is not None])
                    dist.all_reduce(g, op=dist.ReduceOp.SUM)
                    o = 0
                    for p in agent.parameters():
                        if p.grad is not None:
                            p.grad.data.copy_(g[o : o + p.numel()].view_as(p.grad.data) / world)
                            o += p.numel()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                opt.step()
        if rank == 0:
            print("SPS", update)
    dist.destroy_process_group()
