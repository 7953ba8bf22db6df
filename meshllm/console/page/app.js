// State comes by server-sent events; everything is drawn from the newest one.
import { startChat } from "./chat.js";
import { draw } from "./view.js";

const GUARD = "X-Mesh-LLM-Console";
let key = sessionStorage.getItem("key") || "";
let chosen = "";
let status = null;

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
    // no JSON: the status has to do
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

function say(text, kind) {
  const state = document.getElementById("state");
  if (state.textContent !== text) state.textContent = text;
  state.className = kind;
}

function redraw() {
  if (!status) return;
  const served = status.served;
  if (!served.includes(chosen)) chosen = served[0] || "";
  draw(status, chosen, (name) => {
    chosen = name;
    redraw();
  });
  say(served.length ? "ready" : status.reason, served.length ? "good" : "bad");
}

async function follow() {
  for (;;) {
    try {
      for await (const data of events(await request("api/events"))) {
        status = JSON.parse(data);
        redraw();
      }
      say("the node has closed the connection", "bad");
    } catch (error) {
      say(`no connection to the node: ${error.message}`, "bad");
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

export async function change(path, body) {
  const headers = { "Content-Type": "application/json", [GUARD]: "1" };
  return (await request(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

document.getElementById("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = document.getElementById("key").value;
  sessionStorage.setItem("key", key);
  document.getElementById("key-form").hidden = true;
});
startChat(() => chosen);
follow();
