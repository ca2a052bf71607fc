// What goes to the server and comes back. Addresses are relative, so a proxy may add a path.

/** What the server or this page has to say against a request: about its part ``param``, or to wait ``waitS``. */
export class Refusal extends Error {
  constructor(message, { param = null, waitS = 0 } = {}) {
    super(waitS ? `${message.replace(/[^.]$/, "$&.")} Try again in ${waitS} s.` : message);
    this.param = param;
    this.waitS = waitS;
  }
}

/** The server wants a key, or another one. */
export class KeyRefusal extends Refusal {
  constructor(key) {
    super(key ? "This server does not know that API key." : "This server asks for an API key: write it into the field.");
  }
}

/** JSON as the server reads it: JavaScript writes 1.0 as 1, which would be one token and not all. */
const wire = (body) => JSON.stringify(body).replace('"token_budget":1,', '"token_budget":1.0,');

/** The response to ``body``, or to nothing, with the key if there is one; throws Refusal. */
export async function request(path, { key, body, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && wire(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. Check that it runs, then try again.");
  }
  if (response.ok) return response;
  if (response.status === 401) throw new KeyRefusal(key);
  const { error } = await response.json().catch(() => ({})); // its own words name what is wrong and the mend
  const message = error?.message ?? `The server answered with status ${response.status}.`;
  throw new Refusal(message, { param: error?.param, waitS: Number(response.headers.get("Retry-After") ?? 0) });
}

/** The JSON of each event of a stream, until it ends as it should. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", ended = false;
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done && ended) return;
    if (done) throw new Refusal("The connection broke off before the answer ended. Try again.");
    const lines = (text + value).split(/\r?\n/);
    text = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") ended = true;
      else if (data) yield JSON.parse(data);
    }
  }
}
