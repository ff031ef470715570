"""The figures of the pages, drawn of the rows in results/ by `experiments.py figures`."""

import matplotlib
import numpy as np
import pages
import results
from matplotlib.figure import Figure
from results import ROOT, curve, places

COLOURS = results.import_file(ROOT / "RL_HAND" / "compare.py").COLOURS
ACCURACY = [("held-out accuracy, sampled", "eval/accuracy", "linear"),
            ("held-out accuracy, greedy", "eval/accuracy_greedy", "linear")]
FELL = [("KL to the start, nats per answer", "kl_divergence", "linear"),
        ("log-prob of watched chosen answers", "watched/chosen_logp", "linear"),
        ("log-prob of watched rejected answers", "watched/rejected_logp", "linear")]
PANELS = {  # experiment -> (title, metric, scale), beside accuracy
    "default": [("KL to the start, nats per token", "kl", "linear")],
    "clip": [("share of tokens cut by the clip", "clip_ratio/region_mean", "log")],
    "kl": [("KL to the start, nats per token", "kl", "linear"),
           ("KL coefficient", "kl_coef", "log")],
    "learning_rate": [("KL to the start, nats per token", "kl", "log"),
                      ("length, tokens", "completions/mean_length", "linear")],
    "self_play": FELL, "passes": FELL}


def line(axes, rows, metric, label, x="step", smooth=1, **style):
    """One metric of some runs: their mean and their range, where they were measured. x: "step", or
    what the evaluations stand at: "num_tokens", "seconds", put on a common grid. Runs that have not
    measured it take their turn of the colours, so that a run has the same one in every panel."""
    rows = [row for row in rows if len(curve(row, metric)) > 1]
    if not rows:
        axes.plot([], [], **style)
        return
    values = [curve(row, metric) for row in rows]
    at = [places(row, metric) if x == "step" else curve(row, f"at {x}") for row in rows]
    if smooth > 1:
        edge = np.ones(smooth)
        values = [np.convolve(v, edge, "same") / np.convolve(np.ones(len(v)), edge, "same")
                  for v in values]
    if x == "step" and len({len(v) for v in values}) == 1:
        grid = at[0]
    else:
        grid = np.linspace(max(a[0] for a in at), min(a[-1] for a in at), 60)
        values = [np.interp(grid, a, v) for a, v in zip(at, values)]
    drawn, = axes.plot(grid, np.mean(values, 0), linewidth=1.8, label=label, **style)
    axes.fill_between(grid, np.min(values, 0), np.max(values, 0), color=drawn.get_color(),
                      alpha=0.14, linewidth=0)


