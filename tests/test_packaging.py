"""What users install: versions, extras, wheels and the container say the same thing."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SOURCES = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
PYTHONS = [f"3.{minor}" for minor in range(10, 15)]
MODULES = {"pyyaml": "yaml"}  # distributions whose module has another name


def listed(key: str) -> list[str]:
    """The strings of a list of pyproject.toml (Python 3.10 has no reader of TOML)."""
    found = re.search(rf"(?ms)^{re.escape(key)} = \[(.*?)\](?= *(?:#.*)?$)", PYPROJECT)
    assert found is not None, f"pyproject.toml has no {key}"
    return re.findall(r'"([^"]+)"', found[1])


def modules(extra: str) -> list[str]:
    names = [re.split(r"[<>=!\[]", item)[0] for item in listed(extra)]
    return [MODULES.get(name, name.replace("-", "_")) for name in names]


def without(names: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`hasten ARGUMENTS` in a Python where these modules cannot be imported."""
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({names!r})); "
        f"from hasten.cli import main; sys.exit(main({list(arguments)!r}))"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_every_place_names_the_same_pythons() -> None:
    assert 'requires-python = ">=3.10"' in PYPROJECT
    assert re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT) == PYTHONS
    assert listed("build") == [f"cp{version.replace('.', '')}-*" for version in PYTHONS]
    for name in ("README.md", "README.zh-CN.md", "Makefile"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.search(r"Python 3\.10(?: to |-| 至 )3\.14", text), name


def test_wheels_are_built_and_tried_for_both_processors() -> None:
    assert listed("archs") == ["x86_64", "aarch64"]
    skipped = listed("skip")
    assert not any(fnmatch(f"cp312-manylinux_{arch}", s) for s in skipped for arch in listed("archs"))
    command = re.search(r'(?m)^test-command = "pytest (.+)"$', PYPROJECT)
    assert command is not None
    for path in command[1].split():
        assert Path(path.replace("{project}", str(ROOT))).exists(), path


def test_each_kernel_file_is_built_for_its_processor() -> None:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for isa in re.findall(r"foreach\(isa (.+)\)", text)[0].split():
        text += text.replace("${isa}", isa)
    files = {path.name for path in (ROOT / "native" / "isa").glob("*.cpp")}
    assert files == set(re.findall(r"native/isa/(\w+\.cpp)", text))


@pytest.mark.parametrize("extra", ["dependencies", "serve", "compress", "gpu", "export"])
def test_what_an_extra_installs_is_used(extra: str) -> None:
    for module in modules(extra):
        assert re.search(rf"(?m)(?:import|from) {module}\b|[\"']{module}[\"']", SOURCES), module


def test_a_server_without_its_extra_says_what_to_install() -> None:
    """Whichever package is missing, it is named with the command that helps, and no model is asked for."""
    done = without(modules("serve"), "serve", "nosuch.gguf", "--port", "0")
    assert done.returncode == 1
    assert "is not installed" in done.stderr and "pip install 'hasten[serve]'" in done.stderr
    assert "fault of Hasten" not in done.stderr


@pytest.mark.parametrize("verb", ["generate", "chat", "show", "pull", "bench", "serve"])
def test_help_needs_no_extra(verb: str) -> None:
    done = without([*modules("serve"), *modules("gpu"), *modules("export")], verb, "--help")
    assert done.returncode == 0, done.stderr
    assert f"hasten {verb}" in done.stdout


def test_the_container_is_built_from_what_is_here() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    images = re.findall(r"(?m)^FROM python:(3\.\d+)-(\S+)", text)
    assert len(images) == 2 and images[0] == images[1], "the wheel is made by the Python that runs it"
    assert images[0][0] in PYTHONS
    for extras in re.findall(r"\[([\w,]+)\]'", text):
        assert all(listed(extra) for extra in extras.split(","))
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for needed in ("native", "src", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        assert (ROOT / needed).exists() and needed not in ignored
    assert "\nUSER hasten\n" in text and "useradd --create-home hasten" in text, "it does not run as root"


def test_compose_publishes_the_port_and_keeps_the_cache_of_the_container() -> None:
    compose: Any = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    service = compose["services"]["hasten"]
    port = re.findall(r"(?m)^EXPOSE (\d+)", docker)
    assert [entry.rsplit(":", 1)[1] for entry in service["ports"]] == port
    kept = [entry.split(":")[1] for entry in service["volumes"] if entry.split(":")[0] in compose["volumes"]]
    assert kept == re.findall(r"(?m)^ENV HASTEN_CACHE=(\S+)", docker)
    assert f"127.0.0.1:{port[0]}/health" in docker


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_no_package_archive_or_weights_are_tracked() -> None:
    """Nine wheels were once committed with a page of docs."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    foreign = (".whl", ".gz", ".zip", ".so", ".gguf", ".safetensors", ".bin", ".pt", ".onnx")
    assert [name for name in done.stdout.splitlines() if name.endswith(foreign)] == []
