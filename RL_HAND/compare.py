"""Run algorithms side by side and show what their differences do: one figure, one table.

    python RL_HAND/compare.py gspo grpo dapo ppo self_play SEEDS=3       # each script, each seed
    python RL_HAND/compare.py gspo grpo SEEDS=5 LEARNING_RATE=5e-5       # constants for all of them
    python RL_HAND/compare.py --runs runs/gspo runs/gspo_2 runs/grpo     # runs that exist, grouped
                                            # by script and by what was set on their command lines

Each run is the script as it is, in a process of its own, all with the same constants and the seeds
0 ... SEEDS-1. A run that is complete is not repeated: start the same command again after a crash.
A run that fails is reported, and the rest carried on (exit status 1). Written to OUTPUT:
comparison.png, comparison.md, comparison.csv. Its own options, beside the scripts' constants:

    SEEDS=3              seeds per algorithm
    OUTPUT=runs/compare  a folder for one compare.py at a time
    WORKERS=0            runs at a time; 0: one per CPU core, or one where there is a GPU
    TARGET=0.8           the held-out accuracy to which steps, tokens and seconds are counted
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
COLOURS = {"gspo": "#1f77b4", "grpo": "#ff7f0e", "dapo": "#2ca02c", "ppo": "#d62728",
           "gad": "#9467bd", "self_play": "#8c564b", "reinforce": "#7f7f7f", "gmpo": "#e377c2",
           "cispo": "#bcbd22", "moe": "#17becf"}
RENAMED = {"self_play": {"BATCH_SIZE": "TRAIN_BATCH_SIZE", "GROUP_SIZE": "ROLLOUT_N",
                         "TEMPERATURE": "ROLLOUT_TEMPERATURE", "MAX_STEPS": "SELF_PLAY_ROUNDS",
                         "REWARD_FUNCTION": "REWARD_FUNC"}}  # tools/sync.py reads it here


def fail(message):
    """Stop with one line on standard error and exit status 1."""
    raise SystemExit(f"error: {message}")


def parse(arguments):
    """The command line as (options, script names, run folders, constants for the scripts)."""
    options = {"SEEDS": 3, "OUTPUT": "runs/compare", "WORKERS": 0, "TARGET": 0.8}
    names, folders, constants = [], [], []
    if "--runs" in arguments:
        at = arguments.index("--runs")
        folders = [os.path.expanduser(a) for a in arguments[at + 1:] if "=" not in a]
        arguments = arguments[:at] + [a for a in arguments[at + 1:] if "=" in a]
        if not folders:
            fail("--runs: found no folder behind it; expected run folders, such as runs/gspo")
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            names.append(argument)
        elif name in options:
            try:
                options[name] = type(options[name])(value)
            except ValueError:
                fail(f"{argument}: expected a {type(options[name]).__name__}")
        elif name in ("SEED", "OUTPUT_DIR"):
            fail(f"{argument}: compare.py sets it; expected SEEDS=<number> or OUTPUT=<folder>")
        else:
            constants.append(argument)
    known = sorted(p.parent.name for p in HERE.glob("*/*.py") if p.stem == p.parent.name)
    for name in names:
        if name not in known:
            fail(f"{name!r} is no script; expected some of {', '.join(known)}")
    if bool(names) == bool(folders):
        fail(f"expected scripts ({', '.join(known)}) or --runs FOLDER ...; see compare.py --help")
    if folders and constants:
        fail(f"{constants[0]}: runs that exist keep their constants; expected none behind --runs")
    if options["SEEDS"] < 1 or options["WORKERS"] < 0:
        fail("expected SEEDS=1 or more and WORKERS=0 or more")
    options["OUTPUT"] = Path(os.path.expanduser(options["OUTPUT"])).absolute()
    return options, list(dict.fromkeys(names)), folders, constants


# ============================================ Running ===========================================


def constants_of(folder):
    """What a run's folder says of the run, or None: constants.json of its first checkpoint."""
    files = sorted(folder.glob("[!.]*/constants.json"), key=os.path.getmtime)
    return json.loads(files[0].read_text(encoding="utf-8")) if files else None


def log_of(folder):
    """Where what a run printed is kept."""
    return folder.with_name(f"{folder.name}.log")


