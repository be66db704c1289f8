"""What ``pip install`` gives a user: the wheel, really built and really installed."""

import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import ln_images
from support.cloud import ROOT

# A build in the working tree would leave files there, and would pick up those of an earlier build.
SOURCES = ("LICENSE", "README.md", "docs", "ln_images", "pyproject.toml", "setup.py")

# So one worker builds the wheel, once for all tests of this module.
pytestmark = pytest.mark.xdist_group("packaging")


def run(*command: str | Path, cwd: Path) -> str:
    """Return what ``command`` prints; fail the test with its errors if it fails."""
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr or process.stdout
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, and return its path."""
    directory = tmp_path_factory.mktemp("packaging")
    source = directory / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", directory, source, cwd=directory)
    [path] = directory.glob("*.whl")
    return path


def metadata(wheel: Path) -> Message:
    """Return the metadata that a wheel carries."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_has_all_parts(wheel: Path) -> None:
    """The wheel has every module, py.typed, the licence and each manual page, and nothing else."""
    distribution = f"ln_images-{ln_images.__version__}"
    expected = {
        *(str(path.relative_to(ROOT)) for path in (ROOT / "ln_images").rglob("*.py")),
        "ln_images/py.typed",
        f"{distribution}.dist-info/licenses/LICENSE",
        *(
            f"{distribution}.data/data/share/man/man1/{path.name}"
            for path in (ROOT / "docs").glob("*.1")
        ),
    }
    assert f"{distribution}.data/data/share/man/man1/ln-images.1" in expected
    generated = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names == expected | {f"{distribution}.dist-info/{name}" for name in generated}


def test_the_wheel_describes_itself(wheel: Path) -> None:
    """The wheel states the code's version, its licence, its authors and the oldest Python."""
    fields = metadata(wheel)
    assert fields["Name"] == "ln-images"
    assert fields["Version"] == ln_images.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Author"] == "ln-images contributors"
    assert fields["Requires-Python"] == ">=3.11"


def test_the_wheel_requires_a_urllib3_that_bounds_memory(wheel: Path) -> None:
    """The wheel requires urllib3 2.6: 2.5 takes 3 GiB for a body that is compressed twice."""
    assert "urllib3>=2.6.0" in metadata(wheel).get_all("Requires-Dist", [])


def test_the_command_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """The installed wheel runs ``ln-images`` with nothing but the dependencies that it declares."""
    environment = tmp_path / "environment"
    # Without a pip of its own: that halves the time that the environment takes.
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin" / "python")
    run(*pip, "install", "--quiet", "--no-compile", wheel, cwd=tmp_path)
    run(*pip, "check", cwd=tmp_path)

    command = environment / "bin" / "ln-images"
    version = f"ln-images, version {ln_images.__version__}\n"
    assert run(command, "--version", cwd=tmp_path) == version
    assert "Usage: ln-images [OPTIONS]" in run(command, "--help", cwd=tmp_path)
    assert (environment / "share" / "man" / "man1" / "ln-images.1").is_file()

    # ``--help`` imports few libraries. These modules import all others, except those of the extras.
    modules = (
        "glanceclient.v2.images",
        "inotify_simple",
        "keystoneauth1.loading",
        "oslo_utils.imageutils.format_inspector",
        "wcwidth",
    )
    code = f"import {', '.join(modules)}, ln_images; print(ln_images.__file__)"
    location = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).strip()
    assert Path(location).is_relative_to(environment)
