"""The Chinese pages have what the English ones have: headings, commands, figures, links, tables."""

import re

import pytest
from conftest import ROOT

PAIRS = sorted((path.with_name(path.name.replace(".zh-CN", "")), path)
               for path in [*ROOT.glob("*.zh-CN.md"), *(ROOT / "RL_HAND").rglob("*.zh-CN.md")])


def slug(heading):
    """The anchor that a heading gets: letters of any script, digits, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def structure(path):
    """What does not depend on the language: a page's skeleton."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    links = [(target.replace(".zh-CN.md", ".md").replace("notebooks/zh/", "notebooks/"))
             for target in re.findall(r"\]\(([^)#\s]+)", prose)]
    commands = [[re.split(r"\s{2,}", line)[0] for line in block.splitlines()
                 if re.match(r"\S*(python|pip|make|uv|torchrun|git)\b", line)]
                for _, block in blocks]
    return {
        "headings": [len(found) for found in re.findall(r"^(#+) ", prose, re.M)],
        "commands": commands,
        "languages": [language for language, _ in blocks],
        "figures": re.findall(r"!\[[^\]]*\]\(([^)]+)\)", prose),
        "links": sorted(set(links) - {"README.md", "../README.md"}),
        "rows": [line.count("|") for line in prose.splitlines() if line.startswith("|")],
        "names": sorted(set(re.findall(r"`([A-Z][A-Z_]{3,}[^`\s]*)`", prose)))}


def test_there_are_chinese_pages():
    assert {str(chinese.relative_to(ROOT)) for _, chinese in PAIRS} >= {
        "README.zh-CN.md", "RL_HAND/README.zh-CN.md", "RL_HAND/gspo/README.zh-CN.md",
        "RL_HAND/troubleshooting.zh-CN.md"}


@pytest.mark.parametrize("english, chinese", PAIRS, ids=lambda path: path.name)
def test_a_page_and_its_chinese_version_have_the_same_structure(english, chinese):
    wanted, found = structure(english), structure(chinese)
    for part in wanted:
        assert found[part] == wanted[part], part
    words = re.findall(r"[\u4e00-\u9fff]", chinese.read_text(encoding="utf-8"))
    assert len(words) > 0.1 * len(english.read_text(encoding="utf-8"))  # it is Chinese


@pytest.mark.parametrize("chinese", [chinese for _, chinese in PAIRS], ids=lambda path: path.name)
def test_links_within_the_chinese_pages_lead_to_headings(chinese):
    text = chinese.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text):
        page = (chinese.parent / target) if target else chinese
        headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
        assert anchor in map(slug, headings), f"{target}#{anchor}"


def test_a_difference_is_noticed(tmp_path):
    english, chinese = PAIRS[0]
    copy = tmp_path / "page.md"
    text = chinese.read_text(encoding="utf-8")
    for old, new in (("## ", "### "), ("python RL_HAND", "python RLHAND"), ("](", "](x")):
        copy.write_text(text.replace(old, new, 3), encoding="utf-8")
        assert structure(copy) != structure(chinese), old
