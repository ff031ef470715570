"""The runs behind the numbers and figures of the pages.

    python benchmarks/experiments.py              # all that is missing, what is quoted most first
    python benchmarks/experiments.py hacking kl   # only these
    python benchmarks/experiments.py quick        # one seed of some, in 25 minutes on two cores
    python benchmarks/experiments.py list         # what is done, stale, missing, and what it takes
    python benchmarks/experiments.py stale        # rows that are not today's, and who shows them
    python benchmarks/experiments.py rows FOLDER  # take the finished runs in it; runs/experiments
    python benchmarks/experiments.py equal SCRIPT # show that a change has changed no bit
    python benchmarks/experiments.py figures      # draw again what the rows show; NAMES: only these

Each run is a script as it is, started by RL_HAND/compare.py's machinery: one thread each, as many
at a time as there are cores (or WORKERS=2). A run that has ended leaves a row in results/, and a
run that has a row of today's script and data is not made again, whoever made it and whenever: see
results.py. So a long list may be stopped at any time. Runs go to runs/experiments/ and may be
deleted; `python tools/tables.py` puts the rows into the pages.
"""

import contextlib
import functools
import os
import random
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import results
from results import ROOT, constants_in, key_of, source_of

RUNS = ROOT / "runs" / "experiments"


class Run(NamedTuple):
    """A script with constants, for each of the seeds; what it is called in tables and figures."""
    script: str
    constants: list
    seeds: tuple
    label: str = ""


def runs(seeds, *variants):
    """Runs of (script, constants) or (script, constants, label), with the seeds 0 ... seeds-1."""
    return [Run(script, constants, tuple(range(seeds)), *label)
            for script, constants, *label in variants]


FAMILY = ["gspo", "grpo", "dapo", "ppo", "gmpo", "cispo", "reinforce"]
FORMS = [("dpo, β 0.5", [])] + [
    (f"{form.replace('_', '-')}, β {beta}", [f"PREFERENCE_LOSS={form}", f"PREFERENCE_BETA={beta}"])
    for form, beta in (("dpo", 0.1), ("dpo", 1.0), ("reference_free", 0.1), ("reference_free", 1.0),
                       ("length_normalised", 2.0), ("length_normalised", 10.0))]
OVERUSE = ["TOTAL_EPOCHS=8", "LEARNING_RATE=3e-4", "SELF_PLAY_ROUNDS=4", "EVAL_EVERY=1"]
SOURCE = ["TOTAL_EPOCHS=15", "SELF_PLAY_ROUNDS=3", "EVAL_EVERY=1"]
GRADED = ["REWARD_FUNCTION=RL_HAND/self_play/reward_func.py", "REWARD_WEIGHTS={'function': 1.0}"]
MODEL_ALONE = "REWARD_WEIGHTS={'model': 1.0}"
PLAIN = {"REWARD_WEIGHTS": {"verifier": 1.0}, "KL_COEF": 0, "ENTROPY_COEF": 0.0,
         "ADVANTAGE_TYPE": "normalized"}  # of the map: that losses differ, and nothing else
LOSSES = {  # of the map: what it is called -> script and constants
    "GSPO": ("gspo", []), "GSPO, range 0.2": ("gspo", ["CLIP_RANGE=0.2"]),
    "GMPO": ("gmpo", []), "GRPO": ("grpo", []),
    "GRPO, no clip": ("grpo", ["CLIP_RANGE=(1.0, 1e9)"]), "DAPO": ("dapo", []), "PPO": ("ppo", []),
    "CISPO": ("cispo", []), "REINFORCE": ("reinforce", [])}
