"""The benchmarks run, small, and print their tables; memory is flat in the vocabulary, and what is
estimated is what is allocated. No test measures a time."""

import json
import re

import pytest
import torch
from common import load_tokenizer, make_rows
from conftest import ROOT, SCRIPT, import_file, run_script


@pytest.fixture(scope="module")
def memory():
    """benchmarks/memory.py."""
    return import_file(ROOT / "benchmarks" / "memory.py", "memory")


# ----------------------------------------------------------------------------------- memory


def test_memory_is_flat_in_the_vocabulary(gspo, memory, monkeypatch):
    gspo.configure(["PROFILE=embedded", "DEVICE=cpu", "LOGITS_AT_ONCE=1048576"])
    shape = memory.SMALL | {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}

    def above_head(vocabulary, plain):
        peak = memory.megabytes(gspo, shape, "cpu", vocabulary, 2, 64, plain, False)
        return peak - vocabulary * 16 * 4 / 1e6  # the head's own gradient
    small, large = above_head(8_192, False), above_head(151_936, False)
    assert large < 1.3 * small
    assert above_head(151_936, True) > 5 * large  # so that the measure sees what it is to see


@pytest.mark.parametrize("given", [["DTYPE=float32", "GRADIENT_CHECKPOINTING=True"],
                                   ["DTYPE=bfloat16", "GRADIENT_CHECKPOINTING=False"]])
def test_fake_tensors_allocate_what_real_ones_do(gspo, memory, given):
    """The estimate's training pass against the allocator's count of the same pass."""
    gspo.configure(["PROFILE=embedded", "DEVICE=cpu", "LOGITS_AT_ONCE=262144", *given])
    measured = memory.megabytes(gspo, memory.SMALL, "cpu", 8_192, 4, 64,
                                checkpointing=gspo.GRADIENT_CHECKPOINTING)
    fake = memory.make_fake(memory.load_policy(gspo, memory.SMALL, 8_192, "meta"))
    batch = memory.make_batch(gspo, 4, 4, 64, 64, 100)
    for parameter in fake.parameters():
        parameter.grad = None  # in `megabytes` they are made, and taken off
    made = memory.allocated(lambda: memory.training_pass(gspo, fake, batch), fake)
    made -= sum(4 * p.numel() for p in fake.parameters())
    assert made / 1e6 == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("given", ["bfloat16", "float32"])
def test_a_rollout_allocates_what_is_estimated(gspo, memory, given):
    """The estimate's keys and values, logits and all else against the allocator's count."""
    gspo.configure(["PROFILE=embedded", "DEVICE=cpu", f"DTYPE={given}", "MAX_NEW_TOKENS=24"])
    policy, rows = memory.load_policy(gspo, memory.SMALL, 500, "cpu"), make_rows(8, 40, 400)
    tokenizer = load_tokenizer()
    measured = memory.peak_bytes(lambda: gspo.sample_groups(policy, tokenizer, rows, 8))
    fake = memory.make_fake(memory.load_policy(gspo, memory.SMALL, 500, "meta"))
    estimated = sum(memory.decoding(gspo, fake, 64, 40 + 24)) + memory.logits_bytes(fake, 64)
    assert estimated == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("given, least, most", [
    ([], 13, 14.5), (["EVAL_BATCH=32"], 15, 16.5), (["LORA_RANK=16"], 4, 5)])
def test_the_default_constants_fit(gspo, memory, given, least, most):
    """Full fine-tuning into 16 GB, with twice the EVAL_BATCH into 24, an adapter into 8: with a
    gigabyte and a half for the driver, and for what the allocator loses."""
    gspo.configure(["PROFILE=full", "DEVICE=cpu", "FROZEN_DEVICE=cpu", *given])
    phases = {name: sum(parts.values()) for name, parts in memory.estimate(gspo).items()}
    assert least < max(phases.values()) < most, phases


