// The page of web_demo.py. Conversations live here, in the browser's storage: the server is sent what the model shall
// read, and forgets it. All text reaches the page as text, never as HTML. In the order of reading: what is kept, what
// the model reads, an answer, what is shown, the settings.
"use strict";

const facts = JSON.parse(document.getElementById("facts").textContent);
const text = (key, values = {}) => facts.texts[key].replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);

// An element: h("button", {class: "x", onclick: f}, "text", …). Properties that an element has are set, others are attributes.
function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && name !== "list") element[name] = value;
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

const SHAPES = {
  send: "M12 19V5M5 12l7-7 7 7", stop: "M7 7h10v10H7z", menu: "M4 7h16M4 12h16M4 17h16", plus: "M12 5v14M5 12h14",
  settings: "M4 7h10M18 7h2M4 17h2M10 17h10M16 5v4M8 15v4", left: "M15 6l-6 6 6 6", right: "M9 6l6 6-6 6",
  down: "M6 9l6 6 6-6", bin: "M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12", close: "M6 6l12 12M18 6L6 18",
};
function icon(name) {
  const span = h("span", { class: "icon", "aria-hidden": "true" });
  span.innerHTML = `<svg viewBox="0 0 24 24"><path d="${SHAPES[name]}"/></svg>`;
  return span;
}
const iconButton = (name, label, onclick, more = {}) =>
  h("button", { type: "button", class: "round", title: label, "aria-label": label, onclick, ...more }, icon(name));

// ---------------------------------------------------------------- what is kept

// "chat/ROLE/ID" → {role, id, greeting, turns, writing}; "draft/ROLE/ID" → what stands in the composer; "description/ROLE" → where
// the visitor has changed it, or invented the character. A turn is a question and its answers: {question,
// versions: [{text, base, state, words}], shown}; state is done, edited, cut or stopped. Each chat has a key of its own, so
// that tabs do not overwrite each other's; what is changed while another tab is `writing` there (it says when it last did)
// becomes a chat of its own. Which chat a tab shows is the tab's affair: {role, ids: {role: id}} in its session.
const unkept = {}; // what the storage did not take, for as long as the page is open
let erased = false, closed = false; // everything was deleted; the page is left: what still runs keeps nothing any more

function read(key, otherwise) {
  try {
    return JSON.parse(unkept[key] ?? localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}
function write(key, value) { // null removes it
  if (erased || closed) return;
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, JSON.stringify(value));
    delete unkept[key];
  } catch {
    if (value === null) delete unkept[key];
    else unkept[key] = JSON.stringify(value);
    say(text("storage"), true);
  }
}
function names(kind) {
  let kept = [];
  try {
    kept = Object.keys(localStorage);
  } catch {} // a browser that keeps nothing may refuse the question, too
  return [...new Set([...kept, ...Object.keys(unkept)])].filter((key) => key.startsWith(kind)).map((key) => key.slice(kind.length));
}

const settings = { ...facts.settings, compare: false, colour: false, strength: 1, ...read("settings", {}) };
const character = (name) => facts.characters[name] ?? { description: "", greeting: "", questions: [], portrait: "" };
const invented = () => [...names("description/"), ...names("chat/").map((key) => key.slice(0, key.lastIndexOf("/")))];
const roles = () => [...new Set([...Object.keys(facts.characters), ...invented()])];
const descriptionOf = (name) => read(`description/${name}`, character(name).description);
const describe = (name, words) =>
  write(`description/${name}`, name in facts.characters && words === character(name).description ? null : words);

const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8); // ids sort by their time
const newChat = (name, id = newId()) => ({ role: name, id, greeting: character(name).greeting, turns: [] });
const idsOf = (name) => names(`chat/${name}/`).filter((id) => !id.includes("/")).sort();
const listed = () => [...new Set([...idsOf(role), chat.id])].sort(); // one that is new is not kept yet
const keyOf = ({ role, id }) => `${role}/${id}`;
const draftOf = (chat) => read(`draft/${keyOf(chat)}`, "");
const keepDraft = (chat, words) => chat.deleted || write(`draft/${keyOf(chat)}`, words || null);

