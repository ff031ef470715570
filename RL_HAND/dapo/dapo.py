# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "transformers==5.23.0",
#   "pandas==3.1.1",
#   "pyarrow==26.0.1",
#   "matplotlib==3.11.2",
#   "tqdm==4.70.1",
# ]
# ///
"""DAPO: Decoupled Clip and Dynamic sAmpling Policy Optimization (arXiv:2503.14476), in one file.

GRPO with five changes. What this script minimises is Eq. 8 with the sign of a loss:

    L = -(1 / sum_i |y_i|) sum_i sum_t min(r_it A_i, clip(r_it, 1-low, 1+high) A_i)

    1. Clip-higher (Eq. 10): high > low, so that unlikely tokens can become likely.
    2. Dynamic sampling (Eq. 11): groups that are all right or all wrong teach nothing; they are
       dropped, and other questions are sampled in their place until the batch is full.
    3. Token-level loss (Eq. 12): the mean is over all tokens, so that long answers weigh more.
    4. Overlong reward shaping (Eq. 13): a penalty that grows over the last tokens of the limit, or
       truncated answers left out of the loss altogether.
    5. No KL to the starting policy: no reference model is loaded.

Simplified on purpose: one process, one device, no sampling while training.

    python RL_HAND/dapo/dapo.py                                # small models where there is no GPU
    python RL_HAND/dapo/dapo.py LEARNING_RATE=5e-5 SEED=1     # any constant below can be set so
    python RL_HAND/dapo/dapo.py RESUME_FROM=runs/dapo/epoch_1  # go on exactly from that checkpoint
    python RL_HAND/dapo/dapo.py --help

One CPU core, small models: 1.2 s a step, 2 minutes of training, 1 GB of memory. A GPU with
Qwen3-0.6B: not run yet.
"""

import ast
import copy
import csv
import difflib
import functools
import glob
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from matplotlib.figure import Figure
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer, DynamicCache)

# ========================================== Constants ===========================================
# Each can be set on the command line as NAME=VALUE. On a machine without a CUDA GPU the values in
# EMBEDDED (below) take the place of the ones here: there, change those.

# --- Model
PROFILE = "auto"  # "full": the models named here; "embedded": those in data/; "auto": full on CUDA
POLICY_MODEL = "Qwen/Qwen3-0.6B"  # what is trained, a folder or a model id; also the KL reference
REWARD_MODEL = "OpenAssistant/reward-model-deberta-v3-large-v2"  # scores (question, answer) pairs
ENABLE_THINKING = False  # the chat template's switch; a thought rarely fits into MAX_NEW_TOKENS
DEVICE = "auto"  # "auto": cuda if there is one, else cpu; or "cuda:1", "cpu"
DTYPE = "auto"  # of the passes (weights stay float32); "auto": bfloat16 on CUDA, else float32
THREADS = 0  # on the CPU; 0: PyTorch's choice. More than one is only faster on an idle machine
LOGITS_AT_ONCE = 2**24  # logits alive at a time: (B, T, V) never exists; changes memory only
CUDA_GRAPHS = True  # decode by replaying recorded steps; changes speed only
ENDS_EVERY = 4  # tokens between looks at which completions have ended; changes speed only
GRADIENT_CHECKPOINTING = True  # keep each layer's input only, run it again; changes memory only
LORA_RANK = 0  # train an adapter of this rank (pip install peft), not the weights; 0: all weights
LORA_ALPHA = 32  # an adapter's product is scaled by LORA_ALPHA / LORA_RANK
FROZEN_DEVICE = "auto"  # of reference and reward model; "auto": the second GPU if one is free

# --- Data
train_datasets = [  # questions to train on: local file, pattern or hf://; parquet, json or jsonl
    {"path": "hf://datasets/openai/gsm8k/main/train-00000-of-00001.parquet",  # "teacher": only GAD
     "type": "parquet", "input": "question", "output": "answer", "teacher": "answer"}]
eval_datasets = [  # held-out questions, never trained on
    {"path": "hf://datasets/openai/gsm8k/main/test-00000-of-00001.parquet",
     "type": "parquet", "input": "question", "output": "answer"}]
MAX_PROMPT_TOKENS = 256  # tokens; longer prompts are dropped and counted

# --- Sampling
BATCH_SIZE = 2  # prompts per rollout
GROUP_SIZE = 4  # completions per prompt (G)
MAX_NEW_TOKENS = 512  # tokens per completion, the end token included
TEMPERATURE = 1.0  # of the sampled and of the trained distribution: they must be the same

# --- Reward
REWARD_WEIGHTS = {"model": 0.5, "verifier": 1.0}  # and "function"; the reward is their sum
REWARD_SIGMOID = True  # the reward model's score goes through a sigmoid: 0.5 x it < 1 right answer
REWARD_FUNCTION = ""  # "file.py:name": name(questions, responses, references) -> scores; or README
USE_SEQUENCE_LEVEL_REWARD = True  # False: each segment is rewarded with what it added
SEGMENT_END = r"[.\n]\s*$"  # a segment ends behind a full stop (or decimal point) or a line
MAX_REWARD_TOKENS = 512  # tokens of a pair, DeBERTa's training length; the longer part is cut
REWARD_BATCH = 64  # pairs per forward pass of the reward model; changes memory only

# --- Optimisation
NUM_EPOCHS = 1  # passes over the training questions
MAX_STEPS = 0  # stop after this many rollouts; 0: after NUM_EPOCHS
LEARNING_RATE = 1e-6  # AdamW's
WARMUP_STEPS = 0  # optimiser steps of linear warm-up
ADAM_BETAS = (0.9, 0.95)  # AdamW's
ADAM_EPSILON = 1e-8  # AdamW's
WEIGHT_DECAY = 0.0  # AdamW's
MAX_GRAD_NORM = 1.0  # gradient clipping; 0: none
MINIBATCH = 8  # completions per optimiser step: part of the algorithm
MICRO_BATCH = 4  # completions per forward pass: memory only, gradients add up to a minibatch
LENGTH_BUCKET = 16  # completions padded to a common length: speed only
SEED = 0  # of sampling, data order and shuffling

# --- Algorithm
DAPO_EPOCHS = 4  # passes over a rollout; with one optimiser step per rollout every ratio is 1
CLIP_RANGE = (0.2, 0.28)  # (low, high), or one number, of a *token's* ratio: sec. 4.1
ADVANTAGE_TYPE = "normalized"  # "normalized": (R - mean) / std, Eq. 9; "relative": R - mean
USE_GROUP_NORMALIZATION = True  # mean and std over each group; False: over the whole rollout
STD_CORRECTION = 1  # the std divides by n - 1 (as TRL and verl do); 0: by n
ADVANTAGE_EPSILON = 1e-6  # added to the std
DYNAMIC_SAMPLING = True  # replace groups without spread, Eq. 11
MAX_SAMPLING_ROUNDS = 8  # samplings per step at most; then the step makes do with what it has
SPREAD_OF = "accuracy"  # what must differ within a group: "accuracy", or "reward"
SPREAD_THRESHOLD = 0.0  # the std that must be exceeded; a neural reward hardly ever ties: set one
OVERLONG_CACHE = 128  # the last tokens of MAX_NEW_TOKENS over which the penalty grows; 0: none
OVERLONG_PENALTY = 1.0  # taken off the reward of an answer that fills MAX_NEW_TOKENS, Eq. 13
OVERLONG_FILTERING = False  # True: truncated answers count in the group, not in the loss
ENTROPY_COEF = 0.0  # weight of the entropy bonus

# --- Evaluation
EVAL_EVERY = 200  # rollouts between evaluations (also at step 0 and at the end of each epoch)
EVAL_QUESTIONS = 256  # held-out questions used; 0: all
EVAL_BATCH = 32  # questions answered at once; changes memory only
EVAL_TEMPERATURE = 1.0  # of the sampled evaluation; the other one is greedy
TOP_P = 1.0  # nucleus of the sampled evaluation only: training samples the whole distribution
SHOW_SAMPLES = 3  # held-out questions whose answers are printed at each evaluation

# --- Output
OUTPUT_DIR = "runs/{script}"  # the run's folder; with _2, _3, ... if there is one: no overwriting
SAVE_EVERY = 0  # rollouts between extra checkpoints step_N/; 0: only epoch_N/
RESUME_FROM = ""  # an epoch_N/ or step_N/ folder to go on from, exactly
TENSORBOARD = False  # also write event files (pip install tensorboard)

EMBEDDED = {  # for a machine without a GPU: a 0.5 M Qwen3 and a 0.6 M DeBERTa on sums, see data/
    "POLICY_MODEL": "data/policy",
    "REWARD_MODEL": "data/reward_model",
    "train_datasets": [{"path": "data/train.parquet", "input": "question", "output": "answer",
                        "teacher": "teacher_response"}],
    "eval_datasets": [{"path": "data/heldout.parquet", "input": "question", "output": "answer"}],
    "THREADS": 1,
    "GRADIENT_CHECKPOINTING": False,
    "MAX_PROMPT_TOKENS": 64,
    "BATCH_SIZE": 16,
    "GROUP_SIZE": 8,
    "MAX_NEW_TOKENS": 60,
    "NUM_EPOCHS": 2,
    "LEARNING_RATE": 1e-4,
    "MINIBATCH": 64,
    "MICRO_BATCH": 64,
    "DAPO_EPOCHS": 2,
    "OVERLONG_CACHE": 12,
    "EVAL_EVERY": 10,
    "EVAL_QUESTIONS": 512,
    "EVAL_BATCH": 512,
}

# ========================================== Training ============================================


def train(run):
    """The whole algorithm. `run` (see `start`) holds the models, the data and the run's folder."""
    policy = run.policy
    while run.step < run.total_steps:
        clock = Clock()
        rows, batch, rewards, parts, sampling = sample_dynamically(run, clock)
        batch.advantages = token_advantages(run, rows, batch, rewards)    # (B, T)
        clock.lap("reward")
        batch.old_logps = behaviour_logps(policy, batch)                  # (B, T)
        clock.lap("logps")

        meter = Meter()
        for minibatch in minibatches(batch, DAPO_EPOCHS, run.shuffler):
            minibatch.weights = token_weights(loss_mask(minibatch))       # (b, T), sums to 1
            for micro in micro_batches(run, minibatch):
                logps, entropy = score_tokens(policy, micro)              # (b, T) each
                policy_term, statistics = policy_loss(logps, micro.old_logps, micro.advantages,
                                                      micro.completion_mask)
                token_loss = policy_term - ENTROPY_COEF * entropy
                (token_loss * micro.weights).sum().backward()
                meter.add(micro,
                          losses={"loss": token_loss, "policy_loss": policy_term,
                                  "entropy_loss": -entropy},
                          statistics={"entropy": entropy, **statistics})
            optimiser_step(run, "policy", meter)
        clock.lap("update")

        finish_step(run, meter.means() | batch_metrics(batch, rewards, parts) | sampling |
                    clock.times())


def prepare(run):
    """What this algorithm needs besides the policy: nothing."""


# ====================================== Dynamic sampling ========================================


def sample_dynamically(run, clock):
    """Sample until BATCH_SIZE groups have spread (Eq. 11), or MAX_SAMPLING_ROUNDS times.

    Each round asks as many new questions as groups are missing: there is no surplus to throw away.
    A step that is still short trains on fewer groups; one without any, on a round of advantage 0.
    (Of several processes each collects its share, and the last round's others fill what is short.)
    Returns rows, batch, shaped rewards (B,) and the sources' scores of what is trained on; and
    metrics, whose `accuracy` and `reward` are those of all that was sampled, not of the selection.
    """
    kept, asked, tokens, seen, processes = [], 0, 0, defaultdict(list), process()[1]
    for rounds in range(1, MAX_SAMPLING_ROUNDS + 1):
        missing = BATCH_SIZE // processes - sum(len(rows) for rows, *_ in kept)
        rows = next_questions(run, int(most(missing)) * processes)
        batch = sample_groups(run.policy, run.tokenizer, rows, GROUP_SIZE, run.sampler)
        clock.lap("rollout")
        rewards, parts = score_completions(run, rows, batch)
        asked, tokens = asked + len(rows), tokens + int(batch.completion_mask.sum())
        seen["reward"] += rewards.tolist()
        seen["accuracy"] += parts["verifier"]
        rewards = rewards - overlong_penalty(batch.completion_mask.sum(1))
        of = rewards if SPREAD_OF == "reward" else torch.tensor(parts["verifier"])
        groups = of.to(rewards.device).reshape(-1, GROUP_SIZE)
        spread = (group_std(groups) > SPREAD_THRESHOLD) & ~without_spread(groups)     # (P, 1)
        chosen = spread[:, 0].nonzero()[:missing, 0]
        last = rounds == MAX_SAMPLING_ROUNDS
        if not DYNAMIC_SAMPLING or (last and (processes > 1 or not kept and not len(chosen))):
            chosen = (~spread[:, 0]).long().argsort(stable=True)[:missing].sort().values
        if len(chosen):
            kept.append(select_groups(rows, batch, rewards, parts, chosen))
        clock.lap("reward")
        if most(missing - len(chosen)) == 0:
            break
    rows, batches, rewards, parts = zip(*kept)
    asked, tokens, groups = (int(add_up(n)) for n in (asked, tokens, sum(map(len, rows))))
    metrics = {"dynamic/rounds": rounds, "dynamic/questions": asked, "tokens": tokens,
               "dynamic/groups": groups, "dynamic/dropped_ratio": 1 - groups / asked,
               "reward": float(average(mean(seen["reward"]))),
               "accuracy": float(average(mean(seen["accuracy"])))}
    parts = {name: sum((part[name] for part in parts), []) for name in parts[0]}
    return sum(rows, []), join_batches(batches), torch.cat(rewards), parts, metrics


