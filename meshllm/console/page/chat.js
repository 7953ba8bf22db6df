// The conversation: streamed, and stoppable. After a failure the user can send again.
import { element, markdown } from "./markdown.js";
import { events, request } from "./api.js";

const log = document.getElementById("log");
const ask = document.getElementById("ask");
const send = document.getElementById("send");
const stop = document.getElementById("stop");
let messages = [];
let running = null;

function turn(kind, ...content) {
  const made = element("div", { class: `turn ${kind}` }, ...content);
  log.append(made);
  log.scrollTop = log.scrollHeight;
  return made;
}

async function answer(model, control) {
  const shown = turn("assistant", "…");
  let text = "";
  try {
    const response = await request("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model, messages, stream: true }),
      signal: control.signal,
    });
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const part = JSON.parse(data);
      if (part.error) throw new Error(part.error.message);
      const delta = part.choices?.[0]?.delta?.content;
      if (!delta) continue;
      text += delta;
      const low = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
      shown.replaceChildren(...markdown(text));
      if (low) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    if (!control.signal.aborted) turn("error", `${error.message || error} – send again to retry.`);
  }
  if (text) messages.push({ role: "assistant", content: text });
  else shown.remove();
}

export function startChat(model) {
  document.getElementById("chat").addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = ask.value.trim();
    if (!text || running) return;
    ask.value = "";
    messages.push({ role: "user", content: text });
    turn("user", text);
    running = new AbortController();
    send.disabled = true;
    stop.disabled = false;
    await answer(model(), running);
    running = null;
    send.disabled = false;
    stop.disabled = true;
    ask.focus();
  });
  ask.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      document.getElementById("chat").requestSubmit();
    }
  });
  stop.addEventListener("click", () => running?.abort());
  document.getElementById("clear").addEventListener("click", () => {
    running?.abort();
    messages = [];
    log.replaceChildren();
    ask.focus();
  });
}
