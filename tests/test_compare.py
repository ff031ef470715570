"""compare.py: what it refuses, what it runs and does not run again, and what it makes of the runs.

Once it runs two of the scripts as they are. Elsewhere the scripts are stand-ins of a few lines,
which write what a run writes, and the runs are made up, so that every number is known.
"""

import ast
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, import_file, run_script
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

COMPARE = ROOT / "RL_HAND" / "compare.py"


@pytest.fixture
def compare():
    """compare.py, imported anew."""
    return import_file(COMPARE, "compare_under_test")


def refused(compare, *arguments):
    """The line with which main stops; the interpreter prints it and exits with status 1."""
    with pytest.raises(SystemExit) as stop:
        compare.main(list(arguments))
    line = stop.value.code
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line
    return line


# ======================================== The command line =======================================


@pytest.mark.parametrize("arguments, says", [
    (["grop"], ["'grop' is no script", "dapo, gad, gmpo, grpo, gspo, "]),
    (["gspo", "compare"], ["'compare' is no script"]),
    (["gspo", "SEEDS=many"], ["SEEDS=many", "expected a int"]),
    (["gspo", "SEEDS=0"], ["SEEDS=1 or more"]),
    (["gspo", "SEEDS=1.5"], ["SEEDS=1.5"]),
    (["gspo", "WORKERS=-1"], ["WORKERS=0 or more"]),
    (["gspo", "TARGET=high"], ["TARGET=high", "float"]),
    (["SEEDS=2"], ["expected scripts", "--runs FOLDER"]),
    (["--runs"], ["--runs: found no folder", "runs/gspo"]),
    (["--runs", "OUTPUT=x"], ["--runs: found no folder"]),
    (["gspo", "--runs", "runs/gspo"], ["expected scripts", "or --runs"]),
    (["--runs", "runs/gspo", "LEARNING_RATE=1"], ["LEARNING_RATE=1", "runs that exist"]),
    (["gspo", "SEED=1"], ["SEED=1", "SEEDS="]),
    (["gspo", "OUTPUT_DIR=here"], ["OUTPUT_DIR=here", "OUTPUT="]),
])
def test_what_cannot_be_done_is_one_line(compare, monkeypatch, tmp_path, arguments, says):
    """Before anything is run or written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare.subprocess, "Popen", None)  # calling it would be a TypeError
    line = refused(compare, *arguments)
    for words in says:
        assert words in line
    assert not list(tmp_path.iterdir())


def test_what_is_parsed(compare, tmp_path, monkeypatch):
    """Options, each script once and in the order given, and constants as they are."""
    monkeypatch.chdir(tmp_path)
    options, names, folders, constants = compare.parse(
        ["ppo", "gspo", "SEEDS=5", "LEARNING_RATE=5e-5", "ppo", "TARGET=0.75", "WORKERS=2",
         "REWARD_WEIGHTS={'verifier': 1.0}"])
    assert options == {"SEEDS": 5, "OUTPUT": tmp_path / "runs" / "compare", "WORKERS": 2,
                       "TARGET": 0.75}
    assert (names, folders) == (["ppo", "gspo"], [])
    assert constants == ["LEARNING_RATE=5e-5", "REWARD_WEIGHTS={'verifier': 1.0}"]
    options, names, folders, constants = compare.parse(["OUTPUT=out", "--runs", "a", "TARGET=0.5",
                                                        "b"])
    assert (names, folders, constants) == ([], ["a", "b"], [])
    assert options["TARGET"] == 0.5 and options["OUTPUT"] == tmp_path / "out"


def test_a_home_folder_is_found_without_the_shell(compare, tmp_path, monkeypatch):
    """`OUTPUT=~/x` reaches the program as it is from most shells; no folder "~" is made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    options, _, folders, _ = compare.parse(["--runs", "~/a", "b", "OUTPUT=~/out"])
    assert options["OUTPUT"] == tmp_path / "out"
    assert [compare.Path(folder) for folder in folders] == [tmp_path / "a", compare.Path("b")]


def test_jobs_go_seed_by_seed(compare, tmp_path):
    """So that a comparison that is stopped has as many seeds of each."""
    jobs = compare.jobs_of({"SEEDS": 2, "OUTPUT": tmp_path}, ["gspo", "ppo"], ["MAX_STEPS=3"])
    assert jobs == [(name, tmp_path / f"{name}_seed{seed}", [f"SEED={seed}", "MAX_STEPS=3"])
                    for seed in (0, 1) for name in ("gspo", "ppo")]


def test_each_script_is_asked_in_its_own_words(compare, tmp_path):
    """A constant that a script has under another name is passed on under that name."""
    jobs = compare.jobs_of({"SEEDS": 1, "OUTPUT": tmp_path}, ["gspo", "self_play"],
                           ["MAX_STEPS=3", "GROUP_SIZE=4", "TEMPERATURE=0.9", "POLICY_MODEL=a=b"])
    assert [arguments[1:] for _, _, arguments in jobs] == [
        ["MAX_STEPS=3", "GROUP_SIZE=4", "TEMPERATURE=0.9", "POLICY_MODEL=a=b"],
        ["SELF_PLAY_ROUNDS=3", "ROLLOUT_N=4", "ROLLOUT_TEMPERATURE=0.9", "POLICY_MODEL=a=b"]]
    sync = import_file(ROOT / "tools" / "sync.py", "sync_for_compare")
    assert compare.RENAMED == sync.RENAMED