def progress_of(folder):
    """(steps done, steps in all) by the last bar in a run's log, or (0, 0). Not by metrics.csv: on
    Windows a run could not replace it while it is read here, and would end."""
    log = log_of(folder)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    bars = re.findall(r"(\d+)/(\d+) \[[^]\n]*step", text)
    return tuple(map(int, bars[-1])) if bars else (0, 0)


@contextlib.contextmanager
def claimed(output):
    """Lock OUTPUT; one line where that, or a file in it, fails. Runs have the lock as their stdin,
    so it holds to the end of the last one, should compare.py be killed. On Windows no lock is
    needed: a file that is open cannot be deleted."""
    windows, file = sys.platform == "win32", output / ".lock"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if windows:
            file.unlink(missing_ok=True)
        with file.open("x+b" if windows else "a+b") as lock:
            if not windows:
                import fcntl
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield lock
    except OSError as error:
        fail(f"OUTPUT={output}: {error}; expected a folder to write to that nothing else uses: no "
             "other compare.py, no run that one left behind, no program that has a file open")


def is_complete(folder, wanted):
    """Whether the folder holds the finished run of the given command-line constants."""
    facts = constants_of(folder)
    if facts and facts["command"][1:] != wanted:
        fail(f"{folder} holds a run with other settings ({' '.join(facts['command'][1:])}); "
             f"expected {' '.join(wanted)}: choose another OUTPUT, or delete it")
    return bool(facts) and (folder / "finished").exists()


def jobs_of(options, names, constants):
    """The runs to be made, seed by seed: (script name, folder, its command line)."""
    return [(name, options["OUTPUT"] / f"{name}_seed{seed}",
             [f"SEED={seed}", *(in_words_of(name, constant) for constant in constants)])
            for seed in range(options["SEEDS"]) for name in names]


def in_words_of(script, constant):
    """NAME=VALUE with the name that the script has for that constant."""
    name, equals, value = constant.partition("=")
    return RENAMED.get(script, {}).get(name, name) + equals + value


def run_all(options, jobs, lock, ended_as=lambda folder, failure: None):
    """Run what is missing; returns the complete runs' folders and the failures, a line each.
    ended_as: called of each run as it ends, with "" or the line of its failure."""
    try:
        import torch
    except ImportError:
        fail("PyTorch is missing; expected the packages of requirements.txt")
    cores = os.cpu_count() or 1
    workers = options["WORKERS"] or (1 if torch.cuda.is_available() else cores)
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // workers)),
                        "PYTHONIOENCODING": "utf-8:replace"}  # logs, whatever the terminal is
    jobs = [(name, folder, [f"OUTPUT_DIR={folder}", *words]) for name, folder, words in jobs]
    waiting = [job for job in jobs if not is_complete(*job[1:])]
    for _, folder, _ in waiting:  # before any is started: what is open on Windows stops it
        log_of(folder).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
    running, folders, failures = [], [folder for _, folder, _ in jobs], []
    with (tqdm(unit="step", desc=f"{len(folders)} runs", ncols=100) as bar,
          contextlib.ExitStack() as ended, contextlib.ExitStack() as stopped):
        while waiting or running:
            while waiting and len(running) < workers:
                name, folder, arguments = waiting.pop(0)
                command = [sys.executable, str(HERE / name / f"{name}.py"), *arguments]
                with log_of(folder).open("wb") as log:
                    process = subprocess.Popen(command, stdin=lock, stdout=log, stderr=log, env=env)
                stopped.callback(process.terminate)  # at Ctrl-C, an error: no run goes on alone
                ended.callback(process.wait)
                running.append((process, folder))
            time.sleep(0.5)
            for process, folder in list(running):
                if (status := process.poll()) is not None:
                    running.remove((process, folder))
                    if status == 0:
                        (folder / "finished").touch()
                    else:
                        text = log_of(folder).read_text(encoding="utf-8", errors="replace").strip()
                        said = re.findall("^error: .*", text, re.MULTILINE) or text.split("\n")
                        failures.append(f"{folder.name} failed (status {status}): {said[-1]}")
                        bar.write(failures[-1])
                    ended_as(folder, failures[-1] if status else "")
            done, planned = zip(*map(progress_of, folders))
            known = [total for total in planned if total]
            bar.total = round(len(folders) * np.mean(known)) if known else None
            bar.n = sum(done)
            bar.refresh()
    return [folder for folder in folders if (folder / "finished").exists()], failures


