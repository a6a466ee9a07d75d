// The playground: a conversation about pictures and videos. It talks to the same API as any other client.

import * as attachments from "./attachments.js";
import { body, python } from "./chat.js";
import { show } from "./markdown.js";
import { events, Interrupted, key, request, ServerError, setKey } from "./server.js";
import * as store from "./store.js";

const find = (id) => document.getElementById(id);
const LEAST_FOR_A_RATE = 100; // milliseconds: what comes in one piece has the rate of the network
const NEAR_THE_END = 120; // pixels: whoever has scrolled further up reads there

/** @type {import("./chat.js").Turn[]} */
let turns = [];
/** @type {AbortController | null} of the question being answered */
let running = null;

// --- the server -----------------------------------------------------------------------------------

async function connect() {
  const status = find("status");
  status.classList.remove("good", "bad");
  try {
    const { data } = await (await request("v1/models")).json();
    find("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
    find("model").disabled = data.length < 2;
    // The field is opsin's own; other servers with this API leave it out.
    const answers = data.every(({ task }) => task !== "embed");
    status.textContent = answers ? "Ready" : "This server makes embeddings, not answers";
    status.classList.toggle("good", answers);
    find("send").disabled = !answers;
  } catch (error) {
    status.classList.add("bad");
    status.textContent = error.message;
    if (error.status === 401) {
      status.textContent = "An API key is needed";
      askForKey(key() ? "The server does not accept this key." : undefined);
    } else if (error.status === 503) {
      status.classList.remove("bad");
      status.textContent = "The model is loading …";
      setTimeout(connect, 1000);
    } else {
      setTimeout(connect, 5000);
    }
  }
}

// --- asking ---------------------------------------------------------------------------------------

function problem(text) {
  find("problem").textContent = text;
}

function settings() {
  const number = (id) => (Number.isNaN(find(id).valueAsNumber) ? null : find(id).valueAsNumber);
  return { system: find("system").value.trim(), temperature: number("temperature"), maxTokens: number("max-tokens") };
}

async function ask() {
  const question = find("question").value.trim();
  const damaged = attachments.broken();
  if (!question || damaged.length) {
    problem(question ? `Remove ${damaged.join(" and ")} first.` : "Write a question first.");
    return;
  }
  if (find("send").disabled) return;
  problem("");
  const turn = { question, attached: attachments.current(), answer: "", state: "running", figures: "" };
  attachments.replace([]);
  find("question").value = "";
  fit();
  await run(turn);
}

async function run(turn) {
  turns.push(turn);
  keep();
  const card = addCard(turn);
  requestAnimationFrame(() => {
    atEnd = true;
    keepEnd();
  });
  running = new AbortController();
  find("send").disabled = true;
  find("stop").hidden = false;
  try {
    await answer(turn, card, running.signal);
    turn.state = "done";
    find("announcer").textContent = `Answer: ${turn.answer}`;
  } catch (error) {
    if (error.name === "AbortError") turn.state = "stopped";
    else turn.state = error instanceof Interrupted ? "interrupted" : "failed";
    turn.fault = turn.state === "stopped" ? "Stopped" : error.message;
    find("announcer").textContent = `${turn.state === "failed" ? "Failed: " : ""}${turn.fault}`;
    if (error.status === 401) askForKey("The server does not accept this key.");
  } finally {
    running = null;
    find("send").disabled = false;
    find("stop").hidden = true;
    update(card, turn);
    keep();
  }
}

async function answer(turn, card, signal) {
  const start = performance.now();
  const seconds = (from, to) => ((to - from) / 1000).toFixed(2);
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body(find("model").value, turns, settings())),
    signal,
  });
  let first = null;
  let usage = null;
  let reason = null;
  for await (const event of events(response)) {
    if (event.error) throw new ServerError(500, event.error.message);
    usage = event.usage ?? usage;
    const [choice] = event.choices;
    if (!choice) continue;
    reason = choice.finish_reason ?? reason;
    if (!choice.delta.content) continue;
    if (first === null) {
      first = performance.now();
      turn.figures = `first after ${seconds(start, first)} s`;
    }
    turn.answer += choice.delta.content;
    updateSoon(card, turn);
  }
  const end = performance.now();
  const shown = [];
  if (usage) shown.push(`${usage.prompt_tokens} prompt and ${usage.completion_tokens} answer tokens`);
  if (first !== null) shown.push(`first after ${seconds(start, first)} s`);
  shown.push(`all after ${seconds(start, end)} s`);
  if (usage && first !== null && end - first >= LEAST_FOR_A_RATE) {
    shown.push(`${Math.round(((usage.completion_tokens - 1) / (end - first)) * 1000)} tokens/s`);
  }
  if (reason === "length") shown.push("cut off at the most tokens");
  turn.figures = shown.join(" · ");
}

// --- what is shown --------------------------------------------------------------------------------

