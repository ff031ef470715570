"""The runs behind the numbers and figures of the READMEs.

    python benchmarks/experiments.py             # run what is missing, draw, print the tables
    python benchmarks/experiments.py hacking     # only this experiment

Each run is a script as it is, started by RL_HAND/compare.py's machinery: one thread each, as many
at a time as there are cores, complete ones never again. Runs go to runs/experiments/, figures to
the images/ folders beside the scripts and to RL_HAND/images/.
"""

import os
import random
import re
import sys
from hashlib import sha256
from pathlib import Path

import pandas as pd
import torch
from common import ROOT, import_file
from matplotlib.figure import Figure

RUNS = ROOT / "runs" / "experiments"
FIGURES = {"family": ROOT / "RL_HAND" / "images",  # else RL_HAND/gspo/images
           **dict.fromkeys(["self_play", "preferences", "passes", "variations"],
                           ROOT / "RL_HAND" / "self_play" / "images")}
FORMS = [[], *([f"PREFERENCE_LOSS={form}", f"PREFERENCE_BETA={beta}"] for form, beta in (
    ("dpo", 0.1), ("dpo", 1.0), ("reference_free", 0.1), ("reference_free", 1.0),
    ("length_normalised", 2.0), ("length_normalised", 10.0)))]
OVERUSE = ["TOTAL_EPOCHS=8", "LEARNING_RATE=3e-4", "SELF_PLAY_ROUNDS=4", "EVAL_EVERY=1"]
SOURCE = ["TOTAL_EPOCHS=15", "SELF_PLAY_ROUNDS=3", "EVAL_EVERY=1"]
GRADED = ["REWARD_FUNCTION=RL_HAND/self_play/reward_func.py", "REWARD_WEIGHTS={'function': 1.0}"]
MODEL_ALONE = "REWARD_WEIGHTS={'model': 1.0}"
EXPERIMENTS = {  # experiment -> [(script, its constants)], and how many seeds
    "default": ([("gspo", [])], 3),
    "clip": ([("gspo", []), ("gspo", ["CLIP_RANGE=0.2"])], 3),
    "kl": ([("gspo", []), ("gspo", ["TARGET_KL=0.01"])], 3),
    "learning_rate": ([("gspo", []), ("gspo", ["LEARNING_RATE=1e-3"])], 3),
    "hacking": ([("gspo", [MODEL_ALONE, "KL_COEF=0"]), ("gspo", [MODEL_ALONE]),
                 ("gspo", [MODEL_ALONE, "TARGET_KL=0.01"]), ("gspo", [])], 3),
    "self_play": ([("self_play", [])], 5),
    "preferences": ([("self_play", [*form, *dose]) for dose in ([], OVERUSE) for form in FORMS], 3),
    "passes": ([("self_play", [*form, *SOURCE]) for form in (FORMS[0], FORMS[3])], 3),
    "variations": ([("self_play", []), ("self_play", ["USE_RANKING_LOSS=True"]),
                    ("self_play", ["MARGIN=0.05"]), ("gspo", GRADED)], 3),
    "family": ([("gspo", []), ("grpo", []), ("dapo", []), ("ppo", [])], 5),
}
FELL = [("KL to the start, nats per answer", "kl_divergence", False),
        ("log-prob of watched chosen answers", "watched/chosen_logp", False),
        ("log-prob of watched rejected answers", "watched/rejected_logp", False)]
PANELS = {  # experiment -> (title, metric, logarithmic)
    "self_play": FELL, "passes": FELL,
    "clip": [("share of tokens cut by the clip", "clip_ratio/region_mean", True)],
    "kl": [("KL to the start, nats per token", "kl", False), ("KL coefficient", "kl_coef", True)],
    "learning_rate": [("KL to the start, nats per token", "kl", True),
                      ("length, tokens", "completions/mean_length", False)],
}


