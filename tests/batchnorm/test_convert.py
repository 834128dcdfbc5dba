"""Tests of the conversion to SyncBatchNorm and back: each module stays the same object."""

from __future__ import annotations

import copy
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torchvision.models import resnet18

import ddparity as dp

from ..ranks import outcomes, run_ranks


class Activated(nn.BatchNorm2d):
    """Like timm's BatchNormAct2d: its own forward calls torch's function and then an activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.GELU()
        self.colour = "blue"

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, factor, self.eps
        )
        return self.act(y)


class Scaled(nn.BatchNorm2d):
    """Its own forward calls the forward of the base class."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.BatchNorm2d):
    """It has no own forward."""


class ByHand(nn.BatchNorm2d):
    """It computes its statistics itself, without torch's function."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((0, 2, 3), keepdim=True)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


X = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))


# --- what the conversion keeps ---


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, Activated, Scaled])
def test_a_module_stays_the_same_object(kind: type[nn.Module]) -> None:
    layer: Any = kind(4)
    layer.weight.requires_grad_(False)
    layer.half().eval()
    layer.qconfig = "kept"
    layer.register_buffer("extra", torch.ones(2))
    handle = layer.register_forward_hook(lambda module, args, output: output)
    before, hooks = dict(layer.__dict__), dict(layer._forward_hooks)
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    converted = dp.convert_sync_batchnorm(layer)
    assert converted is layer and isinstance(layer, dp.SyncBatchNorm) and not layer.training
    assert all(value is parameters[name] for name, value in layer.named_parameters())
    assert all(value is buffers[name] for name, value in layer.named_buffers())
    assert layer._forward_hooks == hooks and layer.qconfig == "kept"
    assert layer.weight.dtype == torch.float16 and not layer.weight.requires_grad and layer.bias.requires_grad
    assert before.keys() <= layer.__dict__.keys()
    handle.remove()


def test_an_optimizer_from_before_the_conversion_stays_valid() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dp.convert_sync_batchnorm(model)
    model(X).square().sum().backward()
    before = model[1].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


def test_a_shared_layer_stays_shared() -> None:
    shared = nn.BatchNorm2d(4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU(), shared), "b": shared})
    dp.convert_sync_batchnorm(model)
    assert type(model["a"][0]) is dp.SyncBatchNorm
    assert model["a"][0] is model["a"][2] is model["b"]


def test_other_norms_are_not_converted() -> None:
    model = nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4), nn.LayerNorm(3))
    kinds = [type(module) for module in model]
    assert [type(module) for module in dp.convert_sync_batchnorm(model)] == kinds


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm1d, (2, 4, 3, 3)), (nn.BatchNorm2d, (2, 4)), (nn.BatchNorm3d, (2, 4, 3, 3))]
)
def test_the_number_of_dimensions_is_checked(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        dp.convert_sync_batchnorm(kind(4))(torch.ones(shape))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_state_dicts_are_interchangeable(kind: type[nn.Module]) -> None:
    plain, ours = kind(4), dp.SyncBatchNorm(4)
    plain.running_mean += 1
    plain.num_batches_tracked += 3
    assert list(plain.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(ours.running_mean, plain.running_mean) and ours.num_batches_tracked == 3
    kind(4).load_state_dict(ours.state_dict(), strict=True)


# --- logs and errors ---


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_conversion_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class MyBatchNorm(nn.Module):
        pass

    class Statistics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(4))
            self.register_buffer("running_var", torch.ones(4))

    replaced = nn.BatchNorm2d(4)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.Sequential(
        nn.BatchNorm2d(4), MyBatchNorm(), nn.Sequential(Statistics()), replaced, torch.jit.script(nn.BatchNorm2d(4))
    )
    with caplog.at_level(logging.INFO, "ddparity"):
        dp.convert_sync_batchnorm(model)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "convert_sync_batchnorm: converted 1 batch norm",
        "convert_sync_batchnorm: did not convert modules that look like a batch norm: 1 (MyBatchNorm), "
        "2.0 (Statistics), 3 (BatchNorm2d), 4 (RecursiveScriptModule)",
    ]
    assert type(model[3]) is nn.BatchNorm2d


def test_a_lazy_batch_norm_raises_an_error_before_any_conversion() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.LazyBatchNorm2d()))
    with pytest.raises(ValueError, match=r"1\.0 \(LazyBatchNorm2d\) has seen no input"):
        dp.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    model(X)
    assert type(dp.convert_sync_batchnorm(model)[1][0]) is dp.SyncBatchNorm


def test_an_argument_that_is_not_a_module_raises_an_error() -> None:
    with pytest.raises(TypeError, match="got a dict"):
        dp.convert_sync_batchnorm({})  # type: ignore[type-var]


def _regrouped() -> tuple[bool, bool, bool]:
    group = dist.new_group([0, 1])
    layer = dp.convert_sync_batchnorm(nn.BatchNorm2d(4), group)
    kept = dp.convert_sync_batchnorm(layer).process_group is group
    other = dist.new_group([0, 1])
    torchs = dp.convert_sync_batchnorm(nn.SyncBatchNorm(4, process_group=group)).process_group is group
    dist.barrier()  # otherwise the first rank to exit closes connections that the other rank still opens
    return kept, dp.convert_sync_batchnorm(layer, other).process_group is other, torchs


def test_converting_again_keeps_the_group_unless_another_is_given() -> None:
    assert run_ranks(_regrouped, 2) == [(True, True, True)] * 2


# --- subclasses and parametrizations ---


def _subclass(kind: type[nn.BatchNorm2d]) -> tuple[Tensor, Tensor, dict[str, Tensor], bool, str]:
    layer: Any = dp.convert_sync_batchnorm(kind(4))
    x = X.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    y = layer(x)
    y.sin().sum().backward()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins = [copy.deepcopy(layer), torch.load(file, weights_only=False)]
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    again = layer(x)
    same = all(type(twin) is type(layer) and torch.equal(twin(x), again) for twin in twins)
    return y.detach(), x.grad, state, same, type(dp.revert_sync_batchnorm(layer)).__name__


@pytest.mark.parametrize("kind", [Activated, Scaled, Renamed])
def test_a_subclass_keeps_its_forward_and_is_synchronised(kind: type[nn.BatchNorm2d]) -> None:
    local, x = kind(4), X.clone().requires_grad_()
    y = local(x)
    y.sin().sum().backward()
    results = run_ranks(_subclass, 2, kind)
    torch.testing.assert_close(torch.cat([result[0] for result in results]), y.detach())
    torch.testing.assert_close(torch.cat([result[1] for result in results]), x.grad)
    for _, _, state, same, reverted in results:
        torch.testing.assert_close(state, dict(local.state_dict()))
        assert same and reverted == kind.__name__


def _recomputed(kind: type[nn.BatchNorm2d], checkpointed: bool) -> dict[str, Tensor]:
    layer: Any = dp.convert_sync_batchnorm(kind(4))
    x = X.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    y.sin().sum().backward()
    return {**layer.state_dict(), "dx": x.grad}


@pytest.mark.parametrize("kind", [Activated, Scaled])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_recomputed_forward_of_a_subclass_updates_nothing(world_size: int, kind: type[nn.BatchNorm2d]) -> None:
    expected = run_ranks(_recomputed, world_size, kind, False)
    torch.testing.assert_close(run_ranks(_recomputed, world_size, kind, True), expected, rtol=0, atol=0)


def _by_hand() -> None:
    model = dp.convert_sync_batchnorm(nn.Sequential(nn.ReLU(), ByHand(4)))
    assert model.eval()(X).shape == X.shape
    model.train()(X)


def test_a_subclass_that_computes_its_own_statistics_raises_an_error() -> None:
    for outcome in outcomes(_by_hand, 2):
        assert "RuntimeError: 1: the forward of" in outcome.error
        assert "write it with ddparity.sync_moments" in outcome.error


def test_converted_layers_of_one_subclass_have_one_class() -> None:
    one, other = (dp.convert_sync_batchnorm(Activated(4)) for _ in range(2))
    assert type(one) is type(other) and isinstance(one, Activated) and one.colour == "blue"


def _parametrized(convert: bool) -> tuple[Tensor, Any]:
    model = nn.Sequential(nn.BatchNorm2d(4))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    if convert:
        dp.convert_sync_batchnorm(model)
        assert isinstance(model[0], dp.SyncBatchNorm) and parametrize.is_parametrized(model[0], "weight")
    x = X.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else X
    y = model(x)
    y.sin().sum().backward()
    return y.detach(), model[0].parametrizations.weight.original.grad


def test_a_parametrized_weight_stays_parametrized() -> None:
    y, gradient = _parametrized(False)
    results = run_ranks(_parametrized, 2, True)
    torch.testing.assert_close(torch.cat([result[0] for result in results]), y)
    torch.testing.assert_close(results[0][1] + results[1][1], gradient)


def test_parametrizations_can_be_removed_and_the_conversion_reverted() -> None:
    layer = nn.BatchNorm2d(4)
    parametrize.register_parametrization(layer, "weight", Doubled())
    dp.revert_sync_batchnorm(dp.convert_sync_batchnorm(layer))
    assert isinstance(layer, nn.BatchNorm2d) and not isinstance(layer, dp.SyncBatchNorm)
    assert torch.equal(layer.weight, torch.full((4,), 2.0))
    parametrize.remove_parametrizations(dp.convert_sync_batchnorm(layer), "weight")
    assert type(layer) is dp.SyncBatchNorm and torch.equal(layer.weight, torch.full((4,), 2.0))
    assert type(dp.revert_sync_batchnorm(layer)) is nn.BatchNorm2d


def test_a_spectral_norm_over_the_convolution_does_not_matter() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4))
    assert type(dp.convert_sync_batchnorm(model)[1]) is dp.SyncBatchNorm


# --- the conversion back ---


def test_a_resnet_is_converted_and_reverted() -> None:
    model = resnet18().eval()
    state, kinds, keys = (
        model.state_dict(),
        [type(m) for m in model.modules()],
        [set(m.__dict__) for m in model.modules()],
    )
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    dp.convert_sync_batchnorm(model)
    assert sum(type(module) is dp.SyncBatchNorm for module in model.modules()) == 20
    assert torch.equal(model(x), expected)
    dp.revert_sync_batchnorm(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(m.__dict__) for m in model.modules()] == keys
    assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((4, 3), nn.BatchNorm1d),
        ((4, 3, 2), nn.BatchNorm1d),
        ((4, 3, 2, 2), nn.BatchNorm2d),
        ((4, 3, 2, 2, 2), nn.BatchNorm3d),
    ],
)
@pytest.mark.parametrize("build", [lambda: dp.SyncBatchNorm(3), lambda: dp.convert_sync_batchnorm(nn.SyncBatchNorm(3))])
def test_a_layer_created_as_synchronised_becomes_the_class_that_its_input_needs(
    build: Any, shape: tuple[int, ...], kind: type[nn.Module]
) -> None:
    model = nn.Sequential(build())
    with pytest.raises(ValueError, match=r"0 \(SyncBatchNorm\) was created as a SyncBatchNorm and has seen no input"):
        dp.revert_sync_batchnorm(model)
    model(torch.randn(shape))
    assert type(dp.revert_sync_batchnorm(model)[0]) is kind


def test_a_reverted_resnet_exports(tmp_path: Path) -> None:
    import onnx

    model = dp.revert_sync_batchnorm(dp.convert_sync_batchnorm(resnet18())).eval()
    x = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    if torch.__version__ < "2.7":
        pytest.skip("torch 2.6 with onnxscript 0.5 or later does not export torchvision's own resnet18 to ONNX either")
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False, optimize=False)
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "BatchNormalization" in operators


def test_a_converted_model_exports_in_eval_mode_too() -> None:
    model = dp.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).eval()
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), model(X))