VERIFIER_ALONE = "REWARD_WEIGHTS={'verifier': 1.0}"
RELATIVES = {  # of GRPO: what each is called, and its constants
    "GRPO": [],
    **{f"`{word}`": [word] for word in (
        "CLIP_RANGE=(0.2, 0.28)", "AGGREGATION=token-mean", "AGGREGATION=dr-grpo",
        "ADVANTAGE_TYPE=relative", "ADVANTAGE_TYPE=batch-std", "ADVANTAGE_TYPE=reinforce++",
        "ADVANTAGE_TYPE=maxrl")},
    "Dr. GRPO": ["AGGREGATION=dr-grpo", "ADVANTAGE_TYPE=relative"],
    "Lite-PPO": ["AGGREGATION=token-mean", "ADVANTAGE_TYPE=batch-std"]}
EXPERTS = [VERIFIER_ALONE, "ENTROPY_COEF=0.0", "ADVANTAGE_TYPE=normalized", "MAX_STEPS=30",
           "EVAL_EVERY=0"]
EDGE = ["LEARNING_RATE=4e-4", "MINIBATCH=32", "MOE_EPOCHS=4"]  # as in the corner of the map
RATES, UPDATES = ("1e-4", "2e-4", "4e-4"), {1: (128, 1), 4: (64, 2), 16: (32, 4)}
CORNERS = [("4e-4", 4), ("4e-4", 16)]  # three seeds; two elsewhere
SHORT = ["MAX_STEPS=30", "EVAL_EVERY=0"]


def gad_data(teacher, path="data/train.parquet"):
    """GAD's training data with another teacher, as an argument."""
    return ("train_datasets=[{'path': '%s', 'input': 'question', 'output': 'answer', "
            "'teacher': '%s'}]" % (path, teacher))


CARELESS = gad_data("teacher_response", f"{results.MADE}careless.parquet")
FEW = gad_data("teacher_response", f"{results.MADE}few.parquet")
UNANSWERED = gad_data("teacher_response", f"{results.MADE}unanswered.parquet")
BOTH = gad_data("teacher_response")[:-1] + ", " + gad_data("teacher_talkative")[16:]
ALONE, TALKATIVE = "SEQKD_STEPS=100", gad_data("teacher_talkative")
SATURATED = ["MAX_STEPS=60", "SEQKD_STEPS=0", "CRITIC_WARMUP=10", "KL_COEF=0.05", TALKATIVE]


def gad(seeds, **variants):
    """Runs of gad.py: {what it is called: its constants}."""
    return runs(seeds, *(("gad", constants, label) for label, constants in variants.items()))


def on_the_map(label, rate, updates, steps=25):
    """Script and constants of a run with a learning rate and so many updates per rollout; None
    where the script is not written, or makes one update only. In one update all ratios are 1, and
    no range cuts: there the runs with another range are those without."""
    script, constants = LOSSES[label]
    constants = constants if updates > 1 else []
    known = constants_in(source_of(script) or "")
    passes = f"{script.upper()}_EPOCHS"
    if not known or updates > 1 and passes not in known:
        return None
    minibatch, epochs = UPDATES[updates]
    wanted = PLAIN | {"LEARNING_RATE": float(rate), "MINIBATCH": minibatch, passes: epochs}
    words = {name: f"{name}={rate if name == 'LEARNING_RATE' else value}"
             for name, value in wanted.items() if name in known and known[name] != value}
    return script, [*constants, *words.values(), f"MAX_STEPS={steps}", "EVAL_EVERY=0"], label


def stability():
    """The map: learning rate x updates per rollout x loss. Its corners first."""
    found = []
    for rate, updates in [*CORNERS, *((rate, n) for n in UPDATES for rate in RATES
                                      if (rate, n) not in CORNERS)]:
        for label in LOSSES:
            made = on_the_map(label, rate, updates)
            if made and made[:2] not in [run[:2] for run in found]:
                found += runs(2 + ((rate, updates) in CORNERS), made)
    return found


def corner():
    """The corner where most break, for longer: those that held for 25 steps, and GRPO."""
    return runs(3, *filter(None, (on_the_map(label, "4e-4", 16, 80)
                                  for label in ("GSPO", "DAPO", "GMPO", "GRPO"))))


