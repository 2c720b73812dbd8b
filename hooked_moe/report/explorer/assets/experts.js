// experts.html: cards, made as they are needed.

const AT_ONCE = 30; // cards made at a time
const IN_SHORT = 3; // tokens of a card before it is opened
let cards = [], contexts = [], listed = [], made = 0;
const nodes = new Map(); // by name

const nameOf = (card) => `L${card.layer}E${card.expert}`;
const last = (value) => (value === null || value === undefined || Number.isNaN(value) ? -Infinity : value);
const inOrder = (card) => -(card.layer * 1e5 + card.expert);
const ORDERS = {
  "focus on a token": (card) => (card.focus ? card.focus.excess - (card.focus.small ? 10 : 0) : -Infinity),
  ...(facts.kinds.length > 1 ? { "focus on a kind of text": (card) => last(card.kinds.focus) - (card.focus?.small ?? true ? 10 : 0) } : {}),
  "largest single effect": (card) => Math.max(-Infinity, ...(card.effects.delta_loss ?? []).map(([, value]) => Math.abs(value))),
  "mean realised effect": (card) => last(card.mean[0]),
  "mean realised effect, lowest first": (card) => last(card.mean[0] === null ? null : -card.mean[0]),
  "mean expected effect": (card) => last(card.kl),
  "tokens served, most first": (card) => last(card.usage),
  "tokens served, fewest first": (card) => last(card.usage === null ? null : -card.usage),
  "layer and number": inOrder,
  ...Object.fromEntries(facts.criteria.map((label, index) => [`rank by ${label}`, (card) => last(card.ranks[index] === null ? null : -card.ranks[index])])),
};
const state = { sort: Object.keys(ORDERS)[0], layer: -1, effect: facts.effects.includes("kl") ? "kl" : facts.effects[0], search: "" };

function isFound(card) {
  if (state.layer !== -1 && card.layer !== state.layer) return false;
  const wanted = state.search;
  if (wanted.trim() === "") return true;
  const [, layer, expert] = /^\s*L(\d+)(?:E(\d+))?\s*$/i.exec(wanted) ?? [];
  if (layer !== undefined) return card.layer === Number(layer) && (expert === undefined || card.expert === Number(expert));
  const has = (text) => text.toLowerCase().includes(wanted.toLowerCase());
  return (card.focus && has(card.focus.token)) || Object.values(card.effects).some((list) => list.some(([number]) => has(contexts[number][3])));
}

function list() {
  const key = ORDERS[state.sort];
  listed = cards.filter(isFound).map((card) => [key(card), inOrder(card), card]).sort((a, b) => b[0] - a[0] || b[1] - a[1]).map(([, , card]) => card);
  made = 0;
  byId("cards").replaceChildren();
  more();
}

function more(until = made + AT_ONCE) {
  const next = listed.slice(made, until);
  byId("cards").append(...next.map(cardNode));
  made += next.length;
  const count = (number) => number.toLocaleString("en");
  const all = listed.length === cards.length ? `${count(listed.length)} experts` : `${count(listed.length)} of ${count(cards.length)} experts`;
  byId("count").textContent = `${all}, by ${state.sort}${made < listed.length ? `; the first ${made} are below` : ""}`;
  byId("more").hidden = made >= listed.length;
  byId("more").textContent = `show ${Math.min(AT_ONCE, listed.length - made)} more of ${(listed.length - made).toLocaleString("en")}`;
}

// "80% of its effect is at ␣f, where 1.2% of its tokens are."
function sentence({ focus }) {
  if (!focus) return element("p", "facts", "No token that it serves often enough to be said to focus on.");
  const many = `${focus.removals.toLocaleString("en")} tokens, ${focus.documents.toLocaleString("en")} documents, ${nats(focus.mean, false)} nats each`;
  return element("p", "", element("b", "", percent(focus.effect)), " of its effect is at ", named(focus.token), `, where ${percent(focus.served)} of its tokens are (${many}).`,
    focus.small ? " Its effect is small in all." : "");
}

function figures(card) {
  const [mean, low, high] = card.mean;
  const parts = [
    ["serves ", percent(card.usage), " of tokens"],
    ["realised ", nats(mean), low === null ? " nats" : ` [${nats(low)}, ${nats(high)}] nats`],
    ...(card.kl === null ? [] : [["expected ", nats(card.kl, false), " nats"]]),
  ];
  return element("p", "facts", ...parts.flatMap(([before, value, after], index) => [(index ? " · " : "") + before, element("b", "", value), after]));
}

