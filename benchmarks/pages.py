"""The tables that the pages show of the rows in results/; tools/tables.py puts them there.

Between <!-- results NAME --> and <!-- end --> stands the table NAME of TABLES; words behind the
name choose columns (`<!-- results family grpo gspo -->`). Each ends in a line that says what runs
it is of, and whether one of them is stale: not of today's script or data. While rows are missing,
the older table stays.

    python benchmarks/pages.py             # print every table that has rows
    python benchmarks/pages.py clip kl     # only these
"""

import re
import sys
from itertools import pairwise

import experiments
import numpy as np
import results
from results import ROOT, curve, fifth, key_of

mean = results.import_file(ROOT / "RL_HAND" / "compare.py").mean_and_error
LENGTHS = [1, 9, 15, 22, 30, 45]  # where the bins of measures.py begin
CUT = "clip_ratio/region_mean"
TARGET = 0.8  # the held-out accuracy to which steps and tokens are counted
CHINESE = {  # of what tables say
    "runs": "运行次数", "stale": "过期", "before": "训练前", "after": "训练后", "not run": "没有运行",
    "sampled accuracy, before": "采样准确率，训练前", "sampled accuracy, after": "采样准确率，训练后",
    "greedy accuracy, before": "贪心准确率，训练前", "greedy accuracy, after": "贪心准确率，训练后",
    "steps to 0.8 sampled": "采样准确率到 0.8 的步数",
    "completion tokens to 0.8": "到 0.8 生成的 token 数",
    "tokens in all": "总 token 数", "tokens cut, first fifth": "被裁剪的 token，前五分之一",
    "tokens cut, last fifth": "被裁剪的 token，后五分之一",
    "KL, last fifth, nats per token": "KL，后五分之一，每个 token 多少 nat",
    "seconds to 0.8, GRPO's = 1": "到 0.8 的秒数，GRPO 为 1",
    "seconds in all, GRPO's = 1": "总秒数，GRPO 为 1",
    "after 100 steps": "100 步之后", "sampled accuracy": "采样准确率", "greedy accuracy": "贪心准确率",
    "tokens cut by the clip": "被裁剪的 token", "(first 20 steps)": "（前 20 步）",
    "(last 20)": "（后 20 步）", "KL to the start, nats per token": "对起始策略的 KL，每个 token 多少 nat",
    "length, tokens": "长度，token", "groups without spread": "没有差别的组",
    "sampled after": "训练后采样", "greedy after": "训练后贪心", "steps to 0.8": "到 0.8 的步数",
    "tokens cut, first / last 20 steps": "被裁剪的 token，前 / 后 20 步",
    "best sampled": "最好的采样", "KL, last 20 steps": "KL，后 20 步",
    "sampled, best": "采样，最好", "sampled, end": "采样，最后", "greedy, end": "贪心，最后",
    "0.1 (embedded default)": "0.1（embedded 默认）",
    "1e-4 (embedded default)": "1e-4（embedded 默认）",
    "learning rate × updates per rollout": "学习率 × 每次采样的更新次数",
    "failed": "失败", "failed runs, of all": "失败的运行，占全部",
    "KL at the end, nats per token, at 4e-4 × 4": "最后的 KL，每个 token 多少 nat，4e-4 × 4",
    "KL at the end, nats per token, at 4e-4 × 16": "最后的 KL，每个 token 多少 nat，4e-4 × 16",
    "sd of a token": "token 的标准差", "sd of the mean": "平均的标准差", "length": "长度",
    "sd of the sum": "总和的标准差", "answers": "回答数", "best": "最好",
    "at step 25": "第 25 步", "at step 80": "第 80 步",
    "updates": "更新次数", "routers changed": "变了的路由", "tokens with a change": "路由有变的 token",
    "layers changed, of a token": "每个 token 变了几层", "engine KL": "引擎 KL",
    "engine KL: dense": "引擎 KL：稠密模型", "engine KL: none": "引擎 KL：不回放",
    "experts, none": "专家，不回放", "tokens beyond 2: none": "超过 2 的 token：不回放",
    "learning rate": "学习率", "the cap": "封顶于", "4 updates per rollout": "每次采样更新 4 次",
    "16 updates": "更新 16 次", "weights capped": "封顶的权重",
    "accuracy in training, steps 1 to 10": "训练题上的准确率，第 1 到 10 步",
    "steps 26 to 30": "第 26 到 30 步", "held out, step 30": "留出集，第 30 步",
    "gradient norm, mean": "梯度范数，平均", "the sum over tokens (default)": "对 token 求和（默认）",
    "the mean over tokens": "对 token 取平均",
    "answers moved by more than GSPO's clip width": "移动超过 GSPO 裁剪宽度的回答",
    "tokens moved by more than 0.2": "移动超过 0.2 的 token",
    "sd of tokens: free": "token 的标准差：自由", "sd of answers: free": "回答的标准差：自由",
    "groups without spread, last 20 steps": "没有差别的组，后 20 步",
    "4e-4 × 16, after 25 steps": "4e-4 × 16，25 步之后",
    "16 questions × 8 answers (default)": "16 题 × 8 个回答（默认）",
    "8 questions × 16 answers": "8 题 × 16 个回答",
    "forced": "强制", "noise, in stds of the logits": "噪声，以 logits 的标准差为单位",
    "the sampler's accuracy": "采样端的准确率", "gradient norm, max": "梯度范数，最大",
    "largest token ratio": "最大的 token 比率", "largest ratio of an answer": "最大的回答比率",
    "effective experts, least of a layer": "有效专家数，最少的一层",
}
CHINESE |= {  # labels of runs with experts
    f"{loss}, {replay}{more}": f"{loss}，{replay.replace('none', '不回放')}{also}"
    for loss in ("GRPO", "GSPO") for replay in ("none", "R2", "R3")
    for more, also in (("", ""), (", noisy routers", "，路由器带噪声"))}