def caps():
    """CISPO with a cap of 5 in the corners of the map, where the default, 1.2, stands already."""
    made = (on_the_map("CISPO", *place) for place in CORNERS)
    return runs(3, *((script, [*constants, "CLIP_RANGE=(1.0, 4.0)"])
                     for script, constants, _ in made))


def group_sizes():
    """As many answers a rollout and rollouts, in groups of 8 or of 16: by default, and in the map's
    corner."""
    script, edge, _ = on_the_map("GSPO", "4e-4", 16)
    larger = ["GROUP_SIZE=16", "BATCH_SIZE=8"]
    few, many = "16 questions × 8 answers (default)", "8 questions × 16 answers"
    return runs(3, (script, [], few), (script, [*larger, "MAX_STEPS=100"], many),
                (script, edge, few), (script, [*larger, *edge], many))


EXPERIMENTS = {  # in the order in which they are made
    "family": runs(5, *((script, []) for script in FAMILY)),
    "default": runs(5, ("gspo", [])),
    "stability": stability(),
    "corner": corner(),
    "caps": caps(),
    "baseline": runs(3, *(("reinforce", [*words, *SHORT], label) for label, words in (
        ("`mean`", []), ("`leave-one-out`", ["BASELINE=leave-one-out"]),
        ("`none`", ["BASELINE=none"])))),
    "rates": runs(2, *(
        ("reinforce", [*rate, *over, *SHORT], label) for label, over in (
            ("the sum over tokens (default)", []),
            ("the mean over tokens", ["AGGREGATION=seq-mean-token-mean"]))
        for rate in (["LEARNING_RATE=1e-4"], ["LEARNING_RATE=2e-4"], [], ["LEARNING_RATE=8e-4"]))),
    "gradients": runs(5, *((script, ["MEASURE=gradients", "LEARNING_RATE=4e-4", *constants], label)
                           for label, (script, constants) in LOSSES.items())),
    "length": runs(3, ("grpo", ["MEASURE=length"])),
    "hacking": runs(5, ("gspo", [MODEL_ALONE, "KL_COEF=0"], "model alone, no KL"),
                    ("gspo", [MODEL_ALONE], "model alone, TARGET_KL 0.1"),
                    ("gspo", [MODEL_ALONE, "TARGET_KL=0.01"], "model alone, TARGET_KL 0.01"),
                    ("gspo", [], "model and verifier (default)")),
    "clip": runs(3, ("gspo", [], "3e-4 / 4e-4"), ("gspo", ["CLIP_RANGE=0.2"], "0.2")),
    "kl": runs(3, ("gspo", [], "0.1 (embedded default)"), ("gspo", ["TARGET_KL=0.01"], "0.01")),
    "learning_rate": runs(3, ("gspo", [], "1e-4 (embedded default)"),
                          ("gspo", ["LEARNING_RATE=1e-3"], "1e-3")),
    "self_play": runs(5, ("self_play", [])),
    "gad": gad(3, **{"GAD": [], "SeqKD alone": [ALONE]}),
    "gad_collapses": gad(3, **{
        "healthy: the default": [],
        "saturated gap": SATURATED,
        "frozen discriminator": ["MAX_STEPS=70", "SEQKD_STEPS=0", "CRITIC_WARMUP=30",
                                 "DISCRIMINATOR_EVERY=0", "KL_COEF=0.0", "CLIP_RANGE=0.2",
                                 "MINIBATCH=32"],
        "no signal": ["TEMPERATURE=0.3"]}),
    "gad_teachers": gad(3, **{
        "GAD, careless teacher": [CARELESS], "SeqKD, careless teacher": [CARELESS, ALONE],
        "GAD, two right texts": [BOTH],
        "GAD after 100 steps of SeqKD, two right texts": [BOTH, ALONE],
        "SeqKD, two right texts": [BOTH, "NUM_EPOCHS=10", "SEQKD_STEPS=1000"],
        "GAD, a D that can add": ["DISCRIMINATOR=data/reward_model",
                                  "DISCRIMINATOR_LEARNING_RATE=1e-4", "CRITIC_WARMUP=10"]}),
    "gad_few": gad(3, **{
        "SeqKD, 64 texts": [FEW, "NUM_EPOCHS=25", ALONE],
        "GAD, 64 texts": [FEW, "NUM_EPOCHS=25"],
        "GAD, 64 texts and 800 questions": [UNANSWERED],
        "SeqKD to the end, then that game": [UNANSWERED, ALONE, "NUM_EPOCHS=4"]}),
    "preferences": runs(3, *(("self_play", [*form, *dose], label)
                             for dose in ([], OVERUSE) for label, form in FORMS)),
    "passes": runs(3, *(("self_play", [*form, *SOURCE], label)
                        for label, form in (FORMS[0], FORMS[3]))),
    "variations": runs(3, ("self_play", [], "as shipped"),
                       ("self_play", ["USE_RANKING_LOSS=True"], "USE_RANKING_LOSS=True"),
                       ("self_play", ["MARGIN=0.05"], "MARGIN=0.05"),
                       ("gspo", GRADED, "gspo.py with this reward function")),
    "gad_remedies": gad(1, **{
        "saturated gap": SATURATED,
        "labels smoothed": [*SATURATED, "LABEL_SMOOTHING=0.1"],
        "not divided by the std": [*SATURATED, "NORM_ADV_BY_STD=False"],
        "SeqKD first": ["SEQKD_STEPS=60", "SEQKD_LEARNING_RATE=3e-4", "CRITIC_WARMUP=10",
                        "KL_COEF=0.05", TALKATIVE]}),
    "gad_variations": gad(1, **{
        "the default": [], "D reads the last token": ["SCORE_AT=last"],
        "clip range 0.2": ["CLIP_RANGE=0.2"], "no KL": ["KL_COEF=0.0"],
        "not divided by the std": ["NORM_ADV_BY_STD=False"],
        "warm-up of 10 steps": ["CRITIC_WARMUP=10"],
        "D's learning rate 1e-4": ["DISCRIMINATOR_LEARNING_RATE=1e-4"]}),
    "experts": runs(3, *(
        ("moe", [f"RATIO={ratio}", f"ROUTING_REPLAY={replay}", *EXPERTS, *more], name + label)
        for name, ratio, replay, label, more in (
            *((f"{name}, {replay}", ratio, replay, "", [])
              for name, ratio in (("GRPO", "token"), ("GSPO", "sequence"))
              for replay in ("none", "R2", "R3")),
            *((f"GRPO, {replay}", "token", replay, ", noisy routers", ["ROUTER_NOISE=0.3"])
              for replay in ("none", "R3"))))),
    "experts_edge": runs(3, *(
        ("moe", [f"RATIO={ratio}", f"ROUTING_REPLAY={replay}", *EXPERTS, *EDGE],
         f"{name}, {replay}")
        for name, ratio in (("GRPO", "token"), ("GSPO", "sequence"))
        for replay in ("none", "R2", "R3"))),
    "dapo_parts": runs(3, ("dapo", [], "DAPO"),
                       ("dapo", ["DYNAMIC_SAMPLING=False"], "no dynamic sampling"),
                       ("dapo", ["CLIP_RANGE=0.2"], "no clip-higher"),
                       ("dapo", ["OVERLONG_CACHE=0"], "no overlong penalty")),
    "relatives": runs(3, *(("grpo", [VERIFIER_ALONE, "KL_COEF=0", *words], label)
                           for label, words in RELATIVES.items())),
    "group_sizes": group_sizes(),
}
BRIEF = ("stability", "corner")  # with fewer curves in a row; and the KL of the last checkpoint
QUICK = ["family", "clip", "hacking", "self_play", "gad", "stability"]  # what is_quick of them