function contextNode([number, value], card, top) {
  const [document, position, before, token, after] = contexts[number];
  const shown = element("span", "value", nats(value, state.effect === "delta_loss"));
  shown.style.backgroundColor = colour(value, top, state.effect === "delta_loss");
  const words = element("span", "words", element("bdi", "", ...visible(before)), element("bdi", "token", ...visible(token)), element("bdi", "", ...visible(after)));
  if (facts.shown.includes(document)) {
    const link = element("a", "", "in the text");
    link.href = `documents.html#d${document}p${position}${nameOf(card)}`;
    link.title = facts.names[document];
    words.append(link);
  }
  return element("li", "", shown, words);
}

function contextList(card, entries) {
  const sizes = (card.effects[state.effect] ?? []).map(([, value]) => Math.abs(value));
  return element("ol", "contexts", ...entries.map((entry) => contextNode(entry, card, Math.max(...sizes))));
}

function table(head, rows) {
  return element("div", "scroll", element("table", "",
    element("thead", "", element("tr", "", ...head.map((text) => element("th", "", text)))),
    element("tbody", "", ...rows.map((row) => element("tr", "", ...row.map((text) => element("td", "", text)))))));
}

function kindTable({ kinds }) {
  const columns = [["of its text served", kinds.routed, percent], ["of the expert's effect", kinds.effect, percent], ["mean realised, nats", kinds.mean, nats]];
  const measured = columns.filter(([, values]) => values);
  const rows = facts.kinds.map((kind, index) => [kind || "–", ...measured.map(([, values, show]) => show(values[index]))]);
  return [element("h3", "", "By kind of text"), table(["", ...measured.map(([title]) => title)], rows)];
}

function rankTable(card) {
  const rows = facts.criteria.map((label, index) => [label, card.ranks[index] === null ? "–" : String(card.ranks[index])]);
  return [element("h3", "", `Rank in layer ${card.layer}; 1 is pruned last`), table(["", "rank"], rows)];
}

function cardNode(card) {
  const entries = card.effects[state.effect] ?? [];
  const link = element("a", "", nameOf(card));
  link.href = `#${nameOf(card)}`;
  const details = element("details", "", element("summary", "", "more tokens, kinds of text, ranks"));
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) {
      details.append(...(entries.length > IN_SHORT ? [contextList(card, entries.slice(IN_SHORT))] : []),
        element("div", "pair", element("div", "", ...kindTable(card)), element("div", "", ...rankTable(card))));
    }
  });
  const nothing = element("p", "facts", card.removals ? "No effect was measured." : "No token of the corpus is routed to it.");
  const node = element("article", "card", element("header", "", element("h2", "", link), figures(card)),
    ...(card.removals ? [sentence(card)] : []), entries.length ? contextList(card, entries.slice(0, IN_SHORT)) : nothing, details);
  node.id = nameOf(card);
  nodes.set(node.id, node);
  return node;
}

// #L3E5: the card, made if need be, opened, and brought into view.
function arrive() {
  const name = decodeURIComponent(location.hash.slice(1));
  if (!cards.some((card) => nameOf(card) === name)) return;
  if (!listed.some((card) => nameOf(card) === name)) {
    state.search = byId("search").value = "";
    byId("layer").value = state.layer = -1;
    list();
  }
  const index = listed.findIndex((card) => nameOf(card) === name);
  if (index >= made) more(index + AT_ONCE);
  document.querySelectorAll(".card.linked").forEach((node) => node.classList.remove("linked"));
  const node = nodes.get(name);
  node.classList.add("linked");
  node.querySelector("details").open = true;
  node.scrollIntoView();
  node.querySelector("h2 a").focus({ preventScroll: true });
}

async function start() {
  ({ cards, contexts } = JSON.parse(new TextDecoder().decode(await unpack("cards-data"))));
  byId("sort").replaceChildren(...Object.keys(ORDERS).map((name) => option(name, name)));
  byId("layer").replaceChildren(option(-1, "all"), ...facts.layers.map((layer) => option(layer, String(layer))));
  byId("effect").replaceChildren(...["kl", "delta_loss"].filter((name) => facts.effects.includes(name)).map((name) => option(name, NAMES[name])));
  for (const name of ["sort", "layer", "effect", "search"]) {
    byId(name).addEventListener("input", (event) => {
      state[name] = name === "layer" ? Number(event.target.value) : event.target.value;
      list();
    });
  }
  byId("more").addEventListener("click", () => more());
  new IntersectionObserver((entries) => entries[0].isIntersecting && made < listed.length && more()).observe(byId("more"));
  window.addEventListener("hashchange", arrive);
  list();
  byId("controls").hidden = false;
  arrive();
}

start().catch(fail);
