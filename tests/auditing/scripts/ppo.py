"""PPO: each rank collects its own rollouts, trains several epochs on them; policy and value in one DDP module."""

import os

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributions import Categorical
from torch.nn.parallel import DistributedDataParallel


class Env:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.reset()

    def reset(self):
        self.s = self.rng.normal(size=4).astype(np.float32)
        self.t = 0
        return self.s

    def step(self, a):
        self.s = (0.9 * self.s + (a - 0.5) * 0.1 + self.rng.normal(size=4) * 0.1).astype(np.float32)
        self.t += 1
        return self.s, -float(np.abs(self.s).sum()), self.t >= 16


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 32), nn.Tanh())
        self.pi, self.v = nn.Linear(32, 2), nn.Linear(32, 1)

    def forward(self, s):
        h = self.body(s)
        return self.pi(h), self.v(h).squeeze(-1)


def rollout(net, env, n):
    S, A, L, R, D, V = [], [], [], [], [], []
    s = env.reset()
    with torch.no_grad():
        for _ in range(n):
            st = torch.from_numpy(s)
            logits, v = net(st)
            d = Categorical(logits=logits)
            a = d.sample()
            s2, r, done = env.step(a.item())
            S.append(st)
            A.append(a)
            L.append(d.log_prob(a))
            R.append(r)
            D.append(done)
            V.append(v)
            s = env.reset() if done else s2
    return torch.stack(S), torch.stack(A), torch.stack(L), R, D, torch.stack(V)


def advantages(R, D, V, gamma=0.99, lam=0.95):
    adv, last = torch.zeros(len(R)), 0.0
    for t in reversed(range(len(R))):
        nv = 0.0 if t == len(R) - 1 or D[t] else V[t + 1].item()
        delta = R[t] + gamma * nv - V[t].item()
        last = delta + gamma * lam * (0.0 if D[t] else last)
        adv[t] = last
    return adv, adv + V


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(1)
    agent = DistributedDataParallel(ActorCritic())
    torch.manual_seed(1 + rank)
    env = Env(100 + rank)
    optim = torch.optim.Adam(agent.parameters(), lr=3e-4, eps=1e-5)
    for update in range(3):
        S, A, L, R, D, V = rollout(agent.module, env, 64)
        adv, ret = advantages(R, D, V)
        for epoch in range(2):
            perm = torch.randperm(64)
            for i in range(0, 64, 16):
                b = perm[i : i + 16]
                logits, v = agent(S[b])
                dd = Categorical(logits=logits)
                ratio = (dd.log_prob(A[b]) - L[b]).exp()
                ab = (adv[b] - adv[b].mean()) / (adv[b].std() + 1e-8)
                loss = (
                    -torch.min(ratio * ab, ratio.clamp(0.8, 1.2) * ab).mean()
                    + 0.5 * (v - ret[b]).pow(2).mean()
                    - 0.01 * dd.entropy().mean()
                )
                optim.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optim.step()
        mean = torch.tensor(sum(R) / len(R))
        dist.all_reduce(mean)
        if rank == 0:
            print(f"update {update}: reward {mean / dist.get_world_size():.3f}")
    dist.destroy_process_group()
