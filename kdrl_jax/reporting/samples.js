"use strict";
// Rollouts of a run: choose one by step, verdict, reward or text; see each token's numbers.

const OUTCOMES = { correct: "✓ correct", wrong: "✗ wrong", unparsable: "? unparsable", timeout: "… timeout", format: "¶ format" };
const MOST_LISTED = 300;
const STRONGEST = 62; // per cent of colour at the end of the scale: text stays readable on it

// What a token can be coloured by: its number, in the words of the legend, and both ends.
const COLOURS = {
  ratio: {
    of: (row, i) => difference(row.log_probs?.[i], row.teacher_log_probs?.[i]),
    said: "log π_student − log π_teacher of the token, in nats: what distillation pushes to 0",
    none: "The teacher was not asked about this rollout.",
    low: "teacher likelier",
    high: "student likelier",
  },
  advantage: {
    of: (row) => row.advantage ?? null,
    said: "advantage of the rollout within its group, the same for all its tokens",
    none: "No advantage was recorded.",
    low: "less likely",
    high: "more likely",
  },
  student: {
    of: (row, i) => row.log_probs?.[i] ?? null,
    said: "log-prob of the token when it was drawn, in nats",
    none: "No log-probs were recorded.",
    low: "surprising",
    high: "certain",
    oneSided: true,
  },
};

const browser = { run: 0, shown: [], chosen: 0, token: -1 };
const mode = () => document.querySelector("input[name=colour]:checked").value;

function difference(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : null;
}

function number(x, digits = 3) {
  if (typeof x !== "number") return "–";
  return (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x).toFixed(digits);
}

function files() {
  return DATA.runs[browser.run].samples;
}

// A round number that most values of a run lie within, so that its rollouts can be compared. The
// others have the colour of its ends: a few mistakes must not pale all the rest.
const scales = new Map();
function scaleOf(name) {
  const key = `${browser.run} ${name}`;
  if (!scales.has(key)) {
    const sizes = [];
    for (const { rows } of files())
      for (const row of rows)
        for (let i = 0; i < (row.tokens?.length ?? 0); i++) {
          const value = COLOURS[name].of(row, i);
          if (value !== null) sizes.push(Math.abs(value));
        }
    const large = sizes.sort((a, b) => a - b)[Math.floor(0.95 * (sizes.length - 1))] ?? 0;
    scales.set(key, [1, 2, 5, 10, 20, 50].find((x) => x >= large) ?? 100);
  }
  return scales.get(key);
}

function fillRun() {
  const all = files();
  const slider = $("sample-step");
  slider.max = Math.max(all.length - 1, 0);
  slider.value = slider.max;
  slider.disabled = all.length < 2;
  const found = new Set(all.flatMap(({ rows }) => rows.map((row) => row.outcome)));
  const before = $("outcome").value;
  $("outcome").replaceChildren(option("", "any"), ...[...found].sort().map((x) => option(x, x)));
  $("outcome").value = found.has(before) ? before : "";
}

function matches(row) {
  const text = $("search").value.trim().toLowerCase();
  const reward = $("reward").value;
  if ($("outcome").value && row.outcome !== $("outcome").value) return false;
  if (reward && row.reward > 0 !== (reward === "1")) return false;
  return !text || `${row.problem}\n${row.answer}\n${row.completion}`.toLowerCase().includes(text);
}

function verdict(row) {
  const kind = row.outcome === "correct" ? "correct" : "other";
  return make("span", `verdict ${kind}`, OUTCOMES[row.outcome] ?? String(row.outcome));
}

function fillList() {
  const all = files();
  const slider = $("sample-step");
  const file = all[Number(slider.value)];
  const every = $("all-steps").checked;
  slider.disabled = every || all.length < 2;
  $("sample-step-shown").textContent = every ? "all" : (file?.step ?? "–");
  slider.setAttribute("aria-valuetext", `step ${file?.step}`);
  const asked = every ? all : file ? [file] : [];
  const rows = asked.flatMap(({ step, rows }) => rows.map((row) => ({ step, row })));
  const found = rows.filter(({ row }) => matches(row));
  browser.shown = found.slice(0, MOST_LISTED);
  const more = found.length > MOST_LISTED ? `, the first ${MOST_LISTED} listed` : "";
  $("count").textContent = `${found.length} of ${rows.length} rollouts${more}`;
  $("list").replaceChildren(
    ...browser.shown.map(({ step, row }, i) => {
      const where = every ? `step ${step} · ` : "";
      const facts = `${where}#${row.sample ?? 0} · reward ${row.reward} · ${row.length} tokens`;
      const said = make("span", "said", row.problem);
      const button = make("button", "", verdict(row), ` ${facts}`, said);
      button.type = "button";
      button.addEventListener("click", () => choose(i));
      return make("li", "", button);
    }),
  );
  choose(Math.min(browser.chosen, browser.shown.length - 1), false);
}

