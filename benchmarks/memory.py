"""What a script needs of a GPU's memory, estimated; and a training pass on this machine, measured.

    python benchmarks/memory.py RL_HAND/gspo/gspo.py LORA_RANK=16  # any script and constants
    python benchmarks/memory.py              # measured on the CPU: a small model
    python benchmarks/memory.py DEVICE=cuda  # measured at Qwen3-0.6B's shape, random weights

The estimate is for Qwen3-0.6B and the full profile, whatever this machine has; nothing is loaded.
The training pass of one micro-batch at full length and the decoding of a rollout's last token are
the script's own, run on fake tensors, which have a shape and no contents, and their allocations are
added up. The rest is arithmetic on shapes.
PyTorch's context (about 0.5 GB) and what its allocator loses between blocks come on top.

What is measured is one forward and backward pass of `score_tokens`, as PyTorch's allocator counts
it, above the weights and their gradients. Expected: flat in the vocabulary, but for the gradient of
the head; linear in the tokens. "plain" keeps all logits, as log_softmax of the model's output does.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from common import (QWEN3, QWEN3_VOCABULARY, REWARD_PARAMETERS, facts, import_file, import_gspo,
                    load_policy, make_batch, training_pass)
from fakes import allocated, make_fake
from torch.profiler import ProfilerActivity, profile

SMALL = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "tie_word_embeddings": True}


def plain_pass(script, model, batch):
    """One forward and backward pass through all logits at once."""
    logits = script.states_before(model, batch) @ model.get_output_embeddings().weight.T
    tokens = batch.completion_ids[batch.completion_mask.bool()]
    torch.log_softmax(logits, -1).gather(1, tokens[:, None]).sum().backward()


# -------------------------------------------------------------------------------- the estimate


def estimate(script, frozen_here=True):
    """GB by phase and part. The constants must be set; `frozen_here`: all models on one GPU."""
    group = getattr(script, "GROUP_SIZE", 0) or script.ROLLOUT_N
    width = 2 if script.DTYPE == "bfloat16" else 4
    policy = load_policy(script, QWEN3, QWEN3_VOCABULARY, "meta")
    sizes = [(p.numel(), p.element_size(), p.requires_grad) for p in policy.parameters()]
    trained = sum(number for number, _, grows in sizes if grows)
    networks = 1 + hasattr(script, "CRITIC_LEARNING_RATE") + (
        getattr(script, "DISCRIMINATOR", "") == "policy")
    kept_reference = hasattr(script, "DISCRIMINATOR") or not script.LORA_RANK  # has its own adapter
    reference = kept_reference and (getattr(script, "KL_COEF", 0) or
                                    getattr(script, "WATCH_QUESTIONS", 0))
    judge = bool(script.REWARD_WEIGHTS.get("model"))
    weights = sum(number * size for number, size, _ in sizes)
    always = {
        "weights": networks * weights,
        "Adam": networks * 8 * trained,
        "reference": frozen_here and bool(reference) * width * sum(n for n, *_ in sizes),
        "reward model": frozen_here and judge * width * REWARD_PARAMETERS}

    prompts = getattr(script, "BATCH_SIZE", 0) or script.SAMPLE_AT_ONCE
    rows = max(script.EVAL_BATCH, group * prompts)
    pairs = min(script.REWARD_BATCH, rows)
    matrix = pairs * 16 * script.MAX_REWARD_TOKENS**2 * width  # of attention: pairs x heads x S x S

    batch = make_batch(script, script.MINIBATCH // group * group or script.MINIBATCH,
                       min(group, script.MINIBATCH), script.MAX_PROMPT_TOKENS,
                       script.MAX_NEW_TOKENS, 100)
    micro = batch.rows(next(iter(script.micro_batches(batch))))
    made = allocated(lambda: training_pass(script, policy, micro), make_fake(policy))
    keys, beside = decoding(script, policy, rows, script.MAX_PROMPT_TOKENS + script.MAX_NEW_TOKENS)
    phases = {
        "update": {"gradients": networks * 4 * trained,
                   "activations, logits, gradient of the head": made},
        "sampling": {"keys and values": keys, "logits": logits_bytes(policy, rows),
                     f"weights in {script.DTYPE}, copies of a layer's keys and values": beside},
        "reward model": {"attention": frozen_here and judge * 6 * matrix}}  # seen on fake tensors
    return {phase: {name: float(size) / 1e9 for name, size in (always | parts).items()}
            for phase, parts in phases.items()}


def logits_bytes(policy, rows):
    """Of a decoding step: logits, log-probs, and the float64 sums of this step and the last; and,
    where the head's weights are not float32, a copy that is."""
    head = policy.get_output_embeddings().weight
    return rows * len(head) * 24 + (head.element_size() < 4) * 4 * head.numel()


