"""One house: what gspo.py and the other scripts share is the same, byte for byte, the tool that
keeps it so works, and each of the scripts refuses, runs, writes and resumes as gspo.py does.
"""

import ast
import contextlib
import csv
import io
import math
import re
import shutil
import sys
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, import_file
from safetensors.torch import load_file

FOLDER = ROOT / "RL_HAND"
NAMES = ["gspo", "grpo", "dapo", "ppo", "gad", "self_play"]
SCRIPTS = {name: FOLDER / name / f"{name}.py" for name in NAMES}
OTHERS = NAMES[1:]
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in SCRIPTS.items()}
sys.path.append(str(ROOT / "tools"))  # tables.py imports sync.py
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
RATIOS = [name for name in NAMES if name != "self_play"]  # what has a ratio and clips it


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
            group = [name for line, name in groups if line < node.lineno][-1]
            found[node.targets[0].id] = (group, ast.unparse(node.value))
    return found


def embedded(source):
    """EMBEDDED as {name: value as source}."""
    node = next(node for node in ast.parse(source).body if isinstance(node, ast.Assign)
                and node.targets[0].id == "EMBEDDED")
    return {key.value: ast.unparse(value) for key, value in zip(node.value.keys, node.value.values)}


def test_the_tool_finds_nothing_to_repair(capsys):
    """In the scripts as they are; and it looks at all of them."""
    assert [path.stem for path in SYNC.scripts()] == sorted(OTHERS)
    assert not SYNC.main(["--check"]), capsys.readouterr().out
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("one, other", list(combinations(NAMES, 2)))
def test_the_same_name_is_the_same_function(one, other):
    """Of any two scripts, not only of each and the original; but for the list with its reasons."""
    ours = functions(SYNC.renamed(SOURCES[one], other))
    theirs = functions(SYNC.renamed(SOURCES[other], one))
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 80
    assert [name for name in shared if ours[name] != theirs[name] and name not in SYNC.OWN] == []


def test_no_exception_is_stale():
    """Each name on the tool's list differs somewhere, and says why; train is one of them."""
    for name, reason in SYNC.OWN.items():
        texts = {found[name] for found in FUNCTIONS.values() if name in found}
        assert len(texts) > 1, f"{name} is the same in all scripts"
        assert len(reason) > 10
    assert "train" in SYNC.OWN and len(SYNC.OWN) < 12


@pytest.mark.parametrize("name", OTHERS)
def test_what_stands_below_the_line_is_the_same(name):
    """And it is most of the file; so are the requirements at its head."""
    parts = {}
    for script, source in (("gspo", ORIGINALS[name]), (name, SOURCES[name])):
        assert source.count(SYNC.LINE) == 1
        parts[script] = (source[source.index(SYNC.LINE):], source[:source.index('"""')])
    assert parts[name] == parts["gspo"]
    assert len(parts[name][0]) > 0.6 * len(SOURCES[name])


@pytest.mark.parametrize("name", OTHERS)
def test_constants_outside_the_algorithm_are_the_same(name):
    """Names, order, values, groups; and the values for a machine without a GPU, but for those of
    Algorithm constants, which each belong to one."""
    def outside(source):
        return [(key, *value) for key, value in constants(source).items()
                if value[0] != "Algorithm" and key != "EMBEDDED"]

    ours, original = outside(SOURCES[name]), outside(SYNC.renamed(SOURCES["gspo"], name))
    values = SYNC.OWN_VALUES.get(name, set())  # names that self_play's source gives other values
    assert [row[:2] for row in ours] == [row[:2] for row in original]
    assert {key for key, _, value in set(ours) ^ set(original)} == values
    assert len(ours) > 40 and len(values) < 12
    own = {key for key, (group, _) in constants(SOURCES[name]).items() if group == "Algorithm"}
    assert {"CLIP_RANGE", f"{name.upper()}_EPOCHS"} <= own or \
        name == "self_play" and {"MARGIN", "TOTAL_EPOCHS"} <= own
    own |= values
    theirs = {key for key, (group, _) in constants(SOURCES["gspo"]).items() if group == "Algorithm"}
    theirs |= values
    ours, original = embedded(SOURCES[name]), embedded(SYNC.renamed(SOURCES["gspo"], name))
    assert {key: value for key, value in ours.items() if key not in own} == \
        {key: value for key, value in original.items() if key not in theirs}
    assert ours.keys() <= constants(SOURCES[name]).keys()


