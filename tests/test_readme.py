"""The READMEs: every command is real, both languages say the same, the examples run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from hasten.cli import VERBS
from hasten.cli.frame import parser_of
from hasten.models.families import FAMILIES

ROOT = Path(__file__).parents[1]
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
DOCUMENTS = {
    path.name: path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "README.zh-CN.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
    ]
    if path.name != "log.md"
}


@dataclass(frozen=True)
class Block:
    """One fenced block; `reason` says why it cannot run here, empty if it can."""

    language: str
    text: str
    reason: str

    def commands(self) -> list[str]:
        """Its lines, continuation lines joined, comments dropped."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def blocks(text: str) -> list[Block]:
    pattern = r"(?:<!-- not run: ([^>]+) -->\n)?```(\w+)\n(.*?)```"
    return [Block(m[2], m[3], m[1] or "") for m in re.finditer(pattern, text, re.DOTALL)]


def shell(text: str, *, runnable: bool | None = None) -> list[str]:
    found = [
        b for b in blocks(text) if b.language == "sh" and (runnable is None or runnable != bool(b.reason))
    ]
    return [command for block in found for command in block.commands()]


def inline_commands(text: str) -> list[str]:
    """`hasten ...` and `make ...` between single backquotes."""
    return re.findall(r"(?<!`)`((?:hasten|make) [^`\n]+)`(?!`)", text)


