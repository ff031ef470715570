"""One house: what gspo.py and the other scripts share is the same, byte for byte, the tools that
keep it and the pages so work, and each of the scripts refuses, runs, writes and resumes as gspo.py
does. What holds for the text of every script is in test_repository.py.
"""

import ast
import contextlib
import csv
import io
import json
import math
import re
import shutil
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, import_file
from safetensors.torch import load_file

FOLDER = ROOT / "RL_HAND"
NAMES = ["gspo", "grpo", "dapo", "ppo", "gad", "self_play", "reinforce", "gmpo", "cispo",
         "moe"]
SCRIPTS = {name: FOLDER / name / f"{name}.py" for name in NAMES}
OTHERS = NAMES[1:]
SYNCED = SCRIPTS | {"reward_func": FOLDER / "self_play" / "reward_func.py"}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in SCRIPTS.items()}
SYNC = import_file(ROOT / "tools" / "sync.py", "sync_under_test")
TABLES = import_file(ROOT / "tools" / "tables.py", "tables_under_test")


def fresh(name):
    """A script as a new module, its constants as in the file."""
    torch.set_num_threads(1)
    return import_file(SCRIPTS[name], f"{name}_of_the_family")


# =========================================== Sameness ===========================================


def functions(source):
    """Top-level functions and classes: name -> source text, decorators included."""
    found, lines = {}, source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1:node.end_lineno])
    return found


FUNCTIONS = {name: functions(source) for name, source in SOURCES.items()}
ORIGINALS = {name: SYNC.localised(SOURCES["gspo"], name, source) for name, source in
             SOURCES.items()}  # gspo.py in the words of each script


def in_words_of(name, arguments):
    """A command line in which shared constants have the names that the script has for them."""
    return [SYNC.renamed(argument, name) for argument in arguments]


def constants(source):
    """The constants by name: (group, value as source)."""
    found, tree = {}, ast.parse(source)
    groups = [(number, line[6:]) for number, line in enumerate(source.splitlines(), 1)
              if line.startswith("# --- ")]
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == "DEFAULTS":
                return found
            group = [name for line, name in groups if line < node.lineno][-1]
            found[node.targets[0].id] = (group, ast.unparse(node.value))


def test_the_tool_finds_nothing_to_repair(capsys):
    """In the scripts as they are; and it looks at all of them."""
    assert [path.stem for path in SYNC.scripts()] == sorted(OTHERS)
    assert not SYNC.main(["--check"]), capsys.readouterr().out
    assert capsys.readouterr().out == ""


def test_the_same_name_is_the_same_function():
    """Of any two scripts, not only of each and the original; but for the list with its reasons."""
    for one, other in combinations(NAMES, 2):
        ours = functions(SYNC.edited(SYNC.renamed(SOURCES[one], other), other))
        theirs = functions(SYNC.edited(SYNC.renamed(SOURCES[other], one), one))
        shared = ours.keys() & theirs.keys()
        assert len(shared) > 50
        different = [name for name in shared - SYNC.OWN.keys() if ours[name] != theirs[name]]
        assert different == [], f"{one}, {other}"


def test_few_shared_lines_are_edited():
    """Each edit says why, and changes something."""
    for name, edits in SYNC.EDITS.items():
        lines = [len(set(theirs.splitlines()) - set(ours.splitlines()))
                 for _, ours, theirs in edits]
        assert all(lines) and sum(lines) <= 15
        assert all(len(why) > 10 and theirs in SOURCES[name] for why, _, theirs in edits)


def test_no_exception_is_stale():
    """Each name on the tool's list differs somewhere, and says why; train is one of them."""
    for name, reason in SYNC.OWN.items():
        texts = {found[name] for found in FUNCTIONS.values() if name in found}
        assert len(texts) > 1, f"{name} is the same in all scripts"
        assert len(reason) > 10
    assert "train" in SYNC.OWN and len(SYNC.OWN) < 10


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_shared_is_the_same(name):
    """The requirements at the head; what stands below the line, most of the file; and the constants
    outside the Algorithm group: names, order, values, groups."""
    parts = {}
    for script, source in (("gspo", ORIGINALS[name]), (name, SOURCES[name])):
        assert source.count(SYNC.LINE) == source.count(SYNC.SAME) == 1
        assert source.index(SYNC.LINE) < source.index(SYNC.SAME)
        parts[script] = (source[source.index(SYNC.SAME):], source[:source.index('"""')])
    assert parts[name] == parts["gspo"]
    assert len(parts[name][0]) > 0.6 * len(SOURCES[name])

    def outside(source):
        return [(key, *value) for key, value in constants(source).items()
                if value[0] != "Algorithm"]

    ours, original = outside(SOURCES[name]), outside(SYNC.renamed(SOURCES["gspo"], name))
    assert [row[:2] for row in ours] == [row[:2] for row in original] and len(ours) > 40
    values = SYNC.OWN_VALUES.get(name, set())  # names to which the script gives other values
    assert {key for key, _, value in set(ours) ^ set(original)} == values and len(values) < 12
    own = {key for key, (group, _) in constants(SOURCES[name]).items() if group == "Algorithm"}
    assert {"self_play": {"MARGIN", "TOTAL_EPOCHS"}, "reinforce": {"BASELINE", "AGGREGATION"}}.get(
        name, {"CLIP_RANGE", f"{name.upper()}_EPOCHS"}) <= own


