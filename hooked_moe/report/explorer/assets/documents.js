// documents.html: one document at a time, coloured by what the chosen removal does.

const { layers, slots, scales, tops } = facts;
const EFFECTS = [...Object.keys(tops), "weight"];
const state = { document: null, effect: EFFECTS[0], layer: -1, expert: "largest", position: null, pinned: false };
let current = null; // the document: its tokens, and the numbers of each removal
let cells = []; // the tokens on the page

const scaleOf = (effect) => (effect === "weight" ? scales.weight : scales.effect);
const topOf = (effect) => (effect === "weight" ? 1 : tops[effect]);
const isSigned = (effect) => effect === "delta_loss" || effect === "first_order";

function decode(code, scale) {
  if (code === -128) return NaN;
  return code === 0 ? 0 : Math.sign(code) * scale.floor * scale.step ** (Math.abs(code) - 1);
}

async function load(number) {
  const bytes = await unpack(`d${number}`);
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const tokens = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  const size = layers.length * slots * tokens.length;
  let at = 4 + length;
  const plane = (count) => new Int8Array(bytes.buffer, (at += count) - count, count);
  const baseline = plane(tokens.length);
  const [low, high, weight, delta_loss, kl, difference] = Array.from({ length: 6 }, () => plane(size));
  const first_order = difference.map((code, place) => code + delta_loss[place]); // an Int8Array wraps around, as it was made
  return { number, tokens, baseline, low, high, planes: { weight, delta_loss, kl, first_order } };
}

const place = (axis, slot, position) => (axis * slots + slot) * current.tokens.length + position;
const expertAt = (index) => (current.low[index] & 255) + 256 * (current.high[index] & 255);
const valueAt = (effect, index) => decode(current.planes[effect][index], scaleOf(effect));

// Every removal at a token, of the chosen layer or of all.
function removals(position) {
  const found = [];
  layers.forEach((layer, axis) => {
    if (state.layer !== -1 && state.layer !== layer) return;
    for (let slot = 0; slot < slots; slot++) found.push({ layer, slot, index: place(axis, slot, position) });
  });
  return found;
}

// What colours a token: a number, NaN where nothing was measured or the chosen expert is not active.
function shownAt(position) {
  const all = removals(position);
  if (state.expert === "sum") return all.reduce((total, { index }) => total + valueAt(state.effect, index), 0);
  if (state.expert !== "largest") {
    const own = all.find(({ index }) => expertAt(index) === Number(state.expert));
    return own ? valueAt(state.effect, own.index) : NaN;
  }
  return all.map(({ index }) => valueAt(state.effect, index)).reduce((most, value) => (Math.abs(value) > Math.abs(most) ? value : most));
}

function paint() {
  const top = topOf(state.effect), signed = isSigned(state.effect);
  cells.forEach((cell, position) => {
    const value = shownAt(position);
    cell.style.backgroundColor = Number.isNaN(value) ? "" : colour(value, top, signed);
    cell.classList.toggle("none", Number.isNaN(value));
    cell.classList.toggle("below", value < 0 && cell.style.backgroundColor !== "");
    cell.dataset.value = value;
  });
  legend(top, signed);
  const chosen = ["document", "layer", "expert"].map((name) => byId(name).selectedOptions[0].textContent);
  byId("title").textContent = `${chosen[0]} · layer: ${chosen[1]} · ${chosen[2]}`;
  if (state.position !== null) describe();
  remember();
}

function legend(top, signed) {
  const steps = [0.03, 0.1, 0.3, 1].map((part) => part * top);
  const values = signed ? [...steps.map((value) => -value).reverse(), 0, ...steps] : [0, ...steps];
  const unit = state.effect === "weight" ? "" : ", nats";
  byId("legend").replaceChildren(
    element("em", "", NAMES[state.effect] + unit),
    ...values.map((value) => {
      const swatch = element("span", value < 0 ? "t below" : "", nats(Number(value.toPrecision(1)), signed));
      swatch.style.backgroundColor = value ? colour(value, top, signed) : "";
      return swatch;
    }),
    ...(signed ? [element("em", "", "purple, dotted: the prediction is better without; orange: worse")] : []),
    element("em", "", "grey text: not measured, or not served"),
  );
}

// The panel about one token.
function describe() {
  const position = state.position, { tokens } = current;
  const effects = EFFECTS.filter((name) => name !== "weight");
  const rows = removals(position).map((row) => ({ ...row, expert: expertAt(row.index) }));
  if (state.layer === -1) rows.sort((a, b) => size(valueAt(state.effect, b.index)) - size(valueAt(state.effect, a.index)));
  const head = element("tr", "", ...["expert", "weight", ...effects.map((name) => SHORT[name])].map((text) => element("th", "", text)));
  const body = rows.map(({ layer, expert, index }) => {
    const link = element("a", "", `L${layer}E${expert}`);
    link.href = `experts.html#L${layer}E${expert}`;
    const chosen = String(expert) === state.expert;
    const weight = valueAt("weight", index);
    return element("tr", chosen ? "chosen" : "", element("td", "", link), element("td", "", nats(weight, false)),
      ...effects.map((name) => element("td", "", nats(valueAt(name, index), isSigned(name)))));
  });
  const loss = decode(current.baseline[position], scales.effect);
  const last = position + 1 >= tokens.length;
  byId("panel").replaceChildren(
    element("h2", "", named(tokens[position]), ` at ${position}`),
    element("p", "", "next: ", ...(last ? ["–"] : [named(tokens[position + 1])]), ` · loss of the intact model ${nats(loss, false)} nats`),
    element("p", "facts", state.layer === -1 ? `all layers, by size of ${NAMES[state.effect]}` : `layer ${state.layer}, by routing weight`),
    element("table", "", element("thead", "", head), element("tbody", "", ...body)),
  );
}
const SHORT = { delta_loss: "realised", kl: "expected", first_order: "first order" };
const size = (value) => (Number.isNaN(value) ? -1 : Math.abs(value));