def gad_data(teacher, path="data/train.parquet"):
    """GAD's training data with another teacher, as an argument."""
    return ("train_datasets=[{'path': '%s', 'input': 'question', 'output': 'answer', "
            "'teacher': '%s'}]" % (path, teacher))


CARELESS = gad_data("teacher_response", "runs/experiments/data/careless.parquet")
FEW = gad_data("teacher_response", "runs/experiments/data/few.parquet")
UNANSWERED = gad_data("teacher_response", "runs/experiments/data/unanswered.parquet")
BOTH = gad_data("teacher_response")[:-1] + ", " + gad_data("teacher_talkative")[16:]
ALONE, TALKATIVE = "SEQKD_STEPS=100", gad_data("teacher_talkative")
SATURATED = ["MAX_STEPS=60", "SEQKD_STEPS=0", "CRITIC_WARMUP=10", "KL_COEF=0.05", TALKATIVE]
GAD = {  # experiment -> {what a variant is called: its constants}
    "gad": {"GAD": [], "SeqKD alone": [ALONE]},
    "gad_collapses": {
        "healthy: the default": [],
        "saturated gap": SATURATED,
        "frozen discriminator": ["MAX_STEPS=70", "SEQKD_STEPS=0", "CRITIC_WARMUP=30",
                                 "DISCRIMINATOR_EVERY=0", "KL_COEF=0.0", "CLIP_RANGE=0.2",
                                 "MINIBATCH=32"],
        "no signal": ["TEMPERATURE=0.3"]},
    "gad_teachers": {
        "GAD, careless teacher": [CARELESS], "SeqKD, careless teacher": [CARELESS, ALONE],
        "GAD, two right texts": [BOTH],
        "GAD after 100 steps of SeqKD, two right texts": [BOTH, ALONE],
        "SeqKD, two right texts": [BOTH, "NUM_EPOCHS=10", "SEQKD_STEPS=1000"],
        "GAD, a D that can add": ["DISCRIMINATOR=data/reward_model",
                                  "DISCRIMINATOR_LEARNING_RATE=1e-4", "CRITIC_WARMUP=10"]},
    "gad_few": {
        "SeqKD, 64 texts": [FEW, "NUM_EPOCHS=25", ALONE],
        "GAD, 64 texts": [FEW, "NUM_EPOCHS=25"],
        "GAD, 64 texts and 800 questions": [UNANSWERED],
        "SeqKD to the end, then that game": [UNANSWERED, ALONE, "NUM_EPOCHS=4"]},
    "gad_remedies": {
        "saturated gap": SATURATED,
        "labels smoothed": [*SATURATED, "LABEL_SMOOTHING=0.1"],
        "not divided by the std": [*SATURATED, "NORM_ADV_BY_STD=False"],
        "SeqKD first": ["SEQKD_STEPS=60", "SEQKD_LEARNING_RATE=3e-4", "CRITIC_WARMUP=10",
                        "KL_COEF=0.05", TALKATIVE]},
    "gad_variations": {
        "the default": [],
        "D reads the last token": ["SCORE_AT=last"],
        "clip range 0.2": ["CLIP_RANGE=0.2"], "no KL": ["KL_COEF=0.0"],
        "not divided by the std": ["NORM_ADV_BY_STD=False"],
        "warm-up of 10 steps": ["CRITIC_WARMUP=10"],
        "D's learning rate 1e-4": ["DISCRIMINATOR_LEARNING_RATE=1e-4"]},
}
EXPERIMENTS |= {name: ([("gad", constants) for constants in variants.values()],
                       1 if name in ("gad_remedies", "gad_variations") else 3)
                for name, variants in GAD.items()}
FIGURES |= {name: ROOT / "RL_HAND" / "gad" / "images" for name in GAD}