def said(text, language):
    """A text of a table in the page's language; names and numbers have no translation."""
    return CHINESE.get(text, text) if language == "zh" else text


def groups(name, rows=None):
    """An experiment's runs that have rows: (Run, its rows by seed)."""
    rows = results.all_rows() if rows is None else rows
    found = []
    for run in experiments.EXPERIMENTS[name]:
        keys = (key_of(run.script, run.constants, seed) for seed in run.seeds)
        if some := [rows[key] for key in keys if key in rows]:
            found.append((run, some))
    return found


def over(rows, what, digits=3):
    """The mean and error of a number of each row: of what a function gives."""
    return mean([what(row) for row in rows], digits)


def each(rows, what):
    """A number of each row, one by one."""
    return ", ".join(f"{what(row):.3f}" for row in rows)


def plain_mean(rows, what, digits):
    """The mean alone."""
    return mean([what(row) for row in rows], digits).split(" ±")[0]


def sampled(row, place=-1):
    """Held-out accuracy, sampled: at the end, or at another evaluation."""
    return curve(row, "eval/accuracy")[place]


def greedy(row, place=-1):
    """Held-out accuracy, greedy."""
    return curve(row, "eval/accuracy_greedy")[place]


def best(row):
    """The best sampled accuracy of all evaluations."""
    return curve(row, "eval/accuracy").max()


def reached(row, column):
    """Where a column stood when the sampled accuracy first reached TARGET, between evaluations."""
    accuracy, place = curve(row, "eval/accuracy"), curve(row, column)
    for i, (low, high) in enumerate(pairwise(accuracy)):
        if low < TARGET <= high:
            return place[i] + (TARGET - low) / (high - low) * (place[i + 1] - place[i])
    return np.nan


def failed(row):
    """Whether a run ended worse than it began, by the sampled held-out accuracy, or not at all."""
    return row["end"] != "" or sampled(row) < sampled(row, 0)


def markdown(header, rows):
    """A table."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def note(rows, language):
    """The line below a table: of what runs it is, and whether they are today's."""
    def several(values):
        found = sorted({value for value in values if value}, key=results.natural)
        if len(found) > 2 and all(map(str.isdigit, found)) and len(found) == int(found[-1]) + 1:
            return f"{found[0]}–{found[-1]}"
        return ", ".join(found)
    commits = sorted({row["commit"][:7] for row in rows})
    more = f" ({len(commits)})" if len(commits) > 3 else ""
    commits = ", ".join(commits[:3]) + (", …" + more if more else "")
    seeds = several(row["seed"] for row in rows)
    versions = "; ".join(f"{name} {several(row[name] for row in rows)}"
                         for name in ("torch", "transformers"))
    threads = several(row["threads"] for row in rows)
    device = several(row["device"] for row in rows)
    old = sorted({f"{row['script']} ({what})" for row in rows if (what := results.stale(row))})
    if language == "zh":
        text = f"提交 {commits}；种子 {seeds}；{versions}；{device}，每次运行 {threads} 个线程。"
        return f"*{text}*" + (f" **过期**：{', '.join(old)} 已经变了。" if old else "")
    text = f"Commit {commits}; seeds {seeds}; {versions}; {device}, threads of a run: {threads}."
    return f"*{text}*" + (f" **Stale**: of another {', '.join(old)} than today's." if old else "")


# =========================================== Tables =============================================


