"""What only a GPU can tell, in one command and under eight minutes.

    python benchmarks/gpu.py                                  # Qwen3-0.6B's shape, random weights
    python benchmarks/gpu.py DEVICE=cpu SHAPE=tiny BUDGET=60  # only to see that it runs

Nothing is downloaded. It measures, and prints as it goes: whether greedy rollouts are `generate`'s;
the rollout's tokens per second against `generate`, and against what the memory's bandwidth allows;
the training pass against a large matrix product; seconds and peak memory of gspo.py's full profile,
all weights and LoRA, against the estimate of memory.py, and the epoch that follows. BUDGET is in
seconds: a part that would not fit into what is left is skipped, and said to be. The table, with
card, versions and commit, also goes to FILE (gpu.json).

Random weights: nothing ends (each completion has its full length: the longest case), and near-equal
logits make greedy decoding part earlier than a trained model does, most of all in bfloat16.
"""

import gc
import json
import os
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace as Size

import torch
from common import (QWEN3, QWEN3_VOCABULARY, REWARD, facts, import_gspo, load_policy,
                    load_tokenizer, make_batch, make_rows, now, pad_prompts, steps, training_pass)
from memory import SMALL, estimate, peak_bytes
from torch.utils.flop_counter import FlopCounterMode
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

SHAPES = {  # and how much is done: rows of a rollout, tokens of a completion, size of the product
    "qwen3-0.6b": Size(shape=QWEN3, vocabulary=QWEN3_VOCABULARY, judge=REWARD, given=[], prompt=96,
                       rows=(8, 64, 256), tokens=128, product=8192),
    "tiny": Size(shape=SMALL | {"num_hidden_layers": 2}, vocabulary=500, prompt=10, rows=(8, 16),
                 judge=REWARD | {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 500,
                                 "intermediate_size": 64},
                 given=["MAX_NEW_TOKENS=6", "MAX_PROMPT_TOKENS=10"], tokens=6, product=256)}
QUESTIONS = 7473  # of GSM8K's training set


def script_for(size, device, *given):
    """gspo.py with the full profile's constants, on the device."""
    gspo = import_gspo()
    gspo.configure(["PROFILE=full", f"DEVICE={device}", f"FROZEN_DEVICE={device}", *size.given,
                    *given])
    return gspo


def generate(gspo, policy, rows, group, tokens, **options):
    """transformers' own completions of the rows' prompts, under the same autocast: ids."""
    prompts = pad_prompts(rows, load_tokenizer(), policy.device)
    with torch.no_grad(), gspo.autocast():
        out = policy.generate(**prompts, max_new_tokens=tokens, num_return_sequences=group,
                              pad_token_id=0, **options)
    return out[:, prompts["input_ids"].shape[1]:]


def greedy(size, device, dtype):
    """How far the greedy rollout is `generate`'s."""
    gspo = script_for(size, device, f"DTYPE={dtype}", f"MAX_NEW_TOKENS={size.tokens}")
    policy = load_policy(gspo, size.shape, size.vocabulary, device)
    rows = [row | {"prompt_ids": row["prompt_ids"][i:]} for i, row in
            enumerate(make_rows(8, size.prompt, 400))]  # of eight lengths
    ours = gspo.sample_groups(policy, load_tokenizer(), rows, 1, temperature=0).completion_ids
    theirs = generate(gspo, policy, rows, 1, size.tokens, do_sample=False)
    same = (ours == theirs).long().cumprod(1).sum(1)
    yield f"greedy is generate's, {dtype}: rows of 8 x {size.tokens} tokens", int(
        (same == size.tokens).sum())
    yield f"first token that differs, {dtype}, by row", [
        int(n) if n < size.tokens else None for n in same]


def median_seconds(function, times):
    """The median of some calls, behind a warm-up."""
    seconds = []
    for _ in range(times + 1):
        began = now()
        function()
        seconds.append(now() - began)
    return statistics.median(seconds[1:])


