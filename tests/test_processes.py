"""Several processes, here two on a CPU with gloo: the same run as one process makes.

The same global batch must give the same rewards, losses, gradients and weights, whatever share of
it a process has; only the first process writes; Ctrl-C in one is Ctrl-C in all; and a process that
is killed ends the run with a clear line and whole checkpoints. torchrun itself is started once:
what it gives to its processes are environment variables."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import torch
from conftest import ROOT, SCRIPT, fork, import_file
from safetensors.torch import load_file

RENAMED = import_file(ROOT / "RL_HAND" / "compare.py").RENAMED
SMALL = ["PROFILE=embedded", "DEVICE=cpu", "BATCH_SIZE=4", "GROUP_SIZE=4", "MINIBATCH=16",
         "MICRO_BATCH=4", "EVAL_QUESTIONS=6", "EVAL_EVERY=0", "MAX_STEPS=2", "SHOW_SAMPLES=1"]


def script_of(name):
    """The path of a script."""
    return SCRIPT if name == "gspo" else ROOT / "RL_HAND" / name / f"{name}.py"


def run_share(script, arguments, environment):
    """Run a script as one process of several, or alone. No plot: it is slow."""
    os.environ |= environment
    module = import_file(script, "script_of_a_process")
    module.plot_metrics = lambda run: None
    module.main(list(map(str, arguments)))


def run_share_that_fails(script, arguments, environment):
    """The same, where it ends with an error, and the first process is still busy saving what is
    trained when the second one begins to."""
    save, sleep = torch.save, time.sleep
    time.sleep = lambda seconds: None  # in which the second process lets the first one speak

    def slow_save(*given):
        sleep(2.0 * (environment["RANK"] == "0"))
        save(*given)

    torch.save = slow_save
    try:
        run_share(script, arguments, environment)
    except SystemExit as stop:
        print(stop.code, file=sys.stderr)
        raise


def processes_of(script, arguments, log, count=2, function=run_share):
    """Start `count` processes that run a script together, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [fork(function, f"{log}.{i}", script, arguments,
                 shared | {"RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(count)]


def run_processes(*arguments, script, log, count=2):
    """Run a script in so many processes, all of which must end well; returns what they printed."""
    running = processes_of(script, arguments, log, count)
    for process in running:
        process.join(300)
    said = [open(f"{log}.{i}").read() for i in range(count)]
    assert [process.exitcode for process in running] == [0] * count, "".join(said)
    return said


@pytest.mark.parametrize("name, extra", [
    ("gspo", []),
    ("gspo", ["USE_SEQUENCE_LEVEL_REWARD=False", "USE_TOKEN_LEVEL_LOSS=True",
              "ADVANTAGE_TYPE=normalized"]),
    ("grpo", ["AGGREGATION=token-mean"]),
    ("dapo", ["DYNAMIC_SAMPLING=False"]),
    ("reinforce", []), ("cispo", []),
    ("ppo", ["CRITIC_WARMUP=0"]),
    ("gad", ["SEQKD_STEPS=1", "SEQKD_BATCH=8", "CRITIC_WARMUP=1", "WARMUP_BATCH=8", "MAX_STEPS=3"]),
    ("self_play", ["WATCH_QUESTIONS=4"])])
def test_two_processes_do_what_one_does(tmp_path, name, extra):
    arguments = [*SMALL, *extra]
    for shared, own in RENAMED.get(name, {}).items():  # its names for shared constants
        arguments = [re.sub(f"^{shared}=", f"{own}=", argument) for argument in arguments]
    said = [run_processes(*arguments, f"OUTPUT_DIR={tmp_path / folder}", script=script_of(name),
                          log=tmp_path / f"{folder}_log", count=count)
            for folder, count in (("one", 1), ("two", 2))]
    assert not (tmp_path / "two_2").exists()
    count = said[0][0].count("held-out accuracy")
    assert [text.count("held-out accuracy") for text in said[1]] == [count, 0] and count >= 2
    assert not said[1][1].strip()  # only one of the two speaks
    assert re.search(r"  steps .*processes\W+2$", said[1][0], re.MULTILINE)
    tables = [pd.read_csv(tmp_path / folder / "metrics.csv") for folder in ("one", "two")]
    # The discriminator's scores have a free level; its gradient is measured before it is averaged.
    left_out = ("time", "student_score", "teacher_score", "d_grad_norm")
    compared = [c for c in tables[0] if not any(part in c for part in left_out)]
    assert len(compared) > 20 and tables[0]["loss"].notna().sum() == 2
    pd.testing.assert_frame_equal(*(t[compared] for t in tables), rtol=2e-3, atol=2e-5)
    weights = [load_file(max((tmp_path / folder).glob("[!.]*/model.safetensors"),
                             key=os.path.getmtime)) for folder in ("one", "two")]
    start = load_file(ROOT / "data" / "policy" / "model.safetensors")
    moved = max((weights[0][key] - start[key]).abs().max() for key in start if key in weights[0])
    apart = max((weights[0][key] - weights[1][key]).abs().max() for key in weights[0])
    assert apart < 0.05 * moved  # AdamW's first steps divide by gradients that are nearly nothing


def test_the_gradient_is_the_mean_of_all_processes(gspo, monkeypatch):
    """Each has the mean over its share of a minibatch, shares are equal: their mean is the
    minibatch's. (One process's alone would do nearly the same under AdamW: here it is plain
    descent.) The clipping comes after it."""
    gspo.processes, gspo.MAX_GRAD_NORM, gspo.WARMUP_STEPS, gspo.DEVICE = 2, 0.0, 0, "cpu"
    others = torch.tensor([3.0, -1.0])  # of the other process, divided by two already
    monkeypatch.setattr(gspo, "dist", SimpleNamespace(
        all_reduce=lambda gradient, **options: gradient.add_(others / 2)))
    for gspo.MAX_GRAD_NORM, expected in ((0.0, [-2.5, 1.0]), (0.5, None)):
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        optimizer.param_groups[0]["initial_lr"] = 1.0
        run = SimpleNamespace(step=1, trained={"policy": (None, optimizer)}, folder="")
        weight.grad = torch.tensor([2.0, -1.0])
        meter = SimpleNamespace(add=lambda values, *_: None)
        gspo.optimiser_step(run, "policy", meter)
        mean = -(torch.tensor([2.0, -1.0]) + others) / 2
        expected = mean if not gspo.MAX_GRAD_NORM else 0.5 * mean / mean.norm()
        torch.testing.assert_close(weight.detach(), expected)


def test_dynamic_sampling_fills_every_share(tmp_path):
    run_processes(*SMALL, "MAX_SAMPLING_ROUNDS=2", f"OUTPUT_DIR={tmp_path / 'run'}",
                  script=script_of("dapo"), log=tmp_path / "log")
    table = pd.read_csv(tmp_path / "run" / "metrics.csv").iloc[1:]
    assert (table["dynamic/groups"] == 4).all() and (table["dynamic/questions"] >= 4).all()


def test_ctrl_c_in_one_process_stops_all_at_the_same_step_and_they_resume(tmp_path):
    """All finish that step, the first saves it, and all end: none waits for another. The checkpoint
    goes on as an uninterrupted run does."""
    folder, log = tmp_path / "run", tmp_path / "log"
    running = processes_of(script_of("gspo"), [*SMALL, "MAX_STEPS=100", f"OUTPUT_DIR={folder}"],
                           log)
    until = time.monotonic() + 120
    while not (folder / "metrics.csv").exists() or len(pd.read_csv(folder / "metrics.csv")) < 2:
        assert time.monotonic() < until and all(process.is_alive() for process in running)
        time.sleep(0.05)
    os.kill(running[1].pid, signal.SIGINT)
    for process in running:
        process.join(120)
    said = "".join(open(f"{log}.{i}").read() for i in (0, 1))
    assert running[1].exitcode == 130 and running[0].exitcode in (0, 130), said
    assert "Traceback" not in said and "error" not in said
    last = int(pd.read_csv(folder / "metrics.csv")["step"].iloc[-1])
    assert 1 <= last < 100 and (folder / f"step_{last}" / "model.safetensors").exists()
    for name, rest in (("rest", [f"RESUME_FROM={folder / f'step_{last}'}"]), ("whole", SMALL)):
        run_processes(*rest, f"MAX_STEPS={last + 1}", f"OUTPUT_DIR={tmp_path / name}",
                      script=script_of("gspo"), log=tmp_path / f"{name}_log")
    one, other = (load_file(tmp_path / name / f"step_{last + 1}" / "model.safetensors")
                  for name in ("rest", "whole"))
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


def test_what_is_trained_is_saved_when_all_fail_at_once(tmp_path):
    """A judge that answers nobody any more ends every process: none spoils what another saves."""
    folder, log = tmp_path / "run", tmp_path / "log"
    (tmp_path / "judge.py").write_text(
        "calls = 0\n"
        "def score(questions, responses, references):\n"
        "    global calls\n"
        "    calls += 1\n"  # tried; in the evaluation of step 0; in step 1; in step 2
        "    return [0.5] * (0 if calls == 4 else len(responses))\n")
    running = processes_of(script_of("gspo"), [
        *SMALL, "REWARD_WEIGHTS={'function': 1.0}", f"OUTPUT_DIR={folder}",
        f"REWARD_FUNCTION={tmp_path / 'judge.py'}:score"], log, function=run_share_that_fails)
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [1, 1]
    for i in (0, 1):
        said = open(f"{log}.{i}").read()
        assert "Traceback" not in said and said.splitlines()[-1] == (
            "error: the reward source 'function': it returned 0: []; expected 8 finite numbers; "
            f"go on with RESUME_FROM={folder / 'step_1'}")
    assert {path.name for path in folder.iterdir()} == {"epoch_0", "step_1", "metrics.csv",
                                                        "judge.py"}
    assert load_file(folder / "step_1" / "model.safetensors")
    assert torch.load(folder / "step_1" / "policy_optimizer.pt", weights_only=True)
    assert json.loads((folder / "step_1" / "trainer_state.json").read_text())["step"] == 1


@pytest.mark.parametrize("setting, words", [
    (["BATCH_SIZE=3"], "BATCH_SIZE % processes == MINIBATCH % processes == 0"),
    (["GROUP_SIZE=6", "MINIBATCH=8"], "MINIBATCH // processes % GROUP_SIZE == 0"),
    (["MINIBATCH=1"], "MINIBATCH % processes"),
    (["USE_GROUP_NORMALIZATION=False"], "USE_GROUP_NORMALIZATION or processes == 1")])
def test_what_cannot_be_shared_is_one_line(gspo, setting, words):
    """What a process cannot do alone, two cannot do; a process by itself could do most of it."""
    gspo.processes = 2
    with pytest.raises(SystemExit) as stop:
        gspo.configure([*SMALL, "MINIBATCH=12" if setting == ["BATCH_SIZE=3"] else "SEED=0",
                        *setting])
    line = stop.value.code
    assert line.startswith("error: ") and "\n" not in line
    assert words in line and setting[0].partition("=")[0] in line
    gspo.configure(SMALL)


def test_a_killed_process_ends_the_run_and_leaves_whole_checkpoints(tmp_path):
    """Under torchrun, as users start it."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(script_of("gspo")), *SMALL, "MAX_STEPS=0", "NUM_EPOCHS=9", "SAVE_EVERY=1",
               f"OUTPUT_DIR={folder}"]
    with open(tmp_path / "log", "w") as log:
        running = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True)
        until = time.time() + 120
        while not (folder / "step_2").exists() and time.time() < until:
            time.sleep(0.2)
        assert (folder / "step_2").exists(), (tmp_path / "log").read_text()
        workers = [child.pid for child in psutil.Process(running.pid).children()
                   if any(script_of("gspo").name in word for word in child.cmdline())]
        assert len(workers) == 2
        os.kill(max(workers), signal.SIGKILL)
        assert running.wait(timeout=60) != 0
    said = (tmp_path / "log").read_text()
    assert re.search("error: another process of this run has ended.*RESUME_FROM.*"
                     + re.escape(str(folder)), said), said
    for checkpoint in folder.glob("step_*"):
        assert load_file(checkpoint / "model.safetensors")
        assert (checkpoint / "trainer_state.json").exists()