def decoding(script, policy, rows, columns):
    """Bytes of the keys and values of `rows` completions, `columns` tokens each, and of what the
    decoding of their last token allocates beside these, of a fake policy."""
    cache, token = script.DynamicCache(config=policy.config), torch.zeros(rows, 1).long()
    seen = torch.ones(rows, 1, 1, columns).bool()

    def decode(mask):
        with torch.no_grad(), script.autocast():
            script.run_model(policy, token, mask, token, cache)

    def decode_last():
        for layer in cache.layers:
            layer.keys, layer.values = (x.new_empty(*x.shape[:2], columns - 1, x.shape[3])
                                        for x in (layer.keys, layer.values))
        decode(seen)
    decode(seen[..., :1])  # keys and values of one token: they have their dtypes
    made = allocated(decode_last, policy)
    keys = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    return keys, made - keys


def print_estimate(path, arguments):
    """The table for the script at `path` with the given constants."""
    script, given = import_file(Path(path)), dict(a.split("=", 1) for a in arguments)
    here = given.pop("FROZEN_DEVICE", "cuda") == given.pop("DEVICE", "cuda")
    script.configure(["PROFILE=full", "DEVICE=cpu", "FROZEN_DEVICE=cpu",
                      *(f"{name}={value}" for name, value in given.items())])
    found = estimate(script, here)
    names = list(dict.fromkeys(name for parts in found.values() for name in parts))
    print(f"{path} {' '.join(arguments)}: GB at Qwen3-0.6B's shape, estimated\n\n| GB | "
          + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for name in names:
        print(f"| {name} | " + " | ".join(f"{parts[name]:.2f}" if parts.get(name) else "-"
                                          for parts in found.values()) + " |")
    print("| **in all** | " + " | ".join(f"**{sum(parts.values()):.1f}**"
                                         for parts in found.values()) + " |")


# ------------------------------------------------------------------------------------ measured


def peak_bytes(function, device="cpu"):
    """The most bytes that were allocated at a time while `function` ran, above those before."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        function()
    with tempfile.TemporaryDirectory() as folder:
        watch.export_chrome_trace(f"{folder}/trace.json")
        trace = Path(folder, "trace.json").read_text(encoding="utf-8", errors="replace")
        events = json.loads(trace)["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    now = highest = 0
    for event in events:
        now += event["args"]["Bytes"]
        highest = max(highest, now)
    return highest


def megabytes(gspo, shape, device, vocabulary, rows, length, plain=False, checkpointing=True):
    """Peak of a training pass above the weights and their gradients, in MB."""
    gspo.GRADIENT_CHECKPOINTING = checkpointing
    model = load_policy(gspo, shape, vocabulary, device)
    batch = make_batch(gspo, rows, rows, 64, length, vocabulary, device)
    training_pass(gspo, model, make_batch(gspo, 1, 1, 4, 4, vocabulary, device))  # warm-up
    model.zero_grad()
    measured = plain_pass if plain else training_pass
    peak = peak_bytes(lambda: measured(gspo, model, batch), device)
    return (peak - sum(p.numel() * 4 for p in model.parameters())) / 1e6


def print_measured(device):
    """The tables of what is measured."""
    gspo = import_gspo()
    gspo.configure(["PROFILE=embedded", f"DEVICE={device}"])
    if device == "cpu":
        shape, rows, length, some = SMALL, 4, 128, 2**22
    else:
        shape, rows, length, some = QWEN3, 4, 512, gspo.LOGITS_AT_ONCE
    gspo.LOGITS_AT_ONCE = some
    print(f"{facts(device)}; {gspo.DTYPE}; LOGITS_AT_ONCE {some:,}\n")
    print("MB above weights and gradients\n")
    print(f"Vocabulary ({rows} x {length} tokens)\n\n| V | score_tokens | less the head's gradient "
          "| plain |\n|---|---|---|---|")
    for vocabulary in (8_192, 32_768, 151_936):
        ours, plain = (megabytes(gspo, shape, device, vocabulary, rows, length, plain=way)
                       for way in (False, True))
        head = vocabulary * shape["hidden_size"] * 4 / 1e6
        print(f"| {vocabulary:,} | {ours:,.0f} | {ours - head:,.0f} | {plain:,.0f} |")
    print("\nTokens, V = 32,768\n\n| tokens | checkpointing | kept |\n|---|---|---|")
    for count, tokens in [(1, length), (2, length), (8, length)] + [(rows, length * n)
                                                                   for n in (1, 2, 4, 8)]:
        on, off = (megabytes(gspo, shape, device, 32_768, count, tokens, checkpointing=way)
                   for way in (True, False))
        print(f"| {count} x {tokens} | {on:,.0f} | {off:,.0f} |")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    if sys.argv[1:] and sys.argv[1].endswith(".py"):
        print_estimate(sys.argv[1], sys.argv[2:])
    else:
        print_measured(dict(a.split("=") for a in sys.argv[1:]).get("DEVICE", "cpu"))
