// Turns Markdown into elements, never into HTML text, so what a model writes cannot become a tag.

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*/g;

function inline(text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    parts.push(text.slice(end, match.index));
    if (match[2] !== undefined) parts.push(element("code", {}, match[2]));
    else if (match[3] !== undefined) parts.push(element("strong", {}, match[3]));
    else parts.push(element("em", {}, match[4]));
    end = match.index + match[0].length;
  }
  parts.push(text.slice(end));
  return parts;
}

export function markdown(text) {
  const out = [];
  const lines = text.split("\n");
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = line.match(/^\s*(```+|~~~+)/);
    const item = line.match(/^\s*(?:[-*+]|(\d+)[.)])\s+/);
    if (fence) {
      const code = [];
      for (at += 1; at < lines.length && !lines[at].trim().startsWith(fence[1]); at += 1) code.push(lines[at]);
      at += 1;
      out.push(element("pre", { tabindex: "0" }, element("code", {}, code.join("\n"))));
    } else if (item) {
      const list = element(item[1] === undefined ? "ul" : "ol");
      for (let more = item; more; more = at < lines.length ? lines[at].match(/^\s*(?:[-*+]|(\d+)[.)])\s+/) : null) {
        list.append(element("li", {}, ...inline(lines[at].slice(more[0].length))));
        at += 1;
      }
      out.push(list);
    } else if (/^#{1,6}\s/.test(line)) {
      out.push(element("p", {}, element("strong", {}, ...inline(line.replace(/^#+\s+/, "")))));
      at += 1;
    } else if (line.trim() === "") {
      at += 1;
    } else {
      const paragraph = [];
      while (at < lines.length && lines[at].trim() !== "" && !/^\s*(```|~~~|[-*+]\s|\d+[.)]\s|#{1,6}\s)/.test(lines[at])) {
        paragraph.push(lines[at]);
        at += 1;
      }
      if (paragraph.length === 0) paragraph.push(lines[at++]);
      out.push(element("p", {}, ...inline(paragraph.join("\n"))));
    }
  }
  return out;
}
