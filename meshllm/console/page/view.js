// Draws the status of the mesh. All text is inserted as text, never as HTML.
import { change } from "./api.js";
import { element } from "./markdown.js";

const byId = (id) => document.getElementById(id);
const gb = (bytes) => {
  if (bytes >= 1e9) return `${(bytes / 1e9).toFixed(1)} GB`;
  return bytes >= 1e6 || bytes === 0 ? `${Math.round(bytes / 1e6)} MB` : `${Math.ceil(bytes / 1e3)} KB`;
};
const percent = (part) => `${Math.round(100 * part)} %`;
const rates = [];
let before = null;

// The groups of nodes that serve a model: {host, stages, shares}, where the last share is the host's.
function groupsOf(status, name) {
  return status.models.filter((model) => model.name === name).flatMap((model) => model.groups);
}

function shareOf(status, node) {
  for (const model of status.models)
    for (const group of model.groups) {
      const place = [...group.stages, group.host].indexOf(node.id);
      if (place >= 0) return { model: model.name, share: group.shares[place], host: group.host === node.id };
    }
  return null;
}

function drawBar(status, chosen) {
  const lit = new Set(groupsOf(status, chosen).flatMap((group) => [group.host, ...group.stages]));
  const living = status.nodes.filter((node) => node.state === "alive" || node.state === "suspect");
  const segments = living.map((node, i) => {
    const share = shareOf(status, node);
    const role = node.role === "client" ? "client" : share ? (share.host ? "host" : "stage") : "worker";
    const rtt = node.id === status.node_id ? "this node" : node.rtt_ms === null ? "no link" : `${node.rtt_ms} ms`;
    const what = share ? `${role}, ${percent(share.share)} of ${share.model}` : role;
    const segment = element(
      "li",
      { class: `${share ? `c${i % 6}` : "idle"}${lit.has(node.id) ? " lit" : ""}`, title: node.device },
      element("span", {}, node.name),
      element("span", {}, what),
      element("span", {}, `${gb(node.memory_bytes)}, ${rtt}`),
      element("span", {}, node.state === "alive" ? node.device || "no device" : node.state),
    );
    segment.style.flexGrow = Math.max(node.memory_bytes / 1e9, 0.1);
    return segment;
  });
  byId("bar").replaceChildren(...segments);
}

function drawProgress(status) {
  const lines = [];
  for (const model of status.models) {
    if (!model.groups.length)
      lines.push(`${model.name}: waiting for memory, ${gb(model.need_bytes - model.have_bytes)} of ${gb(model.need_bytes)} missing`);
    for (const node of status.nodes) {
      const part = node.fetching[model.fingerprint];
      if (part !== undefined) lines.push(`${node.name} is downloading ${model.name}: ${percent(part)}`);
    }
    for (const group of model.groups) {
      const host = status.nodes.find((node) => node.id === group.host);
      if (host && !host.serving.some((serving) => serving.ready))
        lines.push(`${model.name} is loading on ${host.name}${loaded(status, group)}`);
    }
  }
  byId("progress").replaceChildren(...lines.map((line) => element("span", {}, line, element("br"))));
}

// What part of its weights each stage has loaded.
function loaded(status, group) {
  const engine = status.engines[group.host];
  if (!engine || engine.stage_loaded.length !== group.stages.length) return "";
  const names = group.stages.map((id) => status.nodes.find((node) => node.id === id)?.name ?? "?");
  return names.length ? ` (${names.map((name, i) => `${name} ${percent(engine.stage_loaded[i])}`).join(", ")})` : "";
}

function drawTable(id, head, rows) {
  const line = (tag, cells) => element("tr", {}, ...cells.map((cell) => element(tag, {}, String(cell))));
  byId(id).replaceChildren(element("thead", {}, line("th", head)), element("tbody", {}, ...rows.map((row) => line("td", row))));
}

function drawPicker(status, chosen, pick) {
  const names = status.served.join("\n");
  const choices = byId("choices");
  if (choices.dataset.names !== names) {
    choices.dataset.names = names;
    choices.replaceChildren(
      ...status.served.map((name) => {
        const input = element("input", { type: "radio", name: "model", value: name });
        input.addEventListener("change", () => pick(name));
        return element("label", {}, input, " ", name);
      }),
    );
    if (!status.served.length) choices.append("No model is served yet.");
  }
  for (const input of choices.querySelectorAll("input")) input.checked = input.value === chosen;
}