def jobs_of(name):
    """An experiment's runs: (script, folder, command line). Two experiments may share a run."""
    variants, seeds = EXPERIMENTS[name]
    jobs = []
    for seed in range(seeds):
        for script, constants in variants:
            text = "_".join([script, *constants]).replace("'", "").replace(" ", "")
            text = text.replace("{", "").replace("}", "").replace(":", "").replace("/", ".")
            if len(text) > 120:  # Windows has 260 characters for a whole path
                text = f"{text[:100]}_{sha256(text.encode()).hexdigest()[:12]}"
            folder = RUNS / f"{text}_seed{seed}"
            jobs.append((script, folder, [f"SEED={seed}", "PROFILE=embedded", *constants]))
    return jobs


def draw(compare, table, panels, file):
    """Held-out accuracy, sampled and greedy, and the experiment's own panels, by step."""
    panels = [("held-out accuracy, sampled", "eval/accuracy", False),
              ("held-out accuracy, greedy", "eval/accuracy_greedy", False), *panels]
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    rounds = "kl_divergence" in table  # a dozen of them: nothing to be smoothed
    if rounds:
        table = table.assign(algorithm=table["algorithm"].map(form_of))
    for axes, (title, metric, logarithmic) in zip(figure.subplots(1, len(panels)), panels):
        rows = table if metric.startswith("eval/") else table[table.step > 0]
        if rounds:
            grid(axes, rows, metric)
        else:
            compare.curves(axes, rows, "step", metric)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("round" if rounds else "step", fontsize=9)
        if logarithmic:
            axes.set_yscale("log")
        elif not rows[metric].min() < 0:
            axes.set_ylim(0, None)
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


def dose_of(label):
    """Whether a run of self_play uses its rounds as shipped, more often, or as the source does."""
    return "over-use" if " ".join(OVERUSE) in label else "source" if " ".join(SOURCE) in label \
        else "as shipped"


def form_of(label):
    """What a run of self_play is called in a figure: the form of its loss, and beta."""
    given = dict(setting.split("=", 1) for setting in label.split()[1:])
    form, beta = given.get("PREFERENCE_LOSS", "dpo"), given.get("PREFERENCE_BETA", "0.5")
    return f"{form.replace('_', ' ')}, β {beta}"


def draw_preferences(table, file):
    """The forms of the loss and beta by round: above as shipped, below with over-used rounds."""
    columns = (("held-out accuracy, sampled", "eval/accuracy"),
               ("held-out accuracy, greedy", "eval/accuracy_greedy"),
               ("KL to the start, nats per answer", "kl_divergence"),
               ("log-prob of watched chosen answers", "watched/chosen_logp"),
               ("share of watched pairs in order", "watched/preference_accuracy"))
    figure = Figure(figsize=(19, 7.2), layout="constrained")
    doses = {"as shipped": "2 passes over a round at 1e-4, 12 rounds",
             "over-use": "8 passes over a round at 3e-4, 4 rounds"}
    for part, (dose, title) in zip(figure.subfigures(2, 1), doses.items()):
        part.suptitle(title, fontsize=11)
        some = table[table["algorithm"].map(dose_of) == dose]
        some = some.assign(algorithm=some["algorithm"].map(form_of))
        for axes, (name, metric) in zip(part.subplots(1, len(columns)), columns):
            rows = some if metric.startswith("eval/") else some[some.step > 0]
            grid(axes, rows, metric)
            axes.set_title(name, fontsize=10)
            axes.set_xlabel("round", fontsize=9)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if metric.startswith("eval/"):
                axes.set_ylim(0, 1)
            if metric == "kl_divergence":
                axes.axhline(3, color="grey", linestyle="--", linewidth=0.9)
                axes.set_yscale("symlog", linthresh=3)
                axes.yaxis.set_major_formatter("{x:g}")
                axes.set_ylim(0, None)
    figure.subfigs[1].axes[0].legend(fontsize=7.5, frameon=False, loc="upper right", ncol=2)
    figure.savefig(file, dpi=100)