def family(found, language, *scripts):
    """The algorithms side by side, a column each."""
    found = {run.script: rows for run, rows in found}
    scripts = [name for name in scripts or found if name in found]

    def of_grpo(rows, what):
        base = np.mean([what(row) for row in found.get("grpo", [])] or [np.nan])
        return over(rows, lambda row: what(row) / base, 2)
    lines = {
        "runs": len,
        "sampled accuracy, before": lambda rows: over(rows, lambda row: sampled(row, 0)),
        "sampled accuracy, after": lambda rows: over(rows, sampled),
        "greedy accuracy, before": lambda rows: over(rows, lambda row: greedy(row, 0)),
        "greedy accuracy, after": lambda rows: over(rows, greedy),
        "steps to 0.8 sampled": COLUMNS["steps to 0.8"],
        "completion tokens to 0.8": COLUMNS["tokens to 0.8"],
        "tokens in all": COLUMNS["tokens in all"],
        "tokens cut, first fifth": lambda rows: over(rows, lambda row: fifth(row, CUT, 0), 4),
        "tokens cut, last fifth": lambda rows: over(rows, lambda row: fifth(row, CUT), 4),
        "KL, last fifth, nats per token": lambda rows: over(rows, lambda row: fifth(row, "kl")),
        "seconds to 0.8, GRPO's = 1": lambda rows: of_grpo(
            rows, lambda row: reached(row, "at seconds")),
        "seconds in all, GRPO's = 1": lambda rows: of_grpo(rows, lambda row: float(row["seconds"]))}
    return (markdown(["", *map(str.upper, scripts)],
                     [[said(name, language), *(value(found[script]) for script in scripts)]
                      for name, value in lines.items()]),
            [row for script in scripts for row in found[script]])


def differences(found, language, *scripts):
    """Differences of the final sampled accuracy, line less column; in bold what exceeds twice its
    standard error."""
    found = {run.script: rows for run, rows in found}
    names = [name for name in scripts or found if name in found]
    last = {name: np.array([sampled(row) for row in found[name]]) for name in names}
    lines = []
    for a in names[:-1]:
        line = [f"{a.upper()} −"]
        for b in names[1:]:
            gap = last[a].mean() - last[b].mean()
            error = sum(each.var(ddof=1) / len(each) if len(each) > 1 else np.inf
                        for each in (last[a], last[b])) ** 0.5
            text = f"{gap:+.3f}" + (f" ± {error:.3f}" if np.isfinite(error) else "")
            text = f"**{text}**" if abs(gap) > 2 * error else text
            line.append(text if names.index(a) < names.index(b) else "")
        lines.append(line)
    return (markdown(["", *map(str.upper, names[1:])], lines),
            [row for name in names for row in found[name]])


def default(found, language):
    """What gspo.py does as it is."""
    rows = found[0][1]
    return markdown(["", said("before", language), said("after 100 steps", language)], [
        [said("sampled accuracy", language), over(rows, lambda row: sampled(row, 0)),
         f"**{over(rows, sampled)}**"],
        [said("greedy accuracy", language), over(rows, lambda row: greedy(row, 0)),
         f"**{over(rows, greedy)}**"],
        [said("tokens cut by the clip", language),
         f"{over(rows, lambda row: fifth(row, CUT, 0))} {said('(first 20 steps)', language)}",
         f"{over(rows, lambda row: fifth(row, CUT))} {said('(last 20)', language)}"],
        [said("KL to the start, nats per token", language), 0,
         over(rows, lambda row: fifth(row, "kl"))],
        [said("length, tokens", language), *(
            plain_mean(rows, lambda row: curve(row, "eval/mean_length")[at], 0)  # noqa: B023
            for at in (0, -1))],
        [said("groups without spread", language),
         *(over(rows, lambda row: fifth(row, "frac_reward_zero_std", which), 2)  # noqa: B023
           for which in (0, -1))]]), rows


