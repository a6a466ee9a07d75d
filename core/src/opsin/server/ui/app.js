// The playground: pictures and a question in, the answer streamed. Talks to the same API as any other client.
// No markup is ever made from text: everything shown goes through textContent.

const find = (id) => document.getElementById(id);
const api = (path) => new URL(path, document.baseURI).href;
const KEY = "opsin-api-key";
const LEAST_FOR_A_RATE = 10; // few tokens come in one piece, and their rate would be that of the network

/** @type {{name: string, url: string}[]} pictures attached to the next question */
let pictures = [];
/** @type {AbortController | null} of the question being answered */
let running = null;

// --- the server -----------------------------------------------------------------------------------

class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(api(path), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const message = body?.error?.message ?? `The server answered with status ${response.status}.`;
  throw new ServerError(response.status, message);
}

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
      askForKey(sessionStorage.getItem(KEY) ? "The server does not accept this key." : undefined);
    } else if (error.status === 503) {
      status.classList.remove("bad");
      status.textContent = "The model is loading …";
      setTimeout(connect, 1000);
    } else {
      setTimeout(connect, 5000);
    }
  }
}

/** The JSON objects of a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// --- pictures -------------------------------------------------------------------------------------

function asDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function attach(files) {
  const usable = [...files].filter((file) => file.type.startsWith("image/"));
  problem(usable.length < files.length ? "Only pictures can be attached." : "");
  for (const file of usable) {
    pictures.push({ name: unusedName(file.name || "picture.png"), url: await asDataUrl(file) });
  }
  showPictures();
}

/** Pasted pictures all have one name; in the Python code each is a file. */
function unusedName(name) {
  const [, stem, ending] = /^(.*?)(\.[^.]*)?$/.exec(name);
  const taken = new Set(pictures.map((picture) => picture.name));
  let free = name;
  for (let number = 2; taken.has(free); number++) free = `${stem}-${number}${ending ?? ""}`;
  return free;
}

function showPictures() {
  find("pictures").replaceChildren(
    ...pictures.map((picture) => {
      const item = find("picture-template").content.cloneNode(true);
      const image = item.querySelector("img");
      const size = item.querySelector(".size");
      image.src = picture.url;
      image.alt = picture.name;
      image.onload = () => (size.textContent = `${image.naturalWidth} × ${image.naturalHeight}`);
      item.querySelector(".name").textContent = item.querySelector(".name").title = picture.name;
      const remove = item.querySelector(".remove");
      remove.setAttribute("aria-label", `Remove ${picture.name}`);
      remove.onclick = () => {
        pictures = pictures.filter((other) => other !== picture);
        showPictures();
        find("choose").focus();
      };
      return item;
    }),
  );
}

const COLOURS = { red: "#d71e23", green: "#1e9632", blue: "#2346d7", yellow: "#f5dc28", purple: "#8728aa" };
const SHAPES = {
  circle: (pen, x, y, r) => pen.arc(x, y, r, 0, 2 * Math.PI),
  square: (pen, x, y, r) => pen.rect(x - 0.7 * r, y - 0.7 * r, 1.4 * r, 1.4 * r),
  triangle: (pen, x, y, r) => {
    for (const turn of [0, 1, 2]) {
      const angle = (turn / 3) * 2 * Math.PI - Math.PI / 2;
      pen.lineTo(x + r * Math.cos(angle), y + r * Math.sin(angle));
    }
  },
};

/** A shape on a plain ground, and a question about it. */
function drawExample() {
  const pick = (things) => things[Math.floor(Math.random() * things.length)];
  const shape = pick(Object.keys(SHAPES));
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 112;
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#8c8c8c";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.beginPath();
  SHAPES[shape](pen, 56, 56, 26);
  pen.closePath();
  pen.fillStyle = pick(Object.values(COLOURS));
  pen.fill();
  pictures = [{ name: "example.png", url: canvas.toDataURL("image/png") }];
  showPictures();
  find("question").value = `What colour is the ${shape}?`;
  find("question").focus();
}

// --- asking ---------------------------------------------------------------------------------------

function problem(text) {
  find("problem").textContent = text;
}

function currentTurn() {
  return {
    model: find("model").value,
    question: find("question").value.trim(),
    pictures: [...pictures],
    maxTokens: find("max-tokens").valueAsNumber,
    temperature: find("temperature").valueAsNumber,
  };
}

