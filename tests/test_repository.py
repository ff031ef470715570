"""The form of the scripts, the words around them, and the data they read.

How long they may be, constants that cannot be shadowed, an import without side effects, pinned
requirements, pages that agree with the code, and the loader on real GSM8K text.
"""

import ast
import json
import re
import subprocess
import sys
import time
import tokenize
import tomllib
from fractions import Fraction

import huggingface_hub.constants
import pandas as pd
import pytest
from conftest import ROOT, import_file
from huggingface_hub.file_download import repo_folder_name
from transformers import AutoTokenizer

NAMES = ["gspo", "grpo", "dapo", "ppo", "gad", "self_play", "reinforce", "gmpo", "cispo",
         "moe"]
SCRIPTS = {name: ROOT / "RL_HAND" / name / f"{name}.py" for name in NAMES}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in SCRIPTS.items()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
SUMMARY = ROOT / "RL_HAND" / "gspo" / "IMPLEMENTATION_SUMMARY.md"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
LINE = "# ==================== The algorithm ends here"

# ---- The scripts' text

LIMITS = {"gspo": 1250, "grpo": 1300, "dapo": 1300, "ppo": 1350, "gad": 1450, "self_play": 1350,
          "reinforce": 1150, "gmpo": 1250, "cispo": 1250, "moe": 1450}
BELOW, DEFINITIONS = 880, 66  # lines, and functions, classes and methods, below the line
LONG = {  # functions of more than 40 lines, docstring and all, and why
    "train": "the algorithm, in one sight",
    "start": "one line after the other, once; parts of it would be called by nobody else",
    "sample_groups": "one loop and what it starts from; a half of it means nothing alone",
}
GROUPS = ["Model", "Data", "Sampling", "Reward", "Optimisation", "Algorithm", "Evaluation",
          "Output"]
DEFAULTS = {  # the constants asked for, with their values; CLIP_RANGE has the paper's instead
    "BATCH_SIZE": 2, "LEARNING_RATE": 1e-6, "NUM_EPOCHS": None, "GROUP_SIZE": 4, "GSPO_EPOCHS": 4,
    "CLIP_RANGE": (3e-4, 4e-4), "ENTROPY_COEF": 0.01, "KL_COEF": 0.2, "TARGET_KL": 0.01,
    "ADAPTIVE_KL": True, "ADVANTAGE_TYPE": "relative", "USE_GROUP_NORMALIZATION": True,
    "USE_SEQUENCE_LEVEL_REWARD": True, "USE_TOKEN_LEVEL_LOSS": False,
    "POLICY_MODEL": "Qwen/Qwen3-0.6B",
    "REWARD_MODEL": "OpenAssistant/reward-model-deberta-v3-large-v2", "OUTPUT_DIR": None,
    "train_datasets": None, "MAX_PROMPT_TOKENS": None, "MAX_NEW_TOKENS": None, "TEMPERATURE": None,
    "MINIBATCH": None, "MICRO_BATCH": None, "MAX_GRAD_NORM": 1.0, "WARMUP_STEPS": None,
    "SEED": None, "SAVE_EVERY": None, "EVAL_EVERY": None, "RESUME_FROM": ""}


def assignments(name):
    """A script's constants: their assignments, which end with DEFAULTS, by name."""
    found = {}
    for node in TREES[name].body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == "DEFAULTS":
                return found
            found[node.targets[0].id] = node


def comments(name):
    """A script's comments by line number."""
    return {token.start[0]: token.string for token in
            tokenize.generate_tokens(iter(SOURCES[name].splitlines(True)).__next__)
            if token.type == tokenize.COMMENT}