COLUMNS = {  # of tables with a run a line
    "sampled after": lambda rows: over(rows, sampled),
    "greedy after": lambda rows: over(rows, greedy),
    "steps to 0.8": lambda rows: over(rows, lambda row: reached(row, "at step")),
    "tokens cut, first / last 20 steps": lambda rows: " / ".join(
        plain_mean(rows, lambda row: fifth(row, CUT, which), 4)  # noqa: B023
        for which in (0, -1)),
    "best sampled": lambda rows: over(rows, best),
    "KL, last 20 steps": lambda rows: over(rows, lambda row: fifth(row, "kl")),
    "true accuracy, best": lambda rows: over(rows, best),
    "true accuracy, end": lambda rows: over(rows, sampled),
    "reward model's score, end": lambda rows: over(rows, lambda row: fifth(row, "rewards/model")),
    "sampled": lambda rows: over(rows, sampled), "greedy": lambda rows: over(rows, greedy),
    "best on the way": lambda rows: over(rows, best),
    "KL per answer": lambda rows: over(rows, lambda row: float(
        row.get("final KL per answer", np.nan)), 2),
    "chosen, rejected log-prob": lambda rows: ", ".join(
        over(rows, lambda row: curve(row, f"watched/{name}_logp")[-1], 2)  # noqa: B023
        for name in ("chosen", "rejected")),
    "watched pairs in order": lambda rows: over(
        rows, lambda row: curve(row, "watched/preference_accuracy")[-1]),
    "by the gain": lambda rows: over(rows, lambda row: curve(row, "watched/implicit_accuracy")[-1]),
    "entropy": lambda rows: over(rows, lambda row: curve(row, "entropy")[-1]),
    "length": lambda rows: over(rows, lambda row: curve(row, "eval/mean_length")[-1], 1),
    "accuracy in training, steps 1 to 10": lambda rows: each(
        rows, lambda row: fifth(row, "accuracy", 0)),
    "steps 26 to 30": lambda rows: each(rows, lambda row: fifth(row, "accuracy")),
    "held out, step 30": lambda rows: each(rows, sampled),
    "tokens to 0.8": lambda rows: over(rows, lambda row: reached(row, "at num_tokens")),
    "tokens in all": lambda rows: over(rows, lambda row: curve(row, "at num_tokens")[-1]),
    "entropy, first / last 20 steps": lambda rows: " / ".join(
        over(rows, lambda row: fifth(row, "entropy", which)) for which in (0, -1)),  # noqa: B023
    "gradient norm, mean": lambda rows: over(rows, lambda row: curve(row, "grad_norm").mean()),
    "sampled, each seed": lambda rows: each(rows, sampled),
    "greedy, each seed": lambda rows: each(rows, greedy),
}
COLUMNS |= {"sampled, best": COLUMNS["best sampled"], "sampled, end": COLUMNS["sampled"],
            "greedy, end": COLUMNS["greedy"]}


def by_line(corner, *columns, which=lambda run: True):
    """A table function: a line for each of an experiment's runs."""
    def made(found, language):
        chosen = [(run, rows) for run, rows in found if which(run)]
        lines = [[said(run.label or run.script, language), *(COLUMNS[name](rows)
                                                             for name in columns)]
                 for run, rows in chosen]
        return (markdown([said(name, language) for name in (corner, *columns)], lines),
                [row for _, rows in chosen for row in rows])
    return made


def cells():
    """The map's runs that have rows: {(label, rate, updates): rows}."""
    found = {}
    rows = results.all_rows()
    for label in experiments.LOSSES:
        for updates in experiments.UPDATES:
            for rate in experiments.RATES:
                made = experiments.on_the_map(label, rate, updates)
                some = [rows[k] for seed in range(3) if made
                        and (k := key_of(made[0], made[1], seed)) in rows]
                if some:
                    found[label, rate, updates] = some
    return found


def stability(found, language):
    """The map in numbers: held-out accuracy at the end; of the runs, how many failed."""
    known = cells()
    places = [(rate, n) for n in experiments.UPDATES for rate in experiments.RATES]
    lines = []
    for label in experiments.LOSSES:
        row = [label]
        for rate, updates in places:
            some = known.get((label, rate, updates), [])
            bad = sum(map(failed, some))
            text = mean([0.0 if each["end"] else sampled(each) for each in some], 2).split(" ±")[0]
            row.append(f"{text} ({bad} {said('failed', language)})" if bad else text)
        lines.append(row)
    rule = ("失败：最后的留出采样准确率比开始时低，或者梯度不再是有限的数。" if language == "zh" else
            "Failed: it ends below where it began, by the sampled held-out accuracy, or its "
            "gradients are no longer finite.")
    table = markdown([said("learning rate × updates per rollout", language),
                      *(f"{rate} × {n}" for rate, n in places)], lines)
    return f"{table}\n\n{rule}", [row for rows in known.values() for row in rows]


def failures(found, language):
    """The share of the map's runs that failed, by loss, and how far the policy went."""
    known, lines = cells(), []
    for label in experiments.LOSSES:
        some = [row for (name, *_), rows in known.items() if name == label for row in rows]
        far = [mean([float(row.get("final KL per token", np.nan))
                     for row in known.get((label, "4e-4", n), [])], 2).split(" ±")[0]
               for n in (4, 16)]
        if some:
            lines.append([label, f"{sum(map(failed, some))} / {len(some)}", *far])
    header = ["", "failed runs, of all", "KL at the end, nats per token, at 4e-4 × 4",
              "KL at the end, nats per token, at 4e-4 × 16"]
    return (markdown([said(text, language) for text in header], lines),
            [row for rows in known.values() for row in rows])