def select_groups(rows, batch, rewards, parts, groups):
    """The rows, completions, rewards and scores of the given groups (1-D index)."""
    index = groups[:, None] * GROUP_SIZE + torch.arange(GROUP_SIZE, device=groups.device)
    index, place = index.flatten(), torch.arange(len(groups), device=groups.device)
    some = replace(batch.rows(index), prompt_index=place.repeat_interleave(GROUP_SIZE),
                   prompt_ids=batch.prompt_ids[groups], prompt_mask=batch.prompt_mask[groups])
    parts = {name: [scores[i] for i in index.tolist()] for name, scores in parts.items()}
    return [rows[i] for i in groups.tolist()], some, rewards[index], parts


def join_batches(batches):
    """Several new batches as one: prompts padded on the left, completions on the right."""
    long = max(batch.prompt_ids.shape[1] for batch in batches)
    wide = max(batch.completion_ids.shape[1] for batch in batches)
    shift, joined = 0, defaultdict(list)
    for batch in batches:
        joined["prompt_index"].append(batch.prompt_index + shift)
        joined["ended"].append(batch.ended)
        shift += len(batch.prompt_ids)
        for name in ("prompt_ids", "prompt_mask"):
            value = getattr(batch, name)
            joined[name].append(F.pad(value, (long - value.shape[1], 0)))
        for name in ("completion_ids", "completion_mask", "sampled_logps"):
            value = getattr(batch, name)
            joined[name].append(F.pad(value, (0, wide - value.shape[1])))
    return Batch(**{name: torch.cat(values) for name, values in joined.items()})


# ================================== Overlong reward shaping =====================================


def overlong_penalty(lengths):
    """Soft overlong punishment (Eq. 13), to be taken off the reward. lengths: (B,) tokens; (B,) in
    [0, OVERLONG_PENALTY]: 0 up to MAX_NEW_TOKENS - OVERLONG_CACHE, then growing linearly.

    >>> overlong_penalty(torch.tensor([100.0, 384.0, 448.0, 512.0])).tolist()
    [0.0, 0.0, 0.5, 1.0]
    """
    if OVERLONG_CACHE == 0:
        return torch.zeros_like(lengths)
    over = (lengths - (MAX_NEW_TOKENS - OVERLONG_CACHE)) / OVERLONG_CACHE
    return OVERLONG_PENALTY * over.clamp(0.0, 1.0)


def loss_mask(batch):
    """The tokens that the loss sees, (b, T): with OVERLONG_FILTERING no truncated answer's."""
    mask = batch.completion_mask
    return mask * batch.ended[:, None] if OVERLONG_FILTERING else mask


# ========================================= Advantages ===========================================


def compute_advantages(rewards):
    """Group-relative advantages (Eq. 9, arXiv:2503.14476).

    rewards: (B,) float, GROUP_SIZE consecutive completions per prompt; or (B, K), a reward for each
    of K segments of a completion, NaN where it has fewer. Returns the same shape, 0 where NaN.

    A group without spread carries no signal and gets exactly 0: divided by a std that is float
    noise, equal scores would get advantages of any size, whatever the epsilon.

    >>> [round(a, 2) for a in compute_advantages(torch.tensor([95.0, 70.0, 85.0, 80.0])).tolist()]
    [1.2, -1.2, 0.24, -0.24]
    """
    groups = rewards.reshape(len(rewards) // GROUP_SIZE if USE_GROUP_NORMALIZATION else 1, -1)
    advantages = groups - groups.nanmean(1, keepdim=True)
    if ADVANTAGE_TYPE == "normalized":
        advantages = advantages / (group_std(groups, STD_CORRECTION) + ADVANTAGE_EPSILON)
    advantages = advantages.masked_fill(without_spread(groups), 0.0).nan_to_num(0.0)
    return advantages.reshape(rewards.shape)


def token_advantages(run, rows, batch, rewards):
    """The advantage of each token (B, T): its answer's, or its segment's if those are rewarded."""
    if USE_SEQUENCE_LEVEL_REWARD:
        advantages = share(compute_advantages(gather(rewards)))           # (B,), all processes'
        return advantages[:, None].expand_as(batch.completion_mask)
    increments, segments = segment_rewards(run, rows, batch)              # (B, K), (B, T)
    return share(compute_advantages(gather(increments))).gather(1, segments)


# ============================================ Loss ==============================================


def policy_loss(logps, old_logps, advantages, mask):
    """The clipped token-ratio loss at every token (Eq. 8, negated: to be minimised).

    logps, old_logps: (b, T) log-probs under the trained and the sampling policy; advantages (b, T);
    mask (b, T), 1 up to and including the end token. Returns the token losses and statistics,
    (b, T) each; `token_weights` takes their mean.

    >>> old, new = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-0.9, -1.5]])
    >>> loss, statistics = policy_loss(new, old, torch.ones(1, 2), torch.ones(1, 2))
    >>> [f"{x:.4f}" for x in loss[0]]     # exp(0.1), inside the range; exp(0.5), cut off at 1.28
    ['-1.1052', '-1.2800']
    """
    low, high = clip_range()
    log_ratio = ((logps - old_logps) * mask).clamp(max=20.0)  # keeps inf x 0 from the gradient
    ratio = torch.exp(log_ratio)                                               # (b, T)
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    return loss, ratio_statistics(ratio.detach(), advantages, low, high)


def clip_range():
    """CLIP_RANGE as (low, high)."""
    return CLIP_RANGE if isinstance(CLIP_RANGE, tuple) else (CLIP_RANGE, CLIP_RANGE)


def token_weights(mask):
    """Each token's weight in its minibatch's loss (Eq. 12): the mean over all tokens that count.

    mask: (b, T). Made for the whole minibatch before it is cut into micro-batches, so that
    MICRO_BATCH changes the memory and nothing else.

    >>> token_weights(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])).tolist()
    [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]
    """
    return mask / average(mask.sum()).clamp(min=1)


def check_algorithm():
    """Stop with one line if the Algorithm constants cannot work."""
    if ADVANTAGE_TYPE not in ("relative", "normalized"):
        fail(f"ADVANTAGE_TYPE={ADVANTAGE_TYPE}: expected relative or normalized")
    pair = clip_range()
    if len(pair) != 2 or not all(type(x) in (int, float) and x > 0 for x in pair) or pair[0] > 1:
        fail(f"CLIP_RANGE={CLIP_RANGE}: expected a positive number or a pair (low, high), low <= 1")
    if SPREAD_OF not in ("accuracy", "reward"):
        fail(f"SPREAD_OF={SPREAD_OF}: expected accuracy or reward")
    if GROUP_SIZE < 2:
        fail(f"GROUP_SIZE={GROUP_SIZE}: expected 2 or more: a group's answers are compared")
    if not 0 <= OVERLONG_CACHE <= MAX_NEW_TOKENS:
        fail(f"OVERLONG_CACHE={OVERLONG_CACHE}: expected 0 to MAX_NEW_TOKENS = {MAX_NEW_TOKENS}")
    check_at_least(DAPO_EPOCHS=1, ENTROPY_COEF=0, ADVANTAGE_EPSILON=0, STD_CORRECTION=0,
                   MAX_SAMPLING_ROUNDS=1, SPREAD_THRESHOLD=0, OVERLONG_PENALTY=0)


def describe_algorithm():
    """The algorithm's line of the start-up block."""
    updates = DAPO_EPOCHS * BATCH_SIZE * GROUP_SIZE // MINIBATCH
    refill = f"{MAX_SAMPLING_ROUNDS} samplings at most" if DYNAMIC_SAMPLING else "one sampling"
    return (f"{DAPO_EPOCHS} passes = {updates} updates per rollout; clip {CLIP_RANGE}; "
            f"{ADVANTAGE_TYPE} advantages; {refill}; no KL; entropy {ENTROPY_COEF}")


def algorithm_metrics():
    """The columns of metrics.csv that are this algorithm's own."""
    return ["policy_loss", "entropy_loss", "dynamic/rounds", "dynamic/questions", "dynamic/groups",
            "dynamic/dropped_ratio"]


def algorithm_panels():
    """The panels of the plot that are this algorithm's own: (title, {metric: label})."""
    return [("Dynamic sampling: rounds", {"dynamic/rounds": ""}),
            ("Dynamic sampling: groups dropped", {"dynamic/dropped_ratio": "share"})]


# ==== The algorithm ends here. From here on the scripts are the same: you may stop reading. =====

# =========================================== Rollout ============================================


@dataclass
class Batch:
    """Completions of a rollout, or some of them: B completions of P prompts, at most T tokens each.

    A prompt's tokens are kept once, padded on the left; completions are padded on the right, and
    `completion_mask` is 1.0 up to and including the first end token. Log-probs are float32.
    """
    prompt_ids: torch.Tensor  # (P, L)
    prompt_mask: torch.Tensor  # (P, L)
    prompt_index: torch.Tensor  # (B,) whose completion a row is
    completion_ids: torch.Tensor  # (B, T)
    completion_mask: torch.Tensor  # (B, T)
    sampled_logps: torch.Tensor  # (B, T) as they were when the tokens were drawn
    ended: torch.Tensor  # (B,) bool: False where MAX_NEW_TOKENS cut the completion off
    old_logps: torch.Tensor | None = None  # (B, T) the sampling policy's, for the ratio
    ref_logps: torch.Tensor | None = None  # (B, T)
    advantages: torch.Tensor | None = None  # (B, T)
    old_values: torch.Tensor | None = None  # (B, T) a critic's, if there is one
    returns: torch.Tensor | None = None  # (B, T) what the critic should have said
    weights: torch.Tensor | None = None  # (B, T)

    def rows(self, index):
        """The batch of the given rows (1-D index), trimmed to the longest of them."""
        longest = int(self.completion_mask[index].sum(1).max())
        picked = {"prompt_index": self.prompt_index[index], "ended": self.ended[index]}
        for name in ("completion_ids", "completion_mask", "sampled_logps", "old_logps", "ref_logps",
                     "advantages", "old_values", "returns", "weights"):
            value = getattr(self, name)
            picked[name] = None if value is None else value[index, :longest]
        return replace(self, **picked)

    def to(self, device):
        """The batch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


@torch.no_grad()
def sample_groups(policy, tokenizer, rows, group_size, generator, temperature=None, top_p=1.0):
    """Sample `group_size` completions of each row's prompt: a Batch of len(rows) x group_size.

    Each prompt is run once and its keys and values shared by its group; all completions are decoded
    together. Of the model's generation_config only the end ids are used (Qwen3's also says top_k
    20): what is sampled is softmax(logits / temperature), which is what is trained. `temperature`:
    TEMPERATURE unless given; 0 is greedy.

    All chance is drawn first, one number per row and token: what a row becomes does not depend on
    which rows are decoded beside it, in which process, or whether CUDA graphs do it.
    """
    temperature = TEMPERATURE if temperature is None else temperature
    (rank, processes), device, count = process(), policy.device, len(rows) * group_size
    chance = None
    if temperature:
        chance = torch.rand(processes, count, MAX_NEW_TOKENS, generator=generator, device=device,
                            dtype=torch.float64)[rank]                                  # (B, T)
    prompt_ids, prompt_mask = left_pad([row["prompt_ids"] for row in rows],
                                       tokenizer.pad_token_id, device)
    index = torch.arange(len(rows), device=device).repeat_interleave(group_size)        # (B,)
    decoder = find_decoder(policy, tokenizer, count, prompt_ids.shape[1] + MAX_NEW_TOKENS)
    decoder.start(prompt_ids, prompt_mask, index, chance, temperature, top_p)
    for t in tqdm(range(1, MAX_NEW_TOKENS), "rollout", unit="token", leave=False, delay=5):
        if t % ENDS_EVERY == 0 and not decoder.drop_ended():
            break
        decoder.advance()
    return decoder.batch()


class Decoder:
    """Decodes up to `count` rows together, a token at a time, in buffers that stay where they are.

    A step asks the device nothing and changes no shape, so that on CUDA it is recorded as a graph
    and replayed: one launch instead of a thousand small ones. Its shapes are the number of rows and
    of columns (prompt and completion) in use, both rounded up to an eighth of the whole, hence at
    most 64 graphs. In bfloat16 the weights are a copy, refreshed before each rollout.
    """

    def __init__(self, policy, tokenizer, count, columns):
        self.device, self.policy, self.count, self.columns = policy.device, policy, count, columns
        self.model = policy
        if DTYPE == "bfloat16" and trainable(policy):  # half the bytes to read, nothing to cast
            self.model = load_policy(find_model("POLICY_MODEL"), frozen=True)
        self.graphs, self.pool = {}, None
        self.pad = tokenizer.pad_token_id
        self.ends = torch.tensor(end_ids(policy, tokenizer), device=self.device)

        def buffer(*shape, dtype=torch.long):
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.t, self.column = buffer(1), buffer(1)  # of the token that is drawn next
        self.row, self.token, self.place = buffer(count), buffer(count), buffer(count)
        self.seen = buffer(count, columns, dtype=torch.bool)  # the columns that a row attends to
        self.ids, self.mask = buffer(count, MAX_NEW_TOKENS), buffer(count, MAX_NEW_TOKENS).float()
        self.logps, self.ended = torch.zeros_like(self.mask), buffer(count, dtype=torch.bool)
        self.chance = torch.zeros_like(self.mask, dtype=torch.float64)
        self.cache = ColumnCache(config=policy.config)

    def start(self, prompt_ids, prompt_mask, index, chance, temperature, top_p):
        """Run the prompts and draw the first token of each row; `index` (B,) is a row's prompt."""
        self.sampling, self.live = (temperature, top_p), self.count
        self.prompts, width = (prompt_ids, prompt_mask, index), prompt_ids.shape[1]
        if self.model is not self.policy:
            refresh(self.model, self.policy)
        for tensor in (self.t, self.mask, self.logps, self.ended, self.seen):
            tensor.zero_()
        self.column.fill_(width)
        self.ids.fill_(self.pad)
        if chance is not None:
            self.chance.copy_(chance)
        torch.arange(self.count, out=self.row)
        self.steps = width  # the columns in use, known without asking the device
        place, prompts = positions(prompt_mask), PromptCache(config=self.policy.config)
        hidden = run_model(self.model, prompt_ids, prompt_mask, place, prompts)[:, -1]  # (P, H)
        if not hidden.isfinite().all():
            fail("the policy's outputs are not finite; expected numbers: lower LEARNING_RATE, go "
                 "on from an earlier checkpoint")
        self.cache.fill(prompts, index, self.columns)
        self.seen[:, :width] = prompt_mask[index].bool()
        self.place.copy_(place[index, -1])
        self.choose(hidden[index])

    def choose(self, hidden):
        """Draw a token for each live row from its last hidden state (n, H), and note it."""
        (temperature, top_p), n = self.sampling, len(hidden)
        row = self.row[:n]
        scores = torch.log_softmax(head(self.model, hidden) / (temperature or 1.0), -1)   # (n, V)
        chance = self.chance.index_select(1, self.t)[:, 0].index_select(0, row)
        token = draw(scores, temperature, top_p, chance)                                  # (n,)
        running = ~self.ended.index_select(0, row)
        where = (row, self.t.expand(n))
        self.ids.index_put_(where, torch.where(running, token, self.pad))
        self.logps.index_put_(where, scores.gather(1, token[:, None])[:, 0] * running)
        self.mask.index_put_(where, running.float())
        ending = (token[:, None] == self.ends).any(1)
        self.ended.index_put_((row,), ~running | ending)
        self.token[:n] = token
        self.t += 1

    def advance(self):
        """One more token for each live row."""
        self.steps += 1
        eighth = math.ceil(self.columns / 8)
        width = min(self.columns, math.ceil(self.steps / eighth) * eighth)
        if self.device.type != "cuda" or not CUDA_GRAPHS:
            return self.step(self.live, width)
        key = (self.live, width, self.sampling)
        if key not in self.graphs:  # the first time as it is, which also warms it up
            self.graphs[key] = None
            return self.step(self.live, width)
        if self.graphs[key] is None:
            self.graphs[key] = graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.step(self.live, width)
            self.pool = graph.pool()
        self.graphs[key].replay()

    def step(self, n, width):
        """Run the model on the last token of the first n rows, and draw their next ones."""
        self.seen[:n].index_fill_(1, self.column, True)
        self.place[:n] += 1
        self.cache.use(n, width, self.column)
        mask = self.seen[:n, None, None, :width]
        if self.model is not self.policy:  # what is added to the scores, once for all layers
            mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, -math.inf)
        hidden = run_model(self.model, self.token[:n, None], mask, self.place[:n, None],
                           self.cache)[:, -1]                                             # (n, H)
        self.column += 1
        self.choose(hidden)

    def drop_ended(self):
        """Make room where rows have ended; returns how many have not. The only look at the device.

        The others move up: as many rows stay as the next full eighth holds."""
        ended = self.ended[self.row[:self.live]]
        running = self.live - int(ended.sum())
        eighth = math.ceil(self.count / 8)
        wanted = math.ceil(running / eighth) * eighth
        if 0 < wanted < self.live:
            kept = ended.long().argsort(stable=True)[:wanted]
            for tensor in (self.row, self.token, self.place, self.seen, *self.cache.buffers()):
                tensor[:wanted] = tensor.index_select(0, kept)
            self.live = wanted
        return running

    def batch(self):
        """What was decoded, as a Batch of its own."""
        longest = max(1, int(self.mask.sum(1).max()))
        ids, mask, logps = (x[:, :longest].clone() for x in (self.ids, self.mask, self.logps))
        return Batch(*self.prompts, ids, mask, logps, self.ended.clone())


