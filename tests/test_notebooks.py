"""The notebooks are what their sources make, in both languages, and say of the scripts what is so.

What each check is for is shown on a small source of its own, into which faults are planted.
"""

import ast
import math
import re
import shutil

import nbformat
import pytest
from conftest import ROOT, import_file

notebooks = import_file(ROOT / "tools" / "notebooks.py", "notebooks")
SOURCES = sorted((ROOT / "notebooks" / "source").glob("*.py"))
SCRIPTS = {path.stem: path for path in (ROOT / "RL_HAND").glob("*/*.py")}
RUN_ANEW = "1_from_importance_sampling_to_gspo"  # the one that the tests can afford to run
LINES = {RUN_ANEW: 80,  # of code, imports aside: ten steps, each with its own numbers or figure
         "6_experts_and_routing_replay": 80}  # seven
BYTES = {"5_spot_the_bug": 700_000}  # eight figures of several curves
NUMBER = re.compile(r"(?<![\w.])[-−+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
each = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem[0])


def texts(path):
    """A source's texts as pairs, English and Chinese."""
    cells = [cell.source for cell in notebooks.read(path) if cell.cell_type == "markdown"]
    return list(zip(cells[::2], cells[1::2], strict=True))


def code(path):
    """A source's code cells."""
    return [cell.source for cell in notebooks.read(path) if cell.cell_type == "code"]


def form(text):
    """What a text and its translation have in common: headings' levels, items and rows of tables,
    formulas, code, pictures and links, and numbers that are not a single digit."""
    plain = re.sub(r"`[^`]+`|\$[^$]+\$|\([^()\s]+\)", " ", text.replace("$$", "$"))
    return {"headings": re.findall(r"^#+(?= )", text, re.M),
            "items": len(re.findall(r"^ *(?:[-*]|\d+\.) ", text, re.M)),
            "rows": [line.count("|") for line in text.splitlines() if line.startswith("|")],
            "formulas": sorted(re.findall(r"\$[^$]+\$", text.replace("$$", "$"))),
            "code": sorted(re.findall(r"`[^`]+`", text)),
            "links": sorted(target.replace("../", "") for target in
                            re.findall(r"\]\(([^)]+)\)", text)),
            "numbers": sorted(number for number in NUMBER.findall(plain) if len(number) > 1)}


def check_texts(path):
    """Both languages of every text have one form, and each is in its language."""
    pairs = texts(path)
    assert pairs and pairs[0][0].startswith("# ")
    for english, chinese in pairs:
        assert form(english) == form(chinese), english[:60]
        assert re.search("[\u4e00-\u9fff]", chinese), f"not Chinese: {chinese[:60]}"
        assert not re.search("[\u4e00-\u9fff]", english), f"Chinese: {english[:60]}"
        for bold in re.findall(r"(?s)\*\*.+?\*\*.?", chinese):  # else the stars would be shown
            assert not re.search(r"[：，。！？；）]\*\*\w", bold), bold
        assert not re.search(r"\b(TODO|FIXME|TBD|XXX)\b", english + chinese)