def definitions(tree):
    """Functions, classes and methods, less what is inside a function."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from definitions(node)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_is_read_in_one_sitting(name):
    """Lines in all and, of what all share, below the line; definitions there; long functions are
    named with a reason. The next feature pays for its lines."""
    source = SOURCES[name]
    assert len(source.splitlines()) <= LIMITS[name]
    assert source.count(LINE) == 1
    end = source[:source.index(LINE)].count("\n") + 1
    if name == "gspo":  # the others have it from there
        assert len(source.splitlines()) - end <= BELOW
    assert sum(node.lineno > end for node in definitions(TREES[name])) <= DEFINITIONS
    long = {node.name for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)
            and node.end_lineno - node.lineno >= 40}
    assert long <= LONG.keys() and min(map(len, LONG.values())) > 20


def test_no_reason_for_a_long_function_is_stale():
    for function in LONG:
        lengths = [node.end_lineno - node.lineno + 1 for tree in TREES.values()
                   for node in ast.walk(tree) if getattr(node, "name", "") == function]
        assert max(lengths) > 40, f"{function} is short"


def test_the_constants_that_were_asked_for(gspo):
    constants = gspo.resolve(gspo.DEFAULTS, "full")
    assert set(DEFAULTS) <= set(constants)
    for name, value in DEFAULTS.items():
        if value is not None:
            assert constants[name] == value and type(constants[name]) is type(value), name
    entry, = constants["train_datasets"]
    assert entry["type"] == "parquet" and entry["path"].startswith("hf://datasets/openai/gsm8k")
    assert (entry["input"], entry["output"]) == ("question", "answer")


@pytest.mark.parametrize("name", NAMES)
def test_constants_are_assigned_once_and_read_when_a_run_begins(name):
    """Every assignment above DEFAULTS is a constant and the other way round. None is bound again by
    a loop, a parameter, an import, a with, an except, a walrus or a `global`; none is read at
    import, as a default argument, in another constant or in a class: an override would come too
    late. Both values of an Either have one type, and differ."""
    module, names = import_file(SCRIPTS[name], "constants_of"), assignments(name)
    assert list(names) == list(module.DEFAULTS) and len(names) > 40
    bound, used = [], []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.append((node.id, node.lineno))
        elif isinstance(node, ast.arg):
            bound.append((node.arg, node.lineno))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)):
            bound.append((node.name, node.lineno))
        elif isinstance(node, ast.alias):
            bound.append(((node.asname or node.name).split(".")[0], node.lineno))
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            bound += [(each, node.lineno) for each in node.names]

    def visit(node):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
            used.append((node.id, node.lineno))
        inner = ast.iter_child_nodes(node)
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):  # what runs when it is defined
            inner = [*node.args.defaults, *filter(None, node.args.kw_defaults),
                     *getattr(node, "decorator_list", [])]
        for child in inner:
            visit(child)

    visit(TREES[name])
    assert sorted(line for each, line in bound if each in names) == \
        sorted(node.lineno for node in names.values())
    assert not used
    for constant, value in module.DEFAULTS.items():
        if isinstance(value, module.Either):
            assert type(value.full) is type(value.embedded) and value.full != value.embedded
        assert getattr(module, constant) == module.resolve(module.DEFAULTS, "full")[constant]


@pytest.mark.parametrize("name", NAMES)
def test_every_constant_says_what_it_is(name):
    """A comment on the line where it begins, in one of the groups, which stand in their order."""
    said, nodes = comments(name), assignments(name)
    groups = [(line, text[6:]) for line, text in said.items() if text.startswith("# --- ")]
    assert [group for _, group in groups] == GROUPS
    for constant, node in nodes.items():
        assert len(said.get(node.lineno, "").strip("# ")) > 3, f"{constant} has no comment"
        assert node.lineno > groups[0][0]
    lines = [node.lineno for node in nodes.values()]
    for (start, group), (end, _) in zip(groups, [*groups[1:], (max(lines) + 1, "")]):
        assert any(start < line < end for line in lines), f"the group {group} is empty"


@pytest.mark.parametrize("name", NAMES)
def test_the_lesson_comes_first(name):
    """Docstring, imports, constants, the loop; its algorithm above the line, the machinery below;
    headings of one width; and the call at the end. Everything says what it does."""
    source, tree = SOURCES[name], TREES[name]
    title = ast.get_docstring(tree).splitlines()[0]
    assert "in one file" in title
    assert name == "self_play" or re.search(r"arXiv:\d{4}\.\d{5}", title)
    assert f"python RL_HAND/{name}/{name}.py" in ast.get_docstring(tree)
    last = tree.body[-1]
    assert ast.unparse(last) == "if __name__ == '__main__':\n    main(sys.argv[1:])"
    imports = [node.lineno for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert max(imports) < min(node.lineno for node in assignments(name).values())
    assert len(set(map(len, re.findall(r"^# =+ .*? =+$", source, re.MULTILINE)))) == 1
    end = source[:source.index(LINE)].count("\n")
    where = {node.name: node.lineno for node in definitions(tree)}
    assert where["train"] == min(line for each, line in where.items() if each != "Either")
    own = ["preferences", "implicit_rewards"] if name == "self_play" else [
        "compute_advantages", "policy_loss", "token_weights"]
    own += ["clip_range"] if name not in ("self_play", "reinforce") else []  # what has a ratio
    for function in own:
        assert where[function] < end, function
    for function in ("sample_groups", "score_tokens", "load_rows", "save_checkpoint", "main"):
        assert where[function] > end, function
    for node in definitions(tree):
        assert ast.get_docstring(node) or node.name.startswith("__"), node.name
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            assert not isinstance(node.body[0], ast.Pass), f"line {node.lineno}: swallowed"


def test_lines_fit():
    files = [path for folder in ("RL_HAND", "data", "tests", "benchmarks", "tools")
             for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 8
    wide = [f"{path.relative_to(ROOT)}:{number}" for path in files for number, line in
            enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 100]
    assert not wide


def test_import_has_no_side_effects(tmp_path):
    """No file, seed, CUDA context, thread count, signal handler or output of a script's own."""
    (tmp_path / "here").mkdir()
    (tmp_path / "probe.py").write_text(f"""
import os, random, signal, sys, warnings
sys.dont_write_bytecode = True
import numpy, pandas, torch, transformers, matplotlib.figure, tqdm.auto, safetensors.torch
import huggingface_hub, torch.distributed, transformers.modeling_layers
from transformers import AutoModelForCausalLM, DynamicCache

def state():
    return (torch.get_rng_state().tolist(), torch.initial_seed(), random.getstate(),
            numpy.random.get_state()[1].tolist(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
            torch.cuda.is_initialized(), transformers.utils.logging.get_verbosity(),
            torch.distributed.is_initialized(), signal.getsignal(signal.SIGINT),
            len(warnings.filters), dict(os.environ), os.getcwd(), os.listdir())

before = state()
for folder in {[str(path.parent) for path in SCRIPTS.values()]!r}:
    sys.path.insert(0, folder)
    __import__(os.path.basename(folder))
    assert state() == before, f"the import of {{folder}} changed something"
assert not torch.cuda.is_initialized()
""")
    files = {p: p.stat().st_mtime_ns for path in SCRIPTS.values() for p in path.parent.rglob("*")}
    done = subprocess.run([sys.executable, str(tmp_path / "probe.py")], cwd=tmp_path / "here",
                          capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {p: p.stat().st_mtime_ns for path in SCRIPTS.values()
            for p in path.parent.rglob("*")} == files


def test_help_shows_every_constant(gspo, capsys):
    for argument in ("--help", "-h"):
        gspo.main([argument])
        printed = capsys.readouterr().out
        assert printed.startswith(gspo.__doc__)
        for name, node in assignments("gspo").items():
            for line in SOURCES["gspo"].splitlines()[node.lineno - 1:node.end_lineno]:
                assert f"\n{line}\n" in printed, name
        for group in GROUPS:
            assert f"# --- {group}\n" in printed
        assert "def train" not in printed and "import torch" not in printed
    gspo.main(["GROUP_SIZE=8", "--help"])  # anywhere among the arguments
    assert capsys.readouterr().out == printed


# ---- Requirements


def pins(name):
    """The lines of a requirements file, less comments."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line]


def header():
    """The script's own metadata, read as PEP 723 says."""
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", SOURCES["gspo"])
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:]
                                 for line in block["content"].splitlines(keepends=True)))


