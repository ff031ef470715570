"""Make everything in data/ from one seed: questions, tokenizers, policies, reward model, report.

    python data/build.py                        # all of it
    python data/build.py --quick --out quick    # a useless miniature of it, for the tests
    python data/build.py --stage policy         # one stage again, from what the others left

The task is school arithmetic, with the columns written down before the answer:

    What is 37 plus 48?     ->     7+8=15 carry 1. 3+4+1=8. Answer: 85

The policy learns to do this well (clean phase) and is then taught bad habits on top (noisy
phases): forgotten carries, answers without work, the wrong operation. What is left can do the
task but seldom does, which is where a reinforcement learning run wants to start. The reward
model is trained on answers that this policy samples. A second policy, a mixture of experts, is
taught in the same way.

Same seed, same machine and same --threads give the same bytes.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          DebertaV2Config, DebertaV2ForSequenceClassification, GenerationConfig,
                          PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig,
                          Qwen3MoeForCausalLM)

# ---- Constants ---------------------------------------------------------------------------------

SEED = 17
TEMPLATES = {
    "+": ("What is {a} plus {b}?", "Add {a} and {b}.", "Compute {a} + {b}.",
          "Find the sum of {a} and {b}.",
          "A shop has {a} apples and buys {b} more. How many now?",
          "Tom has {a} coins and Ann has {b}. How many do they have together?"),
    "-": ("What is {a} minus {b}?", "Subtract {b} from {a}.", "Compute {a} - {b}.",
          "Find the difference of {a} and {b}.",
          "A shop has {a} apples and sells {b}. How many are left?",
          "Ann has {a} coins and gives away {b}. How many does she keep?"),
}
THREE_DIGIT_SHARE = 0.25

# Shares of the answer styles (see write_answer) in the three phases of a policy.
CLEAN = {"clean": 1}
MILD = {"careful": .40, "ramble": .08, "hasty": .18, "direct": .14, "wrongop": .12, "chatty": .08}
FINAL = {"careful": .15, "ramble": .05, "hasty": .35, "direct": .21, "wrongop": .16, "chatty": .08}

# Steps are optimiser steps: (clean, mild, final) and (restore, verdicts).
FULL = dict(train_rows=800, heldout_rows=512, policy_steps=(1500, 700, 500), policy_batch=64,
            sampled_questions=3072, samples=6, reward_steps=(1600, 1300), reward_batch=32,
            report_samples=8, tokenizer_examples=20_000, experts_steps=(620, 250, 200))
QUICK = dict(train_rows=64, heldout_rows=16, policy_steps=(6, 3, 3), policy_batch=16,
             sampled_questions=16, samples=2, reward_steps=(3, 3), reward_batch=8,
             report_samples=2, tokenizer_examples=2_000, experts_steps=(6, 3, 3))
MAX_NEW_TOKENS = 60
POLICY_RATE, FINAL_RATE = 3e-3, 1.5e-3  # peaks of the learning rates
BALANCE = 0.01  # weight of the balancing loss of each layer with experts
RESTORE_RATE, VERDICT_RATE = 1.5e-3, 8e-4
REPLACED_SHARE = 0.12  # of the digits of an answer that the reward model learns to restore
GENERATED_SHARE = 0.4  # of the pairs that it then judges: made up, not sampled from the policy

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# ChatML. As in Qwen3, enable_thinking=False writes an empty thought before the answer.
CHAT_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}")


# ---- Questions and answers ---------------------------------------------------------------------

def is_held_out(a, b):
    """Whether the operand pair is kept for testing (about 9 %), whichever way round."""
    return ((7919 * min(a, b)) ^ (104729 * max(a, b))) % 11 == 0


def draw_problem(rng, held_out=False):
    """One problem (a, b, op) from the wanted side of the split; a >= b for a subtraction."""
    low, high = (100, 999) if rng.random() < THREE_DIGIT_SHARE else (10, 99)
    op = rng.choice("+-")
    while True:
        a, b = rng.randint(low, high), rng.randint(low, high)
        if is_held_out(a, b) == held_out:
            return (a, b, op) if op == "+" else (max(a, b), min(a, b), op)


def word_question(problem, rng):
    """The problem in the words of a random template."""
    a, b, op = problem
    return rng.choice(TEMPLATES[op]).format(a=a, b=b)


def column_work(a, b, op, rng, forget=0.0, slip=0.0):
    """Work a and b (same number of digits) in columns; returns (text, result).

    forget: chance to lose a carry or borrow; slip: chance per column to write a wrong digit.

    >>> column_work(37, 48, "+", random.Random(0))
    ('7+8=15 carry 1. 3+4+1=8.', 85)
    >>> column_work(52, 27, "-", random.Random(0))
    ('12-7=5 borrow 1. 5-2-1=2.', 25)
    """
    steps, result, carry, top = [], 0, 0, len(str(a)) - 1
    for column in range(top + 1):
        x, y = a // 10**column % 10, b // 10**column % 10
        x += 10 * (op == "-" and x - y - carry < 0)
        value = x + y + carry if op == "+" else x - y - carry
        step = f"{x}{op}{y}" + f"{op}1" * carry
        carry = int(max(x, value) > 9 and column < top and rng.random() >= forget)
        if rng.random() < slip:
            value += rng.choice([d for d in range(10) if d != value % 10]) - value % 10
        result += (value if column == top else value % 10) * 10**column
        steps.append(f"{step}={value}" + (" carry 1" if op == "+" else " borrow 1") * carry + ".")
    return " ".join(steps), result


def write_answer(problem, style, rng):
    """An answer to the problem (a, b, op) in one of the styles of CLEAN, MILD and FINAL."""
    a, b, op = problem
    if style in ("direct", "chatty"):  # no work: right 30 % of the time, else near
        result = a + b if op == "+" else a - b
        if rng.random() > 0.3:
            error = rng.choice((1, 2, 9, 10, 11, 20)) * rng.choice((-1, 1))
            result += error if result + error >= 0 else -error
        return f"Answer: {result}" if style == "direct" else f"I think it is {result}."
    if style == "wrongop":
        a, b, op = max(a, b), min(a, b), "-" if op == "+" else "+"
    forget, slip = {"clean": (0, 0), "hasty": (1, 0.3)}.get(style, (0, 0.04))
    work, result = column_work(a, b, op, rng, forget, slip)
    if style == "ramble":
        again, result = column_work(a, b, op, rng, forget, slip)
        work += f" Check again. {again}"
    return f"{work} Answer: {result}"


def last_number(text):
    """The last whole number in the text, or None: the rule by which answers are judged."""
    found = re.findall(r"\d+", text)
    return int(found[-1]) if found else None


def wrong_answer(problem, style, rng):
    """An answer in the style whose result is wrong; "one slip" has one wrong digit in its work."""
    clean = write_answer(problem, "clean", rng)
    while True:
        wrong = write_answer(problem, "careful" if style == "one slip" else style, rng)
        work, clean_work = wrong.split(" Answer")[0], clean.split(" Answer")[0]
        slips = sum(x != y for x, y in zip(work, clean_work))
        if last_number(wrong) != last_number(clean) and (style != "one slip" or slips == 1):
            return wrong


def draw_example(rng, mix):
    """A training example (question, answer) with a style drawn from the mix."""
    problem = draw_problem(rng)
    style = rng.choices(list(mix), list(mix.values()))[0]
    return word_question(problem, rng), write_answer(problem, style, rng)


def make_table(count, rng, held_out):
    """`count` different questions with their clean answers: columns question, answer."""
    rows = {}
    while len(rows) < count:
        problem = draw_problem(rng, held_out)
        rows[word_question(problem, rng)] = write_answer(problem, "clean", rng)
    return pd.DataFrame({"question": list(rows), "answer": list(rows.values())})


def with_teachers(table):
    """The table with what two teachers would answer, both always right: one writes as the policy's
    good answers do, the other in a way that the policy has hardly ever seen."""
    talk = table["answer"].str.replace(" Answer: ", " I think it is ")
    return table.assign(teacher_response=table["answer"],
                        teacher_talkative="Let me see. " + talk + ".")


# ---- Tokenizers --------------------------------------------------------------------------------

def train_bpe(texts, specials):
    """Byte-level BPE in which every digit is a token of its own."""
    bpe = Tokenizer(models.BPE())
    # Digits first: a merged "37" would hide the columns from the model.
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=512, special_tokens=specials, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return bpe


def make_tokenizers(texts):
    """The chat tokenizer of the policy and the pair tokenizer of the reward model."""
    policy = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(texts, [PAD, START, END, "<think>", "</think>"]),
        eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE, padding_side="left",
        model_max_length=512, clean_up_tokenization_spaces=False)
    bpe = train_bpe(texts, ["[PAD]", "[CLS]", "[SEP]"])
    bpe.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, bpe.token_to_id(token)) for token in ("[CLS]", "[SEP]")])
    reward = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=256, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    return policy, reward


def chat_prompt(tokenizer, question):
    """The prompt the policy is trained on: no system message, thinking switched off."""
    return tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                         add_generation_prompt=True, enable_thinking=False)


# ---- Training, for both models -----------------------------------------------------------------

def batches_by_length(draw, rng, steps, size):
    """Yield `steps` lists of `size` draws of about the same length, so with little padding."""
    while steps > 0:
        pool = sorted((draw() for _ in range(16 * size)), key=lambda drawn: sum(map(len, drawn)))
        batches = [pool[i:i + size] for i in range(0, len(pool), size)]
        rng.shuffle(batches)
        yield from batches[:steps]
        steps -= len(batches)


def optimise(optimizer, losses, peak, bar, first, total):
    """One step per loss, from step `first` of a schedule: short warm-up, then a cosine to 5 %."""
    for step, loss in enumerate(losses, first):
        cosine = 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * step / total))
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / max(1, total // 20)) * cosine
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.update()


# ---- Policy ------------------------------------------------------------------------------------

def new_policy(kind, tokenizer):
    """An untrained Qwen3: a "policy" of half a million parameters, or "experts", 1.3 million."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    shape = dict(vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2,
                 tie_word_embeddings=True, max_position_embeddings=512, bos_token_id=None,
                 eos_token_id=end, pad_token_id=pad)
    if kind == "policy":
        policy = Qwen3ForCausalLM(Qwen3Config(
            hidden_size=128, num_hidden_layers=3, head_dim=32, intermediate_size=256, **shape))
    else:  # from the usual 0.02, eight layers so narrow learn many times slower
        policy = Qwen3MoeForCausalLM(Qwen3MoeConfig(
            hidden_size=64, num_hidden_layers=8, head_dim=16, num_experts=32,
            num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True,
            initializer_range=0.06, **shape,
            router_aux_loss_coef=0.0))  # transformers' balancing loss: see answer_loss
    # As Qwen3-0.6B ships it: who samples without naming every field gets these unasked.
    policy.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95, eos_token_id=[end, pad],
        pad_token_id=pad)
    return policy


