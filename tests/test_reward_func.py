"""reward_func.py: how answers are found and compared, that hostile text costs little time; and
train.sh, which starts self_play.py."""

import ast
import os
import stat
import subprocess
import sys
import time
from fractions import Fraction
from types import SimpleNamespace

import pytest
from conftest import ROOT, import_file

FOLDER = ROOT / "RL_HAND" / "self_play"


@pytest.fixture
def reward():
    """reward_func.py, imported anew, as if math-verify were not installed."""
    module = import_file(FOLDER / "reward_func.py", "reward_func_under_test")
    module.math_verify = lambda: None
    return module


# ============================================ Scores ============================================


@pytest.mark.parametrize("text, truth, score", [
    # named answers
    ("7+8=15 carry 1. 3+4+1=8. Answer: 85", "7+8=15 carry 1. 3+4+1=8. Answer: 85", 1.0),
    ("Answer: 85", "85", 1.0), ("the ANSWER is 85.", "85", 1.0), ("answer = 85", "85", 1.0),
    ("#### 85", "Some work.\n#### 85", 1.0), (r"so \boxed{85}", "85", 1.0),
    (r"The answer is $\boxed{85}$.", "85", 1.0), ("Final answer: **85**", "85", 1.0),
    ("Answer:\n85", "85", 1.0), ("Answer: 7\nNo. Answer: 85", "85", 1.0),
    (r"Answer: 7, no: \boxed{85}", "85", 1.0), ("Answer: 3 + 82 = 85", "85", 1.0),
    ("Answer: 85. Check: 85 - 3 = 82", "85", 1.0), ("Answer: x = 85", "85", 1.0),
    (r"\boxed{85", "85", 1.0),  # cut off
    # the last number, where no answer is named
    ("it is 85.", "85", 1.0), ("12-85", "85", 1.0), ("3 or 85", "85", 1.0), ("85 or 3", "85", 0.0),
    # partly right: one digit, or the sign
    ("Answer: 86", "85", 0.5), ("Answer: 95", "85", 0.5), ("Answer: 1528", "1538", 0.5),
    ("Answer: -85", "85", 0.5), ("Answer: 12.5", "12.6", 0.5), ("Answer: 1,234", "1235", 0.5),
    ("it is 86", "85", 0.5),
    # wrong: a single digit is all of the number; two digits; another length
    ("Answer: 7", "8", 0.1), ("Answer: 96", "85", 0.1), ("Answer: 850", "85", 0.1),
    ("Answer: -86", "85", 0.1), ("Answer: none", "85", 0.1), ("#### 3", "85", 0.1),
    ("Answer: 1/0", "85", 0.1),
    # neither right nor an answer
    ("it is 7", "85", 0.0), ("no idea", "85", 0.0), ("", "85", 0.0), ("Answer:", "85", 0.0),
    (r"\boxed{}", "85", 0.0), ("Answer: .", "85", 0.0),
])
def test_scores(reward, text, truth, score):
    assert reward.compute_score("any", text, truth) == score
    assert reward.compute_score("other", text, truth, extra_info={"question": "?"}) == score


@pytest.mark.parametrize("text, truth", [
    ("1,234,567.50", "1234567.5"), (r"1{,}000", "1000"), ("$1,000", "1000"), (r"\$1{,}000", "1000"),
    ("007", "7"), (".5", "1/2"), ("0.50", "1/2"), ("+5", "5"), ("-0", "0"), ("5.", "5"),
    ("\N{MINUS SIGN}5", "-5"), ("- 5", "-5"), ("-1/2", "-0.5"), ("2/4", "1/2"), ("3 1/2", "3.5"),
    (r"\frac{1}{2}", "0.5"), (r"\dfrac{1}{2}", "0.5"), (r"-\tfrac{1}{2}", "-0.5"),
    (r"\frac12", "0.5"), (r"3\frac{1}{2}", "7/2"), (r"\frac{1{,}000}{4}", "250"),
    ("50%", "0.5"), (r"50\%", "50"), ("50", "50%"), ("0.5", "50%"), ("50%", "50%"),
    ("1.5e3", "1500"), (r"1.5\times 10^{3}", "1500"), ("2 x 10^-2", "0.02"),
    ("42 apples", "42"), (r"42\text{ cm}", "42"), (r"42^\circ", "42"), ("42", "42 apples"),
    ("(42)", "42"), ("{42}", "42"), (r"\left(42\right)", "42"), ("x = 42", "42"),
    ("B", "b"), ("(B)", "B"), (r"\text{B}", "B"), ("x^{2} + 1", "x^{2}+1"),
    (r"\sqrt{2}", r"\sqrt{2}"), ("{1, 2}", "{1,2}"),
])
def test_equal_answers(reward, text, truth):
    for form in (r"\boxed{%s}", "Answer: %s", "#### %s"):
        assert reward.compute_score("", form % text, truth) == 1.0, form