def jobs_of(name):
    """An experiment's runs: (script, folder, command line), seed by seed. Two experiments may share
    a run. Scripts that are not written have none."""
    jobs = []
    variants = [run for run in EXPERIMENTS[name] if source_of(run.script)]
    for seed in sorted({seed for run in variants for seed in run.seeds}):
        for script, constants, seeds, _ in variants:
            text = "_".join([script, *constants]).replace("'", "").replace(" ", "")
            text = re.sub("[{}:]", "", text).replace("/", ".")
            if len(text) > 120:  # Windows has 260 characters for a whole path
                text = f"{text[:100]}_{sha256(text.encode()).hexdigest()[:12]}"
            if seed in seeds:
                folder = RUNS / f"{text}_seed{seed}"
                jobs.append((script, folder, [f"SEED={seed}", "PROFILE=embedded", *constants]))
    return jobs


def job_key(job):
    """What tells a job's row from others."""
    script, _, (seed, _, *constants) = job
    return key_of(script, constants, seed.removeprefix("SEED="))


def owners():
    """Where each run has its row: in the file of the first experiment that has it."""
    found = {}
    for name in EXPERIMENTS:
        for job in jobs_of(name):
            found.setdefault(job_key(job), name)
    return found


# ========================================== Making rows =========================================