@pytest.mark.parametrize("arguments", [[], ["--help"], ["gspo", "-h"]])
def test_help(compare, capsys, arguments):
    assert compare.main(arguments) == 0
    assert capsys.readouterr().out == compare.__doc__ + "\n"
    assert "SEEDS=3" in compare.__doc__ and "--runs" in compare.__doc__


# ==================================== Two scripts as they are ====================================

REAL = ["gspo", "grpo", "SEEDS=1", "WORKERS=1", "PROFILE=embedded", "DEVICE=cpu", "MAX_STEPS=2",
        "EVAL_QUESTIONS=8", "EVAL_EVERY=0", "BATCH_SIZE=4", "MINIBATCH=16", "SHOW_SAMPLES=0",
        "REWARD_WEIGHTS={'verifier': 1.0}"]


def files_of(folder):
    """Every file below a folder with its time of change and its size."""
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The finished command and its OUTPUT."""
    output = tmp_path_factory.mktemp("compared") / "out"
    return run_script(*REAL, f"OUTPUT={output}", script=COMPARE, timeout=600), output


def test_two_scripts_from_the_command_to_the_table(compared):
    """Each ran as it is; the table on the screen is the one in the files, and its numbers are those
    of the runs."""
    done, output = compared
    assert done.returncode == 0, done.stderr
    settings = " ".join(REAL[4:])
    table = pd.read_csv(output / "comparison.csv")
    assert table["algorithm"].tolist() == [f"gspo {settings}", f"grpo {settings}"]
    text = (output / "comparison.md").read_text(encoding="utf-8")
    assert text.strip() in done.stdout and f"in {output}: comparison.png" in done.stdout
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 and rows[0].startswith("| algorithm | runs | sampled before | ")
    assert "one seed only: no error known" in text
    for i, name in enumerate(("gspo", "grpo")):
        folder = output / f"{name}_seed0"
        assert (folder / "finished").exists() and (folder / "step_2" / "config.json").exists()
        facts = json.loads((folder / "epoch_0" / "constants.json").read_text())
        assert facts["script"] == name and facts["constants"]["SEED"] == 0
        assert facts["constants"]["EVAL_QUESTIONS"] == 8
        run = pd.read_csv(folder / "metrics.csv")
        assert run["step"].tolist() == [0, 1, 2]
        row = table.iloc[i]
        assert row["runs"] == 1
        assert float(row["sampled before"]) == pytest.approx(run["eval/accuracy"][0], abs=6e-4)
        assert float(row["greedy after"]) == pytest.approx(run["eval/accuracy_greedy"][2], abs=6e-4)
        assert float(str(row["tokens"]).replace(",", "")) == run["num_tokens"][2]
        assert row["peak memory, GB"] == "-"  # it is a GPU's
        assert f"\n{name}\n" in (output / f"{name}_seed0.log").read_text(encoding="utf-8")
        assert f"| {name} {settings} | 1 |" in text
    png = (output / "comparison.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width >= 1200 and height >= 600 and len(png) > 20_000
    assert "Traceback" not in done.stderr
    assert re.search(r"2 runs: .* 4/4 ", done.stderr)  # of what the runs said they would make


def test_the_same_command_again_runs_nothing(compare, compared, monkeypatch, capsys):
    """And makes the same table of the runs that are there; no file of a run is touched."""
    _, output = compared
    before = files_of(output)
    text = (output / "comparison.md").read_text(encoding="utf-8")
    (output / "comparison.md").unlink()
    monkeypatch.setattr(compare.subprocess, "Popen", None)
    monkeypatch.setattr(compare, "draw", lambda table, file: file.touch())
    assert compare.main([*REAL, f"OUTPUT={output}"]) == 0
    assert (output / "comparison.md").read_text(encoding="utf-8") == text
    assert text in capsys.readouterr().out
    after = files_of(output)
    assert after.keys() == before.keys()
    assert [p.name for p in after if after[p] != before[p] and p.parent != output] == []


def test_other_constants_in_the_same_output_are_refused(compare, compared, monkeypatch):
    """They would mix runs of two kinds in one table. Nothing is run, nothing changed."""
    _, output = compared
    before = files_of(output)
    monkeypatch.setattr(compare.subprocess, "Popen", None)
    line = refused(compare, *REAL, "MICRO_BATCH=8", f"OUTPUT={output}")
    assert str(output / "gspo_seed0") in line and "other settings" in line
    assert "MICRO_BATCH=8" in line and "choose another OUTPUT" in line
    assert files_of(output) == before


def test_runs_that_exist(compare, compared, tmp_path, monkeypatch, capsys):
    """--runs: the same rows as when they were run, into a folder of its own."""
    _, output = compared
    before = files_of(output)
    monkeypatch.setattr(compare.subprocess, "Popen", None)
    monkeypatch.setattr(compare, "draw", lambda table, file: file.touch())
    assert compare.main(["--runs", str(output / "grpo_seed0"), str(output / "gspo_seed0"),
                         f"OUTPUT={tmp_path / 'again'}"]) == 0
    again = pd.read_csv(tmp_path / "again" / "comparison.csv")
    first = pd.read_csv(output / "comparison.csv")
    pd.testing.assert_frame_equal(again, first.iloc[::-1].reset_index(drop=True))
    assert {p.name for p in (tmp_path / "again").iterdir()} == {
        "comparison.png", "comparison.md", "comparison.csv", ".lock"}
    assert files_of(output) == before
    line = refused(compare, "--runs", str(output / "grpo_seed0"), str(output),
                   f"OUTPUT={tmp_path / 'third'}")
    assert f"{output} is no run folder" in line and not (tmp_path / "third").exists()


# =========================================== Stand-ins ===========================================

COLUMNS = ["step", "reward", "kl", "entropy", "clip_ratio/region_mean", "completions/mean_length",
           "num_tokens", "time/rollout", "time/reward", "time/logps", "time/update", "step_time",
           "peak_memory", "eval/accuracy", "eval/accuracy_greedy"]
STAND_IN = f"""
import json, sys
from pathlib import Path
here = Path(__file__)
with (here.parents[1] / "started").open("a", errors="surrogateescape") as file:
    file.write(" ".join([here.stem, *sys.argv[1:]]) + "\\n")