def test_header_and_requirements_agree():
    assert header()["dependencies"] == pins("requirements.txt")
    assert header()["requires-python"] == ">=3.11"
    assert all(source.startswith("# /// script\n") for source in SOURCES.values())


def test_requirements_are_pinned():
    named = {}
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in pins(name):
            if line != "-r requirements.txt":
                package, version = re.fullmatch(r"([a-z0-9-]+)==([0-9]+(?:\.[0-9]+)+)",
                                                line).groups()
                assert named.setdefault(package, version) == version
    assert "-r requirements.txt" in pins("requirements-dev.txt")
    assert {line.split("==")[0] for line in pins("requirements.txt")} == {
        "torch", "transformers", "pandas", "pyarrow", "matplotlib", "tqdm"}
    assert named["torch"] == "2.13.0"


@pytest.mark.parametrize("name", NAMES)
def test_a_script_imports_only_what_it_requires(name):
    """Two come with transformers; peft is optional, imported where it is used."""
    allowed = {line.split("==")[0] for line in pins("requirements.txt")} | {
        "safetensors", "huggingface_hub", "peft"}
    for node in ast.walk(TREES[name]):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            assert module.split(".")[0] in allowed | set(sys.stdlib_module_names), module
    top = {node.module for node in TREES[name].body if isinstance(node, ast.ImportFrom)}
    assert "peft" not in top