# ============================================ Reading ===========================================


def label_of(facts):
    """What a run is called: its script, and what was set on its command line but for the seed."""
    unsaid = ("SEED", "OUTPUT_DIR", "RESUME_FROM")
    settings = [a for a in facts["command"][1:] if a.split("=")[0] not in unsaid]
    return " ".join([facts["script"], *settings])


def read_run(folder):
    """A run's metrics as a table with columns `algorithm`, `folder`, `seconds` (of training)."""
    facts = constants_of(folder)
    if facts is None or not (folder / "metrics.csv").exists():
        fail(f"{folder} is no run folder; expected one with metrics.csv and a checkpoint")
    table = pd.read_csv(folder / "metrics.csv")
    return table.assign(algorithm=label_of(facts), folder=str(folder),
                        seconds=table["step_time"].fillna(0).cumsum())


def mean_and_error(values, digits=3):
    """'0.912 ± 0.004' of a list: the mean and its standard error, if there are several."""
    values = [v for v in values if v is not None and not math.isnan(v)]
    if not values:
        return "-"
    digits = digits if abs(np.mean(values)) < 10 else 0
    text = f"{np.mean(values):,.{digits}f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):,.{digits}f}"
    return text


def reached(run, target, column):
    """Where `column` stood when the sampled held-out accuracy first reached the target,
    interpolated between evaluations; NaN if it never did."""
    points = run.dropna(subset=["eval/accuracy"])
    accuracy, place = points["eval/accuracy"].to_numpy(), points[column].to_numpy()
    above = np.flatnonzero(accuracy >= target)
    if not len(above):
        return math.nan
    i = above[0]
    if i == 0:
        return float(place[0])
    share = (target - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
    return float(place[i - 1] + share * (place[i] - place[i - 1]))


def summarise(table, target):
    """One row per algorithm: text of mean ± standard error over its runs."""
    rows = []
    for algorithm, runs in table.groupby("algorithm", sort=False):
        runs = [run for _, run in runs.groupby("folder")]
        evaluated = [run.dropna(subset=["eval/accuracy"]) for run in runs]
        trained = [run[run.step > 0] for run in runs]

        def over(values):
            return mean_and_error([float(v) for v in values])

        phases = " / ".join(f"{np.mean([run[f'time/{p}'].mean() for run in trained]):.2f}"
                            for p in ("rollout", "reward", "logps", "update"))
        reach = [reached(run, target, "step") for run in runs]
        rows.append({
            "algorithm": algorithm, "runs": len(runs),
            "sampled before": over(e["eval/accuracy"].iloc[0] for e in evaluated),
            "sampled after": over(e["eval/accuracy"].iloc[-1] for e in evaluated),
            "greedy before": over(e["eval/accuracy_greedy"].iloc[0] for e in evaluated),
            "greedy after": over(e["eval/accuracy_greedy"].iloc[-1] for e in evaluated),
            f"reached {target}": f"{np.isfinite(reach).sum()} of {len(runs)}",
            f"steps to {target}": over(reach),
            f"seconds to {target}": over(reached(run, target, "seconds") for run in runs),
            f"tokens to {target}": over(reached(run, target, "num_tokens") for run in runs),
            "tokens": over(run["num_tokens"].iloc[-1] for run in runs),
            "seconds": over(run["seconds"].iloc[-1] for run in runs),
            "s per step: rollout / reward / log-probs / update": phases,
            "peak memory, GB": over(run["peak_memory"].max() for run in trained
                                    if "peak_memory" in run),  # it is a GPU's
        })
    return pd.DataFrame(rows)


def noise(table):
    """Differences of the final sampled accuracy, and which exceed twice their standard error."""
    evaluated = table.dropna(subset=["eval/accuracy"])
    final = {algorithm: runs.groupby("folder")["eval/accuracy"].last()
             for algorithm, runs in evaluated.groupby("algorithm", sort=False)}
    lines, names = [], list(final)
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            gap = final[a].mean() - final[b].mean()
            if min(len(final[a]), len(final[b])) < 2:
                lines.append(f"{a} - {b}: {gap:+.3f}, one seed only: no error known")
                continue
            error = math.sqrt(final[a].var() / len(final[a]) + final[b].var() / len(final[b]))
            verdict = "within noise" if abs(gap) <= 2 * error else "more than noise"
            lines.append(f"{a} - {b}: {gap:+.3f} ± {error:.3f}, {verdict}")
    return lines


def markdown(table):
    """A table as Markdown."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in table.to_numpy()])


# ============================================ Drawing ===========================================


def draw(table, file):
    """The figure: accuracy by steps, tokens and seconds above; reward, KL, entropy, clipping and
    length by steps below. Lines are means over seeds, shades the seeds' range."""
    figure = Figure(figsize=(15, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    for axes, (x, label) in zip(above.subplots(1, 3, sharey=True), (
            ("step", "steps (a rollout and its updates)"),
            ("num_tokens", "completion tokens sampled"),
            ("seconds", "seconds of training"))):
        curves(axes, table, x, "eval/accuracy")
        axes.set_xlabel(label)
        axes.set_ylim(0, 1)
    above.axes[0].set_ylabel("held-out accuracy, sampled at T = 1")
    above.axes[0].legend(frameon=False, fontsize=11, loc="lower right")
    for axes, (metric, title) in zip(below.subplots(1, 5), (
            ("reward", "reward"), ("kl", "KL to the start, nats per token"),
            ("entropy", "entropy, nats per token"),
            ("clip_ratio/region_mean", "share of tokens cut"),
            ("completions/mean_length", "length, tokens"))):
        curves(axes, table[table.step > 0], "step", metric)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step")
        if metric.startswith("clip"):
            axes.set_yscale("symlog", linthresh=1e-3)
            axes.set_ylim(0, 1)
    figure.savefig(file, dpi=120)


def curves(axes, table, x, metric):
    """Draw one metric of every algorithm over x, averaged over seeds on a common grid."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for i, (algorithm, runs) in enumerate(table.groupby("algorithm", sort=False)):
        runs = [run.dropna(subset=[metric]) for _, run in runs.groupby("folder")] \
            if metric in table else []
        runs = [run for run in runs if len(run) > 1]
        if not runs:
            continue
        if not metric.startswith("eval/"):  # every step has a value: smooth it for the eye
            runs = [run.assign(**{metric: run[metric].rolling(7, 1, center=True).mean()})
                    for run in runs]
        first, last = max(run[x].iloc[0] for run in runs), min(run[x].iloc[-1] for run in runs)
        grid = np.linspace(first, last, 100)
        values = np.stack([np.interp(grid, run[x], run[metric]) for run in runs])
        colour = COLOURS.get(algorithm, f"C{i + 4}")
        line, = axes.plot(grid, values.mean(0), color=colour, linewidth=2,
                          label=f"{algorithm} ({len(runs)} runs)")
        axes.fill_between(grid, values.min(0), values.max(0), color=line.get_color(), alpha=0.15,
                          linewidth=0)


def main(arguments):
    """`python compare.py SCRIPT ... [NAME=VALUE ...]` or `python compare.py --runs FOLDER ...`"""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    options, names, folders, constants = parse(arguments)
    output, failures = options["OUTPUT"], []
    runs = [read_run(Path(folder)) for folder in folders]
    with claimed(output) as lock:
        if names:
            folders, failures = run_all(options, jobs_of(options, names, constants), lock)
            runs = [read_run(folder) for folder in folders]
        if not runs:
            fail(f"no run is complete; the logs are in {output}")
        table = pd.concat(runs)
        summary = summarise(table, options["TARGET"])
        draw(table, output / "comparison.png")
        summary.to_csv(output / "comparison.csv", index=False)
        text = markdown(summary)
        if differences := noise(table):
            text += "\n\nFinal sampled accuracy, differences:\n\n- " + "\n- ".join(differences)
        (output / "comparison.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nin {output}: comparison.png, comparison.md, comparison.csv")
    sys.stderr.write("".join(f"{failure}\n" for failure in failures))
    return 1 if failures else 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))  # the runs are stopped on the way
    sys.exit(main(sys.argv[1:]))
