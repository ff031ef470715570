"""Rows of runs: what identifies a run, that no row is lost, that pages show what the rows say."""

import json
import subprocess
import sys

import experiments
import figures
import pages
import pandas as pd
import pytest
import results
from conftest import ROOT, import_file
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

TABLES = import_file(ROOT / "tools" / "tables.py", "tables_of_results")
GSPO = (ROOT / "RL_HAND" / "gspo" / "gspo.py").read_text(encoding="utf-8")
FILES = [path for path in sorted(results.RESULTS.glob("*.csv"))
         if path.stem != "routing"]  # whose rows are routing.py's


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty results/ in the place of the repository's; runs beside it."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    for path in (tmp_path / "results", tmp_path / "runs"):
        path.mkdir()
    return tmp_path


def a_run(place, words=(), script="gspo", source=GSPO, end=100, seed=0, finished=True):
    """A run's folder as a script leaves it, less the weights, and as compare.py marks it."""
    name = place / f"{script}_{len([*place.glob('*')])}_seed{seed}"
    (name / "epoch_0").mkdir(parents=True)
    (name / "epoch_0" / "train_script.py").write_text(source, encoding="utf-8")
    (name / "epoch_0" / "constants.json").write_text(json.dumps({
        "script": script, "command": [f"{script}.py", f"OUTPUT_DIR={name}", f"SEED={seed}",
                                      "PROFILE=embedded", *words],
        "commit": "0123456789abcdef", "places": [str(ROOT)], "torch": "2.0", "device": "cpu",
        "transformers": "5.0", "constants": {"THREADS": 1}}))
    steps = range(end + 1)
    pd.DataFrame({
        "step": steps, "num_tokens": [1000 * n for n in steps], "kl": [n / 100 for n in steps],
        "step_time": [1.0] * len(steps), "time/update": [0.5] * len(steps),
        "clip_ratio/region_mean": [0.5] * len(steps),
        **{name: [n / 100 if n % 10 == 0 else None for n in steps]
           for name in ("eval/accuracy", "eval/accuracy_greedy")},
        "eval/mean_length": [20 if n % 10 == 0 else None for n in steps],
    }).to_csv(name / "metrics.csv", index=False)
    if finished:
        (name / "finished").touch()
    return name


# ------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("text, instead, same", [
    ("# The group's", "# Another", True),
    ("    policy = run.policy\n", "    # A remark.\n\n    policy = run.policy  # and one\n", True),
    ('"""GSPO: Group', '"""Other words: Group', True),
    ('    """The whole algorithm,', '    """All of it,', True),
    ("Either(4, 2)  # passes", "Either(5, 2)  # passes", True),  # the full size's
    ("Either(4, 2)  # passes", "Either(4, 3)  # passes", False),
    ("ratio.clamp(1 - low", "ratio.clamp(1 + low", False),
    ("torch.min(ratio * a", "torch.max(ratio * a", False),
    ("KL_COEF = 0.2", "KL_COEF = 0.3", False)])
def test_code_is_what_runs_on_the_small_models(text, instead, same):
    changed = GSPO.replace(text, instead) if text in GSPO else f"{GSPO}\n{instead}\n"
    assert changed != GSPO and (results.code_of(changed) == results.code_of(GSPO)) == same


def test_a_class_keeps_what_is_no_docstring():
    assert results.code_of('class A:\n    "x"\n    b = 1') == results.code_of("class A:\n    b = 1")
    assert results.code_of('a = "x"') != results.code_of('a = "y"')
    assert results.code_of("a = None") != results.code_of("a = 0") != results.code_of("a = False")


@pytest.fixture
def data(tmp_path):
    """A table, a model and a reward function, and a script whose constants lead there."""
    pd.DataFrame({"question": ["1+1", "1+2"]}).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"\1\r\n\2")
    (tmp_path / "model" / "config.json").write_bytes(b'{"a": 1,\n"b": 2}')
    (tmp_path / "reward.py").write_text("def f(): return 1\n")
    (tmp_path / "d").symlink_to(tmp_path)
    return tmp_path, ('train_datasets = [{"path": "d/train.parquet", "input": "question"}]\n'
                      'POLICY_MODEL = Either("Qwen/Large", "d/model")\nNAME = "d/none"\n'
                      'REWARD_FUNCTION = "d/reward.py:f"\nDEFAULTS = {}\nLATER = "d/later"\n')


