"""examples/cifar10.py on a small data set in CIFAR-10's file format, downloaded from a server of this test."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import re
import runpy
import subprocess
import sys
import tarfile
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

import ddparity as dp
from ddparity.task.task import load_task
from tests.ranks import run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "cifar10.py"
MEAN, STD = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
TRAIN_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
PER_BATCH = 38  # images in each of the six files: 190 to train on are a full step, and a short one of 2 micro-batches

# The example itself, with another address and other check sums of the archive.
TASK_FILE = """
import sys
from torchvision.datasets import CIFAR10
sys.path.insert(0, {examples!r})
from cifar10 import cifar10
cifar10.epochs = 1
CIFAR10.url, CIFAR10.tgz_md5 = {url!r}, {archive_md5!r}
CIFAR10.train_list, CIFAR10.test_list = {train!r}, {test!r}
CIFAR10.meta = dict(CIFAR10.meta, md5={meta_md5!r})
"""


@dataclass
class Trained:
    """A run of `ddparity train`: its working directory, its output, and the paths that were downloaded."""

    folder: Path
    output: str
    images: np.ndarray
    downloads: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    served, folder = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("work")
    downloads: list[str] = []
    images, sums = _write_archive(served)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, downloads, directory=str(served))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}"
            (folder / "small.py").write_text(
                TASK_FILE.format(
                    examples=str(EXAMPLE.parent),
                    url=url,
                    archive_md5=sums[CIFAR10.filename],
                    train=[[name, sums[name]] for name in TRAIN_BATCHES],
                    test=[["test_batch", sums["test_batch"]]],
                    meta_md5=sums["batches.meta"],
                )
            )
            ended = subprocess.run(
                [sys.executable, "-m", "ddparity", "train", "small.py", "--nproc", "2"],
                cwd=folder,
                env={**os.environ, "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=100,
            )
        finally:
            server.shutdown()
            thread.join(10)
    assert ended.returncode == 0, ended.stderr
    return Trained(folder, ended.stdout, images, downloads)


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, downloads: list[str], *args: Any, **options: Any) -> None:
        self._downloads = downloads
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        if self.headers["Method"] != "HEAD":  # torchvision asks in this way where the address leads
            self._downloads.append(self.path)
        super().do_GET()

    def log_message(self, *_: Any) -> None: ...


def _write_archive(folder: Path) -> tuple[np.ndarray, dict[str, str]]:
    """Write CIFAR-10's archive with random images; return the training images, and each file's MD5 sum by name."""
    rng = np.random.default_rng(0)
    inside = folder / CIFAR10.base_folder
    inside.mkdir()
    training = []
    for name in [*TRAIN_BATCHES, "test_batch"]:
        data = rng.integers(0, 256, (PER_BATCH, 3 * 32 * 32), dtype=np.uint8)
        labels = rng.integers(0, 10, PER_BATCH).tolist()
        entry = {
            "batch_label": name,
            "labels": labels,
            "data": data,
            "filenames": [f"{i}.png" for i in range(len(data))],
        }
        (inside / name).write_bytes(pickle.dumps(entry, protocol=2))
        if name != "test_batch":
            training.append(data.reshape(-1, 3, 32, 32))
    meta = {"num_cases_per_batch": PER_BATCH, "label_names": list("abcdefghij"), "num_vis": 3072}
    (inside / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    archive = folder / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(inside, CIFAR10.base_folder)
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in [archive, *inside.iterdir()]}
    return np.concatenate(training), sums


def test_it_trains_on_two_processes(trained: Trained) -> None:
    (accuracy,) = re.findall(r"^epoch 1/1: accuracy (\S+) %$", trained.output, re.MULTILINE)
    assert re.search(rf"│ accuracy +│ {re.escape(accuracy)} % ", trained.output)
    (shown,) = re.findall(r"small: 2/2 steps, .*, loss (\S+),", trained.output)
    assert math.isfinite(float(shown))
    model = runpy.run_path(str(EXAMPLE))["cifar10"].model()
    untrained = {name: value.clone() for name, value in model.state_dict().items()}
    dp.load_checkpoint(trained.folder / "runs/small/checkpoint.safetensors", model=model)
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name
        assert not value.equal(untrained[name]), name


def _weights(folder: Path, *options: str) -> dict[str, torch.Tensor]:
    """Train again on the data set in `folder`, and return the weights."""
    target = folder / f"{len(options)}.safetensors"
    command = [sys.executable, "-m", "ddparity", "train", "small.py", "--checkpoint", str(target), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    model = runpy.run_path(str(EXAMPLE))["cifar10"].model()
    dp.load_checkpoint(target, model=model)
    return model.state_dict()


def test_it_trains_with_synchronised_batch_norms(trained: Trained) -> None:
    model = runpy.run_path(str(EXAMPLE))["cifar10"].model()
    dp.load_checkpoint(trained.folder / "runs/small/checkpoint.safetensors", model=model)
    local = model.state_dict()
    synchronised = _weights(trained.folder, "--nproc", "2", "--sync-batchnorm")
    assert all(value.isfinite().all() for value in synchronised.values())
    assert not torch.equal(synchronised["1.running_mean"], local["1.running_mean"])


def test_synchronised_batch_norms_refuse_uneven_shares(trained: Trained) -> None:
    command = [sys.executable, "-m", "ddparity", "train", "small.py", "--nproc", "3", "--sync-batchnorm"]
    done = subprocess.run(command, cwd=trained.folder, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "step 0 of an epoch has 4 micro-batches (of 128 samples), which 3 ranks cannot share evenly" in done.stderr


def test_the_example_is_a_script_with_the_commands_options() -> None:
    command = [sys.executable, str(EXAMPLE), "--sync-batchnorm", "--nproc", "9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "9 ranks but only 4 micro-batches in a step" in done.stderr


def test_one_process_downloads(trained: Trained) -> None:
    assert trained.downloads == [f"/{CIFAR10.filename}"]
    assert (trained.folder / "data" / CIFAR10.base_folder / "test_batch").is_file()


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "absent.tar.gz").as_uri())
    with pytest.raises(RuntimeError) as caught:
        runpy.run_path(str(EXAMPLE))["dataset"]("train")
    assert re.fullmatch(
        rf"CIFAR-10 is not in {tmp_path}/data and its download failed \(.*No such file.*\): "
        rf"extract file://\S+/absent\.tar\.gz there, as cifar-10-batches-py",
        str(caught.value),
    )


def test_the_model_is_a_resnet_20() -> None:
    model = runpy.run_path(str(EXAMPLE))["cifar10"].model()
    # He et al., table 6, say 0.27 million; counted by hand, with projections where the shape changes:
    by_hand = (27 * 16 + 32) + 10 * 65
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        projection = inputs * outputs + 2 * outputs if inputs != outputs else 0
        by_hand += 9 * inputs * outputs + 5 * 9 * outputs**2 + 6 * 2 * outputs + projection
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand == 272_474
    assert {type(module) for module in model.modules() if "Norm" in type(module).__name__} == {torch.nn.BatchNorm2d}
    assert model(torch.zeros(5, 3, 32, 32)).shape == (5, 10)


Loaded = dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]]


def _loaded(folder: str, num_workers: int) -> Loaded:
    """Return this rank's images of two epochs, and their data-set indices, by (epoch, step, micro-batch)."""
    os.chdir(folder)
    task = load_task("small.py")
    train_set = task.dataset("train")
    loader = dp.Loader(train_set, task.plan(train_set), num_workers)
    world_size = int(os.environ["WORLD_SIZE"])
    loaded = {}
    for epoch in (0, 1):
        for step in loader.epoch(epoch):
            planned = loader.plan.step(epoch, step.number, int(os.environ["RANK"]), world_size)
            for micro, plan in zip(step, planned, strict=True):
                loaded[epoch, step.number, micro.index] = micro.data[0].numpy(), plan.samples
    return loaded


