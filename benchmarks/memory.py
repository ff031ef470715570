"""Peak memory of a training pass against vocabulary, micro-batch, completion length, checkpointing.

    python benchmarks/memory.py              # on a CPU: a small model with a large vocabulary
    python benchmarks/memory.py DEVICE=cuda  # Qwen3-0.6B's shape, random weights

What is measured is one forward and backward pass of `score_tokens`, as PyTorch's allocator counts
it, above what was there before (the weights). The gradients that remain afterwards are taken off:
they belong to the weights. Expected: flat in the vocabulary, but for the one float32 gradient of
the head; linear in the tokens. "plain" keeps all logits, as log_softmax of the model's output does.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from common import QWEN3, import_gspo
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

SMALL = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "tie_word_embeddings": True}


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
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    now = highest = 0
    for event in events:
        now += event["args"]["Bytes"]
        highest = max(highest, now)
    return highest


def make_model(shape, vocabulary, device):
    """A model with random weights, float32."""
    torch.manual_seed(0)
    config = Qwen3Config(**shape, vocab_size=vocabulary)
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa")
    return model.to(device).eval()


def make_batch(gspo, rows, prompt, length, vocabulary, device):
    """`rows` completions of one prompt, all of the given length."""
    def ids(*shape):
        return torch.randint(vocabulary, shape, device=device)
    ones = torch.ones(rows, length, device=device)
    return gspo.Batch(ids(1, prompt), torch.ones(1, prompt, dtype=torch.long, device=device),
                      torch.zeros(rows, dtype=torch.long, device=device), ids(rows, length), ones,
                      ones, torch.ones(rows, dtype=torch.bool, device=device))


def training_pass(gspo, model, batch, plain=False):
    """One forward and backward pass; `plain`: through all logits at once."""
    if plain:
        def score(states, ids):
            scores = torch.log_softmax(gspo.head(model, states), -1)
            return (scores.gather(1, ids[:, None])[:, 0],)
        gspo.at_tokens(model, batch, score)[0].sum().backward()
    else:
        logps, entropy = gspo.score_tokens(model, batch)
        (logps + entropy).sum().backward()


def megabytes(gspo, shape, device, vocabulary, rows, length, plain=False, checkpointing=True):
    """Peak of a training pass above the weights and their gradients, in MB."""
    gspo.GRADIENT_CHECKPOINTING = checkpointing
    model = make_model(shape, vocabulary, device)
    if checkpointing:
        gspo.checkpoint_layers(model)
    batch = make_batch(gspo, rows, 64, length, vocabulary, device)
    training_pass(gspo, model, make_batch(gspo, 1, 4, 4, vocabulary, device))  # warm-up
    model.zero_grad()
    peak = peak_bytes(lambda: training_pass(gspo, model, batch, plain), device)
    return (peak - sum(p.numel() * 4 for p in model.parameters())) / 1e6


def main(arguments):
    """Measure and print the tables."""
    device = dict(a.split("=") for a in arguments).get("DEVICE", "cpu")
    gspo = import_gspo()
    gspo.configure(["PROFILE=embedded", f"DEVICE={device}"])
    if device == "cpu":
        shape, rows, length, some = SMALL, 4, 128, 2**22
    else:
        shape, rows, length, some = QWEN3, 4, 512, gspo.LOGITS_AT_ONCE
    gspo.LOGITS_AT_ONCE = some
    place = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    print(f"{place}, {gspo.DTYPE}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}; LOGITS_AT_ONCE {some:,}; MB above weights and gradients\n")

    print(f"Vocabulary ({rows} x {length} tokens)\n\n| V | score_tokens | less the head's gradient "
          "| plain |\n|---|---|---|---|")
    for vocabulary in (8_192, 32_768, 151_936):
        ours, plain = (megabytes(gspo, shape, device, vocabulary, rows, length, plain=way)
                       for way in (False, True))
        head = vocabulary * shape["hidden_size"] * 4 / 1e6
        print(f"| {vocabulary:,} | {ours:,.0f} | {ours - head:,.0f} | {plain:,.0f} |")

    for title, points in {
            f"Micro-batch ({length} tokens each)": [(n, length) for n in (1, 2, 4, 8)],
            f"Completion length ({rows} rows)": [(rows, n) for n in (128, 256, 512, 1024)]}.items():
        print(f"\n{title}, V = 32,768\n\n| tokens | checkpointing | kept |\n|---|---|---|")
        for count, tokens in points:
            on, off = (megabytes(gspo, shape, device, 32_768, count, tokens, checkpointing=way)
                       for way in (True, False))
            print(f"| {count} x {tokens} | {on:,.0f} | {off:,.0f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
