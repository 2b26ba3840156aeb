"""The documentation: what it links to is there, what it tells people to run is there, and its example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
README_LIMIT_BYTES = 10_240
PICTURE_LIMIT_BYTES = 300 * 1024
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / ".github").rglob("*.md"))]
CODE = re.compile(r"^(```|~~~).*?^\1\s*$|^(?: {4}|\t).*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)[^)]*\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|Users|mnt|tmp)/[\w.]+|\b[A-Z]:\\\w+")


def prose(text: str) -> str:
    """The text without blocks and spans of code, which may hold brackets of their own."""
    return CODE.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page: lower case, no punctuation, spaces to hyphens."""
    fenced = re.sub(r"^```.*?^```\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, int] = {}
    for heading in HEADING.findall(fenced):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names[name] = names.get(name, -1) + 1
    return {f"{name}-{i}" if i else name for name, count in names.items() for i in range(count + 1)}


def broken_links(page: Path, root: Path = ROOT) -> Iterator[str]:
    """Relative links and pictures of a page that lead nowhere, or out of the repository."""
    for target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = unquote(target).partition("#")
        found = (page.parent / name).resolve() if name else page
        there = found.exists() and found.is_relative_to(root)
        if there and anchor:
            there = found.suffix == ".md" and anchor in anchors(found.read_text(encoding="utf-8"))
        if not there:
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        links = (unquote(target).partition("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8")))
        waiting += [(page.parent / name).resolve() for name in links if name.endswith(".md") and ":" not in name]
    assert sorted(path for path in (ROOT / "docs").rglob("*.md") if path not in seen) == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One & two\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one--two) [c](https://x.y) `[d](gone.md)`\n"
        "![e](gone.png) [f](other.md#no-heading) [g](../page.md) [h](#here)\n\n    [i](gone.md)\n"
    )
    assert list(broken_links(page, tmp_path)) == ["gone.png", "other.md#no-heading", "../page.md", "#here"]


def test_the_readme_is_short_and_begins_with_a_picture() -> None:
    assert len(README.read_bytes()) <= README_LIMIT_BYTES
    first, picture = README.read_text(encoding="utf-8").split("\n\n")[:2]
    assert first == "# SteadyVSR" and picture.startswith("![")


def test_pictures_are_small() -> None:
    pictures = [path for folder in ("docs", "assets") for path in (ROOT / folder).rglob("*.png")]
    assert pictures and [path.name for path in pictures if path.stat().st_size > PICTURE_LIMIT_BYTES] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    modules = set(re.findall(r"-m steadyvsr((?:\.\w+){2,})", text))
    named = {name[1:].replace(".", "/") + ".py" for name in modules}
    named |= set(re.findall(r"(?:python|bash|pytest) (?!PACK)((?:\w+/)+\w+\.(?:py|sh))", text))
    named |= set(re.findall(r"\b(?:tests|benchmarks|scripts|training|example_workflows)/(?:\w+/)*\w+\.\w+", text))
    named |= {f"benchmarks/{name}.py" for name in table_commands(text)}
    assert sorted(path for path in named if not (ROOT / path).is_file()) == []


def table_commands(text: str) -> set[str]:
    """Names in the last column of the table of numbers, which the sentence before it makes commands."""
    rows = re.findall(r"^\|.*\| `(\w+)(?: [A-Z]+)?` \|$", text, re.MULTILINE)
    return set(rows) if "-m steadyvsr.benchmarks.…" in text else set()


def test_the_table_of_numbers_names_its_commands() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert {"golden", "stream_memory", "repeat_runs"} <= table_commands(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_page_names_a_path_of_one_machine(page: Path) -> None:
    assert MACHINE_PATH.search("see /" + "home/name/x") and not MACHINE_PATH.search("tests/work/x and /steadyvsr/free")
    assert MACHINE_PATH.findall(page.read_text(encoding="utf-8")) == []


def test_files_named_by_the_architecture_exist() -> None:
    """Those that a reader is sent to; what is new has a placeholder in its name or says so."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(
        r"`((?:models|memory|patches|nodes|app|web|locales|tests|benchmarks)/[\w./]+\.\w+)`(?! \(new\))", text
    )
    assert len(set(named)) >= 15
    assert sorted({path for path in named if not (ROOT / path).is_file()}) == []


def test_each_answer_of_the_architecture_names_at_most_five_files() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    answers = text.partition("## Where do I touch")[2].split("\n### ")[1:]
    assert len(answers) == 5
    for answer in answers:
        assert 1 <= max(int(number) for number in re.findall(r"(?:^|, )(\d)\. `", answer, re.MULTILINE)) <= 5


def test_the_example_of_the_readme_runs(package_environment: dict[str, str], tmp_path: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(example.strip().splitlines()) <= 10
    done = subprocess.run(
        [sys.executable, "-c", example],
        env=package_environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(96, 128, 3)"] * 30