# ---- The repository


@pytest.fixture(scope="module")
def files():
    """Every file that is, or would be, in the repository."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"],
                            cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    paths = [path for path in paths if path.is_file()]
    assert ROOT / "RL_HAND" / "gspo" / "gspo.py" in paths
    return paths


def test_no_large_files_and_no_pickles(files):
    for path in files:
        assert path.stat().st_size <= 3_000_000, f"{path} is too large"
        assert path.suffix not in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"), path
        with path.open("rb") as file:
            start = file.read(2)
        # Protocol 2 and later begin so; torch.save's zip archive holds one.
        assert not (start[:1] == b"\x80" and start[1:] in b"\2\3\4\5") and start != b"PK", path


def test_no_paths_of_a_machine(files):
    for path in files:
        inside = path.relative_to(ROOT)
        if inside.parts[0] not in ("RL_HAND", "data", "README.md", "Makefile"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights, tables, pictures
        found = re.search(r"(?<![\w.~/])/(work|tmp|root|home|Users)\b\S*", text)
        assert not found, f"{inside}: {found.group()}"


def test_no_runs_and_no_caches(files):
    for path in files:
        assert not {"runs", "__pycache__", ".venv", ".pytest_cache"} & set(path.parts), path


# ---- Words


def markdown(path):
    """A page's text; fails where there is none."""
    assert path.is_file(), f"{path.relative_to(ROOT)} is missing"
    return path.read_text(encoding="utf-8")


def section(path, heading):
    """The text under a heading of level 2, up to the next one."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", markdown(path),
                      re.MULTILINE | re.DOTALL)
    assert found, f"{path.relative_to(ROOT)} has no heading '## {heading}'"
    return found.group(1)


def table_rows(text):
    """The rows of Markdown tables as lists of cells, less rulers."""
    rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in text.splitlines()
            if line.strip().startswith("|")]
    rows = [[cell.strip().replace("\\|", "|") for cell in row] for row in rows]
    return [row for row in rows if not all(re.fullmatch(r":?-*:?", cell) for cell in row)]


def python_names(path):
    """Names of a file's functions and classes."""
    assert path.is_file(), f"{path} is missing"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_the_table_of_equations_names_what_exists(gspo):
    header, *rows = table_rows(section(SUMMARY, "Equation, function, test"))
    header = [cell.lower() for cell in header]
    functions = [i for i, cell in enumerate(header) if "function" in cell]
    tests = [i for i, cell in enumerate(header) if "test" in cell]
    assert functions and tests and len(rows) >= 8
    seen = set()
    for row in rows:
        named = [name for i in functions for name in re.findall(r"`([^`]+)`", row[i])]
        assert named, f"no function in {row}"
        for name in named:
            assert callable(getattr(gspo, name.removesuffix("()"), None)), f"no function {name}"
        seen |= set(named)
        named = [name for i in tests for name in re.findall(r"`([^`]+)`", row[i])]
        assert named, f"no test in {row}"
        for name in named:
            file, _, test = name.partition("::")
            assert file.startswith("tests/") and test.startswith("test_"), name
            assert test.split("[")[0] in python_names(ROOT / file), f"no test {name}"
    assert {"compute_advantages", "policy_loss", "kl_to_reference", "adapt_kl_coef",
            "sample_groups", "score_tokens"} <= {name.removesuffix("()") for name in seen}


PAGES = sorted(str(path.relative_to(ROOT)) for path in [
    ROOT / "README.md", ROOT / "data" / "README.md", *(ROOT / "RL_HAND").rglob("*.md")])


