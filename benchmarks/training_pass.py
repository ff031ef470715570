"""How much of the machine's matrix rate a training pass of `score_tokens` reaches.

    python benchmarks/training_pass.py                                    # the embedded policy
    python benchmarks/training_pass.py SHAPE=qwen3-0.6b ROWS=32 TOKENS=512  # for a GPU

One pass is the log-probs and entropy of ROWS completions of TOKENS tokens in groups of 4, and the
backward pass. Useful operations are three times those of the forward pass (PyTorch's own counter);
what is run again, for checkpointing or in the tiles of the head, is work but not useful. The rate
is that of a large square matrix product in the same precision, measured in the same process.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from common import import_gspo
from rollout import now, setting_up, settings
from torch.utils.flop_counter import FlopCounterMode


def matrix_rate(device, dtype, size):
    """Operations per second of a square matrix product, the median of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        began = now()
        a @ b
        times.append(now() - began)
    return 2 * size**3 / statistics.median(times[2:])


def invented_batch(gspo, policy, rows, tokens, group):
    """Completions of random tokens, all of one length."""
    def ids(*shape):
        return torch.randint(policy.config.vocab_size, shape, device=policy.device)
    count = len(rows) * group
    longest = max(len(row["prompt_ids"]) for row in rows)
    ones = torch.ones(count, tokens, device=policy.device)
    return gspo.Batch(ids(len(rows), longest), torch.ones(len(rows), longest, device=policy.device,
                                                          dtype=torch.long),
                      torch.arange(len(rows), device=policy.device).repeat_interleave(group),
                      ids(count, tokens), ones, ones, ones[:, 0].bool())


def main(arguments):
    """Run the benchmark and print its table."""
    chosen, gspo = settings(arguments), import_gspo()
    with tempfile.TemporaryDirectory() as folder:
        policy, _, rows = setting_up(gspo, chosen, Path(folder))
    batch = invented_batch(gspo, policy, rows, chosen.tokens, chosen.group)

    def forward():
        logps, entropy = gspo.score_tokens(policy, batch)
        return (logps + entropy).sum()

    with FlopCounterMode(display=False) as counter:
        forward().backward()
        policy.zero_grad()
    with FlopCounterMode(display=False) as counter:
        forward()
    useful = 3 * counter.get_total_flops()
    gpu = policy.device.type == "cuda"
    dtype = torch.bfloat16 if gspo.DTYPE == "bfloat16" else torch.float32
    rate = matrix_rate(policy.device, dtype, 8192 if gpu else 1024)
    place = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{chosen.shape}, {chosen.rows} x {chosen.tokens} tokens; {place}; {gspo.DTYPE}; torch "
          f"{torch.__version__}, transformers {transformers.__version__}\n")
    print("| pass | tokens per second | of the matrix rate |\n|---|---|---|")
    for name in ("activations kept", "with checkpointing"):
        if name != "activations kept":
            gspo.checkpoint_layers(policy)
        times = []
        for _ in range(chosen.rounds + 1):
            began = now()
            forward().backward()
            times.append(now() - began)
            policy.zero_grad()
        seconds = statistics.median(times[1:])
        print(f"| {name} | {chosen.rows * chosen.tokens / seconds:,.0f} | "
              f"{useful / seconds / rate:.1%} |")
    print(f"| the rate itself: {rate / 1e12:.3g} TFLOP/s | | 100% |")


if __name__ == "__main__":
    main(sys.argv[1:])
