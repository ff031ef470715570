"""How the cost of a step grows: with completions, their length, the vocabulary, the model's size.

    python benchmarks/scaling.py               # some 10 minutes on one core: table and figure
    python benchmarks/scaling.py LARGEST=64    # only points up to 64 completions and 64 tokens

A step is gspo.py's, embedded profile and random rewards: rollout, the reference's log-probs, 4
updates. Weights are random and nothing ends: every completion has its full length. One thing is
changed at a time, from 64 completions of 32 tokens, 8 a prompt, and the embedded policy's shape
with a vocabulary of 512. Each point is a process of its own: CPU seconds on one thread, the median
of five steps behind a warm-up (of fewer, if they take 20 s), and what the process's memory grew by
at most during them (VmHWM of /proc/self/status: on Linux; nan elsewhere).
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from common import ROOT, facts, import_gspo, load_policy, make_rows, steps
from matplotlib.figure import Figure
from tqdm.auto import tqdm

BASE = {"completions": 64, "length": 32, "vocabulary": 512, "width": 128, "layers": 3,
        "micro_batch": 32}
SERIES = {  # title: the points, as what differs from BASE
    "completions": [{"completions": n} for n in (16, 32, 64, 128, 256, 512)],
    "length, tokens": [{"length": n} for n in (16, 32, 64, 128, 256)],
    "length, one completion a row (MICRO_BATCH=1)": [{"length": n, "micro_batch": 1}
                                                     for n in (32, 64, 128, 256)],
    "vocabulary": [{"vocabulary": n} for n in (512, 2_048, 8_192, 32_768, 131_072)],
    "parameters, millions, without the embedding": [
        {"width": width, "layers": layers}
        for width, layers in ((64, 2), (128, 3), (192, 4), (256, 6), (384, 8))]}
GROUP = 8
RESET = Path("/proc/self/clear_refs")  # Linux: of the peak in /proc/self/status


def shape_of(point):
    """A Qwen3 of the point's width and depth, of the embedded policy's proportions."""
    return {"hidden_size": point["width"], "intermediate_size": 2 * point["width"],
            "num_hidden_layers": point["layers"], "num_attention_heads": point["width"] // 32,
            "num_key_value_heads": point["width"] // 64, "head_dim": 32,
            "tie_word_embeddings": True, "max_position_embeddings": 512}


def memory(name):
    """A field of /proc/self/status in MB; NaN where there is no such file, or not to be reset."""
    if not os.access(RESET, os.W_OK):
        return math.nan
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split(f"{name}:")[1].split()[0]) / 1e3


def measure(point):
    """CPU seconds of a step, and the MB by which the process grew in it."""
    gspo, count = import_gspo(), point["completions"]
    gspo.time = SimpleNamespace(perf_counter=time.process_time)
    gspo.configure(["PROFILE=embedded", "DEVICE=cpu", f"BATCH_SIZE={count // GROUP}",
                    f"GROUP_SIZE={GROUP}", f"MAX_NEW_TOKENS={point['length']}",
                    f"MINIBATCH={count // 2}", f"MICRO_BATCH={point['micro_batch']}"])
    gspo.torch.set_num_threads(gspo.THREADS)
    policy, reference = (load_policy(gspo, shape_of(point), point["vocabulary"], "cpu", frozen)
                         for frozen in (False, True))
    step = steps(gspo, policy, reference, make_rows(count // GROUP, 27, 400))
    for parameter in policy.parameters():  # AdamW's state is there from the first step on
        parameter.grad = gspo.torch.zeros_like(parameter)
    gspo.MAX_NEW_TOKENS = 2
    step()
    gspo.MAX_NEW_TOKENS = point["length"]
    if os.access(RESET, os.W_OK):
        RESET.write_text("5", encoding="utf-8")  # VmHWM starts from here
    before = memory("VmRSS")
    found, began = [], time.perf_counter()
    while len(found) < 5 and time.perf_counter() - began < 20 or not found:
        found.append({name: value for name, value in step().items() if name.startswith("time/")})
    middle = {name: statistics.median(one[name] for one in found) for name in found[0]}
    middle["seconds"] = sum(middle.values())
    inside = sum(p.numel() for p in policy.parameters()) - point["vocabulary"] * point["width"]
    return middle | {"MB": memory("VmHWM") - before, "parameters": inside / 1e6}


def x_of(title, point, found):
    """Where a point stands on its axis."""
    return found["parameters"] if title.startswith("parameters") else \
        point[title.split()[0].strip(",")]


def draw(results, file):
    """Seconds above, memory below, a column per series; dashed: in proportion to x."""
    figure = Figure(figsize=(4 * len(results), 7), layout="constrained")
    grid = figure.subplots(2, len(results), squeeze=False)
    for column, (title, points) in enumerate(results.items()):
        x = [one["x"] for one in points]
        for axes, names in zip(grid[:, column], (
                {"seconds": "step", "time/rollout": "rollout", "time/update": "update"},
                {"MB": "peak above what was there"})):
            for name, label in names.items():
                line, = axes.plot(x, [one[name] for one in points], marker="o", label=label)
                last = points[-1][name]
                axes.plot(x, [last * n / x[-1] for n in x], linestyle="--", linewidth=0.8,
                          color=line.get_color())
            axes.set(xscale="log", ylabel="MB" if "MB" in names else "CPU seconds")
            if any(one[name] > 0 for one in points for name in names):  # not where all are nan
                axes.set_yscale("log")
            axes.minorticks_off()
            axes.set_xticks(x, [f"{n:,}" if type(n) is int else f"{n:.2g}" for n in x], fontsize=8)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xlabel(title.replace(", one", ",\none"), fontsize=9)
            axes.grid(alpha=0.25)
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=90)


def main(arguments):
    """Measure all points, print the table, draw the figure."""
    given = dict(argument.split("=", 1) for argument in arguments)
    if "POINT" in given:
        return print(json.dumps(measure(json.loads(given["POINT"]))))
    largest, results = int(given.get("LARGEST", 10**6)), {}
    file = Path(os.path.expanduser(
        given.get("FIGURE", ROOT / "benchmarks" / "images" / "scaling.png")))
    chosen = [(title, BASE | change) for title, changes in SERIES.items() for change in changes
              if max(change.get("completions", 0), change.get("length", 0)) <= largest
              and max(change.get("vocabulary", 0) // 512, change.get("width", 0) // 8) <= largest]
    for title, point in tqdm(chosen, "points"):
        done = subprocess.run([sys.executable, __file__, f"POINT={json.dumps(point)}"],
                              capture_output=True, encoding="utf-8", errors="replace",
                              check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        results.setdefault(title, []).append(found | {"x": x_of(title, point, found)})
    print(f"\n{facts('cpu') | {'device': 'CPU, 1 thread'}}; from {BASE}")
    for title, points in results.items():
        print(f"\n| {title} | s a step | rollout | log-probs | update | MB | s / x, to the first |"
              "\n|---|---|---|---|---|---|---|")
        for one in points:
            growth = one["seconds"] / one["x"] / (points[0]["seconds"] / points[0]["x"])
            x = f"{one['x']:,}" if type(one["x"]) is int else f"{one['x']:.2f}"
            cells = [f"{one[name]:.2f}" for name in ("seconds", "time/rollout", "time/logps",
                                                     "time/update")]
            print(f"| {x} | {' | '.join(cells)} | {one['MB']:,.0f} | {growth:.2f} |")
    file.parent.mkdir(exist_ok=True)
    draw(results, file)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    main(sys.argv[1:])