def grid(axes, table, metric):
    """Mean over seeds and their range, at the steps that were measured: nothing smoothed."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for label, runs in table.dropna(subset=[metric]).groupby("algorithm", sort=False):
        points = runs.groupby("step")[metric]
        style = "--" if label.startswith("reference") else ":" if label.startswith("len") else "-"
        line, = axes.plot(points.mean(), linewidth=1.8, linestyle=style, label=label)
        axes.fill_between(points.min().index, points.min(), points.max(), color=line.get_color(),
                          alpha=0.12, linewidth=0)


@torch.no_grad()
def final_kl(folder):
    """KL(policy || start) of a run's last checkpoint, nats per answer: one answer sampled to each
    held-out question, and scored by both."""
    script = import_file(ROOT / "RL_HAND" / "self_play" / "self_play.py")
    script.configure(["PROFILE=embedded", "DEVICE=cpu"])
    torch.set_num_threads(script.THREADS)
    script.transformers.utils.logging.disable_progress_bar()
    last = max(Path(folder).glob("[!.]*/model.safetensors"), key=os.path.getmtime).parent
    policy, start = script.load_policy(last), script.load_policy(ROOT / "data" / "policy")
    tokenizer = script.AutoTokenizer.from_pretrained(last)
    rows = script.load_rows("eval_datasets", tokenizer)
    torch.manual_seed(0)
    batch = script.sample_groups(policy, tokenizer, rows, 1)
    gap = (batch.sampled_logps - script.score_without_grad(start, batch)) * batch.completion_mask
    return float(gap.sum(1).mean())


def preference_details(compare, table):
    """What became of self-play's runs: one row for each form of the loss, beta and dose."""
    rows = []
    for label, runs in table.groupby("algorithm", sort=False):
        runs = [run for _, run in runs.groupby("folder")]

        def over(metric, place=-1, digits=2):
            values = [run[metric].dropna() for run in runs if metric in run]
            return compare.mean_and_error([float(v.iloc[place]) for v in values if len(v)], digits)

        rest = [setting for setting in label.split()[1:]
                if setting not in (*OVERUSE, *SOURCE) and not setting.startswith("PREFERENCE_")]
        rows.append({
            "run": " ".join([form_of(label), *rest]) if label.startswith("self_play") else label,
            "rounds used": dose_of(label),
            "runs": len(runs), "sampled": over("eval/accuracy", digits=3),
            "best sampled": compare.mean_and_error([run["eval/accuracy"].max() for run in runs]),
            "greedy": over("eval/accuracy_greedy", digits=3),
            "KL per answer, end": compare.mean_and_error(
                [final_kl(run["folder"].iloc[0]) for run in runs], 2),
            "chosen, rejected log-prob": f"{over('watched/chosen_logp')}, "
                                         f"{over('watched/rejected_logp')}",
            "watched pairs in order": over("watched/preference_accuracy", digits=3),
            "by the gain": over("watched/implicit_accuracy", digits=3),
            "entropy": over("entropy", digits=3), "length": over("eval/mean_length", digits=1),
            "seconds": compare.mean_and_error([run["seconds"].iloc[-1] for run in runs], 0),
        })
    start = table[table.step == 1].groupby("folder").first()
    return compare.markdown(pd.DataFrame(rows)) + (
        f"\n\nbefore: watched pairs in order {start['watched/preference_accuracy'].mean():.3f}, "
        f"chosen {start['watched/chosen_logp'].mean():.2f}, rejected "
        f"{start['watched/rejected_logp'].mean():.2f}")