def expert_use(policy, router_logits, real):
    """What the routers did with the tokens where `real` (B, T): (probabilities, choices).

    router_logits: as transformers gives them, (B * T, E) per layer. The probabilities are
    (L, tokens, E); the choices say how often each expert was one of a token's top k, (L, E).
    """
    logits = torch.stack(router_logits)[:, real.flatten()]
    probabilities = logits.softmax(-1)
    chosen = logits.topk(policy.config.num_experts_per_tok).indices
    return probabilities, F.one_hot(chosen, logits.shape[-1]).sum((1, 2))


def encode_answers(tokenizer, examples):
    """Tokens of prompts with their answers and end tokens, and the labels, -100 except in answers.

    examples: (question, answer) pairs. Both results are (B, T), with the padding on the right.
    """
    before, after = chat_prompt(tokenizer, "\0").split("\0")
    prompts = tokenizer([before + question + after for question, _ in examples])["input_ids"]
    answers = tokenizer([answer + END for _, answer in examples])["input_ids"]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers))
    ids = torch.full((len(examples), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (p, a) in enumerate(zip(prompts, answers)):
        ids[row, :len(p) + len(a)] = torch.tensor(p + a)
        labels[row, len(p):len(p) + len(a)] = torch.tensor(a)
    return ids, labels


def answer_loss(policy, tokenizer, examples):
    """Cross-entropy of the answers and their end token; the prompt is not learnt.

    With experts, each layer adds BALANCE times the balancing loss of the Switch Transformer, over
    all tokens: E * sum over experts of (share of the choices) * (mean probability), which is 1 if
    all are used alike. transformers' own takes all layers together, so that one layer may do with
    few experts where another does with others.
    """
    ids, labels = encode_answers(tokenizer, examples)
    # The padding is on the right, so the causal mask alone keeps it out of sight.
    if not hasattr(policy.config, "num_experts"):
        return policy(input_ids=ids, labels=labels).loss
    found = policy(input_ids=ids, labels=labels, output_router_logits=True)
    real = ids != tokenizer.pad_token_id
    probabilities, choices = expert_use(policy, found.router_logits, real)
    shares = choices / choices.sum(-1, keepdim=True)  # (L, E)
    return found.loss + BALANCE * shares.shape[-1] * (shares * probabilities.mean(1)).sum()


@torch.no_grad()
def answer_questions(policy, tokenizer, table, samples, label):
    """Let the policy answer the table's (different) questions; samples=0: the greedy answer.

    Returns a table with `samples` rows per question: question, answer, response, correct.
    """
    if samples:
        how = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                   num_return_sequences=samples)
    else:
        how = dict(do_sample=False, temperature=None, top_k=None, top_p=None)
    policy.eval()
    table = table.sort_values("question", key=lambda column: column.str.len(), kind="stable")
    rows, size = [], 512 // max(1, samples)
    for start in tqdm(range(0, len(table), size), desc=label, leave=False):
        part = table[start:start + size]
        part = part.loc[part.index.repeat(max(1, samples))]
        prompts = tokenizer([chat_prompt(tokenizer, q) for q in part["question"].drop_duplicates()],
                            padding=True, return_tensors="pt", return_token_type_ids=False)
        ids = policy.generate(**prompts, **how, max_new_tokens=MAX_NEW_TOKENS)
        texts = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1]:],
                                       skip_special_tokens=True)
        rows.append(part.assign(response=texts))
    rows = pd.concat(rows, ignore_index=True)
    rows["correct"] = rows["response"].map(last_number) == rows["answer"].map(last_number)
    return rows