def test_data_is_what_the_constants_lead_to(data):
    place, source = data

    def now(*words):
        return results.data_of(source, words, [place])
    first = now()
    assert len(first) == 12 and now("SEED=1", "LEARNING_RATE=1e-3") == first
    table = pd.read_parquet(place / "train.parquet")
    table.to_parquet(place / "train.parquet", compression="gzip")  # other bytes, the same table
    (place / "model" / "config.json").write_bytes(b'{"a": 1,\r\n"b": 2}')  # as Windows has it
    (place / "reward.py").write_text("def f():\n    return 1  # as before\n")
    (place / "later").write_text("read by nobody")
    assert now() == first
    table.to_parquet(place / "other.parquet")
    assert now("train_datasets=[{'path': 'd/other.parquet'}]") != first
    assert now("POLICY_MODEL=d/nothing") != first
    seen = {first}
    for file, content in (("train.parquet", None), ("model/config.json", b"{}"),
                          ("model/weights.safetensors", b"\1\n\2"),
                          ("model/more.json", b"{}"), ("reward.py", b"def f(): return 2\n")):
        if content is None:
            table.replace("1+2", "1+3").to_parquet(place / file)
        else:
            (place / file).write_bytes(content)
        seen.add(now())
    assert len(seen) == 6


def test_tables_that_are_made_are_known_by_what_makes_them(monkeypatch):
    """And need not be there."""
    word = experiments.FEW
    before = results.data_of(GSPO, [word])
    assert before not in (results.data_of(GSPO, []), results.data_of(GSPO, [experiments.CARELESS]))
    monkeypatch.setattr(results, "function_code", lambda path, name: f"another {name}")
    assert results.data_of(GSPO, [word]) != before


def test_constants_and_seed_tell_runs_apart():
    keys = [results.key_of("gspo", words, seed) for words, seed in (
        ([], 0), ([], 1), (["KL_COEF=0"], 0), (["KL_COEF=0", "MAX_STEPS=9"], 0))]
    assert len(set(keys)) == 4
    assert results.key_of("gspo", ["MAX_STEPS=9", "OUTPUT_DIR=/a b", "SEED=7", "PROFILE=embedded",
                                   "KL_COEF=0"], "0") == keys[3]
    assert results.key_of("grpo", [], 0) != keys[0]


def test_stale_is_what_is_not_todays(folder):
    row = results.row_of(a_run(folder / "runs"))
    assert results.stale(row) == ""
    assert results.stale(row | {"code": "0"}) == "script" == results.stale(row | {"script": "none"})
    assert results.stale(row | {"data": "0"}) == "data"
    assert results.stale(row | {"code": "0", "data": "0"}) == "script and data"
    now = results.code_of(GSPO)
    results.write(results.RESULTS / "equal.csv", [
        {"script": "gspo", "constants": "", "code_old": "0", "code_new": "1"},
        {"script": "gspo", "constants": "", "code_old": "1", "code_new": now},
        {"script": "gspo", "constants": "KL_COEF=0", "code_old": "2", "code_new": now}])
    assert results.stale(row | {"code": "0"}) == "" == results.stale(row | {"code": "1"})
    assert results.stale(row | {"code": "2"}) == "script"  # shown with other constants
    assert results.stale(row | {"code": "0", "script": "grpo"}) == "script"


# ---------------------------------------------------------------------------------------- rows


def test_a_run_leaves_its_row(folder):
    row = results.row_of(a_run(folder / "runs", ["KL_COEF=0", "CLIP_RANGE=0.2"], seed=3))
    assert results.key(row) == ("gspo", "CLIP_RANGE=0.2; KL_COEF=0", "3")
    assert row["code"] == results.code_of(GSPO) and row["data"] == results.data_of(GSPO, [])
    assert (row["commit"], row["steps"], row["seconds"], row["end"]) == ("0123456789", "100", "101",
                                                                         "")
    assert row["eval/accuracy"].split() == [f"{n / 10:g}" for n in range(11)]
    assert row["at step"].split() == [str(10 * n) for n in range(11)]
    assert row["at num_tokens"].split()[-1] == "100000"
    curve = results.curve(row, "kl")
    assert len(curve) == 25 and curve[0] == pytest.approx(0.025)
    assert results.fifth(row, "kl") == pytest.approx(0.905, abs=1e-3)  # of the steps 81 to 100
    assert results.fifth(row, "kl", 0) == pytest.approx(0.105, abs=1e-3)
    assert results.places(row, "kl")[:2].tolist() == [2.5, 6.5]
    assert pages.reached(row, "at step") == pytest.approx(80)
    assert not pages.failed(row) and pages.failed(row | {"end": "not finite"})
    assert len(",".join(row.values())) < 2500