def make_gad_data():
    """Two more teachers. A careless one, whose answers are worked out as well, but with one digit
    in ten wrong wherever it stands: 0.76 of them come out right. And one who has answered only the
    first 64 questions, with those questions alone or with all."""
    build = import_file(ROOT / "data" / "build.py")
    table = pd.read_parquet(ROOT / "data" / "train.parquet",
                            columns=["question", "answer", "teacher_response"])
    folder, rng = RUNS / "data", random.Random("careless")
    folder.mkdir(parents=True, exist_ok=True)
    table.head(64).to_parquet(folder / "few.parquet")
    texts = table["teacher_response"].where(table.index < 64, "")
    table.assign(teacher_response=texts).to_parquet(folder / "unanswered.parquet")
    answers = []
    for question in table["question"]:
        minus = any(word in question for word in ("minus", "Subtract", "-", "difference", "sells",
                                                  "gives"))
        a, b = map(int, re.findall(r"[0-9]+", question))
        work, result = build.column_work(max(a, b) if minus else a, min(a, b) if minus else b,
                                         "-" if minus else "+", rng, slip=0.1)
        answers.append(f"{work} Answer: {result}")
    table.assign(teacher_response=answers).to_parquet(folder / "careless.parquet")


def draw_clock(compare, table, file):
    """Held-out accuracy over the seconds of training, and over the steps what the game is about."""
    figure = Figure(figsize=(16, 4.2), layout="constrained")
    for axes, (title, metric, x) in zip(figure.subplots(1, 4), (
            ("held-out accuracy, sampled", "eval/accuracy", "seconds"),
            ("held-out accuracy, greedy", "eval/accuracy_greedy", "seconds"),
            ("D ranks a right answer above a wrong one", "d_rank", "step"),
            ("answers that are the teacher's very text", "matches_teacher", "step"))):
        compare.curves(axes, table, x, metric)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel({"seconds": "seconds of training", "step": "step"}[x], fontsize=9)
        axes.set_ylim(0, 1)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=9, frameon=False,
                  loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=110)


def draw_games(compare, table, file):
    """A column per variant: accuracy, scores, what D sees, and how much it still learns."""
    groups = list(table.groupby("algorithm", sort=False))
    rows = [("accuracy and length", {"eval/accuracy": "held out, sampled",
                                     "eval/accuracy_greedy": "held out, greedy",
                                     "length / 60": "length / 60 tokens"}),
            ("D's scores", {"teacher_score": "teacher", "student_score": "student",
                            "score_gap": "gap"}),
            ("what D knows", {"d_acc": "d_acc", "d_rank": "d_rank",
                              "frac_no_signal": "groups of equal scores"}),
            ("what D learns", {"d_loss": "d_loss", "d_grad_norm": "gradient norm",
                               "d_spread": "spread in a group"})]
    figure = Figure(figsize=(4 * len(groups), 10), layout="constrained")
    grid = figure.subplots(len(rows), len(groups), sharey="row", sharex="col")
    for column, (label, runs) in enumerate(groups):
        runs = runs.assign(**{"length / 60": runs["completions/mean_length"] / 60})
        for line, (title, curves) in zip(grid, rows):
            axes = line[column]
            for metric, name in curves.items():
                points = runs.dropna(subset=[metric]).groupby("step")[metric]
                mean = points.mean()
                if not metric.startswith("eval/"):
                    mean = mean.rolling(3, 1, center=True).mean()
                drawn, = axes.plot(mean, linewidth=1.8, label=name)
                axes.fill_between(mean.index, points.min(), points.max(), alpha=0.12, linewidth=0,
                                  color=drawn.get_color())
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(title, fontsize=11)
                axes.legend(fontsize=8, frameon=False)
        grid[0][column].set_title(label, fontsize=12)
        grid[-1][column].set_xlabel("step")
    figure.savefig(file, dpi=90)