function drawFacts(status, chosen) {
  const group = groupsOf(status, chosen)[0];
  const model = status.models.find((entry) => entry.name === chosen);
  const engine = group && status.engines[group.host];
  const facts = [];
  if (model && group) {
    const nodes = [...group.stages, group.host].map((id) => status.nodes.find((node) => node.id === id));
    const memory = nodes.reduce((sum, node) => sum + (node ? node.memory_bytes : 0), 0);
    const layers = engine ? [...engine.stage_layers, engine.host_layers] : [];
    facts.push(["Model", `${chosen} (${gb(model.size_bytes)})`], ["Total memory", gb(memory)]);
    facts.push(["Layers", nodes.map((node, i) => `${node ? node.name : "?"} ${layers[i] ?? percent(group.shares[i])}`).join(", ")]);
    if (engine) {
      facts.push(["Context", `${engine.n_ctx} tokens`], ["Speed", engine.tokens_per_s ? `${engine.tokens_per_s} tokens/s` : "-"]);
      const speculation = engine.speculation;
      const accepted = speculation && speculation.drafted ? `, ${percent(speculation.accepted / speculation.drafted)} accepted` : "";
      facts.push(["Draft", speculation ? `${speculation.draft}${accepted}` : "none"]);
    }
  }
  facts.push(["API", `${location.hostname}:${status.api_port}/v1`]);
  byId("facts").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

function svg(tag, properties, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(properties)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// The path of a token: from the host through the stages and back.
function drawRing(status, chosen) {
  const group = groupsOf(status, chosen)[0];
  if (!group) return byId("ring").replaceChildren();
  const ids = [group.host, ...group.stages];
  const names = ids.map((id) => status.nodes.find((node) => node.id === id)?.name ?? "?");
  const around = (i, radius) => {
    const angle = (2 * Math.PI * i) / ids.length - Math.PI / 2;
    return [180 + radius * Math.cos(angle), 110 + radius * Math.sin(angle)];
  };
  const title = ids.length > 1 ? `A token goes ${[...names, names[0]].join(" → ")}` : `${names[0]} serves alone`;
  const picture = svg("svg", { viewBox: "0 0 360 220", width: 360, role: "img", "aria-label": title });
  if (ids.length > 1) picture.append(svg("circle", { cx: 180, cy: 110, r: 70, class: "way" }));
  ids.forEach((_, i) => {
    const [x, y] = around(i, ids.length > 1 ? 70 : 0);
    if (ids.length > 1) {
      const [ax, ay] = around(i + 0.5, 70);
      const turn = (360 * (i + 0.5)) / ids.length;
      picture.append(svg("path", { d: "M-5,-5 L5,0 L-5,5 z", class: "head", transform: `translate(${ax},${ay}) rotate(${turn})` }));
    }
    picture.append(svg("circle", { cx: x, cy: y, r: 12, class: "dot" }));
    const side = Math.abs(x - 180) < 5 ? "middle" : x < 180 ? "end" : "start";
    const dx = { middle: 0, end: -18, start: 18 }[side];
    const dy = side === "middle" ? (y < 110 ? -18 : 28) : 4;
    const label = svg("text", { x: x + dx, y: y + dy, "text-anchor": side });
    label.textContent = `${names[i].slice(0, 16)}${i === 0 ? " (host)" : ""}`;
    picture.append(label);
  });
  byId("ring").replaceChildren(picture);
}

function drawChart(status) {
  const total = Object.values(status.engines).reduce((sum, engine) => sum + engine.tokens.generated, 0);
  const now = performance.now() / 1000;
  if (before && now > before.now) rates.push(Math.max(0, (total - before.total) / (now - before.now)));
  before = { total, now };
  if (rates.length > 60) rates.shift();
  const top = Math.max(10, ...rates);
  const points = rates.map((rate, i) => `${(i * 360) / 59},${80 - (70 * rate) / top}`).join(" ");
  const label = `Tokens per second in the last minute: now ${(rates.at(-1) ?? 0).toFixed(0)}, scale to ${top.toFixed(0)}`;
  const picture = svg("svg", { viewBox: "0 0 360 96", width: 360, role: "img", "aria-label": label });
  const text = svg("text", { x: 0, y: 94 });
  text.textContent = label;
  picture.append(svg("polyline", { points, class: "way" }), text);
  byId("chart").replaceChildren(picture);
}

function copyable(title, text) {
  const button = element("button", { type: "button", "aria-label": `Copy: ${title}` }, "Copy");
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  return element("li", {}, element("strong", {}, title), element("pre", { tabindex: "0" }, text), button);
}

function drawAgents(status) {
  const list = byId("agents");
  const text = JSON.stringify(status.agents);
  if (list.dataset.text === text) return;
  list.dataset.text = text;
  list.replaceChildren(...status.agents.map(({ title, text: lines }) => copyable(title, lines)));
}

byId("invite").addEventListener("click", async () => {
  const list = byId("invitation");
  try {
    const { token } = await change("api/token", {});
    list.replaceChildren(copyable("Join from another machine", `mesh-llm --join ${token}`));
  } catch (error) {
    list.replaceChildren(element("li", {}, error.message));
  }
});

export function draw(status, chosen, pick) {
  byId("where").textContent = `mesh ${status.mesh_id.slice(0, 8)}, version ${status.version}`;
  drawBar(status, chosen);
  drawProgress(status);
  const nodes = status.nodes.map((node) => [
    node.name,
    node.role,
    node.state,
    node.rtt_ms === null ? "-" : `${node.rtt_ms} ms`,
    gb(node.memory_bytes),
    node.device,
  ]);
  drawTable("nodes", ["node", "role", "state", "RTT", "memory", "device"], nodes);
  drawPicker(status, chosen, pick);
  drawFacts(status, chosen);
  drawRing(status, chosen);
  drawChart(status);
  const links = status.nodes.filter((node) => node.address !== null);
  drawTable(
    "links",
    ["link to", "RTT", "sent", "received"],
    links.map((node) => [node.name, node.rtt_ms === null ? "-" : `${node.rtt_ms} ms`, gb(node.bytes_sent), gb(node.bytes_received)]),
  );
  drawAgents(status);
}
