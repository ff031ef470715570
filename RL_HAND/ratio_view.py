"""A picture that one can touch: a group's answers, their ratios, and what the clip range cuts.

    python RL_HAND/ratio_view.py                                # all that have a range
    python RL_HAND/ratio_view.py gspo grpo MINIBATCH=32 SEED=1  # constants, for scripts with them
    python RL_HAND/ratio_view.py gspo POLICY_MODEL=runs/gspo/epoch_1 OUTPUT=trained.html

Each script takes its first step as it is, and is watched: the answers, advantages and weights of
its rollout, and the ratios before and after each update, as its own functions compute them. (PPO's
CRITIC_WARMUP, in which the policy waits, is 0.) OUTPUT=ratio_view.html is one page for any browser,
which loads nothing else: move the update and the clip range, change the algorithm.
"""

import base64
import contextlib
import importlib.util
import io
import json
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
# What each script's range cuts; that of cispo.py cuts nothing, and reinforce.py has no ratio.
SCRIPTS = {"gspo": "answer", "grpo": "token", "dapo": "token", "ppo": "token", "gmpo": "token"}
LIMIT = 1_000_000  # bytes of the page; groups that do not fit are left out, the last ones first


def fail(message):
    """Stop with one line on standard error and exit status 1."""
    raise SystemExit(f"error: {message}")