def test_headings_stand_in_one_order():
    """The headings of gspo.py are in every script, in its order; so are the two lines."""
    def headings(source):
        return re.findall(r"^# ={4,} (.+?) =+$", source, re.M)

    original = headings(SOURCES["gspo"])
    assert len(original) > 8
    assert sum(SYNC.LINE in f"# ==================== {text}" for text in original) == 1
    for name in OTHERS:
        instead = {"Advantages": "Preferences"} if name == "self_play" else {}
        expected = [instead.get(text, text) for text in original]
        assert [text for text in headings(SOURCES[name]) if text in expected] == expected


# ========================================= tools/sync.py =========================================

PLANTS = {  # what: (script, text of the script, what takes its place)
    "requirement": ("ppo", '# requires-python = ">=3.11"', '# requires-python = ">=3.12"'),
    "import": ("grpo", "import glob\n", "import glob \n"),
    "constant before Algorithm": ("grpo", "MAX_GRAD_NORM = 1.0", "MAX_GRAD_NORM = 2.0"),
    "constant after Algorithm": ("ppo", "EVAL_BATCH = Either(16", "EVAL_BATCH = Either(17"),
    "comment of a constant": ("dapo", "0: only epoch_N/", "0: only epoch_N"),
    "shared function above the line": ("dapo", '"""CLIP_RANGE as (low, high)."""',
                                       '"""CLIP_RANGE as (low,high)."""'),
    "shared function of two scripts": ("grpo", "min(max(coefficient * factor, 0.01), 1.0)",
                                       "min(max(coefficient * factor, 0.02), 1.0)"),
    "below the line": ("dapo", "the list of all processes' values."[1:],
                       "he List of all processes' values."),
    "line of its own below the line": ("moe", "tape.own = tape.own[index]\n",
                                       "tape.own = tape.own[index] \n"),
    "line beside one of its own": ("moe", "cache.batch_repeat_interleave(group_size)\n",
                                   "cache.batch_repeat_interleave(GROUP_SIZE)\n"),
    "under another name": ("self_play", "rewards.unflatten(0, (-1, ROLLOUT_N)), batch.comp",
                           "rewards.unflatten(0, (-1, GROUP_SIZE)), batch.comp"),
    "value beside one's own": ("self_play", "EVAL_QUESTIONS = Either(256, 512)",
                               "EVAL_QUESTIONS = Either(256, 128)"),
    "grammar of numbers": ("reward_func", "# a currency", "# currency"),
    "reading of a number": ("reward_func", '"m": 10**6}', '"m": 10**5}'),
}


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The scripts and the reward function in a folder of their own, at which the tool looks."""
    for path in SYNCED.values():
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    monkeypatch.setattr(SYNC, "ROOT", tmp_path)
    monkeypatch.setattr(SYNC, "ORIGINAL", tmp_path / "RL_HAND" / "gspo" / "gspo.py")
    return {name: tmp_path / path.relative_to(ROOT) for name, path in SYNCED.items()}


@pytest.mark.parametrize("what", PLANTS)
def test_a_difference_is_named_and_repaired(copied, capsys, what):
    """One that is a byte or so. --check says in which file, shows it, names the command, and writes
    nothing; the command brings back every byte, and touches no other file."""
    name, text, instead = PLANTS[what]
    source = SYNCED[name].read_text(encoding="utf-8")
    assert source.count(text) == 1, text
    planted = source.replace(text, instead)
    copied[name].write_text(planted, encoding="utf-8")
    assert SYNC.main(["--check"])
    printed = capsys.readouterr().out
    where = SYNCED[name].relative_to(ROOT).as_posix()
    assert f"{where} differs from gspo.py" in printed.replace("\\", "/")
    assert printed.count("differs from gspo.py") == 1 and "python tools/sync.py" in printed
    line = next(line for line in planted.splitlines() if line not in source.splitlines())
    assert f"\n-{line}\n" in printed
    assert copied[name].read_text(encoding="utf-8") == planted
    assert not SYNC.main([])
    assert f"{name}.py" in capsys.readouterr().out
    for script, path in copied.items():
        assert path.read_bytes() == SYNCED[script].read_bytes()


OWN_TEXTS = {  # what is a script's own, in both profiles: the Algorithm group, the functions of the
    "ppo": [("GAE_LAMBDA = 0.95", "GAE_LAMBDA = 0.9"),  # list, rules and panels, values of the list
            ("PPO_EPOCHS = Either(4, 2)", "PPO_EPOCHS = Either(4, 3)"),
            ('meter.lap("update")', "meter.lap('update')"), ("PPO_EPOCHS >= 1", "PPO_EPOCHS >= 2"),
            ('"Value loss": "value_loss"', '"Value": "value_loss"')],
    "self_play": [("ROLLOUT_N = 8  # c", "ROLLOUT_N = 6  # C"),
                  ("SELF_PLAY_ROUNDS = Either(3, 12)", "SELF_PLAY_ROUNDS = Either(3, 13)")],
    "reinforce": [("MINIBATCH = Either(8, 128)", "MINIBATCH = Either(8, 256)"),
                  ("LEARNING_RATE = Either(1e-6, 4e-4)", "LEARNING_RATE = Either(1e-6, 3e-4)")],
    "gad": [('"teacher": "teacher_response"', '"teacher": "someone"')]}


@pytest.mark.parametrize("name", OWN_TEXTS)
def test_what_is_a_scripts_own_is_left_alone(copied, capsys, name):
    source = SOURCES[name]
    for text, instead in OWN_TEXTS[name]:
        assert source.count(text) == 1, text
        source = source.replace(text, instead)
    copied[name].write_text(source, encoding="utf-8")
    assert not SYNC.main(["--check"]) and not SYNC.main([])
    assert capsys.readouterr().out == ""
    assert copied[name].read_text(encoding="utf-8") == source


def test_a_change_of_the_original_goes_to_all(copied, capsys):
    """It is copied to each script, where it is then the same."""
    text = "def parse(argument):"
    source = SOURCES["gspo"].replace(text, f"# A remark.\n{text}")
    copied["gspo"].write_text(source, encoding="utf-8")
    assert SYNC.main(["--check"])
    printed = capsys.readouterr().out
    assert all(f"{name}.py differs" in printed for name in OTHERS)
    SYNC.main([])
    for name in OTHERS:
        expected = SOURCES[name].replace(text, f"# A remark.\n{text}")
        assert copied[name].read_text(encoding="utf-8") == expected != SOURCES[name]


# ======================================== tools/tables.py ========================================


def test_the_tables_of_the_pages_are_fresh(capsys):
    assert not TABLES.main(["--check"]), capsys.readouterr().out
    assert capsys.readouterr().out == ""


def test_a_stale_table_is_found_and_made_anew(tmp_path, monkeypatch, capsys):
    """A constant's value, the shared one's and a script's own; a line of the diff to another."""
    for path in [FOLDER / "constants.md", SCRIPTS["gspo"], *(
            FOLDER / name / file for name in ("grpo", "dapo", "ppo")
            for file in (f"{name}.py", "README.md"))]:
        (tmp_path / path.relative_to(FOLDER)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(FOLDER))
    monkeypatch.setattr(TABLES, "FOLDER", tmp_path)
    TABLES.main([])
    capsys.readouterr()
    fresh_pages, stale = {}, {}
    for page, start in {"constants.md": "| `BATCH_SIZE` |", "ppo/README.md": "| `CLIP_RANGE` |",
                        "grpo/README.md": "+", "dapo/README.md": "+"}.items():
        fresh_pages[page] = text = (tmp_path / page).read_text(encoding="utf-8")
        line = next(line for line in text.splitlines() if line.startswith(start))
        instead = "" if start == "+" else re.sub("[0-9]", "7", line, count=1) + "\n"
        stale[page] = text.replace(f"{line}\n", instead, 1)
        assert stale[page] != text
        (tmp_path / page).write_text(stale[page], encoding="utf-8")
    assert TABLES.main(["--check"])
    printed = capsys.readouterr().out.replace("\\", "/")
    assert all(page in printed for page in stale)
    assert all((tmp_path / page).read_text(encoding="utf-8") == stale[page] for page in stale)
    assert not TABLES.main([])
    for page, text in fresh_pages.items():
        assert (tmp_path / page).read_text(encoding="utf-8") == text