def test_the_estimate_follows_the_constants(gspo, memory):
    found = []
    shape = memory.QWEN3 | {"num_hidden_layers": 2}
    memory.QWEN3, before = shape, memory.QWEN3
    for given in ([], ["KL_COEF=0"], ["REWARD_WEIGHTS={'verifier': 1.0}"], ["EVAL_BATCH=32"],
                  ["MICRO_BATCH=1", "LOGITS_AT_ONCE=1048576"]):
        gspo.configure(["PROFILE=full", "DEVICE=cpu", "FROZEN_DEVICE=cpu", *given])
        found.append(memory.estimate(gspo))
    memory.QWEN3 = before
    plain, free, exact, evaluating, small = found
    assert plain["update"]["Adam"] == 2 * plain["update"]["gradients"]
    assert plain["update"]["gradients"] == plain["update"]["weights"]
    assert plain["update"]["reference"] == plain["update"]["weights"] / 2 and \
        free["update"]["reference"] == 0
    assert exact["update"]["reward model"] == 0 < plain["update"]["reward model"]
    keys = [one["sampling"]["keys and values"] for one in (plain, evaluating)]
    assert keys[1] == 2 * keys[0] == pytest.approx(  # rows, tokens, layers, K and V, float32, width
        32 * 768 * 2 * 2 * 4 * 1024 / 1e9)
    name = "activations, logits, gradient of the head"
    assert small["update"][name] < plain["update"][name]


def test_memory_prints_an_estimate_for_any_script(memory, capsys):
    memory.print_estimate(ROOT / "RL_HAND" / "ppo" / "ppo.py", ["LORA_RANK=4",
                                                                "FROZEN_DEVICE=cuda:1"])
    table = capsys.readouterr().out
    assert re.search(r"^\| \*\*in all\*\* \| \*\*[\d.]+\*\* \|", table, re.MULTILINE)
    assert "| reward model | - | - | - |" in table


# ------------------------------------------------------------------------------------- speed


@pytest.fixture
def gpu():
    """benchmarks/gpu.py."""
    torch.set_num_threads(1)
    return import_file(ROOT / "benchmarks" / "gpu.py", "gpu")


def test_a_gpu_s_questions_are_answered_on_the_cpu_too(gpu, tmp_path, capsys):
    gpu.main(["DEVICE=cpu", "SHAPE=tiny", f"FILE={tmp_path / 'gpu.json'}"])
    table = capsys.readouterr().out
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["greedy is generate's, float32: rows of 8 x 6 tokens"] == 8
    for name in ("torch", "transformers", "commit", "device", "rollout, 16 rows: x generate",
                 "rollout, 8 rows: of the bandwidth bound", "training pass, checkpointing True: "
                 "of the matrix product's", "peak memory, LoRA: GB",
                 "epoch of GSM8K, all weights: hours, projected"):
        assert found[name] and name in table


def test_what_does_not_fit_into_the_budget_is_skipped(gpu, tmp_path, capsys):
    gpu.main(["DEVICE=cpu", "SHAPE=tiny", "BUDGET=0", f"FILE={tmp_path / 'gpu.json'}"])
    assert capsys.readouterr().out.count("skipped: it would not fit into BUDGET") == 7


def test_cost_grows_in_a_table_and_a_figure(tmp_path):
    done = run_script("LARGEST=4", f"FIGURE={tmp_path / 'scaling.png'}",
                      script=ROOT / "benchmarks" / "scaling.py")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\| [\d,.]+ \| [\d.]+ \|", done.stdout, re.MULTILINE)) == 2
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_a_script_against_another(capsys):
    benchmark = import_file(ROOT / "benchmarks" / "against_before.py", "against_before")
    benchmark.main([str(SCRIPT), str(SCRIPT), "STEPS=2", "BATCH_SIZE=2", "MINIBATCH=16",
                    "MAX_NEW_TOKENS=8"])
    table = capsys.readouterr().out
    for name in ("seconds", "CPU seconds", "CPU seconds, update", "tokens a completion"):
        assert re.search(rf"^\| {name} \| [\d.]+ \(", table, re.MULTILINE), table
    row = next(line for line in table.splitlines() if line.startswith("| tokens"))
    assert row.endswith("| 1.000 |")  # the same script, the same random numbers


def test_a_step_against_trl(monkeypatch, capsys):
    pytest.importorskip("trl")
    benchmark = import_file(ROOT / "benchmarks" / "step_against_trl.py", "step_against_trl")
    for name, value in {"PROMPTS": 2, "GROUP": 2, "TOKENS": 6, "MINIBATCH": 2, "UPDATES": 4,
                        "ROLLOUTS": 3}.items():
        monkeypatch.setattr(benchmark, name, value)
    benchmark.main(1)
    table = capsys.readouterr().out
    for name in ("TRL", "gspo.py", "ours", "generate"):
        assert re.search(rf"^\| {name} \| [\d.,]+ ", table, re.MULTILINE), table