def held_out(policy, count):
    """A policy's answers to the held-out questions, `count` to each, drawn with seed 0: what
    scored them (self_play.py as a module), the batch, and which answers are right."""
    script = results.import_file(ROOT / "RL_HAND" / "self_play" / "self_play.py")
    script.configure(["PROFILE=embedded", "DEVICE=cpu"])
    script.torch.set_num_threads(script.THREADS)
    script.transformers.utils.logging.disable_progress_bar()
    policy = script.load_policy(policy)
    tokenizer = script.AutoTokenizer.from_pretrained(ROOT / "data" / "policy")
    with contextlib.redirect_stdout(None):
        rows = script.load_rows("eval_datasets", tokenizer)
    script.torch.manual_seed(0)
    batch = script.sample_groups(policy, tokenizer, rows, count)
    texts = tokenizer.batch_decode(batch.completion_ids.where(
        batch.completion_mask > 0, tokenizer.pad_token_id), skip_special_tokens=True)
    right = script.verify([rows[i] for i in batch.prompt_index], texts)
    return script, batch, script.torch.tensor(right) > 0


def last_checkpoint(folder):
    """The folder of a run's last checkpoint that has weights, or None."""
    found = sorted(folder.glob("[!.]*/model.safetensors"), key=os.path.getmtime)
    return found[-1].parent if found else None


def final_kl(folder):
    """KL(policy || start) of a run's last checkpoint, nats per answer and per token: one answer
    sampled to each held-out question, and scored by both. None if no checkpoint has weights."""
    if not (place := last_checkpoint(folder)):
        return {}
    script, batch, _ = held_out(place, 1)
    start = script.load_policy(ROOT / "data" / "policy")
    gap = (batch.sampled_logps - script.score_without_grad(start, batch)) * batch.completion_mask
    return {"final KL per answer": float(gap.sum(1).mean()),
            "final KL per token": float(gap.sum() / batch.completion_mask.sum())}


@functools.cache
def lengths(policy, when):
    """Mean tokens of a policy's right and wrong answers, four to each held-out question."""
    if not policy:
        return {}
    _, batch, right = held_out(policy, 4)
    tokens = batch.completion_mask.sum(1)
    return {f"tokens of right answers, {when}": float(tokens[right].mean()),
            f"tokens of wrong answers, {when}": float(tokens[~right].mean())}


