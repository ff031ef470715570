"""What the benchmarks share: scripts as modules, a policy of any shape with random weights, a batch
and a run of given size, a training pass, a clock."""

import subprocess
import time
from contextlib import suppress
from types import SimpleNamespace

import torch
import transformers
from results import ROOT, import_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

QWEN3 = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
         "tie_word_embeddings": True, "rope_theta": 1e6,
         "max_position_embeddings": 40_960}  # Qwen/Qwen3-0.6B's config.json, but for vocab_size
QWEN3_VOCABULARY = 151_936
REWARD = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
          "num_attention_heads": 16, "vocab_size": 128_100, "relative_attention": True,
          "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
          "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0,
          "num_labels": 1}  # OpenAssistant/reward-model-deberta-v3-large-v2's shape
REWARD_PARAMETERS = 435_062_785


def import_gspo():
    """gspo.py as a module."""
    return import_file(ROOT / "RL_HAND" / "gspo" / "gspo.py")


def end_ids(policy, tokenizer):
    """The ids that end a completion, sorted: the model's own and the tokenizer's."""
    ends = policy.generation_config.eos_token_id
    return sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})


def load_policy(script, shape, vocabulary, device, frozen=False):
    """The script's policy as its constants make it (precision, checkpointing, adapter), of another
    shape and with random weights; on "meta" without any. Nothing that it samples ends."""
    def load(kind, name, constant, dtype, output_loading_info):
        torch.manual_seed(0)
        with torch.device(device):
            return Qwen3ForCausalLM._from_config(Qwen3Config(**shape, vocab_size=vocabulary),
                                                 dtype=dtype, attn_implementation="sdpa"), {}
    before = script.load, script.DEVICE, script.FROZEN_DEVICE
    script.load, script.DEVICE, script.FROZEN_DEVICE = load, device, device
    policy = script.load_policy("", frozen)
    script.load, script.DEVICE, script.FROZEN_DEVICE = before
    policy.generation_config.eos_token_id = [vocabulary]  # never drawn
    return policy


def load_tokenizer():
    """The embedded tokenizer, whose end token is none."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "policy")
    tokenizer.eos_token = None
    return tokenizer


def make_rows(count, prompt, vocabulary):
    """Rows with prompts of random tokens: `prompt` of them, or as many as it draws."""
    torch.manual_seed(0)
    return [{"prompt_ids": torch.randint(vocabulary, (prompt,)).tolist()} for _ in range(count)]


def pad_prompts(rows, tokenizer, device):
    """The rows' prompts as `generate` takes them: each ends in the last column."""
    prompts = [{"input_ids": row["prompt_ids"]} for row in rows]
    return tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(device)


def make_batch(script, count, group, prompt, length, vocabulary, device="cpu"):
    """`count` completions of random tokens, `group` of each prompt, all of the given length."""
    def ids(rows, columns, times=1):
        return torch.randint(vocabulary, (rows, columns),
                             device=device).repeat_interleave(times, 0)
    index = torch.arange(count // group, device=device).repeat_interleave(group)
    ones = torch.ones(count, length, device=device)
    return script.Batch(prompt_index=index, prompt_ids=ids(count // group, prompt, group),
                        prompt_mask=torch.ones(count, prompt, dtype=torch.long, device=device),
                        completion_ids=ids(count, length), completion_mask=ones,
                        sampled_logps=-ones, ended=ones[:, 0].bool())


def training_pass(script, model, batch):
    """One forward and backward pass."""
    logps, entropy = script.score_tokens(model, batch)
    (logps + entropy).sum().backward()


def steps(script, policy, reference, rows, judge=None):
    """A function that makes one step of gspo.py's `train` with these models and random rewards, and
    returns its metrics, `seconds` among them. `judge` is run on the batch, if there is one."""
    found = {}
    run = SimpleNamespace(
        policy=policy, reference=reference, tokenizer=load_tokenizer(), train_rows=rows, step=0,
        trained={"policy": (policy, script.new_optimizer(policy, script.LEARNING_RATE))},
        questions=0, num_tokens=0, state={"kl_coef": float(script.KL_COEF)}, folder=None)

    def score_completions(run, rows, batch):
        if judge is not None:
            judge(batch)
        rewards = torch.rand(len(batch.ended), device=batch.ended.device)
        return rewards, {"verifier": rewards}
    script.score_completions, script.finish_step = score_completions, lambda _, m: found.update(m)

    def step():
        run.total_steps, began = run.step + 1, now()
        script.train(run)
        return found | {"seconds": now() - began}
    return step


def now():
    """Seconds, after all queued GPU work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def facts(device):
    """What a measurement depends on: machine, versions, commit."""
    commit = ""
    with suppress(OSError):  # there is no git
        commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
                                capture_output=True, encoding="utf-8", errors="replace").stdout
    return {"device": torch.cuda.get_device_name() if device == "cuda" else
            f"CPU, {torch.get_num_threads()} thread(s)", "torch": torch.__version__,
            "transformers": transformers.__version__, "commit": commit.strip()}
