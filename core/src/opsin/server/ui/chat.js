// A conversation: its turns, what is sent of it, and the same from Python.

import { api, key } from "./server.js";

/**
 * @typedef {object} Turn
 * @property {string} question
 * @property {import("./attachments.js").Attachment[]} attached
 * @property {string} answer as far as it came
 * @property {"running" | "done" | "stopped" | "interrupted" | "failed"} state
 * @property {string} figures token counts and timings
 * @property {string} [fault] why it failed or was interrupted
 */

/** A failed turn is shown, and not part of what the model is told. */
const told = (turns) => turns.filter(({ state, answer }) => state === "running" || (state !== "failed" && answer));

function part({ kind, url }) {
  return { type: `${kind}_url`, [`${kind}_url`]: { url } };
}

function messages(turns, settings) {
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  return told(turns).reduce(
    (list, { question, attached, answer, state }) => [
      ...list,
      { role: "user", content: [...attached.map(part), { type: "text", text: question }] },
      ...(state === "running" ? [] : [{ role: "assistant", content: answer }]),
    ],
    system,
  );
}

/**
 * What is sent about sampling. A temperature acts only where more than the best token may be taken, and many
 * checkpoints ask for top_k 1: whoever sets a temperature above 0 means it, so both limits are lifted.
 */
function sampling({ temperature, maxTokens }) {
  return {
    ...(maxTokens === null ? {} : { max_tokens: maxTokens }),
    ...(temperature === null ? {} : { temperature }),
    ...(temperature > 0 ? { top_p: 1, top_k: 0 } : {}),
  };
}

/** The body of a request for the last of these turns. */
export function body(model, turns, settings) {
  return {
    model,
    messages: messages(turns, settings),
    ...sampling(settings),
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** A JSON string is a Python string, too. */
const quoted = (text) => JSON.stringify(text);

/** Python code that asks for the last of these turns, with the official client. */
export function python(model, turns, settings) {
  const asked = told(turns.map((turn, index) => (index === turns.length - 1 ? { ...turn, state: "running" } : turn)));
  const files = asked.some(({ attached }) => attached.length);
  const imports = [files && "import base64", files && "import mimetypes", key() && "import os"].filter(Boolean);
  const lines = [...imports, ...(imports.length ? [""] : []), "from openai import OpenAI", ""];
  const keyCode = key() ? 'os.environ["OPENAI_API_KEY"]' : '"none"';
  lines.push(`client = OpenAI(base_url=${quoted(api("v1"))}, api_key=${keyCode})`, "");
  if (files) {
    lines.push(
      "",
      "def media(path):",
      '    kind = mimetypes.guess_type(path)[0] or "image/png"',
      '    name = "video_url" if kind.startswith("video/") else "image_url"',
      '    with open(path, "rb") as file:',
      "        data = base64.b64encode(file.read()).decode()",
      '    return {"type": name, name: {"url": f"data:{kind};base64,{data}"}}',
      "",
      "",
    );
  }
  lines.push("stream = client.chat.completions.create(", `    model=${quoted(model)},`, "    messages=[");
  if (settings.system) lines.push(`        {"role": "system", "content": ${quoted(settings.system)}},`);
  for (const { question, attached, answer, state } of asked) {
    const shown = attached.map(({ name }) => `media(${quoted(name)})`);
    const parts = [...shown, `{"type": "text", "text": ${quoted(question)}}`];
    lines.push("        {", '            "role": "user",', '            "content": [');
    lines.push(...parts.map((each) => `                ${each},`), "            ],", "        },");
    if (state !== "running") lines.push(`        {"role": "assistant", "content": ${quoted(answer)}},`);
  }
  lines.push("    ],");
  const { top_k: topK, ...standard } = sampling(settings);
  lines.push(...Object.entries(standard).map(([name, value]) => `    ${name}=${value},`));
  if (topK !== undefined) lines.push(`    extra_body={"top_k": ${topK}},`);
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