def game(folder):
    """What the thinned curves of a run of gad.py do not tell to the step: by stage."""
    table = pd.read_csv(folder / "metrics.csv")
    found, warmup, played = {}, table[table.stage == 2].tail(10), table[table.stage == 3]
    for stage in (1, 2, 3):
        evaluated = table[table.stage <= stage].dropna(subset=["eval/accuracy"]).step
        if len(evaluated):  # without SeqKD the first stage has none
            found[f"step after stage {stage}"] = evaluated.iloc[-1]
        found[f"seconds of stage {stage}"] = table[table.stage == stage].step_time.sum()
    if len(played):
        found |= {"largest gap": played.score_gap.max(),
                  "best of the game": played["eval/accuracy"].max()}
        names = ("d_rank", "d_grad_norm", "frac_no_signal", "matches_teacher", "kl", "d_spread",
                 "completions/mean_length")
        for name in filter(played.columns.__contains__, names):  # without a KL_COEF there is no KL
            found |= {f"{name}, first 10 of the game": played.head(10)[name].mean(),
                      f"{name}, last 10 of the game": played.tail(10)[name].mean()}
    return found | {"d_acc, last 10 of the warm-up": warmup.d_acc.mean()} if len(warmup) else found


def make_gad_data():
    """Two more teachers. A careless one, whose answers are worked out as well, but with one digit
    in ten wrong wherever it stands: 0.76 of them come out right. And one who has answered only the
    first 64 questions, with those questions alone or with all."""
    build = results.import_file(ROOT / "data" / "build.py")
    table = pd.read_parquet(ROOT / "data" / "train.parquet",
                            columns=["question", "answer", "teacher_response"])
    folder, rng = ROOT / results.MADE, random.Random("careless")
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


def end_of(folder):
    """How a run ended: "" with its last step; "not finite" where its gradients were; None: not."""
    log = folder.with_name(f"{folder.name}.log")
    if (folder / "finished").exists():
        return ""
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "not finite" if "expected finite gradients" in said else None


def harvest(folders):
    """Keep the rows of the finished runs among the folders, unless they are known: one by one.
    Returns how many."""
    owner, known, count = owners(), results.all_rows(), 0  # a run -> its file; its row
    for folder in folders:
        end, found = end_of(folder), results.key_in(folder)
        if end is None or found not in owner or found in known and not results.stale(known[found]):
            continue
        row = results.row_of(folder, owner[found] in BRIEF, end)
        if found in known and all(row[name] == known[found][name] for name in ("code", "data")):
            continue
        more = {**(game(folder) if found[0] == "gad" else {}),
                **(final_kl(folder) if found[0] == "self_play" or owner[found] in BRIEF else {}),
                **(lengths(ROOT / "data" / "policy", "before")
                   | lengths(last_checkpoint(folder), "after")
                   if owner[found] == "relatives" else {})}
        row |= {name: results.number(value, 4) for name, value in more.items()}
        count += results.keep([row], owner, RUNS)
    return count


def missing(jobs):
    """Those of the jobs that have no row of today's script and data."""
    rows = results.all_rows()
    return [job for job in jobs
            if job_key(job) not in rows or results.stale(rows[job_key(job)])]


def make(names, only=lambda job: True, workers=0):
    """Run what is missing of the experiments; the lines of what failed."""
    compare = results.import_file(ROOT / "RL_HAND" / "compare.py")
    with compare.claimed(RUNS) as lock:
        harvest(sorted(RUNS.glob("*_seed*")))
        jobs = {job[1]: job for name in names for job in jobs_of(name) if only(job)}
        wanted = missing(jobs.values())
        if any(job[0] == "gad" for job in wanted):
            make_gad_data()
        print(f"{len(wanted)} of {len(jobs)} runs to be made", flush=True)
        for script, _, (seed, _, *constants) in wanted:
            if constants and constants[0].startswith("MEASURE="):
                import measures
                results.keep([measures.measure(script, constants, int(seed[5:]))], owners(), RUNS)
        wanted = [job for job in wanted if not any("MEASURE=" in word for word in job[2])]
        for _, folder, _ in wanted:  # what is finished there is not today's
            (folder / "finished").unlink(missing_ok=True)
        return wanted and compare.run_all({"WORKERS": workers}, wanted, lock, lambda folder, _:
                                          harvest([folder]))[1]


# ========================================== Commands ============================================