def game_details(compare, table):
    """What the comparison's own table lacks of GAD's runs, a row per variant."""
    rows = []
    for label, runs in table.groupby("algorithm", sort=False):
        runs = [run for _, run in runs.groupby("folder")]
        game = [run[run.stage == 3] for run in runs]

        def over(pieces, metric, how="mean"):
            values = [getattr(piece[metric].dropna(), how)() for piece in pieces if len(piece)]
            return compare.mean_and_error([float(v) for v in values])

        def at_end(stage, metric):
            ends = [run[run.stage <= stage][metric].dropna() for run in runs]
            return compare.mean_and_error([float(end.iloc[-1]) for end in ends if len(end)])

        rows.append({
            "run": label, "sampled after SeqKD": at_end(1, "eval/accuracy"),
            "greedy after SeqKD": at_end(1, "eval/accuracy_greedy"),
            "seconds of stages 1 / 2 / 3": " / ".join(
                f"{sum(run[run.stage == stage].step_time.sum() for run in runs) / len(runs):.0f}"
                for stage in (1, 2, 3)),
            "best sampled": over(game, "eval/accuracy", "max"),
            "sampled at the end": at_end(3, "eval/accuracy"),
            "greedy at the end": at_end(3, "eval/accuracy_greedy"),
            "d_acc, last 10 of warm-up": over([r[r.stage == 2].tail(10) for r in runs], "d_acc"),
            "d_rank, first / last 10": f"{over([g.head(10) for g in game], 'd_rank')} / "
                                       f"{over([g.tail(10) for g in game], 'd_rank')}",
            "largest gap": over(game, "score_gap", "max"),
            "D's gradient norm, last 10": over([g.tail(10) for g in game], "d_grad_norm"),
            "groups of equal scores, last 10": over([g.tail(10) for g in game], "frac_no_signal"),
            "the teacher's text, last 10": over([g.tail(10) for g in game], "matches_teacher"),
            "length, last 10": over([g.tail(10) for g in game], "completions/mean_length"),
            "KL, last 10": over([g.tail(10) for g in game], "kl"),
        })
    return compare.markdown(pd.DataFrame(rows))


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


def make(compare, chosen, lock):
    """Run, draw, print; whether a run failed."""
    failures = []
    for name in chosen:
        print(f"\n## {name}\n", flush=True)
        if name in GAD:
            make_gad_data()
        folders, failed = compare.run_all({"WORKERS": 0}, jobs_of(name), lock)
        failures += failed
        table = pd.concat([compare.read_run(folder) for folder in folders])
        table["algorithm"] = table["algorithm"].str.replace(" PROFILE=embedded", "")
        images = FIGURES.get(name, ROOT / "RL_HAND" / "gspo" / "images")
        images.mkdir(parents=True, exist_ok=True)
        file = images / f"{'comparison' if name == 'family' else name}.png"
        if name == "family":
            compare.draw(table, file)
        elif name == "hacking":
            draw_hacking(table, file)
        elif name == "preferences":
            draw_preferences(table, file)
        elif name == "variations":
            pass  # a table says it
        elif name in GAD:
            names = {" ".join(["gad", *constants]): label
                     for label, constants in GAD[name].items()}
            table["algorithm"] = table["algorithm"].replace(names)
            table.to_csv(RUNS / f"{name}.csv", index=False)
            draw_game = draw_games if name in ("gad_collapses", "gad_remedies") else draw_clock
            draw_game(compare, table, file)
            print(game_details(compare, table), end="\n\n")
        else:
            draw(compare, table, PANELS.get(name, [("KL to the start", "kl", False)]), file)
        own = details
        if "watched/chosen_logp" in table:
            own = preference_details
        print(compare.markdown(compare.summarise(table, 0.8)), own(compare, table),
              "\n".join(f"- {line}" for line in compare.noise(table)), sep="\n\n", flush=True)
    print("\n".join(failures))
    return bool(failures)


def main(chosen):
    """Make the chosen experiments, or all."""
    compare = import_file(ROOT / "RL_HAND" / "compare.py")
    for name in chosen:
        if name not in EXPERIMENTS:
            compare.fail(f"no experiment {name!r}; expected some of {', '.join(EXPERIMENTS)}")
    with compare.claimed(RUNS) as lock:
        return make(compare, chosen or list(EXPERIMENTS), lock)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    sys.exit(main(sys.argv[1:]))