# ======================================== The command line =======================================


@pytest.mark.parametrize("name", OTHERS)
def test_help(name, capsys):
    """The docstring, and each constant with its comment; no code."""
    module = fresh(name)
    module.main(["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(module.__doc__)
    lines = SOURCES[name].splitlines()
    for node in ast.parse(SOURCES[name]).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in module.DEFAULTS:
            assert "\n".join(lines[node.lineno - 1:node.end_lineno]) in printed
    assert "def train" not in printed and "import torch" not in printed


REFUSED = {  # script -> arguments, one for each of its rules; and other scripts' constants
    "gspo": ["GROUP_SIZE=1", "CLIP_RANGE=(0.2, 1e999)",
             "GSPO_EPOCHS=0", "CLIP_RANGE=0.0", "ADVANTAGE_TYPE=std",
             "KL_COEF=-0.1", "USE_SEQUENCE_LEVEL_REWARD=False", "GRPO_EPOCHS=1"],
    "grpo": ["GROUP_SIZE=1", "CLIP_RANGE=(0.2, 1e999)",
             "GRPO_EPOCHS=0", "CLIP_RANGE=(0.2, 0.3, 0.4)", "CLIP_RANGE=1.5",
             "ADVANTAGE_TYPE=std", "AGGREGATION=mean", "KL_COEF=-0.1", "TARGET_KL=-0.1",
             "STD_CORRECTION=-1", "USE_TOKEN_LEVEL_LOSS=True"],
    "dapo": ["GROUP_SIZE=1", "CLIP_RANGE=(0.2, 1e999)", "STD_CORRECTION=2",
             "DAPO_EPOCHS=0", "MAX_SAMPLING_ROUNDS=0", "CLIP_RANGE=(-0.1, 0.2)",
             "ADVANTAGE_TYPE=std", "SPREAD_OF=length", "OVERLONG_CACHE=61", "OVERLONG_CACHE=-1",
             "SPREAD_THRESHOLD=-0.1", "OVERLONG_PENALTY=-1.0", "KL_COEF=0.1", "DYNAMIC_SAMPLING=2"],
    "ppo": ["PPO_EPOCHS=0", "CLIP_RANGE=(0.2, 1e999)",
            "CLIP_RANGE=(1.5, 0.2)", "GAMMA=1.5", "GAE_LAMBDA=-0.1",
            "CRITIC_WARMUP=-1", "CRITIC_LEARNING_RATE=-1.0", "NO_END_PENALTY=-1.0",
            "VALUE_CLIP=-0.2", "TARGET_APPROX_KL=-1.0", "KL_COEF=-0.1", "ADVANTAGE_TYPE=relative"],
    "gad": ["GROUP_SIZE=1", "CLIP_RANGE=(0.2, 1e999)",
            "GAD_EPOCHS=0", "SEQKD_BATCH=0", "SEQKD_STEPS=-1", "CRITIC_WARMUP=-1",
            "CLIP_RANGE=0.0", "SCORE_AT=first", "DISCRIMINATOR=", "LABEL_SMOOTHING=0.5",
            "SEQKD_LEARNING_RATE=-1.0", "KL_COEF=-0.1", "USE_SEQUENCE_LEVEL_REWARD=False",
            "train_datasets=[{'path': 'a', 'input': 'b', 'output': 'c'}]",
            "ADVANTAGE_TYPE=relative"],
    "self_play": ["ROLLOUT_N=1", "PREFERENCE_LOSS=simpo", "PREFERENCE_BETA=0.0", "MARGIN=-0.1",
                  "WATCH_QUESTIONS=-1", "TOTAL_EPOCHS=0", "SELF_PLAY_ROUNDS=0", "SAMPLE_AT_ONCE=0",
                  "ROLLOUT_N=6", "MICRO_BATCH=4", "USE_SEQUENCE_LEVEL_REWARD=False",
                  "GROUP_SIZE=4", "CLIP_RANGE=0.2"],
    "reinforce": ["GROUP_SIZE=1", "MINIBATCH=64", "BATCH_SIZE=32", "BASELINE=critic",
                  "AGGREGATION=token-mean", "USE_SEQUENCE_LEVEL_REWARD=False", "CLIP_RANGE=0.2",
                  "KL_COEF=0.1"],
    "gmpo": ["GROUP_SIZE=1", "GMPO_EPOCHS=0", "CLIP_RANGE=(0.4, 0.4, 0.4)", "CLIP_RANGE=(0.0, 0.4)",
             "CLIP_RANGE=21.0", "ADVANTAGE_TYPE=std", "KL_COEF=-0.1", "AGGREGATION=token-mean",
             "USE_SEQUENCE_LEVEL_REWARD=False"],
    "cispo": ["GROUP_SIZE=1", "CISPO_EPOCHS=0", "CLIP_RANGE=(1.5, 0.2)", "CLIP_RANGE=(1.0, 1e999)",
              "ADVANTAGE_TYPE=std", "TARGET_KL=-0.1", "AGGREGATION=token-mean"],
    "moe": ["ROUTING_REPLAY=R1", "SAMPLER_DTYPE=float16", "MOE_EPOCHS=0", "CLIP_RANGE=(1.5, 0.2)",
            "CLIP_RANGE=(0.2, 1e999)", "ADVANTAGE_TYPE=std", "STD_CORRECTION=2",
            "USE_SEQUENCE_LEVEL_REWARD=False", "BALANCE_COEF=-0.1", "KL_COEF=0.1"],
}


@pytest.mark.parametrize("name", NAMES)
def test_constants_that_cannot_work(name, tmp_path, capsys):
    """One line that says what was found and shows the rule, of which none is idle; nothing is
    loaded or written. Constants of other scripts are none."""
    module, shown = fresh(name), set()
    module.load = None  # calling it would be a TypeError
    rules = [rule.strip() for rule in module.ALGORITHM_RULES.splitlines() if rule.strip()]
    for argument in REFUSED[name]:
        constant = argument.partition("=")[0]
        with pytest.raises(SystemExit) as stop:
            module.main(["PROFILE=embedded", "DEVICE=cpu", f"OUTPUT_DIR={tmp_path / 'run'}",
                         argument])
        line = stop.value.code  # the interpreter prints a text and exits with status 1
        assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line
        if constant not in module.DEFAULTS:
            assert "NAME=VALUE" in line
        elif argument == "DYNAMIC_SAMPLING=2":
            assert "found int, expected bool" in line
        else:
            rule, = (rule for rule in rules if line.endswith(f": expected {rule}"))
            shown.add(rule)
            assert f"{constant}=" in line.partition(": expected ")[0] and constant in rule
    assert [rule for rule in rules if rule not in shown and "processes" not in rule] == []
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", sorted({*NAMES} - {"self_play", "reinforce"}))
def test_the_clip_range_is_a_number_or_a_pair(name):
    """Whichever of the two the script ships with."""
    module = fresh(name)
    for text, expected in (("0.3", (0.3, 0.3)), ("(0.1, 0.3)", (0.1, 0.3)),
                           ("[0.1, 0.3]", (0.1, 0.3))):
        module.configure(["PROFILE=embedded", "DEVICE=cpu", f"CLIP_RANGE={text}"])
        assert module.clip_range() == expected


# ============================================= Runs =============================================

SMALL = ["PROFILE=embedded", "DEVICE=cpu", "MAX_STEPS=2", "EVAL_QUESTIONS=8", "EVAL_EVERY=0",
         "BATCH_SIZE=4", "MINIBATCH=16", "SAVE_EVERY=1", "SHOW_SAMPLES=1"]
OWN = {"ppo": ["CRITIC_WARMUP=1"], "self_play": ["WATCH_QUESTIONS=4"],
       "gad": ["SEQKD_STEPS=0", "CRITIC_WARMUP=0", "ENTROPY_COEF=0.01"],  # its stages: test_gad.py
       "reinforce": ["MINIBATCH=32"], "gmpo": ["KL_COEF=0.04"], "cispo": ["KL_COEF=0.04"]}
NETWORKS = {"gspo": 2, "grpo": 2, "dapo": 1, "ppo": 3, "self_play": 2,  # policy; reference; critic
            "gad": 3,  # policy, reference, discriminator
            "reinforce": 1, "gmpo": 2, "cispo": 2,
            "moe": 2}  # policy, and its copy that samples
NOT_HERE = {"peak_memory", "seqkd_loss",  # columns of a GPU, and of a stage that is left out
            "balance_loss"}  # of a term that is switched off


def started(name, *arguments, plot=True):
    """A run in this process: what it printed, and how many causal models it loaded."""
    module, counted = fresh(name), []
    load = module.load

    def count_and_load(kind, *given, **options):
        counted.append(kind.__name__)
        return load(kind, *given, **options)

    module.load = count_and_load
    if not plot:
        module.plot_metrics = lambda run: None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.main(list(arguments))
    return SimpleNamespace(printed=printed.getvalue(), module=module,
                           networks=counted.count("AutoModelForCausalLM"))


def read_metrics(folder):
    """metrics.csv as a list of {column: text}."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def explained(page):
    """The columns that have a row in a page's section on metrics."""
    section = re.search(r"^## Metrics\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"),
                        re.M | re.S)[1]
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \|", section, re.M)
    assert len(rows) == len(dict(rows)) and all(len(meaning) > 3 for _, meaning in rows)
    return set(dict(rows))


def own_columns(name):
    """The columns that a script has beside the shared ones, as its page explains them."""
    return explained(FOLDER / name / "README.md")


def check_columns(name, run):
    """Each column is explained, in constants.md or on the script's page; what the script's page
    explains is there, filled at every step. The panels of the plot draw what exists."""
    rows = read_metrics(run.folder)
    columns, own = set(rows[0]), own_columns(name)
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert columns <= explained(FOLDER / "constants.md") | own
    assert own - columns <= NOT_HERE and not own & explained(FOLDER / "constants.md")
    for row in rows[1:]:
        assert all(math.isfinite(float(row[column])) for column in own & columns)
        assert 0 <= float(row["accuracy"]) <= 1 and float(row["num_tokens"]) > 100
        assert float(row["entropy"]) > 0 and math.isfinite(float(row["loss"]))
        assert 0 < float(row["time/update"]) < float(row["step_time"])
    assert float(rows[2]["grad_norm"]) > 0
    assert float(rows[2]["learning_rate"]) == pytest.approx(4e-4 if name == "reinforce" else 1e-4)
    assert not any(rows[0][column] for column in own & columns)
    assert all(0 <= float(rows[step]["eval/accuracy"]) <= 1 for step in (0, 2))
    drawn = set(" ".join(run.module.ALGORITHM_PANELS.values()).split())
    assert drawn - columns - run.module.DEFAULTS.keys() <= NOT_HERE
    assert drawn & own or name == "reinforce" and not drawn | own
    return rows


def check_what_it_says(name, run):
    """What was read of the data sets; the start-up block shows the algorithm's constants as they
    are; the networks in memory: DAPO has the policy and nothing beside it; GRPO the reference; PPO
    that and the critic."""
    assert run.networks == NETWORKS[name]
    assert re.match(rf"train_datasets: (\d+) of \1 questions are .+\neval_datasets: .+\n{name}\n",
                    run.printed)
    algorithm = re.search(r"^  algorithm +(.+)$", run.printed, re.M)[1]
    shown = run.module.ALGORITHM_SHOWN.split()
    assert set(shown) <= {constant for constant, (group, _) in constants(SOURCES[name]).items()
                          if group == "Algorithm"}
    assert algorithm == ", ".join(f"{constant}={getattr(run.module, constant)}"
                                  for constant in shown)


def check_files(name, run):
    """What gspo.py leaves, and the critic's weights where there is a critic."""
    folder, last = run.folder, run.folder / ("adversarial" if name == "gad" else "step_2")
    assert {p.name for p in folder.iterdir()} == {
        "epoch_0", "step_1", last.name, "metrics.csv", "training_metrics.png"} | (
        {"reward_func.py"} if name == "self_play" else set())
    assert (folder / "training_metrics.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    parts = {"ppo": ["critic"], "gad": ["discriminator", "reference"]}.get(name, [])
    for checkpoint in (folder / "step_1", last):
        assert (checkpoint / "train_script.py").read_bytes() == SCRIPTS[name].read_bytes()
        assert {p.name for p in checkpoint.glob("*.safetensors")} == {
            "model.safetensors", *(f"{part}.safetensors" for part in parts)}
        assert {p.name for p in checkpoint.glob("*.pt")} == {
            f"{part}_optimizer.pt" for part in ["policy", *parts] if part != "reference"}
    start, one, two = (load_file(path / "model.safetensors") for path in
                       (ROOT / run.module.POLICY_MODEL, folder / "step_1", last))
    assert start.keys() == one.keys() == two.keys()
    held = all(torch.equal(start[key], one[key]) for key in start)
    assert held == (name == "ppo")  # CRITIC_WARMUP=1: not a bit of it has moved
    assert any(not torch.equal(one[key], two[key]) for key in one)
    moments = torch.load(folder / "step_1" / "policy_optimizer.pt", weights_only=True)
    assert (len(moments) == 0) == held


def check_dapo(rows, folder):
    """Rounds, questions and groups agree with one another; there is no KL."""
    assert not [column for column in rows[0] if column.startswith("kl")]
    tokens = 0
    for row in rows[1:]:
        rounds, questions, groups, dropped = (float(row[f"dynamic/{x}"]) for x in (
            "rounds", "questions", "groups", "dropped_ratio"))
        assert 1 <= rounds <= 8 and 1 <= groups <= 4 <= questions
        assert questions <= 4 * rounds and dropped == pytest.approx(1 - groups / questions)
        assert (rounds == 1) == (questions == 4)
        tokens += questions * 8  # every answer that was sampled has at least one token
        assert float(row["num_tokens"]) >= tokens
    assert {row["frac_reward_zero_std"] for row in rows[1:]} == {"0.0"}


def check_self_play(rows, folder):
    """The first round is played by the starting policy: no KL, and no gain on the watched pairs;
    the second by what it left."""
    first, second = ({name: float(text) for name, text in row.items() if text} for row in rows[1:])
    assert first["kl_divergence"] == pytest.approx(0, abs=1e-4) and second["kl_divergence"] != 0
    assert first["watched/implicit_accuracy"] == 0.5 != second["watched/implicit_accuracy"]
    assert first["watched/chosen_logp"] != second["watched/chosen_logp"] < 0
    for row in (first, second):
        assert 0 < row["reward_mean"] == pytest.approx(row["reward"]) and row["reward_max"] <= 1
        assert row["reward"] == pytest.approx(row["rewards/function"])
        assert row["reward_mean"] <= row["reward_max"]
        assert 0 < row["useful_prompts"] <= 1 and 0 < row["pairs_per_prompt"] <= 28
        assert 0 <= row["preference_accuracy"] <= 1 and row["watched/rejected_logp"] < 0
        assert row["loss"] == row["preference_loss"] > 0 and row["ranking_loss"] > 0
        assert "kl" not in row and "advantage/mean" not in row and "ratio/mean" not in row


def check_grpo(rows, folder):
    """The KL to the start: small before the policy has moved far, and its fixed weight."""
    assert {row["kl_coef"] for row in rows[1:]} == {"0.04"}
    assert all(0 < float(row["kl"]) < 0.1 and float(row["kl_loss"]) != 0 for row in rows[1:])
    assert all(float(row["ratio/mean"]) != 1 for row in rows[1:])


def check_reinforce(rows, folder):
    """One update: nothing of a ratio, a clip or a KL. The log-probs that it is made with are the
    sampler's, but for float noise."""
    assert not [column for column in rows[0] if column.startswith(("kl", "ratio", "clip_ratio"))]
    for row in rows[1:]:
        assert 0 < float(row["sampling_logp_difference"]) < 1e-5
        assert float(row["advantage/size"]) > 0.01 and "time/logps" not in row


def check_gmpo(rows, folder):
    """As GRPO with a KL of the same weight; no ratio is exactly 1 after the first update."""
    check_grpo(rows, folder)


def check_cispo(rows, folder):
    """The same. There is no lower end to a weight, so that none is held there."""
    check_grpo(rows, folder)
    assert {row["clip_ratio/low_mean"] for row in rows[1:]} == {"0.0"}


def check_ppo(rows, folder):
    """The critic foretells nothing at first, so that it explains nothing; then something. The
    policy, held in the first step, has moved in neither of the two ways to measure it. The critic's
    weights are saved: a whole network and a head, no longer as it started."""
    first, second = rows[1:]
    assert float(first["value_mean"]) == 0.0 and float(first["explained_variance"]) == 0.0
    assert float(second["value_mean"]) != 0.0 and float(second["explained_variance"]) != 0.0
    assert float(second["explained_variance"]) < 1
    assert abs(float(first["kl"])) < 1e-4 and abs(float(first["approx_kl"])) < 1e-6
    assert float(second["approx_kl"]) > 1e-8
    assert first["learning_rate"] == first["grad_norm"] == ""
    for row in (first, second):
        assert float(row["value_loss"]) > 0 and float(row["critic_grad_norm"]) > 0
        assert 0 <= float(row["value_clip_ratio"]) <= 1 and float(row["advantage/size"]) > 0
    one, two = (load_file(folder / step / "critic.safetensors") for step in ("step_1", "step_2"))
    start = load_file(ROOT / "data" / "policy" / "model.safetensors")
    assert one.keys() == two.keys() >= {"head.weight", "head.bias"}
    body = {key.replace("base_model.", "model."): value for key, value in one.items()
            if key.startswith("base_model.")}
    assert len(body) == len(one) - 2 and body.keys() <= start.keys()
    assert one["head.weight"].norm() > 0
    assert any(not torch.equal(body[key], start[key]) for key in body)
    assert any(not torch.equal(one[key], two[key]) for key in one)


def check_moe(rows, folder):
    """The sampler rounds, and goes other ways for it; its routing is played, so that little is left
    of the gap; two updates of each pass have moved the routers; experts are used, not one alone."""
    for row in rows[1:]:
        found = {name: float(text) for name, text in row.items() if text}
        assert 0 < found["routing/routers_changed"] <= found["routing/tokens_changed"] < 0.5
        changed = found["routing/routers_changed"]
        assert found["routing/layers_changed"] == pytest.approx(8 * changed)
        assert 0 < found["routing/changed_by_updates"] < 0.5 and 0 < found["engine_kl"] < 0.01
        assert found["engine_extreme"] < 0.01 < found["sampling_logp_difference"] * 100
        assert 1 < found["ratio/sequence_max"] < found["ratio/token_max"] < 100
        assert 8 < found["experts/effective_min"] < found["experts/effective"] <= 32
        assert 1 / 32 < found["experts/busiest"] < found["experts/busiest_max"] < 0.5


def numbers(folder):
    """The metrics as text, less what was measured of the machine: seconds and memory."""
    return [{name: text for name, text in row.items()
             if not name.startswith("time/") and name not in ("step_time", "peak_memory")}
            for row in read_metrics(folder)]


def check_resume(name, folder, again):
    """A run that goes on from step 1 equals the uninterrupted one to the last bit: metrics,
    weights, optimisers, counters; for PPO the critic's as well, and the end of its warm-up falls
    into the resumed part; for DAPO the questions that the first step used up beyond its share."""
    run = started(name, f"RESUME_FROM={folder / 'step_1'}", f"OUTPUT_DIR={again}", plot=False)
    assert re.search(r"^  steps +1 of 2 done", run.printed, re.M)
    assert {"step_2", "metrics.csv"} <= {p.name for p in again.iterdir()}
    for row, expected in zip(numbers(again), numbers(folder), strict=True):
        for column, text in expected.items():
            assert row[column] == text, f"step {row['step']}, {column}"
    for file in (folder / "step_2").glob("*.safetensors"):
        one, other = (load_file(path / "step_2" / file.name) for path in (folder, again))
        assert one.keys() == other.keys() and len(one) > 10
        for key, value in one.items():
            assert torch.equal(value, other[key]), f"{file.name}: {key}"
    for file in (folder / "step_2").glob("*.pt"):
        one, other = (torch.load(path / "step_2" / file.name, weights_only=True)
                      for path in (folder, again))
        assert one.keys() == other.keys() and len(one) > 10
        for key, state in one.items():
            assert all(torch.equal(value, other[key][name]) for name, value in state.items())
    one, other = ((path / "step_2" / "trainer_state.json").read_text() for path in (folder, again))
    assert one == other and json.loads(one)["step"] == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_run(name, tmp_path):
    """Two steps of each script, by what must hold for every run and for its own."""
    folder = tmp_path / "run"
    run = started(name, *in_words_of(name, SMALL), *OWN.get(name, []), f"OUTPUT_DIR={folder}")
    run.folder = folder
    rows = check_columns(name, run)
    check_what_it_says(name, run)
    check_files(name, run)
    own = globals().get(f"check_{name}")
    assert (own is None) == (name in ("gspo", "gad"))
    if own is not None:
        own(rows, folder)
    if name in ("dapo", "ppo", "self_play", "moe"):
        check_resume(name, folder, tmp_path / "again")
    if name == "ppo":  # a checkpoint whose critic is gone is refused, and not begun from nothing
        (folder / "step_1" / "critic.safetensors").unlink()
        with pytest.raises(SystemExit) as stop:
            started("ppo", f"RESUME_FROM={folder / 'step_1'}", f"OUTPUT_DIR={tmp_path / 'third'}")
        assert str(stop.value.code).startswith("error: RESUME_FROM=")
        assert "\n" not in stop.value.code and "critic.safetensors" in stop.value.code


def test_no_shared_metric_is_stale():
    """Each row of constants.md is a column that a script writes, or that its options add."""
    written = "\n".join(SOURCES.values())
    for column in explained(FOLDER / "constants.md") - {"rewards/model", "rewards/verifier",
                                                        "rewards/function"}:
        phase = column.startswith("time/") and f'lap("{column[5:]}")' in written
        assert phase or f'"{column}"' in written, column


def test_a_run_of_ppo_with_single_answers(tmp_path):
    """GROUP_SIZE=1, and no reference where there is no penalty: two networks, and no KL."""
    run = started("ppo", *SMALL, "MAX_STEPS=1", "GROUP_SIZE=1", "BATCH_SIZE=16", "KL_COEF=0.0",
                  "EVAL_QUESTIONS=1", "REWARD_WEIGHTS={'verifier': 1.0}", "CRITIC_WARMUP=0",
                  f"OUTPUT_DIR={tmp_path / 'run'}", plot=False)
    assert run.networks == 2
    row = read_metrics(tmp_path / "run")[1]
    assert "kl" not in row and row["reward_std"] == "0.0" and row["frac_reward_zero_std"] == "1.0"
    assert math.isfinite(float(row["value_loss"])) and math.isfinite(float(row["loss"]))