def check_names(path):
    """What the code takes from a script, and what the texts name as a script's, exists there."""
    modules = {name: import_file(SCRIPTS[name], f"{name}_of_a_notebook") for name in SCRIPTS
               if re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))}
    named = [(node.value.id, node.attr) for cell in code(path) for node in ast.walk(ast.parse(cell))
             if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    for span in re.findall(r"`([^`]+)`", "".join(map("".join, texts(path)))):
        named += re.findall(r"^(\w+)\.(?!py\b)(\w+)", span)
        if alone := re.fullmatch(r"([A-Z][A-Z_]+|[a-z]+_[a-z_]+)(?:\(\)|=.*)?", span):
            assert any(hasattr(module, alone[1]) or f"{alone[1]}" in code_of
                       for module in modules.values() for code_of in code(path)), span
    named = [(name, attribute) for name, attribute in named if name in modules]
    assert named, "it uses no script"
    for name, attribute in named:
        assert hasattr(modules[name], attribute), f"no {name}.{attribute}"


@each
def test_notebooks_are_what_their_source_makes(path):
    assert notebooks.update(path, write=False) == ""


@each
def test_both_languages_say_the_same(path):
    check_texts(path)


@each
def test_what_is_named_exists(path):
    check_names(path)


@each
def test_a_notebook_is_thin(path):
    """Little code, small files, nothing of a machine; links lead somewhere from both folders."""
    lines = [line for cell in code(path) for line in cell.splitlines()
             if line.strip() and not re.match(r"\s*#|import |from ", line)]
    assert len(lines) <= LINES.get(path.stem, 60) and max(map(len, lines)) <= 120
    for file in (ROOT / "notebooks").rglob(f"{path.stem}.ipynb"):
        text = file.read_text(encoding="utf-8")
        assert file.stat().st_size < BYTES.get(path.stem, 400_000)
        assert not re.search(r"(?<![\w.~/])/(work|tmp|root|home|Users)\b", text)
        for cell in nbformat.reads(text, as_version=4).cells:
            shown = cell.source if cell.cell_type == "markdown" else ""
            for target in re.findall(r"\]\(([^)#\s]+)", shown):
                assert "://" in target or (file.parent / target).exists(), target


@each
def test_source_that_is_shown_is_the_scripts(path):
    """A function in an output is one script's as it is now, less what is left out."""
    known = [{"", *map(str.rstrip, script.read_text(encoding="utf-8").splitlines())}
             for script in SCRIPTS.values()]
    for cell in nbformat.read(ROOT / "notebooks" / f"{path.stem}.ipynb", as_version=4).cells:
        for output in cell.get("outputs", []):
            for function in re.findall(r"^def .*\n(?:(?: .*)?\n)*", output.get("text", ""), re.M):
                assert any(set(map(str.rstrip, function.splitlines())) <= each for each in known)


def test_there_is_no_notebook_without_a_source():
    assert SOURCES
    made = {file.stem for file in (ROOT / "notebooks").rglob("*.ipynb")
            if ".ipynb_checkpoints" not in file.parts}
    assert made == {path.stem for path in SOURCES}


def test_the_page_leads_to_all_of_them():
    page = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([^)]+)\)", page)) == {
        f"{folder}{path.stem}.ipynb" for path in SOURCES for folder in ("", "zh/")}


def printed(cells):
    """What the code cells print, as text with # for each number, and the numbers."""
    text = "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "")
                     for cell in cells for output in cell.get("outputs", []))
    return NUMBER.sub("#", text), [float(n.replace("−", "-")) for n in NUMBER.findall(text)]


def test_a_fresh_run_prints_the_same():
    """Numbers may differ a little: other processors add in another order."""
    path = ROOT / "notebooks" / "source" / f"{RUN_ANEW}.py"
    committed = nbformat.read(ROOT / "notebooks" / f"{RUN_ANEW}.ipynb", as_version=4)
    text, numbers = printed(notebooks.execute(notebooks.read(path)))
    before, expected = printed(committed.cells)
    assert text == before and len(numbers) > 50
    for number, wanted in zip(numbers, expected, strict=True):
        assert math.isclose(number, wanted, rel_tol=0.02, abs_tol=2e-3), (number, wanted)


# ---- Faults