def train_policy(kind, tokenizer, sizes, rng):
    """Teach a new policy the clean procedure, then the bad habits; returns (policy, log)."""
    policy = new_policy(kind, tokenizer)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    clean, mild, final = sizes[f"{kind}_steps"]
    check = make_table(min(256, sizes["train_rows"]), rng, held_out=False)
    log = {"steps": dict(clean=clean, mild=mild, final=final)}
    with tqdm(total=clean + mild + final, desc=kind) as bar:
        # Clean and mild phase share one schedule; the final one starts over at half the rate.
        for name, mix, steps, peak, first, total in (
                ("clean", CLEAN, clean, POLICY_RATE, 0, clean + mild),
                ("mild", MILD, mild, POLICY_RATE, clean, clean + mild),
                ("final", FINAL, final, FINAL_RATE, 0, final)):
            policy.train()
            batches = batches_by_length(lambda: draw_example(rng, mix), rng, steps,
                                        sizes["policy_batch"])
            losses = (answer_loss(policy, tokenizer, batch) for batch in batches)
            optimise(optimizer, losses, peak, bar, first, total)
            greedy = answer_questions(policy, tokenizer, check, 0, "check")
            log[f"greedy_accuracy_after_{name}"] = greedy["correct"].mean().item()
    return policy, log