@pytest.mark.parametrize("text, truth", [
    ("50%", "51"), ("50%", "5"), ("1/3", "0.33"), ("0.5", "5"), ("1/2", "1/3"), ("2", "2%1"),
    ("x+1", "x+2"), ("A", "B"), ("1e3", "100"), ("1 1/2", "1/2"), ("5", "x+5"), ("42", "forty"),
    ("10^3", "10"), ("1,00", "100"),
])
def test_other_answers(reward, text, truth):
    assert reward.compute_score("", f"Answer: {text}", truth) < 1.0


def test_numbers(reward):
    assert reward.quantity("3 1/2") == (Fraction(7, 2), "", False)
    assert reward.quantity("1,200.50%") == (Fraction(2401, 2), "1200.5", True)
    assert reward.quantity("-3") == (Fraction(-3), "3", False)
    for text in ("", "-", ".", "%", "x", "x+1", "1+1", "1..2", "--5", "1/0", "1 2",
                 "\N{VULGAR FRACTION ONE HALF}", "9" * 401, "1e9999"):
        assert reward.quantity(text) is None, text


def test_a_number_as_ground_truth(reward):
    """JSON data may hold numbers instead of texts."""
    assert reward.compute_score("", "Answer: 85", 85) == 1.0
    assert reward.compute_score("", "Answer: 0.5", 0.5) == 1.0


def test_a_reference_in_prose(reward):
    """A worked solution without a mark: its last number. Nothing to compare with: no score."""
    assert reward.compute_score("", "85", "He has 12 and 73, so he has 85.") == 1.0
    assert reward.compute_score("", "12", "He has 12 and 73, so he has 85.") == 0.0
    for empty in ("", "  ", "Answer:"):
        assert reward.compute_score("", "Answer: 5", empty) == 0.0


def test_ranks(reward):
    texts = ["no", "Answer: 85", "Answer: 3", "so 85", "Answer: 86"]
    assert reward.rank_responses(texts, "85", "") == [(1, 1.0), (3, 1.0), (4, 0.5), (2, 0.1),
                                                      (0, 0.0)]
    assert reward.rank_responses([], "85", "") == []


def test_pairs(reward):
    """Each with its difference, the best first; none of equals, or of the margin itself."""
    texts = ["no", "Answer: 85", "Answer: 3"]
    assert reward.get_preference_pairs(texts, "85", "") == [
        ("Answer: 85", "Answer: 3", 0.9), ("Answer: 85", "no", 1.0)]
    assert reward.get_preference_pairs(texts, "85", "", margin=0.05)[2] == ("Answer: 3", "no", 0.1)
    assert reward.get_preference_pairs(texts, "85", "", margin=1.0) == []
    assert reward.get_preference_pairs(["Answer: 1"] * 4, "85", "") == []
    assert reward.get_preference_pairs(["Answer: 85"], "85", "") == []


BOMBS = {
    "digits": "9" * 100_000, "a named number": "Answer: " + "9" * 100_000,
    "braces": r"\boxed{" + "{" * 100_000, "closing braces": r"\boxed{1" + "}" * 100_000,
    "boxes": r"\boxed{" * 20_000, "fractions": r"\frac{" * 20_000, "commas": "1," * 50_000 + "2",
    "thousands": "1" + ",000" * 30_000, "marks": "answer " * 20_000,
    "answers": "answer is " * 9_999, "spaces": "answer" + " " * 100_000,
    "minuses": "-" * 100_000, "points": "1." * 50_000,
    "slashes": "1/" * 50_000, "texts": r"\text{" * 20_000, "exponents": "1e" * 50_000,
    "a tower": "Answer: 9^{9^{9^{9}}}", "a python tower": "Answer: 9**9**9**9",
    "a huge exponent": "Answer: 1e999999999", "mixed": "1 1/" * 30_000, "letters": "a" * 100_000,
    "words": "ab " * 40_000, "parentheses": "Answer: " + "(" * 50_000 + "5" + ")" * 50_000,
    "powers": "x 10^" * 20_000, "dots": "." * 100_000, "lines": "\n" * 100_000,
    "blanks": " " * 100_000, "subtractions": "5-" * 50_000, "code": "Answer: __import__('os').x",
    "a factorial": "Answer: 99999!", "nul": "Answer: \0", "a surrogate": "Answer: \ud800",
    "other digits": "Answer: \N{ARABIC-INDIC DIGIT FIVE}",
    "a long fraction": "Answer: " + "7" * 399 + "/3"}


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_text_costs_little_time(reward, name):
    """As an answer, as a reference, and as both; each in a fraction of a second."""
    for pair in ((BOMBS[name], "85"), ("Answer: 85", BOMBS[name]), (BOMBS[name], BOMBS[name])):
        start = time.process_time()  # its own: another program's does not count
        assert reward.compute_score("", *pair) in (0.0, 0.1, 0.5, 1.0)
        assert time.process_time() - start < 0.5