def import_script(name):
    """A script as a new module, whose constants and functions may be set."""
    spec = importlib.util.spec_from_file_location(f"{name}_viewed", HERE / name / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(arguments):
    """The command line as (output file, modules by name, constants by name); configures modules:
    what cannot be is said before anything runs."""
    output, names, constants = "ratio_view.html", [], ["CRITIC_WARMUP=0"]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals and name not in SCRIPTS:
            fail(f"{name!r} cannot be drawn; expected some of {', '.join(SCRIPTS)}")
        if name in ("MAX_STEPS", "OUTPUT_DIR", "RESUME_FROM"):
            fail(f"{argument}: one step is taken; expected POLICY_MODEL=FOLDER, OUTPUT=FILE")
        if name == "OUTPUT":
            output = value
        else:
            (constants if equals else names).append(argument)
    output = Path(output).expanduser().absolute()
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        fail(f"OUTPUT={output}: expected a file, in a folder that can be written to")
    modules = {name: import_script(name) for name in names or SCRIPTS}
    for argument in constants[1:]:
        if not any(argument.partition("=")[0] in module.DEFAULTS for module in modules.values()):
            next(iter(modules.values())).parse(argument)  # which says what there is
    constants = {name: [argument for argument in constants if argument.partition("=")[0] in
                        module.DEFAULTS] + ["MAX_STEPS=1"] for name, module in modules.items()}
    for name, module in modules.items():
        module.configure(constants[name])
    return output, modules, constants


def record(module, arguments):
    """Take the first step of a script and watch it: a namespace of its rollout (`batch`) and the
    log-probs of the whole rollout, (B, T), before and after each update of the policy (`logps`)."""
    seen = SimpleNamespace(module=module, logps=[])
    minibatches, optimiser_step = module.minibatches, module.optimiser_step

    def watched_minibatches(batch, passes):
        seen.batch = batch
        seen.logps.append(module.score_without_grad(run.policy, batch))
        return minibatches(batch, passes)

    def watched_step(run, part, meter):
        optimiser_step(run, part, meter)
        if part == "policy":
            seen.logps.append(module.score_without_grad(run.policy, seen.batch))

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        module.new_folder = lambda: Path(folder)
        run = module.start(arguments)
        module.minibatches, module.optimiser_step = watched_minibatches, watched_step
        module.finish_step = lambda run, metrics: None  # neither evaluated nor saved
        module.train(run)
        module.minibatches, module.optimiser_step = minibatches, optimiser_step
    batch, size = seen.batch, module.GROUP_SIZE
    rows = {tuple(row["prompt_ids"]): row for row in run.train_rows}
    seen.rows = [rows[tuple(ids[mask.bool()].tolist())] for ids, mask in
                 zip(batch.prompt_ids[::size], batch.prompt_mask[::size])]
    batch.prompt_index = batch.prompt_index.unique_consecutive(return_inverse=True)[1]  # of those
    rewards, parts = module.score_completions(run, seen.rows, batch)
    seen.rewards = getattr(batch, "rewards", rewards)  # DAPO's are less its penalty
    seen.right, seen.tokenizer = parts["verifier"] > 0, run.tokenizer
    counted = module.loss_mask(batch) if hasattr(module, "loss_mask") else batch.completion_mask
    seen.weights = module.token_weights(counted)
    return seen


def packed(values):
    """A tensor's float32 numbers, bit by bit, as text."""
    return base64.b64encode(values.cpu().numpy().astype("<f4").tobytes()).decode()


def groups_of(seen, grpo, gspo):
    """The page's groups of answers, best first; first the groups with both right and wrong ones.
    Whatever the script, a token's ratio is GRPO's and an answer's GSPO's."""
    batch, groups = seen.batch, {}
    ratios = [[script.policy_loss(logps, batch.old_logps, batch.advantages, batch.completion_mask)
               [1]["ratio/mean"] for script in (grpo, gspo)] for logps in seen.logps]
    special = seen.tokenizer.all_special_ids
    for i in seen.rewards.argsort(descending=True, stable=True).tolist():
        real = batch.completion_mask[i].bool()
        groups.setdefault(batch.prompt_index[i].item(), []).append({
            "tokens": ["∎" if token in special else seen.tokenizer.decode([token])
                       for token in batch.completion_ids[i][real].tolist()],
            "reward": seen.rewards[i].item(), "right": seen.right[i].item(),
            "advantage": packed(batch.advantages[i][real]), "weight": packed(seen.weights[i][real]),
            "ratios": [packed(token[i][real]) for token, _ in ratios],
            "whole": [answer[i, 0].item() for _, answer in ratios]})
    groups = [{"question": row["question"], "answers": groups[number]}
              for number, row in enumerate(seen.rows)]
    return sorted(groups, key=lambda group: len({each["right"] for each in group["answers"]}) < 2)


def range_of(module):
    """A script's clip range of ratios, (below 1, above 1). GMPO's constant is of log-ratios."""
    low, high = module.clip_range()
    of_logs = module.__name__.startswith("gmpo")
    return (1 - math.exp(-low), math.exp(high) - 1) if of_logs else (low, high)


def page_of(recordings):
    """The page: the template with the data in its place, of as many groups as fit."""
    grpo, gspo = import_script("grpo"), import_script("gspo")
    scripts = [{"name": name, "by": SCRIPTS[name], "range": range_of(seen.module),
                "groups": groups_of(seen, grpo, gspo)} for name, seen in recordings.items()]
    for count in range(max(len(script["groups"]) for script in scripts), 0, -1):
        some = [script | {"groups": script["groups"][:count]} for script in scripts]
        ranges = {"token": grpo.clip_range(), "answer": gspo.clip_range()}
        text = json.dumps({"scripts": some, "ranges": ranges}, ensure_ascii=False)
        page = PAGE.replace("@DATA@", text.replace("<", r"\u003c"))
        if len(page.encode()) <= LIMIT:
            return page
    fail(f"a page of one group has {len(page.encode())} bytes; expected {LIMIT} at most: lower "
         "GROUP_SIZE or MAX_NEW_TOKENS, raise MINIBATCH, or take fewer scripts")


def main(arguments):
    """`python ratio_view.py [SCRIPT ...] [NAME=VALUE ...] [OUTPUT=FILE]`"""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    output, modules, constants = parse(arguments)
    recordings = {}
    for name, module in modules.items():
        start = time.perf_counter()
        recordings[name] = seen = record(module, constants[name])
        print(f"{name}: {len(seen.logps) - 1} updates on {len(seen.rewards)} answers to "
              f"{len(seen.rows)} questions, {time.perf_counter() - start:.0f} s", flush=True)
    page = page_of(recordings)
    try:
        module.put(output, lambda path: path.write_text(page, encoding="utf-8"))
    except OSError as error:
        fail(f"OUTPUT={output}: {error}; expected a file that can be written")
    print(f"open {output} in a browser ({len(page.encode()) / 1e3:.0f} kB)")


# ============================================= Page =============================================

PAGE = r"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>RL_HAND: what the clip range cuts</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --ink: #1c2230; --soft: #667085; --line: #dde2ea; --paper: #fff;
        --panel: #f4f6f9; --cut: #c6ccd6; --up: #2f80ed; --down: #e8802a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebf1; --soft: #98a2b3; --line: #343b49; --paper: #14171e;
          --panel: #1e232d; --cut: #4a5160; --up: #4b93f5; --down: #e98f3c } }
:root[lang=en] [lang=zh], :root[lang=zh] [lang=en] { display: none }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--paper);
       color: var(--ink); font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif }
header { display: flex; align-items: center; gap: 12px }
h1 { font-size: 22px; margin: 0; flex: 1 }
button, select, .pick span { font: inherit; color: inherit; background: var(--paper);
                     border: 1px solid var(--line); border-radius: 8px; padding: 3px 12px }
:focus-visible, .pick :focus-visible + span { outline: 2px solid var(--up); outline-offset: 2px }
.up { color: var(--up) } .down { color: var(--down) } .soft { color: var(--soft) }
.grey { background: var(--cut); border-radius: 4px; padding: 0 4px }
.panel { background: var(--panel); border-radius: 12px; padding: 14px 18px; margin: 14px 0 }
.panel, .row { display: grid; grid-template-columns: 1fr 1fr; gap: 12px 36px }
.panel label, .share { display: flex; flex-wrap: wrap; gap: 2px 12px; align-items: center }
.pick { display: flex; gap: 6px; flex-wrap: wrap }
.pick input { position: absolute; opacity: 0 }
.pick span { font-weight: 600; cursor: pointer }
.pick :checked + span { background: var(--ink); color: var(--paper) }
select { flex: 1; min-width: 0 }
input[type=range] { width: 100%; margin: 4px 0; accent-color: var(--up) }
output { font-weight: 600; margin-left: auto; font-variant-numeric: tabular-nums }
.bar { flex: 1; background: var(--cut); border-radius: 4px; height: 8px; overflow: hidden }
.bar i { display: block; height: 100%; background: var(--ink) }
.share div:last-child { width: 100% }
.row { grid-template-columns: 130px 1fr 300px; gap: 6px 20px; padding: 8px 0;
       border-top: 1px solid var(--line); align-items: center }
.row.head { border: 0; align-items: end } .row.head, .meta { font-size: 13px; line-height: 1.4 }
.meta b { display: block; white-space: nowrap }
.strip { display: flex; flex-wrap: wrap; gap: 3px }
.strip span { font: 13px/22px ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre;
  min-width: 18px; text-align: center; padding: 0 4px; border-radius: 4px; background:
  color-mix(in srgb, var(--hue) calc(var(--much) * 75%), var(--panel)) }
.strip .cut { background: var(--cut); color: var(--soft) }
.strip .here { outline: 2px solid var(--ink) }
svg { display: block; width: 100%; height: 34px; overflow: visible }
svg * { vector-effect: non-scaling-stroke } .lane { fill: var(--panel) } .out { fill: var(--cut) }
.edge { stroke: var(--ink) } .faint { stroke: var(--soft); stroke-dasharray: 2 2 }
.tick { stroke-width: 2px } .dot { stroke-width: 9px; stroke-linecap: round }
#scale { position: relative; height: 27px; margin-top: 2px; border-radius: 4px }
#scale small { position: absolute; transform: translateX(-50%) }
#told { position: sticky; bottom: 0; margin: 0; padding: 8px 0; background: var(--paper);
        border-top: 1px solid var(--line) }
@media (max-width: 760px) { .panel, .row { grid-template-columns: minmax(0, 1fr) }
  .meta { display: flex; gap: 12px } .row.head > :not(:last-child) { display: none } }