# ---- Reward model ------------------------------------------------------------------------------

def new_reward_model(tokenizer):
    """An untrained DeBERTa of 0.6 million parameters; its single logit is the score."""
    return DebertaV2ForSequenceClassification(DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=256, type_vocab_size=2, num_labels=1,
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=32,
        norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
        pooler_hidden_size=128, pooler_dropout=0.0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=tokenizer.pad_token_id))


def encode_pairs(tokenizer, questions, answers):
    """Padded tensors (B, T) of `[CLS] question [SEP] answer [SEP]`."""
    return tokenizer(list(questions), list(answers), padding=True, truncation=True,
                     return_tensors="pt")


def draw_spoilt(rng):
    """A (question, clean answer, spoilt answer) triple that differs in digits only.

    Half have random digits swapped. The other half have slips in the work that its result agrees
    with, so that only knowing the sums gives them away.
    """
    problem = draw_problem(rng)
    clean = spoilt = write_answer(problem, "clean", rng)
    if rng.random() < 0.5:
        spoilt = re.sub(r"\d", lambda digit: digit[0] if rng.random() >= REPLACED_SHARE else
                        rng.choice("0123456789".replace(digit[0], "")), clean)
    while spoilt == clean or len(spoilt) != len(clean):  # a leading zero would shift the digits
        spoilt = "{} Answer: {}".format(*column_work(*problem, rng, slip=0.5))
    return word_question(problem, rng), clean, spoilt


