"""Several processes under torchrun, here two on a CPU with gloo: the same run as one process makes.

The same global batch must give the same rewards, losses, gradients and weights, whatever share of
it a process has; only the first process writes; and a process that is killed ends the run with a
clear line and whole checkpoints."""

import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import torch
from conftest import ROOT, import_file, run_script
from safetensors.torch import load_file

RENAMED = import_file(ROOT / "RL_HAND" / "compare.py").RENAMED
SMALL = ["PROFILE=embedded", "DEVICE=cpu", "BATCH_SIZE=4", "GROUP_SIZE=4", "MINIBATCH=16",
         "MICRO_BATCH=4", "EVAL_QUESTIONS=6", "EVAL_EVERY=0", "MAX_STEPS=2", "SHOW_SAMPLES=1"]


def script_of(name):
    """The path of a script."""
    return ROOT / "RL_HAND" / name / f"{name}.py"


def torchrun(*arguments, script, processes=2):
    """The command that starts a script in several processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc_per_node={processes}", str(script), *map(str, arguments)]


def run_processes(*arguments, script, timeout=300):
    """Run a script in two processes; returns the finished process."""
    return subprocess.run(torchrun(*arguments, script=script), cwd=ROOT, text=True,
                          capture_output=True, timeout=timeout)


@pytest.mark.parametrize("name, extra", [
    ("gspo", ["MINIBATCH=16"]),
    ("gspo", ["USE_GROUP_NORMALIZATION=False", "USE_SEQUENCE_LEVEL_REWARD=False",
              "USE_TOKEN_LEVEL_LOSS=True", "ADVANTAGE_TYPE=normalized"]),
    ("grpo", ["AGGREGATION=token-mean"]),
    ("dapo", ["DYNAMIC_SAMPLING=False"]),
    ("ppo", ["CRITIC_WARMUP=0"]),
    ("gad", ["SEQKD_STEPS=1", "SEQKD_BATCH=8", "CRITIC_WARMUP=1", "WARMUP_BATCH=8", "MAX_STEPS=3"]),
    ("self_play", ["WATCH_QUESTIONS=4"])])
def test_two_processes_do_what_one_does(tmp_path, name, extra):
    arguments = [*SMALL, *extra]
    for shared, own in RENAMED.get(name, {}).items():  # its names for shared constants
        arguments = [re.sub(f"^{shared}=", f"{own}=", argument) for argument in arguments]
    one = run_script(*arguments, f"OUTPUT_DIR={tmp_path / 'one'}", script=script_of(name))
    two = run_processes(*arguments, f"OUTPUT_DIR={tmp_path / 'two'}", script=script_of(name))
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    assert "2 processes" in two.stdout and not (tmp_path / "two_2").exists()
    said = [done.stdout.count("held-out accuracy") for done in (one, two)]
    assert said[0] == said[1] >= 2  # only one of the two speaks
    tables = [pd.read_csv(tmp_path / folder / "metrics.csv") for folder in ("one", "two")]
    left_out = ("time", "peak_memory", "student_score", "teacher_score")  # scores have a free level
    compared = [c for c in tables[0] if not any(part in c for part in left_out)]
    assert len(compared) > 30 and tables[0]["loss"].notna().sum() == 2
    pd.testing.assert_frame_equal(*(t[compared] for t in tables), rtol=2e-3, atol=2e-5)
    weights = [load_file(max((tmp_path / folder).glob("[!.]*/model.safetensors"),
                             key=os.path.getmtime)) for folder in ("one", "two")]
    start = load_file(ROOT / "data" / "policy" / "model.safetensors")
    moved = max((weights[0][key] - start[key]).abs().max() for key in start if key in weights[0])
    apart = max((weights[0][key] - weights[1][key]).abs().max() for key in weights[0])
    assert apart < 0.05 * moved  # AdamW's first steps divide by gradients that are nearly nothing


def test_dynamic_sampling_fills_every_share(tmp_path):
    done = run_processes(*SMALL, "MAX_SAMPLING_ROUNDS=2", f"OUTPUT_DIR={tmp_path / 'run'}",
                         script=script_of("dapo"))
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "run" / "metrics.csv").iloc[1:]
    assert (table["dynamic/groups"] == 4).all() and (table["dynamic/questions"] >= 4).all()


def test_a_run_of_two_processes_resumes(tmp_path):
    done = run_processes(*SMALL, "SAVE_EVERY=1", f"OUTPUT_DIR={tmp_path / 'whole'}",
                         script=script_of("gspo"))
    assert done.returncode == 0, done.stderr
    done = run_processes(f"RESUME_FROM={tmp_path / 'whole' / 'step_1'}",
                         f"OUTPUT_DIR={tmp_path / 'rest'}", script=script_of("gspo"))
    assert done.returncode == 0, done.stderr
    one, other = (load_file(tmp_path / folder / "step_2" / "model.safetensors")
                  for folder in ("whole", "rest"))
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


@pytest.mark.parametrize("setting, words", [
    ("BATCH_SIZE=3", "BATCH_SIZE=3 cannot be shared by 2 processes; expected a multiple"),
    ("MINIBATCH=4", "MINIBATCH=4 makes 2 completions in each of 2 processes; expected whole")])
def test_what_cannot_be_shared_is_one_line(tmp_path, setting, words):
    done = run_processes(*SMALL, "GROUP_SIZE=4", "MINIBATCH=12" if "BATCH" in setting[:5] else
                         "SEED=0", setting, f"OUTPUT_DIR={tmp_path / 'run'}",
                         script=script_of("gspo"))
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and words in lines[0]


def test_a_killed_process_ends_the_run_and_leaves_whole_checkpoints(tmp_path):
    folder = tmp_path / "run"
    command = torchrun(*SMALL, "MAX_STEPS=0", "NUM_EPOCHS=9", "SAVE_EVERY=1", "EVAL_EVERY=0",
                       f"OUTPUT_DIR={folder}", script=script_of("gspo"))
    with open(tmp_path / "log", "w") as log:
        running = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True)
        until = time.time() + 120
        while not (folder / "step_2").exists() and time.time() < until:
            time.sleep(0.2)
        assert (folder / "step_2").exists(), (tmp_path / "log").read_text()
        workers = [child.pid for child in psutil.Process(running.pid).children()
                   if any("gspo.py" in word for word in child.cmdline())]
        assert len(workers) == 2
        os.kill(max(workers), signal.SIGKILL)
        assert running.wait(timeout=60) != 0
    said = (tmp_path / "log").read_text()
    assert re.search(r"(stopped at step \d+|another process of this run has ended).*"
                     r"RESUME_FROM goes on from one of .*step_2", said), said
    for checkpoint in folder.glob("step_*"):
        assert load_file(checkpoint / "model.safetensors")
        assert (checkpoint / "trainer_state.json").exists()