function body(turn) {
  const parts = turn.pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return {
    model: turn.model,
    messages: [{ role: "user", content: [...parts, { type: "text", text: turn.question }] }],
    ...(Number.isNaN(turn.maxTokens) ? {} : { max_tokens: turn.maxTokens }),
    ...(Number.isNaN(turn.temperature) ? {} : { temperature: turn.temperature }),
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function ask() {
  const turn = currentTurn();
  problem(turn.question ? "" : "Write a question first.");
  if (!turn.question || find("send").disabled) return;
  const card = addCard(turn);
  running = new AbortController();
  find("send").disabled = true;
  find("stop").hidden = false;
  try {
    await answer(turn, card, running.signal);
  } catch (error) {
    card.classList.add(error.name === "AbortError" ? "stopped" : "failed");
    const figures = card.querySelector(".figures");
    if (error.name === "AbortError") {
      figures.textContent = [figures.textContent, "stopped"].filter(Boolean).join(" · ");
    } else {
      card.querySelector(".text").append(error.message);
      find("announcer").textContent = `Failed: ${error.message}`;
    }
    if (error.status === 401) askForKey("The server does not accept this key.");
  } finally {
    card.classList.remove("running");
    running = null;
    find("send").disabled = false;
    find("stop").hidden = true;
  }
}

async function answer(turn, card, signal) {
  const text = card.querySelector(".text");
  const figures = card.querySelector(".figures");
  const start = performance.now();
  const seconds = (from, to) => ((to - from) / 1000).toFixed(2);
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body(turn)),
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
      figures.textContent = `first after ${seconds(start, first)} s`;
    }
    text.append(choice.delta.content);
  }
  const end = performance.now();
  const shown = [];
  if (usage) shown.push(`${usage.prompt_tokens} prompt and ${usage.completion_tokens} answer tokens`);
  if (first !== null) shown.push(`first after ${seconds(start, first)} s`);
  shown.push(`all after ${seconds(start, end)} s`);
  if (usage?.completion_tokens >= LEAST_FOR_A_RATE && end > first) {
    shown.push(`${Math.round(((usage.completion_tokens - 1) / (end - first)) * 1000)} tokens/s`);
  }
  if (reason === "length") shown.push("cut off at the most tokens");
  figures.textContent = shown.join(" · ");
  find("announcer").textContent = `Answer: ${text.textContent}`;
}

function addCard(turn) {
  const item = find("answer-template").content.cloneNode(true);
  const card = item.querySelector("article");
  card.classList.add("running");
  card.querySelector(".asked").textContent = turn.question;
  card.querySelector(".thumbs").append(
    ...turn.pictures.map(({ name, url }) => Object.assign(new Image(), { src: url, alt: name })),
  );
  card.querySelector(".show-code").onclick = () => {
    find("code").textContent = python(turn);
    find("copied").textContent = "";
    find("code-dialog").showModal();
  };
  find("empty").hidden = true;
  find("answers").prepend(item);
  return card;
}

// --- the same from Python -------------------------------------------------------------------------

/** A JSON string is a Python string, too. */
const quoted = (text) => JSON.stringify(text);

function python(turn) {
  const key = sessionStorage.getItem(KEY);
  const imports = [turn.pictures.length && "import base64", key && "import os"].filter(Boolean);
  const lines = [...imports, ...(imports.length ? [""] : []), "from openai import OpenAI", ""];
  const keyCode = key ? 'os.environ["OPENAI_API_KEY"]' : '"none"';
  lines.push(`client = OpenAI(base_url=${quoted(api("v1"))}, api_key=${keyCode})`, "");
  if (turn.pictures.length) {
    lines.push(
      "",
      "def picture(path):",
      '    with open(path, "rb") as file:',
      "        data = base64.b64encode(file.read()).decode()",
      '    return {"type": "image_url", "image_url": {"url": f"data:;base64,{data}"}}',
      "",
      "",
    );
  }
  lines.push(
    "stream = client.chat.completions.create(",
    `    model=${quoted(turn.model)},`,
    "    messages=[",
    "        {",
    '            "role": "user",',
    '            "content": [',
    ...turn.pictures.map(({ name }) => `                picture(${quoted(name)}),`),
    `                {"type": "text", "text": ${quoted(turn.question)}},`,
    "            ],",
    "        }",
    "    ],",
  );
  if (!Number.isNaN(turn.maxTokens)) lines.push(`    max_tokens=${turn.maxTokens},`);
  if (!Number.isNaN(turn.temperature)) lines.push(`    temperature=${turn.temperature},`);
  lines.push(
    "    stream=True,",
    ")",
    "for chunk in stream:",
    '    print(chunk.choices[0].delta.content or "", end="", flush=True)',
    "print()",
    "",
  );
  return lines.join("\n");
}

async function copyCode() {
  const code = find("code");
  let done = true;
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    // Pages that came over plain http from another machine have no clipboard: select it, and try the old way.
    getSelection().selectAllChildren(code);
    done = document.execCommand("copy");
  }
  find("copied").textContent = done ? "Copied" : "Selected: press Ctrl C";
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

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
find("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
find("stop").addEventListener("click", () => running?.abort());
find("choose").addEventListener("click", () => find("files").click());
find("files").addEventListener("change", async ({ target }) => {
  await attach(target.files);
  target.value = "";
});
find("draw").addEventListener("click", drawExample);
find("copy").addEventListener("click", copyCode);
find("key-button").addEventListener("click", () => askForKey());
find("key-dialog").addEventListener("close", ({ target }) => {
  if (target.returnValue !== "use") return;
  sessionStorage.setItem(KEY, find("key").value.trim());
  connect();
});

// The whole page takes drops: a picture that misses the field would else replace the page.
addEventListener("dragover", (event) => {
  event.preventDefault();
  find("drop").classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) find("drop").classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  find("drop").classList.remove("over");
  attach(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  attach(event.clipboardData.files);
});

connect();
