"""ratio_view.py: what it refuses; its updates and numbers are the scripts'; the page in a browser.

The browser is a Chromium, if there is one, driven through the pipe of its DevTools protocol: keys
are pressed, and what the page then counts is held against the scripts' `policy_loss`.
"""

import base64
import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
import time
from urllib.parse import parse_qsl

import numpy as np
import pytest
import torch
from conftest import ROOT, import_file
from safetensors.torch import load_file

VIEW = ROOT / "RL_HAND" / "ratio_view.py"
NAMES = ["gspo", "grpo", "dapo", "ppo", "gmpo"]
SMALL = ["PROFILE=embedded", "DEVICE=cpu", "BATCH_SIZE=4", "GROUP_SIZE=4", "MINIBATCH=8",
         "LEARNING_RATE=5e-4", "SEED=1"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                                "chrome"))), None)


@pytest.fixture
def view():
    """ratio_view.py, imported anew."""
    return import_file(VIEW, "ratio_view_under_test")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What `ratio_view.py` with small settings makes: (the page's file, recordings by name)."""
    view, recordings = import_file(VIEW, "ratio_view_of_this_file"), {}
    record, file = view.record, tmp_path_factory.mktemp("view") / "view.html"

    def kept(module, arguments):
        name = list(view.SCRIPTS)[len(recordings)]
        recordings[name] = record(module, arguments)
        return recordings[name]

    view.record = kept
    view.main([*SMALL, f"OUTPUT={file}"])
    return file, recordings


# ======================================== The command line =======================================


@pytest.mark.parametrize("arguments, says", [
    (["gad"], ["'gad' cannot be drawn", "gspo, grpo, dapo, ppo"]),
    (["gspo", "MAX_STEPS=2"], ["MAX_STEPS=2", "one step"]),
    (["gspo", "RESUME_FROM=runs/gspo/epoch_1"], ["RESUME_FROM", "POLICY_MODEL=FOLDER"]),
    (["gspo", "OUTPUT_DIR=here"], ["OUTPUT_DIR=here", "OUTPUT=FILE"]),
    (["gspo", "GROUP_SIZES=4"], ["GROUP_SIZES", "GROUP_SIZE"]),
    (["grpo", "dapo", "GSPO_EPOCHS=2"], ["GSPO_EPOCHS"]),
    (["gspo", "GROUP_SIZE=many"], ["GROUP_SIZE=many", "int"]),
    (["gspo", "ppo", "CLIP_RANGE=-1"], ["CLIP_RANGE"]),
    (["gspo", "OUTPUT=no/such/folder/view.html"], ["OUTPUT=", "no/such/folder"]),
    (["gspo", "OUTPUT=."], ["OUTPUT=", "expected a file"]),
])
def test_what_cannot_be_done_is_one_line(view, monkeypatch, tmp_path, arguments, says):
    """Before anything is run or written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(view, "record", None)  # calling it would be a TypeError
    with pytest.raises(SystemExit) as stop:
        view.main(arguments)
    line = stop.value.code
    assert line.startswith("error: ") and "\n" not in line
    for words in says:
        assert words in line
    assert not list(tmp_path.iterdir())


def test_a_script_gets_the_constants_that_it_has(view, tmp_path):
    """All without names; `GSPO_EPOCHS` is GSPO's alone, `SEED` everyone's."""
    output, modules, constants = view.parse(
        [f"OUTPUT={tmp_path}/a.html", "GSPO_EPOCHS=3", "SEED=5"])
    assert output == tmp_path / "a.html" and list(modules) == NAMES
    assert constants["gspo"] == ["GSPO_EPOCHS=3", "SEED=5", "MAX_STEPS=1"]
    assert constants["ppo"] == ["CRITIC_WARMUP=0", "SEED=5", "MAX_STEPS=1"]
    assert modules["gspo"].GSPO_EPOCHS == 3 and modules["grpo"].SEED == 5
    assert modules["dapo"].MAX_STEPS == 1
    assert "CRITIC_WARMUP=2" in view.parse(["ppo", "CRITIC_WARMUP=2"])[2]["ppo"]


def test_groups_that_do_not_fit_are_left_out(view, made, monkeypatch):
    _, recordings = made
    some = {"gspo": recordings["gspo"]}
    whole = view.page_of(some)
    assert len(data_of(whole)["scripts"][0]["groups"]) == 4
    monkeypatch.setattr(view, "LIMIT", len(whole.encode()) - 1)
    less = data_of(view.page_of(some))["scripts"][0]["groups"]
    assert less == data_of(whole)["scripts"][0]["groups"][:3]
    monkeypatch.setattr(view, "LIMIT", 1000)
    with pytest.raises(SystemExit, match="^error: a page of one group .*GROUP_SIZE"):
        view.page_of(some)


# ======================================= Updates and numbers =====================================


@pytest.mark.parametrize("name", ["gspo", "dapo", "ppo"])  # GRPO's loop is GSPO's
def test_the_updates_are_those_of_the_script(made, tmp_path, name):
    """Watching changes nothing: after the last update the log-probs of the rollout are, bit by bit,
    those of the checkpoint that the script itself leaves; each update has moved them."""
    seen, script = made[1][name], import_file(ROOT / "RL_HAND" / name / f"{name}.py", f"{name}_run")
    warmup = ["CRITIC_WARMUP=0"] if name == "ppo" else []
    script.main([*SMALL, *warmup, "MAX_STEPS=1", "EVAL_QUESTIONS=2", f"OUTPUT_DIR={tmp_path}/run"])
    policy = script.load_policy(script.POLICY_MODEL)
    weights = load_file(tmp_path / "run" / "step_1" / "model.safetensors")
    policy.load_state_dict(weights, strict=False)
    assert torch.equal(script.score_without_grad(policy, seen.batch), seen.logps[-1])
    assert len(seen.logps) == 5
    assert (seen.logps[0] - seen.batch.old_logps).abs().max() < 1e-4
    for before, after in zip(seen.logps, seen.logps[1:]):
        assert (before - after).abs().max() > 1e-3


def data_of(page):
    """The data in a page."""
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', page,
                                re.DOTALL)[1])


def floats(text):
    """Numbers as the page keeps them."""
    return np.frombuffer(base64.b64decode(text), "<f4")


def rows_of(seen, question):
    """The row numbers of a question's answers in a rollout, best first, as the page has them."""
    number = [row["question"] for row in seen.rows].index(question)
    rows = (seen.batch.prompt_index == number).nonzero()[:, 0].tolist()
    return sorted(rows, key=lambda i: -seen.rewards[i].item())


def loss_of(seen, update, clip=None):
    """The statistics of a script's `policy_loss` of the rollout, with another range of ratios."""
    module, batch = seen.module, seen.batch
    before = module.CLIP_RANGE
    if clip and is_gmpo(module):
        clip = (-math.log1p(-clip[0]) if clip[0] < 1 else math.inf, math.log1p(clip[1]))
    module.CLIP_RANGE = clip or before
    statistics = module.policy_loss(seen.logps[update], batch.old_logps, batch.advantages,
                                    batch.completion_mask)[1]
    module.CLIP_RANGE = before
    return statistics


def ratios_of(seen, update):
    """The ratios of a script's loss that are compared with the range: GMPO's `ratio/mean` is of
    answers, cut; its tokens' are GRPO's."""
    change = (seen.logps[update] - seen.batch.old_logps) * seen.batch.completion_mask
    return change.exp() if is_gmpo(seen.module) else loss_of(seen, update)["ratio/mean"]


def is_gmpo(module):
    """Whether a script is the one whose range is of log-ratios."""
    return module.__name__.startswith("gmpo")


def range_of(module):
    """The range of ratios that a script has by default."""
    return (1 - math.exp(-0.4), math.exp(0.4) - 1) if is_gmpo(module) else module.clip_range()


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_in_the_page_are_the_scripts(made, name):
    """Every ratio, bit by bit, that the script's loss has; advantages, weights, rewards, texts."""
    file, recordings = made
    seen, page = recordings[name], data_of(file.read_text(encoding="utf-8"))
    script, = [each for each in page["scripts"] if each["name"] == name]
    batch, total, mixed = seen.batch, 0.0, []
    assert tuple(script["range"]) == range_of(seen.module) and len(script["groups"]) == 4
    for group in script["groups"]:
        rows = rows_of(seen, group["question"])
        mixed.append(len({answer["right"] for answer in group["answers"]}) == 2)
        assert len(group["answers"]) == len(rows) == 4
        for answer, i in zip(group["answers"], rows):
            real = batch.completion_mask[i].bool()
            text = seen.tokenizer.decode(batch.completion_ids[i][real], skip_special_tokens=True)
            assert "".join(answer["tokens"]).replace("∎", "") == text
            assert (answer["reward"], answer["right"]) == (seen.rewards[i], seen.right[i])
            reference = seen.rows[batch.prompt_index[i]]
            assert answer["right"] == (seen.module.verify([reference], [text]) == [1.0])
            assert (floats(answer["advantage"]) == batch.advantages[i][real].numpy()).all()
            total += floats(answer["weight"]).sum()
            assert len(answer["ratios"]) == len(answer["whole"]) == len(seen.logps) == 5
            for update, (ratios, whole) in enumerate(zip(answer["ratios"], answer["whole"])):
                used = ratios_of(seen, update)[i][real].numpy()
                assert ((whole if script["by"] == "answer" else floats(ratios)) == used).all()
                assert math.isclose(np.log(floats(ratios)).mean(), math.log(whole), abs_tol=1e-6)
    assert math.isclose(total, 1.0, rel_tol=1e-5) and mixed == sorted(mixed, reverse=True)


def test_the_page_is_one_small_file_that_loads_nothing(made):
    text = made[0].read_text(encoding="utf-8")
    assert len(text.encode()) <= 1_000_000 and "default-src 'none'" in text
    outside = text.replace(re.search('id="data">(.*?)</script>', text, re.DOTALL)[1], "")
    assert len(outside) < 25_000
    assert not re.search(r"://|\b(src|href)\s*=|url\(|@import|@[A-Z]+@|fetch|import\(", outside)


# ========================================== In a browser =========================================

PIPES = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)  # Chromium reads commands from 3
os.dup2(ends[1], 4)  # and writes to 4
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """A headless Chromium with one page, by its DevTools protocol: JSON and a zero byte."""

    def __init__(self, folder):
        theirs, self.out = os.pipe()
        self.back, answers = os.pipe()
        flags = ("headless no-sandbox disable-gpu disable-quic no-first-run disable-sync "
                 "disable-background-networking disable-component-update lang=en-US "
                 "remote-debugging-pipe")
        command = [CHROMIUM, *(f"--{flag}" for flag in flags.split()), f"--user-data-dir={folder}"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PIPES, str(theirs), str(answers), *command, "about:blank"],
            pass_fds=(theirs, answers), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.close(theirs)
        os.close(answers)
        self.number, self.buffer, self.events, self.session = 0, b"", [], {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def message(self, until):
        """The next message, or a failure at that time."""
        while b"\0" not in self.buffer:
            left = max(0.0, until - time.monotonic())
            assert select.select([self.back], [], [], left)[0], "Chromium does not answer"
            more = os.read(self.back, 1 << 20)
            assert more, "Chromium has ended"
            self.buffer += more
        text, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(text)

    def call(self, method, **parameters):
        """Send a command and return its result; events on the way are kept."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.out, json.dumps(command).encode() + b"\0")
        until = time.monotonic() + 60
        while (answer := self.message(until)).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, address):
        """Load a page to its end, anew where the page before differs only behind the #."""
        for each in ("about:blank", address):
            self.events.clear()
            self.call("Page.navigate", url=each)
            until = time.monotonic() + 60
            while not any(event["method"] == "Page.loadEventFired" for event in self.events):
                self.events.append(self.message(until))

    def tell(self, script):
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, selector, *keys):
        """Press keys on an element."""
        self.tell(f"document.querySelector({selector!r}).focus()")
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13}
        for key in keys:
            text = {"text": "\r"} if key == "Enter" else {}
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                          windowsVirtualKeyCode=codes[key], **(text if kind == "keyDown" else {}))

    def complaints(self):
        """Errors and warnings of the console, and requests but for the file itself."""
        return [event for event in self.events
                if event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled",
                                       "Log.entryAdded")
                or event["method"] == "Network.requestWillBeSent"
                and not event["params"]["request"]["url"].startswith("file:")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser for the tests of this file."""
    if CHROMIUM is None or sys.platform == "win32":
        pytest.skip("no Chromium that can be driven here (apt-get install chromium)")
    made = Browser(tmp_path_factory.mktemp("chromium"))
    yield made
    made.process.kill()
    made.process.wait()


def counted(browser):
    """What the page shows: of its group, and of all."""
    return [browser.tell(f"({{...document.getElementById('{place}').dataset}})")
            for place in ("here", "all")]


def expected(seen, question, update, high):
    """The same by the script: clipped tokens, tokens and answers with a gradient, its share."""
    low, top = range_of(seen.module)
    mask, size = seen.batch.completion_mask, (seen.weights * seen.batch.advantages).double().abs()
    region = loss_of(seen, update, (min(1.0, high * low / top), high))["clip_ratio/region_mean"]
    left = size * (1 - region)
    for rows in (rows_of(seen, question), list(range(len(mask)))):
        yield {"clipped": int((region * mask)[rows].sum()), "count": int((left[rows] > 0).sum()),
               "alive": int((left[rows] > 0).any(1).sum()),
               "share": 100 * float(left[rows].sum() / size[rows].sum())}


def assert_the_page_counts(browser, seen):
    """What the page shows now is what the script computes. Returns the clipped tokens of all."""
    question, update, high = browser.tell("[group.question, at.update, at.clip]")
    wanted = list(expected(seen, question, update, high))
    for found, right in zip(counted(browser), wanted, strict=True):
        assert float(found.pop("share")) == pytest.approx(right.pop("share"), abs=1e-3)
        assert {name: int(number) for name, number in found.items()} == right
    shown = browser.tell("document.querySelector('#all b').textContent")
    assert int(shown) == wanted[1]["clipped"]
    grey = browser.tell("document.querySelectorAll('.strip .cut').length")
    assert grey == wanted[0]["clipped"]
    return wanted[1]["clipped"]


def test_the_page_counts_as_the_scripts_do(browser, made):
    """Each script, update and several ranges, among them the very ratios that occur."""
    file, recordings = made
    for name, seen in recordings.items():
        ratios = ratios_of(seen, 3)[seen.batch.completion_mask.bool()]
        edges = [float(ratio) - 1 for ratio in ratios[ratios > 1.0001][::17][:4]]
        found = set()
        browser.open(f"{file.as_uri()}#script={name}")
        assert not browser.complaints()
        assert browser.tell("at.clip") == range_of(seen.module)[1]
        assert_the_page_counts(browser, seen)
        for update in range(5):
            for clip in (0.0001, 0.0004, 0.01, 0.2, 0.9, *edges):
                group = browser.tell(f"go({{group: {update % 4}, update: {update}, clip: {clip}}}),"
                                     "at.script")
                assert group == name
                found.add(assert_the_page_counts(browser, seen))
        assert len(found) > 6 and 0 in found and len(edges) == 4
    assert not browser.complaints()


def test_by_keyboard_alone(browser, made):
    """Sliders, algorithms, language and tokens; the address follows, and leads back."""
    file, recordings = made
    browser.open(f"{file.as_uri()}#script=grpo&update=4")
    first = assert_the_page_counts(browser, recordings["grpo"])
    browser.press("#clip", *["ArrowLeft"] * 30)
    assert 0.001 < browser.tell("at.clip") < 0.01
    second = assert_the_page_counts(browser, recordings["grpo"])
    browser.press("#update", "ArrowLeft", "ArrowLeft", "ArrowLeft")
    assert browser.tell("at.update") == 1
    third = assert_the_page_counts(browser, recordings["grpo"])
    assert first < third < second
    browser.press("#clip", *["ArrowRight"] * 30)
    assert browser.tell("at.clip") == 0.2  # GRPO's own, and not one beside it
    question = browser.tell("group.question")
    browser.press("#scripts :checked", "ArrowLeft")
    assert browser.tell("[at.script, at.clip, group.question]") == ["gspo", 4e-4, question]
    assert_the_page_counts(browser, recordings["gspo"])
    assert "What the clip range cuts" in browser.tell("document.body.innerText")
    browser.press("#language", "Enter")
    text = browser.tell("document.body.innerText")
    assert "裁剪范围" in text and "What the clip" not in text
    told = browser.tell("document.getElementById('told').innerText")
    browser.press("#rows", "ArrowRight")
    assert browser.tell("document.getElementById('told').innerText") != told
    address, here = browser.tell("location.href"), counted(browser)
    assert dict(parse_qsl(address.partition("#")[2])) == {
        "script": "gspo", "group": "0", "update": "1", "clip": "0.0004", "lang": "zh"}
    browser.open(address)
    assert counted(browser) == here and not browser.complaints()


@pytest.mark.parametrize("fragment", [
    "#script=none&group=99&update=99&clip=-3&lang=fr", "#group=-1&update=x&clip=x", "#%F0&=&&"])
def test_an_address_that_is_wrong_shows_something_right(browser, made, fragment):
    file, recordings = made
    browser.open(file.as_uri() + fragment)
    assert not browser.complaints()
    assert_the_page_counts(browser, recordings["gspo"])


@pytest.mark.parametrize("width", [400, 1200])
def test_at_any_width_and_in_the_dark(browser, made, width):
    """Nothing is wider than the screen; the colours follow the system's."""
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800,
                 deviceScaleFactor=1, mobile=False)
    paper = {}
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia",
                     features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.open(f"{made[0].as_uri()}#script=ppo")
        assert browser.tell("document.documentElement.scrollWidth") <= width
        colour = browser.tell("getComputedStyle(document.body).backgroundColor")
        paper[scheme] = sum(map(int, re.findall(r"\d+", colour)))
    assert paper["dark"] < 120 and paper["light"] > 700