def complaint(command: str) -> str:
    """What is wrong with a command line that a document shows, without running it; empty if nothing."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        wrong = [w for w in words[1:] if "=" not in w and w not in targets]
        return f"no target {wrong}" if wrong else ""
    if words[0] == "pip":
        extras = re.findall(r"\[([\w,]+)\]", command)
        known = (ROOT / "pyproject.toml").read_text()
        wrong = [e for group in extras for e in group.split(",") if f"\n{e} = [" not in known]
        return f"no extra {wrong}" if wrong else ""
    if words[0] != "hasten":
        return ""
    return wrong_flags(words[1:])


def wrong_flags(words: list[str]) -> str:
    if not words or words[0].startswith("-"):
        return "" if set(words) <= {"--help", "--version", "-h"} else f"no option {words}"
    if words[0] not in VERBS:
        return "" if words[0] == "VERB" else f"no verb {words[0]}"
    parser = parser_of(words[0])
    below = getattr(parser, "commands", {}).get(words[1] if len(words) > 1 else "")
    known = {o for one in (parser, below) if one is not None for p in one.params for o in p.opts}
    flags = {w.split("=")[0] for w in words[1:] if re.match(r"--?[a-z]", w)}
    wrong = flags - known - {"--help"}
    return f"hasten {words[0]} has no {sorted(wrong)}" if wrong else ""


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_exist(name: str) -> None:
    text = DOCUMENTS[name]
    wrong = [f"{c}: {why}" for c in shell(text) + inline_commands(text) if (why := complaint(c))]
    assert not wrong, "\n".join(wrong)


def test_the_check_catches_what_it_is_for() -> None:
    assert complaint("hasten optimise demo")
    assert complaint("hasten generate demo --promt x")
    assert complaint("hasten cache ls --sort x")
    assert not complaint("hasten cache ls --kind packed")
    assert complaint("make demonstration")
    assert complaint("pip install '.[everything]'")
    assert not complaint("hasten generate demo -p 'x -y --z' -n 3")


def test_both_readmes_have_the_same_commands_code_and_figures() -> None:
    assert blocks(ENGLISH) == blocks(CHINESE)
    assert inline_commands(ENGLISH) == inline_commands(CHINESE)
    assert figures(ENGLISH) == figures(CHINESE) and len(figures(ENGLISH)) > 30
    assert headings(ENGLISH) == headings(CHINESE)
    assert links(ENGLISH) == links(CHINESE)


def links(text: str) -> set[str]:
    """Where it leads, but for the other language and its chart."""
    return {target for target in re.findall(r"(?<!!)\[[^]]*\]\(([^)]+)\)", text) if "README" not in target}


def headings(text: str) -> list[str]:
    """Marks of headings, without the words."""
    return re.findall(r"^#+", text, re.MULTILINE)


def measured(text: str) -> str:
    """The block of measured figures."""
    match = re.search(r"<!-- figures: .*?<!-- figures end -->", text, re.DOTALL)
    assert match, "no block of figures"
    return match.group()


def figures(text: str) -> list[str]:
    """The numbers of each row of the table of results, in their order."""
    rows = [line for line in measured(text).splitlines() if line.startswith("|")]
    return [number for row in rows for number in re.findall(r"\d[\d.,]*\d|\d", row)]


def test_the_first_commands_are_those_that_check_a_clone() -> None:
    assert shell(ENGLISH)[:4] == [
        "make demo",
        "make test",
        "pip install '.[demo]'",
        "hasten optimize demo --out demo.hasten",
    ]


def test_measured_figures_stand_in_their_block_alone() -> None:
    speeds = r"\d[\d,.]* ?(?:tok/s|tokens/s|词元/秒|GB/s|TOPS)"
    for text in (ENGLISH, CHINESE):
        assert not re.findall(speeds, text.replace(measured(text), ""))


def test_the_translation_has_one_word_for_token_and_no_english_table() -> None:
    assert not re.findall(r"令牌|标记符|\b[Tt]okens?\b", CHINESE)
    cells = [cell for line in CHINESE.splitlines() if line.startswith("| ") for cell in line.split("|")]
    sentences = [
        cell for cell in cells if len(re.findall(r"\b[a-z]{3,}\b", re.sub(r"`[^`]*`", "", cell))) > 3
    ]
    assert [cell for cell in sentences if not re.search(r"[\u4e00-\u9fff]", cell)] == []


def test_both_readmes_name_every_family_of_models() -> None:
    for text in (ENGLISH, CHINESE):
        plain = re.sub(r"[\s\d.-]", "", text).lower()
        assert [name for name in FAMILIES if re.sub(r"\d", "", name) not in plain] == []


def made(script: str, *arguments: str) -> str:
    """What a script of docs prints."""
    command = [sys.executable, ROOT / "docs" / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False).stdout


def test_every_block_of_figures_comes_from_its_record() -> None:
    """Every record has a table on the page of benchmarks, and all blocks of all documents are as made."""
    assert made("benchmarks.py", "--check") == ""


@pytest.mark.parametrize(("language", "name"), [("en", "speed.svg"), ("zh", "speed.zh-CN.svg")])
def test_the_chart_is_drawn_from_the_record(language: str, name: str) -> None:
    drawn = made("chart.py", language)
    assert drawn == (ROOT / "docs" / name).read_text(encoding="utf-8"), "run `make docs`"
    assert drawn.count("<path") >= 6, "an engine is missing"


def test_the_page_of_models_is_that_of_the_program() -> None:
    assert made("models.py") == (ROOT / "docs" / "models.md").read_text(encoding="utf-8"), "run `make docs`"


@pytest.mark.slow
def test_the_site_builds_without_a_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages == {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    start = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis" not in start


def test_every_page_is_in_the_site() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [path.name for path in (ROOT / "docs").glob("*.md") if f": {path.name}\n" not in config]


def test_the_container_starts_the_server_with_flags_that_exist() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    command = compose["services"]["hasten"]["command"]
    assert command[0] == "serve" and not wrong_flags(command)
    assert 'ENTRYPOINT ["hasten"]' in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_links_lead_somewhere() -> None:
    for name, text in DOCUMENTS.items():
        base = ROOT if (ROOT / name).exists() else ROOT / "docs"
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (base / target).exists(), f"{name} links to {target}"


def test_links_to_headings_lead_to_one() -> None:
    for name, text in DOCUMENTS.items():
        for target, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", text):
            there = DOCUMENTS[Path(target).name] if target else text
            titles = re.findall(r"^#+ (.+)$", there, re.MULTILINE)
            slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", t).strip().lower()) for t in titles}
            assert anchor in slugs, f"{name} links to {target}#{anchor}"


def test_named_files_exist() -> None:
    """Paths between backquotes in CONTRIBUTING.md are real."""
    text = DOCUMENTS["CONTRIBUTING.md"]
    for path in re.findall(r"`((?:src|native|tests|docs|examples|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.mark.demo
@pytest.mark.slow
def test_readme_commands_run(tmp_path: Path) -> None:
    """Every runnable command of the README, in an empty folder; then the Python of the Quickstart."""
    for command in shell(ENGLISH, runnable=True):
        words = shlex.split(command)
        if words[0] == "hasten":
            done = run([sys.executable, "-m", *words], tmp_path)
            assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    code = next(b.text for b in blocks(DOCUMENTS["index.md"]) if b.language == "python")
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tokens/s" in done.stdout
