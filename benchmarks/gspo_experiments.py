"""The runs behind the numbers and figures of RL_HAND/gspo/README.md.

    python benchmarks/gspo_experiments.py              # run what is missing, then draw and print
    python benchmarks/gspo_experiments.py hacking      # only this experiment
    python benchmarks/gspo_experiments.py --draw       # only draw and print what is there

Each run is the script as it is, in a process of its own with one thread, two at a time, into
runs/experiments/. A run that is there and complete is not repeated. Figures go to RL_HAND/gspo/images/.
"""

import concurrent.futures
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "RL_HAND" / "gspo" / "gspo.py"
RUNS = ROOT / "runs" / "experiments"
IMAGES = ROOT / "RL_HAND" / "gspo" / "images"
WORKERS = 2

MODEL_ONLY = "REWARD_WEIGHTS={'model': 1.0}"
EXPERIMENTS = {  # experiment -> {variant: (arguments, seeds)}
    "default": {"default": ([], (0, 1, 2))},
    "advantage": {"default": ([], (0, 1, 2)),
                  "normalized": (["ADVANTAGE_TYPE=normalized"], (0, 1, 2))},
    "clip": {"default": ([], (0, 1, 2)), "clip 0.2": (["CLIP_RANGE=0.2"], (0, 1, 2))},
    "kl": {"default": ([], (0, 1, 2)), "TARGET_KL 0.01": (["TARGET_KL=0.01"], (0, 1, 2)),
           "no KL": (["KL_COEF=0"], (0, 1, 2))},
    "hacking": {"model alone, no KL": ([MODEL_ONLY, "KL_COEF=0"], (0, 1, 2)),
                "model alone, TARGET_KL 0.1": ([MODEL_ONLY], (0, 1, 2)),
                "model alone, TARGET_KL 0.01": ([MODEL_ONLY, "TARGET_KL=0.01"], (0, 1, 2)),
                "default": ([], (0, 1, 2)),
                "verifier alone": (["REWARD_WEIGHTS={'verifier': 1.0}"], (0, 1, 2))},
    "learning_rate": {"default": ([], (0, 1, 2)), "LEARNING_RATE 1e-3": (["LEARNING_RATE=1e-3"], (0, 1, 2))},
}


def folder_of(variant, seed):
    """The run folder of a variant and seed."""
    return RUNS / f"{variant.replace(' ', '_').replace(',', '')}_seed{seed}"


def complete(folder):
    """Whether a run ended: its last step is the last of its constants' steps."""
    return (folder / "complete").exists()


def run_one(variant, arguments, seed):
    """Run one variant and seed; returns an error line or None."""
    folder = folder_of(variant, seed)
    if complete(folder):
        return None
    shutil.rmtree(folder, ignore_errors=True)
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "PROFILE=embedded", f"SEED={seed}", f"OUTPUT_DIR={folder}", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if process.returncode:
        return f"{variant}, seed {seed}: {process.stderr.strip().splitlines()[-1]}"
    (folder / "complete").touch()
    return None


def run_all(chosen):
    """Run the missing runs of the chosen experiments, WORKERS at a time; the errors are printed at the end."""
    jobs = {(variant, seed): arguments for name in chosen
            for variant, (arguments, seeds) in EXPERIMENTS[name].items() for seed in seeds}
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        waiting = [pool.submit(run_one, variant, arguments, seed) for (variant, seed), arguments in jobs.items()]
        for done in tqdm(concurrent.futures.as_completed(waiting), "runs", total=len(waiting)):
            if done.result():
                tqdm.write(done.result())


def curves(variant, seeds):
    """The metrics of a variant's runs, one table with a column `seed`; empty where no run is complete."""
    tables = [pd.read_csv(folder_of(variant, seed) / "metrics.csv").assign(seed=seed)
              for seed in seeds if complete(folder_of(variant, seed))]
    return pd.concat(tables) if tables else pd.DataFrame()


def draw(name, panels):
    """One figure of an experiment: a line per variant, the mean over seeds, the seeds' range shaded.

    panels: (title, metric, logarithmic) each.
    """
    figure = Figure(figsize=(4.4 * len(panels), 3.6), layout="constrained")
    for axes, (title, metric, logarithmic) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for variant, (_, seeds) in EXPERIMENTS[name].items():
            table = curves(variant, seeds)
            if table.empty or metric not in table or table[metric].isna().all():
                continue
            column = table.dropna(subset=[metric]).groupby("step")[metric]
            if not metric.startswith("eval/"):  # a metric of every step: smooth it for the eye
                column = table[table.step > 0].assign(step=lambda t: (t.step - 1) // 10 * 10 + 5).groupby("step")[metric]
            line, = axes.plot(column.mean(), label=variant, marker="o" if metric.startswith("eval/") else "", markersize=3)
            axes.fill_between(column.min().index, column.min(), column.max(), color=line.get_color(), alpha=0.15)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if logarithmic:
            axes.set_yscale("log")
    figure.axes[0].legend(fontsize=8, frameon=False)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / f"{name}.png", dpi=110)