given = dict(argument.split("=", 1) for argument in sys.argv[1:])
out = Path(given["OUTPUT_DIR"])
assert not out.exists()
(out / ".epoch_0").mkdir(parents=True)
facts = {{"script": here.stem, "command": sys.argv}}
(out / ".epoch_0" / "constants.json").write_text(json.dumps(facts))
(out / ".epoch_0").rename(out / "epoch_0")
rows = [",".join({COLUMNS!r})]
for step in range(3):
    rows.append(",".join(map(str, [step, *[0.5] * 12, 0.25 + step / 10, 0.75])))
    (out / "metrics.csv").write_text("\\n".join(rows) + "\\n")
    print(f"\\r 50%|#  | {{step}}/2 [00:01<00:01,  1.00s/step, kl 0.5]", file=sys.stderr)
    if step == 1 and (here.parents[1] / f"{{here.stem}}_breaks").exists():
        print("it began well")
        raise SystemExit("error: it is broken")
"""


def write_script(scripts, name, text):
    """A script where compare.py looks for it."""
    (scripts / name).mkdir(parents=True)
    (scripts / name / f"{name}.py").write_text(text, encoding="utf-8")


@pytest.fixture
def stand_ins(compare, tmp_path, monkeypatch):
    """compare.py with the scripts good, bad and other in place of the real ones; bad breaks in the
    middle until `mend` is called. No figure: it is drawn elsewhere."""
    scripts = tmp_path / "scripts"
    for name in ("good", "bad", "other"):
        write_script(scripts, name, STAND_IN)
    (scripts / "bad_breaks").touch()
    monkeypatch.setattr(compare, "HERE", scripts)
    monkeypatch.setattr(compare, "draw", lambda table, file: file.touch())
    monkeypatch.setattr(compare, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(0.05)))

    def starts():
        lines = (scripts / "started").read_text().splitlines()
        (scripts / "started").unlink()
        return lines
    return SimpleNamespace(main=lambda *arguments: compare.main(
        [*arguments, f"OUTPUT={tmp_path / 'out'}", "WORKERS=1"]),
        scripts=scripts, output=tmp_path / "out", starts=starts,
        mend=(scripts / "bad_breaks").unlink)


def test_a_run_that_fails_is_reported_and_the_rest_carried_on(stand_ins, capsys):
    """Status 1, a line with the run's own last words, a table of the runs that are whole; the same
    command then makes only what is missing, from its beginning."""
    assert stand_ins.main("good", "bad", "other", "SEEDS=2") == 1
    out = stand_ins.output
    commands = [f"{name} OUTPUT_DIR={out / f'{name}_seed{seed}'} SEED={seed}"
                for seed in (0, 1) for name in ("good", "bad", "other")]
    assert stand_ins.starts() == commands
    printed = capsys.readouterr()
    for seed in (0, 1):
        line = f"bad_seed{seed} failed (status 1): error: it is broken"
        assert line in printed.err.splitlines()
        assert "it began well" in (out / f"bad_seed{seed}.log").read_text()
        assert not (out / f"bad_seed{seed}" / "finished").exists()
    table = pd.read_csv(out / "comparison.csv")
    assert table["algorithm"].tolist() == ["good", "other"] and table["runs"].tolist() == [2, 2]
    before = files_of(out / "good_seed0") | files_of(out / "other_seed1")

    stand_ins.mend()
    assert stand_ins.main("good", "bad", "other", "SEEDS=2") == 0
    assert stand_ins.starts() == commands[1::3]
    assert "failed" not in capsys.readouterr().err
    table = pd.read_csv(out / "comparison.csv")
    assert table["algorithm"].tolist() == ["good", "bad", "other"]
    assert files_of(out / "good_seed0") | files_of(out / "other_seed1") == before


def test_more_seeds_keep_those_that_are_there(stand_ins, capsys):
    assert stand_ins.main("good", "SEEDS=1", "LEARNING_RATE=1") == 0
    assert len(stand_ins.starts()) == 1
    assert stand_ins.main("good", "SEEDS=3", "LEARNING_RATE=1") == 0
    assert [line.split()[2:] for line in stand_ins.starts()] == [
        ["SEED=1", "LEARNING_RATE=1"], ["SEED=2", "LEARNING_RATE=1"]]
    table = pd.read_csv(stand_ins.output / "comparison.csv")
    assert table["algorithm"].tolist() == ["good LEARNING_RATE=1"]
    assert table["runs"].tolist() == [3]
    assert "0.450 ± 0.000" in capsys.readouterr().out  # three equal runs: the mean and its error


def test_where_every_run_fails_there_is_no_table(compare, stand_ins, capsys):
    with pytest.raises(SystemExit) as stop:
        stand_ins.main("bad", "SEEDS=1")
    assert stop.value.code.startswith("error: no run is complete")
    assert str(stand_ins.output) in stop.value.code
    printed = capsys.readouterr()
    assert "bad_seed0 failed (status 1): error: it is broken" in printed.out + printed.err
    assert not (stand_ins.output / "comparison.csv").exists()


def test_runs_get_their_share_of_the_cores(compare, stand_ins, monkeypatch):
    """As many runs at a time as WORKERS says, each with as many threads as that leaves it."""
    threads, start = [], compare.subprocess.Popen

    def popen(command, env, **options):
        threads.append((env["OMP_NUM_THREADS"], command[0], command[1].split(os.sep)[-1]))
        return start(command, env=env, **options)

    monkeypatch.setattr(compare.subprocess, "Popen", popen)
    monkeypatch.setattr(compare.os, "cpu_count", lambda: 6)
    compare.main(["good", "other", "SEEDS=1", "WORKERS=2", f"OUTPUT={stand_ins.output}"])
    assert threads == [("3", sys.executable, "good.py"), ("3", sys.executable, "other.py")]
    monkeypatch.setattr(compare.os, "cpu_count", lambda: None)  # not every system says it
    compare.main(["good", "SEEDS=1", "WORKERS=0", f"OUTPUT={stand_ins.output / 'more'}"])
    assert threads[2:] == [("1", sys.executable, "good.py")]


@pytest.mark.parametrize("text, progress", [
    ("", (0, 0)), ("gspo\n  steps     0 of 100 done, 50 an epoch\n", (0, 0)),
    ("\r  0%|          | 0/100 [00:00<?, ?step/s]", (0, 100)),
    ("\r  2%|2 | 2/100 [00:02<01:51,  1.14s/step, reward 0.5]\r  3%|3 | 3/100 [00:03<01:51,  "
     "1.14step/s, reward 0.5]\n\rrollout:  50%|5 | 30/60 [00:01<00:01, 20.1it/s]", (3, 100))])
def test_how_far_a_run_is_stands_in_its_log(compare, tmp_path, text, progress):
    assert compare.progress_of(tmp_path / "run") == (0, 0)  # it has not begun
    (tmp_path / "run.log").write_text(text, encoding="utf-8")
    assert compare.progress_of(tmp_path / "run") == progress


OPENED = []  # what is opened by this process, while a test looks
sys.addaudithook(lambda event, given: event == "open" and OPENED and OPENED.append(str(given[0])))


def test_no_file_that_a_run_replaces_is_read_meanwhile(compare, stand_ins, monkeypatch):
    """On Windows a run that replaces a file (metrics.csv, each step) ends if it is open here."""
    seen = []
    monkeypatch.setattr(compare, "read_run", lambda folder: seen.append(len(OPENED)) or
                        made_up("good", str(folder), [0.1, 0.5]))  # by then all have ended
    OPENED.append("from here on")
    stand_ins.main("good", "SEEDS=2")
    names = {os.path.basename(path) for path in OPENED[:seen[0]]}
    OPENED.clear()
    assert "good_seed1.log" in names and "metrics.csv" not in names


def test_the_error_that_a_run_ended_with_is_reported_as_it_is(stand_ins, capsys):
    """Also when something is printed behind it, and with bars before it; else the last line."""
    line = "error: step 7, policy: not finite; RESUME_FROM=runs/gspo_seed0/step_6 goes on"
    write_script(stand_ins.scripts, "mid", STAND_IN + f"""
