// What the page asks the server. Every answer that is no success has a line in `error`.

export const LEAST = 0.05; // lowest score that is asked for; the slider chooses among what came

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const token = () => sessionStorage.getItem("token") ?? "";

export function useToken(value) {
  sessionStorage.setItem("token", value);
}

async function answer(path, options = {}) {
  const headers = token() ? { Authorization: `Bearer ${token()}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer: is it still running?", 0);
  }
  const content = await response.json().catch(() => ({}));
  if (!response.ok) throw new ServerError(content.error ?? `The server answered ${response.status}.`, response.status);
  return content;
}

export const health = () => answer("/health");
export const examples = () => answer("/page/examples/examples.json");

// A name with a comma or a quote in it stands in double quotes.
const quoted = (name) => (/[",]/.test(name) ? `"${name.replaceAll('"', '""')}"` : name);

export function detect(file, names, signal) {
  const body = new FormData();
  body.append("image", file, file.name || "image");
  body.append("names", names.map(quoted).join(","));
  body.append("threshold", LEAST);
  return answer("/detect", { method: "POST", body, signal });
}