def test_headings_stand_in_one_order():
    """The shared headings are in every script, in the order of gspo.py."""
    def headings(source):
        return re.findall(r"^# ={4,} (.+?) =+$", source, re.M)

    original = headings(SOURCES["gspo"])
    assert len(original) > 8
    for name in OTHERS:
        instead = {"Advantages": "Preferences"} if name == "self_play" else {}
        expected = [instead.get(text, text) for text in original]
        assert [text for text in headings(SOURCES[name]) if text in expected] == expected


# ========================================= tools/sync.py =========================================

PLANTS = {  # what: (script, text of the script, what takes its place)
    "below the line": ("dapo", "return sum(values) / len(values)",
                       "return sum(values) / len(values )"),
    "in the comment of a class": ("ppo", "tokens sampled for training",
                                  "Tokens sampled for training"),
    "constant before Algorithm": ("grpo", "MAX_GRAD_NORM = 1.0", "MAX_GRAD_NORM = 2.0"),
    "comment of a constant": ("dapo", "0: only epoch_N/", "0: only epoch_N"),
    "constant after Algorithm": ("ppo", "EVAL_QUESTIONS = 256", "EVAL_QUESTIONS = 257"),
    "import": ("grpo", "import difflib\n", "import difflib \n"),
    "value without a GPU": ("dapo", '"GROUP_SIZE": 8,', '"GROUP_SIZE": 9,'),
    "shared function above the line": ("dapo", '"""CLIP_RANGE as (low, high)."""',
                                       '"""CLIP_RANGE as (low,high)."""'),
    "shared function of two scripts": ("grpo", "min(max(coefficient * factor, 0.01), 1.0)",
                                       "min(max(coefficient * factor, 0.02), 1.0)"),
    "under another name": ("self_play", "    groups = rewards.reshape(-1, ROLLOUT_N)\n    metrics",
                           "    groups = rewards.reshape(-1, GROUP_SIZE)\n    metrics"),
    "value beside one's own": ("self_play", '"EVAL_QUESTIONS": 512', '"EVAL_QUESTIONS": 128'),
}


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The scripts in a folder of their own, at which the tool looks."""
    for path in SCRIPTS.values():
        (tmp_path / "RL_HAND" / path.stem).mkdir(parents=True)
        shutil.copy(path, tmp_path / "RL_HAND" / path.stem)
    monkeypatch.setattr(SYNC, "ROOT", tmp_path)
    monkeypatch.setattr(SYNC, "ORIGINAL", tmp_path / "RL_HAND" / "gspo" / "gspo.py")
    return {name: tmp_path / "RL_HAND" / name / f"{name}.py" for name in NAMES}


@pytest.mark.parametrize("what", PLANTS)
def test_a_difference_is_named_and_repaired(copied, capsys, what):
    """One that is a byte or so. --check says in which file, shows it, names the command, and writes
    nothing; the command brings back every byte, and touches no other file."""
    name, text, instead = PLANTS[what]
    assert SOURCES[name].count(text) == 1, text
    planted = SOURCES[name].replace(text, instead)
    copied[name].write_text(planted, encoding="utf-8")
    assert SYNC.main(["--check"])
    printed = capsys.readouterr().out
    assert f"RL_HAND/{name}/{name}.py differs from gspo.py" in printed.replace("\\", "/")
    assert "python tools/sync.py" in printed
    line = next(line for line in planted.splitlines() if line not in SOURCES[name].splitlines())
    assert f"\n-{line}\n" in printed
    assert copied[name].read_text(encoding="utf-8") == planted
    assert SYNC.synchronised(planted, ORIGINALS[name]) == SOURCES[name]
    assert not SYNC.main([])
    assert f"{name}.py" in capsys.readouterr().out
    for script, path in copied.items():
        assert path.read_bytes() == SCRIPTS[script].read_bytes()


def test_what_is_an_algorithms_own_is_left_alone(copied, capsys):
    """Its Algorithm constants, also their values without a GPU, and the functions of the list."""
    source = SOURCES["ppo"]
    for text, instead in (("GAE_LAMBDA = 0.95", "GAE_LAMBDA = 0.9"),
                          ('"PPO_EPOCHS": 2', '"PPO_EPOCHS": 3'),
                          ("clock.lap(\"update\")", "clock.lap('update')")):
        assert source.count(text) == 1, text
        source = source.replace(text, instead)
    copied["ppo"].write_text(source, encoding="utf-8")
    assert not SYNC.main(["--check"]) and not SYNC.main([])
    assert capsys.readouterr().out == ""
    assert copied["ppo"].read_text(encoding="utf-8") == source


def test_a_scripts_own_values_of_shared_constants_are_left_alone(copied, capsys):
    """Those of the list, in both profiles; and that it has none without a GPU."""
    source = SOURCES["self_play"]
    for text, instead in (("ROLLOUT_N = 8  # c", "ROLLOUT_N = 6  # C"),
                          ('"SELF_PLAY_ROUNDS": 12', '"SELF_PLAY_ROUNDS": 13'),
                          ('    "EVAL_EVERY": 2,\n', '    "EVAL_EVERY": 3,\n')):
        assert source.count(text) == 1, text
        source = source.replace(text, instead)
    copied["self_play"].write_text(source, encoding="utf-8")
    assert not SYNC.main(["--check"]) and not SYNC.main([])
    assert capsys.readouterr().out == ""
    assert copied["self_play"].read_text(encoding="utf-8") == source


def test_a_change_of_the_original_goes_to_all(copied, capsys):
    """It is copied to each script, where it is then the same."""
    text = "def mean(values):"
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


def test_the_tables_of_the_readmes_are_fresh(capsys):
    assert not TABLES.main(["--check"]), capsys.readouterr().out
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_stale_table_is_found_and_made_anew(name):
    """A constant's value and, where there is one, a line of the diff to another script."""
    text = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    assert TABLES.refreshed(text, SOURCES[name], name) == text
    row = next(line for line in text.splitlines()
               if line.startswith(("| `CLIP_RANGE` |", "| `MARGIN` |")))
    changed = [text.replace(row, row.replace("0.", "7."))]
    if name != "gspo":
        assert "<!-- diff " in text
    if "<!-- diff " in text:
        line = next(line for line in text.splitlines() if line.startswith("+"))
        changed.append(text.replace(f"{line}\n", "", 1))
    for stale in changed:
        assert stale != text
        assert TABLES.refreshed(stale, SOURCES[name], name) == text


