"""Claims about the project's Markdown: links lead somewhere, and Python in it compiles. No network."""

import re
import textwrap
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(
        part.startswith(".") or part in ("node_modules", "dtrain_runs", "mlruns")
        for part in path.parts[len(ROOT.parts) :]
    )
)

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *(?P=fence)`* *$", re.S | re.M
)
CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(<?([^()<>\s]+)>?(?:\s+\"[^\"]*\")?\)")
DEFINITION = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?\s*$", re.M)
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.M)
ANCHOR = re.compile(r"<a +(?:id|name)=[\"']([^\"']+)")


def test_there_are_pages() -> None:
    assert {"README.md", "CHANGELOG.md", "SECURITY.md", "cluster/README.md"} <= {name_of(page) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: name_of(page))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert [link for link in links_of(page.read_text()) if not leads_somewhere(page, link)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: name_of(page))
def test_every_test_that_is_named_exists(page: Path) -> None:
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page.read_text())
    assert [name for name in named if f"def {name}(" not in source and name != "test_on_batch"] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: name_of(page))
def test_python_in_it_compiles(page: Path) -> None:
    for code in python_of(page.read_text()):
        compile(code, str(page), "exec")


def test_the_reader_sees_links_and_code(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '# One `two` & three!\n[a](page.md#one-two--three) [b](gone.md) ![c](<page.md> "t") [d](#four) [e [f]](#five)\n'
        "## Four\n## Four\n[g](#four-1) [h](https://example.org/x) `[i](gone)` [j](page.md#gone)\n"
        "```python\nx = [k](gone)\n```\n- in a list:\n  ```py\n  y = 1\n  ```\n```console\n$ [l](gone)\n```\n"
        "[m]: gone\n"
    )
    wrong = [link for link in links_of(page.read_text()) if not leads_somewhere(page, link)]
    assert wrong == ["gone.md", "#five", "page.md#gone", "gone"]
    assert list(python_of(page.read_text())) == ["x = [k](gone)\n", "y = 1\n"]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def links_of(text: str) -> list[str]:
    """Where links lead, those in code left out."""
    prose = CODE.sub("", FENCE.sub("", text))
    return LINK.findall(prose) + DEFINITION.findall(prose)


def python_of(text: str) -> list[str]:
    """The code in fences marked as Python."""
    found = FENCE.finditer(text)
    return [textwrap.dedent(match["code"]) for match in found if match["language"].lower() in ("python", "py")]


def leads_somewhere(page: Path, link: str) -> bool:
    if re.match(r"(https?|mailto):", link):
        return True
    path, _, anchor = unquote(link).partition("#")
    target = page.parent / path if path else page
    if not target.exists():
        return False
    return not anchor or anchor in anchors_of(target.read_text())


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives to headings, and those that the page sets itself."""
    prose = FENCE.sub("", text)
    anchors = set(ANCHOR.findall(prose))
    for heading in HEADING.findall(prose):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
        slug = words.replace(" ", "-")
        count = sum(anchor == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", anchor) is not None for anchor in anchors)
        anchors.add(f"{slug}-{count}" if count else slug)
    return anchors


IN_README = {
    "SGD with momentum": "sgd momentum",
    "Adam": "adam",
    "sample weights": "sample weight",
    "masked LSTM": "masked lstm",
    "sparse gradients": "sparse gradients",
    "synchronized BatchNormalization": "normalized synchronized",
    "two optimizers (a GAN)": "adversaries",
}


def test_the_readme_says_of_exactness_what_the_table_says() -> None:
    table = {cells[0]: cells[2:] for cells in _rows(ROOT / "docs" / "exactness.md")}
    short = {cells[0]: cells[1:] for cells in _rows(ROOT / "README.md")}
    assert {name: short[name] for name in IN_README} == {name: table[row] for name, row in IN_README.items()}


def _rows(page: Path) -> list[list[str]]:
    """The cells of all rows of all tables."""
    rows = (line.strip("|\n").split("|") for line in page.read_text().splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in row] for row in rows]