SMALL = '''# %% [markdown] lang="en"
# # A title
# Of `gspo.clip_range`: $1 + x$ is 0.25.
# %% [markdown] lang="zh"
# # 标题
# `gspo.clip_range`：$1 + x$ 是 0.25。
# %%
x = 1
# %%
print(x)
# %%
x + 1
# %% [markdown] lang="en"
# The end.
# %% [markdown] lang="zh"
# 结尾。
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a small source and the notebooks made of it."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "zh").mkdir()
    (folder / "source").mkdir()
    (folder / "source" / "1_small.py").write_text(SMALL, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebooks, "FOLDER", folder)
        assert not notebooks.main([])
    return folder


@pytest.fixture
def small(made, tmp_path, monkeypatch):
    """A copy of it, to be damaged: the source's path."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path / "copy")
    return tmp_path / "copy" / "source" / "1_small.py"


def test_a_whole_one_passes(small, capsys):
    assert not notebooks.main(["--check"]) and capsys.readouterr().err == ""
    assert not notebooks.main(["--check", "1_s"])
    assert notebooks.main(["--check", "2"])  # there is none
    check_texts(small)
    english, chinese = (nbformat.read(notebooks.FOLDER / folder / "1_small.ipynb", 4)
                        for folder in ("", "zh"))
    assert [cell.source for cell in english.cells][::4] == [
        "# A title\nOf `gspo.clip_range`: $1 + x$ is 0.25.", "The end."]
    assert chinese.cells[-1].source == "结尾。" and "timing" not in str(english)
    assert printed(chinese.cells) == printed(english.cells) == ("#\n\n#", [1.0, 2.0])


@pytest.mark.parametrize("old, new, says", [
    ("x = 1", "x = 2", "en: cell 2 is not the source's"),
    ("# The end.", "# An end.", "en: cell 5 is not the source's"),
    ("结尾", "末尾", "zh: cell 5 is not the source's"),
    ('# %%\nx = 1\n', '', "en: cell 2 is not the source's"),
    ('# %% [markdown] lang="zh"\n# 结尾。\n', "", "cell 7, 'the end': a text in 'zh' is due"),
    ('# %% [markdown] lang="en"\n# The end.\n', "", "cell 6, '结尾。': a text in 'en' is due"),
    ('[markdown] lang="en"\n# The', '[markdown]\n# The', "a text in 'en' is due")])
def test_a_changed_source_is_found(small, capsys, old, new, says):
    assert SMALL.count(old) == 1
    small.write_text(SMALL.replace(old, new), encoding="utf-8")
    assert notebooks.main(["--check"])
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


ERROR = nbformat.v4.new_output("error", ename="KeyError", evalue="", traceback=[])
WARNING = nbformat.v4.new_output("stream", name="stderr", text="Warning: old")


@pytest.mark.parametrize("folder, change, says", [
    ("", lambda cells: cells[2].outputs.append(ERROR), "en: cell 3 shows an error: KeyError"),
    ("zh", lambda cells: cells[2].outputs.append(WARNING), "shows an error: Warning: old"),
    ("", lambda cells: cells[2].outputs.clear(), "en: cell 3 has no output"),
    ("", lambda cells: cells[2].update(execution_count=3), "en: cell 3 did not run as number 2"),
    ("zh", lambda cells: cells[1].update(execution_count=None), "zh: cell 2 did not run"),
    ("zh", lambda cells: cells.pop(), "zh: 1 cells are missing at the end"),
    ("zh", lambda cells: cells[2].outputs[0].update(text="7"), "outputs differ")])
def test_a_changed_notebook_is_found(small, capsys, folder, change, says):
    file = notebooks.FOLDER / folder / "1_small.ipynb"
    found = nbformat.read(file, as_version=4)
    change(found.cells)
    nbformat.write(found, file)
    assert notebooks.main(["--check"])
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_what_fails_is_one_line_and_is_not_written(small, capsys):
    before = (notebooks.FOLDER / "1_small.ipynb").read_bytes()
    small.write_text(SMALL.replace("print(x)", "assert x == 2, x"), encoding="utf-8")
    assert notebooks.main([])
    said = capsys.readouterr().err
    assert said == "error: 1_small: en: cell 3 shows an error: AssertionError 1\n"
    assert (notebooks.FOLDER / "1_small.ipynb").read_bytes() == before
    (notebooks.FOLDER / "zh" / "1_small.ipynb").unlink()
    assert notebooks.main(["--check"])
    small.write_text(SMALL, encoding="utf-8")
    assert not notebooks.main([])
    assert (notebooks.FOLDER / "1_small.ipynb").read_bytes() == before  # the same each time


@pytest.mark.parametrize("old, new", [
    ("# # 标题", "# ## 标题"), ("`gspo.clip_range`：", "范围："), ("$1 + x$ 是", "$1 - x$ 是"),
    ("是 0.25", "是 0.35"), ("结尾。", "The end."), ("结尾。", "- 结尾。"),
    ("The end.", "结尾."), ("结尾。", "**结。**尾")])
def test_a_text_that_is_not_its_pair_is_found(small, old, new):
    assert SMALL.count(old) == 1
    small.write_text(SMALL.replace(old, new), encoding="utf-8")
    with pytest.raises(AssertionError):
        check_texts(small)


@pytest.mark.parametrize("old, new, fails", [
    ("x = 1", "import gspo; x = gspo.clip_range()", False), ("x = 1", "x = gspo.range()", True),
    ("`gspo.clip_range`:", "`gspo.range`:", True), ("`gspo.clip_range`:", "`CLIP_RANGES`:", True)])
def test_a_name_that_no_script_has_is_found(small, old, new, fails):
    small.write_text(SMALL.replace(old, new), encoding="utf-8")
    if fails:
        with pytest.raises(AssertionError):
            check_names(small)
    else:
        check_names(small)
