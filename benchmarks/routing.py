"""What experts and routing replay do to the ratios that are trained, measured on one rollout.

    python benchmarks/routing.py              # the seeds 0, 1, 2 that have no row yet; the figures
    python benchmarks/routing.py SEED ...     # these seeds, measured anew

A row is one policy after some updates, scored in one way, in results/routing.csv: the pages' tables
and figures come from there. The rollout is 256 answers of the starting policy, drawn by its copy in
lower precision; rewarded by the verifier; the updates are GRPO's, 64 answers each, at 1e-4. `gap`:
engine KL after 0, 1, 4 and 16 updates, of a dense policy and of experts with and without replay.
`flips`: what one update does to the ratios of answers through other experts alone, in float32.
`noise`: a sampler whose routers are drowned in noise. `token`: where one token goes, by layer.
"""

import contextlib
import copy
import io
import itertools
import re
import sys
import tempfile
import time

import numpy as np
import torch
from matplotlib.figure import Figure
from results import (FACTS, RESULTS, ROOT, code_of, curve, data_of, facts_here, import_file,
                     natural, number, places, read, source_of, words_of, write)

FILE, IMAGES = RESULTS / "routing.csv", ROOT / "RL_HAND" / "moe" / "images"
SEEDS, UPDATES, NOISES, RATES = (0, 1, 2), (0, 1, 4, 16), (0.1, 0.3, 1.0), (1e-4, 1e-6)
GIVEN = ["PROFILE=embedded", "DEVICE=cpu", "FROZEN_DEVICE=cpu", "BATCH_SIZE=32", "MINIBATCH=64",
         "REWARD_WEIGHTS={'verifier': 1.0}", "EVAL_QUESTIONS=1", "MAX_STEPS=1"]
WIDTH = 7e-4  # of GSPO's clip range, 3e-4 + 4e-4


def start(name, seed, *given):
    """A script as a module, and a run of it before its first step, with a rollout and rewards."""
    script = import_file(ROOT / "RL_HAND" / name / f"{name}.py")
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        run = script.start([*GIVEN, f"SEED={seed}", f"OUTPUT_DIR={folder}/run", *given])
    rows = script.next_questions(run, script.BATCH_SIZE)
    sampler = (script.sampler(run) if name == "moe" else
               copy.deepcopy(run.policy).to(torch.bfloat16))
    torch.manual_seed(seed)
    batch = script.sample_groups(sampler, run.tokenizer, rows, script.GROUP_SIZE)
    rewards, _ = script.score_completions(run, rows, batch)
    batch.advantages = script.compute_advantages(rewards)[:, None].expand_as(batch.completion_mask)
    return script, run, batch, float(rewards.mean())


def scored(script, policy, batch, played=None):
    """Log-probs (B, T) of a rollout and, of experts, what each router chose by itself."""
    if script.__name__ != "moe":
        return script.score_without_grad(policy, batch), None
    logps, routes = torch.zeros_like(batch.completion_mask), torch.zeros_like(batch.routes)
    with torch.no_grad():
        for index in script.micro_batches(batch):
            micro = batch.rows(index)
            logps[index], _, tape = script.score_on_tape(
                policy, micro, None if played is None else played[index])
            routes[index] = script.spread(micro, tape.own)
    return logps, routes


def update(script, run, minibatch, played):
    """One step of GRPO on a minibatch, as `train` takes it."""
    minibatch.weights = script.token_weights(minibatch.completion_mask)
    for index in script.micro_batches(minibatch):
        micro = minibatch.rows(index)
        logps = (script.score_on_tape(run.policy, micro, getattr(micro, played or "", None))
                 if script.__name__ == "moe" else script.score_tokens(run.policy, micro))[0]
        loss, _ = script.policy_loss(logps, micro.old_logps, micro.advantages,
                                     micro.completion_mask)
        (loss * micro.weights).sum().backward()
    script.optimiser_step(run, "policy", script.Meter())


def distance(batch, logps):
    """How far a policy is from mu, by which the tokens were drawn; see `measure_routing`."""
    mask = batch.completion_mask.bool()
    gap = (logps - batch.sampled_logps)[mask].double()
    return {"engine_kl": (gap.expm1() - gap).mean(), "largest": gap.max().exp(),
            "extreme": (gap.abs() > np.log(2)).double().mean()}


def changes(script, batch, one, other):
    """Where two tapes differ, over the tokens of the answers."""
    differ = script.changed_routers(batch, one, other)[batch.completion_mask.bool()]   # (n, layers)
    return {"routers": differ.mean(), "tokens": differ.amax(1).mean(),
            "layers": differ.sum(1).mean()} | {
                f"layer {i + 1}": share for i, share in enumerate(differ.mean(0))}


