// The status arrives as server-sent events; the page is drawn from the latest one.
import { events, request, useKey } from "./api.js";
import { startChat } from "./chat.js";
import { draw } from "./view.js";

let chosen = "";
let status = null;

function showState(text, kind) {
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
  showState(served.length ? "ready" : status.reason, served.length ? "good" : "bad");
}

async function follow() {
  for (;;) {
    try {
      for await (const data of events(await request("api/events"))) {
        status = JSON.parse(data);
        redraw();
      }
      showState("the node closed the connection", "bad");
    } catch (error) {
      showState(`no connection to the node: ${error.message}`, "bad");
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

document.getElementById("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(document.getElementById("key").value);
  document.getElementById("key-form").hidden = true;
});
startChat(() => chosen);
follow();