let role, chat;
let running = null; // the answer that is being written: {chat, turn, version, abort, status}

let shown = { ids: {} };
try {
  shown = JSON.parse(sessionStorage.getItem("shown")) ?? shown;
} catch {}

function open(name, id = shown.ids[name] ?? idsOf(name).at(-1) ?? newId()) {
  role = name;
  chat = running && keyOf(running.chat) === keyOf({ role, id }) ? running.chat : read(`chat/${keyOf({ role, id })}`, newChat(name, id));
  remember();
  write("role", name); // where a new tab begins
}

function remember() {
  shown.role = role;
  shown.ids[role] = chat.id;
  try {
    sessionStorage.setItem("shown", JSON.stringify(shown));
  } catch {}
}

function save(saved = chat) {
  if (saved === running?.chat) saved.writing = Date.now();
  else {
    delete saved.writing;
    const written = read(`chat/${keyOf(saved)}`)?.writing ?? 0;
    if (Date.now() - written < 2 * BEAT) part(saved); // a mark that is older was left by a tab that has crashed
  }
  if (!saved.deleted) write(`chat/${keyOf(saved)}`, saved);
}
const BEAT = 60_000; // milliseconds from mark to mark, while an answer does not grow

// Let a chat that another tab goes on with become another one here.
function part(mine) {
  mine.id = newId();
  if (mine === chat) remember();
}

// What was being written is as it shall stay.
function release() {
  const mine = running.chat;
  delete mine.writing;
  if (!mine.deleted) write(`chat/${keyOf(mine)}`, mine);
}

window.addEventListener("pagehide", () => {
  keepDraft(chat, composer.value);
  if (running) release();
  closed = true; // an answer breaks off with the page, and is kept as far as it came
});
// The browser may bring the page back as it was, and other tabs have gone on since.
window.addEventListener("pageshow", (event) => event.persisted && location.reload());

// Another tab has changed something.
window.addEventListener("storage", (event) => {
  const mine = running?.chat;
  if (event.key === null) {
    if (mine) write(`chat/${keyOf(mine)}`, null); // an answer's next word may have been kept before this was heard
    erased = true;
    return location.reload();
  }
  if (mine && event.key === `chat/${keyOf(mine)}`) {
    if (event.newValue !== null) return;
    write(event.key, null); // here, too
    mine.deleted = true;
    running.abort.abort();
    if (chat === mine) show(role, idsOf(role).at(-1) ?? newId());
  } else if (event.key === `chat/${keyOf(chat)}`) {
    if (editor()) {
      part(chat);
      save();
      keepingFocus(renderHeader);
    } else {
      const now = read(event.key, newChat(role, chat.id));
      if (grew(now)) return;
      chat = now;
      render();
    }
  } else if (event.key === `description/${role}` && !editor()) {
    render();
  } else if (event.oldValue === null || event.newValue === null) { // a chat or a character has come or gone
    keepingFocus(() => {
      renderHeader();
      renderCards();
    });
  }
});

// Whether another tab has only written on at the last answer. That is shown without drawing the rest anew, under the mouse.
function grew(now) {
  const before = (chat) => JSON.stringify([chat.turns.slice(0, -1), chat.turns.at(-1)?.versions.length, chat.turns.at(-1)?.shown]);
  if (!now.writing || !chat.writing || !now.turns.length || before(chat) !== before(now)) return false;
  Object.assign(shownOf(chat.turns.at(-1)), shownOf(now.turns.at(-1)));
  refresh(chat.turns.length - 1);
  return true;
}

// ---------------------------------------------------------------- what the model reads

// The stand-in has learnt single questions only: words before them would confuse it.
const greeted = (chat) => (chat.greeting && !facts.stand_in ? [{ role: "assistant", content: chat.greeting }] : []);
const shownOf = (turn) => turn.versions[turn.shown];