def test_there_are_pages():
    assert {f"RL_HAND/{name}/{page}" for name in NAMES
            for page in ("README.md", "IMPLEMENTATION_SUMMARY.md")} - set(PAGES) <= {
                f"RL_HAND/{name}/IMPLEMENTATION_SUMMARY.md"  # their pages have room for it
                for name in ("grpo", "reinforce", "gmpo", "cispo", "moe")}
    assert {"README.md", "RL_HAND/README.md", "RL_HAND/constants.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_finished_and_lead_somewhere(page):
    text = markdown(ROOT / page)
    assert not re.search(r"@[A-Z_]+@|\b(TODO|FIXME|TBD|XXX)\b", text)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} leads to {target}"
    for name in re.findall(r"tests/\w+\.py(?:::\w+)?", text):
        file, _, test = name.partition("::")
        assert not test or test in python_names(ROOT / file), name
        assert (ROOT / file).is_file(), name


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_pages_would_run(page):
    """make's targets exist; scripts exist; constants set on the command line are accepted."""
    text, modules = markdown(ROOT / page), {}
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for block in re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if made := re.match(r"make (\w+)", line):
                assert made.group(1) in targets, line
            if script := re.match(r"(?:\S*python|uv run|torchrun --\S+) (\S+\.py)(.*)", line):
                path = ROOT / script.group(1)
                assert path.is_file(), line
                if path.stem == path.parent.name:
                    module = modules.get(path) or import_file(path, "script_of_a_page")
                    modules[path] = module
                    arguments = script.group(2).split("  #")[0]
                    for quoted, plain in re.findall(r'"([^"]*)"|([A-Z_a-z]+=[^\s"]+)', arguments):
                        assert module.parse(quoted or plain)[0] in module.DEFAULTS, line


# ---- Numbers in answers


@pytest.mark.parametrize("text, number", [
    ("The answer is 42", "42"),
    ("42.", "42"), ("3.", "3"), ("$1,000.", "1000"), ("1,234,567.89 in all", "1234567.89"),
    ("7, 8, 9", "9"), ("1,2", "2"), ("3.50", "3.5"), ("-0.25", "-0.25"), ("-7", "-7"),
    ("it is -7.", "-7"), ("x=-7", "-7"), ("(-7)", "-7"), ("$-1,000", "-1000"),
    ("12-5", "5"), ("12 - 5", "5"), ("(3)-5", "5"), ("2.-5", "5"), ("-12-5=-17", "-17"),
    ("\N{MINUS SIGN}5", "-5"), ("12\N{MINUS SIGN}5", "5"),
    (r"\boxed{42}", "42"), (r"\boxed{-3}", "-3"), (r"$\boxed{1,000}$.", "1000"),
    ("#### 72", "72"), ("**72**", "72"), ("50%", "50"), ("007", "7"), ("first 1\nthen 2\n", "2"),
    ("no number", None), ("", None), ("-", None), (".", None), ("one two", None), ("½", None),
    # a point, a power of ten, a fraction, a thousand in LaTeX, a minus of any kind
    ("Answer: .75", "3/4"), ("it is .125.", "1/8"), ("x = -.25", "-1/4"), ("1.2.3", "3"),
    ("2.5e-4", "1/4000"), ("1E6", "1000000"), ("3e+2 apples", "300"), ("2e5x", None),
    ("22/7.", "22/7"), ("-6/8", "-3/4"), ("3 / 4", "3/4"), ("-2 1/3", "-7/3"), ("5/0", None),
    (r"\frac{22}{7}", "22/7"), (r"3\frac12", "7/2"), (r"-\dfrac{2}{3}$", "-2/3"),
    ("1/2/3", None), ("12/25/2024", None), ("12:30", None), ("10^3", None), ("2^{10}", None),
    ("1{,}234", "1234"), (r"\boxed{12{,}345{,}678}", "12345678"), (r"9{,}876.5", "19753/2"),
    ("1{,}23", "23"), ("5\u202f000", "5000"), ("2.5 million", "2500000"), ("5x", None),
    ("\u20137", "-7"), ("x = \u201312", "-12"), ("(\u20131/2)", "-1/2"), ("7\u20139", "9"),
    ("12 \u2013 5", "5"), ("\u2014 5", "5"),
])
def test_last_number(gspo, text, number):
    found = gspo.last_number(text)
    assert found == (None if number is None else Fraction(number))
    assert found is None or type(found) is Fraction  # a float would be rounded