def rollout(size, device, count):
    """Tokens per second of `count` rows in groups of 8 (of fewer, if these are fewer)."""
    gspo = script_for(size, device, f"MAX_NEW_TOKENS={size.tokens}")
    policy = load_policy(gspo, size.shape, size.vocabulary, device)
    rows, tokenizer = make_rows(count // 8, size.prompt, 400), load_tokenizer()
    ways = {"sample_groups": lambda: gspo.sample_groups(policy, tokenizer, rows, 8),
            "generate": lambda: generate(gspo, policy, rows, 8, size.tokens, do_sample=True,
                                         temperature=1.0, top_k=0, top_p=1.0)}
    speeds = {name: count * size.tokens / median_seconds(way, 2) for name, way in ways.items()}
    config, width = policy.config, 2 if gspo.DTYPE == "bfloat16" else 4
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    weights = sum(p.numel() for p in policy.parameters())
    read = width * (weights + count * (size.prompt + size.tokens / 2) * cache)  # in a step
    a, b = torch.ones(2, 2**28 if device == "cuda" else 2**20, device=device)
    bound = count * 8 * len(a) / median_seconds(lambda: b.copy_(a), 10) / read  # bytes, in and out
    for name, speed in speeds.items():
        yield f"rollout, {count} rows, {name}: tokens per second", speed
    yield f"rollout, {count} rows: x generate", speeds["sample_groups"] / speeds["generate"]
    yield f"rollout, {count} rows: of the bandwidth bound", speeds["sample_groups"] / bound


def training(size, device):
    """Rate of a forward and backward pass of a micro-batch against that of a matrix product. Useful
    are three times the forward pass's operations (PyTorch's counter; attention as if unmasked)."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    a = torch.randn(size.product, size.product, device=device, dtype=dtype)
    rate = 2 * size.product**3 / median_seconds(lambda: a @ a, 10)
    yield f"matrix product of {size.product}: TFLOP/s", rate / 1e12
    for on in (True, False):
        gspo = script_for(size, device, f"GRADIENT_CHECKPOINTING={on}")
        policy = load_policy(gspo, size.shape, size.vocabulary, device)
        batch = make_batch(gspo, gspo.MICRO_BATCH, gspo.GROUP_SIZE, size.prompt,
                           gspo.MAX_NEW_TOKENS, 400, device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            gspo.score_tokens(policy, batch)
        seconds = median_seconds(lambda: training_pass(gspo, policy, batch), 4)
        useful, name = 3 * counter.get_total_flops() / seconds, f"checkpointing {on}"
        yield f"training pass, {name}: TFLOP/s", useful / 1e12
        yield f"training pass, {name}: of the matrix product's", useful / rate
        yield f"training pass, {name}: tokens per second", float(
            batch.completion_mask.sum()) / seconds


def whole_step(size, device, lora):
    """Steps of the full profile: seconds, peak memory, and what follows for an epoch."""
    name, given = ("LoRA", ["LORA_RANK=16"]) if lora else ("all weights", [])
    gspo = script_for(size, device, *given)
    policy = load_policy(gspo, size.shape, size.vocabulary, device)
    reference = None if lora else load_policy(gspo, size.shape, size.vocabulary, device, True)
    with torch.device(device):
        judge = DebertaV2ForSequenceClassification._from_config(
            DebertaV2Config(**size.judge), dtype=getattr(torch, gspo.DTYPE)).eval()

    @torch.no_grad()
    def score(batch):  # pairs as long as prompt and completion
        length = min(gspo.MAX_REWARD_TOKENS, batch.prompt_ids.shape[1] +
                     batch.completion_ids.shape[1])
        judge(input_ids=torch.ones(len(batch.ended), length, dtype=torch.long, device=device))
    rows = make_rows(gspo.EVAL_BATCH, gspo.MAX_PROMPT_TOKENS, 400)
    step, found = steps(gspo, policy, reference, rows, score), []

    def evaluation():
        for temperature in (0, 1):
            score(gspo.sample_groups(policy, load_tokenizer(), rows, 1, temperature))
    before = sum(p.numel() * p.element_size() for model in (policy, reference, judge)
                 if model is not None for p in model.parameters())
    peak = peak_bytes(lambda: found.extend(step() for _ in range(3)), device)
    began = now()
    peak = max(peak, peak_bytes(evaluation, device))
    evaluating = (now() - began) * gspo.EVAL_QUESTIONS / len(rows)
    metrics = {key: statistics.median(one[key] for one in found[1:]) for key in found[0]
               if key == "seconds" or key.startswith("time/")}
    for key, value in metrics.items():
        yield f"step, {name}: {key.replace('seconds', 'seconds in all')}", value
    count = QUESTIONS // gspo.BATCH_SIZE
    yield f"evaluation, {name}: seconds", evaluating
    yield f"epoch of GSM8K, {name}: hours, projected", (
        count * metrics["seconds"] + (2 + count // gspo.EVAL_EVERY) * evaluating) / 3600
    yield f"peak memory, {name}: GB", (before + peak) / 1e9
    if size.shape is QWEN3:
        yield f"peak memory, {name}: GB, estimated", max(
            sum(parts.values()) for parts in estimate(script_for(size, "cpu", *given)).values())


def main(arguments):
    """Measure part after part, print and write the table."""
    given = {"DEVICE": "cuda", "SHAPE": "qwen3-0.6b", "BUDGET": "470", "FILE": "gpu.json"}
    given |= dict(argument.split("=", 1) for argument in arguments)
    if given["DEVICE"] == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: PyTorch finds no CUDA GPU; DEVICE=cpu SHAPE=tiny runs anywhere")
    device, size, began = given["DEVICE"], SHAPES[given["SHAPE"]], now()
    table, took = facts(device) | {"shape": given["SHAPE"]}, {}
    parts = [(greedy, "float32"), (greedy, "bfloat16"), (whole_step, False), (training,),
             *((rollout, count) for count in size.rows), (whole_step, True)]
    print(f"{table}\n\n| measured | |\n|---|---|")
    for part, *options in parts:
        name, start = " ".join(map(str, [part.__name__, *options])), now()
        if start - began + 1.5 * took.get(part, 0) > float(given["BUDGET"]):
            found = [(name, "skipped: it would not fit into BUDGET")]
        else:
            try:
                found = list(part(size, device, *options))
            except torch.OutOfMemoryError:
                found = [(name, "out of memory")]
        took[part] = now() - start
        for key, value in found:
            text = f"{value:,.4g}" if isinstance(value, float) else value
            print(f"| {key} | {text} |", flush=True)
        table |= found
        gc.collect()  # models go before the next ones come
        torch.cuda.empty_cache()
    table["seconds in all"] = now() - began
    print(f"\n{table['seconds in all']:.0f} s in all; written to {given['FILE']}")
    file = Path(os.path.expanduser(given["FILE"]))
    file.write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    main(sys.argv[1:])