function messages(chat, count, column) {
  const list = greeted(chat);
  for (const turn of chat.turns.slice(0, count)) {
    const answer = shownOf(turn);
    if (!answer?.text) continue; // the page was left before its first word
    list.push({ role: "user", content: turn.question });
    list.push({ role: "assistant", content: (column === "base" && answer.base) || answer.text });
  }
  return [...list, { role: "user", content: chat.turns[count].question }];
}

const finished = (version) => ["done", "edited"].includes(version.state) && version.text.trim();

// Training data: each chat up to its last finished answer, then its other endings. An answer that was stopped or cut ends
// the sample before it, since it would be learnt as a whole one.
function samples(whole) {
  const system = facts.persona.replace(/\{(role|description)\}/g, (_, name) => ({ role, description: descriptionOf(role) })[name]);
  const lines = new Set();
  for (const id of idsOf(role)) {
    const chat = read(`chat/${keyOf({ role, id })}`);
    const said = greeted(chat);
    const endings = [];
    let longest = null;
    for (const turn of chat.turns) {
      const question = { role: "user", content: turn.question };
      turn.versions.forEach((version, number) => {
        if (!finished(version)) return;
        const ending = [...said, question, { role: "assistant", content: version.text }];
        if (!whole) lines.add(JSON.stringify({ role, system, prompt: turn.question, response: version.text }));
        else if (number === turn.shown) longest = ending;
        else endings.push(ending);
      });
      if (!shownOf(turn)?.text) continue;
      if (whole && !finished(shownOf(turn))) break;
      said.push(question, { role: "assistant", content: shownOf(turn).text });
    }
    if (whole && longest) endings.unshift(longest);
    if (whole) endings.forEach((messages) => lines.add(JSON.stringify({ role, system, messages })));
  }
  return [...lines].map((line) => line + "\n").join("");
}

function download(whole) {
  const lines = samples(whole);
  if (!lines) return say(text("nothing"), true);
  const link = h("a", { href: URL.createObjectURL(new Blob([lines], { type: "application/jsonl" })) });
  link.download = "conversation.jsonl";
  link.click();
}

// ---------------------------------------------------------------- an answer

async function ask(question) {
  if (running) return say(text("busy"), true);
  if (!question.trim()) return say(text("blank", { what: text("question") }), true);
  if (!leftEditor()) return;
  chat.turns.push({ question, versions: [], shown: 0 });
  if (question === composer.value) { // a question to begin with leaves the draft alone
    composer.value = "";
    keepDraft(chat, "");
  }
  grow();
  toBottom();
  await answer(chat.turns.length - 1);
}