def find_decoder(policy, tokenizer, count, columns):
    """The policy's decoder; a new one if that has another size, or is too narrow."""
    decoder, size = getattr(policy, "decoder", None), (count, MAX_NEW_TOKENS)
    if decoder is None or decoder.ids.shape != size or decoder.columns < columns:
        policy.decoder = None  # free the old one's memory first
        columns = max(columns, MAX_PROMPT_TOKENS + MAX_NEW_TOKENS)  # so that it will do next time
        columns += -columns % 128  # kernels like eighths that are multiples of 16
        policy.decoder = decoder = Decoder(policy, tokenizer, count, columns)
    return decoder


class PromptCache(DynamicCache):
    """Keys and values of prompts, made once; completions read those of their own prompt.

    Reading adds nothing, so that a layer can be run again in the backward pass. index_select,
    because the gradient of keys[rows] is summed in any order on several threads: runs would not
    repeat.
    """
    readers = None  # whose keys each row reads; None: the prompts themselves are being run

    def read_by(self, index):
        """The same keys and values, for rows (r,) that complete the prompts `index`."""
        view = copy.copy(self)
        view.readers = index
        return view

    def update(self, keys, values, layer, *_, **__):
        """The model's attention puts new keys in, and gets those to attend to."""
        kept = self.layers[layer]
        if self.readers is None:
            kept.keys, kept.values, kept.is_initialized = keys, values, True
            return keys, values
        return (torch.cat([kept.keys.index_select(0, self.readers), keys], 2),
                torch.cat([kept.values.index_select(0, self.readers), values], 2))


class ColumnCache(DynamicCache):
    """Keys and values in buffers (rows, heads, columns, D), written a column at a time in place."""

    def fill(self, prompts, index, columns):
        """Begin with the keys and values of prompts, those of prompt index[i] in row i."""
        for mine, theirs in zip(self.layers, prompts.layers):
            for name in ("keys", "values"):
                value = getattr(theirs, name)                                 # (P, heads, L, D)
                if not mine.is_initialized or getattr(mine, name) is None:
                    shape = (len(index), value.shape[1], columns, value.shape[3])
                    setattr(mine, name, value.new_zeros(shape))
                getattr(mine, name)[:, :, :value.shape[2]] = value.index_select(0, index)
            mine.is_initialized = True

    def use(self, rows, width, column):
        """From now on: the first `rows` rows and `width` columns; new keys go to `column` (1,)."""
        self.window = (rows, width, column)

    def update(self, keys, values, layer, *_, **__):
        """The model's attention puts new keys in, and gets those to attend to."""
        (rows, width, column), kept = self.window, self.layers[layer]
        kept.keys[:rows].index_copy_(2, column, keys)
        kept.values[:rows].index_copy_(2, column, values)
        return kept.keys[:rows, :, :width], kept.values[:rows, :, :width]

    def buffers(self):
        """All keys and values, one tensor after the other."""
        return [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]


def refresh(model, policy):
    """Bring the decoder's bfloat16 copy up to date; with LoRA, the adapters are added to it."""
    weights = dict(model.named_parameters())
    for name, parameter in policy.named_parameters():
        if "lora_" not in name:
            weights[name.replace(".base_layer", "")].copy_(parameter)
    for name, module in policy.named_modules():
        if hasattr(module, "get_delta_weight"):
            weights[f"{name}.weight"] += module.get_delta_weight("default")


def draw(logps, temperature, top_p, chance):
    """One token per row of (n, V) log-probs: greedy at temperature 0, else from the nucleus.

    The token where the cumulated probability passes `chance` (n,), uniform in [0, 1) and float64:
    first in blocks of 256 tokens, then inside the block, so that small probabilities count as well.

    >>> logps = torch.tensor([[0.5, 0.2, 0.3]]).log()
    >>> [draw(logps, 1.0, 1.0, torch.tensor([c]).double()).item() for c in (0.49, 0.51, 0.71)]
    [0, 1, 2]
    """
    if temperature == 0:
        return logps.argmax(-1)
    probs = logps.exp()
    if top_p < 1.0:
        ordered, order = probs.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays
        probs = probs.masked_fill(outside.scatter(1, order, outside), 0.0)
    count = probs.shape[1]
    probs = F.pad(probs, (0, -count % 256)).unflatten(1, (-1, 256))                 # (n, K, 256)
    blocks = probs.sum(2, dtype=torch.float64).cumsum(1)                            # (n, K)
    point = chance[:, None] * blocks[:, -1:]
    block = (blocks <= point).sum(1, keepdim=True).clamp(max=blocks.shape[1] - 1)   # (n, 1)
    inside = probs.take_along_dim(block[:, :, None], 1)[:, 0].double()              # (n, 256)
    point = point - F.pad(blocks, (1, 0)).gather(1, block)
    token = (inside.cumsum(1) <= point).sum(1)
    last = 255 - (inside.flip(1) > 0).long().argmax(1)  # where rounding ran past the end
    return (block[:, 0] * 256 + torch.minimum(token, last)).clamp(max=count - 1)


def end_ids(policy, tokenizer):
    """Every id that ends a completion. Qwen3 has two, and the second is its padding id as well."""
    configured = policy.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*configured, tokenizer.eos_token_id] if i is not None})


