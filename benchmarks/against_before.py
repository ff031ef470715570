"""A step of one script against the same step of another, for instance of an older version.

    git show COMMIT:RL_HAND/gspo/gspo.py > before.py
    python benchmarks/against_before.py before.py RL_HAND/gspo/gspo.py
    python benchmarks/against_before.py BEFORE AFTER POLICY_MODEL=runs/gspo/epoch_2 STEPS=40

Both run in this process with the embedded profile and everything on, and take turns, a step each;
which one begins changes from pair to pair. The learning rate is 0 (AdamW runs all the same), so the
policy and with it the lengths stay what they are: those of the start, or of the checkpoint that
POLICY_MODEL names. A step ends with its row in metrics.csv; evaluations and checkpoints are left
out. The first pair is a warm-up. Further NAME=VALUE are constants of both. CPU seconds, of all
threads, say more than seconds where the machine has other work; the phases are in CPU seconds.
"""

import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from common import import_file
from tqdm.auto import tqdm


def stepper(path, constants, folder):
    """A function that makes one step of the script at `path` and returns its measures by name."""
    script = import_file(Path(path), f"{Path(path).stem}_{folder.name}")
    script.time = SimpleNamespace(**vars(time) | {"perf_counter": time.process_time})
    run = script.start(["PROFILE=embedded", "EVAL_EVERY=0", "LEARNING_RATE=0", *constants,
                        f"OUTPUT_DIR={folder}"])
    run.bar, finish, found = tqdm(disable=True), script.finish_step, {}
    run.steps_per_epoch = math.inf  # no epoch ends here: nothing is evaluated or saved

    def finish_step(run, metrics):
        found.update(metrics)
        run.total_steps = math.inf  # nor does the run
        finish(run, metrics)
        run.total_steps = run.step  # but `train` does

    script.finish_step = finish_step

    def step():
        run.total_steps = run.step + 1
        began, began_cpu = time.perf_counter(), time.process_time()
        script.train(run)
        phases = sorted(name for name in found if name.startswith("time/"))
        return {"seconds": time.perf_counter() - began,
                "CPU seconds": time.process_time() - began_cpu,
                **{name.replace("time/", "CPU seconds, "): found[name] for name in phases},
                "tokens a completion": found["completions/mean_length"]}
    return step


def main(arguments):
    """Run the benchmark and print its table."""
    paths = [argument for argument in arguments if "=" not in argument]
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    steps = int(given.pop("STEPS", 20))
    constants = [f"{name}={value}" for name, value in given.items()]
    if len(paths) != 2:
        raise SystemExit("error: expected two scripts: BEFORE AFTER [STEPS=20] [NAME=VALUE ...]")
    with tempfile.TemporaryDirectory() as folder:
        both = [stepper(path, constants, Path(folder, name))
                for path, name in zip(paths, ("before", "after"))]
        measures = [defaultdict(list), defaultdict(list)]
        for turn in tqdm(range(steps + 1), "pairs of steps"):
            for which in (0, 1) if turn % 2 else (1, 0):
                for name, value in both[which]().items():
                    if turn:
                        measures[which][name].append(value)
    print(f"\n{steps} steps each, {torch.get_num_threads()} thread(s); torch {torch.__version__}; "
          f"{' '.join(constants) or 'from the starting policy'}\n")
    print("| median of a step (quartiles) | before | after | after / before |\n|---|---|---|---|")
    for name in measures[1]:
        quartiles = [statistics.quantiles(some[name], n=4) for some in measures]
        cells = [f"{middle:.3f} ({low:.3f} to {high:.3f})" for low, middle, high in quartiles]
        print(f"| {name} | {cells[0]} | {cells[1]} | {quartiles[1][1] / quartiles[0][1]:.3f} |")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    main(sys.argv[1:])
