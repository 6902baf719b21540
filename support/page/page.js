// What the page does in the browser beside gradio's components. Run once, at its start; TEXTS holds both languages.
const say = TEXTS[navigator.language.startsWith("zh") ? "zh" : "en"];
const find = (selector) => document.querySelector(selector), composer = () => find("#question textarea");
const wrong = {}; // what the line above the conversation says, as long as it is so
const tell = (key, so) => {
  if (Boolean(wrong[key]) === Boolean(so)) return;
  wrong[key] = so ? say[key] : "";
  find("#notice p").textContent = Object.values(wrong).join(" ").trim();
};
document.documentElement.lang = navigator.language;
document.documentElement.style.cssText += `--before: "${say.base}"; --after: "${say.tuned}"`;

// What is typed outlives the page: a reload, a lost connection, a server that was restarted and knows no sign-in any more.
const retype = (field, text) => ((field.value = text), field.dispatchEvent(new Event("input")));
retype(composer(), sessionStorage.getItem("draft") ?? "");
const saveDraft = () => sessionStorage.setItem("draft", composer().value);
addEventListener("pagehide", saveDraft), addEventListener("visibilitychange", saveDraft);
const fetched = window.fetch;
window.fetch = (...request) => fetched(...request).then((answer) => (answer.status === 401 && location.reload(), answer));

// The panels. On a narrow page they lie over the conversation.
const narrow = matchMedia("(max-width: 768px)"), panels = ["roles", "settings"];
const open = (panel, so) => find(`#${panel}`).classList.contains("open") !== so && find(`#${panel} .toggle-button`).click();
narrow.onchange = () => panels.forEach((panel) => open(panel, panel === "roles" && !narrow.matches));
for (const panel of panels) {
  find(`#${panel}`).setAttribute("role", "region");
  find(`#${panel}`).ariaLabel = find(`#${panel} .toggle-button`).ariaLabel = say[panel];
}

// The browser's storage. Where it has no room, gradio's BrowserState tells nobody; and other tabs write to it, too.
const setItem = Storage.prototype.setItem, full = new Set();
Storage.prototype.setItem = function (key, value) {
  try { full.add(key), setItem.call(this, key, value), key.endsWith("chats") ? full.clear() : full.delete(key) }
  finally { tell("full", full.size) }
};
const loadAnew = () => {
  const typed = [...document.querySelectorAll("#roles :is(input, textarea), #question :focus")].some((field) => field.value);
  const busy = typed || find("#question .stop-button, .edit-textarea, #settings :focus, #roles :focus");
  if (wrong.stale && !busy && !document.hidden) location.reload();
};
addEventListener("storage", ({ key }) => (tell("stale", wrong.stale || key === "role-play-2-settled"), loadAnew()));
addEventListener("visibilitychange", loadAnew);

// A message lies in the page escaped (look.py). It is copied and edited as it reads.
const plain = (text) => text.replaceAll("&lt;", "<").replaceAll("&amp;", "&");
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const buttons = (field) => field.closest(".message-row").nextElementSibling;
const write = navigator.clipboard?.writeText.bind(navigator.clipboard);
if (write) navigator.clipboard.writeText = (text) => write(plain(text));
addEventListener("copy", (event) => {
  if (event.target.parentNode !== document.body) return; // a field of gradio's own, where the page is not secure
  event.clipboardData.setData("text/plain", plain(event.target.value));
  event.preventDefault();
});
addEventListener("focusin", ({ target }) => {
  if (!target.matches(".edit-textarea") || target.ariaLabel) return;
  target.ariaLabel = say.edit;
  setTimeout(() => retype(target, plain(target.value)));
});
addEventListener("click", ({ target }) => {
  const field = find(".edit-textarea");
  if (field && buttons(field).contains(target)) retype(field, escaped(field.value)); // gradio shows it as it is
  if (target.closest("#log .option, #log .example") && !find("#log .user-row")) composer().focus();
}, true);
let loaded = false; // until then a question would be overtaken by the conversation as it was
addEventListener("keydown", (event) => {
  const enter = event.key === "Enter" && !event.shiftKey, field = event.target.closest(".edit-textarea");
  if (enter && event.target === composer() && !loaded) return event.preventDefault(), event.stopPropagation();
  if (event.isComposing || event.keyCode === 229 || !(event.key === "Escape" || (field && enter))) return; // 229: Safari's
  if (!field) return open("settings", false), narrow.matches && open("roles", false);
  event.preventDefault();
  buttons(field).querySelectorAll("button")[enter ? 0 : 1].click(); // submit, cancel
  composer().focus();
}, true);
addEventListener("mouseover", ({ target }) => {
  const line = target.closest("#number li, #number input");
  if (line) line.title = line.innerText || line.value;
});

let seen; // the conversations as this tab has read or written them
window.page = { // for the listeners of web_demo.py
  start: (storage, ...values) => {
    open("roles", !narrow.matches);
    return [{ ...storage, role: sessionStorage.getItem("role") || storage.role }, ...values]; // each tab keeps to its own
  },
  loaded: () => { loaded = true },
  named: (storage, growing, personas, card, ...values) => { // a role by its name: its number may be another's after a restart
    return [storage, growing, personas, document.querySelectorAll("#cards b")[card]?.textContent, ...values];
  },
  chosen: () => (narrow.matches && open("roles", false), composer().focus()),
  stored: (storage, growing, personas) => {
    sessionStorage.setItem("role", storage.role);
    document.title = storage.role || document.title;
    find("#main").classList.toggle("several", storage.chats[storage.role]?.length > 1); // conversations to choose from
    const now = JSON.stringify([storage.chats, personas]);
    if (growing.version || seen === now) return;
    if (seen) localStorage.setItem("role-play-2-settled", Date.now()); // other tabs hear of it
    tell("stale", false);
    seen = now;
  },
  described: (text, storage, personas) => {
    const before = personas[storage.role] ?? find("#who span")?.textContent;
    return text === before ? personas : { ...personas, [storage.role]: text };
  },
  compared: (on) => find("#main").classList.toggle("both", on),
  sure: (key) => () => { if (!confirm(say[key])) throw "no" }, // gradio runs no `success` after it
  download: (lines) => {
    const href = URL.createObjectURL(new Blob([lines]));
    if (lines) Object.assign(document.createElement("a"), { download: "conversation.jsonl", href }).click();
  },
};