@pytest.mark.parametrize("name", OTHERS)
def test_own_metrics_are_explained(name):
    """Each has its row in the README beside the script, or in that of gspo.py if it means the same
    there (PPO's KL does not). The panels of the plot draw what exists."""
    module, rows = fresh(name), {}
    for folder in ("gspo", name):
        text = (FOLDER / folder / "README.md").read_text(encoding="utf-8")
        rows[folder] = dict(re.findall(r"^\| `([^`]+)` \| (.+?) \|$", text, re.M))
    same = {"policy_loss", "entropy_loss"}
    same |= {"kl", "kl_loss", "kl_coef"} if name == "grpo" else set()
    for metric in module.algorithm_metrics():
        explained = rows[name].get(metric) or rows["gspo" if metric in same else name].get(metric)
        assert explained and len(explained) > 3, metric
    names = module.metric_names()
    assert len(set(names)) == len(names)
    drawn = {metric for _, curves in module.algorithm_panels() for metric in curves}
    assert drawn & set(module.algorithm_metrics()) and drawn <= set(names)


# ======================================== The command line =======================================


@pytest.mark.parametrize("name", OTHERS)
def test_help(name, capsys):
    """The docstring, and each constant with its comment."""
    module = fresh(name)
    module.main(["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(module.__doc__)
    assert f"python RL_HAND/{name}/{name}.py --help" in printed
    for constant in module.constants():
        assert re.search(rf"^{constant} = .*\S  # \S", printed, re.M), constant
    assert "\nEMBEDDED = {" in printed and "def train" not in printed


SHARED_REFUSALS = [("CLIP_RANGE=(0.2, 0.2, 0.2)", ["CLIP_RANGE", "pair"]),
                   ("CLIP_RANGE=-0.2", ["CLIP_RANGE", "positive"]),
                   ("CLIP_RANGE=(1.5, 0.2)", ["CLIP_RANGE", "low <= 1"]),
                   ("ENTROPY_COEF=-1.0", ["ENTROPY_COEF=-1.0", "0 or more"]),
                   ("GSPO_EPOCHS=2", ["GSPO_EPOCHS", "NAME=VALUE"]),
                   ("MINIBATCH=7", ["MINIBATCH=7", "divisor"])]
GROUPS = [("ADVANTAGE_TYPE=mean", ["ADVANTAGE_TYPE=mean", "relative or normalized"]),
          ("GROUP_SIZE=1", ["GROUP_SIZE=1", "2 or more"]),
          ("ADVANTAGE_EPSILON=-1.0", ["ADVANTAGE_EPSILON", "0 or more"]),
          ("STD_CORRECTION=-1", ["STD_CORRECTION", "0 or more"])]
REFUSALS = {
    "grpo": [*SHARED_REFUSALS, *GROUPS, ("GRPO_EPOCHS=0", ["GRPO_EPOCHS=0", "1 or more"]),
             ("AGGREGATION=mean", ["AGGREGATION=mean", "seq-mean-token-mean, token-mean or dr-"]),
             ("KL_COEF=-0.1", ["KL_COEF=-0.1", "0 or more"]),
             ("TARGET_KL=-0.1", ["TARGET_KL=-0.1", "0 or more"]),
             ("USE_TOKEN_LEVEL_LOSS=True", ["USE_TOKEN_LEVEL_LOSS", "NAME=VALUE"])],
    "dapo": [*SHARED_REFUSALS, *GROUPS, ("DAPO_EPOCHS=0", ["DAPO_EPOCHS=0", "1 or more"]),
             ("SPREAD_OF=length", ["SPREAD_OF=length", "accuracy or reward"]),
             ("OVERLONG_CACHE=61", ["OVERLONG_CACHE=61", "0 to MAX_NEW_TOKENS = 60"]),
             ("OVERLONG_CACHE=-1", ["OVERLONG_CACHE=-1", "MAX_NEW_TOKENS"]),
             ("MAX_SAMPLING_ROUNDS=0", ["MAX_SAMPLING_ROUNDS=0", "1 or more"]),
             ("SPREAD_THRESHOLD=-0.1", ["SPREAD_THRESHOLD", "0 or more"]),
             ("OVERLONG_PENALTY=-1.0", ["OVERLONG_PENALTY", "0 or more"]),
             ("KL_COEF=0.1", ["KL_COEF", "NAME=VALUE"]),
             ("DYNAMIC_SAMPLING=2", ["DYNAMIC_SAMPLING", "expected bool"])],
    "ppo": [*SHARED_REFUSALS, ("PPO_EPOCHS=0", ["PPO_EPOCHS=0", "1 or more"]),
            ("GAMMA=1.5", ["GAMMA=1.5", "from 0 to 1"]),
            ("GAE_LAMBDA=-0.1", ["GAE_LAMBDA=-0.1", "from 0 to 1"]),
            ("CRITIC_WARMUP=-1", ["CRITIC_WARMUP=-1", "0 or more"]),
            ("CRITIC_LEARNING_RATE=-1.0", ["CRITIC_LEARNING_RATE", "0 or more"]),
            ("VALUE_CLIP=-0.2", ["VALUE_CLIP=-0.2", "0 or more"]),
            ("NO_END_PENALTY=-1.0", ["NO_END_PENALTY", "0 or more"]),
            ("TARGET_APPROX_KL=-1.0", ["TARGET_APPROX_KL", "0 or more"]),
            ("KL_COEF=-0.1", ["KL_COEF=-0.1", "0 or more"]),
            ("ADVANTAGE_TYPE=relative", ["ADVANTAGE_TYPE", "NAME=VALUE"])],
    "self_play": [("PREFERENCE_LOSS=simpo", ["PREFERENCE_LOSS=simpo", "dpo, reference_free or"]),
                  ("PREFERENCE_BETA=0.0", ["PREFERENCE_BETA=0.0", "more than 0"]),
                  ("MARGIN=-0.1", ["MARGIN=-0.1", "0 or more"]),
                  ("ROLLOUT_N=1", ["ROLLOUT_N=1", "2 or more"]),
                  ("ROLLOUT_N=6", ["MINIBATCH=128", "multiple of ROLLOUT_N = 6"]),
                  ("MICRO_BATCH=12", ["MICRO_BATCH=12", "multiple of ROLLOUT_N = 8"]),
                  ("MINIBATCH=96", ["MINIBATCH=96", "TRAIN_BATCH_SIZE x ROLLOUT_N", "divisor"]),
                  ("TOTAL_EPOCHS=0", ["TOTAL_EPOCHS=0", "1 or more"]),
                  ("SELF_PLAY_ROUNDS=0", ["SELF_PLAY_ROUNDS=0", "1 or more"]),
                  ("SAMPLE_AT_ONCE=0", ["SAMPLE_AT_ONCE=0", "1 or more"]),
                  ("WATCH_QUESTIONS=-1", ["WATCH_QUESTIONS=-1", "0 or more"]),
                  ("USE_SEQUENCE_LEVEL_REWARD=False", ["USE_SEQUENCE_LEVEL_REWARD", "True"]),
                  ("REWARD_FUNC=nowhere.py", ["REWARD_FUNC=nowhere.py", "no such file"]),
                  ("REWARD_FUNC=", ["REWARD_FUNC=''", "a file and a weight"]),
                  ("REWARD_WEIGHTS={'verifier': 1.0}", ["REWARD_FUNC", "or neither"]),
                  ("GROUP_SIZE=4", ["GROUP_SIZE", "NAME=VALUE"]),
                  ("CLIP_RANGE=0.2", ["CLIP_RANGE", "NAME=VALUE"])],
    "gad": [*SHARED_REFUSALS, *GROUPS[1:], ("GAD_EPOCHS=0", ["GAD_EPOCHS=0", "1 or more"]),
            ("KL_COEF=-0.1", ["KL_COEF=-0.1", "0 or more"]),
            ("ADVANTAGE_TYPE=relative", ["ADVANTAGE_TYPE", "NAME=VALUE"])],
}


@pytest.mark.parametrize("name", OTHERS)
def test_constants_that_cannot_work(name, tmp_path, capsys):
    """One line that names the constant and what is expected; nothing is loaded or written."""
    module = fresh(name)
    module.load_pretrained = None  # calling it would be a TypeError
    as_in_the_file = module.constants()
    for argument, says in REFUSALS[name]:
        vars(module).update(as_in_the_file)
        with pytest.raises(SystemExit) as stop:
            module.main(["PROFILE=embedded", "DEVICE=cpu", f"OUTPUT_DIR={tmp_path / 'run'}",
                         argument])
        line = stop.value.code  # the interpreter prints a text and exits with status 1
        assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line
        for words in says:
            assert words in line, f"{words!r} is not in {line!r}"
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", RATIOS)
def test_the_clip_range_is_a_number_or_a_pair(name):
    """Whichever of the two the script ships with."""
    module = fresh(name)
    for text, expected in (("0.3", (0.3, 0.3)), ("(0.1, 0.3)", (0.1, 0.3)),
                           ("[0.1, 0.3]", (0.1, 0.3))):
        module.configure(["PROFILE=embedded", "DEVICE=cpu", f"CLIP_RANGE={text}"])
        assert module.clip_range() == expected


def test_ppo_needs_no_groups():
    """What the others refuse: one answer for each question."""
    ppo = fresh("ppo")
    ppo.configure(["PROFILE=embedded", "DEVICE=cpu", "GROUP_SIZE=1", "MINIBATCH=16"])
    assert (ppo.GROUP_SIZE, ppo.BATCH_SIZE) == (1, 16)


# ============================================= Runs =============================================

SMALL = ["PROFILE=embedded", "DEVICE=cpu", "MAX_STEPS=2", "EVAL_QUESTIONS=8", "EVAL_EVERY=0",
         "BATCH_SIZE=4", "MINIBATCH=16", "SAVE_EVERY=1", "SHOW_SAMPLES=1"]
OWN = {"grpo": [], "dapo": [], "ppo": ["CRITIC_WARMUP=1"], "self_play": ["WATCH_QUESTIONS=4"],
       "gad": ["SEQKD_STEPS=0", "CRITIC_WARMUP=0", "ENTROPY_COEF=0.01"]}  # its stages: test_gad.py
NETWORKS = {"grpo": 2, "dapo": 1, "ppo": 3, "self_play": 2,  # policy; reference; critic
            "gad": 3}  # policy, reference, discriminator


def started(name, *arguments, plot=True):
    """A run in this process: what it printed, and how many causal models it loaded."""
    module, counted = fresh(name), []
    load = module.load_pretrained

    def load_pretrained(kind, *given, **options):
        counted.append(kind.__name__)
        return load(kind, *given, **options)

    module.load_pretrained = load_pretrained
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


RUNS = {}  # by script; each is made once


@pytest.fixture
def ran(tmp_path_factory):
    """ran(name): a run of two steps of the script, made once; its folder is `.folder`."""
    def of(name):
        if name not in RUNS:
            folder = tmp_path_factory.mktemp(name) / "run"
            RUNS[name] = started(name, *in_words_of(name, SMALL), *OWN[name],
                                 f"OUTPUT_DIR={folder}")
            RUNS[name].folder = folder
        return RUNS[name]
    return of


@pytest.mark.parametrize("name", OTHERS)
def test_metrics_of_a_run(ran, name):
    """The script's columns, its own ones filled at every step with finite numbers."""
    run = ran(name)
    rows = read_metrics(run.folder)
    assert list(rows[0]) == run.module.metric_names()
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    own = [column for column in run.module.algorithm_metrics()
           if column != "seqkd_loss"]  # of a stage that is left out here
    for row in rows[1:]:
        assert all(math.isfinite(float(row[column])) for column in own)
        assert 0 <= float(row["accuracy"]) <= 1 and float(row["num_tokens"]) > 100
        assert float(row["entropy"]) > 0 and float(row["grad_norm"]) > 0
        assert math.isfinite(float(row["loss"])) and float(row["time/update"]) > 0
    assert not any(rows[0][column] for column in own)
    assert all(0 <= float(rows[step]["eval/accuracy"]) <= 1 for step in (0, 2))
    assert {"accuracy", "rewards/model", "rewards/verifier"} <= set(rows[0])
    if name in ("grpo", "dapo"):  # PPO's policy is held in the first step; self-play has no ratio
        assert float(rows[1]["ratio/min"]) < 1 < float(rows[1]["ratio/max"])


def test_columns_of_dapo(ran):
    """Rounds, questions and groups agree with one another; there is no KL."""
    rows = read_metrics(ran("dapo").folder)
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


def test_columns_of_self_play(ran):
    """The first round is played by the starting policy: no KL, and no gain on the watched pairs;
    the second by what it left."""
    rows = read_metrics(ran("self_play").folder)
    first, second = ({name: float(text) for name, text in row.items() if text} for row in rows[1:])
    assert first["kl_divergence"] == pytest.approx(0, abs=1e-4) and second["kl_divergence"] != 0
    assert first["watched/implicit_accuracy"] == 0.5 != second["watched/implicit_accuracy"]
    assert first["watched/chosen_logp"] != second["watched/chosen_logp"] < 0
    for row in (first, second):
        assert 0 < row["reward_mean"] == row["reward"] == pytest.approx(row["rewards/function"])
        assert row["reward_mean"] <= row["reward_max"] <= 1
        assert 0 < row["useful_prompts"] <= 1 and 0 < row["pairs_per_prompt"] <= 28
        assert 0 <= row["preference_accuracy"] <= 1 and row["watched/rejected_logp"] < 0
        assert row["loss"] == row["preference_loss"] > 0 and row["ranking_loss"] > 0
        assert "kl" not in row and "advantage/mean" not in row and "ratio/min" not in row


def test_columns_of_grpo(ran):
    """The KL to the start: 0 before the first update, and its fixed weight."""
    rows = read_metrics(ran("grpo").folder)
    assert {row["kl_coef"] for row in rows[1:]} == {"0.04"}
    assert 0 <= abs(float(rows[1]["kl"])) < float(rows[2]["kl"]) < 1


def test_columns_of_ppo(ran):
    """The critic foretells nothing at first, so that it explains nothing; then something. The
    policy, held in the first step, has moved in neither of the two ways to measure it."""
    rows = read_metrics(ran("ppo").folder)
    first, second = rows[1:]
    assert float(first["value_mean"]) == 0.0 and float(first["explained_variance"]) == 0.0
    assert float(second["value_mean"]) != 0.0 and float(second["explained_variance"]) != 0.0
    assert float(first["explained_variance"]) < 1 and float(second["explained_variance"]) < 1
    assert abs(float(first["kl"])) < 1e-4 and abs(float(first["approx_kl"])) < 1e-6
    assert float(second["approx_kl"]) > 1e-8
    assert float(first["learning_rate"]) == 0.0 and float(second["learning_rate"]) == 1e-4
    for row in (first, second):
        assert float(row["value_loss"]) > 0 and float(row["critic_grad_norm"]) > 0
        assert 0 <= float(row["value_clip_ratio"]) <= 1
        assert float(row["advantage/std"]) > 0


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_a_run(ran, name):
    """What gspo.py leaves, and the critic's weights where there is a critic."""
    folder = ran(name).folder
    assert {p.name for p in folder.iterdir()} == {"epoch_0", "step_1", "step_2", "metrics.csv",
                                                  "training_metrics.png"} ^ (
        {"step_2", "adversarial"} if name == "gad" else set())  # its last stage's checkpoint
    assert (folder / "training_metrics.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    last = folder / ("adversarial" if name == "gad" else "step_2")
    for checkpoint in (folder / "step_1", last):
        assert (checkpoint / "train_script.py").read_bytes() == SCRIPTS[name].read_bytes()
        assert (checkpoint / "critic.safetensors").exists() == (name == "ppo")
        copied = checkpoint / "reward_function.py"
        assert copied.exists() == (name == "self_play")
        if copied.exists():
            assert copied.read_bytes() == (SCRIPTS[name].parent / "reward_func.py").read_bytes()
        state = load_file(checkpoint / "trainer_state.safetensors")
        parts = {key.split(".")[0] for key in state if "." in key}
        held = name == "ppo" and checkpoint.name == "step_1"
        assert parts == ({"critic"} if held else {"policy", "critic"} if name == "ppo" else
                         {"policy", "discriminator"} if name == "gad" else {"policy"})
    start, one, two = (load_file(path / "model.safetensors") for path in
                       (ROOT / "data" / "policy", folder / "step_1", last))
    assert start.keys() == one.keys() == two.keys()
    held = all(torch.equal(start[key], one[key]) for key in start)
    assert held == (name == "ppo")  # CRITIC_WARMUP=1: not a bit of it has moved
    assert any(not torch.equal(one[key], two[key]) for key in one)


def test_the_critic_that_is_saved(ran):
    """Its whole network and a head, no longer as it started: it learned while the policy waited."""
    folder = ran("ppo").folder
    one, two = (load_file(folder / step / "critic.safetensors") for step in ("step_1", "step_2"))
    start = load_file(ROOT / "data" / "policy" / "model.safetensors")
    assert one.keys() == two.keys() >= {"head.weight", "head.bias"}
    body = {key.replace("base_model.", "model."): value for key, value in one.items()
            if key.startswith("base_model.")}
    assert len(body) == len(one) - 2 and body.keys() <= start.keys()
    assert one["head.weight"].norm() > 0
    assert any(not torch.equal(body[key], start[key]) for key in body)
    assert any(not torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", OTHERS)
def test_networks_in_memory(ran, name):
    """DAPO loads the policy and nothing beside it; GRPO the reference; PPO that and the critic. The
    start-up block says whether there is a reference."""
    run = ran(name)
    assert run.networks == NETWORKS[name]
    assert run.printed.startswith(f"{name}\n")
    assert ("and a frozen copy as the reference" in run.printed) == (name != "dapo")
    epochs = run.module.constants()["TOTAL_EPOCHS" if name == "self_play" else
                                    f"{name.upper()}_EPOCHS"]
    assert f"{epochs} passes = {epochs * 2} updates per rollout" in run.printed
    algorithm = re.search(r"^  algorithm +(.+)$", run.printed, re.M)[1]
    assert {"grpo": "normalized advantages; KL 0.04", "dapo": "8 samplings at most; no KL",
            "ppo": "GAE 1.0, 0.95; critic: ",
            "self_play": "dpo loss, beta 0.5, pairs more than 0.1",
            "gad": "discriminator: policy, mean"}[name] in algorithm


def numbers(folder):
    """The metrics as text, less what was measured of the machine: seconds and memory."""
    return [{name: text for name, text in row.items()
             if not name.startswith("time/") and name not in ("step_time", "peak_memory")}
            for row in read_metrics(folder)]


@pytest.mark.parametrize("name", ["dapo", "ppo", "self_play"])
def test_resumed_run_equals_the_uninterrupted_one(ran, name, tmp_path):
    """To the last bit: metrics, weights, optimisers, counters; for PPO the critic's as well, and
    the end of its warm-up falls into the resumed part; for DAPO the questions that the first step
    used up beyond its share."""
    folder, again = ran(name).folder, tmp_path / "again"
    run = started(name, f"RESUME_FROM={folder / 'step_1'}", f"OUTPUT_DIR={again}", plot=False)
    assert ", at step 1" in run.printed
    assert {p.name for p in again.iterdir()} == {"step_2", "metrics.csv"}
    for row, expected in zip(numbers(again), numbers(folder), strict=True):
        for column, text in expected.items():
            assert row[column] == text, f"step {row['step']}, {column}"
    files = ["model.safetensors", "trainer_state.safetensors"]
    for file in files + ["critic.safetensors"] * (name == "ppo"):
        one, other = (load_file(path / "step_2" / file) for path in (folder, again))
        assert one.keys() == other.keys() and len(one) > 10
        for key, value in one.items():
            assert torch.equal(value, other[key]), f"{file}: {key}"
    one, other = ((path / "step_2" / "trainer_state.json").read_text() for path in (folder, again))
    assert one == other


def test_ppo_without_its_critic_is_refused(ran, tmp_path):
    """A checkpoint whose critic is gone: one line, and not a critic that starts from nothing."""
    shutil.copytree(ran("ppo").folder / "step_1", tmp_path / "step_1")
    (tmp_path / "step_1" / "critic.safetensors").unlink()
    with pytest.raises(SystemExit) as stop:
        started("ppo", f"RESUME_FROM={tmp_path / 'step_1'}", f"OUTPUT_DIR={tmp_path / 'again'}")
    assert str(stop.value.code).startswith("error: RESUME_FROM=")
    assert "\n" not in stop.value.code and "critic.safetensors" in stop.value.code


def test_a_run_of_ppo_with_single_answers(tmp_path):
    """GROUP_SIZE=1, and no reference where there is no penalty: two networks, and no KL."""
    run = started("ppo", *SMALL, "MAX_STEPS=1", "GROUP_SIZE=1", "BATCH_SIZE=16", "KL_COEF=0.0",
                  "EVAL_QUESTIONS=1", "REWARD_WEIGHTS={'verifier': 1.0}",
                  f"OUTPUT_DIR={tmp_path / 'run'}", plot=False)
    assert run.networks == 2
    row = read_metrics(tmp_path / "run")[1]
    assert row["kl"] == "" and row["reward_std"] == "0.0" and row["frac_reward_zero_std"] == "1.0"
    assert math.isfinite(float(row["value_loss"])) and math.isfinite(float(row["loss"]))