def corner(found, language):
    """80 steps where most break: as after 25, and at the end."""
    lines = []
    for run, rows in found:
        early = cells().get((run.label, "4e-4", 16), [])
        lines.append([run.label, over(early, sampled, 2), over(rows, sampled, 2),
                      over(rows, greedy, 2)])
    header = ["4e-4 × 16", "at step 25", "at step 80", "greedy, end"]
    return (markdown([said(text, language) for text in header], lines),
            [row for _, rows in found for row in rows])


def caps(found, language):
    """CISPO's two caps at the corners of the map: accuracy on the training questions, each seed."""
    known, lines = cells(), []
    default = [known["CISPO", *place] for place in experiments.CORNERS]
    for words, cap, corners in (("CLIP_RANGE=(1.0, 0.2)", "1.2", default),
                                ("CLIP_RANGE=(1.0, 4.0)", "5", [rows for _, rows in found])):
        lines.append([f"`{words}`", cap])
        for rows in corners:
            lines[-1] += [each(rows, lambda row: fifth(row, "accuracy")),
                          f"{100 * np.mean([curve(row, CUT).mean() for row in rows]):.2g} %"]
    header = ["", "the cap", "4 updates per rollout", "weights capped", "16 updates",
              "weights capped"]
    return (markdown([said(text, language) for text in header], lines),
            [row for rows in (*default, *(rows for _, rows in found)) for row in rows])


def rates(found, language):
    """REINFORCE's learning rates: accuracy on the training questions at the end, each seed."""
    lines = {}
    for run, rows in found:
        lines.setdefault(run.label, []).append(each(rows, lambda row: fifth(row, "accuracy")))
    return (markdown(["LEARNING_RATE", "1e-4", "2e-4", "4e-4", "8e-4"],
                     [[said(label, language), *cells] for label, cells in lines.items()]),
            [row for _, rows in found for row in rows])


def relatives(found, language):
    """GRPO with a constant or two of its relatives; how long right and wrong answers become."""
    def tokens(rows, when):
        values = [[float(row[f"tokens of {which} answers, {when}"]) for row in rows]
                  for which in ("right", "wrong")]
        return [f"{np.mean(some):.1f}" + (f" ± {np.std(some, ddof=1) / len(some) ** 0.5:.1f}"
                                          if when == "after" and len(some) > 1 else "")
                for some in values]
    first = found[0][1]
    lines = [["before", over(first, lambda row: sampled(row, 0)),
              over(first, lambda row: greedy(row, 0)), "", *tokens(first, "before")]]
    lines += [[run.label, over(rows, sampled), over(rows, greedy), COLUMNS["steps to 0.8"](rows),
               *tokens(rows, "after")] for run, rows in found]
    return (markdown(["", "sampled", "greedy", "steps to 0.8", "right answers, tokens",
                      "wrong answers, tokens"], lines), [row for _, rows in found for row in rows])


def group_sizes(found, language):
    """As many answers in larger groups: by default, and in the map's corner."""
    edge, plain = ({run.label: rows for run, rows in found
                    if ("EVAL_EVERY=0" in run.constants) == short} for short in (True, False))
    lines = [[said(label, language), over(rows, sampled), over(rows, greedy),
              COLUMNS["steps to 0.8"](rows),
              over(rows, lambda row: fifth(row, "frac_reward_zero_std"), 2),
              over(edge.get(label, []), sampled, 2)] for label, rows in plain.items()]
    header = ["", "sampled after", "greedy after", "steps to 0.8",
              "groups without spread, last 20 steps", "4e-4 × 16, after 25 steps"]
    return (markdown([said(text, language) for text in header], lines),
            [row for _, rows in found for row in rows])


def gradients(found, language):
    """The cosine to GRPO's gradient at updates of one rollout; the first two, with each loss's own
    mean and with GRPO's, say what is the loss and what is the mean."""
    def at(rows, update, name="same mean"):
        return mean([curve(row, name)[update - 1] for row in rows], 2)
    updates = (2, 3, 5, 9, 16)
    return (markdown([said(text, language) for text in ("update", "1, its own mean", "1")]
                     + [str(n) for n in updates],
                     [[run.label, at(rows, 1, "cosine"), at(rows, 1),
                       *(at(rows, n) for n in updates)] for run, rows in found
                      if run.label != "GRPO"]),
            [row for _, rows in found for row in rows])