def take(rows, jobs):
    """Seconds of work that the jobs are, by the rows of such runs; else by a step of their script,
    or of any."""
    def seconds(row):
        return float(row["seconds"]) + float(row["seconds of evaluations"])
    total = 0.0
    for job in jobs:
        known = constants_in(source_of(job[0])) | dict(word.split("=", 1) for word in job[2])
        steps = int(known.get("SELF_PLAY_ROUNDS") or known.get("MAX_STEPS") or 100)
        like = [seconds(row) for k, row in rows.items() if k[:2] == job_key(job)[:2]]
        for script in (job[0], "grpo"):
            like = like or [steps * seconds(row) / int(row["steps"] or 1) for row in rows.values()
                            if row["script"] == script and "MEASURE=" not in row["constants"]]
        total += 4 + sum(like) / max(1, len(like))  # 4: to start
    return total


def show_list():
    """What is done, stale and missing of each experiment, and the minutes that all and the missing
    take, of one core. A run that several experiments have is counted in each."""
    rows, table = results.all_rows(), []
    for name in EXPERIMENTS:
        jobs = jobs_of(name)
        old = [job for job in jobs if job_key(job) in rows and results.stale(rows[job_key(job)])]
        none = [job for job in jobs if job_key(job) not in rows]
        unwritten = sorted({run.script for run in EXPERIMENTS[name] if not source_of(run.script)})
        table.append({"experiment": name, "runs": len(jobs),
                      "done": len(jobs) - len(old) - len(none), "stale": len(old),
                      "missing": len(none), "minutes in all": f"{take(rows, jobs) / 60:.0f}",
                      "minutes to do": f"{take(rows, old + none) / 60:.0f}",
                      "": f"no script {', '.join(unwritten)}" if unwritten else ""})
    print(pd.DataFrame(table).to_string(index=False))
    routing = results.read(results.RESULTS / "routing.csv")
    old = sum(bool(results.stale(row)) for row in routing)
    print(f"\nexperts, without a run: {len(routing)} rows, {old} stale: "
          "python benchmarks/routing.py")


def show_stale():
    """The rows that are not of today's script and data; the pages that show them."""
    pages = results.import_file(ROOT / "benchmarks" / "pages.py")
    for name, (experiments, _) in pages.TABLES.items():
        old = [row for k, row in results.all_rows().items() if results.stale(row)
               and k in {job_key(job) for each in experiments for job in jobs_of(each)}]
        if old:
            print(f"\ntable {name!r} of {', '.join(pages.shown_in(name)) or 'no page'}:")
        for row in old:
            print(f"  {row['script']} {row['constants']} seed {row['seed']}: another "
                  f"{results.stale(row)} than at commit {row['commit'][:7]}")


PROBE = ["MAX_STEPS=3", "EVAL_QUESTIONS=16", "EVAL_EVERY=2"]  # three steps
PROBES = {"self_play": ["SELF_PLAY_ROUNDS=3", "TRAIN_BATCH_SIZE=16", *PROBE[1:]],
          "gad": ["SEQKD_STEPS=1", "CRITIC_WARMUP=1", *PROBE]}