// Write an answer to a turn: a new version of it, or `begun` as far as it goes.
async function answer(number, begun = null) {
  if (running) return say(text("busy"), true);
  if (!leftEditor()) return;
  const mine = chat, name = role, turn = mine.turns[number];
  const version = begun ?? { text: "", base: "", state: "stopped" };
  const again = begun ? 0 : turn.versions.length;
  const before = turn.shown;
  if (!begun) turn.shown = turn.versions.push(version) - 1;
  delete version.words;
  save(mine); // it may part from another tab's here
  const beat = setInterval(() => save(mine), BEAT);
  running = { chat: mine, turn, version, abort: new AbortController(), status: text("thinking", { role: name }) };
  say(again && !settings.do_sample ? text("greedy") : "");
  heard.textContent = "";
  save(mine);
  render();
  const sampled = Object.fromEntries(Object.keys(facts.settings).map((key) => [key, settings[key]]));
  if (sampled.seed >= 0) sampled.seed = (sampled.seed + again) % 2 ** 32; // another attempt, another answer
  const common = { role: name, description: descriptionOf(name), settings: sampled, strength: settings.strength };
  let failure = null, stopped = false;
  try {
    for (const column of settings.compare && facts.tuned ? ["text", "base"] : ["text"]) {
      const body = { ...common, messages: messages(mine, number, column), base: column === "base" };
      if (column === "text" && begun) body.begun = version.text;
      const cut = await stream(body, (grown) => {
        version[column] = grown;
        running.status = "";
        save(mine);
        if (chat === mine) refresh(number);
      });
      if (column === "text") version.state = cut ? "cut" : "done";
    }
    if (settings.colour && facts.tuned) await colour(mine, number, version, common);
  } catch (error) {
    if (error.name === "AbortError") stopped = true;
    else failure = error instanceof TypeError ? text("lost") : error.message;
  }
  // What was refused before a word was said leaves no trace but the draft, beside what was typed meanwhile.
  if (!version.text.trim()) {
    turn.versions.splice(turn.versions.indexOf(version), 1);
    turn.shown = Math.min(before, Math.max(turn.versions.length - 1, 0));
    if (!turn.versions.length) {
      mine.turns.splice(number, 1);
      const draft = [turn.question, chat === mine ? composer.value : draftOf(mine)].filter(Boolean).join("\n");
      keepDraft(mine, draft);
      if (chat === mine) composer.value = draft;
    }
    if (!stopped) failure ??= text("silent", { role: name });
  }
  clearInterval(beat);
  release();
  running = null;
  render();
  grow();
  if (failure) say(failure, true);
  else if (chat === mine) {
    if (version.text.trim()) heard.textContent = `${name}: ${version.text}`;
    if (status.classList.contains("error") && !Object.keys(unkept).length) say("");
  }
}

async function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error ?? text("failed"));
  return response;
}

// Returns whether the answer was cut at its longest.
async function stream(body, onText) {
  const response = await post("/answer", body, running.abort.signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "", cut = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (left + value).split("\n");
    left = lines.pop();
    for (const line of lines.map((line) => JSON.parse(line))) {
      if (line.error) throw new Error(line.error);
      if (line.note) say(line.note);
      if (line.place !== undefined) {
        running.status = text("waiting", { place: line.place + 1 }); // whose answer is being written is the first
        if (chat === running.chat) refresh(chat.turns.indexOf(running.turn));
      }
      if (line.text !== undefined) onText(line.text);
      if (line.cut !== undefined) cut = line.cut;
    }
  }
  if (cut === null) throw new TypeError("the stream broke off");
  return cut;
}

async function colour(mine, number, version, common) {
  const body = { ...common, messages: messages(mine, number, "text"), answer: version.text };
  version.words = (await (await post("/words", body, running.abort.signal)).json()).words;
}

// ---------------------------------------------------------------- what is shown

const portraits = {};
function portrait(name) {
  if (character(name).portrait) return h("img", { class: "portrait", src: character(name).portrait, alt: "" });
  const hue = [...name].reduce((sum, letter) => sum + letter.codePointAt(0) * 137, 0) % 360;
  const drawn = h("span", { class: "portrait", "aria-hidden": "true" }, [...name][0] ?? "?");
  drawn.style.setProperty("--hue", hue);
  return drawn;
}

const log = h("div", { id: "log", tabIndex: 0, role: "log", "aria-live": "off" });
const down = iconButton("down", text("newest"), () => toBottom(), { id: "down", hidden: true });
const status = h("p", { id: "status", role: "status" });
const heard = h("p", { id: "heard", role: "status" }); // read out, not seen: an answer that is finished
const composer = h("textarea", { id: "question", rows: 1, "aria-label": text("ask_label") });
const sendButton = iconButton("send", text("send"), () => (running ? running.abort.abort() : ask(composer.value)), { id: "send" });
const cards = h("aside", { id: "roles" });
const header = h("header", {});
const backdrop = h("div", { id: "backdrop", onclick: () => showRoles(false) });

function say(words, error = false) {
  status.textContent = words;
  status.classList.toggle("error", error);
}

const atBottom = () => log.scrollHeight - log.scrollTop - log.clientHeight < 48;
const toBottom = () => (log.scrollTop = log.scrollHeight);
log.addEventListener("scroll", () => (down.hidden = atBottom()));