def length(found, language):
    """The log-ratio after 4 updates against the answer's length: means over seeds."""
    rows = found[0][1]
    names = ["answers", "length", "sd of a token", "sd of the mean", "sd of the sum"]
    starts = LENGTHS
    header = ["tokens", *(f"{low}–{high - 1}" for low, high in pairwise(starts)),
              f"{starts[-1]}–"]
    return (markdown([said(header[0], language), *header[1:]], [
        [said(name, language), *(mean([curve(row, name)[i] for row in rows], digits)
                                 for i in range(len(starts)))]
        for name, digits in zip(names, (0, 1, 3, 3, 2))]), rows)


def dose(*words):
    """Whether a run has these constants, and of the other doses' none."""
    others = {word for each in (experiments.OVERUSE, experiments.SOURCE) for word in each}
    return lambda run: set(run.constants) & others == set(words)


def self_play(found, language):
    """self_play.py as it is: before, after, and each seed."""
    rows = found[0][1]

    def pair(place):
        return ", ".join(over(rows, lambda row: curve(row, f"watched/{name}_logp")[place], 2)
                         for name in ("chosen", "rejected"))  # noqa: B023
    order = "watched/preference_accuracy"
    return markdown(["", "before", "after 12 rounds", "each seed, after"], [
        ["held-out accuracy, sampled at T = 1", over(rows, lambda row: sampled(row, 0)),
         over(rows, sampled), each(rows, sampled)],
        ["held-out accuracy, greedy", over(rows, lambda row: greedy(row, 0)), over(rows, greedy),
         each(rows, greedy)],
        ["KL to the start, nats per answer", 0, COLUMNS["KL per answer"](rows), ""],
        ["log-prob of the watched pairs: chosen, rejected", pair(0), pair(-1), ""],
        ["watched pairs in order", over(rows, lambda row: curve(row, order)[0]),
         over(rows, lambda row: curve(row, order)[-1]), ""],
        ["rounds to 0.8 sampled", "", over(rows, lambda row: reached(row, "at step"), 1), ""],
    ]), rows


# ---- Experts


def measured(rows, name, percent=False):
    """Mean and error of a number of rows of routing.py."""
    values = [float(row[name]) for row in rows if name in row]
    if not values:
        return "-"
    values = np.array(values) * (100 if percent else 1)
    text = f"{np.mean(values):.2g}" if percent else f"{np.mean(values):.1e}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.{'1g' if percent else '0e'}}"
    return text + " %" * percent


def of_routing(script, **given):
    """The rows of routing.py with these constants."""
    words = {f"{name}={value}" for name, value in given.items()}
    return [row for row in results.read(results.RESULTS / "routing.csv")
            if row["script"] == script and words <= {*results.words_of(row)}]


def routing(found, language):
    """Engine KL by updates, and where sampler and trainer choose other experts."""
    header = ["updates", "routers changed", "tokens with a change", "layers changed, of a token",
              "engine KL: dense", "experts, none", "R2", "R3", "tokens beyond 2: none", "R3"]
    lines, rows = [], []
    for updates in (0, 1, 4, 16):
        dense = of_routing("grpo", updates=updates)
        none, two, three = (of_routing("moe", updates=updates, replay=replay)
                            for replay in ("none", "R2", "R3"))
        rows += [*dense, *none, *two, *three]
        lines.append([updates, measured(none, "routers", True), measured(none, "tokens", True),
                      mean([float(row["layers"]) for row in none], 2),
                      *(measured(some, "engine_kl") for some in (dense, none, two, three)),
                      *(measured(some, "extreme", True) for some in (none, three))])
    return markdown([said(text, language) for text in header], lines), rows


def flips(found, language):
    """What other experts alone do to ratios, after one update."""
    header = ["learning rate", "routers changed", "answers moved by more than GSPO's clip width",
              "tokens moved by more than 0.2", "sd of tokens: free", "forced",
              "sd of answers: free", "forced"]
    lines, rows = [], []
    for rate in ("0.0001", "1e-06"):
        some = of_routing("moe", rate=rate)
        rows += some
        lines.append([rate, *(measured(some, name, True) for name in (
            "routers", "answers", "tokens beyond 0.2")), *(measured(some, name) for name in (
                "sd of tokens", "sd of tokens, forced", "sd of answers", "sd of answers, forced"))])
    return markdown([said(text, language) for text in header], lines), rows