function choose(i, byHand = true) {
  browser.chosen = Math.max(i, 0);
  browser.token = -1;
  const entry = browser.shown[i];
  $("detail").hidden = !entry;
  [...$("list").children].forEach((item, j) => item.firstChild.setAttribute("aria-current", i === j));
  if (!entry) return;
  const { step, row } = entry;
  const facts = [
    ["step", step],
    ["problem", `${row.id ?? "?"} #${row.sample ?? 0}`],
    ["reward", row.reward],
    ...Object.entries(row).filter(([name]) => name.startsWith("reward/")),
    ["tokens", `${row.length}${row.finish_reason === "length" ? ", cut" : ""}`],
  ];
  if (typeof row.advantage === "number") facts.push(["advantage", number(row.advantage)]);
  if (row.trained === false) facts.push(["not", "trained on"]);
  if (row.teacher_log_probs) facts.push(["distilled", row.distilled ? "yes" : "no, masked"]);
  $("facts").replaceChildren(
    verdict(row),
    ...facts.map(([name, value]) => make("span", "fact", `${name} `, make("b", "", String(value)))),
  );
  $("problem").textContent = row.problem;
  $("answer").textContent = row.answer;
  fillTokens(row);
  const narrow = matchMedia("(max-width: 48rem)").matches;
  if (byHand && narrow) $("detail").scrollIntoView({ block: "start" });
}

function fillTokens(row) {
  const pieces = row.tokens ?? [row.completion];
  const last = row.finish_reason === "eos" ? pieces.length - 1 : -1;
  $("completion").replaceChildren(
    ...pieces.map((piece, i) => {
      const mark = piece ? "" : i === last ? " end" : " empty";
      const token = make("span", row.tokens ? `t${mark}` : "", piece);
      if (row.tokens) token.dataset.i = i;
      return token;
    }),
  );
  for (const input of document.querySelectorAll("input[name=colour]")) input.disabled = !row.tokens;
  paint();
}

function paint() {
  const entry = browser.shown[browser.chosen];
  if (!entry) return;
  const { row } = entry;
  const by = row.tokens ? COLOURS[mode()] : undefined;
  const tokens = [...$("completion").children];
  const values = tokens.map((_, i) => (by ? by.of(row, i) : null));
  const none = values.every((value) => value === null);
  const limit = by && !none ? scaleOf(mode()) : 1;
  tokens.forEach((token, i) => {
    const value = values[i];
    const amount = Math.min(Math.abs(value ?? 0) / limit, 1) * STRONGEST;
    token.classList.toggle("plus", value !== null && value > 0);
    token.classList.toggle("minus", value !== null && value < 0);
    token.style.setProperty("--amount", `${amount.toFixed(1)}%`);
  });
  $("scale").hidden = !by || none;
  $("scale-said").textContent = !row.tokens
    ? "Nothing was recorded of this rollout's tokens."
    : by
      ? none
        ? by.none
        : by.said
      : "";
  if (by && !none) {
    const end = (name) => `color-mix(in srgb, var(${name}) ${STRONGEST}%, transparent)`;
    $("scale-low").textContent = `≤ ${number(-limit, 0)} ${by.low}`;
    $("scale-high").textContent = `${by.oneSided ? "0" : `≥ ${number(limit, 0)}`} ${by.high}`;
    const right = by.oneSided ? "transparent" : `transparent, ${end("--plus")}`;
    $("scale").querySelector("i").style.background = `linear-gradient(to right, ${end("--minus")}, ${right})`;
  }
  read(browser.token);
}

function read(i) {
  const row = browser.shown[browser.chosen]?.row;
  const tokens = $("completion").children;
  if (browser.token >= 0) tokens[browser.token]?.classList.remove("here");
  browser.token = row?.tokens && i >= 0 ? Math.min(i, tokens.length - 1) : -1;
  if (browser.token < 0) {
    $("readout").textContent = row?.tokens ? "Point at a token, or use the arrow keys in the text." : "";
    return;
  }
  i = browser.token;
  tokens[i].classList.add("here");
  const piece = row.tokens[i] ? JSON.stringify(row.tokens[i]).slice(1, -1) : tokens[i].classList.contains("end") ? "end" : "part of a character, or a special token";
  const teacher = row.teacher_log_probs?.[i];
  const facts = [
    `token ${i + 1} of ${row.tokens.length}`,
    `student ${number(row.log_probs?.[i])}`,
    `teacher ${number(teacher)}`,
    `log-ratio ${number(difference(row.log_probs?.[i], teacher))}`,
    `advantage ${number(row.advantage)}`,
  ];
  $("readout").replaceChildren(make("code", "", piece), ...facts.map((fact) => make("span", "", fact)));
}

function startSamples() {
  DATA.runs.forEach((run, i) => {
    if (run.samples.length) $("sample-run").append(option(i, run.name));
  });
  browser.run = Number($("sample-run").value);
  $("sample-run").addEventListener("change", () => {
    browser.run = Number($("sample-run").value);
    fillRun();
    fillList();
  });
  for (const id of ["sample-step", "search"]) $(id).addEventListener("input", fillList);
  for (const id of ["outcome", "reward", "all-steps"]) $(id).addEventListener("change", fillList);
  $("colours").addEventListener("change", paint);
  const at = (event) => {
    const token = event.target.closest?.(".t");
    if (token) read(Number(token.dataset.i));
  };
  $("completion").addEventListener("pointerover", at);
  $("completion").addEventListener("click", at);
  $("completion").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || event.shiftKey) return;
    event.preventDefault();
    read(Math.max(browser.token + step, 0));
    $("completion").children[browser.token]?.scrollIntoView({ block: "nearest" });
  });
  fillRun();
  fillList();
}

if ($("samples")) startSamples();
