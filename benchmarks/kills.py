"""Runs that are killed and resumed, or started two at once, against a run that nobody disturbed.

    python benchmarks/kills.py [KILLS=20] [SAVING=5] [PAIRS=10] [SEED=0]

A short run of gspo.py, which saves a checkpoint after each step, is killed (kill -9; on Windows
TerminateProcess) at a random moment between start and end; SAVING times while a checkpoint is
written: its temporary folder is seen, and still there when the process is gone. It is resumed from
its last whole checkpoint, or started anew; then metrics.csv, all but the seconds, and the bytes of
the final weights are compared with those of a run that went through. PAIRS times two runs are
started at the same instant into one OUTPUT_DIR: both must be equal to it. Else exit status 1.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pandas as pd
from common import ROOT, facts
from tqdm.auto import tqdm

STEPS = 10
RUN = [sys.executable, str(ROOT / "RL_HAND" / "gspo" / "gspo.py"), "PROFILE=embedded",
       "BATCH_SIZE=2", "MINIBATCH=8", "MICRO_BATCH=8", "EVAL_QUESTIONS=16", "EVAL_EVERY=4",
       f"MAX_STEPS={STEPS}", "SAVE_EVERY=1", "LEARNING_RATE=1e-3", "WARMUP_STEPS=5"]
MOMENTS = ["before the run's folder is there", "before the first whole checkpoint",
           "between two checkpoints", "while a checkpoint is written"]


def begin(folder, *arguments):
    """Start a run into a folder."""
    return subprocess.Popen([*RUN, f"OUTPUT_DIR={folder}", *arguments], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)


def outcome(process, folder):
    """Wait for a run: its metrics but for the seconds, and its final weights; None: it failed."""
    said = process.communicate()[1]
    if process.returncode:
        return tqdm.write(said.decode("utf-8", "replace")[-1000:])
    table = pd.read_csv(folder / "metrics.csv", dtype=str).filter(regex="^(?!time/|step_time)")
    return table.to_csv(), (folder / f"step_{STEPS}" / "model.safetensors").read_bytes()


def checkpoints(folder):
    """The whole checkpoints of a run to go on from, the last one last."""
    steps = {json.loads(file.read_text(encoding="utf-8"))["step"]: file.parent
             for file in folder.glob("[!.]*/trainer_state.json")}
    return [steps[step] for step in sorted(steps)]


def kill(folder, seconds, aimed):
    """Start a run, kill it, `aimed` at a checkpoint: at which of MOMENTS; None: it was over."""
    process = begin(folder)
    after, wait = random.randrange(STEPS), random.uniform(0, 0.03 if aimed else seconds)
    while aimed and process.poll() is None and not (
            list(folder.glob(".*.partial")) and len(checkpoints(folder)) >= after):
        time.sleep(0.001)
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=wait)
        return None
    process.kill()
    process.communicate()
    over = (folder / f"step_{STEPS}").exists()  # all is saved: nothing to go on with
    return None if over else MOMENTS[3 if list(folder.glob(".*.partial")) else
                                     2 if checkpoints(folder) else folder.exists()]


def main(arguments):
    """Kill, resume, compare; print a table."""
    given = {"KILLS": 20, "SAVING": 5, "PAIRS": 10, "SEED": 0}
    given |= {name: int(value) for name, value in (one.split("=") for one in arguments)}
    random.seed(given["SEED"])
    kills, resumed, equal, fine = Counter(), Counter(), Counter(), 0
    with tempfile.TemporaryDirectory() as work:
        one, began = Path(work, "run"), time.perf_counter()
        whole = outcome(begin(one), one) or sys.exit(1)
        seconds = time.perf_counter() - began
    while kills.total() < given["KILLS"] or kills[MOMENTS[3]] < given["SAVING"]:
        with tempfile.TemporaryDirectory() as work:
            one, other = Path(work, "run"), Path(work, "resumed")
            if moment := kill(one, seconds, kills[MOMENTS[3]] < given["SAVING"]):
                last = [f"RESUME_FROM={folder}" for folder in checkpoints(one)[-1:]]
                kills[moment] += 1
                resumed[moment] += len(last)
                equal[moment] += outcome(begin(other, *last), other) == whole
                tqdm.write(f"{kills.total()} kills, {equal.total()} equal; the last {moment}")
    for _ in tqdm(range(given["PAIRS"]), "pairs"):
        with tempfile.TemporaryDirectory() as work:
            both = [(begin(Path(work, "run")), Path(work, name)) for name in ("run", "run_2")]
            fine += sum(outcome(*each) == whole for each in both)
    print(f"\n{facts('cpu')}; a run of {STEPS} steps takes {seconds:.0f} s\n\n"
          "| killed | kills | resumed | started anew | equal to the undisturbed run |\n"
          "|---|---|---|---|---|")
    for name, some in [*((moment, [moment]) for moment in MOMENTS), ("in all", MOMENTS)]:
        count, gone_on, same = (sum(each[moment] for moment in some)
                                for each in (kills, resumed, equal))
        print(f"| {name} | {count} | {gone_on} | {count - gone_on} | {same} |")
    print(f"\n{given['PAIRS']} times two at once: {fine} of {2 * given['PAIRS']} runs are equal")
    raise SystemExit(equal != kills or fine != 2 * given["PAIRS"])


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    main(sys.argv[1:])