def gap(seed):
    """Rows of engine KL by updates: a dense policy; experts without replay, with R2, with R3."""
    for name, modes in (("grpo", [""]), ("moe", ["none", "R2", "R3"])):
        given = ["RATIO=token", "SAMPLER_DTYPE=bfloat16"] * (name == "moe")
        script, run, batch, _ = start(name, seed, *given)
        weights = copy.deepcopy(run.policy.state_dict())
        for mode in modes:
            run.policy.load_state_dict(weights)
            run.trained["policy"] = run.policy, script.new_optimizer(run.policy, 1e-4)
            batch.old_logps, own = scored(script, run.policy, batch,
                                          batch.routes if mode == "R3" else None)
            if own is not None:
                batch.old_routes = own
            played = {"R2": "old_routes", "R3": "routes"}.get(mode)
            torch.manual_seed(seed)
            order = script.minibatches(batch, 4)
            for done in range(max(UPDATES) + 1):
                if done in UPDATES:
                    logps, _ = scored(script, run.policy, batch, getattr(batch, played or "", None))
                    found = distance(batch, logps)
                    if mode == "none":  # what each would choose by itself
                        _, free = scored(script, run.policy, batch)
                        found |= changes(script, batch, batch.routes, free)
                        if done == 1:
                            found |= token(script, batch, free)
                    yield name, {"replay": mode, "updates": done}, found
                if done < max(UPDATES):
                    update(script, run, next(order), played)


def token(script, batch, updated):
    """How much each expert is used, and where one token goes, the one whose way one update changes
    in most layers: by sampler and trainer before it, and behind it. As texts, layer by layer."""
    mask = batch.completion_mask.bool()
    place = int(script.changed_routers(batch, batch.old_routes, updated)[mask].sum(1).argmax())
    load = script.expert_load(batch, batch.completion_mask, 32)
    ways = {"sampler": batch.routes, "trainer": batch.old_routes, "updated": updated}
    return {"use": text((load * 1000).round().int())} | {
        name: text(script.at_answers(batch, each)[mask][place]) for name, each in ways.items()}


def text(table):
    """A table of small integers as a text: rows with commas, between them spaces."""
    return " ".join(",".join(map(str, row)) for row in table.tolist())


def flips(seed):
    """Rows of what one update does to ratios, with its own routes and with those of before."""
    for rate in RATES:
        script, run, batch, _ = start("moe", seed, "RATIO=token", "SAMPLER_DTYPE=float32")
        run.trained["policy"] = run.policy, script.new_optimizer(run.policy, rate)
        batch.old_logps, batch.old_routes = scored(script, run.policy, batch)
        torch.manual_seed(seed)
        update(script, run, next(script.minibatches(batch, 1)), None)
        mask = batch.completion_mask
        free, own = scored(script, run.policy, batch)
        forced, _ = scored(script, run.policy, batch, batch.old_routes)
        by_flips, learned = (free - forced) * mask, (forced - batch.old_logps) * mask
        answers, real = by_flips.sum(1) / mask.sum(1), mask.bool()
        yield "moe", {"rate": f"{rate:g}"}, changes(script, batch, batch.old_routes, own) | {
            "answers": (answers.abs() > WIDTH).float().mean(),
            "tokens beyond 0.2": (by_flips[real].abs() > np.log(1.2)).float().mean(),
            "sd of tokens": by_flips[real].std(), "sd of answers": answers.std(),
            "sd of tokens, forced": learned[real].std(),
            "sd of answers, forced": (learned.sum(1) / mask.sum(1)).std()}


def noise(seed):
    """Rows of a sampler, in float32, whose routers choose by noisy logits."""
    for size in NOISES:
        script, run, batch, reward = start("moe", seed, "RATIO=token", "SAMPLER_DTYPE=float32",
                                           f"ROUTER_NOISE={size}")
        free, own = scored(script, run.policy, batch)
        forced, _ = scored(script, run.policy, batch, batch.routes)
        moved = changes(script, batch, batch.routes, own)
        for mode, logps in (("none", free), ("R3", forced)):
            yield "moe", {"noise": size, "replay": mode}, distance(batch, logps) | moved | {
                "accuracy": reward}


def measure(seed):
    """All rows of a seed, as texts."""
    known, began = facts_here(), time.perf_counter()
    for name, given, found in itertools.chain(gap(seed), flips(seed), noise(seed)):
        source, given = source_of(name), {"MEASURE": "routing"} | given
        row = dict.fromkeys(FACTS, "") | known | {
            "script": name, "seed": str(seed), "steps": "1", "seconds of evaluations": "0",
            "constants": "; ".join(f"{key}={value}" for key, value in given.items() if value != ""),
            "code": code_of(source), "data": data_of(source, []), "threads": "1",
            "seconds": number(time.perf_counter() - began, 3)}
        began = time.perf_counter()
        yield row | {key: value if isinstance(value, str) else number(value, 4)
                     for key, value in found.items()}


# ============================================ Figures ===========================================

LINES = {"moe replay=none": ("experts, no replay", "C3"), "moe replay=R2": ("experts, R2", "C1"),
         "moe replay=R3": ("experts, R3", "C0"), "grpo": ("dense", "grey")}