import atexit
atexit.register(print, "Exception ignored in: <generator>", file=sys.stderr)
raise SystemExit({line!r})
""")
    write_script(stand_ins.scripts, "crash", STAND_IN + "\n1 / 0\n")
    assert stand_ins.main("mid", "crash", "good", "SEEDS=1") == 1
    printed = capsys.readouterr()
    for report in (f"mid_seed0 failed (status 1): {line}",
                   "crash_seed0 failed (status 1): ZeroDivisionError: division by zero"):
        assert report in printed.out.splitlines() and report in printed.err.splitlines()


# ================================ Any system, any terminal ========================================


def test_what_another_program_holds_is_one_line(compare, stand_ins, monkeypatch, tmp_path):
    """As a table program does with comparison.csv on Windows, or a viewer with a run's folder: the
    first is found when the runs are there, and they stay; the second before any is started."""
    (stand_ins.output / "comparison.csv").mkdir(parents=True)
    arguments = ["good", "SEEDS=1", "WORKERS=1", f"OUTPUT={stand_ins.output}"]
    line = refused(compare, *arguments)
    assert f"OUTPUT={stand_ins.output}: " in line and "comparison.csv" in line
    assert "no program that has a file open" in line
    (stand_ins.output / "comparison.csv").rmdir()
    assert compare.main(arguments) == 0 and len(stand_ins.starts()) == 1
    (stand_ins.output / "bad_seed0").mkdir()

    def rmtree(folder):
        raise PermissionError(13, "it is being used by another process", str(folder))

    monkeypatch.setattr(compare.shutil, "rmtree", rmtree)
    line = refused(compare, "other", "bad", *arguments[1:])
    assert "bad_seed0" in line and not (stand_ins.output / "other_seed0").exists()
    (tmp_path / "file").touch()
    assert "expected a folder to write to" in refused(
        compare, *arguments[:3], f"OUTPUT={tmp_path / 'file' / 'out'}")


def test_where_open_files_cannot_be_deleted_that_is_the_lock(compare, tmp_path, monkeypatch):
    """The branch for Windows, which cannot be tried here but for its order of calls."""
    monkeypatch.setattr(sys, "platform", "win32")
    with compare.claimed(tmp_path / "out") as lock:
        assert lock.read() == b""  # what a run finds as its input
        monkeypatch.setattr(compare.Path, "unlink", lambda *_, **__: 1 / 0)  # it is tried first
        with pytest.raises(ZeroDivisionError), compare.claimed(tmp_path / "out"):
            pass
        monkeypatch.setattr(compare.Path, "unlink", lambda *_, **__: None)  # both at once
        with pytest.raises(SystemExit) as stop, compare.claimed(tmp_path / "out"):
            pass
    assert "no other compare.py" in stop.value.code


WAITS = STAND_IN.replace("rows = [", """
import signal, time
def ends_well(*_):
    time.sleep(1)
    (here.parents[1] / "ended").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, ends_well)