@pytest.mark.parametrize("text, number", [
    ("9" * 99, int("9" * 99)), ("9" * 100, None), ("9" * 10_000, None),  # 99 digits are the most
    ("-" * 10_000 + "7", -7), ("1," * 10_000 + "2", 2), ("1" + ",000" * 30, 10**90),
    ("1" + ",000" * 10_000, None), ("1." * 9_999 + "5", Fraction("1.5")), (".5" * 10_000, 5),
    ("1/" * 10_000 + "3", None), ("1e" * 10_000 + "3", None), ("{,}" * 10_000 + "4", 4),
    ("1 " * 10_000 + "1/4", Fraction(5, 4)), ("1 " + "1" * 10_000 + "/4", None),
    (r"\frac{" * 10_000 + "1}{2}", Fraction(1, 2)), (r"\frac" + " " * 10_000 + "1", 1),
    ("1e999", 10**999), ("5e-999", Fraction(5, 10**999)),
    ("a" * 100_000, None),
], ids=lambda value: repr(value)[:12] if isinstance(value, str) else "")
def test_last_number_of_a_long_text_in_little_time(gspo, text, number):
    start = time.perf_counter()
    assert gspo.last_number(text) == number
    assert gspo.verify([{"answer": text}], [text]) == [float(number is not None)]
    assert time.perf_counter() - start < 1.0


def unbounded(pattern):
    """The repeats without an upper bound in a pattern that Python's parser has read."""
    for operator, argument in pattern:
        if "REPEAT" in str(operator) and argument[1] == re._constants.MAXREPEAT:
            yield str(argument[2])
        for part in argument if isinstance(argument, (tuple, list)) else [argument]:
            for inner in part if isinstance(part, list) else [part]:  # a branch's
                if isinstance(inner, re._parser.SubPattern):
                    yield from unbounded(inner)


def test_the_search_for_a_number_is_linear(gspo):
    """From each place in a text it looks a bounded number of characters ahead, so no text, however
    made, is slow: a machine's load decides nothing here. Over more than that it looks for the slash
    of 3 1/2, but that from at most nine places before a run of digits."""
    def repeats(pattern, flags=0):
        return list(unbounded(re._parser.parse(pattern, flags)))

    assert [len(repeats(text)) for text in ("a(?:b+c)", "(?:a|b*)?(?<!x)[c]{2,}", "a{1,99}+b?")] \
        == [1, 2, 0]
    assert repeats(gspo.NUMBER.pattern, gspo.NUMBER.flags) == repeats(r"(?:\d{1,9}[ ](?=\d+/))?+")


def test_verifier(gspo):
    cases = [  # response, reference, score
        ("Answer: 85", "7+8=15 carry 1. 3+4+1=8. Answer: 85", 1), ("Answer: 86", "Answer: 85", 0),
        ("85.00", "85", 1), ("1,085", "#### 1085", 1), ("85 or 86", "85", 0), ("86 or 85", "85", 1),
        ("-85", "85", 0), ("", "85", 0), ("no idea", "85", 0),
        ("no idea", "no number", 0), ("5", "no number", 0),  # nothing to be right about
        ("0.1", "0.10", 1), ("1" + "0" * 30 + "1", "1" + "0" * 31, 0),
        (".75", "0.75", 1), ("the share is .75", "75", 0), ("4e3", "4,000", 1), ("4e3", "3", 0),
        ("2e+16", "16", 0), ("0.0003", "3e-4", 1), (r"\boxed{7{,}350}", "7350", 1),
        (r"\boxed{7{,}350}", "350", 0), ("7/2", "#### 3.5", 1), ("Answer: 2", "7/2", 0),
        ("3/2", "7/2", 0), (r"\frac{5}{4}", r"\boxed{\frac{3}{4}}", 0), ("6/4", r"\frac32", 1),
        ("0.333", "1/3", 0), ("\u20139", "-9", 1), ("\u20139", "9", 0), ("\u22129", "\u20139", 1),
        ("14\u20139", "9", 1), ("9x", "9", 0), ("9 million", "9", 0)]
    responses, references, scores = zip(*cases)
    rows = [{"answer": reference} for reference in references]
    assert gspo.verify(rows, responses) == list(map(float, scores))
    assert {type(score) for score in gspo.verify(rows, responses)} == {float}


# ---- Data


class Words:
    """A tokenizer by which a prompt has a token for each word: the number that its bytes are."""

    def apply_chat_template(self, messages, **options):
        assert options["add_generation_prompt"]
        assert all(one["role"] == "user" for one, in messages)
        return {"input_ids": [[int.from_bytes(word.encode()) for word in one["content"].split(" ")]
                              for one, in messages]}