</style></head><body>
<header><h1><span lang="en">What the clip range cuts</span><span lang="zh">裁剪范围裁掉了什么</span>
</h1><button id="language"><span lang="en">中文</span><span lang="zh">English</span></button></header>
<p lang="en">Each row is one answer of a group and each box one of its tokens, coloured by its ratio
π/π<sub>old</sub>: how much <b class="up">more</b> or <b class="down">less</b> likely the updates
have made it since it was sampled. What has left the clip range on the side to which its advantage A
pushes turns <span class="grey">grey</span> and gets no policy gradient: in GSPO a whole answer, by
its one ratio (the geometric mean of its tokens'), in GRPO, DAPO, PPO and GMPO each token by its
own.</p>
<p lang="zh">每一行是同一组里的一条回答，每个小格是其中一个 token，颜色表示它的重要性比率
π/π<sub>old</sub>：采样之后的几步更新让它变得<b class="up">更可能</b>了，还是<b
class="down">更不可能</b>了。沿优势 A 所推的方向越出裁剪范围的部分变成<span
class="grey">灰色</span>，不再有策略梯度：GSPO 按整条回答唯一的序列级比率（各 token
比率的几何平均）整条裁剪，GRPO、DAPO、PPO 和 GMPO 则按每个 token 自己的比率逐个裁剪。</p>
<div class="panel"><div class="pick" id="scripts" role="radiogroup" aria-label="algorithm"></div>
<label><span lang="en">question</span><span lang="zh">问题</span><select id="group"></select></label>
<label><span lang="en">policy after this many updates</span><span lang="zh">策略更新了几步</span>
<output id="updates"></output><input type="range" id="update" min="0"></label>
<label><span lang="en">clip range of the ratio</span><span lang="zh">比率的裁剪范围</span>
<output id="range"></output><input type="range" id="clip" min="-4" max="0" step="0.05"></label>
<div class="share" id="here"></div><div class="share" id="all"></div></div>
<div class="row head soft"><div lang="en">reward, advantage</div><div lang="zh">奖励、优势</div>
<div lang="en">tokens (∎: the end)</div><div lang="zh">token（∎ 为结束符）</div>
<div><span lang="en">ratios: the tokens', and below the answer's</span>
<span lang="zh">比率：上为各 token，下为整条回答</span><div id="scale"></div></div></div>
<main id="rows" tabindex="0"></main><p id="told" aria-live="polite"></p>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const $ = id => document.getElementById(id), all = query => [...document.querySelectorAll(query)];
const both = (en, zh) => `<span lang="en">${en}</span><span lang="zh">${zh}</span>`;
const plain = text => text.replace(/[&<>"]/g, sign => `&#${sign.charCodeAt(0)};`);
const signed = number => (number > 0 ? "+" : "") + number.toFixed(2).replace("-", "−");
const floats = text => new Float32Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
const {scripts, ranges} = JSON.parse($("data").textContent);
for (const answer of scripts.flatMap(one => one.groups).flatMap(one => one.answers)) {
  answer.advantage = floats(answer.advantage);
  answer.pull = floats(answer.weight).map((weight, i) => Math.abs(weight * answer.advantage[i]));
  answer.ratios = answer.ratios.map(floats);  // of each token, before and after each update
}
let at = {}, script, group, tokens, told = 0;  // `at`: what the address says behind its #

// The tokens of an answer that are clipped: as `ratio_statistics` compares them, in float32.
function clip(answer, [low, high]) {
  const below = Math.fround(1 - low), above = Math.fround(1 + high);
  answer.cut = [...answer.advantage].map((advantage, i) => {
    const ratio = script.by === "answer" ? answer.whole[at.update] : answer.ratios[at.update][i];
    return advantage < 0 ? ratio < below : advantage > 0 && ratio > above;
  });
}

function tell(where, title, answers) {
  const sum = list => list.reduce((total, one) => total + +one, 0);
  const cut = answers.flatMap(one => one.cut), pull = answers.flatMap(one => [...one.pull]);
  const left = pull.map((size, i) => cut[i] ? 0 : size);
  const share = 100 * sum(left) / (sum(pull) || 1);
  const alive = answers.filter(one => one.cut.some((is, i) => !is && one.pull[i])).length;
  const count = left.filter(Boolean).length;
  Object.assign(where.dataset, {clipped: sum(cut), count, alive, share});  // for the tests
  where.innerHTML = `${title}<div class="bar"><i style="width: ${share}%"></i></div><div>${
    both(`<b>${sum(cut)}</b> of ${cut.length} tokens clipped; ${count}, of ${alive} of
          ${answers.length} answers, have a gradient,
          <b>${share.toFixed(1)}&nbsp;%</b> of Σ|weight·A|`,
         `${cut.length} 个 token 裁掉 <b>${sum(cut)}</b> 个；仍有梯度的 ${count} 个来自
          ${alive}/${answers.length} 条回答，占 Σ|权重·A| 的 <b>${share.toFixed(1)}&nbsp;%</b>`)
  }</div>`;
}

// Where a ratio stands, 0 to 100: linear close to 1, logarithmic farther off. And its colour.
const place = ratio => 50 + 50 * Math.sign(ratio - 1) *
  Math.min(1, Math.log1p(1e4 * Math.abs(Math.log(Math.max(ratio, 1e-9)))) / Math.log1p(1e4));
const much = ratio => (place(ratio) / 50 - 1) ** 2;
const hue = ratio => `var(--${Math.abs(ratio - 1) < 1e-5 ? "soft" : ratio < 1 ? "down" : "up"})`;

// A line of an answer's picture: the range, what lies beyond it on the advantages' side, the marks.
function lane(y, range, active, answer, marks) {
  const [low, high] = [place(1 - range[0]), place(1 + range[1])];
  const bar = (from, to, kind) =>
    `<rect class="${kind}" x="${from}" y="${y}" width="${to - from}" height="14"/>`;
  return bar(0, 100, "lane") +
    (active && answer.advantage.some(one => one < 0) ? bar(0, low, "out") : "") +
    (active && answer.advantage.some(one => one > 0) ? bar(high, 100, "out") : "") +
    `<path class="${active ? "edge" : "faint"}" d="M${low} ${y}v14M${high} ${y}v14"/>` + marks;
}

function draw() {
  const own = [Math.min(1, at.clip * script.range[0] / script.range[1]), at.clip];
  const by = {...ranges, [script.by]: own}, every = script.groups.flatMap(one => one.answers);
  every.forEach(answer => clip(answer, own));
  all(".strip span").forEach((box, number) => {
    const [answer, i] = tokens[number], ratio = answer.ratios[at.update][i];
    box.className = (answer.cut[i] ? "cut" : "") + (number === told ? " here" : "");
    box.style = `--hue: ${hue(ratio)}; --much: ${much(ratio)}`;
  });
  all("#rows .axis").forEach((axis, number) => {
    const answer = group.answers[number];
    const mark = (ratio, cut, path) => `<path ${path} transform="translate(${place(ratio)})"
      stroke="${cut ? "var(--soft)" : hue(ratio)}"/>`;
    const ticks = answer.tokens.map((_, i) =>
      mark(answer.ratios[at.update][i], answer.cut[i], 'class="tick" d="M0 2v10"')).join("");
    const dot = 'class="dot" d="M0 25h0"', none = !answer.cut.includes(false);
    axis.innerHTML = `<svg viewBox="0 0 100 34" preserveAspectRatio="none">${
      lane(0, by.token, script.by === "token", answer, ticks)}${lane(18, by.answer,
      script.by === "answer", answer, mark(answer.whole[at.update], none, dot))}</svg>`;
  });
  $("updates").textContent = `${at.update} / ${$("update").max}`;
  $("range").textContent = `1 − ${+own[0].toPrecision(2)} … 1 + ${+own[1].toPrecision(2)}`;
  tell($("here"), both("this group", "本组"), group.answers);
  const groups = script.groups.length;
  tell($("all"), both(`all ${groups} groups`, `全部 ${groups} 组`), every);
  const [answer, i] = tokens[told], [ratio, whole] =
    [answer.ratios[at.update][i], answer.whole[at.update]].map(ratio =>
      `<b style="color: ${hue(ratio)}">${ratio.toFixed(4)}</b>`);
  $("told").innerHTML = `<code class="grey">${plain(answer.tokens[i])}</code> ` +
    both(`ratio ${ratio}, its answer's ${whole}, `, `比率 ${ratio}，整条回答 ${whole}，`) +
    `A ${signed(answer.advantage[i])}` + (answer.cut[i] ? both("; clipped", "；已裁剪") : "");
}

// Change what is shown: #script=gspo&group=0&update=3&clip=0.0004&lang=en, and draw it anew.
function go(change) {
  at = {...at, ...change};
  script = scripts.find(one => one.name === at.script) || scripts[0];
  at.script = script.name;
  at.group = Math.min(Math.max(0, Math.trunc(at.group) || 0), script.groups.length - 1);
  group = script.groups[at.group];
  tokens = group.answers.flatMap(answer => answer.tokens.map((_, i) => [answer, i]));
  told = Math.min(told, tokens.length - 1);
  const last = group.answers[0].whole.length - 1;
  at.update = Math.min(Math.max(0, Math.trunc(at.update ?? last - 1) || 0), last);
  at.clip = at.clip > 0 ? +at.clip : script.range[1];
  at.lang = document.documentElement.lang = at.lang === "zh" ? "zh" : "en";
  Object.assign($("update"), {max: last, value: at.update});
  $("clip").value = Math.log10(at.clip);
  $("group").innerHTML = script.groups.map((one, i) =>
    `<option value="${i}">${i + 1}. ${plain(one.question)}</option>`).join("");
  $("group").value = at.group;
  all("#scripts input").forEach(one => { one.checked = one.value === script.name; });
  $("rows").innerHTML = group.answers.map(answer => {
    const [least, most] = [Math.min(...answer.advantage), Math.max(...answer.advantage)];
    const range = [...new Set([signed(least), signed(most)])].join(" … ");
    const right = answer.right ? both("✓ right", "✓ 正确") : both("✗ wrong", "✗ 错误");
    return `<section class="row"><div class="meta">${right}
      <span class="soft">${answer.reward.toFixed(2)}</span>
      <b class="${least > 0 ? "up" : most < 0 ? "down" : "soft"}">A ${range}</b></div>
      <div class="strip">${answer.tokens.map(token =>
        `<span>${plain(token).replace(/\n/g, "↵")}</span>`).join("")}</div>
      <div class="axis"></div></section>`;
  }).join("");
  draw();
  history.replaceState(null, "", "#" + new URLSearchParams(at));
}

function read() {
  const said = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  go({lang: navigator.language.slice(0, 2), ...said});
}

$("scripts").innerHTML = scripts.map(one => `<label><input type="radio" name="script" value="${
  one.name}"><span>${one.name.toUpperCase()}</span></label>`).join("");
$("scripts").onchange = event => {  // to the same question if it is there, and the script's range
  const next = scripts.find(one => one.name === event.target.value);
  const same = next.groups.findIndex(one => one.question === group.question);
  go({script: next.name, group: same, clip: next.range[1]});
};
$("group").onchange = event => go({group: event.target.value});
$("update").oninput = event => go({update: event.target.value});
$("clip").oninput = event => go({clip: +(10 ** event.target.value).toPrecision(2)});
$("language").onclick = () => go({lang: at.lang === "zh" ? "en" : "zh"});
function point(number) {
  if (number < 0 || number >= tokens.length) return;
  told = number;
  draw();
}
$("rows").onpointerover = event => point(all(".strip span").indexOf(event.target));
$("rows").onkeydown = event => point(told + ({ArrowLeft: -1, ArrowRight: 1}[event.key] || NaN));
$("scale").innerHTML = [0.5, 0.9, 0.99, 1, 1.01, 1.1, 2].map(ratio =>
  `<small style="left: ${place(ratio)}%">${ratio}</small>`).join("");
$("scale").style.background = `linear-gradient(90deg, ${[...Array(21).keys()].map(i =>
  `color-mix(in srgb, var(--${i < 10 ? "down" : "up"}) ${75 * (i / 10 - 1) ** 2}%, var(--panel))`
  )}) bottom / 100% 7px no-repeat`;
onhashchange = read;
read();
</script></body></html>
"""

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))
    main(sys.argv[1:])