def probe(source, script, words, folder):
    """metrics.csv of a script's text after three steps, as texts, without what a clock measures."""
    folder.mkdir(parents=True)
    path = folder / f"{script}.py"
    path.write_text(source, encoding="utf-8")
    words = [*words, *PROBES.get(script, PROBE), "PROFILE=embedded", "SEED=0"]
    done = subprocess.run([sys.executable, str(path), f"OUTPUT_DIR={folder / 'run'}", *words],
                          cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise SystemExit(f"error: {script} {' '.join(words)}: {done.stderr.strip()[-300:]}")
    table = pd.read_csv(folder / "run" / "metrics.csv", dtype=str)
    return table.drop(columns=[name for name in table if "time" in name or "memory" in name])


def text_with(code, script, commits, folder=None):
    """The text of a script that has this code: from git, by one of the commits, or from the runs in
    a folder."""
    found = [results.git("show", f"{commit}:RL_HAND/{script}/{script}.py") for commit in commits]
    found += [results.facts_of(run)[1] for run in Path(folder).glob("*_seed*")
              if results.facts_of(run)] if folder else []
    for text in filter(None, found):
        if results.code_of(text) == code:
            return text
    raise SystemExit(f"error: no text of {script} with the code {code} at {', '.join(commits)}; "
                     "expected it there, or a folder of such runs behind the script's name")


def show_equal(script, folder=None):
    """Whether a script as it is today and as stale rows had it give the same bits: three steps with
    the constants of each of these rows. What is the same is written to results/equal.csv, and the
    rows are no longer stale. Returns whether anything differed."""
    today, path = source_of(script) or "", results.RESULTS / "equal.csv"
    code_new, place = results.code_of(today), RUNS / "probe"
    rows = [row for row in results.all_rows().values() if row["script"] == script
            and "MEASURE=" not in row["constants"] and not
            results.same_code(script, row["constants"], row["code"], code_new)]
    differed = False
    if script == "gad" and rows:
        make_gad_data()
    for constants, code in sorted({(row["constants"], row["code"]) for row in rows}):
        commits = {row["commit"] for row in rows if row["code"] == code}
        before = text_with(code, script, sorted(commits), folder)
        words = constants.split("; ") if constants else []
        shutil.rmtree(place, ignore_errors=True)
        one, other = (probe(text, script, words, place / name)
                      for text, name in ((before, "before"), (today, "today")))
        lost = [name for name in one if name not in other or not one[name].equals(other[name])]
        print(f"{script} {constants or '(defaults)'}: "
              + (f"other numbers in {', '.join(lost)}" if lost else "the same bits"), flush=True)
        differed |= bool(lost)
        if not lost:
            shown = {"script": script, "constants": constants, "code_old": code,
                     "code_new": code_new, "commit": results.facts_here()["commit"],
                     "shown by": f"{len(one.columns)} metrics of {len(one) - 1} steps: python "
                                 f"benchmarks/experiments.py equal {script}"}
            results.write(path, [*results.read(path), shown])
    return differed


def is_quick(job):
    """Whether a run is one of the quick ones: with seed 0; of the map the corner 4e-4 x 16."""
    words = {*job[2]}
    return "SEED=0" in words and ("EVAL_EVERY=0" not in words or
                                  {"LEARNING_RATE=4e-4", "MINIBATCH=32"} <= words)


def show(names):
    """Draw the figures and print the tables of experiments, as far as there are rows."""
    results.import_file(ROOT / "benchmarks" / "figures.py").draw(names)
    pages = results.import_file(ROOT / "benchmarks" / "pages.py")
    for name, (experiments, _) in pages.TABLES.items():
        if {*experiments} & {*names}:
            print(f"\n## {name}\n\n{pages.table(name)}")


def main(arguments):
    """The commands above; whether one failed."""
    if {"-h", "--help"} & {*arguments}:
        return print(__doc__)
    names = [word for word in arguments if not word.startswith("WORKERS=")]
    workers = int(next((word[8:] for word in arguments if word.startswith("WORKERS=")), 0))
    command, *rest = names or ["all"]
    if command == "list":
        return show_list()
    if command == "stale":
        return show_stale()
    if command == "rows":
        return print(harvest([folder for place in rest or [RUNS]
                              for folder in sorted(Path(place).glob("*_seed*"))]), "new rows")
    if command == "equal" and rest:
        return show_equal(*rest)
    chosen = (QUICK if command == "quick" else rest if command == "figures" else names
              ) or [*EXPERIMENTS]
    for name in chosen:
        if name not in EXPERIMENTS:
            raise SystemExit(f"error: no experiment {name!r}; expected some of "
                             f"{', '.join(EXPERIMENTS)}; or a command of --help")
    failures = [] if command == "figures" else make(
        chosen, is_quick if command == "quick" else lambda job: True, workers)
    show(chosen)
    print("\n".join(failures))
    return bool(failures)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    sys.exit(main(sys.argv[1:]))