def test_what_is_finished_is_harvested(folder):
    """Also a run whose gradients went to infinity; not one that is still going, or of no
    experiment, or one that has its row."""
    a_run(folder / "runs")
    a_run(folder / "runs", ["CLIP_RANGE=0.2"], finished=False)
    a_run(folder / "runs", ["CLIP_RANGE=0.123"])
    gone = a_run(folder / "runs", ["LEARNING_RATE=1e-3"], end=40, finished=False)
    gone.with_name(f"{gone.name}.log").write_text("error: step 41, policy: it is nan; expected "
                                                  "finite gradients: lower LEARNING_RATE")
    where = sorted((folder / "runs").glob("*_seed*"))
    assert experiments.harvest(where) == 2 and experiments.harvest(where) == 0
    rows = results.all_rows()
    assert {key[1]: row["end"] for key, row in rows.items()} == {
        "": "", "LEARNING_RATE=1e-3": "not finite"}
    assert sorted(path.stem for path in results.RESULTS.glob("*.csv")) == ["family",
                                                                           "learning_rate"]


@pytest.mark.parametrize("stages, kl", [([1, 2, 3], True), ([2, 3], True), ([2, 3], False),
                                        ([1], False)])
def test_what_a_game_leaves(tmp_path, stages, kl):
    """By stage, whether or not there was SeqKD, a game, a KL."""
    names = ["d_acc", "score_gap", "d_rank", "d_grad_norm", "frac_no_signal", "matches_teacher",
             "d_spread", "completions/mean_length", *["kl"] * kl]
    lines = [{"step": 0, "eval/accuracy": 0.2}] + [
        {"step": 4 * i + k + 1, "stage": stage, "step_time": 1.0} | dict.fromkeys(names, i + 1)
        | ({"eval/accuracy": 0.3 + i / 10} if k == 3 else {})
        for i, stage in enumerate(stages) for k in range(4)]
    pd.DataFrame(lines).to_csv(tmp_path / "metrics.csv", index=False)
    found = experiments.game(tmp_path)
    for i, stage in enumerate(stages):
        assert found[f"step after stage {stage}"] == 4 * (i + 1)
        assert found[f"seconds of stage {stage}"] == 4
    assert ("step after stage 1" in found) == (1 in stages)
    assert ("largest gap" in found) == (3 in stages) == ("d_rank, last 10 of the game" in found)
    assert ("kl, last 10 of the game" in found) == (3 in stages and kl)
    if 3 in stages:
        assert found["largest gap"] == found["d_rank, first 10 of the game"] == len(stages)
        assert found["best of the game"] == 0.2 + len(stages) / 10
        assert found["d_acc, last 10 of the warm-up"] == len(stages) - 1


def test_a_stale_row_gives_way_and_never_takes_the_place_of_a_current_one(folder):
    older = a_run(folder / "runs", source=GSPO + "\nmore = 1\n")
    assert experiments.harvest([older]) == 1
    jobs = experiments.jobs_of("default")
    assert len(experiments.missing(jobs)) == len(jobs)
    newer = a_run(folder / "runs")
    assert experiments.harvest([older, newer]) == 1
    assert len(experiments.missing(jobs)) == len(jobs) - 1
    assert experiments.harvest([older]) == 0
    assert [results.stale(row) for row in results.all_rows().values()] == [""]


SCRIPT = """
import json, pathlib, sys
A = 0
DEFAULTS = {}
given = dict(word.split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(given["OUTPUT_DIR"])
(folder / "epoch_0").mkdir(parents=True)
(folder / "epoch_0" / "train_script.py").write_bytes(pathlib.Path(__file__).read_bytes())
(folder / "epoch_0" / "constants.json").write_text(json.dumps({
    "script": "fake", "command": sys.argv, "commit": "0123456789abcdef", "places": [], "torch": "2",
    "transformers": "5", "device": "cpu", "constants": {"THREADS": 1}}))
(folder / "metrics.csv").write_text("step,num_tokens,step_time,eval/accuracy,eval/accuracy_greedy,"
                                    "eval/mean_length\\n0,0,1,0.5,0.5,9\\n1,9,1,0.5,0.5,9\\n")
if given.get("A") == "1":
    sys.exit("error: step 2, policy: it is nan; expected finite gradients: lower LEARNING_RATE")
if given.get("A") == "2":
    sys.exit("error: another")
"""


