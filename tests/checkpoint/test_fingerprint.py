from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import nn

import ddparity as dp
from tests.ranks import run_ranks


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_it_is_sha_256_of_names_shapes_dtypes_and_bytes() -> None:
    weight = torch.tensor([[1.0, 2.0]])
    expected = hashlib.sha256(json.dumps(["w", "torch.float32", [1, 2]]).encode() + b"\0" + weight.numpy().tobytes())
    assert dp.fingerprint({"w": weight}) == expected.hexdigest()


def test_equal_models_have_equal_fingerprints() -> None:
    model = _net()
    expected = dp.fingerprint(model)
    state = model.state_dict()
    assert dp.fingerprint(_net()) == expected
    assert dp.fingerprint(state) == expected
    assert dp.fingerprint(dict(reversed(state.items()))) == expected
    assert dp.fingerprint({f"module.{name}": value for name, value in state.items()}) == expected
    assert dp.fingerprint({f"_orig_mod.module.{name}": value for name, value in state.items()}) == expected
    assert dp.fingerprint(torch.compile(_net())) == expected
    assert dp.fingerprint({name: value.t().contiguous().t() for name, value in state.items()}) == expected


def _wrapped_inside() -> list[str]:
    ddp = nn.parallel.DistributedDataParallel
    several = [ddp(_net()), ddp(_net())]
    return [dp.fingerprint(several), dp.fingerprint(nn.ModuleList(several)), dp.fingerprint(ddp(_net()))]


def test_models_inside_of_ddp_count_without_it() -> None:
    several = dp.fingerprint(nn.ModuleList([_net(), _net()]))
    assert dp.fingerprint([_net(), _net()]) == several
    assert run_ranks(_wrapped_inside, 1) == [[several, several, dp.fingerprint(_net())]]
    with pytest.raises(TypeError, match="got a list: give a module, several, or a state dict"):
        dp.fingerprint([_net(), None])


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["0.weight"].view(torch.int32)[0, 0].bitwise_xor_(1),  # the last bit
        lambda s: s.update({"0.weight": s["0.weight"].double()}),
        lambda s: s.update({"0.weight": s["0.weight"].reshape(3, 2)}),
        lambda s: s.update({"0.other": s.pop("0.weight")}),
        lambda s: s["1.num_batches_tracked"].add_(1),
        lambda s: s.pop("0.bias"),
        lambda s: s.update({"0.bias": s["0.bias"].flip(0)}),
    ],
)
def test_any_change_shows(change) -> None:
    state = {name: value.clone() for name, value in _net().state_dict().items()}
    before = dp.fingerprint(state)
    change(state)
    assert dp.fingerprint(state) != before


def test_nested_state_counts_as_a_whole() -> None:
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters())
    before = dp.fingerprint(optimizer.state_dict())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert dp.fingerprint(optimizer.state_dict()) != before
    with pytest.raises(TypeError, match="x is a object"):
        dp.fingerprint({"x": object()})
    with pytest.raises(TypeError, match="got a list"):
        dp.fingerprint([1])


def _wrapped() -> list[str]:
    model = dp.replicate(_net())
    return [dp.fingerprint(model), dp.fingerprint(model.module)]


def test_ddp_does_not_show() -> None:
    assert run_ranks(_wrapped, 2) == [[dp.fingerprint(_net())] * 2] * 2