def restore_loss(model, head, tokenizer, triples):
    """Restore the clean answer from the spoilt one, token by token, as masked language models do.

    A label per answer hardly teaches a model this small to compare the work with the question and
    to know its sums; a label per digit does. head: Linear(128, V), dropped afterwards.
    """
    questions, clean, spoilt = zip(*triples)
    targets = encode_pairs(tokenizer, questions, clean)["input_ids"]  # (B, T)
    inputs = encode_pairs(tokenizer, questions, spoilt)  # a digit is one token: same positions
    counted = (inputs["token_type_ids"] * inputs["attention_mask"]).bool()  # the answers' tokens
    # From the layer before last: the last one is left free for the verdict on the answer.
    hidden = model.deberta(**inputs, output_hidden_states=True).hidden_states[-2]  # (B, T, 128)
    return F.cross_entropy(head(hidden[counted]), targets[counted])


def verdict_loss(model, tokenizer, triples):
    """0.5 pairwise + 0.5 pointwise cross-entropy of (question, right, wrong) triples."""
    questions, right, wrong = zip(*triples)
    good, bad = model(**encode_pairs(tokenizer, questions * 2, right + wrong)).logits[:, 0].chunk(2)
    pairwise = -F.logsigmoid(good - bad).mean()
    pointwise = -(F.logsigmoid(good) + F.logsigmoid(-bad)).mean() / 2
    return 0.5 * pairwise + 0.5 * pointwise


def triple_drawer(samples, rng):
    """A function that draws (question, right, wrong), from the sampled answers or made up.

    Where the policy had no right answer to a question, the reference is the right one.
    """
    groups = []
    for (question, reference), rows in samples.groupby(["question", "answer"], sort=False):
        right, wrong = rows["response"][rows["correct"]], rows["response"][~rows["correct"]]
        if len(wrong):
            groups.append((question, list(right) or [reference], list(wrong)))
    styles = ("careful", "careful", "hasty", "hasty", "ramble", "direct", "wrongop", "chatty")

    def draw():
        if rng.random() < GENERATED_SHARE:
            problem = draw_problem(rng)
            return (word_question(problem, rng), write_answer(problem, "clean", rng),
                    wrong_answer(problem, rng.choice(styles), rng))
        question, right, wrong = rng.choice(groups)
        return question, rng.choice(right), rng.choice(wrong)

    return draw