def plain(axes, title="", x="", y=""):
    """A panel without ornaments."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)


def name_of(run):
    """What a run is called in a figure."""
    return run.label or " ".join([run.script, *run.constants])


def compared(name, found):
    """Held-out accuracy, and the experiment's own panels, by step."""
    panels = [*ACCURACY, *PANELS[name]]
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, (title, metric, scale) in zip(figure.subplots(1, len(panels)), panels):
        for run, rows in found:
            line(axes, rows, metric, f"{name_of(run)} ({len(rows)} runs)")
        plain(axes, title, "round" if found[0][0].script == "self_play" else "step")
        axes.set_yscale(scale)
        if scale == "linear" and "logp" not in metric:
            axes.set_ylim(0, None)
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def family(name, found):
    """Accuracy by steps and tokens above; KL, entropy, clipping, length by steps below."""
    figure = Figure(figsize=(15, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    for axes, (metric, x, label) in zip(above.subplots(1, 3, sharey=True), (
            ("eval/accuracy", "step", "steps (a rollout and its updates)"),
            ("eval/accuracy", "num_tokens", "completion tokens sampled"),
            ("eval/accuracy_greedy", "step", "steps; greedy"))):
        for run, rows in found:
            line(axes, rows, metric, f"{run.script} ({len(rows)} runs)", x,
                 color=COLOURS.get(run.script))
        plain(axes, "", label)
        axes.set_ylim(0, 1)
    above.axes[0].set_ylabel("held-out accuracy, sampled at T = 1")
    above.axes[0].legend(frameon=False, fontsize=11, loc="lower right")
    for axes, (metric, title) in zip(below.subplots(1, 5), (
            ("accuracy", "accuracy in training"), ("kl", "KL to the start, nats per token"),
            ("entropy", "entropy, nats per token"),
            ("clip_ratio/region_mean", "share of tokens cut"),
            ("completions/mean_length", "length, tokens"))):
        for run, rows in found:
            line(axes, rows, metric, run.script, color=COLOURS.get(run.script))
        plain(axes, title, "step")
        if metric.startswith("clip"):
            axes.set_yscale("symlog", linthresh=1e-3)
            axes.set_ylim(0, 1)
    return figure


def stability(name, found):
    """The map: a square for each learning rate and number of updates, a row for each loss; and the
    accuracy in training at the two corners."""
    known = pages.cells()
    labels = [label for label in pages.experiments.LOSSES
              if any(label == place[0] for place in known)]
    updates, rates = [*pages.experiments.UPDATES], pages.experiments.RATES
    figure = Figure(figsize=(15, 1.6 + 0.5 * len(labels) + 3.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.2 + 0.5 * len(labels), 3.8))
    start = np.mean([pages.sampled(row, 0) for rows in known.values() for row in rows])
    for axes, n in zip(above.subplots(1, len(updates), sharey=True), updates):
        values = np.full((len(labels), len(rates)), np.nan)
        for i, label in enumerate(labels):
            for j, rate in enumerate(rates):
                if rows := known.get((label, rate, n)):
                    values[i, j] = np.mean([0 if row["end"] else pages.sampled(row)
                                            for row in rows])
                    bad = sum(map(pages.failed, rows))
                    axes.text(j, i, f"{values[i, j]:.2f}" + f"\n{bad} of {len(rows)} failed" *
                              bool(bad), ha="center", va="center", fontsize=9,
                              color="black" if 0.15 < values[i, j] < 0.75 else "white")
        drawn = axes.imshow(values, cmap="RdYlBu", vmin=0, vmax=0.9, aspect="auto")
        axes.set_xticks(range(len(rates)), rates)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_title(f"{n} update{'s' * (n > 1)} per rollout", fontsize=11)
        axes.set_xlabel("learning rate", fontsize=9)
    above.colorbar(drawn, ax=above.axes, shrink=0.8,
                   label=f"held out, sampled, after 25 steps; {start:.2f} at the start")
    colours = matplotlib.colormaps["tab10"]
    for axes, (rate, n) in zip(below.subplots(1, 3, sharey=True), (
            ("4e-4", 1), *pages.experiments.CORNERS)):
        for i, label in enumerate(labels):
            line(axes, known.get((label, rate, n), []), "accuracy", label, smooth=3,
                 color=colours(i))
        plain(axes, f"learning rate {rate}, {n} update{'s' * (n > 1)} per rollout", "step",
              "accuracy in training")
        axes.set_ylim(0, 1)
    below.axes[1].legend(fontsize=8, frameon=False, ncols=2)
    return figure


def gradients(name, found):
    """The cosine to GRPO's gradient by update, and the weight of a token by its ratio: what the
    losses do as a rollout gets stale, and why."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    colours = matplotlib.colormaps["tab10"]
    for i, label in enumerate(pages.experiments.LOSSES):
        rows = next((rows for run, rows in found if run.label == label), [])
        for row in rows[:1]:
            values = np.mean([curve(each, "same mean") for each in rows], 0)
            left.plot(range(1, len(values) + 1), values, color=colours(i), label=label, marker=".")
            for axes, sign in ((middle, ">"), (right, "<")):
                axes.plot(curve(row, "ratio"), curve(row, f"weight, A {sign} 0"),
                          color=colours(i), linewidth=1.8, alpha=0.8)
    plain(left, "cosine to GRPO's gradient, one mean over tokens", "update of one rollout")
    left.set_ylim(-0.55, 1.05)
    left.legend(fontsize=8, frameon=False, ncols=2)
    for axes, sign in ((middle, ">"), (right, "<")):
        plain(axes, f"weight of a token (an answer of one), A {sign} 0", "its ratio")
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.1, 2.6)
        axes.xaxis.set_major_formatter("{x:g}")
    return figure


def length(name, found):
    """The log-ratio of a token, its mean and its sum over an answer, against the length."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes, rows = figure.subplots(), found[0][1]
    at = np.mean([curve(row, "length") for row in rows], 0)
    for what in ("a token", "the mean", "the sum"):
        values = [curve(row, f"sd of {what}") for row in rows]
        drawn, = axes.plot(at, np.mean(values, 0), marker="o", label=f"of {what}")
        axes.fill_between(at, np.min(values, 0), np.max(values, 0), color=drawn.get_color(),
                          alpha=0.14, linewidth=0)
    middle = len(at) // 2
    for what, power in (("the sum", 0.5), ("the mean", -0.5)):
        value = np.mean([curve(row, f"sd of {what}")[middle] for row in rows])
        axes.plot(at, value * (at / at[middle]) ** power, color="grey", linestyle="--", linewidth=1)
    plain(axes, "log-ratio after 4 updates: standard deviation", "length of the answer, tokens")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([6, 10, 20, 40, 60], [6, 10, 20, 40, 60], minor=False)
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=9, frameon=False)
    return figure


def corner(name, found):
    """80 steps where most break."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for run, rows in found:
        line(axes, rows, "accuracy", f"{run.label} ({len(rows)} runs)", smooth=3)
    plain(axes, "learning rate 4e-4, 16 updates per rollout", "step", "accuracy in training")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=9, frameon=False)
    return figure


def hacking(name, found):
    """What the reward model thinks and what is true, on one axis: a panel per way of rewarding."""
    figure = Figure(figsize=(16, 3.8), layout="constrained")
    for axes, (run, rows) in zip(figure.subplots(1, len(found), sharey=True), found):
        line(axes, rows, "rewards/model", "the reward model's score, in training")
        line(axes, rows, "eval/accuracy", "true accuracy, held out, sampled")
        plain(axes, run.label, "step")
        axes.set_ylim(0, 1)
    figure.axes[0].legend(fontsize=9, frameon=False, loc="lower left", bbox_to_anchor=(0, 0.05))
    return figure


def preferences(name, found):
    """The forms of the loss and beta by round: above as shipped, below with over-used rounds."""
    columns = [*ACCURACY, *FELL[:2], ("share of watched pairs in order",
                                      "watched/preference_accuracy", "linear")]
    figure = Figure(figsize=(19, 7.2), layout="constrained")
    doses = {"2 passes over a round at 1e-4, 12 rounds": pages.dose(),
             "8 passes over a round at 3e-4, 4 rounds": pages.dose(*pages.experiments.OVERUSE)}
    for part, (title, chosen) in zip(figure.subfigures(2, 1), doses.items()):
        part.suptitle(title, fontsize=11)
        for axes, (heading, metric, _) in zip(part.subplots(1, len(columns)), columns):
            for run, rows in found:
                if chosen(run):
                    style = {"r": "--", "l": ":"}.get(run.label[0], "-")
                    line(axes, rows, metric, run.label, linestyle=style)
            plain(axes, heading, "round")
            axes.xaxis.get_major_locator().set_params(integer=True)
            if metric.startswith("eval/"):
                axes.set_ylim(0, 1)
            if metric == "kl_divergence":
                axes.axhline(3, color="grey", linestyle="--", linewidth=0.9)
                axes.set_yscale("symlog", linthresh=3)
                axes.yaxis.set_major_formatter("{x:g}")
                axes.set_ylim(0, None)
    figure.subfigs[1].axes[0].legend(fontsize=7.5, frameon=False, loc="upper right", ncol=2)
    return figure


def clock(name, found):
    """Held-out accuracy over the seconds of training; what the game is about, over the steps."""
    figure = Figure(figsize=(16, 4.2), layout="constrained")
    for axes, (title, metric, x) in zip(figure.subplots(1, 4), (
            ("held-out accuracy, sampled", "eval/accuracy", "seconds"),
            ("held-out accuracy, greedy", "eval/accuracy_greedy", "seconds"),
            ("D ranks a right answer above a wrong one", "d_rank", "step"),
            ("answers that are the teacher's very text", "matches_teacher", "step"))):
        for i, (run, rows) in enumerate(found):  # where two are the same, the first one is seen
            line(axes, rows, metric, f"{run.label} ({len(rows)} runs)", x, zorder=3 - 0.1 * i)
        plain(axes, title, {"seconds": "seconds of training", "step": "step"}[x])
        axes.set_ylim(0, 1)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=9, frameon=False,
                  loc="outside lower center", ncols=3)
    return figure


def games(name, found):
    """A column per variant: accuracy, scores, what D sees, and how much it still learns."""
    panels = [("accuracy", {"eval/accuracy": "held out, sampled",
                            "eval/accuracy_greedy": "held out, greedy"}),
              ("length, tokens", {"completions/mean_length": "length"}),
              ("D's scores", {"teacher_score": "teacher", "student_score": "student",
                              "score_gap": "gap"}),
              ("what D knows", {"d_acc": "d_acc", "d_rank": "d_rank",
                                "frac_no_signal": "groups of equal scores"}),
              ("what D learns", {"d_loss": "d_loss", "d_grad_norm": "gradient norm",
                                 "d_spread": "spread in a group"})]
    figure = Figure(figsize=(4 * len(found), 11.5), layout="constrained")
    grid = figure.subplots(len(panels), len(found), sharey="row", sharex="col")
    for column, (run, rows) in enumerate(found):
        for axes, (title, curves) in zip(grid[:, column], panels):
            for metric, label in curves.items():
                line(axes, rows, metric, label)
            plain(axes, run.label if axes is grid[0, column] else "",
                  "step" if axes is grid[-1, column] else "", title if column == 0 else "")
            if column == 0:
                axes.legend(fontsize=8, frameon=False)
    return figure


HERE, GSPO, SELF_PLAY, GAD = (ROOT / "RL_HAND" / place / "images"
                              for place in ("", "gspo", "self_play", "gad"))
FIGURES = {  # experiment -> what draws it, and where the figure goes
    "family": (family, HERE / "comparison.png"),
    **{each.__name__: (each, HERE / f"{each.__name__}.png")
       for each in (stability, corner, gradients, length)},
    "hacking": (hacking, GSPO / "hacking.png"),
    **{name: (compared, GSPO / f"{name}.png") for name in ("default", "clip", "kl",
                                                           "learning_rate")},
    **{name: (compared, SELF_PLAY / f"{name}.png") for name in ("self_play", "passes")},
    "preferences": (preferences, SELF_PLAY / "preferences.png"),
    **{name: (clock, GAD / f"{name}.png") for name in ("gad", "gad_teachers", "gad_few")},
    **{name: (games, GAD / f"{name}.png") for name in ("gad_collapses", "gad_remedies")}}


def draw(names, only_whole=True):
    """Draw the experiments' figures. One that lacks rows keeps the figure that there is."""
    for name in names:
        if name not in FIGURES:
            continue
        found, (function, path) = pages.groups(name), FIGURES[name]
        wanted = sum(len(run.seeds) for run in pages.experiments.EXPERIMENTS[name])
        if only_whole and sum(len(rows) for _, rows in found) < wanted:
            print(f"{name}: rows are missing; {path.name} stays as it is")
            continue
        path.parent.mkdir(exist_ok=True)
        function(name, found).savefig(path, dpi=90 if function is games else 110)
        print(f"drew {path.relative_to(ROOT).as_posix()}")
