// Requests to the node, with the API key if there is one, and with the guard header for changes.
const GUARD = "X-Mesh-LLM-Console";
let key = sessionStorage.getItem("key") || "";

export function useKey(text) {
  key = text;
  sessionStorage.setItem("key", key);
}

export async function request(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) document.getElementById("key-form").hidden = false;
  let text = `status ${response.status}`;
  try {
    text = (await response.json()).error.message;
  } catch {
    // The body is not JSON: show the status code.
  }
  throw new Error(text);
}

// The data lines of an event stream.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6).replace(/\r$/, "");
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export async function change(path, body) {
  const headers = { "Content-Type": "application/json", [GUARD]: "1" };
  return (await request(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}