def test_runs_are_made_once_and_what_failed_for_its_numbers_has_a_row(folder, monkeypatch, capsys):
    """A run that fails for any other reason is reported, and tried again."""
    (folder / "fake").mkdir()
    (folder / "fake" / "fake.py").write_text(SCRIPT, encoding="utf-8")
    compare = results.import_file(ROOT / "RL_HAND" / "compare.py")
    monkeypatch.setattr(compare, "HERE", folder)
    monkeypatch.setattr(results, "import_file", lambda path: compare)
    for module in (results, experiments):
        monkeypatch.setattr(module, "source_of", lambda name: SCRIPT)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {
        "one": experiments.runs(1, ("fake", []), ("fake", ["A=1"])),
        "two": experiments.runs(1, ("fake", []), ("fake", ["A=2"]))})
    failures = experiments.make(["one", "two"], workers=3)
    assert [line.partition(" ")[0] for line in sorted(failures)] == ["fake_A=1_seed0",
                                                                     "fake_A=2_seed0"]
    assert {row["constants"]: row["end"] for row in results.all_rows().values()} == {
        "": "", "A=1": "not finite"}
    assert "3 of 3 runs" in capsys.readouterr().out
    assert len(experiments.make(["one", "two"])) == 1 and "1 of 3" in capsys.readouterr().out
    changed = SCRIPT.replace("A = 0", "A = 3")
    (folder / "fake" / "fake.py").write_text(changed, encoding="utf-8")
    for module in (results, experiments):
        monkeypatch.setattr(module, "source_of", lambda name: changed)
    assert len(experiments.make(["one"])) == 1 and "2 of 2 runs" in capsys.readouterr().out
    assert {row["code"] for row in results.all_rows().values()} == {results.code_of(changed)}


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import results
results.RESULTS = Path(sys.argv[2])
results.stale = lambda row: ""
seed = 0
while True:
    row = {"script": sys.argv[3], "constants": "", "seed": str(seed), "kl": "0.1 " * 5000}
    results.keep([row], {results.key(row): "family"}, Path(sys.argv[2]))
    print(seed, flush=True)
    seed += 1
"""


def test_killed_writers_lose_no_row(folder):
    """Two at once, killed while they write: what they said is there."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(ROOT / "benchmarks"),
                                 str(results.RESULTS), name], stdout=subprocess.PIPE, text=True)
               for name in ("gspo", "grpo")]
    for writer in writers:
        while int(writer.stdout.readline()) < 8:
            pass
    for writer in writers:
        writer.kill()
    for name, writer in zip(("gspo", "grpo"), writers):
        said = [8, *map(int, writer.stdout.read().split())][-1]
        rows = {row["seed"] for row in results.read(results.RESULTS / "family.csv")
                if row["script"] == name and len(row["kl"].split()) == 5000}
        assert rows >= set(map(str, range(said + 1)))


def test_a_write_that_fails_leaves_the_file(folder, monkeypatch):
    path = results.RESULTS / "family.csv"
    rows = [{"script": "gspo", "constants": "", "seed": str(seed)} for seed in (10, 2)]
    results.write(path, rows)
    before = path.read_text()
    assert [row["seed"] for row in results.read(path)] == ["2", "10"]

    def fails(*_):
        raise OSError("no space left")
    monkeypatch.setattr(results.csv.DictWriter, "writerows", fails)
    with pytest.raises(OSError):
        results.write(path, rows[:1])
    assert path.read_text() == before


# --------------------------------------------------------------------------------------- pages


@pytest.fixture
def page(folder, monkeypatch):
    """A page with a table of rows; its Chinese version."""
    for seed in range(3):
        for words in ([], ["CLIP_RANGE=0.2"]):
            a_run(folder / "runs", words, seed=seed)
    experiments.harvest(sorted((folder / "runs").glob("*_seed*")))
    for name in ("README.md", "README.zh-CN.md"):
        (folder / "RL_HAND" / "gspo").mkdir(parents=True, exist_ok=True)
        (folder / "RL_HAND" / "gspo" / "gspo.py").write_text(GSPO, encoding="utf-8")
        (folder / "RL_HAND" / name).write_text("Words.\n\n<!-- results clip -->\n<!-- end -->\n\n"
                                               "More.\n", encoding="utf-8")
    monkeypatch.setattr(TABLES, "FOLDER", folder / "RL_HAND")
    return folder / "RL_HAND" / "README.md"