function grow() {
  composer.style.height = "auto";
  composer.style.height = `${composer.scrollHeight}px`;
}

// What is drawn anew has the keyboard's focus where it was: on the button of the same words, or in the same part.
function keepingFocus(draw) {
  const active = document.activeElement;
  const part = [log, header, cards].find((part) => part !== active && part.contains(active));
  const what = (button) => [button.textContent, button.title, button.closest("[data-turn]")?.dataset.turn, button.closest(".answer") !== null].join();
  const wanted = what(active);
  draw();
  if (!part || document.contains(active)) return;
  const same = [...part.querySelectorAll("button:enabled")].find((button) => what(button) === wanted);
  (same ?? (part === log ? log : part.querySelector("button")))?.focus({ preventScroll: true });
}

const render = () => keepingFocus(draw);

// What would be drawn as it stands already stays, so that no button goes away between the finger's down and up.
function put(element, ...children) {
  const drawn = element.cloneNode();
  drawn.append(...children.filter(Boolean));
  if (!drawn.isEqualNode(element)) element.replaceChildren(...drawn.childNodes);
}

function draw() {
  const follow = atBottom() || !log.childElementCount;
  const top = log.scrollTop;
  log.setAttribute("aria-label", text("conversation", { role }));
  const list = h("div", { class: "column" });
  if (facts.stand_in) list.append(h("p", { id: "stand_in" }, text("stand_in")));
  list.append(h("div", { class: "cover" }, portrait(role), h("h1", {}, role), h("p", {}, descriptionOf(role))));
  if (chat.greeting) list.append(bubble(role, "theirs", chat.greeting, "greeting"));
  chat.turns.forEach((turn, number) => list.append(...turnElements(turn, number)));
  const questions = character(role).questions;
  if (!chat.turns.length && questions.length) {
    const list2 = questions.map((question) => h("button", { type: "button", onclick: () => ask(question) }, question));
    list.append(h("div", { class: "begin", role: "group", "aria-label": text("begin") }, ...list2));
  }
  log.replaceChildren(list);
  renderHeader();
  renderCards();
  composer.placeholder = text("ask", { role });
  const label = running ? text("stop") : text("send");
  sendButton.replaceChildren(icon(running ? "stop" : "send"));
  sendButton.setAttribute("aria-label", label);
  sendButton.title = label;
  if (follow) toBottom();
  else log.scrollTop = top;
  down.hidden = atBottom();
}

function bubble(name, side, content, kind = "", label = name) {
  const words = h("div", { class: "words" });
  words.append(content);
  return h("div", { class: `message ${side} ${kind}` }, side === "theirs" ? portrait(name) : null,
    h("div", { class: "body" }, h("div", { class: "name" }, label), words));
}

const dots = (words) =>
  h("span", { class: "dots", role: "status" }, h("i"), h("i"), h("i"), h("span", {}, words));

function turnElements(turn, number) {
  const asked = bubble(text("you"), "mine", turn.question);
  asked.dataset.turn = number;
  asked.append(h("div", { class: "actions" },
    action("copy", () => copy(turn.question)),
    action("edit", () => branch(number, turn.question))));
  const version = shownOf(turn);
  if (!version) return [asked];
  const answered = bubble(role, "theirs", "", "answer", role);
  answered.dataset.turn = number;
  fill(answered, turn, number);
  return [asked, answered];
}

const action = (key, onclick, label = text(key), title = label) =>
  h("button", { type: "button", onclick, title, class: key }, label);