def draw_gap(rows, file):
    """Engine KL by updates, and by layer how many routers have changed."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, (label, colour) in LINES.items():
        name, _, mode = key.partition(" ")
        some = [row for row in rows if row["script"] == name and "updates=" in row["constants"]
                and mode in row["constants"]]
        values = np.array([[float(row["engine_kl"]) for row in some
                            if row["constants"].endswith(f"updates={n}")] for n in UPDATES])
        x = range(len(UPDATES))
        left.plot(x, values.mean(1), color=colour, marker="o", markersize=4, label=label)
        left.fill_between(x, values.min(1), values.max(1), color=colour, alpha=0.15, linewidth=0)
    left.set(yscale="log", xlabel="updates since the answers were drawn",
             title="KL(sampler || policy that is trained), nats per token")
    left.set_xticks(range(len(UPDATES)), UPDATES)
    left.legend(frameon=False, fontsize=9)
    free = [row for row in rows if "replay=none; updates" in row["constants"]]
    for number_of, colour in zip(UPDATES, ("C0", "C2", "C1", "C3")):
        some = [row for row in free if row["constants"].endswith(f"updates={number_of}")]
        layers = sorted((name for name in some[0] if name.startswith("layer ")), key=natural)
        shares = [np.mean([float(row[name]) for row in some]) for name in layers]
        right.plot(range(1, len(layers) + 1), shares, color=colour, marker="o", markersize=4,
                   label=f"{number_of} updates")
    right.set(xlabel="layer", title="share of routers that choose other experts", ylim=(0, None))
    right.yaxis.set_major_formatter("{x:.0%}")
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def draw_token(rows, file):
    """How much each expert is used, and where one token goes: for sampler, trainer, and trainer
    after one update."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    row = next(row for row in rows if row.get("use"))
    use = np.array([[int(x) for x in layer.split(",")] for layer in row["use"].split()]) / 1000
    marks = {"sampler": ("o", "C0", "by the sampler, bfloat16"), "trainer": ("x", "C3", "by the "
             "trainer, float32"), "updated": ("+", "C2", "by the trainer, after one update")}
    for axes, (one, other) in zip(figure.subplots(1, 2, sharey=True),
                                  (("sampler", "trainer"), ("trainer", "updated"))):
        image = axes.imshow(use, cmap="Greys", vmin=0, vmax=0.2, aspect="auto")
        for name in (one, other):
            marker, colour, label = marks[name]
            spots = [(expert, layer) for layer, some in enumerate(row[name].split())
                     for expert in map(int, some.split(","))]
            axes.plot(*zip(*spots), marker, color=colour, markersize=10, markeredgewidth=2,
                      fillstyle="none", label=label)
        axes.set(title=f"one token's experts: {one} against {other}", xlabel="expert")
        axes.set_yticks(range(len(use)), range(1, len(use) + 1))
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2,
                    frameon=False)
    figure.axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=figure.axes, label="share of all choices", format="{x:.0%}")
    figure.savefig(file, dpi=110)


def draw_largest(rows, file):
    """The largest ratio of a token, and of an answer, in each step of the runs of `experts`."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    wanted = (("GRPO: a token's, pi / pi_old", "token", "ratio/token_max"),
              ("GSPO: a token's, pi / pi_old", "sequence", "ratio/token_max"),
              ("GSPO: an answer's", "sequence", "ratio/sequence_max"))
    for axes, (title, ratio, metric) in zip(figure.subplots(1, 3), wanted):
        for replay, colour in (("none", "C3"), ("R2", "C1"), ("R3", "C0")):
            some = [row for row in rows if {f"RATIO={ratio}", f"ROUTING_REPLAY={replay}",
                                            "ENTROPY_COEF=0.0"} <= {*words_of(row)}
                    and not re.search("LEARNING_RATE|ROUTER_NOISE", row["constants"])]
            for row in some:
                axes.plot(places(row, metric), curve(row, metric), color=colour, linewidth=1.2,
                          alpha=0.8, label=replay if row is some[0] else None)
        axes.set(title=title, xlabel="step")
        if "token" in metric:
            axes.set(yscale="log", ylim=(1, None))
            axes.set_yticks(ticks := [1, 2, 5, 10, 20, 50], ticks)
            axes.set_yticks([], minor=True)
            axes.set_ylim(1, max(curve(row, metric).max() for row in rows
                                 if "ROUTER_NOISE" not in row["constants"]))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9, title="replay")
    figure.savefig(file, dpi=110)


def main(arguments):
    """Measure the seeds that are missing, or those that are named; draw."""
    torch.set_num_threads(1)
    rows = read(FILE)
    wanted = [int(seed) for seed in arguments] or \
        [seed for seed in SEEDS if str(seed) not in {row["seed"] for row in rows}]
    for seed in wanted:
        new = [*measure(seed)]
        rows = [row for row in rows if row["seed"] != str(seed)] + new
        write(FILE, rows)
        print(f"seed {seed}: {len(new)} rows in {FILE.relative_to(ROOT)}", flush=True)
    IMAGES.mkdir(parents=True, exist_ok=True)
    draw_gap(rows, IMAGES / "engine_kl.png")
    draw_token(rows, IMAGES / "token.png")
    if runs := read(RESULTS / "experts.csv"):
        draw_largest(runs, IMAGES / "largest_ratio.png")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    main(sys.argv[1:])
