"""What data/ ships is what data/README.md says it is, and data/build.py makes it."""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          DebertaV2ForSequenceClassification, Qwen3ForCausalLM, Qwen3MoeForCausalLM)

DATA = Path(__file__).resolve().parents[1] / "data"
MEGABYTE = 1_000_000


def import_build():
    spec = importlib.util.spec_from_file_location("data_build", DATA / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = import_build()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on a machine that runs other tests too wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tables():
    return {name: pd.read_parquet(DATA / f"{name}.parquet")
            for name in ("train", "heldout", "policy_answers")}


@pytest.fixture(scope="module")
def policy():
    return (AutoModelForCausalLM.from_pretrained(DATA / "policy").eval(),
            AutoTokenizer.from_pretrained(DATA / "policy"))


@pytest.fixture(scope="module")
def experts():
    return (AutoModelForCausalLM.from_pretrained(DATA / "policy_experts",
                                                 dtype=torch.float32).eval(),
            AutoTokenizer.from_pretrained(DATA / "policy_experts"))


@pytest.fixture(scope="module")
def reward():
    return (AutoModelForSequenceClassification.from_pretrained(DATA / "reward_model").eval(),
            AutoTokenizer.from_pretrained(DATA / "reward_model"))


@pytest.fixture(scope="module")
def report():
    return json.loads((DATA / "report.json").read_text())


@pytest.fixture(scope="module")
def sampled(policy, tables):
    """Fresh samples of the shipped policy for 128 held-out questions."""
    torch.manual_seed(12345)
    return build.answer_questions(*policy, tables["heldout"].head(128), 8, "samples")


def read_problem(question):
    """(a, b, op) of a worded question, by trying every template backwards."""
    for op, templates in build.TEMPLATES.items():
        for template in templates:
            pattern = re.escape(template).replace(r"\{a\}", r"(?P<a>\d+)")
            found = re.fullmatch(pattern.replace(r"\{b\}", r"(?P<b>\d+)"), question)
            if found:
                return int(found["a"]), int(found["b"]), op
    raise AssertionError(f"no template fits {question!r}")


# ---- Questions ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name, held_out, rows", [("train", False, 800), ("heldout", True, 512)])
def test_questions(tables, name, held_out, rows):
    table = tables[name]
    assert list(table.columns) == ["question", "answer", "teacher_response", "teacher_talkative"]
    assert len(table) == rows and table["question"].is_unique and not table.isna().any().any()
    digits = []
    for question, answer in zip(table["question"], table["answer"]):
        a, b, op = read_problem(question)
        assert build.is_held_out(a, b) is held_out and build.is_held_out(b, a) is held_out
        value = a + b if op == "+" else a - b
        assert value >= 0 and re.search(r"Answer: (\d+)$", answer)[1] == str(value)
        digits.append(len(str(a)))
    assert set(digits) == {2, 3} and 0.2 < digits.count(3) / rows < 0.3


def test_every_written_step_is_right(tables):
    for answer in pd.concat([tables["train"], tables["heldout"]])["answer"]:
        steps = re.findall(r"([\d+-]+)=(\d+)( carry 1| borrow 1)?\.", answer)
        assert steps
        for left, value, _ in steps:
            assert sum(int(part) for part in re.findall(r"-?\d+", left)) == int(value)


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_teachers_are_right_and_write_in_two_ways(tables, policy, name):
    """One as the answers are written, one otherwise; both fit into an answer of the policy."""
    table = tables[name]
    assert (table["teacher_response"] == table["answer"]).all()
    for answer, talk in zip(table["answer"], table["teacher_talkative"]):
        work, result = answer.split(" Answer: ")
        assert talk == f"Let me see. {work} I think it is {result}."
    lengths = [len(ids) for ids in policy[1](list(table["teacher_talkative"]))["input_ids"]]
    assert max(lengths) < build.MAX_NEW_TOKENS


def test_no_question_crosses_the_split(tables):
    assert not set(tables["train"]["question"]) & set(tables["heldout"]["question"])
    for question in tables["policy_answers"]["question"].unique():
        a, b, _ = read_problem(question)
        assert not build.is_held_out(a, b), question


def test_held_out_share_and_symmetry():
    marks = [build.is_held_out(a, b) for a in range(10, 100) for b in range(10, 100)]
    assert 0.07 < sum(marks) / len(marks) < 0.11
    assert all(build.is_held_out(a, b) == build.is_held_out(b, a)
               for a in range(10, 60) for b in range(10, 100))


def test_policy_answers_are_judged_by_their_last_number(tables):
    table = tables["policy_answers"]
    assert list(table.columns) == ["question", "answer", "response", "correct"]
    judged = table["response"].map(build.last_number) == table["answer"].map(build.last_number)
    assert (judged == table["correct"]).all()


# ---- Generator ---------------------------------------------------------------------------------

def test_written_out_work():
    rng = random.Random(0)
    for problem, answer in (
            ((37, 48, "+"), "7+8=15 carry 1. 3+4+1=8. Answer: 85"),
            ((87, 48, "+"), "7+8=15 carry 1. 8+4+1=13. Answer: 135"),
            ((52, 47, "-"), "12-7=5 borrow 1. 5-4-1=0. Answer: 5"),
            ((400, 177, "-"), "10-7=3 borrow 1. 10-7-1=2 borrow 1. 4-1-1=2. Answer: 223")):
        assert build.write_answer(problem, "clean", rng) == answer
    assert build.column_work(37, 48, "+", rng, forget=1.0) == ("7+8=15. 3+4=7.", 75)
    assert build.column_work(52, 27, "-", rng, forget=1.0) == ("12-7=5. 5-2=3.", 35)


def test_styles_do_what_they_are_called():
    rng = random.Random(1)
    for _ in range(200):
        a, b, op = problem = build.draw_problem(rng)
        value = a + b if op == "+" else a - b
        assert build.last_number(build.write_answer(problem, "clean", rng)) == value
        for style in ("direct", "hasty", "wrongop", "chatty", "careful", "one slip"):
            assert build.last_number(build.wrong_answer(problem, style, rng)) != value
        assert "=" not in build.write_answer(problem, "direct", rng)
        assert "Answer" not in build.write_answer(problem, "chatty", rng)
    assert build.last_number("no number") is None


def test_importing_the_script_changes_nothing():
    before = torch.random.get_rng_state(), random.getstate(), dict(os.environ)
    import_build()
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (random.getstate(), dict(os.environ)) == before[1:]


# ---- Policy ------------------------------------------------------------------------------------

def test_policy_files(policy):
    model, tokenizer = policy
    assert type(model) is Qwen3ForCausalLM and model.dtype == torch.float32
    assert model.config.tie_word_embeddings and len(tokenizer) == model.config.vocab_size
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(specials) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    # The trap that Qwen3-0.6B's own file sets; a sampler must name every field itself.
    config = model.generation_config
    assert config.do_sample and config.temperature == 0.6
    assert config.top_k == 20 and config.top_p == 0.95
    assert config.eos_token_id == [2, 0] and config.pad_token_id == 0


def test_chat_template_switch(policy):
    chat = [{"role": "user", "content": "Add 1 and 2."}]
    render = lambda messages, **how: policy[1].apply_chat_template(messages, tokenize=False, **how)
    turn = "<|im_start|>user\nAdd 1 and 2.<|im_end|>\n"
    assert render(chat) == turn
    asked = turn + "<|im_start|>assistant\n"
    assert render(chat, add_generation_prompt=True) == asked
    assert render(chat, add_generation_prompt=True, enable_thinking=True) == asked
    assert (render(chat, add_generation_prompt=True, enable_thinking=False)
            == asked + "<think>\n\n</think>\n\n")
    system = [{"role": "system", "content": "Be brief."}]
    assert render(system + chat) == "<|im_start|>system\nBe brief.<|im_end|>\n" + turn
    ids = policy[1](render(chat, add_generation_prompt=True, enable_thinking=False))["input_ids"]
    assert [ids.count(token) for token in range(5)] == [0, 2, 1, 1, 1]


@pytest.mark.parametrize("which", ["policy", "reward"])
def test_digits_stand_alone_and_any_text_survives(which, request):
    tokenizer = request.getfixturevalue(which)[1]
    assert all(len(token) == 1 for token in tokenizer.get_vocab() if re.search(r"\d", token))
    for text in ("12345 + 678", "7+8=15 carry 1.", "Z\u00fcrich \u6570 \U0001f600\n\ttabs  too"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_policy_accuracy_is_what_the_report_says(policy, sampled, tables, report):
    stated = report["policy"]
    # 1024 samples of 128 questions scatter by about 0.015 around the figure for all of them.
    assert abs(sampled["correct"].mean() - stated["sampled_accuracy"]) < 0.06
    greedy = build.answer_questions(*policy, tables["heldout"], 0, "greedy")
    assert abs(greedy["correct"].mean() - stated["greedy_accuracy"]) < 0.03
    assert 0.14 <= stated["sampled_accuracy"] <= 0.22 and 0.45 <= stated["greedy_accuracy"] <= 0.58
    assert stated["pass_at_8"] >= 0.7


# ---- The policy with experts: its training and the scripts are in test_experts.py --------------

def test_policy_with_experts_files(experts):
    """A Qwen3-MoE in float16, and what a tokenizer is made of as the other policy has it."""
    model, config = experts[0], experts[0].config
    assert type(model) is Qwen3MoeForCausalLM and config.tie_word_embeddings
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (8, 32, 2)
    assert config.norm_topk_prob  # not transformers' default, but that of Qwen3's own
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json",
                 "tokenizer_config.json"):
        ours, others = (DATA / folder / name for folder in ("policy_experts", "policy"))
        assert ours.read_bytes() == others.read_bytes(), name
    with safe_open(DATA / "policy_experts" / "model.safetensors", "pt") as weights:
        weights = torch.cat([weights.get_tensor(name).flatten() for name in weights.keys()])
    assert weights.dtype == torch.float16 and len(weights) == model.num_parameters()
    # A sampler in bfloat16 then has other weights from the first step on.
    assert (weights != weights.bfloat16()).float().mean() > 0.5


def test_policy_with_experts_is_what_the_report_says(experts, tables, report):
    stated = report["experts"]
    greedy = build.answer_questions(*experts, tables["heldout"], 0, "greedy")
    assert abs(greedy["correct"].mean() - stated["greedy_accuracy"]) < 0.03
    assert stated["greedy_accuracy"] >= 0.48
    # Of other answers, the greedy ones.
    used = build.effective_experts(*experts, greedy)
    assert used == pytest.approx(stated["effective_experts"], abs=2)
    assert len(used) == 8 and min(used) >= 15 and max(used) <= 32


# ---- Reward model ------------------------------------------------------------------------------

def test_reward_model_reads_pairs(reward):
    model, tokenizer = reward
    assert type(model) is DebertaV2ForSequenceClassification and model.config.num_labels == 1
    assert model.config.relative_attention and model.config.pos_att_type == ["c2p", "p2c"]
    pair = tokenizer("Add 1 and 2.", "Answer: 3")
    question, answer = (len(tokenizer(text, add_special_tokens=False)["input_ids"])
                        for text in ("Add 1 and 2.", "Answer: 3"))
    assert tokenizer.decode(pair["input_ids"]) == "[CLS]Add 1 and 2.[SEP]Answer: 3[SEP]"
    assert pair["token_type_ids"] == [0] * (question + 2) + [1] * (answer + 1)


def test_padding_does_not_change_a_score(reward, tables):
    model, tokenizer = reward
    rows = tables["heldout"].head(8)
    with torch.no_grad():
        alone = [model(**tokenizer(q, a, return_tensors="pt")).logits.item()
                 for q, a in zip(rows["question"], rows["answer"])]
    batched = build.score_answers(model, tokenizer, rows.rename(columns={"answer": "response"}))
    assert torch.allclose(torch.tensor(alone), torch.from_numpy(batched), atol=1e-4)


def test_reward_model_ranks_plain_errors(reward):
    rng = random.Random(5)
    problems = [build.draw_problem(rng, held_out=True) for _ in range(40)]
    rows = pd.DataFrame({"question": [build.word_question(problem, rng) for problem in problems]})
    scores = {style: build.score_answers(*reward, rows.assign(response=[
        build.write_answer(p, style, rng) if style == "clean" else build.wrong_answer(p, style, rng)
        for p in problems])) for style in ("clean", "direct", "chatty", "wrongop", "hasty")}
    for style, least in (("direct", 0.9), ("chatty", 0.9), ("wrongop", 0.85), ("hasty", 0.6)):
        assert (scores["clean"] > scores[style]).mean() >= least, style


def test_reward_model_ranks_fresh_answers_of_the_policy(reward, sampled, report):
    scored = sampled.assign(score=build.score_answers(*reward, sampled))
    assert build.pair_accuracy(scored) >= 0.85
    assert report["reward_model"]["pair_accuracy"] >= 0.90


def test_pair_accuracy_by_hand():
    scored = pd.DataFrame(
        [("a", True, 2.0), ("a", False, 1.0), ("a", False, 2.0), ("a", False, 3.0),
         ("b", True, 1.0), ("c", False, 1.0)], columns=["question", "correct", "score"])
    assert build.pair_accuracy(scored) == pytest.approx(1.5 / 3)
    assert build.pair_accuracy(scored[scored["question"] != "a"]) is None


# ---- Files -------------------------------------------------------------------------------------

def test_sizes_and_no_pickle():
    files = [path for path in DATA.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert ({path.suffix for path in files}
            == {".py", ".md", ".json", ".jinja", ".parquet", ".safetensors"})
    assert sum(path.stat().st_size for path in files) <= 10 * MEGABYTE
    models = [path for path in files if path.parent != DATA]
    assert sum(path.stat().st_size for path in models) <= 8 * MEGABYTE
    for path in DATA.glob("*/model.safetensors"):
        assert path.stat().st_size <= 2.8 * MEGABYTE
        with safe_open(path, "pt") as weights:
            assert all(weights.get_tensor(name).isfinite().all() for name in weights.keys())


def test_report_is_of_a_full_build(report):
    assert report["quick"] is False and report["seed"] == build.SEED
    assert list(report["stages"]) == list(build.STAGES)


# ---- The build script --------------------------------------------------------------------------

def run_build(*arguments):
    return subprocess.run([sys.executable, str(DATA / "build.py"), *map(str, arguments)],
                          capture_output=True, text=True, timeout=300)


def test_quick_build_twice_gives_the_same_bytes(tmp_path):
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        done = run_build("--quick", "--threads", 1, "--out", folder)
        assert done.returncode == 0, done.stderr
        assert "pair_accuracy" in done.stdout
    # The parts that a reader trains from; report.json holds seconds, so it is left out.
    produced, shipped = ({str(path.relative_to(root)) for path in root.rglob("*.*")
                          if path.is_file()} for root in (folders[0], DATA))
    assert produced == {name for name in shipped if not re.search(r"\.py|\.md|__pycache__", name)}
    for name in produced - {"report.json"}:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.parametrize("arguments, message", [
    (["--stage", "polish"], "no stage 'polish'; the stages are questions, tokenizer, policy"),
    (["--out", "/dev/null/data"], "cannot write to /dev/null/data"),
    (["--threads", "0"], "at least one thread"),
])
def test_bad_input_is_one_line(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["build.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        build.main()
    # sys.exit(text) prints the text to stderr and makes the status 1.
    assert message in stopped.value.code and "\n" not in stopped.value.code


def test_stage_without_the_ones_before_it(tmp_path):
    done = run_build("--stage", "policy", "--out", tmp_path)
    assert done.returncode == 1 and "run the stages before it first" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())