(here.parents[1] / "waits_now").touch()
while not (here.parents[1] / "go").exists():
    time.sleep(0.05)
rows = [""")
ODD = "\u2603 \udc80 \u2192"  # a snowman, half a character, an arrow


@pytest.fixture
def beside(tmp_path):
    """compare.py as a program of its own, in a folder with stand-ins for the scripts and PyTorch.
    `start` starts it, `end` waits for it: status, stdout, stderr."""
    scripts = tmp_path / "scripts"
    found = SimpleNamespace(scripts=scripts, output=tmp_path / "out")
    write_script(scripts, "waits", WAITS)
    write_script(scripts, "odd", STAND_IN + f"\nprint({ODD!r})\n")
    write_script(scripts, "odd_end", STAND_IN + f"\nprint({ODD!r})\nraise SystemExit("
                                                "'error: \u2603 RESUME_FROM=x')\n")
    shutil.copy(COMPARE, scripts)
    (scripts / "torch.py").write_text("class cuda:\n    is_available = bool\n", encoding="utf-8")

    def start(*arguments, **environment):
        return subprocess.Popen(
            [sys.executable, str(scripts / "compare.py"), *arguments, f"OUTPUT={found.output}",
             "WORKERS=4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | environment)

    def end(process):
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout.decode("latin-1"), stderr.decode("latin-1")

    found.start, found.end = start, end
    yield found
    (scripts / "go").touch()  # whatever is left ends


def wait_for(condition, seconds=60):
    """Until it holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("folder, environment", [
    ("L\u00e4ufe \u2603", {"PYTHONIOENCODING": "cp1252"}),
    ("out", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"})])
def test_no_terminal_stops_a_run_or_the_comparison(beside, folder, environment):
    """Logs are UTF-8 whatever the terminal is, and what cannot be shown on it is replaced. What is
    complete is known again."""
    beside.output = beside.output.with_name(folder)
    for names in (("odd", "odd_end"), ("odd",)):
        status, stdout, stderr = beside.end(beside.start(*names, "SEEDS=2", **environment))
        assert "Traceback" not in stderr and "Encode" not in stdout
        assert status == len(names) - 1 and "| odd | 2 |" in stdout
        for printed in (stdout, stderr):
            assert printed.count("_seed1 failed (status 1): error: ? RESUME_FROM=x") == status
    text = (beside.output / "odd_seed0.log").read_text(encoding="utf-8")
    assert "\u2603 ? \u2192\n" in text
    assert len((beside.scripts / "started").read_text(encoding="utf-8").splitlines()) == 4
    assert "\u00b1" in (beside.output / "comparison.md").read_text(encoding="utf-8")


def test_of_two_at_once_one_is_refused(beside):
    """In one line, whichever it is; the other one's run is whole, and made once."""
    both = [beside.start("waits", "SEEDS=1") for _ in range(2)]
    wait_for(lambda: any(process.poll() is not None for process in both))
    late, first = sorted(both, key=lambda process: process.poll() is None)
    wait_for((beside.scripts / "waits_now").exists)
    (beside.scripts / "go").touch()
    status, _, stderr = beside.end(late)
    assert status == 1 and stderr.count("\n") == 1
    assert stderr.startswith("error: OUTPUT=") and "no other compare.py" in stderr
    assert beside.end(first)[0] == 0
    assert len((beside.scripts / "started").read_text(encoding="utf-8").splitlines()) == 1
    assert len(pd.read_csv(beside.output / "waits_seed0" / "metrics.csv")) == 3
    assert beside.end(beside.start("waits", "SEEDS=1"))[0] == 0  # the lock is gone with its holder


def test_a_run_that_outlives_compare_is_not_mixed_with_another(beside):
    """compare.py is killed: as long as its run goes on, the same command is refused."""
    process = beside.start("waits", "SEEDS=1")
    wait_for((beside.scripts / "waits_now").exists)
    process.kill()
    beside.end(process)
    status, _, stderr = beside.end(beside.start("waits", "SEEDS=1"))
    assert status == 1 and "no run that one left behind" in stderr
    (beside.scripts / "go").touch()
    wait_for(lambda: beside.end(beside.start("waits", "SEEDS=1"))[0] == 0)
    assert len((beside.scripts / "started").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="signals to another process are POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_comparison_that_is_stopped_stops_its_runs(compare, beside, number):
    """It waits for them: they end their step. The signal goes to compare.py alone."""
    process = beside.start("waits", "SEEDS=1")
    wait_for((beside.scripts / "waits_now").exists)
    process.send_signal(number)
    status, _, stderr = beside.end(process)
    assert status == 130 and "Traceback" not in stderr
    assert (beside.scripts / "ended").exists()
    with compare.claimed(beside.output):
        pass  # nothing is left


FILES = [COMPARE, *sorted(path for folder in ("tools", "benchmarks")
                          for path in (ROOT / folder).glob("*.py"))]


def in_the_systems_encoding(source):
    """Calls that read or write text without saying that it is UTF-8, as they stand; and those that
    stop if another program writes something else."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            binary = "b'" in "".join(map(ast.unparse, node.args)) + given.get("mode", "")
            if (name in ("read_text", "write_text", "getoutput", "getstatusoutput")
                    or name == "open" and not binary or {"text", "capture_output"} & {*given}
                    ) and given.get("encoding") != "'utf-8'" or (
                        "capture_output" in given and "errors" not in given):
                found.append(ast.unparse(node))
    return found


def test_text_is_found_that_does_not_say_its_encoding():
    good = ["open(a, 'rb')", "a.open('wb')", "a.open('x+b' if b else 'a+b')", "a.read_bytes()",
            "a.read_text(encoding='utf-8')", "open(a, encoding='utf-8')",
            "run(a, capture_output=True, encoding='utf-8', errors='replace')"]
    bad = ["open(a)", "a.open('w')", "a.read_text()", "a.write_text('b')", "run(a, text=True)",
           "getoutput('b')", "a.read_text(encoding='latin-1')", "run(a, capture_output=True)",
           "run(a, capture_output=True, encoding='utf-8')"]
    assert in_the_systems_encoding("\n".join(good + bad)) == bad


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_text_is_utf_8_on_every_system(path):
    """Files and other programs' output, of which none may stop anything; what is printed, too."""
    source = path.read_text(encoding="utf-8")
    assert in_the_systems_encoding(source) == []
    begins = source.partition('if __name__ == "__main__":\n')[2]
    assert not begins or '.reconfigure(errors="replace")' in begins
    if path.parent.name == "tools":  # what is in the repository has the same bytes everywhere
        assert all('newline="\\n"' in call for call in re.findall(r"\.write_text\(.*", source))


def test_a_tool_prints_on_any_terminal(tmp_path):
    """A difference in a letter that the terminal lacks."""
    for path in ("tools/sync.py", "RL_HAND/compare.py", "RL_HAND/gspo/gspo.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    source = (tmp_path / path).read_text(encoding="utf-8")
    write_script(tmp_path / "RL_HAND", "grpo",
                 source.replace("import json\n", "import json  # \u2603\n"))
    done = subprocess.run([sys.executable, str(tmp_path / "tools" / "sync.py"), "--check"],
                          capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1 and not done.stderr
    assert b"-import json  # ?" in done.stdout and b"repair it with" in done.stdout


def test_the_names_of_runs_are_possible_everywhere():
    """Of the experiments: no letter that Windows reserves, not too long for its 260 characters, and
    different where capitals are not told apart."""
    experiments = import_file(ROOT / "benchmarks" / "experiments.py", "experiments")
    jobs = {(script, *words): folder.name for name in experiments.EXPERIMENTS
            for script, folder, words in experiments.jobs_of(name)}
    assert len(jobs) == len({name.lower() for name in jobs.values()}) > 100
    for name in jobs.values():
        assert not re.search(r'[<>:"/\\|?*]|[. ]$', name) and len(name) <= 130, name


def test_memory_that_this_system_does_not_tell_is_nan(monkeypatch, tmp_path):
    """The table and the figure of scaling.py are made all the same."""
    scaling = import_file(ROOT / "benchmarks" / "scaling.py", "scaling")
    monkeypatch.setattr(scaling, "RESET", tmp_path / "none")
    found = scaling.measure(scaling.BASE | {"completions": 8, "length": 4})
    assert math.isnan(found["MB"]) and found["seconds"] > 0
    points = [json.loads(json.dumps(found)) | {"x": x} for x in (8, 16)]
    scaling.draw({"completions": points}, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_facts_without_git(monkeypatch):
    common = import_file(ROOT / "benchmarks" / "common.py", "common_under_test")
    assert re.fullmatch("[0-9a-f]{7,40}|", common.facts("cpu")["commit"])
    monkeypatch.setenv("PATH", "")
    assert common.facts("cpu")["commit"] == ""


def test_a_table_that_is_being_replaced_is_read_the_next_time(monkeypatch, tmp_path):
    """tensorboard.py, which reads while the run writes; each row is shown once. Windows refuses to
    open a file in that moment."""
    tensorboard = import_file(ROOT / "tools" / "tensorboard.py", "tensorboard_under_test")
    (tmp_path / "metrics.csv").touch()
    shown, first = [], [{"step": 0, "reward": 0.5}]
    board = SimpleNamespace(add_scalar=lambda *values: shown.append(values), flush=lambda: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        SimpleNamespace(SummaryWriter=lambda folder: board))
    tables = iter([first, None, first + [{"step": 1, "reward": 0.75}]])

    def read_csv(path):
        if (rows := next(tables)) is None:
            raise PermissionError(13, "it is being used by another process")
        return pd.DataFrame(rows)

    monkeypatch.setattr(tensorboard, "pd", SimpleNamespace(read_csv=read_csv))
    monkeypatch.setattr(tensorboard, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("USERPROFILE", str(tmp_path.parent))
    with pytest.raises(StopIteration):
        tensorboard.main([f"~/{tmp_path.name}"])
    assert [values for values in shown if values[0] == "reward"] == [
        ("reward", 0.5, 0), ("reward", 0.75, 1)]


# ======================================= Numbers made up =========================================


def made_up(algorithm, folder, accuracy, kl=True, every=10, step_time=2.0):
    """A run's table as read_run gives it: an evaluation each 10 steps, numbers at every step."""
    steps = np.arange((len(accuracy) - 1) * every + 1)
    table = pd.DataFrame({name: np.full(len(steps), math.nan) for name in COLUMNS})
    table["step"], table["num_tokens"] = steps, 100.0 * steps
    table["eval/accuracy"] = [accuracy[s // every] if s % every == 0 else math.nan for s in steps]
    table["eval/accuracy_greedy"] = table["eval/accuracy"] + 0.05
    for name in COLUMNS[1:13]:
        if name != "num_tokens":
            table.loc[1:, name] = 0.25
    table.loc[1:, "step_time"], table.loc[1:, "time/update"] = step_time, 1.5
    if not kl:
        table = table.drop(columns="kl")
    return table.assign(algorithm=algorithm, folder=folder,
                        seconds=table["step_time"].fillna(0).cumsum())


@pytest.mark.parametrize("target, expected", [
    (0.5, 10.0), (0.6, 12.5), (0.7, 15.0), (0.9, 20.0), (0.2, 0.0), (0.1, 0.0), (0.95, math.nan)])
def test_steps_to_an_accuracy(compare, target, expected):
    """Interpolated between the evaluations at 0, 10, 20, 30: 0.2, 0.5, 0.9, 0.4. The first time
    counts, a later fall does not; NaN if it was never reached."""
    run = made_up("gspo", "a", [0.2, 0.5, 0.9, 0.4])
    for column, scale in (("step", 1), ("num_tokens", 100), ("seconds", 2)):
        found = compare.reached(run, target, column)
        assert found == pytest.approx(scale * expected, nan_ok=True)


@pytest.mark.parametrize("values, expected", [
    ([0.5, 0.7], "0.600 ± 0.100"), ([0.5], "0.500"), ([], "-"), ([math.nan], "-"), ([None], "-"),
    ([0.5, math.nan, 0.7], "0.600 ± 0.100"), ([1000.0, 3000.0], "2,000 ± 1,000"),
    ([1.0, 2.0, 3.0], "2.000 ± 0.577"), ([1234567.0], "1,234,567"),
    ([0.0, 0.0], "0.000 ± 0.000")])
def test_mean_and_standard_error(compare, values, expected):
    """std / sqrt(n), the std by n - 1; large numbers without decimals."""
    assert compare.mean_and_error(values) == expected


@pytest.mark.parametrize("first, second, line", [
    ([0.80, 0.82], [0.50, 0.52], "a - b: +0.300 ± 0.014, more than noise"),
    ([0.50, 0.52], [0.80, 0.82], "a - b: -0.300 ± 0.014, more than noise"),
    ([0.60, 0.80], [0.68, 0.70], "a - b: +0.010 ± 0.100, within noise"),
    ([0.70, 0.72, 0.74], [0.60, 0.72, 0.75], "a - b: +0.030 ± 0.047, within noise"),
    ([0.70, 0.80], [0.70, 0.80], "a - b: +0.000 ± 0.071, within noise"),
    ([0.75, 0.75], [0.75, 0.75], "a - b: +0.000 ± 0.000, within noise"),
    ([0.75, 0.75], [0.50, 0.50], "a - b: +0.250 ± 0.000, more than noise"),
    ([0.80], [0.50, 0.52], "a - b: +0.290, one seed only: no error known")])
def test_what_is_noise(compare, first, second, line):
    """The difference of the final accuracies against twice its standard error, which is the root of
    the sum of the squared errors of the two means."""
    table = pd.concat([made_up(name, f"{name}{i}", [0.1, final])
                       for name, finals in (("a", first), ("b", second))
                       for i, final in enumerate(finals)])
    assert compare.noise(table) == [line]


def test_each_pair_is_compared_once(compare):
    table = pd.concat([made_up(name, f"{name}{i}", [0.1, 0.5 + i / 100])
                       for name in ("ppo", "gspo", "dapo") for i in range(2)])
    assert [line.split(":")[0] for line in compare.noise(table)] == [
        "ppo - gspo", "ppo - dapo", "gspo - dapo"]
    assert compare.noise(table[table["algorithm"] == "ppo"]) == []


def test_runs_are_grouped_by_script_and_settings(compare, tmp_path):
    """What was set on the command line, but for the seed, the folder and the checkpoint to go on
    from; a run that was resumed has no checkpoint of step 0."""
    for number, (script, checkpoint, settings) in enumerate([
            ("gspo", "epoch_0", ["SEED=0", "OUTPUT_DIR=x"]),
            ("gspo", "epoch_0", ["OUTPUT_DIR=y", "SEED=4"]),
            ("gspo", "epoch_0", ["LEARNING_RATE=5e-5", "SEED=1"]),
            ("ppo", "step_9", ["RESUME_FROM=z/step_8", "KL_COEF=0.0"])]):
        folder = tmp_path / str(number)
        (folder / checkpoint).mkdir(parents=True)
        facts = {"script": script, "command": [f"{script}.py", *settings]}
        (folder / checkpoint / "constants.json").write_text(json.dumps(facts))
        made_up("", "", [0.1, 0.5]).drop(columns=["algorithm", "folder", "seconds"]).to_csv(
            folder / "metrics.csv", index=False)
    runs = [compare.read_run(tmp_path / str(number)) for number in range(4)]
    assert [run["algorithm"].unique().tolist() for run in runs] == [
        ["gspo"], ["gspo"], ["gspo LEARNING_RATE=5e-5"], ["ppo KL_COEF=0.0"]]
    assert runs[0]["seconds"].tolist() == [2.0 * step for step in range(11)]
    summary = compare.summarise(pd.concat(runs), 0.8)
    assert summary["algorithm"].tolist() == ["gspo", "gspo LEARNING_RATE=5e-5", "ppo KL_COEF=0.0"]
    assert summary["runs"].tolist() == [2, 1, 1]


def test_the_table_by_hand(compare):
    """Two runs of one algorithm, one of which reached 0.8, and one run of another."""
    table = pd.concat([made_up("gspo", "a", [0.2, 0.6, 0.9]), made_up("gspo", "b", [0.3, 0.5, 0.7]),
                       made_up("dapo", "c", [0.25, 0.85], kl=False, step_time=3.0)])
    first, second = compare.summarise(table, 0.8).to_dict("records")
    assert first == {
        "algorithm": "gspo", "runs": 2,
        "sampled before": "0.250 ± 0.050", "sampled after": "0.800 ± 0.100",
        "greedy before": "0.300 ± 0.050", "greedy after": "0.850 ± 0.100",
        "reached 0.8": "1 of 2", "steps to 0.8": "17", "seconds to 0.8": "33",
        "tokens to 0.8": "1,667", "tokens": "2,000 ± 0", "seconds": "40 ± 0",
        "s per step: rollout / reward / log-probs / update": "0.25 / 0.25 / 0.25 / 1.50",
        "peak memory, GB": first["peak memory, GB"]}
    assert first["peak memory, GB"].startswith("0.2")
    assert second["reached 0.8"] == "1 of 1" and second["seconds"] == "30"
    assert second["sampled after"] == "0.850" and float(second["steps to 0.8"]) == \
        pytest.approx(10 * 0.55 / 0.6, abs=0.06)
    never = compare.summarise(table, 0.95).to_dict("records")[0]
    assert never["reached 0.95"] == "0 of 2" and never["steps to 0.95"] == "-"


def test_markdown(compare):
    table = pd.DataFrame([{"a": 1, "b": "x ± y"}, {"a": 2, "b": "-"}])
    assert compare.markdown(table) == "| a | b |\n|---|---|\n| 1 | x ± y |\n| 2 | - |"


def test_curves_are_means_over_seeds(compare):
    """Of the runs on a common grid, from the first step that all have to the last; the shade is
    their range; the label counts them."""
    table = pd.concat([made_up("gspo", "a", [0.2, 0.6, 0.8]), made_up("gspo", "b", [0.4, 0.6, 1.0]),
                       made_up("gspo", "c", [0.3, 0.6])])  # stopped half-way
    axes = Figure().subplots()
    compare.curves(axes, table, "step", "eval/accuracy")
    line, = axes.lines
    x, y = line.get_data()
    assert (x[0], x[-1]) == (0, 10) and y[0] == pytest.approx(0.3) and y[-1] == pytest.approx(0.6)
    assert line.get_label() == "gspo (3 runs)"
    edge = axes.collections[0].get_paths()[0].vertices
    assert edge[:, 1].min() == pytest.approx(0.2) and edge[:, 1].max() == pytest.approx(0.6)


@pytest.mark.parametrize("labels", [
    ["gspo", "dapo", "ppo"], ["gspo A=1", "dapo A=1", "ppo A=1"], ["grpo A=1", "dapo", "gspo"],
    ["ppo A=1", "dapo A=1", "ppo A=2", "ppo"]])
def test_an_algorithm_has_one_colour_in_all_panels(compare, labels):
    """Also in a panel that another one has no curve in (DAPO has no KL), and no two share one."""
    table = pd.concat([made_up(label, f"{label}{i}", [0.2, 0.6], kl=not label.startswith("dapo"))
                       for label in labels for i in range(2)])
    figure, colours = Figure(), []
    for axes, metric in zip(figure.subplots(1, 3), ("eval/accuracy", "kl", "reward")):
        compare.curves(axes, table, "step", metric)
        colours.append({line.get_label(): line.get_color() for line in axes.lines})
    accuracy, kl, reward = colours
    assert len(accuracy) == len(labels) and len(kl) == sum("dapo" not in x for x in labels)
    assert accuracy == reward and kl.items() <= accuracy.items()
    assert len({to_rgb(colour) for colour in accuracy.values()}) == len(labels)


def test_the_figure(compare, tmp_path, monkeypatch):
    """Accuracy against steps, tokens and seconds; five panels below; each with the curves of all
    that have the metric, and one legend."""
    table = pd.concat([made_up("gspo", "a", [0.2, 0.6]),
                       made_up("dapo", "b", [0.3, 0.7], kl=False)])
    kept = []
    monkeypatch.setattr(compare.Figure, "savefig", lambda figure, file, dpi: kept.append(figure))
    compare.draw(table, tmp_path / "figure.png")
    above, below = kept[0].subfigs
    assert [axes.lines[0].get_xdata()[-1] for axes in above.axes] == [10, 1000, 20]
    assert all(axes.get_xlabel() for axes in kept[0].axes)
    assert all(len(axes.lines) == 2 and axes.get_ylim() == (0, 1) for axes in above.axes)
    assert [len(axes.lines) for axes in below.axes] == [2, 1, 2, 2, 2]
    assert [axes.get_title() for axes in below.axes] == [
        "reward", "KL to the start, nats per token", "entropy, nats per token",
        "share of tokens cut", "length, tokens"]
    legend, = [axes.get_legend() for axes in kept[0].axes if axes.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == ["gspo (1 runs)", "dapo (1 runs)"]
