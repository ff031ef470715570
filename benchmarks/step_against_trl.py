"""One GSPO step of ours against TRL's, on the same model, prompts, lengths and number of updates.

    python benchmarks/step_against_trl.py [ROUNDS=5]

Both sample 16 prompts x 8 completions of at most 60 tokens at temperature 1 from the embedded
policy, score them with the exact-answer verifier, and make 2 passes of 2 minibatches with the
sequence-level ratio and no KL term. The learning rate is 0, so that the policy, and with it the
lengths, stay what they are; AdamW runs all the same. Runs alternate (TRL, ours, TRL, ...), and the
first rollout of each is a warm-up. What counts is the ratio of the medians: absolute times depend
on the machine and on what else it does. A second table compares the rollout alone with
`model.generate`.
"""

import statistics
import sys
import tempfile
import time

import torch
from common import ROOT, end_ids, import_gspo, pad_prompts
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

PROMPTS, GROUP, TOKENS, MINIBATCH, PASSES = 16, 8, 60, 64, 2
UPDATES = PASSES * PROMPTS * GROUP // MINIBATCH
ROLLOUTS = 4  # per run, the first one not counted


def our_run(gspo, folder):
    """A Run of gspo.py with the benchmark's settings and no evaluation, checkpoint or plot."""
    run = gspo.start([
        "PROFILE=embedded", "THREADS=2", "REWARD_WEIGHTS={'verifier': 1.0}", "KL_COEF=0",
        "LEARNING_RATE=0",
        "ADVANTAGE_TYPE=normalized", "ENTROPY_COEF=0", f"OUTPUT_DIR={folder}/ours",
        f"BATCH_SIZE={PROMPTS}", f"GROUP_SIZE={GROUP}", f"MAX_NEW_TOKENS={TOKENS}",
        f"MINIBATCH={MINIBATCH}", f"GSPO_EPOCHS={PASSES}"])
    times = []

    def record(run, metrics):
        seconds = {k: v for k, v in metrics.items() if k.startswith("time/")}
        times.append(seconds | {"step_time": sum(seconds.values()),
                                "completions/mean_length": metrics["completions/mean_length"]})

    gspo.finish_step = record

    def measure():
        run.total_steps, before = run.step + ROLLOUTS, len(times)
        gspo.train(run)
        return times[before + 1:]
    return run, measure


class StepTimes(TrainerCallback):
    """Seconds per rollout with its updates, read at the end of every UPDATES-th optimiser step."""

    def __init__(self):
        self.times, self.last = [], None

    def on_train_begin(self, *_, **__):
        self.last, self.times = time.perf_counter(), []

    def on_step_end(self, args, state, control, **__):
        if state.global_step % UPDATES == 0:
            now = time.perf_counter()
            self.times.append(now - self.last)
            self.last = now


def trl_run(gspo, run, folder):
    """TRL's trainer with the same settings; returns a function that measures ROLLOUTS rollouts."""
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": row["question"]}],
                                  "answer": row["answer"]} for row in run.train_rows])
    lengths = []

    def exact(completions, answer, completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return gspo.verify([{"answer": a} for a in answer], [c[0]["content"] for c in completions])

    config = GRPOConfig(
        output_dir=f"{folder}/trl", importance_sampling_level="sequence", loss_type="grpo",
        beta=0.0,
        epsilon=3e-4, epsilon_high=4e-4, learning_rate=0.0, per_device_train_batch_size=MINIBATCH,
        num_generations=GROUP, steps_per_generation=PROMPTS * GROUP // MINIBATCH,
        num_iterations=PASSES, max_completion_length=TOKENS, temperature=1.0, top_k=0, top_p=1.0,
        max_steps=ROLLOUTS * UPDATES, bf16=False, use_cpu=True, gradient_checkpointing=False,
        chat_template_kwargs={"enable_thinking": False}, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True)
    folder = str(ROOT / "data" / "policy")
    trainer = GRPOTrainer(model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
                          reward_funcs=exact, args=config, train_dataset=prompts,
                          processing_class=AutoTokenizer.from_pretrained(folder))
    watch = StepTimes()
    trainer.add_callback(watch)

    def measure():
        trainer.train()
        return watch.times[1:]
    return measure, lengths


def rollout_speeds(gspo, run, rounds):
    """Completion tokens per second of sample_groups and of model.generate, alternated; medians."""
    rows = run.train_rows[:PROMPTS]
    prompts = pad_prompts(rows, run.tokenizer, "cpu")
    ends = torch.tensor(end_ids(run.policy, run.tokenizer))
    speeds = {"ours": [], "generate": []}
    for _ in range(rounds + 1):
        began = time.perf_counter()
        batch = gspo.sample_groups(run.policy, run.tokenizer, rows, GROUP)
        speeds["ours"].append(float(batch.completion_mask.sum()) / (time.perf_counter() - began))
        began = time.perf_counter()
        with torch.no_grad():
            out = run.policy.generate(
                **prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=TOKENS, num_return_sequences=GROUP)
        out = out[:, prompts["input_ids"].shape[1]:]
        seconds = time.perf_counter() - began
        ended = torch.isin(out, ends)
        real = (ended.cumsum(1) - ended.long() == 0).sum()  # up to the first end token, included
        speeds["generate"].append(float(real) / seconds)
    return {name: statistics.median(values[1:]) for name, values in speeds.items()}


def main(rounds):
    """Run the benchmark and print the two tables."""
    gspo = import_gspo()
    with tempfile.TemporaryDirectory() as folder:
        run, measure_ours = our_run(gspo, folder)
        measure_trl, trl_lengths = trl_run(gspo, run, folder)
        ours, trl = [], []
        for _ in tqdm(range(rounds), "rounds"):
            trl += measure_trl()
            ours += measure_ours()
        speeds = rollout_speeds(gspo, run, rounds)
    our_seconds = [step["step_time"] for step in ours]
    middle = {name: statistics.median(step[name] for step in ours) for name in ours[0]}
    print(f"\n{len(ours)} rollouts each, {torch.get_num_threads()} threads; mean completion length "
          f"{statistics.mean(step['completions/mean_length'] for step in ours):.1f} (ours), "
          f"{statistics.mean(trl_lengths):.1f} (TRL) tokens\n")
    print("| | s per rollout and its updates, median (quartiles) | ratio |\n|---|---|---|")
    for name, seconds in (("TRL", trl), ("gspo.py", our_seconds)):
        low, mid, high = statistics.quantiles(seconds, n=4)
        print(f"| {name} | {mid:.3f} ({low:.3f} to {high:.3f}) | "
              f"{statistics.median(trl) / mid:.2f} x TRL's speed |")
    print("\nours by phase: " + ", ".join(f"{name[5:]} {middle[name]:.3f}" for name in middle
                                          if name.startswith("time/")) + " s\n")
    print("| rollout | completion tokens per second, median | ratio |\n|---|---|---|")
    for name, speed in speeds.items():
        print(f"| {name} | {speed:,.0f} | {speed / speeds['generate']:.2f} |")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    main(int(sys.argv[1].split("=")[-1]) if len(sys.argv) > 1 else 5)
