// Markdown as elements. marked only reads it: no markup is ever made from text, so nothing that a model says can
// become a script, a style, or a picture from elsewhere.

import { lexer } from "./vendor/marked.js";

const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };

/** Text with the few entities that models write. */
const decoded = (text) =>
  text.replace(/&(?:#(\d{1,6})|(amp|lt|gt|quot|apos|nbsp));/g, (whole, number, name) =>
    name ? ENTITIES[name] : number <= 0x10ffff ? String.fromCodePoint(number) : whole,
  );

function element(name, children = [], properties = {}) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function link(token) {
  let address;
  try {
    address = new URL(token.href);
  } catch {
    return element("span", inline(token.tokens));
  }
  if (!["http:", "https:", "mailto:"].includes(address.protocol)) return element("span", inline(token.tokens));
  return element("a", inline(token.tokens), { href: address.href, target: "_blank", rel: "noopener noreferrer" });
}

function inline(tokens = []) {
  return tokens.map((token) => {
    switch (token.type) {
      case "strong":
      case "em":
      case "del":
        return element(token.type, inline(token.tokens));
      case "codespan":
        return element("code", [token.text]);
      case "br":
        return element("br");
      case "link":
        return link(token);
      case "image": // what a picture shows; it is not fetched
        return element("span", [token.text || token.href]);
      case "checkbox":
        return element("input", [], { type: "checkbox", disabled: true, checked: token.checked, ariaLabel: "task" });
      default:
        return token.tokens ? element("span", inline(token.tokens)) : decoded(token.text ?? token.raw);
    }
  });
}

function list(token) {
  const items = token.items.map((item) => element("li", blocks(item.tokens)));
  const made = element(token.ordered ? "ol" : "ul", items);
  if (token.ordered && token.start !== 1 && token.start !== "") made.start = token.start;
  return made;
}

function table(token) {
  const row = (name, cells) => element("tr", cells.map((cell) => element(name, inline(cell.tokens))));
  const head = element("thead", [row("th", token.header)]);
  const body = element("tbody", token.rows.map((cells) => row("td", cells)));
  return element("div", [element("table", [head, body])], { className: "wide", tabIndex: 0 });
}

function code(token) {
  const copy = element("button", ["Copy"], { type: "button", className: "quiet copy-code" });
  const bar = element("div", [element("span", [token.lang ?? ""]), copy], { className: "bar" });
  return element("div", [bar, element("pre", [element("code", [token.text])], { tabIndex: 0 })], { className: "code" });
}

function blocks(tokens) {
  return tokens.flatMap((token) => {
    switch (token.type) {
      case "space":
      case "def":
        return [];
      case "heading": // the page has two levels above an answer's
        return element(`h${Math.min(6, token.depth + 3)}`, inline(token.tokens));
      case "paragraph":
        return element("p", inline(token.tokens));
      case "list":
        return list(token);
      case "blockquote":
        return element("blockquote", blocks(token.tokens));
      case "code":
        return code(token);
      case "table":
        return table(token);
      case "hr":
        return element("hr");
      case "text": // of a list's item
        return inline(token.tokens ?? [token]);
      default:
        return inline([token]);
    }
  });
}

/** Show Markdown in an element, instead of what is there. */
export function show(target, text) {
  target.replaceChildren(...blocks(lexer(text, { gfm: true, breaks: true })));
}