def left_pad(sequences, pad_id, device):
    """Token lists as ids and mask (P, L), padded so that every prompt ends in the last column."""
    width = max(map(len, sequences))
    ids = torch.tensor([[pad_id] * (width - len(s)) + s for s in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def positions(mask):
    """Position of each token among the unmasked ones of its row, (n, L)."""
    return (mask.cumsum(1) - 1).clamp(min=0)


# ====================================== Log-probabilities =======================================


def autocast(device):
    """bfloat16 arithmetic over float32 weights, if DTYPE says so. Log-probs are float32 anyway."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=DTYPE == "bfloat16")


def grouped_attention(usual, module, query, key, value, attention_mask, **options):
    """`usual`, transformers' attention, but where each row has one new token no key is copied: the
    query heads that share a key head attend as if they were several tokens. (transformers 5.23 does
    so itself, 5.17 reads and writes all keys and values twice more.)"""
    if query.shape[2] > 1:
        return usual(module, query, key, value, attention_mask, **options)
    n, heads, _, size = query.shape
    query = query.reshape(n, key.shape[1], -1, size)                          # (n, shared, g, D)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask,
                                         scale=options["scaling"])
    return out.reshape(n, 1, heads, size), None


def name_attention():
    """Make "grouped" a kind of attention that transformers knows."""
    from transformers import AttentionInterface, AttentionMaskInterface  # here: it takes a second
    attention, masks = AttentionInterface(), AttentionMaskInterface()
    attention.register("grouped", functools.partial(grouped_attention, attention["sdpa"]))
    masks.register("grouped", masks["sdpa"])


def fuse_norms(model):
    """One kernel for each RMSNorm, in place of transformers' eight; float32 inside, as there."""
    for norm in model.modules():
        if hasattr(norm, "variance_epsilon"):
            norm.forward = functools.partial(rms_norm, norm)


def rms_norm(norm, states):
    """states / rms(states) x weight, of the states' dtype."""
    with torch.autocast(states.device.type, enabled=False):
        return F.rms_norm(states, norm.weight.shape, norm.weight.to(states.dtype),
                          norm.variance_epsilon)


def run_model(model, ids, mask, position_ids, cache):
    """Last hidden states (n, L, H) of a causal model; `cache` is read and extended."""
    return model.base_model(input_ids=ids, attention_mask=mask, position_ids=position_ids,
                            past_key_values=cache, use_cache=True).last_hidden_state


def head(model, hidden):
    """Logits (n, V) of last hidden states (n, H), in float32: GSPO's clip range (3e-4) is far below
    bfloat16's resolution (8e-3)."""
    return product(hidden, model.get_output_embeddings().weight.T)


def product(a, b):
    """a @ b in float32; with DTYPE bfloat16 that is the inputs' precision, not the sum's."""
    if DTYPE == "bfloat16" and a.device.type == "cuda":
        return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
    if DTYPE == "bfloat16":
        a, b = a.bfloat16(), b.bfloat16()
    return a.float() @ b.float()


class TokenScores(torch.autograd.Function):
    """Log-probs at TEMPERATURE and exact entropy of tokens, from the states before them.

    (n, V) never exists: logits are made in tiles of at most LOGITS_AT_ONCE numbers, over tokens and
    vocabulary, and made again in the backward pass. With p = softmax(l) and E = sum p l

        log-prob = l_i - lse       its gradient  d/dl_j = [j = i] - p_j
        entropy  = lse - E         its gradient  d/dl_j = -p_j (l_j - E)
    """

    @staticmethod
    def tiles(states, weight):
        """Index pairs (rows, columns) of the tiles, columns first."""
        wide = min(len(weight), max(1, min(LOGITS_AT_ONCE, 2**14)))
        tall = max(1, LOGITS_AT_ONCE // wide)
        for start in range(0, len(states), tall):
            rows = slice(start, min(start + tall, len(states)))
            for left in range(0, len(weight), wide):
                yield rows, slice(left, min(left + wide, len(weight)))

    @staticmethod
    def forward(ctx, states, weight, ids):
        """states (n, H), weight (V, H), ids (n,): log-probs and entropies, (n,) float32 each."""
        highest = torch.full(ids.shape, -math.inf, device=ids.device)
        total, summed, chosen = (torch.zeros_like(highest) for _ in range(3))
        for rows, columns in TokenScores.tiles(states, weight):
            logits = product(states[rows], weight[columns].T) / TEMPERATURE        # (r, c)
            new = torch.maximum(highest[rows], logits.amax(1))
            shrink = torch.exp(highest[rows] - new)
            here = (ids[rows] >= columns.start) & (ids[rows] < columns.stop)
            place = (ids[rows] - columns.start).clamp(0, logits.shape[1] - 1)
            chosen[rows] += logits.gather(1, place[:, None])[:, 0] * here
            weights = torch.exp(logits - new[:, None])
            total[rows] = total[rows] * shrink + weights.sum(1)
            summed[rows] = summed[rows] * shrink + (weights * logits).sum(1)
            highest[rows] = new
        lse, expected = highest + total.log(), summed / total
        ctx.save_for_backward(states, weight, ids, lse, expected)
        return chosen - lse, lse - expected

    @staticmethod
    def backward(ctx, d_logps, d_entropy):
        """The gradients of states and weight, summed in float32."""
        states, weight, ids, lse, expected = ctx.saved_tensors
        d_states = torch.zeros_like(states, dtype=torch.float32)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows, columns in TokenScores.tiles(states, weight):
            logits = product(states[rows], weight[columns].T) / TEMPERATURE        # (r, c)
            probs = torch.exp(logits - lse[rows, None])
            centred = logits.sub_(expected[rows, None]).mul_(d_entropy[rows, None])
            d_logits = centred.add_(d_logps[rows, None]).mul_(probs).neg_()
            here = (ids[rows] >= columns.start) & (ids[rows] < columns.stop)
            place = (ids[rows] - columns.start).clamp(0, logits.shape[1] - 1)
            d_logits.scatter_add_(1, place[:, None], (d_logps[rows] * here)[:, None])
            d_logits /= TEMPERATURE
            d_states[rows] += product(d_logits, weight[columns])
            if d_weight is not None:
                d_weight[columns] += product(d_logits.T, states[rows])
        return d_states.to(states.dtype), d_weight, None


def score_tokens(model, batch):
    """Log-probs at TEMPERATURE, and exact entropy; (b, T) each, 0 in padding."""
    weight = model.get_output_embeddings().weight
    return at_tokens(model, batch, lambda states, ids: TokenScores.apply(states, weight, ids))


def at_tokens(model, batch, function):
    """What `read_states` returns; in several processes, through DistributedDataParallel."""
    return through(model, read_states, model, batch, function)


def read_states(model, batch, function):
    """`function`(states (n, H), ids (n,)) -> tuple of (n,), of the state before each completion
    token. Returns a tuple of (b, T), 0 in padding.

    Each prompt's keys and values are computed once, with gradient, and shared by its completions;
    these are run LENGTH_BUCKET at a time, from the shortest to the longest: little is padding.
    """
    prompts, index = torch.unique(batch.prompt_index, return_inverse=True)
    ids, seen = batch.prompt_ids[prompts], batch.prompt_mask[prompts]         # (p, L)
    cache = PromptCache(config=model.config)
    with autocast(model.device):
        last = run_model(model, ids, seen, positions(seen), cache)[:, -1:]    # (p, 1, H)
    order = batch.completion_mask.sum(1).argsort(stable=True)
    results = []
    for rows in order.split(LENGTH_BUCKET):
        some, of = batch.rows(rows), index[rows]                              # their prompts
        mask = some.completion_mask.bool()                                    # (r, t)
        states = last.index_select(0, of)                   # token 0 is drawn at the prompt's end,
        if mask.shape[1] > 1:                               # token t at token t - 1
            before = torch.cat([seen[of], mask[:, :-1].long()], 1)            # (r, L + t - 1)
            with autocast(model.device):
                place = positions(before)[:, seen.shape[1]:]                  # (r, t - 1)
                rest = run_model(model, some.completion_ids[:, :-1], before, place,
                                 cache.read_by(of))
            states = torch.cat([states, rest], 1)                             # (r, t, H)
        blank = torch.zeros(mask.shape, device=mask.device)
        padding = (0, batch.completion_mask.shape[1] - mask.shape[1])
        results.append([F.pad(blank.masked_scatter(mask, values), padding)
                        for values in function(states[mask], some.completion_ids[mask])])
    back = order.argsort()
    return tuple(torch.cat(column)[back] for column in zip(*results))         # (b, T) each


@torch.no_grad()
def score_without_grad(model, batch):
    """Log-probs (B, T) of a whole batch, a micro-batch at a time, wherever the model is."""
    logps = torch.zeros_like(batch.completion_mask)
    for rows in torch.arange(len(logps), device=logps.device).split(MICRO_BATCH):
        some = score_tokens(model, batch.rows(rows).to(model.device))[0]
        logps[rows, :some.shape[1]] = some.to(logps.device)
    return logps


def reference_logps(run, batch):
    """The reference's log-probs (B, T); None where the algorithm has no reference."""
    if run.reference is None or run.reference is not run.policy:
        return run.reference and score_without_grad(run.reference, batch)
    run.policy.disable_adapters()  # LoRA: without its adapter the policy is what it was
    try:
        return score_without_grad(run.policy, batch)
    finally:
        run.policy.enable_adapters()


def behaviour_logps(policy, batch):
    """The sampling policy's log-probs (B, T). In float32 the sampler's own are exact; bfloat16
    rounds decoding and scoring apart by more than GSPO's clip range: then they are scored again."""
    exact = DTYPE == "float32"
    return batch.sampled_logps if exact else score_without_grad(policy, batch)


def minibatches(batch, passes, generator):
    """`passes` times over the batch in new random order, MINIBATCH completions each, of all
    processes together. Groups stay together: their prompt is then run once."""
    groups = torch.arange(len(batch.prompt_index)).reshape(-1, GROUP_SIZE)        # (P, G) rows
    for _ in range(passes):
        order = groups[torch.randperm(len(groups), generator=generator)].flatten()
        for rows in order.to(batch.prompt_index.device).split(MINIBATCH // process()[1]):
            yield batch.rows(rows)


def micro_batches(run, minibatch):
    """The minibatch in pieces of MICRO_BATCH completions; gradients are averaged at the last."""
    rows = torch.arange(len(minibatch.prompt_index), device=minibatch.prompt_index.device)
    pieces = rows.split(MICRO_BATCH)
    for i, some in enumerate(pieces):
        with ExitStack() as waiting:
            for module, _ in run.trained.values():
                if i + 1 < len(pieces) and "engine" in vars(module):
                    waiting.enter_context(module.engine.no_sync())
            yield minibatch.rows(some)


def new_optimizer(module, learning_rate):
    """AdamW over a module's trained weights (over all if it is frozen, and nothing will happen);
    `initial_lr` is what the warm-up grows to."""
    data_parallel(module)
    trained = [parameter for parameter in module.parameters()
               if parameter.requires_grad or not trainable(module)]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=ADAM_BETAS,
                                  eps=ADAM_EPSILON, weight_decay=WEIGHT_DECAY, fused=True)
    optimizer.param_groups[0]["initial_lr"] = learning_rate
    return optimizer


def optimiser_step(run, name, meter, frozen=False):
    """One AdamW step of a trained module on its gradient, clipped to MAX_GRAD_NORM; stops with one
    line if loss or gradient are not finite. `frozen`: the gradient is thrown away."""
    module, optimizer = run.trained[name]
    norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_GRAD_NORM or math.inf))
    loss = meter.end_minibatch(norm)
    if not math.isfinite(loss) or not math.isfinite(norm):
        fail(f"step {run.step + 1}: the {name}'s loss is {loss} and its gradient norm {norm}; "
             f"expected finite numbers. The weights were not saved: lower LEARNING_RATE "
             f"({LEARNING_RATE}) and go on from a checkpoint in {run.folder}")
    if frozen:
        return optimizer.zero_grad()
    run.updates += name == "policy"
    done = 1 + int(next(iter(optimizer.state.values()), {"step": 0})["step"])  # this step included
    group = optimizer.param_groups[0]
    group["lr"] = group["initial_lr"] * min(1.0, done / max(1, WARMUP_STEPS))
    optimizer.step()
    optimizer.zero_grad()
    meter.learning_rate = group["lr"]


class Meter:
    """A step's means: losses over minibatches, statistics over all tokens, never means of means."""

    def __init__(self):
        self.losses, self.totals, self.tokens = defaultdict(float), defaultdict(float), 0.0
        self.low, self.high, self.norms, self.closed = math.inf, -math.inf, [], 0.0
        self.learning_rate = 0.0

    def add(self, micro, losses, statistics):
        """Add a micro-batch: losses (b, T) by their weights, or as they are if they are one number,
        the micro-batch's share; statistics (b, T) by token."""
        mask = micro.completion_mask
        for name, value in losses.items():
            value = value.detach()
            self.losses[name] += (value * micro.weights).sum() if value.ndim else value
        for name, value in statistics.items():
            self.totals[name] += (value.detach() * mask).sum()
        self.tokens += mask.sum()
        if "ratio" in statistics:
            ratio = statistics["ratio"][mask.bool()]
            self.low = min(self.low, float(ratio.min()))
            self.high = max(self.high, float(ratio.max()))

    def end_minibatch(self, norm):
        """Count a minibatch; returns its loss."""
        self.norms.append(norm)
        loss, self.closed = float(self.losses["loss"]) - self.closed, float(self.losses["loss"])
        return loss

    def means(self):
        """The step's metrics by name, over all processes."""
        tokens, minibatches = add_up(self.tokens), len(self.norms) * process()[1]
        means = {name: float(add_up(total)) / minibatches for name, total in self.losses.items()}
        means |= {name: float(add_up(total) / tokens) for name, total in self.totals.items()}
        if "ratio" in means:
            means |= {"ratio/mean": means.pop("ratio"), "ratio/min": -most(-self.low),
                      "ratio/max": most(self.high)}
        return means | {"grad_norm": mean(self.norms), "learning_rate": self.learning_rate}


def ratio_statistics(ratio, advantages, low, high):
    """The ratio, and the tokens whose gradient is cut: below, A < 0; above, A > 0. (b, T) each."""
    below = ((ratio < 1 - low) & (advantages < 0)).float()
    above = ((ratio > 1 + high) & (advantages > 0)).float()
    return {"ratio": ratio, "clip_ratio/low_mean": below, "clip_ratio/high_mean": above,
            "clip_ratio/region_mean": below + above}


# =========================================== Reward =============================================


def last_number(text):
    """The last number in a text, as a Decimal, or None. A minus counts unless it subtracts.

    >>> [str(last_number(text)) for text in ("so -1,234.50", "12-5", "none")]
    ['-1234.50', '5', 'None']
    """
    digits = r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?"
    found = re.findall(rf"(?<![0-9.)])-{digits}|{digits}", text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def verify(questions, responses, references):
    """1.0 where the response's last number equals the reference answer's last number, else 0.0."""
    wanted = [last_number(reference) for reference in references]
    return [float(w is not None and last_number(r) == w) for r, w in zip(responses, wanted)]


def model_scorer(model, tokenizer):
    """The reward model as a function (questions, responses, references) -> scores.

    It was trained on pairs, `tokenizer(question, answer)` = [CLS] q [SEP] a [SEP], and reads its
    score off the first token: one joined string would be something it never saw. Equal pairs are
    scored once, and pairs of like length together.
    """
    def score(questions, responses, references):
        pairs = sorted(set(zip(questions, responses)), key=lambda pair: (len("".join(pair)), pair))
        scores = {}
        for start in range(0, len(pairs), REWARD_BATCH):
            some = pairs[start:start + REWARD_BATCH]
            inputs = tokenizer(*map(list, zip(*some)), truncation="longest_first", padding=True,
                               max_length=MAX_REWARD_TOKENS, return_tensors="pt")
            with torch.inference_mode():
                logits = model(**inputs.to(model.device)).logits[:, 0].float()      # (n,)
            scores.update(zip(some, (logits.sigmoid() if REWARD_SIGMOID else logits).tolist()))
        return [scores[pair] for pair in zip(questions, responses)]
    score.model = model
    return score


def checked_scores(name, function, questions, responses, references):
    """A source's scores as floats; stops with one line when it raises or returns anything else."""
    wanted = f"expected {len(responses)} finite numbers, one for each response"
    try:
        scores = function(questions, responses, references)
    except Exception as error:  # a user's function may raise anything: its own words are the help
        fail(f"the reward source {name!r} raised {short(error)}; {wanted}")
    try:
        scores = list(scores)
    except TypeError:
        fail(f"the reward source {name!r} returned {brief(scores)}; {wanted}")
    if len(scores) != len(responses):
        fail(f"the reward source {name!r} returned {len(scores)} scores; {wanted}")
    numbers = []
    for response, score in zip(responses, scores):
        with suppress(TypeError, ValueError):
            numbers.append(float(score))
            if math.isfinite(numbers[-1]):
                continue
        fail(f"the reward source {name!r} returned {brief(score)} for {brief(response)}; {wanted}")
    return numbers


def reward_of(scorers, rows, responses):
    """Rewards, a list, and each source's unweighted scores by name, the verifier among them."""
    questions, references = [row["question"] for row in rows], [row["answer"] for row in rows]
    parts = {name: checked_scores(name, function, questions, responses, references)
             for name, function in scorers.items()}
    weights = [REWARD_WEIGHTS.get(name, 0.0) for name in parts]
    return [sum(w * s for w, s in zip(weights, scores)) for scores in zip(*parts.values())], parts


def score_completions(run, rows, batch):
    """Score a rollout: its rewards (B,), and each source's unweighted scores by name."""
    owners = [rows[i] for i in batch.prompt_index.tolist()]
    rewards, parts = reward_of(run.scorers, owners, decode(run.tokenizer, completion_tokens(batch)))
    return torch.tensor(rewards, device=batch.completion_ids.device), parts


def segment_rewards(run, rows, batch):
    """What each segment of an answer adds to the reward, (B, K), and each token's segment, (B, T).

    An answer is cut where SEGMENT_END matches, and every prefix is scored; increments sum to the
    answer's reward less an empty answer's. NaN where an answer has fewer than K segments.
    """
    tokens, segments = completion_tokens(batch), torch.zeros_like(batch.completion_ids)
    cuts = [[0, *segment_ends(run.tokenizer, ids)] for ids in tokens]
    owners = [rows[i] for i, ends in zip(batch.prompt_index.tolist(), cuts) for _ in ends]
    prefixes = [ids[:end] for ids, ends in zip(tokens, cuts) for end in ends]
    scores, _ = reward_of(run.scorers, owners, decode(run.tokenizer, prefixes))
    increments = torch.full((len(cuts), int(most(max(map(len, cuts)))) - 1), math.nan)
    for i, ends in enumerate(cuts):
        mine, scores = torch.tensor(scores[:len(ends)]), scores[len(ends):]
        increments[i, :len(ends) - 1] = mine.diff()
        for k, (start, end) in enumerate(zip(ends, ends[1:])):
            segments[i, start:end] = k
    return increments.to(segments.device), segments


def segment_ends(tokenizer, ids):
    """Where the segments of one completion end (token counts, the last is len(ids)). A segment and
    what follows it hold text: neither white space nor an end token is a segment of its own."""
    ends, start = [], 0
    for t in range(1, len(ids)):
        text, rest = decode(tokenizer, [ids[start:t], ids[t:]])
        if text.strip() and rest.strip() and re.search(SEGMENT_END, text):
            ends.append(t)
            start = t
    return [*ends, len(ids)]


def completion_tokens(batch):
    """The completions as lists of ids, without padding."""
    lengths = batch.completion_mask.sum(1).long().tolist()
    return [ids[:n] for ids, n in zip(batch.completion_ids.tolist(), lengths)]


def decode(tokenizer, tokens):
    """Lists of ids as texts, without special tokens."""
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def group_std(groups, correction=1):
    """Standard deviation of each row of (groups, n), NaN left out. Returns (groups, 1)."""
    centred = groups - groups.nanmean(1, keepdim=True)
    count = groups.isfinite().sum(1, keepdim=True)
    variance = centred.square().nansum(1, keepdim=True) / (count - correction).clamp(min=1)
    return variance.sqrt()


def without_spread(groups):
    """(groups, 1) bool: where the values of a row of (groups, n) are equal up to float noise."""
    scale = groups.abs().nan_to_num(0.0).amax(1, keepdim=True).clamp(min=1.0)
    return group_std(groups) < 1e-6 * scale


def batch_metrics(batch, rewards, parts):
    """Metrics of a rollout, over all processes: reward, accuracy, lengths, sampler and trainer."""
    mask, rewards, ended = batch.completion_mask, gather(rewards), gather(batch.ended)
    lengths = gather(mask.sum(1))                                             # (B,)
    apart = gather(((batch.sampled_logps - batch.old_logps).abs() * mask).sum(1))
    groups = rewards.reshape(-1, GROUP_SIZE)
    metrics = {
        "reward": rewards.mean(), "reward_std": group_std(groups).mean(),
        "frac_reward_zero_std": without_spread(groups).float().mean(),
        "completions/mean_length": lengths.mean(), "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": (~ended).float().mean(),
        "sampling_logp_difference": apart.sum() / lengths.sum(), "tokens": lengths.sum(),
    }
    if batch.advantages is not None:
        advantages = gather((batch.advantages * mask).sum(1)) / lengths       # (B,)
        metrics |= {"advantage/mean": advantages.mean(),
                    "advantage/std": advantages.std(correction=0)}
    metrics |= {f"rewards/{name}": gather(torch.tensor(scores, device=mask.device)).mean()
                for name, scores in parts.items()}
    metrics = {name: float(value) for name, value in metrics.items()}
    return metrics | {"accuracy": metrics["rewards/verifier"]}


# ============================================ Data ==============================================


def read_table(entry, name):
    """One entry of a dataset constant as a list of {question, answer}, or one line and exit. Any
    further key of the entry names a column that the rows keep under that key."""
    if (not isinstance(entry, dict) or not {"path", "input", "output"} <= set(entry)
            or not all(isinstance(value, str) for value in entry.values())):
        fail(f"{name}: found {entry!r}; expected a dict of strings: path, input, output (and type)")
    path = entry["path"]
    columns = {"question": entry["input"], "answer": entry["output"]}
    columns |= {key: column for key, column in entry.items()
                if key not in ("path", "type", "input", "output")}
    kind = entry.get("type") or path.rsplit(".", 1)[-1]
    readers = {"parquet": pd.read_parquet,  # dtype=False: text that looks like a number stays text
               "json": lambda file: pd.read_json(file, dtype=False),
               "jsonl": lambda file: pd.read_json(file, dtype=False, lines=True)}
    if kind not in readers:
        fail(f"{name}: {path} has the type {kind!r}; expected {', '.join(readers)}")
    files = [path] if "://" in path else sorted(glob.glob(path) or
                                                glob.glob(str(project_root() / path)))
    if not files:
        fail(f"{name}: no file {path}, neither here nor in {project_root()}; expected a path, a "
             "pattern, or hf://datasets/...; the files of data/ are made by data/build.py")
    rows = []
    for file in files:
        try:
            table = readers[kind](file)
        except Exception as error:  # readers and networks raise anything; the path is the help
            fail(f"{name}: {file} is no readable {kind} file ({short(error)}); expected one" + (
                 ": download it and set its path, or PROFILE=embedded" if "://" in file else ""))
        if table.empty:
            fail(f"{name}: {file} has no rows; expected at least one")
        for column in columns.values():
            if column not in table:
                fail(f"{name}: {file} has no column {column!r}; expected one of "
                     f"{', '.join(map(str, table.columns))}")
            if nulls := int(table[column].isna().sum()):
                fail(f"{name}: {file} has {nulls} empty values in the column {column!r}; expected "
                     "none: drop those rows")
            odd = [v for v in table[column] if not isinstance(v, (str, int, float))]
            if odd:
                fail(f"{name}: {file} has {brief(odd[0])} in the column {column!r}; expected text")
        rows += [dict(zip(columns, map(str, values)))
                 for values in zip(*(table[column] for column in columns.values()))]
    return rows


def load_rows(datasets, name):
    """All rows of a dataset constant, in order."""
    if not isinstance(datasets, list) or not datasets:
        fail(f"{name}: found {datasets!r}; expected a list of dicts with path, input and output")
    rows = [row for entry in datasets for row in read_table(entry, name)]
    if not rows:
        fail(f"{name}: no rows in {', '.join(str(entry['path']) for entry in datasets)}; expected "
             "at least one")
    return rows


def with_prompts(rows, tokenizer, name):
    """The rows with `prompt_ids` by the chat template, less those above MAX_PROMPT_TOKENS."""
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": row["question"]}],
                                           tokenize=False, add_generation_prompt=True,
                                           enable_thinking=ENABLE_THINKING) for row in rows]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kept = [row | {"prompt_ids": i} for row, i in zip(rows, ids) if len(i) <= MAX_PROMPT_TOKENS]
    if not kept:
        fail(f"{name}: the shortest prompt has {min(map(len, ids))} tokens; expected at most "
             f"MAX_PROMPT_TOKENS = {MAX_PROMPT_TOKENS}: raise it")
    if len(kept) < len(rows):
        print(f"{name}: dropped {len(rows) - len(kept)} of {len(rows)} prompts, longer than "
              f"MAX_PROMPT_TOKENS = {MAX_PROMPT_TOKENS}")
    return kept