def noise(found, language):
    """A sampler whose routers choose by noisy logits."""
    header = ["noise, in stds of the logits", "routers changed", "the sampler's accuracy",
              "engine KL: none", "R3"]
    lines, rows = [], []
    for size in (0.1, 0.3, 1.0):
        none, three = (of_routing("moe", noise=size, replay=replay) for replay in ("none", "R3"))
        rows += [*none, *three]
        lines.append([size, measured(none, "routers", True), measured(none, "accuracy", True),
                      measured(none, "engine_kl"), measured(three, "engine_kl")])
    return markdown([said(text, language) for text in header], lines), rows


def experts(found, language):
    """Runs with experts: a line for each."""
    def largest(rows, name):
        return ", ".join(f"{curve(row, name).max():.3g}" for row in rows)
    header = ["", "sampled after", "greedy after", "gradient norm, max", "largest token ratio",
              "largest ratio of an answer", "engine KL", "routers changed",
              "effective experts, least of a layer"]
    lines = [[said(run.label, language), over(rows, sampled), over(rows, greedy),
              ", ".join(f"{curve(row, 'grad_norm').max():.2g}" for row in rows),
              largest(rows, "ratio/token_max"), largest(rows, "ratio/sequence_max"),
              measured([{"x": curve(row, "engine_kl").mean()} for row in rows], "x"),
              over(rows, lambda row: curve(row, "routing/routers_changed").mean()),
              over(rows, lambda row: curve(row, "experts/effective_min")[-1], 1)]
             for run, rows in found]
    return (markdown([said(text, language) for text in header], lines),
            [row for _, rows in found for row in rows])


# ---- GAD


def at_step(row, name, step):
    """A number of an evaluation at a step."""
    return curve(row, name)[list(curve(row, "at step")).index(float(step))]


def kept(rows, name, digits=3):
    """Mean and error of a number that rows of gad.py have."""
    return over(rows, lambda row: float(row.get(name, np.nan)), digits)


def gad(found, language):
    """GAD against its first stage alone."""
    named = {run.label: rows for run, rows in found}
    game, alone = named.get("GAD", []), named.get("SeqKD alone", [])
    first = [*game, *alone]
    lines = []
    for text, name in (("sampled", "eval/accuracy"), ("greedy", "eval/accuracy_greedy")):
        lines += [[f"GAD, {text}", over(first[:len(game)], lambda row: curve(row, name)[0]),
                   over(game, lambda row: at_step(row, name, row["step after stage 1"])),
                   over(game, lambda row: curve(row, name)[-1])],
                  [f"**SeqKD alone**, {text}", over(alone, lambda row: curve(row, name)[0]), "",
                   over(alone, lambda row: curve(row, name)[-1])]]
    return markdown(["", "start", "after SeqKD, 15 steps", "after all 100 steps"], lines), first


def gad_variations(found, language):
    """One constant at a time."""
    lines = [[f"`{' '.join(run.constants)}`" if run.constants else run.label, over(rows, sampled),
              over(rows, greedy), " / ".join(kept(rows, f"d_rank, {part} 10 of the game", 2)
                                             for part in ("first", "last"))]
             for run, rows in found]
    return (markdown(["after all 100 steps", "sampled", "greedy",
                      "d_rank, first / last 10 of the game"], lines),
            [row for _, rows in found for row in rows])


def gad_collapses(found, language):
    """A column for each collapse."""
    def last(name, digits=2):
        return lambda rows: kept(rows, f"{name}, last 10 of the game", digits)
    lines = {
        "sampled accuracy: best, end": lambda rows: f"{over(rows, best)}, {over(rows, sampled)}",
        "greedy accuracy, end": lambda rows: over(rows, greedy),
        "d_acc, last 10 steps of the warm-up": lambda rows: kept(rows,
                                                                 "d_acc, last 10 of the warm-up"),
        "largest gap": lambda rows: kept(rows, "largest gap", 1),
        "d_rank, first / last 10 steps of the game": lambda rows: " / ".join(
            kept(rows, f"d_rank, {part} 10 of the game", 2) for part in ("first", "last")),
        "D's gradient norm, last 10": last("d_grad_norm", 3),
        "groups of equal scores, last 10": last("frac_no_signal"),
        "the teacher's text, last 10": last("matches_teacher"),
        "length, last 10, tokens": last("completions/mean_length", 1)}
    return (markdown(["", *(run.label for run, _ in found)],
                     [[name, *(value(rows) for _, rows in found)]
                      for name, value in lines.items()]),
            [row for _, rows in found for row in rows])


def gad_outcomes(found, language):
    """Sampled and greedy accuracy at the end, and the best of the game: a line for each run."""
    lines = [[run.label, over(rows, sampled), over(rows, greedy), over(rows, best),
              row_steps(rows)] for run, rows in found]
    return (markdown(["", "sampled, end", "greedy, end", "sampled, best", "steps"], lines),
            [row for _, rows in found for row in rows])