def test_nothing_is_evaluated():
    source = (FOLDER / "reward_func.py").read_text(encoding="utf-8")
    called = {node.func.id for node in ast.walk(ast.parse(source))
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "compile", "__import__", "globals", "getattr"}
    top = {alias.name for node in ast.parse(source).body
           if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert top == {"re", "Fraction", "cache"}  # nothing to install


# ========================================= math-verify ==========================================


def stand_in(seen):
    """A math-verify that finds everything equal to everything, and notes what it was given."""
    return lambda: SimpleNamespace(parse=lambda text: seen.append(text) or [text],
                                   verify=lambda wanted, given: True)


def test_formulas_go_to_math_verify_if_it_is_there(reward):
    seen = []
    assert reward.compute_score("", r"\boxed{1+x}", "x+1") == 0.1
    reward.math_verify = stand_in(seen)
    assert reward.compute_score("", r"\boxed{1+x}", "x+1") == 1.0
    assert seen == ["$x+1$", "$1+x$"]
    assert reward.compute_score("", "Answer: 7", "85") == 0.1  # two plain numbers do not


@pytest.mark.parametrize("answer", ["9^{9^{9}}", "9^{999}", "9^99^99", "x^2x^2x^2", "9**9", "99!",
                                    r"\sum_{k}k", "1234567x", "x" * 201, r"\binom{9}{4}",
                                    "2^{-100}"])
def test_what_may_explode_is_not_given_to_math_verify(reward, answer):
    seen = []
    reward.math_verify = stand_in(seen)
    assert reward.compute_score("", rf"\boxed{{{answer}}}", "x+1") == 0.1
    assert reward.compute_score("", r"\boxed{x+1}", answer) < 1.0
    assert seen == []


def test_what_math_verify_cannot_read_is_not_equal(reward):
    def parse(text):
        raise RuntimeError(text)

    reward.math_verify = lambda: SimpleNamespace(parse=parse)
    assert reward.compute_score("", r"\boxed{1+x}", "x+1") == 0.1


def test_the_real_math_verify():
    pytest.importorskip("math_verify")
    module = import_file(FOLDER / "reward_func.py", "reward_func_with_math_verify")
    assert module.compute_score("", r"\boxed{1+x}", "x+1") == 1.0
    assert module.compute_score("", r"\boxed{\frac{\sqrt{8}}{2}}", r"\sqrt{2}") == 1.0
    assert module.compute_score("", r"\boxed{x+2}", "x+1") == 0.1


# =========================================== train.sh ===========================================


@pytest.fixture
def shell(tmp_path):
    """shell(*arguments): train.sh in a project without .venv, with a python3 that only says what it
    is asked to run, from a folder of its own with a space in its name."""
    if sys.platform == "win32":
        pytest.skip("needs bash")
    project, here = tmp_path / "a project" / "RL_HAND" / "self_play", tmp_path / "somewhere else"
    project.mkdir(parents=True)
    here.mkdir()
    (project / "train.sh").write_bytes((FOLDER / "train.sh").read_bytes())
    (here / "my reward.py").touch()

    def python(folder, name):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('#!/bin/sh\necho "GPU=${CUDA_VISIBLE_DEVICES-unset}"\n'
                                   f'echo {name}\nfor a in "$@"; do echo "$a"; done\nexit 3\n')
        (folder / name).chmod(0o755)

    python(tmp_path / "bin", "python3")

    def run(*arguments, venv=False):
        if venv:
            python(tmp_path / "a project" / ".venv" / "bin", "python")
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(["bash", str(project / "train.sh"), *arguments], cwd=here, text=True,
                              capture_output=True, timeout=60, env=os.environ | {"PATH": path})
        lines = [line.replace(str(project), "HERE") for line in done.stdout.splitlines()]
        return SimpleNamespace(status=done.returncode, lines=lines, error=done.stderr)

    return run


def test_the_flags_become_constants(shell, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    done = shell("--model", "a b", "--rollout_n", "10", "--self_play_rounds=5", "--reward_func",
                 "my reward.py", "--n_gpus", "8", "SEED=1", "REWARD_WEIGHTS={'function': 2.0}")
    assert done.lines == [
        "GPU=unset", "python3", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
        "8", "HERE/self_play.py", "POLICY_MODEL=a b", "ROLLOUT_N=10", "MINIBATCH=160",
        "MICRO_BATCH=10", "SELF_PLAY_ROUNDS=5", "REWARD_FUNC=my reward.py", "SEED=1",
        "REWARD_WEIGHTS={'function': 2.0}"]
    assert (done.status, done.error) == (3, "")  # python's


@pytest.mark.parametrize("gpus, seen", [(None, "GPU=unset"), ("1", "GPU=unset"), ("0", "GPU=")])
def test_one_process(shell, monkeypatch, gpus, seen):
    """--n_gpus 0 hides a GPU that is there."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    done = shell(*(["--n_gpus", gpus] if gpus else []))
    assert done.lines == [seen, "python3", "HERE/self_play.py"]


def test_the_projects_python_first(shell):
    assert shell("SEED=1", venv=True).lines[1:] == ["python", "HERE/self_play.py", "SEED=1"]


def test_the_defaults_of_the_flags_can_be_run(shell):
    """What --rollout_n sets is accepted by the script, in both profiles; what is given wins."""
    script = import_file(FOLDER / "self_play.py", "self_play_for_the_shell")
    here = ["DEVICE=cpu", "FROZEN_DEVICE=cpu"]
    for n in ("2", "7", "010", "12"):
        for profile in ("full", "embedded"):
            script.configure(shell("--rollout_n", n, f"PROFILE={profile}", *here).lines[3:])
            assert script.ROLLOUT_N == script.MICRO_BATCH == script.MINIBATCH // 16 == int(n)
    script.configure(shell("--rollout_n", "10", *here, "MICRO_BATCH=40").lines[3:])
    assert script.MICRO_BATCH == 40


@pytest.mark.parametrize("arguments, says", [
    (["--rollout_m", "3"], ["--rollout_m", "--rollout_n"]), (["-x"], ["-x"]),
    (["SEED"], ["SEED", "NAME=VALUE"]), (["--model"], ["--model", "no value"]),
    (["--model", "--n_gpus", "1"], ["--model", "'--n_gpus'"]), (["--model="], ["--model", "''"]),
    (["--n_gpus", "two"], ["--n_gpus two", "0 or more"]), (["--n_gpus", "-1"], ["--n_gpus"]),
    (["--rollout_n", "1"], ["--rollout_n 1", "2 or more"]),
    (["--rollout_n", "8; echo"], ["--rollout_n", "whole number"]),
    (["--self_play_rounds", "0"], ["--self_play_rounds 0", "1 or more"]),
    (["--self_play_rounds", "99999999999999999999"], ["whole number"]),
    (["--reward_func", "nowhere.py"], ["--reward_func nowhere.py", "no such file"]),
    (["$(touch x)"], ["no such option"]), (["", "SEED=1"], ["expected"])])
def test_bad_flags_are_one_line(shell, arguments, says):
    done = shell(*arguments)
    assert done.status == 1 and done.lines == []
    assert done.error.startswith("error: ") and done.error.count("\n") == 1
    for words in says:
        assert words in done.error


def test_help_names_every_flag(shell):
    for flag in ("-h", "--help"):
        done = shell(flag)
        assert (done.status, done.error) == (0, "")
        for name in ("--model", "--rollout_n", "--self_play_rounds", "--reward_func", "--n_gpus",
                     "NAME=VALUE"):
            assert any(name in line for line in done.lines)


def test_train_sh_can_be_executed():
    assert os.stat(FOLDER / "train.sh").st_mode & stat.S_IXUSR or sys.platform == "win32"