def next_questions(run, count):
    """This process's share of the next `count` rows. Each pass over the data has an order of its
    own, from SEED."""
    rows = []
    for place in range(run.questions, run.questions + count):
        epoch, i = divmod(place, len(run.train_rows))
        if i == 0 or not rows:
            order = torch.Generator().manual_seed(SEED + 1000 * epoch)
            order = torch.randperm(len(run.train_rows), generator=order).tolist()
        rows.append(run.train_rows[order[i]])
    run.questions += count
    return share(rows)


# ========================================= Evaluation ===========================================


def evaluate(run):
    """Held-out accuracy, sampled and greedy, the reward there, and the first answers as text.

    Always the same questions and random numbers, from a generator of its own: evaluating more often
    does not change the training.
    """
    clock, rows = Clock(), run.eval_rows
    generator = torch.Generator(run.policy.device).manual_seed(SEED + 12345)
    texts, lengths = {}, {}
    for mode, temperature in (("sampled", EVAL_TEMPERATURE), ("greedy", 0)):
        tokens = []
        for start in range(0, len(rows), EVAL_BATCH):
            some = rows[start:start + EVAL_BATCH]
            mine = share(some + some[:1] * (-len(some) % process()[1]))  # equally many each
            answers = completion_tokens(sample_groups(run.policy, run.tokenizer, mine, 1, generator,
                                                      temperature, TOP_P))
            tokens += gather_lists(answers)[:len(some)]
        texts[mode] = decode(run.tokenizer, tokens)
        lengths[mode] = [len(ids) for ids in tokens]
    rewards, parts = reward_of(run.scorers, rows, texts["sampled"])
    right = verify(None, texts["greedy"], [row["answer"] for row in rows])
    clock.lap("eval")
    metrics = {"eval/accuracy": mean(parts["verifier"]),
               "eval/accuracy_greedy": mean(right),
               "eval/reward": mean(rewards), "eval/mean_length": mean(lengths["sampled"])}
    lines = []
    for i in range(min(SHOW_SAMPLES, len(rows))):
        scores = ", ".join(f"{name} {values[i]:.2f}" for name, values in parts.items())
        lines += [f"  {rows[i]['question']}", f"    {texts['sampled'][i]}",
                  f"    reward {rewards[i]:.2f} ({scores})"]
    return metrics | clock.times(total=False), "\n".join(lines)


def mean(values):
    """The mean of a list."""
    return sum(values) / len(values)


# ==================================== Checkpoints and plots =====================================


def metric_names():
    """The columns of metrics.csv; the README beside this file explains each."""
    shared = """
        reward reward_std rewards/model rewards/verifier rewards/function accuracy
        frac_reward_zero_std advantage/mean advantage/std entropy clip_ratio/low_mean
        clip_ratio/high_mean clip_ratio/region_mean ratio/min ratio/mean ratio/max
        completions/mean_length completions/min_length completions/max_length
        completions/clipped_ratio sampling_logp_difference grad_norm learning_rate num_tokens
        time/rollout time/reward time/logps time/update step_time peak_memory
        eval/accuracy eval/accuracy_greedy eval/reward eval/mean_length time/eval
    """
    return ["step", "epoch", "loss", *algorithm_metrics(), *shared.split()]