function addCard(turn) {
  const made = find("turn-template").content.cloneNode(true);
  const card = made.querySelector("article");
  card.querySelector(".asked").textContent = turn.question;
  card.querySelector(".thumbs").append(...turn.attached.map((each) => attachments.preview(each)));
  card.querySelector(".show-code").onclick = () => {
    find("code").textContent = python(find("model").value, turns.slice(0, turns.indexOf(turn) + 1), settings());
    find("copied").textContent = "";
    find("code-dialog").showModal();
  };
  card.querySelector(".copy-answer").onclick = ({ target }) => copy(turn.answer, target);
  card.querySelector(".retry").onclick = () => {
    if (running) return;
    turns.pop();
    card.closest("li").remove();
    run({ ...turn, answer: "", state: "running", figures: "", fault: undefined });
  };
  find("empty").hidden = true;
  find("turns").append(made);
  update(card, turn);
  return card;
}

const page = document.documentElement;
/** Whether the end of the page is in view; it is kept there while answers and attachments grow. */
let atEnd = true;

function keepEnd() {
  if (atEnd) page.scrollTop = page.scrollHeight;
}

function update(card, turn) {
  card.className = turn.state;
  show(card.querySelector(".text"), turn.answer);
  card.querySelector(".fault").textContent = turn.fault ?? "";
  card.querySelector(".figures").textContent = turn.figures;
  card.querySelector(".copy-answer").hidden = !turn.answer;
}

let planned = 0;
let pause = 0;

/** Long answers are parsed anew with every piece: at most a quarter of the time goes there. */
function updateSoon(card, turn) {
  planned ||= setTimeout(() => {
    planned = 0;
    if (turn.state !== "running") return;
    const start = performance.now();
    update(card, turn);
    pause = Math.max(16, 3 * (performance.now() - start));
  }, pause);
}

/** The field grows with the question, up to a third of the window. */
function fit() {
  const field = find("question");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight / 3)}px`;
}

async function copy(text, button) {
  const label = button.textContent;
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages that came over plain http from another machine have no clipboard: try the old way.
    const field = Object.assign(document.createElement("textarea"), { value: text });
    (button.closest("dialog") ?? document.body).append(field);
    field.select();
    done = document.execCommand("copy");
    field.remove();
  }
  button.textContent = done ? "Copied" : "Not copied";
  setTimeout(() => (button.textContent = label), 1500);
  return done;
}

// --- what is kept ---------------------------------------------------------------------------------

const keep = () => store.save({ turns, settings: settings() });

async function restore() {
  const kept = await store.load();
  if (!kept) return;
  find("system").value = kept.settings.system;
  find("temperature").value = kept.settings.temperature ?? "";
  find("max-tokens").value = kept.settings.maxTokens ?? "";
  for (const turn of kept.turns) {
    // The page was left while it was being answered.
    if (turn.state === "running") Object.assign(turn, { state: "interrupted", fault: "The page was reloaded." });
    turns.push(turn);
    addCard(turn);
  }
}

function startAnew() {
  running?.abort();
  turns = [];
  find("turns").replaceChildren();
  find("empty").hidden = false;
  problem("");
  store.forget();
  find("question").focus();
}

// --- the key --------------------------------------------------------------------------------------

function askForKey(text) {
  find("key-text").textContent =
    text ?? "This server wants a key. It stays in this tab and is forgotten when you close it.";
  find("key").value = "";
  find("key-dialog").returnValue = ""; // else Escape would say what the last button said
  if (!find("key-dialog").open) find("key-dialog").showModal();
}

// --- what happens when ----------------------------------------------------------------------------

attachments.onChange(() => problem(""));
find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
find("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
find("question").addEventListener("input", fit);
find("stop").addEventListener("click", () => running?.abort());
find("new").addEventListener("click", startAnew);
find("settings-button").addEventListener("click", () => find("settings-dialog").showModal());
find("settings-dialog").addEventListener("close", keep);
find("choose").addEventListener("click", () => find("files").click());
find("files").addEventListener("change", async ({ target }) => {
  problem(await attachments.attach(target.files));
  target.value = "";
});
find("draw").addEventListener("click", () => {
  find("question").value = attachments.drawExample();
  fit();
  find("question").focus();
});
find("copy").addEventListener("click", async ({ target }) => {
  find("copied").textContent = (await copy(find("code").textContent, target)) ? "Copied" : "";
});
find("turns").addEventListener("click", ({ target }) => {
  if (target.matches(".copy-code")) copy(target.closest(".code").querySelector("pre").textContent, target);
});
find("key-button").addEventListener("click", () => askForKey());
find("key-dialog").addEventListener("close", ({ target }) => {
  if (target.returnValue !== "use") return;
  setKey(find("key").value.trim());
  connect();
});

// The whole page takes drops: a picture that misses the field would else replace the page.
addEventListener("dragover", (event) => {
  event.preventDefault();
  if (event.dataTransfer.types.includes("Files")) find("ask").classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) find("ask").classList.remove("over");
});
addEventListener("drop", async (event) => {
  event.preventDefault();
  find("ask").classList.remove("over");
  if (event.dataTransfer.files.length) problem(await attachments.attach(event.dataTransfer.files));
});
addEventListener("paste", async (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  problem(await attachments.attach(event.clipboardData.files));
});

let lastTop = 0;
addEventListener("scroll", () => {
  if (page.scrollHeight - page.clientHeight - page.scrollTop < NEAR_THE_END) atEnd = true;
  else if (page.scrollTop < lastTop) atEnd = false; // somebody reads further up
  lastTop = page.scrollTop;
});
for (const id of ["ask", "turns"]) new ResizeObserver(keepEnd).observe(find(id));

await restore();
connect();
