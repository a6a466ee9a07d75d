// The server: requests with the key of this tab, and streams of events.

const KEY = "opsin-api-key";

export const api = (path) => new URL(path, document.baseURI).href;
export const key = () => sessionStorage.getItem(KEY);
export const setKey = (text) => sessionStorage.setItem(KEY, text);

export class ServerError extends Error {
  /** @param {number} status of the answer; 0 where there was none */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** A stream that ended before the answer did. */
export class Interrupted extends Error {}

export async function request(path, options = {}) {
  const headers = { ...options.headers, ...(key() ? { Authorization: `Bearer ${key()}` } : {}) };
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

/** The JSON objects of a stream of server-sent events, up to the one that says that all is done. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Interrupted("The connection was lost.");
    }
    if (piece.done) throw new Interrupted("The server ended the connection.");
    const lines = (rest + piece.value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