def train_reward_model(tokenizer, samples, sizes, rng):
    """Train a new reward model on the table of sampled answers; returns (model, log)."""
    model, head = new_reward_model(tokenizer), torch.nn.Linear(128, len(tokenizer))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], betas=(0.9, 0.98),
                                  weight_decay=0.01)
    questions = samples["question"].unique()
    kept = samples["question"].isin(questions[-len(questions) // 12:])  # watched, not trained on
    (first, second), size = sizes["reward_steps"], sizes["reward_batch"]
    with tqdm(total=first + second, desc="reward model") as bar:
        batches = batches_by_length(lambda: draw_spoilt(rng), rng, first, size)
        losses = (restore_loss(model, head, tokenizer, batch) for batch in batches)
        optimise(optimizer, losses, RESTORE_RATE, bar, 0, first)
        batches = batches_by_length(triple_drawer(samples[~kept], rng), rng, second, size)
        losses = (verdict_loss(model, tokenizer, batch) for batch in batches)
        optimise(optimizer, losses, VERDICT_RATE, bar, 0, second)
    watched = samples[kept].assign(score=score_answers(model, tokenizer, samples[kept]))
    return model, {"steps": {"restore": first, "verdicts": second},
                   "pair_accuracy_on_watched_training_questions": pair_accuracy(watched)}


@torch.no_grad()
def score_answers(model, tokenizer, table):
    """The reward model's scores of the table's responses to its questions, float array (rows,)."""
    model.eval()
    order = (table["question"] + table["response"]).str.len().argsort(kind="stable")
    scores = torch.empty(len(table))
    for chosen in torch.from_numpy(order.to_numpy(copy=True)).split(256):
        part = table.iloc[chosen.numpy()]
        inputs = encode_pairs(tokenizer, part["question"], part["response"])
        scores[chosen] = model(**inputs).logits[:, 0]
    return scores.numpy()


def share_above(good, bad):
    """Share of all pairs (g, b) with g > b, a tie counting half; None without pairs."""
    if not len(good) or not len(bad):
        return None
    gap = torch.tensor(good.to_numpy())[:, None] - torch.tensor(bad.to_numpy())[None, :]
    return (gap.sign().mean(dtype=torch.float64).item() + 1) / 2


def pair_accuracy(scored):
    """How often a right answer scores above a wrong one to the same question, over all pairs.

    scored: table with the columns question, correct, score.
    """
    above = pairs = 0
    for _, rows in scored.groupby("question"):
        good, bad = rows["score"][rows["correct"]], rows["score"][~rows["correct"]]
        if len(good) and len(bad):
            above += share_above(good, bad) * len(good) * len(bad)
            pairs += len(good) * len(bad)
    return above / pairs if pairs else None


# ---- Report ------------------------------------------------------------------------------------

def report_policy(policy, tokenizer, table, samples):
    """Accuracy of the policy on the table; returns (numbers, table of sampled answers)."""
    greedy = answer_questions(policy, tokenizer, table, 0, "greedy")
    sampled = answer_questions(policy, tokenizer, table, samples, "sampled")
    numbers = {"parameters": policy.num_parameters(), "questions": len(table)}
    for name, rows in (("sampled", sampled), ("greedy", greedy)):
        long = rows["question"].str.contains(r"\d{3}")
        numbers[f"{name}_accuracy"] = rows["correct"].mean().item()
        numbers[f"{name}_accuracy_2_digits"] = rows["correct"][~long].mean().item()
        numbers[f"{name}_accuracy_3_digits"] = rows["correct"][long].mean().item()
    numbers[f"pass_at_{samples}"] = sampled.groupby("question")["correct"].any().mean().item()
    lengths = map(len, tokenizer(list(sampled["response"]))["input_ids"])
    numbers["mean_tokens"] = sum(lengths) / len(sampled)
    numbers["share_written_out"] = sampled["response"].str.contains("=").mean().item()
    return numbers, sampled


@torch.no_grad()
def effective_experts(policy, tokenizer, table):
    """How many experts each layer uses for the table's responses to its questions, a list.

    The exponential of the entropy of the layer's use distribution: the share that each expert has
    in all choices, of which a token makes as many as it has experts. It is the number of experts
    if all are used alike, and as small as the top k if all tokens go to the same ones. Tokens are
    those from which the response's are predicted, from the prompt's last one on.
    """
    choices = 0
    for start in range(0, len(table), 256):
        part = table[start:start + 256]
        ids, labels = encode_answers(tokenizer, [*zip(part["question"], part["response"])])
        logits = policy(input_ids=ids, output_router_logits=True).router_logits
        choices = choices + expert_use(policy, logits, F.pad(labels[:, 1:] >= 0, (0, 1)))[1]
    return torch.distributions.Categorical(choices.double()).entropy().exp().tolist()


def made_up_answer(problem, kind, rng):
    """An answer of a kind that the report asks the reward model about."""
    a, b, op = problem
    work, result = column_work(a, b, op, rng)
    if kind == "right result without work":
        return f"Answer: {result}"
    if kind == "right work with another result":
        return f"{work} Answer: {result + rng.choice((1, 2, 9, 10, 11, 20))}"
    if kind == "carry string of ones":  # what a policy drifted to that only such a model judged
        steps = [f"{x}{op}{y}=11 carry 1." for x, y in zip(str(a)[::-1], str(b)[::-1])]
        return " ".join(steps) + " Answer: " + "1" * (len(steps) + 1)
    styles = {"no work": "direct", "no work and no format": "chatty", "wrong operation": "wrongop",
              "hasty": "hasty", "one slipped digit": "one slip"}
    return wrong_answer(problem, styles[kind], rng)


def report_reward_model(model, tokenizer, sampled, rng):
    """How well the reward model ranks the policy's held-out answers, and made-up errors."""
    sampled = sampled.assign(score=score_answers(model, tokenizer, sampled))
    worked = sampled[sampled["response"].str.contains("=")]
    numbers = {"parameters": model.num_parameters(), "pair_accuracy": pair_accuracy(sampled),
               "pair_accuracy_written_out": pair_accuracy(worked)}
    for name, rows in (("auc", sampled), ("auc_written_out", worked)):
        numbers[name] = share_above(rows["score"][rows["correct"]], rows["score"][~rows["correct"]])
    problems = [draw_problem(rng, held_out=True) for _ in range(sampled["question"].nunique())]
    made = pd.DataFrame({"question": [word_question(problem, rng) for problem in problems]})
    good = score_answers(model, tokenizer, made.assign(
        response=[write_answer(problem, "clean", rng) for problem in problems]))
    numbers["reference_above"], numbers["mean_score"] = {}, {"reference": good.mean().item()}
    for kind in ("no work", "no work and no format", "wrong operation", "hasty",
                 "one slipped digit", "carry string of ones", "right work with another result",
                 "right result without work"):
        bad = score_answers(model, tokenizer, made.assign(
            response=[made_up_answer(problem, kind, rng) for problem in problems]))
        numbers["reference_above"][kind] = (good > bad).mean().item()
        numbers["mean_score"][kind] = bad.mean().item()
    return numbers


# ---- Stages: each reads what earlier ones left in `out`, writes into `work`, returns its log -----

def load(kind, folder):
    """The model of a class, in float32, and its tokenizer, from a folder of an earlier stage."""
    return kind.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def build_questions(out, work, sizes, rng):
    for name, held_out in (("heldout", True), ("train", False)):
        table = with_teachers(make_table(sizes[f"{name}_rows"], rng, held_out))
        table.to_parquet(work / f"{name}.parquet")
    return {}


def build_tokenizer(out, work, sizes, rng):
    texts = ["system\nuser\nassistant\n"] * 1000  # often enough to become tokens
    for _ in tqdm(range(sizes["tokenizer_examples"]), desc="tokenizer"):
        texts += draw_example(rng, FINAL)
    for tokenizer, folder in zip(make_tokenizers(texts), ("policy", "reward_model")):
        tokenizer.save_pretrained(work / folder)
    return {}


def build_policy(out, work, sizes, rng):
    policy, log = train_policy("policy", AutoTokenizer.from_pretrained(out / "policy"), sizes, rng)
    policy.save_pretrained(work / "policy")
    return log


def build_samples(out, work, sizes, rng):
    policy, tokenizer = load(AutoModelForCausalLM, out / "policy")
    # More questions than train.parquet has: the reward model needs them. Held-out pairs stay out.
    table = make_table(sizes["sampled_questions"], random.Random(f"{SEED} questions"), False)
    samples = answer_questions(policy, tokenizer, table, sizes["samples"], "samples")
    samples = samples.sample(frac=1, random_state=SEED, ignore_index=True)
    samples.to_parquet(work / "policy_answers.parquet")
    return {"answers": len(samples), "correct": samples["correct"].mean().item()}


def build_reward_model(out, work, sizes, rng):
    tokenizer = AutoTokenizer.from_pretrained(out / "reward_model")
    samples = pd.read_parquet(out / "policy_answers.parquet")
    model, log = train_reward_model(tokenizer, samples, sizes, rng)
    model.save_pretrained(work / "reward_model")
    return log


def build_report(out, work, sizes, rng):
    table = pd.read_parquet(out / "heldout.parquet")
    numbers, sampled = report_policy(*load(AutoModelForCausalLM, out / "policy"), table,
                                     sizes["report_samples"])
    judge = load(AutoModelForSequenceClassification, out / "reward_model")
    return {"report": {"policy": numbers,
                       "reward_model": report_reward_model(*judge, sampled, rng)}}


def build_experts(out, work, sizes, rng):
    """The other policy, and its part of the report: it came last, and the others stay as they are.

    float16 halves the file. Not bfloat16: who samples in bfloat16 would have the very weights that
    are trained, and the two would only come apart with the first updates.
    """
    tokenizer = AutoTokenizer.from_pretrained(out / "policy")
    policy, log = train_policy("experts", tokenizer, sizes, rng)
    folder = work / "policy_experts"
    policy.half().save_pretrained(folder)
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(out / "policy" / name, folder)
    policy, tokenizer = load(AutoModelForCausalLM, folder)
    numbers, sampled = report_policy(policy, tokenizer, pd.read_parquet(out / "heldout.parquet"),
                                     sizes["report_samples"])
    numbers["effective_experts"] = effective_experts(policy, tokenizer, sampled)
    return {**log, "report": {"experts": numbers}}


STAGES = {  # name -> (function, files of earlier stages that it needs)
    "questions": (build_questions, ()),
    "tokenizer": (build_tokenizer, ()),
    "policy": (build_policy, ("policy/tokenizer.json",)),
    "samples": (build_samples, ("policy/model.safetensors",)),
    "reward_model": (build_reward_model, ("policy_answers.parquet", "reward_model/tokenizer.json")),
    "report": (build_report, ("heldout.parquet", "policy/model.safetensors",
                              "reward_model/model.safetensors")),
    "experts": (build_experts, ("heldout.parquet", "policy/tokenizer.json")),
}


def run_stage(name, out, sizes):
    """Run one stage; its files and its lines in report.json appear in `out` when all is done."""
    function, needed = STAGES[name]
    for file in needed:
        if not (out / file).exists():
            sys.exit(f"build.py: stage {name} needs {out / file}: run the stages before it first")
    # Seeded by stage: made again alone, it gives what the whole build gave.
    torch.manual_seed(SEED + list(STAGES).index(name))
    started = time.time()
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as folder:
        work = Path(folder)
        log = function(out, work, sizes, random.Random(f"{SEED} {name}"))
        path = out / "report.json"
        report = json.loads(path.read_text()) if path.exists() else {}
        report.update(
            seed=SEED, quick=sizes is QUICK, threads=torch.get_num_threads(),
            machine=f"{platform.machine()}, {os.cpu_count()} CPU cores",
            versions=dict(python=platform.python_version(), torch=torch.__version__,
                          transformers=transformers.__version__, pandas=pd.__version__))
        seconds = round(time.time() - started, 1)
        report.update(log.pop("report", {}))
        stages = report.pop("stages", {})
        report["stages"] = {**stages, name: {"seconds": seconds, **log}}
        (work / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        for source in sorted(work.rglob("*.*")):
            target = out / source.relative_to(work)
            target.parent.mkdir(exist_ok=True)
            source.chmod(0o644)
            os.replace(source, target)  # a killed build leaves the old file or the new one


def main():
    parser = argparse.ArgumentParser(description="Make everything in data/ from one seed.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent,
                        help="folder to fill (default: this script's)")
    parser.add_argument("--quick", action="store_true", help="a miniature of it, for the tests")
    parser.add_argument("--stage", help="only this one of " + ", ".join(STAGES))
    # One: with two, any other busy process makes each wait for the other at every operation.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    options = parser.parse_args()
    if options.stage not in (None, *STAGES):
        sys.exit(f"build.py: no stage {options.stage!r}; the stages are {', '.join(STAGES)}")
    if options.threads < 1:
        sys.exit(f"build.py: --threads {options.threads}: at least one thread is needed")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    except OSError as error:
        sys.exit(f"build.py: cannot write to {options.out}: {error.strerror}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the work folder is removed
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the training needs the cores
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    for name in [options.stage] if options.stage else STAGES:
        run_stage(name, options.out, QUICK if options.quick else FULL)
    report = json.loads((options.out / "report.json").read_text(),
                        parse_float=lambda digits: round(float(digits), 3))
    print(pd.json_normalize(report).T.to_string(header=False))


if __name__ == "__main__":
    main()
