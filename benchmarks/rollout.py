"""Completion tokens per second: sample_groups against transformers' generate and TRL's rollout.

    python benchmarks/rollout.py                                    # the embedded policy, real ends
    python benchmarks/rollout.py SHAPE=qwen3-0.6b ROWS=64 TOKENS=512  # for a GPU: random weights

Ways are alternated, ROUNDS times, and a round before that is not counted: what is compared is
medians of one and the same process. With random weights nothing ends: every row gets TOKENS tokens.
`generate` keeps float32 weights under autocast on a GPU, as TRL's default does; "static" is its
static cache with the compiled step, which only a GPU has.

The bound is the memory's: per decoding step the weights and all keys and values must be read once,
at the bandwidth that a plain copy reaches in the same process (bytes read and written).
"""

import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from common import QWEN3, QWEN3_VOCABULARY, ROOT, import_gspo
from tqdm.auto import tqdm
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

SETTINGS = {"SHAPE": "embedded", "ROWS": 64, "GROUP": 4, "PROMPT": 96, "TOKENS": 60, "ROUNDS": 5}


def settings(arguments):
    """SETTINGS with what the command line says; one line and exit if it cannot be."""
    chosen = dict(SETTINGS)
    for argument in arguments:
        name, _, text = argument.partition("=")
        if name not in chosen or not (text.isdigit() or name == "SHAPE"):
            raise SystemExit(f"error: {argument!r}; expected NAME=NUMBER of {', '.join(SETTINGS)}")
        chosen[name] = text if name == "SHAPE" else int(text)
    if chosen["SHAPE"] not in ("embedded", "qwen3-0.6b") or chosen["ROWS"] % chosen["GROUP"]:
        raise SystemExit(f"error: SHAPE={chosen['SHAPE']}, ROWS={chosen['ROWS']}; expected "
                         f"embedded or qwen3-0.6b, and whole groups of {chosen['GROUP']}")
    return SimpleNamespace(**{name.lower(): value for name, value in chosen.items()})


def setting_up(gspo, chosen, folder):
    """The policy, its tokenizer and the rows to be answered, by SHAPE."""
    gspo.configure(["PROFILE=embedded", f"MAX_NEW_TOKENS={chosen.tokens}"])
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "policy")
    prompts = chosen.rows // chosen.group
    if chosen.shape == "embedded":
        rows = gspo.with_prompts(gspo.load_rows(gspo.train_datasets, "train_datasets"), tokenizer,
                                 "train_datasets")[:prompts]
    else:
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**QWEN3, vocab_size=QWEN3_VOCABULARY)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        gspo.POLICY_MODEL, gspo.MAX_PROMPT_TOKENS = str(folder), chosen.prompt
        gspo.end_ids = lambda *_: [QWEN3_VOCABULARY]  # never drawn
        ids = torch.randint(1000, 100_000, (prompts, chosen.prompt)).tolist()
        rows = [{"prompt_ids": some} for some in ids]
    policy = gspo.load_policy(gspo.find_model("POLICY_MODEL"))
    if chosen.shape != "embedded":
        policy.generation_config.eos_token_id = None
    return policy, tokenizer, rows


def ways(gspo, chosen, policy, tokenizer, rows):
    """{name: function that decodes all rows once and returns the number of completion tokens}."""
    generator = torch.Generator(policy.device).manual_seed(0)
    ids, mask = gspo.left_pad([row["prompt_ids"] for row in rows], tokenizer.pad_token_id,
                              policy.device)
    ends = torch.tensor(gspo.end_ids(policy, tokenizer), device=policy.device)

    def ours(graphs):
        gspo.CUDA_GRAPHS = graphs
        batch = gspo.sample_groups(policy, tokenizer, rows, chosen.group, generator)
        return int(batch.completion_mask.sum())

    def generate(**options):
        gpu = policy.device.type == "cuda"
        with torch.no_grad(), gspo.autocast(policy.device) if gpu else nullcontext():
            out = policy.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, max_new_tokens=chosen.tokens, num_return_sequences=chosen.group,
                pad_token_id=tokenizer.pad_token_id, **options)[:, ids.shape[1]:]
        ended = torch.isin(out, ends)
        return int((ended.cumsum(1) - ended.long() == 0).sum())  # up to the first end, included

    found = {"generate, eager": generate, "ours": lambda: ours(True)}
    if policy.device.type == "cuda":
        found["ours, without graphs"] = lambda: ours(False)
        found["generate, static cache, compiled"] = lambda: generate(cache_implementation="static")
    model = gspo.load_policy(gspo.find_model("POLICY_MODEL"))  # its own: the trainer changes it
    if trl := trl_rollout(chosen, model, tokenizer, rows):
        found["TRL's rollout"] = trl
    return found