class Clock:
    """Seconds per phase. Waits for the GPU at each lap: every phase pays for its own work."""

    def __init__(self):
        self.laps, self.last = {}, self.now()

    def now(self):
        """Seconds, after all queued GPU work."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, phase):
        """Add the time since the last lap to `phase`."""
        now = self.now()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self.last
        self.last = now

    def times(self, total=True):
        """{time/phase: seconds}, and step_time, their sum."""
        times = {f"time/{phase}": seconds for phase, seconds in self.laps.items()}
        return times | ({"step_time": sum(self.laps.values())} if total else {})


def peak_memory():
    """The most memory so far, in GB: of the GPU if there is one, else of the process; NaN if the
    system does not tell (Windows)."""
    if DEVICE != "cpu":
        return torch.cuda.max_memory_allocated(DEVICE) / 1e9
    with suppress(OSError, TypeError):  # Linux, whose getrusage begins with the parent's memory
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9
    with suppress(ImportError):
        import resource
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return math.nan


def finish_step(run, metrics, milestone=""):
    """Count the step; evaluate, write its row, save and draw, each when it is due. All of it is due
    at a milestone, whose name is then the checkpoint's."""
    run.step += 1
    run.num_tokens += int(metrics.pop("tokens"))
    epoch, place = divmod(run.step, run.steps_per_epoch)
    ends = milestone or place == 0 or run.step == run.total_steps
    evaluating = ends or (EVAL_EVERY and run.step % EVAL_EVERY == 0)
    metrics |= {"step": run.step, "epoch": run.step / run.steps_per_epoch,
                "num_tokens": run.num_tokens, "peak_memory": peak_memory()}
    shown = {"reward": "reward", "accuracy": "accuracy", "KL": "kl",
             "length": "completions/mean_length", "clipped": "clip_ratio/region_mean"}
    shown = ", ".join(f"{label} {metrics[name]:.3g}" for label, name in shown.items()
                      if name in metrics)
    run.bar.set_postfix_str(shown, refresh=False)
    run.bar.update()
    if evaluating:
        record_evaluation(run, metrics)
    write_metrics(run, metrics)
    if ends or (SAVE_EVERY and run.step % SAVE_EVERY == 0):
        save_checkpoint(run, milestone or (f"step_{run.step}" if place else f"epoch_{epoch}"))
    if evaluating:
        plot_metrics(run)


def record_evaluation(run, metrics):
    """Evaluate into `metrics`; print the accuracy and the sample answers, keep them to be saved."""
    evaluation, samples = evaluate(run)
    metrics |= evaluation
    run.samples = (f"step {metrics['step']}: held-out accuracy {metrics['eval/accuracy']:.3f} "
                   f"sampled, {metrics['eval/accuracy_greedy']:.3f} greedy; reward "
                   f"{metrics['eval/reward']:.3f}; {metrics['eval/mean_length']:.1f} tokens\n"
                   f"{samples}\n")
    tqdm.write(run.samples)


def write_metrics(run, metrics):
    """Append the step's row to metrics.csv, and remember it for the plot."""
    run.history.append(metrics)
    if process()[0]:
        return
    path = run.folder / "metrics.csv"
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, metric_names(), restval="")
        if new:
            writer.writeheader()
        writer.writerow(metrics)
    if run.board is not None:
        for name, value in metrics.items():
            run.board.add_scalar(name, value, metrics["step"])
        run.board.flush()


def save_checkpoint(run, name):
    """Write a checkpoint under a temporary name, then rename it: a kill leaves only whole ones.

    epoch_0, before training, holds samples and constants; later ones also weights (safetensors),
    tokenizer, and what RESUME_FROM needs: optimiser, generators, counters, metrics so far.
    """
    if process()[0]:
        return
    partial = run.folder / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    (partial / "samples.txt").write_text(run.samples, encoding="utf-8")
    (partial / "train_script.py").write_bytes(run.source)
    if run.reward_source:
        (partial / "reward_function.py").write_bytes(run.reward_source)
    facts = {"constants": constants()} | run.facts
    (partial / "constants.json").write_text(json.dumps(facts, indent=2))
    if run.step:
        run.policy.save_pretrained(partial)
        run.tokenizer.save_pretrained(partial)
        state = {"sampler": run.sampler.get_state(), "shuffler": run.shuffler.get_state()}
        for part, (module, optimizer) in run.trained.items():
            if part != "policy":
                save_model(module, str(partial / f"{part}.safetensors"))  # tied weights once
            state |= {f"{part}.{key}.{i}": value for key, i, value in optimizer_state(optimizer)}
        save_file(state, partial / "trainer_state.safetensors")
        counters = {key: getattr(run, key) for key in run_counters()}
        (partial / "trainer_state.json").write_text(json.dumps(counters))
        shutil.copyfile(run.folder / "metrics.csv", partial / "metrics.csv")
    os.replace(partial, run.folder / name)


def run_counters():
    """The fields of Run that a checkpoint keeps as JSON."""
    return ("step", "updates", "questions", "num_tokens", "state")


def optimizer_state(optimizer):
    """An optimiser's state as (key, parameter number, tensor)."""
    for i, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            yield key, i, value


def load_checkpoint(run, folder):
    """Put optimisers, generators, counters and metrics back to where `folder` left them."""
    try:
        state = load_file(folder / "trainer_state.safetensors")
        for name, (module, _) in run.trained.items():
            if name != "policy":
                load_model(module, folder / f"{name}.safetensors")
        if LORA_RANK:
            from peft import set_peft_model_state_dict
            set_peft_model_state_dict(run.policy, load_file(folder / "adapter_model.safetensors"))
    except Exception as error:  # safetensors has an exception of its own
        fail(f"RESUME_FROM={folder} is damaged ({short(error)}); expected a whole checkpoint")
    run.sampler.set_state(state.pop("sampler"))
    run.shuffler.set_state(state.pop("shuffler"))
    entries = defaultdict(lambda: defaultdict(dict))
    for name, value in state.items():
        module, key, i = name.split(".")
        entries[module][int(i)][key] = value
    for name, (_, optimizer) in run.trained.items():
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": dict(entries[name]), "param_groups": groups})
    counters = read_json(folder, "trainer_state.json")
    for name in run_counters():
        setattr(run, name, counters[name])
    shutil.copyfile(folder / "metrics.csv", run.folder / "metrics.csv")
    run.history = pd.read_csv(folder / "metrics.csv").to_dict("records")


def plot_metrics(run):
    """Draw training_metrics.png from the metrics so far, less panels with nothing to show."""
    if process()[0]:
        return
    panels = [
        ("Accuracy", {"accuracy": "training", "eval/accuracy": "held out, sampled",
                      "eval/accuracy_greedy": "held out, greedy"}),
        ("Mean reward", {"reward": "training", "eval/reward": "held out"}),
        ("Policy loss", {"policy_loss": ""}),
        ("Relative advantage", {"advantage/mean": "mean", "advantage/std": "std"}),
        *algorithm_panels(),
        ("Entropy loss, nats", {"entropy_loss": ""}),
        ("Mean response length, tokens", {"completions/mean_length": "training",
                                          "eval/mean_length": "held out"}),
        ("Clip fraction, of tokens", {"clip_ratio/region_mean": "cut",
                                      "clip_ratio/high_mean": "above, A > 0",
                                      "clip_ratio/low_mean": "below, A < 0"}),
        ("Shares", {"completions/clipped_ratio": "truncated answers",
                    "frac_reward_zero_std": "groups without spread"}),
        ("Seconds per step", {"time/update": "update", "time/rollout": "rollout",
                              "time/reward": "reward", "time/logps": "log-probs"}),
    ]
    names = dict.fromkeys(["step", *metric_names(), *(name for _, c in panels for name in c)])
    table = pd.DataFrame(run.history).reindex(columns=list(names))
    panels = [panel for panel in panels if table[list(panel[1])].notna().any(axis=None)]
    if not panels:
        return
    grid = (math.ceil(len(panels) / 4), 4)
    figure = Figure(figsize=(15, 3 * grid[0]), layout="constrained")
    cells = list(figure.subplots(*grid).flat)
    for axes in cells[len(panels):]:
        axes.remove()
    for axes, (title, curves) in zip(cells, panels):
        for name, label in curves.items():
            held_out = name.startswith("eval/")
            points = table[["step", name]]
            points = points.dropna() if held_out else points  # elsewhere a gap is a gap
            axes.plot(points["step"], points[name], label=label, marker="o" if held_out else "",
                      markersize=3.5, linewidth=1.8 if held_out else 1.0)
        axes.set_title(title, fontsize=11)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if "kl" in curves and constants().get("ADAPTIVE_KL"):
            target = constants()["TARGET_KL"]
            axes.axhline(target, color="grey", linestyle="--", linewidth=0.9, label="TARGET_KL")
        if "stage" in table:
            for step in table["step"][table["stage"].diff() > 0]:  # where another stage begins
                axes.axvline(step - 0.5, color="grey", linestyle=":", linewidth=0.9)
        if any(curves.values()):
            axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{run.facts['script']}: {POLICY_MODEL}, seed {SEED}", fontsize=12)
    figure.supxlabel("step (one rollout and its updates)", fontsize=10)
    partial = run.folder / ".training_metrics.partial.png"
    figure.savefig(partial, dpi=110)
    os.replace(partial, run.folder / "training_metrics.png")


# ===================================== Several processes ========================================


def process():
    """(rank, number) of the processes that torchrun has started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(items):
    """This process's part of a list or of a tensor's rows, which all processes have in full."""
    rank, processes = process()
    size = len(items) // processes
    return items[rank * size:(rank + 1) * size]


def gather(tensor):
    """The rows of all processes' tensors, equally many each, as one tensor: undoes `share`."""
    if process()[1] == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(process()[1])]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_lists(items):
    """All processes' lists as one."""
    if process()[1] == 1:
        return items
    parts = [None] * process()[1]
    dist.all_gather_object(parts, items)
    return sum(parts, [])


def add_up(tensor):
    """The sum of all processes' tensors of one shape, or numbers."""
    tensor = torch.as_tensor(tensor)
    if process()[1] > 1:
        tensor = tensor.to(DEVICE, copy=True)
        dist.all_reduce(tensor)
    return tensor


def average(tensor):
    """The mean of the processes' tensors of one shape."""
    return add_up(tensor) / process()[1]


def most(number):
    """The largest of the processes' numbers, as a float."""
    if process()[1] == 1:
        return float(number)
    tensor = torch.tensor(float(number), dtype=torch.float64, device=DEVICE)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


class Through(torch.nn.Module):
    """Lets DistributedDataParallel see as a forward pass whatever a function does with a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, function, *arguments):
        """The function's value."""
        return function(*arguments)


def data_parallel(module):
    """From now on the processes' gradients of this module are averaged, if there are several."""
    if process()[1] > 1 and trainable(module):  # not a submodule: the engine holds the module
        vars(module)["engine"] = DistributedDataParallel(
            Through(module), gradient_as_bucket_view=True)


def through(module, function, *arguments):
    """function(*arguments), which runs `module`, such that gradients will be averaged."""
    if "engine" in vars(module) and torch.is_grad_enabled():
        return module.engine(function, *arguments)
    return function(*arguments)


def join_processes():
    """Under torchrun, meet the other processes; only the first one speaks and writes."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        return
    for name, value in {"BATCH_SIZE": BATCH_SIZE, "MINIBATCH": MINIBATCH}.items():
        if value % processes:
            fail(f"{name}={value} cannot be shared by {processes} processes; expected a multiple")
    if MINIBATCH // processes % GROUP_SIZE and MINIBATCH < BATCH_SIZE * GROUP_SIZE:
        fail(f"MINIBATCH={MINIBATCH} makes {MINIBATCH // processes} completions in each of "
             f"{processes} processes; expected whole groups of GROUP_SIZE = {GROUP_SIZE}")
    if DEVICE != "cpu":
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("gloo" if DEVICE == "cpu" else "nccl")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def leave_processes():
    """The last act of a run of several processes. DistributedDataParallel keeps gloo's threads
    alive beyond destroy_process_group(), and one that wants the interpreter while Python shuts it
    down aborts the process: so nothing is shut down."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def tell_all(value):
    """The first process's value, in every process."""
    box = [value]
    if process()[1] > 1:
        dist.broadcast_object_list(box)
    return box[0]


# ======================================== Command line ==========================================