def row_steps(rows):
    """The number of steps that runs took."""
    return ", ".join(sorted({row["steps"] for row in rows}, key=int))


FORMS = ["sampled", "best on the way", "greedy", "KL per answer", "chosen, rejected log-prob",
         "watched pairs in order", "by the gain", "entropy", "length"]
TABLES = {  # name -> experiments, function of their `groups`, the language and further words
    "family": (["family"], family),
    "differences": (["family"], differences),
    "default": (["default"], default),
    "stability": (["stability"], stability),
    "failures": (["stability"], failures),
    "corner": (["corner"], corner),
    "caps": (["caps"], caps), "rates": (["rates"], rates),
    "baseline": (["baseline"], by_line("`BASELINE`", "accuracy in training, steps 1 to 10",
                                       "steps 26 to 30", "held out, step 30",
                                       "gradient norm, mean")),
    "gradients": (["gradients"], gradients),
    "length": (["length"], length),
    "hacking": (["hacking"], by_line("reward", "true accuracy, best", "true accuracy, end",
                                     "greedy, end", "reward model's score, end")),
    "clip": (["clip"], by_line("", "sampled after", "greedy after", "steps to 0.8",
                               "tokens cut, first / last 20 steps")),
    "kl": (["kl"], by_line("TARGET_KL", "sampled after", "greedy after", "best sampled",
                           "KL, last 20 steps")),
    "learning_rate": (["learning_rate"], by_line("LEARNING_RATE", "sampled, best", "sampled, end",
                                                 "greedy, end", "KL, last 20 steps")),
    "self_play": (["self_play"], self_play),
    "preferences": (["preferences"], by_line("2 passes at 1e-4, 12 rounds", *FORMS, which=dose())),
    "overuse": (["preferences"], by_line("8 passes at 3e-4, 4 rounds", *FORMS,
                                         which=dose(*experiments.OVERUSE))),
    "passes": (["passes"], by_line("15 passes at 1e-4, 3 rounds", *FORMS)),
    "variations": (["variations"], by_line("", "sampled, each seed", "greedy, each seed")),
    "gad": (["gad"], gad),
    "gad_variations": (["gad_variations"], gad_variations),
    "gad_collapses": (["gad_collapses"], gad_collapses),
    "gad_remedies": (["gad_remedies"], gad_collapses),
    "gad_teachers": (["gad_teachers", "gad_few"], gad_outcomes),
    "routing": ([], routing), "flips": ([], flips), "noise": ([], noise),
    "dapo_parts": (["dapo_parts"], by_line("", "sampled", "greedy", "steps to 0.8", "tokens to 0.8",
                                           "tokens in all", "entropy, first / last 20 steps")),
    "relatives": (["relatives"], relatives),
    "group_sizes": (["group_sizes"], group_sizes),
    "experts": (["experts"], experts), "experts_edge": (["experts_edge"], experts),
}


def table(name, language="en"):
    """The text between the markers of a table; `name` with its further words."""
    name, *words = name.split()
    if name not in TABLES:
        raise SystemExit(f"error: no table {name!r}; expected one of {', '.join(TABLES)}")
    wanted, function = TABLES[name]
    found = [pair for each in wanted for pair in groups(each)]
    text, rows = function(found, language, *words) if found or not wanted else ("", [])
    if not rows:
        return said("not run", language)
    return f"{text}\n\n{note(rows, language)}"


def whole(name):
    """Whether every run of a table has its row."""
    name, *words = name.split()
    runs = [run for each in TABLES.get(name, ([], None))[0] for run in experiments.EXPERIMENTS[each]
            if run.script in words or not words]
    rows = results.all_rows()
    return all(key_of(run.script, run.constants, seed) in rows
               for run in runs for seed in run.seeds)


def with_tables(text, language):
    """A page's text with its tables made anew. A table that lacks rows stays as it is, if there is
    one: it says itself of what runs it is."""
    return re.sub(r"(<!-- results ([\w ]+?) -->\n)(.*?)(?=<!-- end -->)", lambda at: at[0]
                  if at[3].strip() and not whole(at[2]) else
                  f"{at[1]}{table(at[2], language)}\n", text, flags=re.S)


def shown_in(name):
    """The pages that show a table."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "RL_HAND").rglob("*.md"), ROOT / "benchmarks/README.md"]
    return [page.relative_to(ROOT).as_posix() for page in sorted(pages)
            if re.search(rf"<!-- results {name}[ -]", page.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    for chosen in sys.argv[1:] or TABLES:
        if (made := table(chosen)) != "not run":
            print(f"\n## {chosen}\n\n{made}")