def draw_hacking():
    """The reward that is optimised and the true accuracy on one axis, a panel per way of being rewarded."""
    variants = EXPERIMENTS["hacking"]
    figure = Figure(figsize=(3.3 * len(variants), 3.5), layout="constrained")
    all_axes = figure.subplots(1, len(variants), sharey=True)
    for axes, (variant, (_, seeds)) in zip(all_axes, variants.items()):
        table = curves(variant, seeds)
        if table.empty:
            continue
        for metric, label in (("rewards/model", "reward model's score (training)"),
                              ("eval/accuracy", "held-out accuracy, sampled")):
            points = table.dropna(subset=[metric])
            points = points[points.step > 0] if metric == "rewards/model" else points
            if points.empty:
                continue
            every = points.assign(step=points.step // 20 * 20).groupby("step")[metric]
            line, = axes.plot(every.mean(), label=label)
            axes.fill_between(every.min().index, every.min(), every.max(), color=line.get_color(), alpha=0.15)
        axes.set_title(variant, fontsize=9.5)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.25)
    all_axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / "hacking.png", dpi=110)


def summary(name):
    """A Markdown table of an experiment: mean over seeds (standard error) at the start, the best and the end."""
    lines = ["| variant | seeds | sampled before | sampled, best | sampled, end | greedy before | greedy, end | "
             "KL, end | tokens cut, first / last 20 steps | length, end |", "|" + "---|" * 10]

    def shown(values):
        error = f" ± {values.sem():.3f}" if len(values) > 1 else ""
        return f"{values.mean():.3f}{error}"

    for variant, (_, seeds) in EXPERIMENTS[name].items():
        table = curves(variant, seeds)
        if table.empty:
            lines.append(f"| {variant} |" + " not run |" * 9)
            continue
        evaluated = table.dropna(subset=["eval/accuracy"]).groupby("seed")
        first, last = evaluated.first(), evaluated.last()
        trained = table[table.step > 0]
        final = trained[trained.step > trained.step.max() - 20].groupby("seed")
        begin = trained[trained.step <= 20].groupby("seed")
        clip = "clip_ratio/region_mean"
        lines.append(" | ".join([
            f"| {variant}", str(table.seed.nunique()), shown(first["eval/accuracy"]),
            shown(evaluated["eval/accuracy"].max()), shown(last["eval/accuracy"]),
            shown(first["eval/accuracy_greedy"]), shown(last["eval/accuracy_greedy"]), shown(final["kl"].mean()),
            f"{begin[clip].mean().mean():.4f} / {final[clip].mean().mean():.4f}",
            f"{last['eval/mean_length'].mean():.1f} |"]))
    return "\n".join(lines)


def main(arguments):
    """Run, draw, print."""
    chosen = [name for name in arguments if not name.startswith("--")] or list(EXPERIMENTS)
    unknown = set(chosen) - set(EXPERIMENTS)
    if unknown:
        raise SystemExit(f"error: no experiment {', '.join(unknown)}; expected one of {', '.join(EXPERIMENTS)}")
    if "--draw" not in arguments:
        run_all(chosen)
    accuracy = [("Held-out accuracy, sampled", "eval/accuracy", False),
                ("Held-out accuracy, greedy", "eval/accuracy_greedy", False)]
    panels = {
        "default": [*accuracy, ("KL to the start, nats per token", "kl", False),
                    ("Share of tokens cut by the clip", "clip_ratio/region_mean", False)],
        "advantage": accuracy,
        "clip": [*accuracy, ("Share of tokens cut by the clip", "clip_ratio/region_mean", True)],
        "kl": [*accuracy, ("KL to the start, nats per token", "kl", True), ("KL coefficient", "kl_coef", True)],
        "learning_rate": [*accuracy, ("KL to the start, nats per token", "kl", True),
                          ("Mean response length", "completions/mean_length", False)],
    }
    for name in chosen:
        draw_hacking() if name == "hacking" else draw(name, panels[name])
        print(f"\n{name}\n\n{summary(name)}")


if __name__ == "__main__":
    main(sys.argv[1:])
