"use strict";
// What both pages share. Texts of a corpus become text nodes and nothing else.

const facts = JSON.parse(document.getElementById("facts").textContent);
const NAMES = { delta_loss: "realised loss change", kl: "expected change (KL)", first_order: "first order", weight: "routing weight" };
const byId = (id) => document.getElementById(id);

// An element with a class, a text and children.
function element(tag, css, ...children) {
  const node = document.createElement(tag);
  if (css) node.className = css;
  node.append(...children);
  return node;
}

function option(value, text) {
  const node = element("option", "", text);
  node.value = value;
  return node;
}

// A token as a reader can see it: line ends, tabs and characters without a shape get a name.
const SHAPELESS = /[\n\t\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/;
function visible(text, withLines) {
  const parts = [];
  let plain = "";
  for (const sign of text) {
    if (!SHAPELESS.test(sign)) { plain += sign; continue; }
    if (plain) parts.push(plain);
    plain = "";
    const number = sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parts.push(element("span", "code", sign === "\n" ? "↵" : sign === "\t" ? "⇥" : `‹U+${number}›`));
    if (sign === "\n" && withLines) parts.push("\n");
  }
  if (plain) parts.push(plain);
  return parts;
}

// A token on its own: without this, a space at its beginning would not be seen.
function named(text) {
  return element("bdi", "token", ...visible(text.replace(/^ | $/g, "␣")));
}

function nats(value, signed = true) {
  if (value === null || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const digits = size >= 1 ? 2 : size >= 0.1 ? 2 : size >= 0.01 ? 3 : 4;
  const text = size < 0.00005 ? size.toExponential(0) : size.toFixed(digits);
  return (value < 0 ? "−" : signed ? "+" : "") + text;
}

function percent(share) {
  if (share === null || share === undefined) return "–";
  const size = Math.abs(100 * share);
  return `${(100 * share).toFixed(size >= 9.95 || size === 0 ? 0 : size >= 0.1 ? 1 : 2)}%`;
}

// Colour by size, on a logarithmic scale of two decades: orange above 0, purple below; blue for what has no sign.
const DECADES = 2;
function colour(value, top, signed) {
  const size = Math.abs(value);
  const depth = 1 + Math.log10(size / top) / DECADES;
  if (!(depth > 0)) return "";
  const name = signed ? (value > 0 ? "--up" : "--down") : "--size";
  return `rgb(var(${name}) / ${(0.08 + 0.82 * Math.min(depth, 1)).toFixed(2)})`;
}

async function unpack(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (sign) => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function fail(error) {
  const line = byId("failure");
  line.hidden = false;
  line.textContent = typeof DecompressionStream === "undefined"
    ? "This browser is too old for this page: it needs one of 2023 or later. The report and the tables need none."
    : `This page could not be drawn (${error.message}). The report and the tables have its numbers.`;
  console.error(error);
}