@pytest.fixture(scope="module")
def alone(trained: Trained) -> Loaded:
    return run_ranks(_loaded, 1, str(trained.folder), 0)[0]


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (3, 0), (2, 1)])
def test_augmentation_does_not_depend_on_the_number_of_processes(
    world_size: int, num_workers: int, trained: Trained, alone: Loaded
) -> None:
    parts = run_ranks(_loaded, world_size, str(trained.folder), num_workers)
    assert (
        sum(len(part) for part in parts) == len(alone) == 2 * (4 + 2)
    )  # epochs; micro-batches of a full step and of a short one
    for part in parts:
        for key, (images, samples) in part.items():
            np.testing.assert_array_equal(samples, alone[key][1])
            np.testing.assert_array_equal(images, alone[key][0])


def test_training_images_are_random_crops_and_flips(trained: Trained, alone: Loaded) -> None:
    """Each image is exactly one of 162 possible images, and most of these appear in 2 epochs of 190 images."""
    seen = set()
    for images, samples in alone.values():
        for image, sample in zip(images, samples, strict=True):
            padded = np.pad(trained.images[sample] / 255, ((0, 0), (4, 4), (4, 4)))
            matches = [
                (down, right, flip)
                for down in range(9)
                for right in range(9)
                for flip in (1, -1)
                if np.allclose(
                    image,
                    (padded[:, down : down + 32, right : right + 32][:, :, ::flip] - MEAN[:, None, None])
                    / STD[:, None, None],
                    atol=1e-5,
                )
            ]
            assert len(matches) == 1
            seen.update(matches)
    # 320 draws from 162 leave each one out with probability (1 - 1/162) ** 320 = 0.14.
    assert len(seen) > 120


def test_held_out_images_are_only_normalised(trained: Trained) -> None:
    images, raw = run_ranks(_held_out, 1, str(trained.folder))[0]
    expected = (raw.transpose(0, 3, 1, 2) / 255 - MEAN[:, None, None]) / STD[:, None, None]
    np.testing.assert_allclose(images, expected, atol=1e-5)


def _held_out(folder: str) -> tuple[np.ndarray, np.ndarray]:
    os.chdir(folder)
    test_set = load_task("small.py").dataset("test")
    return torch.stack([image for image, _ in test_set]).numpy(), test_set.data
