"""The runs behind the numbers and figures of the READMEs.

    python benchmarks/experiments.py             # run what is missing, draw, print the tables
    python benchmarks/experiments.py hacking     # only this experiment

Each run is a script as it is, started by RL_HAND/compare.py's machinery: one thread each, as many
at a time as there are cores, complete ones never again. Runs go to runs/experiments/, figures to
RL_HAND/gspo/images/ and RL_HAND/images/.
"""

import importlib.util
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "experiments"
FIGURES = {"family": ROOT / "RL_HAND" / "images"}  # else RL_HAND/gspo/images
MODEL_ALONE = "REWARD_WEIGHTS={'model': 1.0}"
EXPERIMENTS = {  # experiment -> [(script, its constants)], and how many seeds
    "default": ([("gspo", [])], 3),
    "clip": ([("gspo", []), ("gspo", ["CLIP_RANGE=0.2"])], 3),
    "kl": ([("gspo", []), ("gspo", ["TARGET_KL=0.01"])], 3),
    "learning_rate": ([("gspo", []), ("gspo", ["LEARNING_RATE=1e-3"])], 3),
    "hacking": ([("gspo", [MODEL_ALONE, "KL_COEF=0"]), ("gspo", [MODEL_ALONE]),
                 ("gspo", [MODEL_ALONE, "TARGET_KL=0.01"]), ("gspo", [])], 3),
    "family": ([("gspo", []), ("grpo", []), ("dapo", []), ("ppo", [])], 5),
}
PANELS = {  # experiment -> (title, metric, logarithmic)
    "clip": [("share of tokens cut by the clip", "clip_ratio/region_mean", True)],
    "kl": [("KL to the start, nats per token", "kl", False), ("KL coefficient", "kl_coef", True)],
    "learning_rate": [("KL to the start, nats per token", "kl", True),
                      ("length, tokens", "completions/mean_length", False)],
}


def import_compare():
    """RL_HAND/compare.py as a module."""
    spec = importlib.util.spec_from_file_location("compare", ROOT / "RL_HAND" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jobs_of(name):
    """An experiment's runs: (script, folder, command line). Two experiments may share a run."""
    variants, seeds = EXPERIMENTS[name]
    jobs = []
    for seed in range(seeds):
        for script, constants in variants:
            text = "_".join([script, *constants]).replace("'", "").replace(" ", "")
            folder = RUNS / f"{text.replace('{', '').replace('}', '').replace(':', '')}_seed{seed}"
            jobs.append((script, folder, [f"SEED={seed}", "PROFILE=embedded", *constants]))
    return jobs


def draw(compare, table, panels, file):
    """Held-out accuracy, sampled and greedy, and the experiment's own panels, by step."""
    panels = [("held-out accuracy, sampled", "eval/accuracy", False),
              ("held-out accuracy, greedy", "eval/accuracy_greedy", False), *panels]
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, (title, metric, logarithmic) in zip(figure.subplots(1, len(panels)), panels):
        rows = table if metric.startswith("eval/") else table[table.step > 0]
        compare.curves(axes, rows, "step", metric)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set(**({"yscale": "log"} if logarithmic else {"ylim": (0, None)}))
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)


def draw_hacking(table, file):
    """What the reward model thinks and what is true, on one axis: a panel per way of rewarding."""
    figure = Figure(figsize=(16, 3.8), layout="constrained")
    groups = list(table.groupby("algorithm", sort=False))
    all_axes = figure.subplots(1, len(groups), sharey=True)
    for axes, (label, runs) in zip(all_axes, groups):
        for metric, name in (("rewards/model", "the reward model's score, in training"),
                             ("eval/accuracy", "true accuracy, held out, sampled")):
            points = runs.dropna(subset=[metric])
            points = points.assign(step=(points.step / 10).round() * 10).groupby("step")[metric]
            line, = axes.plot(points.mean(), linewidth=2, label=name)
            axes.fill_between(points.min().index, points.min(), points.max(),
                              color=line.get_color(), alpha=0.15, linewidth=0)
        title = label.removeprefix("gspo").strip() or "the default: model and verifier"
        axes.set_title(title, fontsize=9.5)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.25)
    all_axes[0].legend(fontsize=9, frameon=False, loc="lower left", bbox_to_anchor=(0, 0.05))
    figure.savefig(file, dpi=110)


def details(compare, table):
    """What the comparison's own table lacks: best accuracy, KL, clipping, length, reward model."""
    rows = []
    for label, runs in table.groupby("algorithm", sort=False):
        runs = [run for _, run in runs.groupby("folder")]
        trained = [run[run.step > 0] for run in runs]
        start, end = [t.head(20) for t in trained], [t.tail(20) for t in trained]

        def over(pieces, metric, how="mean", digits=3):
            values = [float(getattr(piece[metric].dropna(), how)()) for piece in pieces]
            return compare.mean_and_error(values, digits)

        rows.append({
            "run": label, "best sampled": over(runs, "eval/accuracy", "max"),
            "tokens cut, first 20 steps": over(start, "clip_ratio/region_mean", digits=5),
            "tokens cut, last 20": over(end, "clip_ratio/region_mean", digits=5),
            "KL, last 20": over(end, "kl") if "kl" in table else "-",
            "length, last 20": over(end, "completions/mean_length"),
            "reward model, first 20": over(start, "rewards/model"),
            "reward model, last 20": over(end, "rewards/model"),
            "entropy, last 20": over(end, "entropy"),
            "groups without spread, last 20": over(end, "frac_reward_zero_std"),
        })
    return compare.markdown(pd.DataFrame(rows))


def main(chosen):
    """Run, draw, print."""
    compare = import_compare()
    for name in chosen:
        if name not in EXPERIMENTS:
            compare.fail(f"no experiment {name!r}; expected some of {', '.join(EXPERIMENTS)}")
    chosen, failures = chosen or list(EXPERIMENTS), []
    for name in chosen:
        print(f"\n## {name}\n", flush=True)
        folders, failed = compare.run_all({"WORKERS": 0}, jobs_of(name))
        failures += failed
        table = pd.concat([compare.read_run(folder) for folder in folders])
        table["algorithm"] = table["algorithm"].str.replace(" PROFILE=embedded", "")
        images = FIGURES.get(name, ROOT / "RL_HAND" / "gspo" / "images")
        images.mkdir(exist_ok=True)
        file = images / f"{'comparison' if name == 'family' else name}.png"
        if name == "family":
            compare.draw(table, file)
        elif name == "hacking":
            draw_hacking(table, file)
        else:
            draw(compare, table, PANELS.get(name, [("KL to the start", "kl", False)]), file)
        print(compare.markdown(compare.summarise(table, 0.8)), details(compare, table),
              "\n".join(f"- {line}" for line in compare.noise(table)), sep="\n\n", flush=True)
    print("\n".join(failures))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