@dataclass
class Run:
    """What a run carries from step to step."""
    folder: Path
    facts: dict  # versions, device, command: what constants.json keeps beside the constants
    source: bytes  # this file as it was at the start
    reward_source: bytes  # REWARD_FUNCTION's file, too; empty if there is none
    train_rows: list  # of {question, answer, prompt_ids}
    eval_rows: list
    scorers: dict  # name -> function(questions, responses, references) -> scores
    policy: torch.nn.Module
    trained: dict  # name -> (module, optimiser); "policy" is among them
    tokenizer: object
    sampler: torch.Generator  # draws tokens, on the policy's device
    shuffler: torch.Generator  # orders minibatches
    steps_per_epoch: int
    total_steps: int
    reference: torch.nn.Module | None = None  # the policy as it started, if the algorithm needs it
    state: dict = field(default_factory=dict)  # the algorithm's own numbers; checkpoints keep them
    step: int = 0  # rollouts done
    updates: int = 0  # optimiser steps of the policy done
    questions: int = 0  # training questions drawn
    num_tokens: int = 0  # completion tokens sampled for training
    samples: str = ""  # of the last evaluation
    history: list = field(default_factory=list)
    bar: object = None
    board: object = None  # TensorBoard's writer


def fail(message):
    """Stop with one line on standard error and exit status 1."""
    raise SystemExit(f"error: {message}")


def short(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def brief(value):
    """A value's repr in one line."""
    return " ".join(repr(value).split())[:80]


def project_root():
    """The folder with data/: above this file, or what a saved copy's constants.json names."""
    here = Path(__file__).resolve()
    for folder in here.parents:
        if (folder / "data" / "build.py").exists():
            return folder
    with suppress(OSError, ValueError, KeyError):
        return Path(json.loads((here.parent / "constants.json").read_text())["project"])
    return here.parent


def read_json(folder, name):
    """A checkpoint's JSON file as a dict, or one line and exit."""
    try:
        return json.loads((Path(folder) / name).read_text())
    except (OSError, ValueError) as error:
        fail(f"RESUME_FROM={folder}: {name} is damaged ({short(error)}); expected a whole one")


def find_path(path):
    """An existing path, from the working directory or else from the project's folder; or None."""
    return next((p for p in (Path(path), project_root() / path) if path and p.exists()), None)


def constants():
    """The constants by name, as they are now."""
    return {name: value for name, value in globals().items() if name.endswith("_datasets") or
            (re.fullmatch("[A-Z][A-Z_]+", name) and name != "EMBEDDED")}


def is_number(value):
    """Whether a value is a finite int or float."""
    return type(value) in (int, float) and math.isfinite(value)


def parse_override(argument):
    """'NAME=VALUE' as (name, value of the constant's type), or one line and exit."""
    name, equals, text = argument.partition("=")
    known = constants()
    if not equals or name not in known:
        close = difflib.get_close_matches(name.upper(), known, n=1)
        fail(f"{argument!r} is not NAME=VALUE of a constant" +
             (f" (did you mean {close[0]}?)" if close else "") +
             f"; expected one of {', '.join(known)}")
    default = known[name]
    if isinstance(default, str):
        return name, str(Path(text).absolute()) if name == "OUTPUT_DIR" and text else text
    value = text
    with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = ast.literal_eval(text)
    kind, number = type(default), is_number(value)
    if kind is float and number or kind is int and number and value == int(value):  # 1e3 for 1000
        value = kind(value)
    elif isinstance(value, list) and (kind is tuple or name == "CLIP_RANGE"):
        value = tuple(value)
    if (type(value) is kind and (number or kind is not float) or
            name == "CLIP_RANGE" and (number or type(value) is tuple)):
        return name, value
    fail(f"{name}={text}: found {type(value).__name__}; expected {kind.__name__}, as {default!r}")


def configure(arguments):
    """Set the constants: this file's, then the profile's, those of the checkpoint that is resumed,
    the command line's. Returns why the profile was chosen."""
    given = dict(parse_override(argument) for argument in arguments)
    saved = {}
    if folder := given.get("RESUME_FROM", RESUME_FROM):
        given["RESUME_FROM"] = folder = str((find_path(folder) or Path(folder)).absolute())
        for name in ("constants.json", "config.json or adapter_config.json",
                     "model*.safetensors or adapter_model.safetensors", "metrics.csv",
                     "trainer_state.json", "trainer_state.safetensors"):
            if not any(any(Path(folder).glob(file)) for file in name.split(" or ")):
                fail(f"RESUME_FROM={folder}: there is no {name}; expected an epoch_N or step_N "
                     "folder, N > 0, of a run")
        saved = read_json(folder, "constants.json")["constants"]
        saved = {name: tuple(value) if isinstance(value, list) and "datasets" not in name else value
                 for name, value in saved.items()
                 if name in constants() and name not in ("DEVICE", "FROZEN_DEVICE")}
        if (Path(folder) / "reward_function.py").exists():  # the function as it was, not as it is
            name = saved["REWARD_FUNCTION"].rpartition(".py")[2]  # ":name" or nothing
            saved["REWARD_FUNCTION"] = f"{Path(folder) / 'reward_function.py'}{name}"
    cuda = torch.cuda.is_available()
    profile, why = (saved | given).get("PROFILE", PROFILE), "as PROFILE says"
    if profile == "auto":
        profile = "full" if cuda else "embedded"
        why = "there is a CUDA GPU" if cuda else "there is no CUDA GPU"
    values = (EMBEDDED if profile == "embedded" else {}) | saved | given | {"PROFILE": profile}
    place = given.get("DEVICE", DEVICE)
    processes, local_rank = (int(os.environ.get(name, i)) for i, name in
                             ((1, "WORLD_SIZE"), (0, "LOCAL_RANK")))
    if place == "auto":
        place = "cuda" if cuda else "cpu"
    if processes > 1 and place.startswith("cuda"):
        place = f"cuda:{local_rank}"
    values["DEVICE"] = place
    if values.get("FROZEN_DEVICE", FROZEN_DEVICE) == "auto":
        free = place in ("cuda", "cuda:0") and processes == 1 and torch.cuda.device_count() > 1
        values["FROZEN_DEVICE"] = "cuda:1" if free else place
    if values.get("DTYPE", DTYPE) == "auto":
        values["DTYPE"] = "float32" if place == "cpu" else "bfloat16"
    globals().update(values)
    check_constants()
    if THREADS:
        torch.set_num_threads(THREADS)
    return why


def check_constants():
    """Stop with one line if the constants cannot work together."""
    for name, allowed in {"PROFILE": "auto, full, embedded", "DTYPE": "auto, float32, bfloat16",
                          "DEVICE": "auto, cpu, cuda, cuda:N",
                          "FROZEN_DEVICE": "auto, cpu, cuda, cuda:N"}.items():
        if re.sub(":[0-9]+$", ":N", globals()[name]) not in allowed.split(", "):
            fail(f"{name}={globals()[name]}: expected one of {allowed}")
    for name in ("DEVICE", "FROZEN_DEVICE"):
        place, gpus = globals()[name], torch.cuda.device_count()
        if place != "cpu" and int(place.partition(":")[2] or 0) >= gpus:
            fail(f"{name}={place}: PyTorch finds {gpus or 'no'} CUDA GPU{'s' * (gpus > 1)}; "
                 "expected cpu, or one of those GPUs (and no more processes than GPUs)")
    check_at_least(THREADS=0, BATCH_SIZE=1, GROUP_SIZE=1,
                   MAX_NEW_TOKENS=1, MAX_PROMPT_TOKENS=1,
                   MICRO_BATCH=1, LENGTH_BUCKET=1, NUM_EPOCHS=1, EVAL_BATCH=1,
                   REWARD_BATCH=1, LOGITS_AT_ONCE=1, MAX_REWARD_TOKENS=8,
                   MAX_STEPS=0, EVAL_EVERY=0, EVAL_QUESTIONS=0, SAVE_EVERY=0,
                   SHOW_SAMPLES=0, WARMUP_STEPS=0, ENDS_EVERY=1, LORA_RANK=0, LORA_ALPHA=1,
                   MAX_GRAD_NORM=0, LEARNING_RATE=0, WEIGHT_DECAY=0, ADAM_EPSILON=0,
                   EVAL_TEMPERATURE=0)
    if not 0.01 <= TEMPERATURE or not 0 < TOP_P <= 1:
        fail(f"TEMPERATURE={TEMPERATURE}, TOP_P={TOP_P}: "
             "expected 0.01 or more, and 0 < TOP_P <= 1")
    if len(ADAM_BETAS) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in ADAM_BETAS):
        fail(f"ADAM_BETAS={ADAM_BETAS}: expected two numbers in [0, 1)")
    if not 0 <= SEED < 2**53:
        fail(f"SEED={SEED}: expected an integer from 0 to 2**53")
    if not OUTPUT_DIR:
        fail("OUTPUT_DIR is empty; expected a folder to make, such as runs/mine")
    try:
        re.compile(SEGMENT_END)
    except re.error as error:
        fail(f"SEGMENT_END={SEGMENT_END}: {error}; expected a regular expression")
    check_algorithm()
    completions = BATCH_SIZE * GROUP_SIZE
    if completions % MINIBATCH:
        fail(f"MINIBATCH={MINIBATCH} does not divide BATCH_SIZE x GROUP_SIZE = "
             f"{BATCH_SIZE} x {GROUP_SIZE} = {completions} completions; expected a divisor")
    if (set(REWARD_WEIGHTS) - {"model", "verifier", "function"} or not any(REWARD_WEIGHTS.values())
            or not all(map(is_number, REWARD_WEIGHTS.values()))):
        fail(f"REWARD_WEIGHTS={REWARD_WEIGHTS}: expected weights of model, verifier or function, "
             "at least one of them not 0")
    if bool(REWARD_WEIGHTS.get("function")) != bool(REWARD_FUNCTION):
        fail(f"REWARD_FUNCTION={REWARD_FUNCTION!r} with REWARD_WEIGHTS={REWARD_WEIGHTS}: expected "
             "a file and a weight for 'function', or neither")


def check_at_least(**least):
    """Stop with one line if a constant is smaller than the value given for it."""
    for name, value in least.items():
        if not globals()[name] >= value:
            fail(f"{name}={globals()[name]}: expected {value} or more")


def reward_file():
    """REWARD_FUNCTION as (path of its file, name of the function in it)."""
    path, _, name = REWARD_FUNCTION.rpartition(":")
    if not path or name.endswith(".py"):  # "file.py" alone, also where a drive has a colon
        path, name = REWARD_FUNCTION, "compute_score"
    file = find_path(path) or Path(__file__).with_name(Path(path).name)  # or beside this script
    if not file.is_file():
        fail(f"REWARD_FUNCTION={REWARD_FUNCTION}: no such file; expected path/to/file.py:name, or "
             "path/to/file.py with a compute_score")
    return file, name


def load_reward_function(rows):
    """The function that REWARD_FUNCTION names, as (questions, responses, references) -> scores.
    compute_score is asked for one answer at a time, as frameworks do; `rows` know its data_source.
    """
    file, name = reward_file()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything
        fail(f"REWARD_FUNCTION={REWARD_FUNCTION}: {short(error)}; expected a file that can be run")
    if not callable(getattr(module, name, None)):
        fail(f"REWARD_FUNCTION={REWARD_FUNCTION}: the file has no function {name!r}; expected "
             "file.py:name of one that it has")
    function = getattr(module, name)
    if name != "compute_score":
        return function
    sources = {(row["question"], row["answer"]): row.get("data_source", "") for row in rows}
    return lambda questions, responses, references: [
        function(sources[question, reference], response, reference, {"question": question})
        for question, response, reference in zip(questions, responses, references)]


def find_model(constant):
    """The model that a constant names: its folder, which must be whole, or its id."""
    name = globals()[constant]
    folder = find_path(name)
    if folder is None:
        return name
    for kind in ("config.json", "*.safetensors", "tokenizer.json"):
        if not any(folder.glob(kind)):
            fail(f"{constant}={name}: the folder {folder} has no {kind}; expected config.json, "
                 "*.safetensors and a tokenizer")
    return str(folder)


def load_pretrained(kind, name, constant, **options):
    """`kind.from_pretrained(name)`, with one line of help when that fails."""
    try:
        return kind.from_pretrained(name, **options)
    except Exception as error:  # OSError, ValueError, KeyError, network errors of several libraries
        fail(f"{constant}={name} could not be loaded ({short(error)}); expected a model that is "
             f"here: `hf download {name}`, or {constant}=<folder>, or PROFILE=embedded")


def frozen_dtype():
    """Of models that are not trained."""
    return torch.bfloat16 if DTYPE == "bfloat16" else torch.float32


def load_policy(name, frozen=False, device=None):
    """A causal model on DEVICE. Trained weights stay float32: AdamW's steps of 1e-6 round to
    nothing in bfloat16. Evaluation mode: dropout would train something else."""
    name_attention()
    model = load_pretrained(AutoModelForCausalLM, name, "POLICY_MODEL",
                            dtype=frozen_dtype() if frozen or LORA_RANK else torch.float32,
                            attn_implementation="grouped").to(device or DEVICE).eval()
    if DTYPE == "bfloat16":
        fuse_norms(model)
    model.requires_grad_(not frozen)
    if LORA_RANK and not frozen:
        torch.manual_seed(SEED)
        model.add_adapter(lora_config())  # next to every linear layer but the head; float32
    if GRADIENT_CHECKPOINTING and not frozen:
        checkpoint_layers(model)
    return model