function select(position, scroll) {
  if (position === null || position < 0 || position >= cells.length) return;
  if (state.position !== null) cells[state.position]?.setAttribute("aria-selected", "false");
  state.position = position;
  cells[position].setAttribute("aria-selected", "true");
  byId("text").setAttribute("aria-activedescendant", cells[position].id);
  document.body.classList.add("has-panel");
  describe();
  if (scroll) cells[position].scrollIntoView({ block: "center" });
  remember();
}

function remember() {
  const expert = state.layer !== -1 && /^\d+$/.test(state.expert) ? `L${state.layer}E${state.expert}` : "";
  const position = state.position === null ? "" : `p${state.position}`;
  history.replaceState(null, "", `#d${state.document}${position}${expert}`);
}

async function open(number, position = null) {
  state.document = number;
  state.position = null;
  state.pinned = position !== null;
  current = await load(number);
  byId("document").value = number;
  cells = current.tokens.map((text, index) => {
    const cell = element("span", "t", ...visible(text, true));
    cell.id = `t${index}`;
    cell.setAttribute("role", "option");
    cell.setAttribute("aria-selected", "false");
    return cell;
  });
  byId("text").replaceChildren(...cells);
  byId("panel").replaceChildren(element("p", "", "Point at a token, tap it, or use the arrow keys."));
  paint();
  if (position !== null) select(Math.min(position, cells.length - 1), true);
}

// The experts of the chosen layer that this page's model has.
function offerExperts() {
  const choices = [option("largest", "the largest effect"), option("sum", "the sum over active experts")];
  if (state.layer !== -1) {
    const most = facts.experts[layers.indexOf(state.layer)];
    for (let expert = 0; expert < most; expert++) choices.push(option(String(expert), `expert ${expert}`));
  }
  byId("expert").replaceChildren(...choices);
  if (![...byId("expert").options].some(({ value }) => value === state.expert)) state.expert = "largest";
  byId("expert").value = state.expert;
}

function chooseLayer(layer) {
  state.layer = layer;
  byId("layer").value = layer;
  offerExperts();
}

// The token above or below: the nearest one of the next line.
function vertical(step) {
  const from = cells[state.position].getClientRects()[0];
  const middle = from.left + from.width / 2;
  let best = null, bestLine = null, distance = Infinity;
  for (let index = state.position + step; index >= 0 && index < cells.length; index += step) {
    const box = cells[index].getClientRects()[0];
    if (!box || Math.abs(box.top - from.top) < from.height / 2) continue;
    bestLine ??= box.top;
    if (Math.abs(box.top - bestLine) > from.height / 2) break;
    const away = Math.abs(box.left + box.width / 2 - middle);
    if (away < distance) [best, distance] = [index, away];
  }
  return best;
}

const KEYS = {
  ArrowRight: () => state.position + 1,
  ArrowLeft: () => state.position - 1,
  ArrowDown: () => vertical(1),
  ArrowUp: () => vertical(-1),
  Home: () => 0,
  End: () => cells.length - 1,
};

function listen() {
  const text = byId("text");
  const tokenOf = (event) => event.target.closest?.(".t")?.id.slice(1);
  text.addEventListener("pointerover", (event) => {
    const token = tokenOf(event);
    if (token !== undefined && !state.pinned && event.pointerType === "mouse") select(Number(token));
  });
  text.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (token === undefined) return;
    state.pinned = !(state.pinned && state.position === Number(token)); // a second click lets go
    select(Number(token));
  });
  text.addEventListener("focus", () => state.position === null && select(0));
  text.addEventListener("keydown", (event) => {
    if (event.key === "Escape") state.pinned = false;
    if (!(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    state.pinned = true;
    select(state.position === null ? 0 : KEYS[event.key]());
    cells[state.position].scrollIntoView({ block: "nearest" });
  });
  byId("document").addEventListener("change", (event) => open(Number(event.target.value)).catch(fail));
  byId("effect").addEventListener("change", (event) => { state.effect = event.target.value; paint(); });
  byId("layer").addEventListener("change", (event) => { chooseLayer(Number(event.target.value)); paint(); });
  byId("expert").addEventListener("change", (event) => { state.expert = event.target.value; paint(); });
  window.addEventListener("hashchange", () => arrive().catch(fail));
}

// #d12p345L3E5: a document, a position in it, an expert. Every part may be missing.
async function arrive() {
  const [, number, position, layer, expert] = /^#(?:d(\d+))?(?:p(\d+))?(?:L(\d+)E(\d+))?$/.exec(location.hash) ?? [];
  const isShown = facts.documents.some((entry) => entry.number === Number(number));
  if (layer !== undefined && layers.includes(Number(layer))) {
    state.expert = expert;
    chooseLayer(Number(layer));
  }
  await open(isShown ? Number(number) : facts.documents[0].number, isShown && position !== undefined ? Number(position) : null);
}

async function start() {
  byId("document").replaceChildren(...facts.documents.map(({ number, name, domain, tokens }) =>
    option(number, `${number}. ${name || "untitled"}${domain ? ` (${domain}, ${tokens} tokens)` : ""}`)));
  byId("effect").replaceChildren(...EFFECTS.map((name) => option(name, NAMES[name])));
  byId("layer").replaceChildren(option(-1, "all"), ...layers.map((layer) => option(layer, String(layer))));
  offerExperts();
  listen();
  await arrive();
  byId("controls").hidden = false;
}

start().catch(fail);