// The part of an answer that changes while it is written.
function fill(element, turn, number) {
  const version = shownOf(turn);
  const writing = running?.version === version;
  const body = element.querySelector(".body");
  const columns = version.base || (writing && settings.compare && facts.tuned) ? ["text", "base"] : ["text"];
  const boxes = columns.map((column) => {
    const words = h("div", { class: "words" });
    if (column === "text" && version.words && settings.colour) words.append(...coloured(version.words));
    else words.append(version[column]);
    const empty = writing && !version[column] && (column === "text" || version.text);
    if (empty) words.append(dots(column === "text" ? running.status : ""));
    const name = columns.length === 1 ? role : `${role} · ${text(column === "text" ? "tuned" : "base")}`;
    return h("div", { class: `box ${column}`, hidden: !version[column] && !empty }, h("div", { class: "name" }, name), words);
  });
  if (version.words && settings.colour) boxes[0].append(legend(version.words));
  body.replaceChildren(h("div", { class: columns.length > 1 ? "both" : "" }, ...boxes));
  element.querySelector(".actions")?.remove();
  if (!writing) element.append(actions(turn, number));
}

function refresh(number) {
  const element = log.querySelector(`.answer[data-turn="${number}"]`);
  if (!element) return;
  const follow = atBottom();
  fill(element, chat.turns[number], number);
  if (follow) toBottom();
  else down.hidden = false;
}

function actions(turn, number) {
  const version = shownOf(turn), last = number === chat.turns.length - 1, row = h("div", { class: "actions" });
  if (last) row.classList.add("last");
  if (turn.versions.length > 1) {
    const page = (step) => () => {
      if (!leftEditor()) return;
      turn.shown += step;
      save();
      render();
    };
    row.append(
      iconButton("left", text("previous"), page(-1), { disabled: turn.shown === 0 }),
      h("span", { class: "count" }, `${turn.shown + 1}/${turn.versions.length}`),
      iconButton("right", text("next"), page(1), { disabled: turn.shown === turn.versions.length - 1 }));
  }
  if (version.state !== "done") row.append(h("span", { class: "state" }, text(`was_${version.state}`)));
  if (last && ["cut", "stopped"].includes(version.state)) row.append(action("continue", () => answer(number, version)));
  if (last) row.append(action("again", () => answer(number)));
  row.append(
    action("copy", () => copy(version.text)),
    action("edit", () => editAnswer(number), text("edit"), text("edit_answer")),
    action("branch", () => branch(number + 1, ""), text("branch"), text("branch_hint")));
  return row;
}

function editAnswer(number) {
  if (running) return say(text("busy"), true);
  if (!leftEditor()) return;
  const turn = chat.turns[number], element = log.querySelector(`.answer[data-turn="${number}"]`);
  const field = h("textarea", { defaultValue: shownOf(turn).text, "aria-label": text("edit_answer"), rows: 4 });
  const keep = () => {
    if (!field.value.trim()) return say(text("blank", { what: text("answer") }), true);
    turn.shown = turn.versions.push({ text: field.value, base: shownOf(turn).base, state: "edited" }) - 1;
    save();
    render();
  };
  element.querySelector(".actions").remove();
  element.querySelector(".body").replaceChildren(h("div", { class: "editor" }, field,
    h("div", {}, h("button", { type: "button", class: "strong", onclick: keep }, text("save")),
      h("button", { type: "button", onclick: render }, text("cancel")))));
  field.focus();
}

const editor = () => log.querySelector(".editor");
const edited = () => {
  const field = editor()?.querySelector("textarea");
  return field && field.value !== field.defaultValue;
};

// Whether the visitor may go on: an edit that is not saved is given up when he says so.
function leftEditor() {
  if (edited() && !confirm(text("edit_sure"))) return false;
  if (editor()) render();
  return true;
}

window.addEventListener("beforeunload", (event) => edited() && !erased && event.preventDefault());

// A new chat with the first `count` turns of this one.
function branch(count, draft) {
  if (running) return say(text("busy"), true);
  if (!leftEditor()) return;
  const copied = { ...structuredClone(chat), id: newId() };
  copied.turns = copied.turns.slice(0, count);
  keepDraft(copied, draft);
  addChat(copied);
  say(text("branched"));
}

// Show a chat of a role; without an id the tab's last one.
function show(name, id) {
  if (chat) keepDraft(chat, composer.value);
  open(name, id);
  log.replaceChildren();
  composer.value = draftOf(chat);
  say("");
  render();
  grow();
}

