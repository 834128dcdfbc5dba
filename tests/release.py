"""Check that a release would work: build it, and use each wheel in an environment that has nothing else.

`make release-check` builds the source distribution and, from it, two wheels: one with the compiled passes of
SyncBatchNorm for this platform, and one without, for any. twine reads their metadata. Each wheel is used with the
oldest torch that pyproject.toml allows and with the newest that pip finds, in new environments and outside of the
repository: `ddparity doctor`, and the digits example on two processes. It needs 7 GB of disk while it runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILED = "ddparity/batchnorm/_fused."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="*", help="requirements, such as 'torch==2.6.*' torch", default=None)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the distributions are left")
    options = parser.parse_args()
    check_changelog()
    with tempfile.TemporaryDirectory() as folder:
        wheels = build(Path(folder), options.out)
        for wheel in wheels:
            for torch in options.torch or [oldest_torch(), "torch"]:
                use(wheel, torch, Path(folder) / "environment")


def check_changelog() -> None:
    """Refuse a version that CHANGELOG.md does not tell of."""
    version = metadata_version()
    if f"\n## [{version}]" not in (ROOT / "CHANGELOG.md").read_text():
        sys.exit(f"CHANGELOG.md has no section [{version}]")


def metadata_version() -> str:
    for line in (ROOT / "src/ddparity/__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    sys.exit("src/ddparity/__init__.py has no __version__")


def oldest_torch() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = [one for one in project["dependencies"] if one.startswith("torch>=")]
    return f"torch=={bound.removeprefix('torch>=')}.*"


def build(folder: Path, out: Path) -> list[Path]:
    """Build the source distribution, and from it the wheels; return the wheels."""
    shutil.rmtree(out, ignore_errors=True)
    tools = make_environment(folder / "tools", "build", "twine", "wheel")
    run(tools, "-m", "build", "--sdist", "--outdir", out, ROOT)
    (source,) = out.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / source.name.removesuffix(".tar.gz")
    if not (unpacked / "src/ddparity/batchnorm/_kernels.h").exists():
        sys.exit(f"{source.name} lacks the header of the compiled passes")
    run(tools, "-m", "build", "--wheel", "--outdir", out, unpacked)
    shutil.rmtree(unpacked / "build", ignore_errors=True)
    # setup.py allows the compiler to fail. What is left is Python alone.
    run(tools, "-m", "build", "--wheel", "--outdir", folder / "pure", unpacked, CC="false")
    (pure,) = (folder / "pure").glob("*.whl")
    run(tools, "-m", "wheel", "tags", "--remove", "--python-tag=py3", "--abi-tag=none", "--platform-tag=any", pure)
    shutil.copy(*(folder / "pure").glob("*.whl"), out)
    wheels = sorted(out.glob("*.whl"))
    compiled = [any(name.startswith(COMPILED) and name.endswith(".so") for name in names(one)) for one in wheels]
    if sorted(compiled) != [False, True]:
        sys.exit(f"expected one wheel with the compiled passes and one without: {[one.name for one in wheels]}")
    run(tools, "-m", "twine", "check", "--strict", *out.iterdir())
    return wheels


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def use(wheel: Path, torch: str, folder: Path) -> None:
    """Install a wheel in an environment of its own, and train with it."""
    start = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    python = make_environment(folder, f"{wheel}[examples]", torch)
    shutil.copy(ROOT / "examples/digits.py", folder)
    where = "import ddparity, torch; print(ddparity.__version__, ddparity.__file__, torch.__version__)"
    version, file, found = run(python, "-c", where, cwd=folder).split()
    if version != metadata_version() or not Path(file).is_relative_to(folder):
        sys.exit(f"{wheel.name}: imported ddparity {version} from {file}")
    run(python, "-m", "ddparity", "doctor", cwd=folder)
    told = run(python, "-m", "ddparity", "train", "digits.py", "--nproc", "2", cwd=folder)
    print(f"{wheel.name} with torch {found}: {result_of(told)} ({time.monotonic() - start:.0f} s)", flush=True)
    shutil.rmtree(folder)


def result_of(told: str) -> str:
    """Return the line of a training's output that has its score."""
    lines = [line.strip() for line in told.splitlines() if "accuracy" in line or "score" in line]
    return lines[-1] if lines else told


def make_environment(folder: Path, *requirements: str) -> Path:
    """Make a virtual environment; return its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    run(python, "-m", "pip", "install", "--quiet", *requirements)
    return python


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Run a command; return its output, or end with it where it fails."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    main()