def test_a_page_edited_by_hand_fails_the_check(page, capsys):
    assert TABLES.main(["--check"]) and not TABLES.main([]) and not TABLES.main(["--check"])
    text = page.read_text(encoding="utf-8")
    assert "| 0.2 | 1.000 ± 0.000 | 1.000 ± 0.000 | 80 ± 0 | 0.5000 / 0.5000 |" in text
    assert "*Commit 0123456; seeds 0–2; torch 2.0; transformers 5.0; cpu" in text
    assert text.startswith("Words.") and text.endswith("More.\n") and "Stale" not in text
    chinese = page.with_name("README.zh-CN.md").read_text(encoding="utf-8")
    assert "| 训练后采样 |" in chinese and "| 0.2 | 1.000 ± 0.000 |" in chinese
    page.write_text(text.replace("80 ± 0", "79 ± 0"), encoding="utf-8")
    capsys.readouterr()
    assert TABLES.main(["--check"])
    assert capsys.readouterr().out.replace("\\", "/") == "stale: RL_HAND/README.md\n"
    assert not TABLES.main([]) and page.read_text(encoding="utf-8") == text


def test_a_row_that_is_changed_fails_the_check_and_a_stale_one_is_said(page, capsys):
    TABLES.main([])
    path = results.RESULTS / "clip.csv"
    rows = results.read(path)
    rows[0] |= {"code": "0", "eval/accuracy": "0.2 0.9", "at step": "0 10"}
    results.write(path, rows)
    assert TABLES.main(["--check"]) and not TABLES.main([])
    assert "**Stale**: of another gspo (script) than today's." in page.read_text(encoding="utf-8")
    assert "**过期**" in page.with_name("README.zh-CN.md").read_text(encoding="utf-8")
    capsys.readouterr()
    experiments.show_stale()
    said = capsys.readouterr().out
    assert "table 'clip'" in said and "gspo CLIP_RANGE=0.2 seed 0: another script" in said
    assert "seed 1" not in said
    experiments.show_list()
    assert "clip" in capsys.readouterr().out


def test_while_rows_are_missing_the_older_table_stays(page):
    TABLES.main([])
    older = page.read_text(encoding="utf-8").replace("80 ± 0", "by other runs")
    page.write_text(older, encoding="utf-8")
    path = results.RESULTS / "clip.csv"
    rows = results.read(path)
    results.write(path, rows[1:])
    assert not TABLES.main(["--check"]) and not TABLES.main([])
    assert page.read_text(encoding="utf-8") == older
    results.write(path, rows)
    assert TABLES.main(["--check"])


def test_every_table_and_figure_can_be_made(folder):
    """Of all rows, in both languages, with as many lines and columns in each."""
    names = ["final KL per answer", "final KL per token", "largest gap", "step after stage 1",
             *(f"tokens of {which} answers, {when}" for which in ("right", "wrong")
               for when in ("before", "after")),
             "d_acc, last 10 of the warm-up", *results.PHASES]
    curves = [*results.CURVES, "cosine", "same mean", "answers", "length", "sd of a token",
              "sd of the mean", "sd of the sum"]
    row = dict.fromkeys(names, "1") | dict.fromkeys(curves, "0.1 " * 25) | results.row_of(
        a_run(folder / "runs", end=100)) | dict.fromkeys(
            ("at step", "at seconds", "at num_tokens"), "0 1 2") | dict.fromkeys(
            ("eval/accuracy", "eval/accuracy_greedy", "eval/mean_length"), "0.2 0.5 0.9")
    new = [row | dict(zip(("script", "constants", "seed"), key)) for key in experiments.owners()]
    results.keep(new, experiments.owners(), folder)
    for name, (wanted, _) in pages.TABLES.items():
        if not wanted:
            continue  # of rows that are not of runs
        english, chinese = (pages.table(name, language) for language in ("en", "zh"))
        assert len(english.splitlines()) == len(chinese.splitlines()) > 3, name
        assert [line.count("|") for line in english.splitlines()] == [
            line.count("|") for line in chinese.splitlines()]
        assert "nan" not in english, name
    for name, (function, _) in figures.FIGURES.items():
        assert function(name, pages.groups(name)).axes, name