function addChat(added) {
  if (running?.chat === chat) running.abort.abort();
  save(added);
  show(role, added.id);
  composer.focus();
}

function go(step) {
  if (!leftEditor()) return;
  const ids = listed();
  show(role, ids[ids.indexOf(chat.id) + step]);
}

function deleteChat() {
  if (chat.turns.length && !confirm(text("delete_sure"))) return;
  if (running?.chat === chat) running.abort.abort();
  write(`chat/${keyOf(chat)}`, null);
  keepDraft(chat, "");
  chat.deleted = true;
  show(role, idsOf(role).at(-1) ?? newId());
}

async function copy(words) {
  try {
    await navigator.clipboard.writeText(words);
  } catch { // a page without https has no clipboard
    const field = h("textarea", { value: words });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  say(text("copied"));
}

const level = (difference) => Math.sign(difference) * [0.5, 2, 5].filter((least) => Math.abs(difference) >= least).length;
const coloured = (words) =>
  words.map(([word, difference]) =>
    h("span", { "data-level": level(difference), title: `${difference > 0 ? "+" : ""}${difference.toFixed(2)} nat` }, word));
const legend = (words) => h("p", { class: "legend" },
  h("span", { "data-level": -2 }, text("legend_less")), " ", h("span", { "data-level": 2 }, text("legend_more")), " · ",
  text("sum", { sum: words.reduce((sum, [, difference]) => sum + difference, 0).toFixed(1) }));

function renderHeader() {
  const ids = listed(), number = ids.indexOf(chat.id);
  put(header,
    iconButton("menu", text("roles"), () => showRoles(!document.body.classList.contains("choosing")), { id: "menu" }),
    h("button", { type: "button", id: "who", onclick: () => showRoles(true) }, portrait(role), h("strong", {}, role)),
    ids.length > 1 ? h("div", { class: "pager", role: "group", "aria-label": text("chats") },
      iconButton("left", text("previous_chat"), () => go(-1), { disabled: number === 0 }),
      h("span", { class: "count", title: text("chat_number", { number: number + 1, count: ids.length }) },
        `${number + 1}/${ids.length}`),
      iconButton("right", text("next_chat"), () => go(1), { disabled: number === ids.length - 1 }),
      iconButton("bin", text("delete"), deleteChat)) : null,
    h("button", { type: "button", id: "fresh", title: text("fresh"), "aria-label": text("fresh"),
      onclick: () => chat.turns.length ? leftEditor() && addChat(newChat(role)) : composer.focus() }, icon("plus"), h("span", {}, text("fresh"))),
    iconButton("settings", text("settings"), () => showSettings(), { id: "gear" }));
}

function renderCards() {
  const scroll = cards.scrollTop;
  const list = roles().map((name) => {
    const line = character(name).greeting || descriptionOf(name);
    return h("button", { type: "button", class: "card", "aria-current": name === role ? "true" : null,
      onclick: () => choose(name) }, portrait(name), h("span", {}, h("strong", {}, name), h("span", {}, line)));
  });
  put(cards,
    h("div", { class: "title" }, h("h2", {}, text("roles")),
      iconButton("close", text("close"), () => showRoles(false), { id: "close_roles" })),
    h("nav", { "aria-label": text("roles") }, ...list,
      h("button", { type: "button", class: "card new", onclick: showNewRole }, icon("plus"), h("span", {}, text("new_role")))));
  cards.scrollTop = scroll;
}

function showRoles(shown) {
  document.body.classList.toggle("choosing", shown);
  if (shown) cards.querySelector("[aria-current]")?.focus();
  else document.getElementById("menu").focus();
}

function choose(name) {
  if (!leftEditor()) return;
  document.body.classList.remove("choosing");
  if (name !== role) show(name);
  composer.focus();
}

// ---------------------------------------------------------------- the settings

function dialog(title, ...children) {
  const shown = h("dialog", { "aria-label": title, closedby: "any", onclose: () => shown.remove() });
  shown.append(h("div", { class: "title" }, h("h2", {}, title), iconButton("close", text("close"), () => shown.close())), ...children);
  document.body.append(shown);
  shown.showModal();
  return shown;
}

function showSettings() {
  if (!leftEditor()) return; // what is set here draws the conversation anew
  const described = h("textarea", { value: descriptionOf(role), rows: 4, maxLength: facts.limits.description, id: "description",
    oninput: () => describe(role, described.value),
    onchange: render });
  const restore = h("button", { type: "button", onclick: () => {
    describe(role, (described.value = character(role).description));
    render();
  } }, text("restore"));
  const set = (name, value) => {
    settings[name] = value;
    write("settings", settings);
  };
  const toggle = (name) => h("label", { class: "switch" },
    h("input", { type: "checkbox", name, checked: settings[name], onchange: (event) => { set(name, event.target.checked); render(); } }),
    text(name));
  const slider = (name) => {
    const [low, high, step] = facts.ranges[name];
    const shown = h("b", {}, String(settings[name]));
    const input = h("input", { type: name === "seed" ? "number" : "range", min: low, max: high, step, name, oninput: () => {
      if (!input.validity.valid || input.value === "") return;
      set(name, Number(input.value));
      shown.textContent = input.value;
    } });
    input.value = settings[name];
    return h("label", { class: "slider" }, h("span", {}, text(name), " ", name === "seed" ? null : shown), input);
  };
  const button = (key, onclick) => h("button", { type: "button", onclick }, text(key));
  const shown = dialog(text("settings"),
    h("label", { class: "field" }, text("description"), described), facts.characters[role] ? restore : null,
    ...(facts.tuned ? [toggle("compare"), toggle("colour"), slider("strength")] : []),
    h("h3", {}, text("settings_title")), toggle("do_sample"),
    ...Object.keys(facts.settings).filter((name) => name !== "do_sample").map(slider),
    h("h3", {}, text("data")), h("p", {}, text("kept")),
    h("div", { class: "buttons" }, button("download_whole", () => download(true)), button("download_rounds", () => download(false)),
      button("clear_all", () => {
        if (!confirm(text("clear_sure"))) return;
        erased = true;
        try {
          localStorage.clear();
          sessionStorage.clear();
        } catch {}
        location.reload();
      }),
      facts.sign_out ? button("sign_out", async () => { await post("/logout", {}); location.reload(); }) : null));
  return shown;
}

function showNewRole() {
  if (!leftEditor()) return;
  const name = h("input", { required: true, maxLength: facts.limits.role, name: "role", oninput: () =>
    name.setCustomValidity(roles().includes(name.value.trim()) ? text("known") : name.value.trim() ? "" : text("blank", { what: text("role") })) });
  const described = h("textarea", { required: true, rows: 4, maxLength: facts.limits.description, name: "description" });
  const form = h("form", { onsubmit: (event) => {
    event.preventDefault();
    const given = name.value.trim();
    describe(given, described.value);
    shown.close();
    choose(given);
  } }, h("label", { class: "field" }, text("role_name"), name), h("label", { class: "field" }, text("description"), described),
    h("button", { class: "strong" }, text("add")));
  const shown = dialog(text("new_role"), form);
}

composer.addEventListener("input", () => {
  grow();
  if (!chat.turns.length) save(); // another tab finds it by its chat
  keepDraft(chat, composer.value);
});
composer.addEventListener("keydown", (event) => {
  // The Enter that ends a choice of an input method is not one that sends.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  ask(composer.value);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && document.body.classList.contains("choosing")) showRoles(false);
});
window.addEventListener("resize", grow);

document.body.append(cards, backdrop, h("main", {}, header, log, heard, h("footer", {}, h("div", { class: "column" },
  down, status, h("div", { class: "composer" }, composer, sendButton)))));
show([shown.role, read("role"), ...roles()].find((name) => roles().includes(name)));
composer.focus();