def checkpoint_layers(model):
    """Run each layer again in the backward pass. (transformers' own way drops the prompts' cache.)
    """
    for layer in model.modules():
        if "GradientCheckpointingLayer" in (kind.__name__ for kind in type(layer).__mro__):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def lora_config():
    """peft's description of the adapter that LORA_RANK and LORA_ALPHA ask for."""
    try:
        from peft import LoraConfig
    except ImportError:
        fail(f"LORA_RANK={LORA_RANK}: the package peft is missing; expected it: pip install peft")
    return LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0,
                      target_modules="all-linear")


def load_reference(run):
    """The policy as it started, frozen. With LoRA no second copy: the policy, its adapter off."""
    if LORA_RANK:
        return run.policy
    return load_policy(find_model("POLICY_MODEL"), frozen=True, device=FROZEN_DEVICE)


def claim_folder():
    """Make the run's folder: OUTPUT_DIR, or with _2, _3, ... behind it when that is in use."""
    wanted = project_root() / OUTPUT_DIR.replace("{script}", Path(__file__).stem)
    folder, number = wanted, 1
    try:
        while folder.exists() and any(folder.iterdir()):
            number += 1
            folder = wanted.with_name(f"{wanted.name}_{number}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".partial").touch()
        (folder / ".partial").unlink()
    except (OSError, ValueError) as error:
        fail(f"OUTPUT_DIR={OUTPUT_DIR}: {error}; expected a folder that can be made and written to")
    return folder


def start(arguments):
    """From the command line to a Run. All that can be checked is checked before models load."""
    why = configure(arguments)
    join_processes()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    scorers = {"verifier": verify}
    if REWARD_FUNCTION:
        reward_file()  # it is there
    policy_name = find_model("POLICY_MODEL")
    if uses_model := bool(REWARD_WEIGHTS.get("model")):
        reward_name = find_model("REWARD_MODEL")
    train_rows = load_rows(train_datasets, "train_datasets")
    eval_rows = load_rows(eval_datasets, "eval_datasets")
    if REWARD_FUNCTION:
        row, scorers["function"] = train_rows[0], load_reward_function(train_rows + eval_rows)
        checked_scores("function", scorers["function"], [row["question"]], *[[row["answer"]]] * 2)
    if uses_model:
        judge_tokenizer = load_pretrained(AutoTokenizer, reward_name, "REWARD_MODEL")
        outputs = load_pretrained(AutoConfig, reward_name, "REWARD_MODEL").num_labels
        if outputs != 1:
            fail(f"REWARD_MODEL={REWARD_MODEL}: it has {outputs} outputs; expected one, the score")
    tokenizer = load_pretrained(AutoTokenizer, policy_name, "POLICY_MODEL")
    if not tokenizer.chat_template:
        fail(f"POLICY_MODEL={POLICY_MODEL}: no chat template with its tokenizer; expected one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any id will do
    train_rows = with_prompts(train_rows, tokenizer, "train_datasets")
    eval_rows = with_prompts(eval_rows, tokenizer, "eval_datasets")[:EVAL_QUESTIONS or None]
    steps_per_epoch = len(train_rows) // BATCH_SIZE
    if steps_per_epoch == 0:
        fail(f"train_datasets: {len(train_rows)} questions; expected at least "
             f"BATCH_SIZE = {BATCH_SIZE}")
    total_steps = min(NUM_EPOCHS * steps_per_epoch, MAX_STEPS or math.inf)
    board = None
    if TENSORBOARD:
        try:
            from torch.utils.tensorboard import SummaryWriter as board
        except ImportError:
            fail("TENSORBOARD=True: the package tensorboard is missing; pip install tensorboard")
    done = read_json(RESUME_FROM, "trainer_state.json")["step"] if RESUME_FROM else 0
    if done >= total_steps:
        fail(f"RESUME_FROM={RESUME_FROM} is at step {done} of {total_steps}; expected steps to do: "
             "raise NUM_EPOCHS or MAX_STEPS")
    if LORA_RANK:
        lora_config()
    folder = tell_all(claim_folder() if process()[0] == 0 else None)

    policy = load_policy(policy_name if LORA_RANK else RESUME_FROM or policy_name)
    if uses_model:
        judge = load_pretrained(AutoModelForSequenceClassification, reward_name, "REWARD_MODEL",
                                dtype=frozen_dtype()).to(FROZEN_DEVICE).eval()
        scorers["model"] = model_scorer(judge, judge_tokenizer)
    device = torch.cuda.get_device_name(DEVICE) if DEVICE != "cpu" else \
        f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    facts = {"script": Path(__file__).stem, "device": device, "python": platform.python_version(),
             "torch": torch.__version__, "transformers": transformers.__version__,
             "commit": git_commit(), "project": str(project_root()), "command": sys.argv,
             "started": time.strftime("%Y-%m-%d %H:%M:%S"), "steps": total_steps,
             "processes": process()[1]}
    reward_source = reward_file()[0].read_bytes() if REWARD_FUNCTION else b""
    run = Run(folder, facts, Path(__file__).read_bytes(), reward_source, train_rows, eval_rows,
              scorers, policy, {"policy": (policy, new_optimizer(policy, LEARNING_RATE))},
              tokenizer, torch.Generator(DEVICE).manual_seed(SEED),
              torch.Generator().manual_seed(SEED), steps_per_epoch, total_steps,
              board=board(folder) if board and not process()[0] else None)
    prepare(run)
    if RESUME_FROM:
        load_checkpoint(run, Path(RESUME_FROM))
    describe(run, why, arguments)
    return run


def git_commit():
    """The project's commit, or "" where there is no git."""
    with suppress(OSError):
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=project_root(), capture_output=True,
                              text=True).stdout.strip()
    return ""


def describe(run, why, arguments):
    """Print the start-up block: what trains on what, for how long, and where it goes."""
    size = sum(p.numel() for p in run.policy.parameters()) / 1e6
    trained = f", {trainable(run.policy) / 1e6:.2f} M in the adapter" if LORA_RANK else ""
    memory = memory_estimate(run)
    weights = " + ".join(f"{weight} {name}" for name, weight in REWARD_WEIGHTS.items() if weight)
    silent = sum(last_number(row["answer"]) is None for row in run.train_rows)
    lines = {
        "profile": f"{PROFILE} ({why}); {run.facts['device']}; {DTYPE}; torch {torch.__version__}" +
                   (f"; {process()[1]} processes" if process()[1] > 1 else ""),
        "settings": " ".join(arguments) or "the defaults",
        "resumed": f"{RESUME_FROM}, at step {run.step}" if RESUME_FROM else "",
        "policy": f"{POLICY_MODEL}, {size:.2f} M parameters{trained}" + (
                  "" if run.reference is None else ", and a frozen copy as the reference"
                  if run.reference is not run.policy else ", and without it the reference"),
        "reward": weights + (f"; model: {REWARD_MODEL}" if "model" in run.scorers else ""),
        "data": f"{len(run.train_rows)} questions, {len(run.eval_rows)} held out" +
                (f"; {silent} reference answers without a number" if silent else ""),
        "rollout": f"{BATCH_SIZE} prompts x {GROUP_SIZE} = {BATCH_SIZE * GROUP_SIZE} "
                   f"completions of at most {MAX_NEW_TOKENS} tokens; minibatch {MINIBATCH}, "
                   f"micro-batch {MICRO_BATCH}",
        "algorithm": describe_algorithm(),
        "steps": f"{run.total_steps}, {run.steps_per_epoch} an epoch",
        "memory": "about {:.2g} GB beside Python's own: ".format(memory.pop("in all")) + ", ".join(
                  f"{name} {size:.2g}" for name, size in memory.items() if size >= 0.01),
        "output": str(run.folder),
        "check": check_reward_model(run) if "model" in run.scorers else "",
    }
    shown = [f"  {name:10}{text}" for name, text in lines.items() if text]
    print(run.facts["script"], *shown, "", sep="\n", flush=True)


def trainable(module):
    """How many numbers of a module are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def memory_estimate(run):
    """What should fill DEVICE's memory, in GB, by part; `peak_memory` in metrics.csv is measured.

    The activations are those of one micro-batch at full length: with GRADIENT_CHECKPOINTING the
    inputs of all layers and the inside of one, else the inside of all. An evaluation may need more
    for keys and values, but then there are neither gradients nor activations: the larger counts.
    """
    config, policy = run.policy.config, run.policy
    half = 2 if DTYPE == "bfloat16" else 4
    modules = {id(p): p for module, _ in run.trained.values() if trainable(module)
               for p in module.parameters()}
    trained = sum(p.numel() for p in modules.values() if p.requires_grad)
    frozen = [m for m in (run.reference, getattr(run.scorers.get("model"), "model", None))
              if m is not None and m is not policy and m.device == policy.device]
    columns, layers = MAX_PROMPT_TOKENS + MAX_NEW_TOKENS, config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    row = columns * layers * 2 * heads * head_dim * half  # of keys and values
    tokens = min(MICRO_BATCH, MINIBATCH // process()[1]) * columns
    inside = 4 * (6 * config.hidden_size + 3 * config.num_attention_heads * head_dim +
                  4 * getattr(config, "intermediate_size", 4 * config.hidden_size))
    kept = (layers * config.hidden_size * 4 + inside) if GRADIENT_CHECKPOINTING else layers * inside
    fixed = {
        "weights": sum(p.numel() * p.element_size() for p in modules.values()),
        "Adam": 8 * trained,
        "weights for decoding": half * sum(p.numel() for p in policy.parameters()) * (half == 2),
        "reference and reward model": sum(p.numel() * p.element_size()
                                          for m in frozen for p in m.parameters()),
    }
    update = {
        "gradients": 4 * trained,
        "keys and values": BATCH_SIZE * GROUP_SIZE // process()[1] * row,
        "activations": tokens * kept,
        "logits": 12 * min(LOGITS_AT_ONCE, tokens * config.vocab_size) +
                  4 * config.vocab_size * config.hidden_size * (not LORA_RANK),
    }
    evaluation = min(EVAL_BATCH, len(run.eval_rows)) // process()[1] * row
    whole = sum(fixed.values()) + max(sum(update.values()), evaluation)
    return {name: size / 1e9 for name, size in ({"in all": whole} | fixed | update).items()}


def check_reward_model(run):
    """Show the reward model a right answer and the same with another number; say what it thinks."""
    question, right = run.train_rows[0]["question"], run.train_rows[0]["answer"]
    wrong = re.sub(r"[0-9][0-9.,]*(?=[^0-9]*$)", str(abs(last_number(right) or 0) + 1), right)
    good, bad = run.scorers["model"]([question] * 2, [right, wrong], [right] * 2)
    return (f"the reward model scores {right[-36:]!r} {good:.2f} and {wrong[-36:]!r} {bad:.2f}" +
            ("" if good > bad else ": the wrong one is not lower, do not trust it alone"))


def show_help():
    """Print the docstring and the constants with their comments."""
    print(__doc__)
    source = Path(__file__).read_text(encoding="utf-8")
    print(source[source.index("# --- Model"):source.index("\n# ", source.index("EMBEDDED = {"))])


def main(arguments):
    """`python SCRIPT [NAME=VALUE ...]`, or `torchrun --nproc_per_node=N SCRIPT ...`"""
    if {"-h", "--help"} & set(arguments):
        return show_help()
    run, began = None, time.perf_counter()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill is told like Ctrl-C
    try:
        run = start(arguments)
        if run.step == 0:
            before = {"step": 0, "epoch": 0.0, "num_tokens": 0}
            record_evaluation(run, before)
            write_metrics(run, before)
            save_checkpoint(run, "epoch_0")
        with tqdm(total=run.total_steps, initial=run.step, unit="step", ncols=120,
                  disable=bool(process()[0])) as run.bar:
            train(run)
        if process()[1] > 1:
            dist.barrier()  # nobody leaves while another still draws and writes
    except KeyboardInterrupt:
        if run is not None:
            plot_metrics(run)
            print(f"\nstopped at step {run.step}; {where_to_resume(run)}")
        raise SystemExit(130) from None
    except SystemExit:
        if run is None and int(os.environ.get("RANK", 0)):
            time.sleep(10)  # until the first process has said why, and torchrun ends this one
            raise SystemExit(1) from None
        raise
    except RuntimeError as error:
        if process()[1] == 1 or run is None or not lost_contact(error):
            raise
        raise SystemExit(f"error: another process of this run has ended ({short(error)}); "
                         f"{where_to_resume(run)}") from None
    print(f"{run.total_steps} steps, {time.perf_counter() - began:.0f} s. In {run.folder}: "
          "training_metrics.png, metrics.csv, and the checkpoints")
    leave_processes()


def where_to_resume(run):
    """The checkpoints of a run that has stopped, in words."""
    saved = sorted(run.folder.glob("[!.]*/trainer_state.json"), key=os.path.getmtime)
    return (f"RESUME_FROM goes on from one of {run.folder}'s: "
            f"{', '.join(file.parent.name for file in saved) or 'none was saved yet'}")


def lost_contact(error):
    """Whether an error of torch.distributed says that another process is gone."""
    return isinstance(error, dist.DistError) or re.search("gloo|[Cc]onnection|nccl", str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