def test_a_run_has_its_colour_in_every_panel():
    """Also where the runs before it have not measured what the panel shows."""
    row = {"steps": "50", "d_rank": "0.5 0.6"}
    axes = Figure().subplots()
    for label, rows in (("without", [{"steps": "50"}]), ("with", [row])):
        figures.line(axes, rows, "d_rank", label)
    assert axes.get_legend_handles_labels()[1] == ["with"]
    assert to_hex(axes.lines[-1].get_color()) == to_hex("C1")


def test_a_table_that_does_not_exist():
    with pytest.raises(SystemExit, match="no table 'none'.*family"):
        pages.with_tables("<!-- results none -->\n<!-- end -->", "en")


# -------------------------------------------------------------------------------------- equal


FAKE = """
import pathlib, sys
given = dict(word.split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(given["OUTPUT_DIR"])
folder.mkdir()
value = VALUE if given.get("CLIP_RANGE") == "0.2" else 0.5
(folder / "metrics.csv").write_text(f"step,loss,time/update\\n0,{value},{sys.argv[0]!r}\\n")
"""


@pytest.mark.parametrize("value, same", [("0.25 + 0.25", 2), ("0.5 + 1e-15", 1)])
def test_equal_is_what_gives_the_same_bits(folder, monkeypatch, capsys, value, same):
    """With all constants of stale rows: here two scripts of a few lines."""
    for words in ([], ["CLIP_RANGE=0.2"]):
        a_run(folder / "runs", words, source=FAKE.replace("VALUE", "0.5"))
    experiments.harvest(sorted((folder / "runs").glob("*_seed*")))
    today = FAKE.replace("VALUE", value)
    for module in (results, experiments):
        monkeypatch.setattr(module, "source_of", lambda script: today)
    rows = results.all_rows().values()
    assert [results.stale(row).split(" ")[0] for row in rows] == ["script", "script"]
    assert experiments.show_equal("gspo", folder / "runs") == (same < 2)
    printed = capsys.readouterr().out
    assert printed.count("the same bits") == same
    assert ("CLIP_RANGE=0.2: other numbers in loss" in printed) == (same < 2)
    assert ["script" in results.stale(row) for row in rows].count(False) == same


def test_equal_without_the_older_text(folder):
    with pytest.raises(SystemExit, match="error: no text of gspo with the code 123 at HEAD"):
        experiments.text_with("123", "gspo", ["HEAD"])


# ------------------------------------------------------------------------------ the repository


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_of_the_repository(path):
    """Small, sorted, and each row in the file of the first experiment that has it."""
    assert path.stat().st_size < 100_000
    rows, text = results.read(path), path.read_text(encoding="utf-8")
    owners = experiments.owners()
    if path.stem != "equal":
        assert {owners[results.key(row)] for row in rows} == {path.stem}
        assert len({results.key(row) for row in rows}) == len(rows)
    copy = path.with_name(".copy.csv")
    try:
        results.write(copy, rows[::-1])
        assert copy.read_text(encoding="utf-8") == text
    finally:
        copy.unlink(missing_ok=True)


def test_the_map_is_whole():
    """25 steps of each loss at each learning rate and number of updates; corners three times."""
    found = experiments.EXPERIMENTS["stability"]
    assert all("MAX_STEPS=25" in run.constants and "EVAL_EVERY=0" in run.constants for run in found)
    for rate, updates in [(rate, n) for rate in experiments.RATES for n in experiments.UPDATES]:
        for label in experiments.LOSSES:
            made = experiments.on_the_map(label, rate, updates)
            if label == "REINFORCE" and updates > 1:
                assert made is None
                continue
            run = next(run for run in found if run[:2] == made[:2])
            assert len(run.seeds) == 2 + ((rate, updates) in experiments.CORNERS)
            source = results.constants_in(results.source_of(run.script))
            given = source | dict(word.split("=", 1) for word in run.constants)
            passes = int(given.get(f"{run.script.upper()}_EPOCHS", 1))
            assert 128 // int(given["MINIBATCH"]) * passes == updates
            assert float(given["LEARNING_RATE"]) == float(rate)
            assert not float(given.get("KL_COEF", 0)) and not float(given.get("ENTROPY_COEF", 0))