def entry(path, kind="parquet"):
    """A dataset entry."""
    return {"path": str(path), "type": kind, "input": "question", "output": "answer"}


def load(gspo, *entries, tokenizer=Words()):
    """The rows of some entries, without their prompts."""
    gspo.train_datasets = list(entries)
    rows = gspo.load_rows("train_datasets", tokenizer)
    return [{key: row[key] for key in row if key != "prompt_ids"} for row in rows]


def test_the_default_questions_are_found_in_the_hubs_cache(gspo, tmp_path, monkeypatch, capsys):
    """As an earlier run or `hf download` leaves them there; without a network, and in one line
    where they are not there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))  # of HF_HOME
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    folder = tmp_path / repo_folder_name(repo_id="openai/gsm8k", repo_type="dataset")
    names = {"train_datasets": "main/train-00000-of-00001.parquet",
             "eval_datasets": "main/test-00000-of-00001.parquet"}
    with pytest.raises(SystemExit) as stop:
        gspo.load_rows("train_datasets", Words())
    line = stop.value.code
    assert "\n" not in line and line.startswith(
        f"error: train_datasets: hf://datasets/openai/gsm8k/{names['train_datasets']}: ")
    assert "cache" in line and "expected" in line and "`hf download`" in line
    (folder / "refs").mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs" / "main").write_text("c0ffee" * 6 + "beef")
    for constant, name in names.items():
        table = pd.DataFrame({"question": [constant], "answer": ["#### 2"]})
        table.to_parquet(folder / "blobs" / constant)
        path = folder / "snapshots" / ("c0ffee" * 6 + "beef") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(folder / "blobs" / constant)
    for name in names:
        row, = gspo.load_rows(name, Words())
        assert (row["question"], row["answer"], len(row["prompt_ids"])) == (name, "#### 2", 1)
    assert capsys.readouterr().out == "".join(
        f"{name}: 1 of 1 questions are within MAX_PROMPT_TOKENS=256\n" for name in names)


@pytest.mark.filterwarnings("error")
def test_every_kind_of_file_gives_the_same_rows(gspo, tmp_path):
    """Numbers, dates, quotes and line breaks stay the text they are; no deprecated option."""
    table = pd.DataFrame({
        "question": ["1+1?", "When?\n\"Now\"", "Wie viel – 3€?", "007", "1e3", "null", " "],
        "answer": ["2", "2024-01-31", "3", "007", "1000.0", "true", "1700000000"]})
    expected = table.to_dict("records")
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(expected))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in expected))
    for kind in ("parquet", "json", "jsonl"):
        assert load(gspo, entry(tmp_path / f"a.{kind}", kind)) == expected
        by_name = {"path": str(tmp_path / f"a.{kind}"), "input": "question", "output": "answer"}
        assert load(gspo, by_name) == expected
    # Columns of numbers are answers as well.
    (tmp_path / "n.jsonl").write_text('{"question": "1+1?", "answer": 2, "date": "2024-01-31"}\n')
    assert load(gspo, entry(tmp_path / "n.jsonl", "jsonl")) == [{"question": "1+1?", "answer": "2"}]


def test_several_entries_and_patterns(gspo, tmp_path):
    """In the order of the entries, and of the names that match a pattern."""
    for name in ("b2", "a", "b1"):
        pd.DataFrame({"question": [name], "answer": ["1"]}).to_parquet(tmp_path / f"{name}.parquet")
    rows = load(gspo, entry(tmp_path / "b*.parquet"), entry(tmp_path / "a.parquet"))
    assert [row["question"] for row in rows] == ["b1", "b2", "a"]


def test_further_columns(gspo, tmp_path):
    """One that an entry names is kept under its key; it must be there and hold texts."""
    path = tmp_path / "t.parquet"
    pd.DataFrame({"question": ["1+1?"], "answer": ["2"], "said": ["1+1=2"],
                  "none": [None], "list": [[1]]}).to_parquet(path)
    assert load(gspo, entry(path) | {"teacher": "said"}, entry(path)) == [
        {"question": "1+1?", "answer": "2", "teacher": "1+1=2"},
        {"question": "1+1?", "answer": "2"}]
    for column, words in (("missing", "no column missing"), ("none", "without text"),
                          ("list", "without text")):
        with pytest.raises(SystemExit) as stop:
            load(gspo, entry(path) | {"teacher": column})
        assert words in str(stop.value.code) and "\n" not in stop.value.code


def test_embedded_data_loads_from_anywhere(embedded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = embedded.load_rows("train_datasets", Words())
    held_out = embedded.load_rows("eval_datasets", Words())
    assert len(train) >= 10 * embedded.BATCH_SIZE and len(held_out) >= 256
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    assert all(embedded.last_number(row["answer"]) is not None for row in train + held_out)


@pytest.mark.parametrize("questions, refused", [
    (["1 + 1?", "1 + 1? ", "\n1 + 1?"], False), (["1 + 1?", "1 +  1?", "2 + 2?"], True),
    (["1 + 1?", "1 + 1?"], False)])
def test_a_prompt_says_which_question_it_is(gspo, tmp_path, questions, refused):
    """A template that drops the question, or a tokenizer without its letters, would train on
    noise. But many strip the spaces around it, and a question may stand there twice."""
    class Stripping(Words):
        def apply_chat_template(self, messages, **options):
            return super().apply_chat_template(
                [[one | {"content": " ".join(one["content"].split())}] for one, in messages],
                **options)

    path = tmp_path / "t.parquet"
    pd.DataFrame({"question": questions, "answer": "2"}).to_parquet(path)
    if not refused:
        assert len(load(gspo, entry(path), tokenizer=Stripping())) == len(questions)
        return
    with pytest.raises(SystemExit) as stop:
        load(gspo, entry(path), tokenizer=Stripping())
    assert stop.value.code == (f"error: POLICY_MODEL={gspo.POLICY_MODEL}: different questions give "
                               "the same prompt; expected a tokenizer with a chat template")


def gsm8k(name, count):
    """A file of GSM8K as (path, rows read without the script)."""
    path = GSM8K / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"GSM8K is not beside the project: no {GSM8K.name}/{name}.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == count
    return path, [{"question": row["question"], "answer": row["answer"]} for row in rows]


@pytest.mark.parametrize("name, count", [("train", 7473), ("test", 1319)])
def test_gsm8k_loads_as_jsonl_and_parquet(gspo, tmp_path, name, count):
    path, expected = gsm8k(name, count)
    assert load(gspo, entry(path, "jsonl")) == expected
    pd.DataFrame(expected).to_parquet(tmp_path / "gsm8k.parquet")
    assert load(gspo, entry(tmp_path / "gsm8k.parquet")) == expected


@pytest.mark.parametrize("name, count", [("train", 7473), ("test", 1319)])
def test_last_number_of_gsm8k_answers(gspo, name, count):
    """The number behind #### in every reference answer, and a prompt is never right by itself."""
    _, rows = gsm8k(name, count)
    for row in rows:
        final = row["answer"].rsplit("####", 1)[1].strip().replace(",", "")
        assert gspo.last_number(row["answer"]) == Fraction(final), row["answer"]
    answers = [row["answer"] for row in rows]
    assert gspo.verify(rows, answers) == [1.0] * count
    assert sum(gspo.verify(rows, answers[1:] + answers[:1])) < 0.05 * count


def test_gsm8k_prompts_are_kept_or_dropped_and_counted(embedded, capsys):
    path, rows = gsm8k("test", 1319)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "policy")
    embedded.MAX_PROMPT_TOKENS, embedded.eval_datasets = 256, [entry(path, "jsonl")]
    kept = embedded.load_rows("eval_datasets", tokenizer)
    lengths = [len(tokenizer.apply_chat_template(
        [{"role": "user", "content": row["question"]}], add_generation_prompt=True,
        enable_thinking=False, return_dict=True)["input_ids"]) for row in rows]
    fits = [row["question"] for row, length in zip(rows, lengths) if length <= 256]
    assert 0 < len(fits) < len(rows)
    assert [row["question"] for row in kept] == fits
    assert [len(row["prompt_ids"]) for row in kept] == [n for n in lengths if n <= 256]
    assert capsys.readouterr().out == (
        f"eval_datasets: {len(fits)} of 1319 questions are within MAX_PROMPT_TOKENS=256\n")
    text = tokenizer.decode(kept[0]["prompt_ids"])
    assert kept[0]["question"] in text and text.endswith("<think>\n\n</think>\n\n")
    assert kept[0]["answer"] not in text