def trl_rollout(chosen, model, tokenizer, rows):
    """TRL's own generation of the same rows, if TRL is installed."""
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        return None
    cpu = model.device.type == "cpu"
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=chosen.rows,
        num_generations=chosen.group, max_completion_length=chosen.tokens, temperature=1.0,
        top_k=0, top_p=1.0, bf16=not cpu, use_cpu=cpu, report_to="none", disable_tqdm=True)
    trainer = GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
        train_dataset=Dataset.from_list([{"prompt": "x"}] * chosen.rows),
        processing_class=tokenizer)
    prompts = [row["prompt_ids"] for row in rows for _ in range(chosen.group)]

    def rollout():
        with torch.no_grad():
            completions = trainer._generate_single_turn(prompts, None, {}, chosen.group)[0]
        return sum(map(len, completions))
    return rollout


def copy_bandwidth(device, size=2**28):
    """Bytes read and written per second by a plain copy."""
    a, b = (torch.ones(size // 4, device=device) for _ in range(2))
    times = []
    for _ in range(10):
        began = now()
        b.copy_(a)
        times.append(now() - began)
    return 2 * size / statistics.median(times)


def now():
    """Seconds, after all queued GPU work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def bytes_per_step(gspo, policy, rows, columns):
    """What a decoding step must read: the weights, and `columns` keys and values of `rows` rows."""
    config, width = policy.config, 2 if gspo.DTYPE == "bfloat16" else 4
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return width * (sum(p.numel() for p in policy.parameters()) + rows * columns * cache)


def main(arguments):
    """Run the benchmark and print its table."""
    chosen, gspo = settings(arguments), import_gspo()
    with tempfile.TemporaryDirectory() as folder:
        policy, tokenizer, rows = setting_up(gspo, chosen, Path(folder))
        speeds, lengths = {}, []
        arms = ways(gspo, chosen, policy, tokenizer, rows)
        for turn in tqdm(range(chosen.rounds + 1), "rounds"):
            for name, way in arms.items():
                began = now()
                tokens = way()
                if turn:
                    speeds.setdefault(name, []).append(tokens / (now() - began))
                    lengths.append(tokens / chosen.rows)
        bandwidth = copy_bandwidth(policy.device)
    length = statistics.mean(lengths)
    columns = statistics.mean(len(row["prompt_ids"]) for row in rows) + length / 2
    bound = chosen.rows * bandwidth / bytes_per_step(gspo, policy, chosen.rows, columns)
    place = torch.cuda.get_device_name() if policy.device.type == "cuda" else \
        f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"\n{chosen.shape}, {chosen.rows} rows in groups of {chosen.group}, {length:.1f} of at "
          f"most {chosen.tokens} tokens; {place}; {gspo.DTYPE}; torch {torch.__version__}, "
          f"transformers {transformers.__version__}; median of {chosen.rounds}\n")
    print("| rollout | tokens per second | x eager generate | of the bound |\n|---|---|---|---|")
    eager = statistics.median(speeds["generate, eager"])
    for name, values in speeds.items():
        speed = statistics.median(values)
        print(f"| {name} | {speed:,.0f} | {speed / eager:.2f} | {speed / bound:.1%} |")
    print(f"| bound: {bandwidth / 1e9:,.0f} GB/s copied | {bound:,.0f} | {bound / eager:.2f} | |")


if __name__ == "__main__":
    main(sys.argv[1:])
