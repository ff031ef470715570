"""claims.md: each claim has a verdict, what decides it, and a command that would run. papers.md: it
holds the papers that the repository names, and no others."""

import re
import shlex
import subprocess

import pytest
from conftest import ROOT, import_file
from test_chinese import slug
from test_repository import python_names

ENGLISH, CHINESE = ROOT / "RL_HAND" / "claims.md", ROOT / "RL_HAND" / "claims.zh-CN.md"
VERDICTS = {ENGLISH: ["shown", "refuted", "not shown", "not run yet"],
            CHINESE: ["成立", "不成立", "没有看到", "还没有跑"]}
UNWRITTEN = {ENGLISH: "not written yet", CHINESE: "还没有写"}  # instead of a command
PLACE = {ENGLISH: r"sec\. \d|abstract|guides|section not checked", CHINESE: "节|摘要|资料"}
PAPERS = ROOT / "RL_HAND" / "papers.md"
ARXIV = r"(?<![\d.])\d{2}(?:0[1-9]|1[0-2])\.\d{5}(?!\d)"  # year, month, number


def rows_of(text):
    """The rows of all tables of a page, as lists of cells, without headers and rulers."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in text.splitlines() if line.startswith("|")]
    rulers = [at for at, row in enumerate(lines) if set("".join(row)) <= set("-")]
    return [row for at, row in enumerate(lines) if at not in rulers and at + 1 not in rulers]


# ---- Claims


@pytest.fixture(scope="module")
def tools():
    """What knows the commands: benchmarks/experiments.py and RL_HAND/compare.py."""
    return (import_file(ROOT / "benchmarks" / "experiments.py", "experiments_of_claims"),
            import_file(ROOT / "RL_HAND" / "compare.py", "compare_of_claims"))


def under(page, anchor):
    """The text under a heading, with what is below it; None where there is no such heading."""
    text = page.read_text(encoding="utf-8")
    if not anchor:
        return text
    for found in re.finditer(r"^(#+) (.+)\n", text, re.M):
        if slug(found[2]) == anchor:
            rest = text[found.end():]
            end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.M)
            return rest[:end.start()] if end else rest
    return None


def wrong_in_command(command, tools):
    """What is wrong with a command, or None."""
    experiments, compare = tools
    words = shlex.split(command)
    if words[:2] == ["python", "benchmarks/experiments.py"]:
        unknown = set(words[2:]) - set(experiments.EXPERIMENTS)
        return f"no experiment {unknown}" if unknown or not words[2:] else None
    if words == ["python", "benchmarks/routing.py"]:
        return None
    if words[:2] == ["python", "benchmarks/memory.py"] and len(words) == 3:
        return None if (ROOT / words[2]).is_file() else f"no script {words[2]}"
    if words[:2] == ["python", "RL_HAND/compare.py"]:
        try:
            _, names, _, constants = compare.parse(words[2:])
            for name in names:
                script = import_file(ROOT / "RL_HAND" / name / f"{name}.py", "script_of_claims")
                script.configure(["PROFILE=embedded", "DEVICE=cpu", *constants])
        except SystemExit as stop:
            return stop.code
        return None
    if words[:3] == ["python", "-m", "pytest"] and len(words) == 4:
        file, _, name = words[3].partition("::")
        known = (ROOT / file).is_file() and name in python_names(ROOT / file)
        return None if known else f"no test {words[3]}"
    return "no command of a known kind"


def wrong_in(row, page, tools):
    """What is wrong with a row of claims.md, as lines."""
    if len(row) != 5:
        return ["not five cells"]
    _, place, verdict, decides, command = row
    found = [] if re.search(PLACE[page], place) else [f"no section: {place!r}"]
    waits = verdict == f"**{VERDICTS[page][-1]}**"
    if verdict.strip("*") not in VERDICTS[page] or not verdict.startswith("**"):
        found.append(f"no verdict: {verdict!r}")
    links = re.findall(r"\]\(([^)#\s]+)(?:#([^)\s]+))?\)", decides)
    if not links and not waits:
        found.append("no link to what decides it")
    texts = []
    for target, anchor in links:
        if not (ROOT / "RL_HAND" / target).is_file():
            found.append(f"leads to {target}")
        elif (text := under(ROOT / "RL_HAND" / target, anchor)) is None:
            found.append(f"leads to {target}#{anchor}")
        else:
            texts.append(text.replace("*", "").replace("`", ""))
    said = re.sub(r"\[[^\]]*\]\([^)]*\)", "", decides)
    labels = re.findall(r'"([^"]+)"|“([^”]+)”', said)
    numbers = re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"[A-Za-z]\d", "", said))
    wanted = [("".join(label), re.escape("".join(label))) for label in labels] + [
        (number, rf"(?<![\d.]){re.escape(number)}(?!\d)") for number in numbers]
    for word, pattern in wanted:
        if texts and not any(re.search(pattern, text) for text in texts):
            found.append(f"{word!r} is not where the links lead")
    if command == UNWRITTEN[page] and waits:
        return found
    if not re.fullmatch("`[^`]+`", command):
        return [*found, f"no command: {command!r}"]
    if wrong := wrong_in_command(command.strip("`"), tools):
        found.append(f"{command}: {wrong}")
    elif waits and "experiments.py" in command:
        jobs = [job for name in command.strip("`").split()[2:] for job in tools[0].jobs_of(name)]
        if jobs and not tools[0].missing(jobs):
            found.append(f"{command} has all its rows: what do they say?")
    return found


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=lambda page: page.name)
def test_claims_have_a_verdict_and_what_decides_it(page, tools):
    """An allowed word; a link to a heading under which the quoted rows and numbers stand; a command
    that is accepted. What is "not run yet" has runs to be made."""
    rows = rows_of(page.read_text(encoding="utf-8"))
    wrong = [f"{row[0]}: {line}" for row in rows for line in wrong_in(row, page, tools)]
    assert not wrong, "\n".join(wrong)
    assert len(rows) > 50 and len(page.read_text(encoding="utf-8").splitlines()) <= 120


def test_both_languages_say_the_same():
    both = [rows_of(page.read_text(encoding="utf-8")) for page in (ENGLISH, CHINESE)]
    assert len(both[0]) == len(both[1])
    for english, chinese in zip(*both):
        kinds = [VERDICTS[page].index(row[2].strip("*"))
                 for page, row in ((ENGLISH, english), (CHINESE, chinese))]
        assert kinds[0] == kinds[1], english[0]
        assert english[4] == chinese[4] or english[4] == UNWRITTEN[ENGLISH], english[0]
        assert re.findall(r"\d+", english[1]) == re.findall(r"\d+", chinese[1]), english[0]
        targets = [re.findall(r"\]\(([^)#]+)", row[3]) for row in (english, chinese)]
        assert targets[0] == [t.replace(".zh-CN", "") for t in targets[1]], english[0]


GOOD = ["claim", "sec. 5.1", "**shown**",
        '"steps to 0.8 sampled" in [the comparison](README.md#what-came-out)',
        "`python benchmarks/experiments.py family`"]


@pytest.mark.parametrize("cell, text, says", [
    (1, "somewhere", "no section"), (2, "**proven**", "no verdict"), (2, "shown", "no verdict"),
    (2, "", "no verdict"), (3, "it is so", "no link"),
    (3, "[there](nowhere.md)", "leads to nowhere.md"),
    (3, "[there](README.md#nowhere)", "leads to README.md#nowhere"),
    (3, '"steps to the moon" in [the comparison](README.md#what-came-out)', "steps to the moon"),
    (3, '[the comparison](README.md#what-came-out): 0.98765', "0.98765"),
    (4, "", "no command"), (4, "not written yet", "no command"),
    (4, "`python benchmarks/experiments.py miracles`", "no experiment"),
    (4, "`python benchmarks/experiments.py`", "no experiment"),
    (4, "`python benchmarks/routing.py miracles`", "no command of a known kind"),
    (4, "`python benchmarks/memory.py miracles.py`", "no script miracles.py"),
    (4, "`python RL_HAND/compare.py gspo MIRACLES=1`", "MIRACLES"),
    (4, "`python RL_HAND/compare.py gspo GROUP_SIZE=7`", "MINIBATCH"),
    (4, "`python RL_HAND/compare.py miracles`", "no script"),
    (4, "`python -m pytest tests/test_gspo_loss.py::test_miracles`", "no test"),
    (4, "`rm -r runs`", "no command of a known kind")])
def test_a_row_that_is_wrong_is_noticed(tools, cell, text, says):
    assert wrong_in(GOOD, ENGLISH, tools) == []
    row = [*GOOD[:cell], text, *GOOD[cell + 1:]]
    assert any(says in line for line in wrong_in(row, ENGLISH, tools))


def test_a_verdict_is_due_when_the_runs_are_made(tools, monkeypatch):
    waiting = [*GOOD[:2], "**not run yet**", *GOOD[3:]]
    for missing, due in ((["one"], False), ([], True)):
        monkeypatch.setattr(tools[0], "missing", lambda jobs: missing)
        assert bool(wrong_in(waiting, ENGLISH, tools)) == due


# ---- Papers


def ids_in(text):
    """The arXiv ids that a text names."""
    return set(re.findall(ARXIV, text))


def test_the_list_of_papers_is_complete_and_no_longer():
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"],
                            cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    named = {}
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".md", ".py", ".ipynb", ".cff", ".sh", ".toml") and path.is_file() \
                and path not in (PAPERS, ROOT / "tests" / "test_claims.py"):
            for each in ids_in(path.read_text(encoding="utf-8")):
                named.setdefault(each, name)
    rows = rows_of(PAPERS.read_text(encoding="utf-8"))
    ids = [row[0] for row in rows]
    assert ids == sorted(set(ids)) and all(re.fullmatch(ARXIV, each) for each in ids)
    assert len({row[1] for row in rows}) == len(rows) > 20
    unlisted = {each: name for each, name in named.items() if each not in ids}
    assert not unlisted, f"RL_HAND/papers.md lacks {unlisted}: add id, exact title, how checked"
    unnamed = set(ids) - named.keys()
    assert not unnamed, f"nobody names {unnamed}: take it out of RL_HAND/papers.md"
    for _, title, checked in rows:
        assert len(title) > 10 and not title.endswith(".")
        assert re.match("paper|arXiv|citations", checked), title


def test_what_counts_as_a_paper():
    assert ids_in("arXiv:2507.18071v2, (1506.02438); abs/2402.03300") == {
        "2507.18071", "1506.02438", "2402.03300"}
    assert not ids_in("12507.18071 2513.18071 2507.1807 2507.180711 1.2507.18071 0.55362")


def test_titles_to_cite_are_those_of_the_list():
    titles = {row[0]: row[1] for row in rows_of(PAPERS.read_text(encoding="utf-8"))}
    blocks = (ROOT / "CITATION.cff").read_text(encoding="utf-8").split("- type: article")[1:]
    cited = [(re.search('title: "?(.+?)"?\n', block)[1], re.search(ARXIV, block)[0])
             for block in blocks]
    assert len(cited) >= 5
    for title, each in cited:
        assert titles[each] == title
